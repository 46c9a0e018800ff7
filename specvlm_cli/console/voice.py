"""One who speaks to a person on stderr, and to a log file where one is given: messages, each one line.

Text from outside is cleaned, never read as markup, and cut where it is too long. It knows no progress.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TextIO, cast

from rich.console import Console
from rich.text import Text

from specvlm_cli.console.log import LogFile
from specvlm_cli.console.safe_text import MOST_CHARACTERS, clean, short
from specvlm_cli.console.streams import Stderr
from specvlm_cli.exits import Flag, UsageError

ProgressName = Literal["auto", "bar", "log", "none"]

LOG_EVERY_S = 30.0
STDERR = Stderr()


class Voice:
    """Prints messages; subclasses show progress too."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        progress: ProgressName = "auto",
        log_file: Path | None = None,
    ) -> None:
        """`quiet` keeps notes off the screen; the log file gets them all the same."""
        self._console = Console(
            file=cast(TextIO, STDERR), markup=False, emoji=False, highlight=False, soft_wrap=True
        )
        self._quiet, self._verbose = quiet, verbose
        self._progress = _chosen(progress, quiet, self._console)
        self._log_path = log_file
        self._log = _opened(log_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._log is not None:
            if error is not None:  # on stderr whoever ends the command prints it
                self._log.line(short(f"error: {str(error) or type(error).__name__}", MOST_CHARACTERS))
            self._log.close()

    def note(self, message: str) -> None:
        """Say something that is worth a line; not with -q."""
        self._say(message, shown=not self._quiet)

    def warn(self, message: str) -> None:
        """Say something that went wrong, with -q too."""
        self._say(message, shown=True)

    def _say(self, message: str, shown: bool) -> None:
        said = short(message, MOST_CHARACTERS)
        if shown:
            self._show(said)
        if self._log is not None and (trouble := self._log.line(said)):
            self._show(f"--log-file {clean(str(self._log_path))}: {trouble}; going on without it")

    def _show(self, cleaned: str) -> None:
        self._console.print(Text(cleaned))

    def _tell_standing(self, standing: str, shown: bool) -> None:
        """Say how things stand, having looked whether the log file is still where it was."""
        if self._log is not None:
            self._log.follow()
        self._say(standing, shown)


def _chosen(progress: ProgressName, quiet: bool, console: Console) -> ProgressName:
    """Return what to show; a bar needs a terminal that can move its cursor, elsewhere lines take its place."""
    if quiet:
        return "none"
    if progress == "bar" or (progress == "auto" and STDERR.isatty()):
        return "bar" if console.is_terminal and console.is_interactive else "log"
    return "log" if progress == "auto" else progress


def _opened(log_file: Path | None) -> LogFile | None:
    if log_file is None:
        return None
    try:
        return LogFile(log_file)
    except OSError as error:
        raise UsageError(
            Flag("log_file", log_file), f": {error.strerror}", fix="give a file that can be written"
        ) from error
