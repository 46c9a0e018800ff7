"""What a person sees, on stderr: messages, progress, the closing table. Stdout is for data, and not used here.

Text from outside is cleaned, never read as markup, and cut where it is too long; one message is one line.
Whether colours are used is rich's decision (NO_COLOR, no terminal). It knows figures and rows, not how they
came about. What it shows is made in `screen/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import fsdecode
from pathlib import Path

from rich.text import Text

from specvlm.words import counted
from specvlm_cli.caption.outcome import LiveStatus, Outcome
from specvlm_cli.console.live import REFRESH_S, LiveDisplay, every
from specvlm_cli.console.meter import Meter, line, name_of
from specvlm_cli.console.overheard import LineJoiner, Overheard
from specvlm_cli.console.report import ending, summary
from specvlm_cli.console.safe_text import MOST_CHARACTERS, caption_line, escaped, short
from specvlm_cli.console.streams import escaping
from specvlm_cli.console.voice import LOG_EVERY_S, STDERR, ProgressName, Voice
from specvlm_cli.exits import ExitCode
from specvlm_cli.run.ledger import Claim, Failure, Row

__all__ = ["STDERR", "LiveStatus", "ProgressName", "Talk", "counted", "error_line", "error_trace"]

MOST_TRACE_LINES = 100


class Talk(Voice):
    """Speaks to one person, and to a log file where one is given."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        progress: ProgressName = "auto",
        log_file: Path | None = None,
    ) -> None:
        super().__init__(quiet=quiet, verbose=verbose, progress=progress, log_file=log_file)
        self._meter = Meter(0)
        self._display: LiveDisplay | None = None
        self._overheard: Overheard | None = None
        self._overheard_lines = LineJoiner()
        self._is_working = False

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._overheard is not None:
            self._overheard.close()
            self._tell_overheard("\n")  # ends a line that was not
        super().__exit__(kind, error, trace)

    def _show(self, cleaned: str) -> None:
        if self._display is not None:
            self._display.say(cleaned)
        else:
            super()._show(cleaned)

    def captioned(self, claim: Claim, rows: Sequence[Row]) -> None:
        """Take note of one video that has its captions, one row for each prompt."""
        self._meter.captioned(claim, rows)
        for row in rows if self._verbose else ():
            number = f" [{row['prompt_index']}]" if len(rows) > 1 or row["prompt_index"] else ""
            self.note(f"{name_of(claim)}{number}: {caption_line(row['caption'])}")

    def failed(self, claim: Claim, failure: Failure, trace: str) -> None:
        """Take note of one video that failed, and say so."""
        self._meter.failed(failure)
        self.warn(f"failed: {_whole_name(claim)}: {failure.error} ({failure.stage}, {failure.error_type})")
        for part in _last_lines(trace) if self._verbose else ():
            self.warn(part)

    def state(self, status: LiveStatus) -> None:
        """Take note of what is going on; may be called as often as it changes."""
        self._meter.state(status)

    def child_stderr(self) -> int:
        """Return a descriptor for the stderr of child processes.

        What they write becomes notes, line by line. Before the work begins, a terminal gets it as it
        comes: then models are loaded, and a download shows how far it is.
        """
        if self._overheard is None:
            self._overheard = Overheard(self._overhear)
        return self._overheard.descriptor

    def _overhear(self, text: str) -> None:
        if self._console.is_terminal and not (self._quiet or self._is_working):
            STDERR.write(escaped(text))
            STDERR.flush()
        else:
            self._tell_overheard(text)

    def _tell_overheard(self, text: str) -> None:
        for said in self._overheard_lines.add(text):
            self.note(f"worker: {said}")

    @contextmanager
    def working(self, todo: int, before: tuple[int, int] = (0, 0)) -> Iterator[None]:
        """Show progress while the block runs; `before`: videos that were done, and that had failed, already."""
        self._meter, self._is_working = Meter(todo, before=before), True
        try:
            with ExitStack() as stack:
                if self._progress == "bar":
                    stack.enter_context(self._displayed())
                if self._progress == "log" or self._log is not None:
                    stack.enter_context(every(LOG_EVERY_S, self._log_progress))
                yield
        finally:
            self._meter.stop()
            self._tell_progress(shown=self._progress != "none")

    @contextmanager
    def _displayed(self) -> Iterator[None]:
        with LiveDisplay(self._console, self._meter) as display:
            self._display = display
            try:
                with escaping(), every(REFRESH_S, display.refresh):  # rich would read escape sequences
                    yield
            finally:
                self._display = None

    def _log_progress(self) -> None:
        self._tell_progress(shown=self._progress == "log")

    def _tell_progress(self, shown: bool) -> None:
        self._tell_standing(line(self._meter.standing()), shown)

    def close(self, outcome: Outcome, *, overwriting: bool = False) -> None:
        """Say how it ended."""
        self._say(ending(outcome, overwriting=overwriting), self._says_ending(outcome))
        if outcome.figures is None or self._quiet:
            return
        standing = self._meter.standing()
        if standing.ended:
            width = self._console.width if self._console.is_terminal else None
            table = Text(summary(outcome, standing.kinds, width))
            table.highlight_regex(r"^\||(?<=\s)\|(?=\s)|\|$", "dim")
            self._console.print(table)

    def _says_ending(self, outcome: Outcome) -> bool:
        return not self._quiet or outcome.exit_code != ExitCode.OK


def _whole_name(claim: Claim) -> str:
    item = claim.item
    name = fsdecode(item.path) or f"id {item.id}"
    if item.start_s is None and item.end_s is None:
        return name
    return (
        f"{name} from {item.start_s or 0.0:g} s to {'its end' if item.end_s is None else f'{item.end_s:g} s'}"
    )


def _last_lines(trace: str) -> list[str]:
    return trace.splitlines()[-MOST_TRACE_LINES:]


def error_line(message: str) -> None:
    """Print the one line that ends a command that went wrong."""
    print(f"specvlm: error: {short(message, MOST_CHARACTERS)}", file=STDERR)


def error_trace(trace: str) -> None:
    """Print a traceback, cleaned line by line."""
    for part in _last_lines(trace):
        print(short(part, MOST_CHARACTERS), file=STDERR)
