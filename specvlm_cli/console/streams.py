"""Standard streams that may be closed, full, or of a small encoding, without harm to the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO, cast

from specvlm_cli.console.safe_text import escaped


def prepare() -> None:
    """Put the null device where a stream is closed, and have stdout escape what its encoding cannot say.

    A closed stream's number would else go to the next file that is opened, and messages into that file; here
    and in child processes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)  # children would else have a closed stream again
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  as long as we live
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def escaping() -> Iterator[None]:
    """Escape what libraries write to stderr during a block; what we write through `Stderr` is escaped already."""
    before = sys.stderr
    sys.stderr = cast(TextIO, _Escaping(before))
    try:
        yield
    finally:
        sys.stderr = before


class _Escaping:
    """A stderr that escapes. Whoever may write as it is finds the stream itself, where rich's proxy has its own."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


# What we draw with, for terminals whose encoding lacks it; each takes as much room as before.
_ASCII = str.maketrans({"━": "#", "─": "-", "·": "-", "…": "~"})


class Stderr:
    """The stderr of the moment. Once it cannot be written, what goes there is dropped."""

    def write(self, text: str) -> int:
        with _dropping():
            _current().write(text if self.encoding.lower().startswith("utf") else text.translate(_ASCII))
        return len(text)

    def flush(self) -> None:
        with _dropping():
            _current().flush()

    def isatty(self) -> bool:
        return bool(_current().isatty())

    def fileno(self) -> int:
        return int(_current().fileno())

    @property
    def encoding(self) -> str:
        return str(_current().encoding)


@contextmanager
def _dropping() -> Iterator[None]:
    """Swallow what a full or closed stderr raises, and send all that follows to the null device."""
    try:
        yield
    except BlockingIOError:  # a reader that is slow for the moment; it misses this piece
        pass
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), _current().fileno())


def _current() -> TextIO:
    """Return stderr itself, also while rich replaces it to keep a progress bar in one piece, or we do."""
    stream = sys.stderr
    while (below := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = below
    return stream
