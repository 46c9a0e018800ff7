"""What a person sees, on stderr: progress, notes, the closing table. Stdout is for data, and not used here.

Text from outside is cleaned and never read as markup. Whether colours are used is rich's decision (NO_COLOR,
no terminal). It knows figures and rows, not how they came about.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from os import fsdecode
from pathlib import Path
from typing import Literal, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from specvlm_cli.exits import ExitCode, UsageError
from specvlm_cli.ledger import Claim, Failure, Row
from specvlm_cli.results import Figures, Outcome, Speedup, Tally
from specvlm_cli.streams import Stderr
from specvlm_cli.text import clean, short

ProgressName = Literal["auto", "bar", "log", "none"]

LOG_EVERY_S = 30.0
STDERR = Stderr()


class Talk:
    """Speaks to one person, and to a log file where one is given."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        progress: ProgressName = "auto",
        log_file: Path | None = None,
    ) -> None:
        self._console = Console(file=cast(TextIO, STDERR), markup=False, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._verbose = verbose
        self._progress = _chosen(progress, quiet, self._console.is_terminal)
        self._log = _opened(log_file)
        self._meter = Meter(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            with suppress(OSError):
                self._log.close()

    def note(self, message: str) -> None:
        """Say something that is worth a line; not with -q."""
        self._say(message, shown=not self._quiet)

    def warn(self, message: str) -> None:
        """Say something that went wrong, with -q too."""
        self._say(message, shown=True)

    def _say(self, message: str, shown: bool) -> None:
        line = clean(message)
        if shown:
            self._console.print(Text(line))
        self._log_line(line)

    def _log_line(self, line: str) -> None:
        if self._log is not None:
            with suppress(OSError):  # a full disk under the log must not stop the work
                self._log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")
                self._log.flush()

    def captioned(self, claim: Claim, row: Row) -> None:
        self._meter.tally.add(row)
        if self._verbose:
            self.note(f"{_name(claim)}: {short(row['caption'], 200)}")

    def failed(self, claim: Claim, failure: Failure, trace: str) -> None:
        self._meter.failed += 1
        self.warn(
            f"failed: {fsdecode(claim.item.path)}: {failure.error} ({failure.stage}, {failure.error_type})"
        )
        if self._verbose:
            for line in trace.splitlines():
                self.warn(line)

    @contextmanager
    def working(self, todo: int) -> Iterator[None]:
        """Show progress while the block runs."""
        self._meter = Meter(todo)
        with ExitStack() as stack:
            if self._progress == "bar":
                stack.enter_context(_bar(self._console, self._meter))
            if self._progress == "log" or self._log is not None:
                stack.enter_context(_every(LOG_EVERY_S, self._log_progress))
            yield

    def _log_progress(self) -> None:
        self._say(self._meter.line(), shown=self._progress == "log")

    def close(self, outcome: Outcome, *, overwriting: bool = False) -> None:
        """Say how it ended."""
        ended = ending(outcome, overwriting=overwriting)
        self._log_line(clean(ended))
        if self._quiet and outcome.exit_code == ExitCode.OK:
            return
        self._console.print(Text(clean(ended)))
        if outcome.figures is not None and outcome.figures.captions and not self._quiet:
            self._console.print(summary(outcome.figures, outcome.failed_now))


def _name(claim: Claim) -> str:
    return fsdecode(claim.item.path.rpartition(b"/")[2])


def _chosen(progress: ProgressName, quiet: bool, terminal: bool) -> ProgressName:
    if quiet:
        return "none"
    if progress == "auto":
        return "bar" if terminal else "log"
    return progress


def _opened(log_file: Path | None) -> TextIO | None:
    if log_file is None:
        return None
    try:
        return log_file.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--log-file {clean(str(log_file))}: {error.strerror}; give a file that can be written"
        ) from error


class Meter:
    """How far a start is."""

    def __init__(self, todo: int) -> None:
        self.todo = todo
        self.failed = 0
        self.tally = Tally()
        self._started = time.monotonic()

    @property
    def ended(self) -> int:
        return self.tally.captions + self.failed

    def line(self) -> str:
        """Return counts, rate, time left and speedup so far as one line."""
        elapsed = time.monotonic() - self._started
        parts = [f"{self.ended}/{self.todo}", f"{self.failed} failed"]
        if self.ended:
            each = elapsed / self.ended
            parts += [_rate(each), f"{duration(each * (self.todo - self.ended))} left"]
        decode = self.tally.figures().decode
        return " · ".join([*parts, f"decode {decode.of_totals:.2f}x"] if decode else parts)


def _rate(each_s: float) -> str:
    return f"{each_s:.1f} s/video" if each_s >= 1.0 else f"{1.0 / each_s:.1f} videos/s"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Return a time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def _bar(console: Console, meter: Meter) -> Iterator[None]:
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        console=console,
    )

    def refresh() -> None:
        bar.update(task, completed=meter.ended, description=meter.line())

    with bar:
        task = bar.add_task(meter.line(), total=meter.todo)
        with _every(0.2, refresh):
            yield
        refresh()


@contextmanager
def _every(period_s: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` every `period_s` seconds from a thread of its own while the block runs."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(period_s):
            action()

    thread = threading.Thread(target=loop, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def ending(outcome: Outcome, *, overwriting: bool = False) -> str:
    """Return one line on how a start ended; one that was overwriting would begin again."""
    counts = f"{outcome.done} done, {outcome.failed} failed, {outcome.pending} to do"
    if outcome.figures is None:
        what = "nothing to do" if outcome.found else "no videos found"
        again = "; --retry-failed tries the failed ones again" if outcome.failed else ""
        return f"{what}: {counts} in {outcome.out}{again}"
    if outcome.stopped is not None:
        command = "the same command without --overwrite" if overwriting else "the same command"
        return f"stopped by {outcome.stopped}: {counts} in {outcome.out}; {command} goes on from here"
    return f"{counts} in {outcome.out}, {duration(outcome.wall_s)}"


def summary(figures: Figures, failed: int) -> Table:
    """Return the closing table of one start."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("captions", str(figures.captions))
    table.add_row("failures", str(failed))
    table.add_row("tokens", str(figures.completion_tokens))
    if figures.mean_accepted_tokens is not None:
        table.add_row("accepted draft tokens per round", f"{figures.mean_accepted_tokens:.2f}")
        table.add_row("tokens per round (acceptance length)", f"{figures.mean_acceptance_length:.2f}")
    if figures.compared:
        table.add_row("decode speedup", _speedup(figures.decode))
        table.add_row("end-to-end speedup", _speedup(figures.end_to_end))
        table.add_row("identical to plain decoding", f"{figures.identical}/{figures.compared}")
    return table


def _speedup(speedup: Speedup | None) -> str:
    if speedup is None:
        return "not measured"
    return f"{speedup.of_totals:.2f}x of totals, {speedup.median:.2f}x median"


def error_line(message: str) -> None:
    """Print the one line that ends a command that went wrong."""
    print(f"specvlm: error: {clean(message)}", file=STDERR)
