"""What child processes write to their stderr: warnings of libraries, last words of one that crashes.

It comes through a pipe, so that it neither breaks a display nor speaks where all is to be quiet. Knows no
console.
"""

from __future__ import annotations

import os
import re
import threading
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import suppress

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_LINE = 1 << 16  # characters; of a longer one the end is kept
_GOODBYE_S = 1.0


class Overheard:
    """A pipe whose writing end is for children; what they write is handed on by a thread, as it comes.

    Attributes:
        descriptor: The writing end, as `stderr` of `subprocess.Popen`.
    """

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._reading, self.descriptor = os.pipe()
        self._hear = hear
        self._thread = threading.Thread(target=self._listen, daemon=True, name="overheard")
        self._thread.start()

    def _listen(self) -> None:
        decoder = getincrementaldecoder("utf-8")("backslashreplace")
        with suppress(OSError):
            while data := os.read(self._reading, 1 << 16):
                self._hear(decoder.decode(data))
            os.close(self._reading)

    def close(self) -> None:
        """Hand on what is still in the pipe; a child that lives on keeps us waiting for a moment only."""
        with suppress(OSError):
            os.close(self.descriptor)
        self._thread.join(_GOODBYE_S)


class LineJoiner:
    """Puts pieces of text together to lines: without colours, blank lines and repetitions."""

    def __init__(self) -> None:
        self._rest = ""
        self._last = ""

    def add(self, text: str) -> Iterator[str]:
        """Yield the lines that this piece completes."""
        *lines, rest = (self._rest + text).split("\n")
        self._rest = rest[-_LONGEST_LINE:]
        for line in lines:
            shown = _COLOURS.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()
            if shown and shown != self._last:
                self._last = shown
                yield shown
