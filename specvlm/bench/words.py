"""Names and numbers of a bench as people read them, the same in the terminal, on the page and on a sheet.

Knows records alone; neither terminal nor HTML. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import NamedTuple

from specvlm.bench.records import BASELINES, BenchReport, MethodName, Spread, Summary
from specvlm.words import amount, counted, percent

STAGE_NAMES = {
    "read_s": "read",
    "preprocess_s": "preprocess",
    "vision_s": "vision",
    "target_prefill_s": "target prefill",
    "draft_prefill_s": "draft prefill",
    "prefill_s": "until token 1",
    "draft_s": "draft",
    "verify_s": "verify",
    "commit_s": "commit",
    "host_s": "host",
    "steps_s": "tokens 2...",
    "rest_s": "rest",
}
MOST_DEPTHS = 8  # of a table's cell


class Column(NamedTuple):
    """One column of a table."""

    name: str  # on one or two lines
    cell: Callable[[Summary], str]
    is_listed: bool = False  # a cell holds a list, whose figures are below those of the cell above


def number(value: float | None) -> str:
    """A ratio or a count that is a mean; empty for None."""
    return "" if value is None else f"{value:.2f}"


def ms(seconds: float | None, digits: int = 2) -> str:
    """A time in milliseconds, without the unit; empty for None."""
    return "" if seconds is None else f"{1e3 * seconds:.{digits}f}"


def mean_words(value: float) -> str:
    """A mean of whole numbers: without decimals where it is one."""
    return f"{value:.1f}".removesuffix(".0")


def depths(summary: Summary) -> str:
    """Acceptance by depth, each in four characters, so that depths of several rows stand below each other."""
    shares = summary.acceptance_per_depth
    shown = " ".join(number(one) or "   -" for one in shares[:MOST_DEPTHS])
    return f"{shown} …" if len(shares) > MOST_DEPTHS else shown


def has_several_frames(summaries: Iterable[Summary]) -> bool:
    """Whether configurations differ in the frames asked for."""
    return len({one.configuration.frames_asked for one in summaries}) > 1


def baseline_of(report: BenchReport) -> MethodName | None:
    """The method that speedups are shown against: the first of the baselines that ran."""
    return next((base for base in BASELINES if any(one.speedup(base) for one in report.summaries)), None)


def frames_of(summary: Summary) -> str:
    """Frames that were read, the mean over videos; where none were, those that were asked for."""
    if summary.num_frames:
        return mean_words(summary.num_frames)
    return (
        "preset's" if summary.configuration.frames_asked is None else str(summary.configuration.frames_asked)
    )


def frames_note(asked: int, read: float, multiple: int) -> str:
    """Why other frames were read than asked for; empty where they were not.

    Args:
        asked: Frames asked for.
        read: Mean of those that were read.
        multiple: The model takes multiples of so many.
    """
    if read == asked:
        return ""
    told = f"{counted(asked, 'frame')} asked, {mean_words(read)} read"
    if asked % multiple and abs(read - asked) < multiple and read % multiple == 0:
        return f"{told}: this model takes multiples of {multiple}"
    return f"{told}: videos have no more" if read < asked else f"{told}: the fewest that are read"


def frames_notes(report: BenchReport) -> list[str]:
    """What is to be said of each number of frames that was asked for, once."""
    multiple, found = report.conditions.frame_multiple, []
    for asked in dict.fromkeys(one.configuration.frames_asked for one in report.summaries):
        read = [
            one.num_frames
            for one in report.summaries
            if one.videos and one.configuration.frames_asked == asked
        ]
        if asked is not None and read and (note := frames_note(asked, fmean(read), multiple)):
            found.append(note)
    return found


def clips_words(report: BenchReport) -> str:
    """Which clips, how many, and how often."""
    its = report.conditions
    words = f"{its.clips}: {counted(len(its.videos), 'video')}"
    return (
        words if its.repeated_to is None else f"{words}, repeated to {its.repeated_to} for the largest batch"
    )


def peak_words(report: BenchReport) -> str:
    """The peak of a process, which no method has for itself; empty if the device reports each method's."""
    most = report.process_peak_bytes
    return "" if most is None else f"{amount(most)}, of the process with all methods"


