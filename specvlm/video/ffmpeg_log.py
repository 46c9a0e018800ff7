"""What PyAV's FFmpeg says while it works: kept off the screen, and heard by who asks.

Its log is one for the whole process. It is turned over to us while any thread reads, and back when none does;
what a thread is told stays its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import av

Line = tuple[int, str, str]  # level, who, what


class _Log:
    """Whether the log is ours, for how many threads, and how it was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._before: tuple[int | None, bool] = (None, True)
        # Where lines of threads that do not read go meanwhile; else they would be printed.
        self._others = av.logging.Capture(local=False)

    def take(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._before = av.logging.get_level(), av.logging.get_skip_repeated()
                self._others.__enter__()
                av.logging.set_level(av.logging.ERROR)
                # Or the second read of a damaged file would hear less than the first.
                av.logging.set_skip_repeated(False)
            self._readers += 1
            self._others.logs.clear()

    def give_back(self) -> None:
        with self._lock:
            self._readers -= 1
            self._others.logs.clear()
            if self._readers == 0:
                av.logging.set_level(self._before[0])
                av.logging.set_skip_repeated(self._before[1])
                self._others.__exit__(None, None, None)


_log = _Log()


@contextmanager
def listening() -> Iterator[list[Line]]:
    """Have FFmpeg's errors in this thread put into a list, which may be emptied on the way, and nowhere else."""
    _log.take()
    try:
        with av.logging.Capture() as heard:
            yield heard
    finally:
        _log.give_back()
