"""The log file: one line for one message, each with its time. Knows nothing of what is said.

Nothing that happens to the file stops the work: what cannot be written is lost, and `line` says so once.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class LogFile:
    """A file that is appended to, also by others at the same time, and that may be moved away meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open the file, making it where there is none.

        Raises:
            OSError: It cannot be written.
        """
        self._path = path.absolute()
        self._lock = threading.RLock()
        self._torn = False  # the file ends in the middle of a line
        self._failing = False
        self._file = os.open(self._path, _FLAGS, 0o666)

    def close(self) -> None:
        with self._lock, suppress(OSError):
            os.close(self._file)
            self._file = -1

    def line(self, text: str) -> str | None:
        """Append one line; return the reason where it could not be written and the one before could."""
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        with self._lock:
            try:
                self._write(f"{stamp} {text}\n".encode("utf-8", "backslashreplace"))
            except OSError as error:
                was, self._failing = self._failing, True
                return None if was else str(error.strerror)
            self._failing = False
            return None

    def _write(self, data: bytes) -> None:
        if self._torn:
            data = b"\n" + data
        while data:
            written = os.write(self._file, data)
            self._torn = written < len(data)
            data = data[written:]

    def follow(self) -> None:
        """Continue in a new file if this one was moved or removed, as by logrotate."""
        with self._lock, suppress(OSError):
            if not self._was_moved():
                return
            fresh = os.open(self._path, _FLAGS, 0o666)
            os.close(self._file)
            self._file, self._torn = fresh, False

    def _was_moved(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return True
