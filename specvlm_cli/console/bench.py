"""What a person sees of a bench: how far it is, on stderr, and its tables, on stdout.

Knows records and a terminal, nothing of models. Columns that have nothing to say are left out.
"""

from __future__ import annotations

import textwrap
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
    BenchReport,
    Configuration,
    Left,
    Summary,
)
from specvlm.bench.words import (
    STAGE_NAMES,
    Column,
    clips_words,
    frames_notes,
    frames_of,
    has_several_frames,
    limits,
    missing_words,
    ms,
    number,
    peak_words,
    rate_columns,
    reference,
    rounds_columns,
    settled,
    speedup_cell,
    spread_columns,
    stopped_words,
)
from specvlm.words import amount, counted, percent
from specvlm_cli.console import tables
from specvlm_cli.console.safe_text import MOST_CHARACTERS, cells, clean, short
from specvlm_cli.console.streams import escaping
from specvlm_cli.console.voice import LOG_EVERY_S, STDERR

if TYPE_CHECKING:
    from typing import TextIO

    from specvlm.bench.suite import BenchStep

_NAME_CHARACTERS = 60


class BenchTalk:
    """Shows the progress of a bench: a bar on a terminal, elsewhere a line every 30 s. Warnings come in any case."""

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
                with escaping():  # rich would read escape sequences of libraries
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

    def step(self, step: BenchStep) -> None:
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
        self.note(
            f"{how.label}: {'not run' if how.method == 'assisted' else 'failed'}; the other methods continue"
        )


class Block(NamedTuple):
    """Columns that stand side by side, from top to bottom, and which of them begin on the left."""

    columns: list[list[str]]
    listed: set[int]


def tell(report: BenchReport) -> None:
    """Print a report, in tables and lines as wide as the terminal at most, elsewhere of 80 characters."""
    _pairs([*_conditions(report), *_remarks(report)])
    if report.is_batched:
        _table("Throughput, in wall time", report, rate_columns())
    _table("Speed", report, _speed(report))
    _table("Speed over turns, p10 to p90", report, spread_columns())
    _table("Where the time goes, in ms a video", report, _stages())
    _table("Rounds", report, rounds_columns(), [one for one in report.summaries if one.num_drafts])
    _limits(report)


def _width() -> int:
    return tables.console().width


def _wrapped(text: str, hanging: str = "  ") -> None:
    """Print text on as many lines as it needs; a word that is too long stays whole, so that it can be copied."""
    for line in textwrap.wrap(
        clean(text), _width(), subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    ):
        tables.line(line)


def _pairs(lines: Sequence[tuple[str, str]]) -> None:
    """Print names and values, the values below each other."""
    wide = max(cells(name) for name, _ in lines) + 2
    for name, value in lines:
        _wrapped(f"{name:{wide}}{clean(value)}", hanging=" " * wide)


def _table(
    title: str, report: BenchReport, columns: Sequence[Column], summaries: Sequence[Summary] | None = None
) -> None:
    """Print the columns that have something to say, below each other where they do not stand side by side."""
    shown = report.summaries if summaries is None else summaries
    if not shown:
        return
    head = [Column("method", lambda one: one.configuration.label)]
    if has_several_frames(report.summaries):
        head.append(Column("frames", frames_of))
    if report.is_batched:
        head.append(Column("batch", lambda one: str(one.configuration.batch_size)))
    first = [_cells(column, shown) for column in head]
    rest = [(column, found) for column in columns if any((found := _cells(column, shown))[2:])]
    if not rest:
        return
    tables.line("")
    tables.line(title, "bold")
    for place, block in enumerate(_even_blocks(rest, _width() - sum(map(_width_of, first)))):
        if place:
            tables.line("")
        lines = list(zip(*first, *block.columns, strict=True))
        right = {number for number in range(1, len(lines[0])) if number - len(first) not in block.listed}
        for text in tables.aligned(lines if any(lines[0]) else lines[1:], right):
            tables.line(text)


def _cells(column: Column, summaries: Sequence[Summary]) -> list[str]:
    """A column from top to bottom: two lines of its name, then its cells."""
    above, _, below = column.name.rpartition("\n")
    return [above, below, *(column.cell(one) for one in summaries)]


def _even_blocks(columns: Sequence[tuple[Column, list[str]]], room: int) -> list[Block]:
    """As few tables as the room allows, each about as wide as the others."""
    found = list(_blocks(columns, room))
    for less in range(room - 1, 0, -1):
        narrower = list(_blocks(columns, less))
        if len(narrower) > len(found):
            break
        found = narrower
    return found


def _blocks(columns: Sequence[tuple[Column, list[str]]], room: int) -> Iterator[Block]:
    """Deal columns out to tables that fit into the room."""
    block = Block([], set())
    for column, found in columns:
        if block.columns and sum(map(_width_of, [*block.columns, found])) > room:
            yield block
            block = Block([], set())
        if column.is_listed:
            block.listed.add(len(block.columns))
        block.columns.append(found)
    yield block


def _width_of(column: Sequence[str]) -> int:
    return max(map(cells, column)) + 2


def _speed(report: BenchReport) -> list[Column]:
    columns = [
        Column(
            "ms/\ntoken", lambda one: missing_words(one, "").rstrip(": ") if one.error else ms(one.token_s)
        )
    ]
    columns += [Column(f"decode\nx {base}", speedup_cell(base, "decode")) for base in BASELINES]
    columns += [Column(f"end to end\nx {base}", speedup_cell(base, "e2e")) for base in BASELINES]
    columns += [
        Column("accepted", lambda one: number(one.mean_accepted_tokens)),
        Column(f"same as\n{reference(report)}", lambda one: percent(one.exact_match)),
        Column("settled", settled),
        Column("video\ntokens", lambda one: f"{one.video_tokens:.0f}" if one.videos else ""),
        Column("draft\nsees", lambda one: f"{one.video_tokens_kept:.0f}" if one.video_tokens_kept else ""),
        Column("compressor", lambda one: ", ".join(one.compressors), is_listed=True),
    ]
    if report.conditions.peak_memory_of == "device":
        columns.append(
            Column("peak\nmemory", lambda one: amount(one.peak_memory_bytes) if one.videos else "")
        )
    return columns


def _stages() -> list[Column]:
    columns = [Column(STAGE_NAMES[name].replace(" ", "\n", 1), _stage(name)) for name in STAGES]
    return [
        *columns,
        Column("all", lambda one: f"{1e3 * one.total_s / one.videos:.1f}" if one.videos else ""),
    ]


def _stage(name: str) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        seconds = getattr(summary.stages, name)
        return f"{1e3 * seconds / summary.videos:.1f}" if seconds else ""

    return cell


def _limits(report: BenchReport) -> None:
    """Say of each method what its limit is, or why it failed."""
    lines = list(limits(report))
    if lines:
        tables.line("")
        tables.line("Limits", "bold")
    for name, said in lines:
        _wrapped(f"{name}: {said}")


def _remarks(report: BenchReport) -> Iterator[tuple[str, str]]:
    """What is to be known of all figures."""
    remarks = [("frames", note) for note in frames_notes(report)]
    remarks += [
        ("peak memory", peak_words(report)),
        ("turns", stopped_words(report)),
    ]
    yield from ((name, said) for name, said in remarks if said)


def _conditions(report: BenchReport) -> list[tuple[str, str]]:
    its = report.conditions
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
        ("clips", clips_words(report)),
        (
            "captions",
            f"at most {counted(its.max_new_tokens, 'token')}; {counted(its.repeat, 'timed turn')} after warm-up",
        ),
    ]
