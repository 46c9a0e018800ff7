"""What a person sees of a bench: how far it is, on stderr, and its tables, on stdout.

Knows records and a terminal, nothing of models. Columns that have nothing to say are left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from specvlm.bench.records import (
    BASELINES,
    STAGES,
    Conditions,
    Configuration,
    Left,
    MethodName,
    Report,
    Summary,
)
from specvlm_cli import show
from specvlm_cli.screen.words import amount, counted
from specvlm_cli.talk import LOG_EVERY_S, STDERR
from specvlm_cli.text import MOST_CHARACTERS, cells, short

if TYPE_CHECKING:
    from typing import TextIO

    from specvlm.bench.suite import Step

_STAGES_IN_WORDS = {
    "read_s": "read",
    "preprocess_s": "prepare",
    "vision_s": "vision",
    "target_prefill_s": "prefill",
    "draft_prefill_s": "draft\nprefill",
    "prefill_s": "until\ntoken 1",
    "draft_s": "draft",
    "verify_s": "verify",
    "commit_s": "commit",
    "host_s": "host",
    "steps_s": "tokens\n2...",
    "rest_s": "rest",
}
_NAME_CHARACTERS = 60
_DEPTHS = 8  # as many are shown


class BenchTalk:
    """Tells how far a bench is: a bar on a terminal, elsewhere a line every 30 s. Warnings come in any case."""

    def __init__(
        self, quiet: bool, clock: Callable[[], float] = time.monotonic, console: Console | None = None
    ) -> None:
        self._quiet, self._clock = quiet, clock
        self._console = console or Console(
            file=cast("TextIO", STDERR), markup=False, emoji=False, highlight=False, soft_wrap=True
        )
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._told_at = clock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Show progress while the block runs."""
        if self._quiet or not (self._console.is_terminal and self._console.is_interactive):
            yield
            return
        columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        words = TextColumn("{task.description}", markup=False)
        # Drawn between captions alone: a thread that draws would take its time from what is measured.
        with Progress(*columns, words, console=self._console, transient=True, auto_refresh=False) as bar:
            self._bar, self._task = bar, bar.add_task("", total=None)
            try:
                yield
            finally:
                self._bar = None

    def note(self, message: str) -> None:
        """Say something that is worth a line; not with -q."""
        if not self._quiet:
            self.warn(message)

    def warn(self, message: str) -> None:
        """Say something that went wrong."""
        console = self._console if self._bar is None else self._bar.console
        console.print(Text(short(message, MOST_CHARACTERS)))

    def step(self, step: Step) -> None:
        """Take note of a caption that is about to be made."""
        if self._bar is not None:
            words = short(step.what, _NAME_CHARACTERS)
            self._bar.update(self._task, completed=step.done, total=step.total, description=words)
            self._bar.refresh()
        elif self._clock() - self._told_at >= LOG_EVERY_S:
            self._told_at = self._clock()
            self.note(f"{step.done} of {counted(step.total, 'caption')}: {step.what}")

    def left_out(self, left: Left) -> None:
        """Say which video is left out, and why."""
        self.warn(f"left out: {left.video}: {left.reason}")

    def failed(self, how: Configuration, error: str) -> None:
        """Say which method is left out from here on; the table says why."""
        self.note(f"{how.label} fails, and the others go on")


class Column(NamedTuple):
    """One column of a table; its name stands on one or two lines."""

    name: str
    cell: Callable[[Summary], str]


def tell(report: Report) -> None:
    """Print a report, in tables as wide as the terminal at most."""
    if report.modelled:
        show.line(report.label, "bold yellow")
    show.pairs([*_conditions(report.conditions), *_memory(report)])
    _table("Speed", report, _speed(report))
    _table("Where the time goes, in ms a video", report, _stages())
    _table("Rounds", report, _rounds(), [one for one in report.summaries if one.num_drafts])
    _limits(report)


def _table(
    title: str, report: Report, columns: Sequence[Column], summaries: Sequence[Summary] | None = None
) -> None:
    """Print the columns that have something to say, below each other where they do not stand side by side."""
    shown = report.summaries if summaries is None else summaries
    if not shown:
        return
    head = [Column("method", lambda one: one.configuration.label)]
    if len({one.configuration.frames_asked for one in report.summaries}) > 1:
        head.append(Column("frames", lambda one: str(one.configuration.frames_asked or "preset's")))
    first = [_cells(column, shown) for column in head]
    rest = [found for column in columns if any((found := _cells(column, shown))[2:])]
    show.line("")
    show.line(title, "bold")
    for block in _blocks(first, rest, show.console().width if sys.stdout.isatty() else None):
        lines = list(zip(*first, *block, strict=True))
        for text in show.aligned(lines, right=set(range(1, len(lines[0])))):
            show.line(text)


def _cells(column: Column, summaries: Sequence[Summary]) -> list[str]:
    """A column from top to bottom: two lines of its name, then its cells."""
    above, _, below = column.name.rpartition("\n")
    return [above, below, *(column.cell(one) for one in summaries)]


