"""What decord's own FFmpeg complains of while it decodes. decord itself passes off what was concealed as sound.

Its FFmpeg is a library beside PyAV's, with a log of its own; here that log is listened to. Knows no video.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_ERROR = 16  # AV_LOG_ERROR; what is graver has smaller numbers
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Log:
    """Counts errors while anybody listens; whose they are cannot be told."""

    def __init__(self) -> None:
        self.errors = 0
        self._lock = threading.Lock()
        self._listeners = 0
        self._callback = _CALLBACK(self._hear)  # must live as long as FFmpeg may call it

    def _hear(self, _: int | None, level: int, __: bytes | None, ___: int | None) -> None:
        self.errors += level <= _ERROR

    def take(self, library: Any) -> None:
        with self._lock:
            if self._listeners == 0:
                library.av_log_set_callback(self._callback)
            self._listeners += 1

    def give_back(self, library: Any) -> None:
        with self._lock:
            self._listeners -= 1
            if self._listeners == 0:
                library.av_log_set_callback(ctypes.cast(library.av_log_default_callback, _CALLBACK))


_log = _Log()


class Complaints:
    """Errors since listening began. Those of other threads that read with decord count too."""

    def __init__(self) -> None:
        self._before = _log.errors

    def __len__(self) -> int:
        return _log.errors - self._before


@contextmanager
def listening() -> Iterator[Complaints | None]:
    """Count the errors that decord's FFmpeg reports; None where its log cannot be reached."""
    library = _library()
    if library is None:
        yield None
        return
    _log.take(library)
    try:
        yield Complaints()
    finally:
        _log.give_back(library)


@cache
def _library() -> Any:
    """The libavutil of decord, which is loaded by the time decord is imported."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "/libavutil" in line}
    beside_decord = sorted(path for path in paths if "decord" in Path(path).parent.name)
    return ctypes.CDLL(beside_decord[0]) if beside_decord else None
