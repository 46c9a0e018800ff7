"""What PyAV's FFmpeg says while it works: kept off the screen, or listened to. The settings are global."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import av

Line = tuple[int, str, str]  # level, who, what


@contextmanager
def quiet() -> Iterator[None]:
    """Keep FFmpeg's own lines off the screen; what matters is in the errors. The level is put back."""
    level = av.logging.get_level()
    av.logging.set_level(None)
    try:
        yield
    finally:
        av.logging.set_level(level)


@contextmanager
def errors() -> Iterator[list[Line]]:
    """Collect what FFmpeg reports as errors in this thread. The list may be emptied on the way."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # or the second read of a damaged file would hear less than the first
    try:
        with av.logging.Capture() as heard:
            yield heard
    finally:
        av.logging.set_skip_repeated(skip)
        av.logging.set_level(level)