def name_of(summary: Summary, several_frames: bool) -> str:
    """A configuration's label, with its frames where there are several, and its batch size where it is not 1."""
    label, size = summary.configuration.label, summary.configuration.batch_size
    if several_frames:
        label += f", {frames_of(summary)} frames"
    return f"{label}, batch {size}" if size > 1 else label


def limits(report: BenchReport) -> Iterator[tuple[str, str]]:
    """Each configuration, and what is said of its limit, or why it failed."""
    several = has_several_frames(report.summaries)
    for one in report.summaries:
        said = missing_words(one, one.error) if one.error is not None else one.limit
        if said:
            yield name_of(one, several), said


def stopped_words(report: BenchReport) -> str:
    """What a bench that was stopped has kept; empty where it was not."""
    if not report.stopped:
        return ""
    videos = len({one.video for one in report.samples})
    parted = {
        (one.configuration.frames_asked, "" if report.is_batched else one.video, one.turn)
        for one in report.samples
    }
    turns = len(parted)
    return f"stopped early: kept {counted(turns, 'whole turn')} of {counted(videos, 'video')}"


def reference(report: BenchReport) -> str:
    """The method whose captions the others are compared with."""
    return next((one.exact_match_against for one in report.summaries if one.exact_match_against), "stock")


def spread(value: Spread | None) -> str:
    """What lies between a tenth and nine tenths of the turns; empty with a single turn."""
    return "" if value is None else f"{value.p10:.2f} to {value.p90:.2f}"


def speedup_cell(base: MethodName, kind: str) -> Callable[[Summary], str]:
    """A cell of speedups over a method; `kind`: a field of `Speedup`, e.g. `decode`."""

    def cell(one: Summary) -> str:
        if one.configuration.method == base and one.error is None:
            return "1.00"
        return number(getattr(one.speedup(base), kind, None))

    return cell


def missing_words(one: Summary, error: str) -> str:
    """Why there are no figures. `transformers` refuses assisted generation for many pairs, which is no failure."""
    return f"{'not run' if one.configuration.method == 'assisted' else 'failed'}: {error}"


def rounds_columns() -> list[Column]:
    """What a round is made of: the terms of the speedup formula, and what they predict."""
    return [
        Column("nodes", lambda one: "" if one.mean_nodes is None else f"{one.mean_nodes:.1f}"),
        Column("T_plain\nms", lambda one: ms(one.plain_token_s)),
        Column("T_draft\nms", lambda one: ms(one.draft_round_s)),
        Column("T_verify\nms", lambda one: ms(one.verify_round_s)),
        Column("host\nshare", lambda one: percent(one.host_share)),
        Column("speedup\npredicted", lambda one: number(one.predicted_decode_speedup)),
        Column("measured/\npredicted", lambda one: number(one.measured_over_predicted)),
        Column("accepted at depth\n1, 2, ...", depths, is_listed=True),
    ]


def spread_columns() -> list[Column]:
    """The spreads over turns of each speedup over each baseline."""

    def cell(base: MethodName, kind: str) -> Callable[[Summary], str]:
        return lambda one: spread(getattr(one.speedup(base), f"{kind}_turns", None))

    kinds = {"decode": "decode", "end to end": "e2e"}
    return [
        Column(f"{name}\nx {base}", cell(base, kind)) for name, kind in kinds.items() for base in BASELINES
    ]


def settled(one: Summary) -> str:
    """Share of tokens that plain steps decided; empty where there was none."""
    return f"{100 * one.settled_share:.2g}%" if one.settled_share else ""


def rate(value: float | None) -> str:
    """Videos per hour, or tokens per second: three digits at least; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}"


def rate_columns() -> list[Column]:
    """Videos and tokens in a time."""

    def turns(one: Summary) -> str:
        found = one.videos_per_hour_turns
        return "" if found is None else f"{rate(found.p10)} to {rate(found.p90)}"

    return [
        Column("videos\nper hour", lambda one: rate(one.videos_per_hour)),
        Column("p10 to p90\nover turns", turns),
        Column("tokens\nper s", lambda one: rate(one.tokens_per_s)),
        Column("mean\nbatch", lambda one: mean_words(one.mean_batch_size) if one.videos else ""),
    ]
