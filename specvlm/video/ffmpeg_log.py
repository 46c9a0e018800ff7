"""What PyAV's FFmpeg says while it works: kept off the screen, and heard by who asks.

Its log is one for the whole process. It is turned over to us while any thread reads, and back when none does;
each thread gets its own messages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import av

Line = tuple[int, str, str]  # level, who, what


_lock = threading.Lock()
_readers = 0
_before: tuple[int | None, bool] = (None, True)
# Where lines of threads that do not read go meanwhile; else they would be printed.
_others = av.logging.Capture(local=False)


@contextmanager
def listening() -> Iterator[list[Line]]:
    """Have FFmpeg's errors in this thread put into a list, which may be emptied on the way, and nowhere else."""
    global _readers, _before
    with _lock:
        if _readers == 0:
            _before = av.logging.get_level(), av.logging.get_skip_repeated()
            _others.__enter__()
            av.logging.set_level(av.logging.ERROR)
            # Or the second read of a damaged file would hear less than the first.
            av.logging.set_skip_repeated(False)
        _readers += 1
        _others.logs.clear()
    try:
        with av.logging.Capture() as heard:
            yield heard
    finally:
        with _lock:
            _readers -= 1
            _others.logs.clear()
            if _readers == 0:
                av.logging.set_level(_before[0])
                av.logging.set_skip_repeated(_before[1])
                _others.__exit__(None, None, None)
