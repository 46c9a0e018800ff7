"""Files in folders that somebody else may write into: opened, made and checked without harm outside of them.

Links are not followed, nothing that could block (a FIFO, a device) is waited for, and what is opened is checked
once it is open. This concerns the last name of a path: folders above it are those of the user, except
those that specvlm makes, see `require_folder`. Knows no ledger and no part.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import TextIO

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError

MOST_BYTES = 1 << 24  # of a file that is read whole
_REMEDY = "specvlm did not make it: move it away, then start again"
_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class UnsafeFileError(FatalError):
    """A link, a FIFO, a device or a folder is where a regular file belongs, or a link where a folder does."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
        UnsafeFileError: It is a link or not a regular file.
    """
    return os.fdopen(_opened(path, os.O_RDONLY), "rb")


def read_whole(path: Path) -> bytes:
    """Return the content of a small regular file; see `open_regular`.

    Raises:
        UnsafeFileError: It has more than `MOST_BYTES`, too.
    """
    with open_regular(path) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UnsafeFileError(f"{clean(str(path))}: larger than {MOST_BYTES >> 20} MiB; {_REMEDY}")
    return content


def open_lock(path: Path) -> TextIO:
    """Open a file to lock it, read it, and add to it; make it where there is none.

    Raises:
        OSError: It cannot be made or written.
        UnsafeFileError: It is a link, has a second name elsewhere (a hard link), or is not a regular file.
    """
    descriptor = _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        _require_one_name(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "a", encoding="utf-8")


def new_file(path: Path) -> BufferedWriter:
    """Make a file for writing; what had its name before, a link included, is removed, not written through.

    Raises:
        OSError: It cannot be made.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o666), "wb")


def require_file(path: Path, *, to_write: bool = False) -> None:
    """Check a file that a library opens by its name.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be looked at.
        UnsafeFileError: It is a link or not a regular file; `to_write`: or it has a second name elsewhere.
    """
    found = os.lstat(path)
    _require_regular(path, found)
    if to_write:
        _require_one_name(path, found)


def require_folder(path: Path) -> None:
    """Check a folder that specvlm makes; where there is none, that is right too.

    Raises:
        UnsafeFileError: It is a link: what it leads to may be any folder of the user.
    """
    if path.is_symlink():
        raise UnsafeFileError(
            f"{clean(str(path))}: a link, which specvlm does not follow here; move it away, then start again"
        )


def _opened(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | _OPEN, 0o666)
    except OSError:
        if os.path.lexists(path):  # opening a link, a socket or a FIFO fails in many ways
            _require_regular(path, os.lstat(path))
        raise
    try:
        _require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise UnsafeFileError(f"{clean(str(path))}: {what}; {_REMEDY}")


def _require_one_name(path: Path, found: os.stat_result) -> None:
    if found.st_nlink > 1:
        raise UnsafeFileError(
            f"{clean(str(path))}: a hard link, the same file has another name elsewhere; put a copy in its place"
        )
