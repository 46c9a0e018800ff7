"""How a start ended: one line, and a table to be pasted into a report. Knows no terminal.

The table is Markdown, and aligned, so that it reads the same on a terminal, in a file and in a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

import specvlm
from specvlm.words import counted
from specvlm_cli.caption.outcome import STAGES, Figures, Outcome, PlainSpeedup
from specvlm_cli.console.safe_text import cells, clean
from specvlm_cli.console.words import between, duration, over_plain, rate, share

KINDS_SHOWN = 5
Line = tuple[str, str]  # what, and how much


Kinds = Sequence[tuple[str, int]]  # failures by kind, the most frequent first


def ending(outcome: Outcome, *, overwriting: bool = False) -> str:
    """Return one line on how a start ended; one that was overwriting would begin again."""
    counts = f"{outcome.done} done, {outcome.failed} failed, {outcome.pending} to do"
    if outcome.figures is None and outcome.stopped == "locked":
        return f"left alone: another start is at work in {outcome.out}"
    if outcome.figures is None:
        what = "nothing to do" if outcome.found else "no videos found"
        again = "; --retry-failed tries the failed ones again" if outcome.failed else ""
        return f"{what}: {counts} in {outcome.out}{again}"
    if outcome.stopped is not None:
        command = "the same command without --overwrite" if overwriting else "the same command"
        return f"stopped by {outcome.stopped}: {counts} in {outcome.out}; {command} resumes from here"
    return f"{counts} in {outcome.out}, {duration(outcome.wall_s)}"


def summary(outcome: Outcome, kinds: Kinds = (), width: int | None = None) -> str:
    """Return the closing table; values are padded where it stays below `width` columns."""
    assert outcome.figures is not None
    figures = outcome.figures
    heading = (f"specvlm {specvlm.__version__}", datetime.now().astimezone().isoformat(" ", "minutes"))
    lines = [*_rates(outcome, figures), *speedups(figures), *_counts(outcome, figures), *_times(outcome)]
    if figures.captions:
        lines += [*_models(figures), *_tokens(figures), *_stages(figures)]
    lines += [*_failures(outcome, kinds), ("run folder", _code(outcome.out))]
    return pipe_table(heading, lines, width)


def _rates(outcome: Outcome, figures: Figures) -> Iterator[Line]:
    """Say what the user feels first: wall time of captioning, loading not counted."""
    if outcome.videos_per_hour is not None:
        slower = (
            f", {counted(figures.compared, 'comparison')} with plain included" if figures.compared else ""
        )
        yield "videos per hour", f"{rate(outcome.videos_per_hour)}{slower}"
    if outcome.caption_tokens_per_s is not None:
        yield "tokens per second", rate(outcome.caption_tokens_per_s)


def _counts(outcome: Outcome, figures: Figures) -> Iterator[Line]:
    yield (
        "videos",
        f"{outcome.found:,} found, {outcome.done:,} done, {outcome.failed:,} failed, {outcome.pending:,} to do",
    )
    failed = f", {counted(outcome.failed_now, 'video')} failed" if outcome.failed_now else ""
    yield "this start", f"{counted(figures.captions, 'caption')}{failed}"


def _times(outcome: Outcome) -> Iterator[Line]:
    captioning = outcome.captioning
    of_it = f", captioning {duration(captioning.seconds)} of it" if captioning else ""
    yield "wall time", f"{duration(outcome.wall_s)}{of_it}"
    if captioning and captioning.waited_share is not None:
        yield "waiting for input", f"{share(captioning.waited_share, 1.0)} of the time, with slots free"


def _models(figures: Figures) -> Iterator[Line]:
    yield "target", ", ".join(figures.targets)
    yield "draft", ", ".join(figures.drafts) or "none: plain decoding"
    yield "device", ", ".join(figures.devices)
    if figures.mean_batch_size is not None:
        yield "batch size", f"{figures.mean_batch_size:.1f} on average"


def _tokens(figures: Figures) -> Iterator[Line]:
    while_decoding = (
        f", {rate(figures.tokens_per_s)}/s while decoding" if figures.tokens_per_s is not None else ""
    )
    yield "tokens", f"{figures.completion_tokens:,}{while_decoding}"
    if figures.mean_accepted_tokens is not None:
        yield "accepted per round", f"{figures.mean_accepted_tokens:.2f} draft tokens"
        yield "tokens per round", f"{figures.mean_acceptance_length:.2f}, the bonus token included"


def speedups(figures: Figures) -> Iterator[Line]:
    """Yield what is known of the speedup over plain decoding: measured as a ratio, estimated as a range."""
    if not figures.drafts:
        return
    yield from _speedup("decode speedup", figures.decode, figures.decode_estimated)
    yield from _speedup("end-to-end speedup", figures.end_to_end, figures.end_to_end_estimated)
    if (off := figures.estimate_over_measured) is not None:
        low, high = (f"{100.0 * (ratio - 1.0):+.0f} %" for ratio in (off.p10, off.p90))
        yield "error of estimates", f"{low} to {high} (p10 to p90), {counted(off.captions, 'caption')}"
    if figures.compared:
        yield "identical to plain", f"{figures.identical:,}/{figures.compared:,} captions"


def _speedup(name: str, measured: PlainSpeedup | None, estimated: PlainSpeedup | None) -> Iterator[Line]:
    if measured is not None:
        ratio = f"{measured.of_totals:.2f}x {over_plain(measured.mean_batch_size)}"
        yield name, f"{ratio}, {measured.captions:,} measured"
    if estimated is not None:
        yield name, f"{between(*estimated.between)} {over_plain(estimated.mean_batch_size)}, estimated"
    if measured is None and estimated is None:
        yield name, "not measured; --baseline-sample measures it"


def _stages(figures: Figures) -> Iterator[Line]:
    whole = sum(figures.stages_s.values())
    if not whole:
        return
    shares = [
        f"{stage[:-2].replace('_', ' ')} {share(seconds, whole)}"
        for stage in STAGES
        if (seconds := figures.stages_s[stage])
    ]
    yield "time by stage", ", ".join(shares[:3])
    if shares[3:]:
        yield "", ", ".join(shares[3:])


def _failures(outcome: Outcome, kinds: Kinds) -> Iterator[Line]:
    shown = [f"{number:,} {kind}" for kind, number in kinds[:KINDS_SHOWN]]
    rest = sum(number for _, number in kinds[KINDS_SHOWN:])
    if shown:
        yield "failures by kind", ", ".join([*shown, f"{rest:,} of other kinds"] if rest else shown)
    if outcome.failed:
        yield "failures file", _code(outcome.failures_file or f"{outcome.out}/failures")


def _code(path: str) -> str:
    """Return a path that Markdown takes literally."""
    return path if "`" in path else f"`{path}`"


def pipe_table(heading: Line, lines: Iterable[Line], width: int | None = None) -> str:
    """Return a Markdown table of two columns, below `width` columns where no single value is too long."""
    rows = [tuple(clean(cell).replace("|", "\\|") for cell in line) for line in (heading, *lines)]
    left = max(cells(row[0]) for row in rows)
    right = max(cells(row[1]) for row in rows)
    if width is not None:
        right = min(right, max(width - left - 8, 3))
    rows.insert(1, ("-" * left, "-" * right))
    return "\n".join(_row(row, left, right) for row in rows)


def _row(row: Sequence[str], left: int, right: int) -> str:
    padded = [cell + " " * (size - cells(cell)) for cell, size in zip(row, (left, right), strict=True)]
    return f"| {padded[0]} | {padded[1]} |"