def _blocks(
    first: Sequence[list[str]], rest: Sequence[list[str]], width: int | None
) -> Iterator[list[list[str]]]:
    """Deal columns out to tables that fit into the width, each beside the first columns."""
    room = float("inf") if width is None else width - sum(map(_width, first))
    block: list[list[str]] = []
    for column in rest:
        if block and sum(map(_width, [*block, column])) > room:
            yield block
            block = []
        block.append(column)
    yield block


def _width(column: Sequence[str]) -> int:
    return max(map(cells, column)) + 2


def _speed(report: Report) -> list[Column]:
    columns = [Column("ms/\ntoken", lambda one: "failed" if one.error else _ms(one.token_s))]
    columns += [Column(f"decode\nx {base}", _decode(base)) for base in BASELINES]
    columns += [Column(f"end to end\nx {base}", _e2e(base)) for base in BASELINES]
    columns += [
        Column("accepted", lambda one: _number(one.mean_accepted_tokens)),
        Column(f"same as\n{_reference(report)}", lambda one: _share(one.exact_match)),
        Column("video\ntokens", lambda one: f"{one.video_tokens:.0f}" if one.videos else ""),
        Column("draft\nsees", lambda one: f"{one.video_tokens_kept:.0f}" if one.video_tokens_kept else ""),
    ]
    if report.conditions.peak_memory_of == "device":
        columns.append(
            Column("peak\nmemory", lambda one: amount(one.peak_memory_bytes) if one.videos else "")
        )
    return columns


def _reference(report: Report) -> str:
    return next((one.exact_match_against for one in report.summaries if one.exact_match_against), "stock")


def _decode(baseline: MethodName) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        found = summary.speedup(baseline)
        return "" if found is None else _number(found.decode)

    return cell


def _e2e(baseline: MethodName) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        found = summary.speedup(baseline)
        return "" if found is None else _number(found.e2e)

    return cell


def _stages() -> list[Column]:
    columns = [Column(_STAGES_IN_WORDS[name], _stage(name)) for name in STAGES]
    return [
        *columns,
        Column("all", lambda one: f"{1e3 * one.total_s / one.videos:.1f}" if one.videos else ""),
    ]


def _stage(name: str) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        seconds = getattr(summary.stages, name)
        return f"{1e3 * seconds / summary.videos:.1f}" if seconds else ""

    return cell


def _rounds() -> list[Column]:
    return [
        Column("nodes", lambda one: "" if one.mean_nodes is None else f"{one.mean_nodes:.1f}"),
        Column("T_plain\nms", lambda one: _ms(one.plain_token_s)),
        Column("T_draft\nms", lambda one: _ms(one.draft_round_s)),
        Column("T_verify\nms", lambda one: _ms(one.verify_round_s)),
        Column("host\nshare", lambda one: _share(one.host_share)),
        Column("accepted at depth\n1, 2, ...", _depths),
        Column("speedup\npredicted", lambda one: _number(one.predicted_decode_speedup)),
        Column("measured/\npredicted", lambda one: _number(one.measured_over_predicted)),
    ]


def _depths(summary: Summary) -> str:
    return " ".join(_number(one) or "-" for one in summary.acceptance_per_depth[:_DEPTHS])


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100.0 * value:.3g} %"


def _limits(report: Report) -> None:
    several = len({one.configuration.frames_asked for one in report.summaries}) > 1
    show.line("")
    for one in report.summaries:
        frames = one.configuration.frames_asked if several else None
        name = one.configuration.label + ("" if frames is None else f", {frames} frames")
        if one.error or one.limit:
            show.line(f"{name}: failed: {one.error}" if one.error else f"{name}: limit: {one.limit}")


def _memory(report: Report) -> Iterator[tuple[str, str]]:
    """What a process has needed at most says nothing of one method; a device's is a column instead."""
    if report.conditions.peak_memory_of == "process" and report.summaries:
        most = max(one.peak_memory_bytes for one in report.summaries)
        yield (
            "peak memory",
            f"{amount(most)} of the process, all methods together: such a peak cannot be reset",
        )


def _conditions(its: Conditions) -> list[tuple[str, str]]:
    pair = its.target if its.draft is None else f"{its.target}, draft {its.draft}"
    machine = ", ".join(filter(None, (its.machine, its.processor, counted(its.cores, "core"))))
    versions = (
        f"specvlm {its.specvlm_version}, torch {its.torch_version}, transformers {its.transformers_version}, "
        f"Python {its.python_version}"
    )
    return [
        ("target", f"{pair}, {its.dtype}"),
        ("device", f"{its.device}, {counted(its.threads, 'thread')}; {machine}"),
        ("versions", versions),
        ("clips", f"{its.clips}: {counted(len(its.videos), 'video')}"),
        (
            "captions",
            f"at most {its.max_new_tokens} tokens; {counted(its.repeat, 'timed turn')} after warm-up",
        ),
    ]
