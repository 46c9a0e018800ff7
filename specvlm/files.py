"""Small files that somebody else may have made: read whole, without waiting for a FIFO or filling the memory."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path

MOST_BYTES = 1 << 28  # of a file that is read whole; the largest tokenizers have some 40 MB


def open_plain(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; links are followed, as the hub's cache needs it.

    Raises:
        OSError: It is not there, cannot be read, or is a FIFO, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a small file in UTF-8.

    Raises:
        OSError: As `open_plain`, or it has more than `MOST_BYTES`.
        UnicodeDecodeError: It is not UTF-8.
    """
    with open_plain(path) as file:
        content = file.read(MOST_BYTES + 1)
    refuse_size(path, len(content))
    return content.decode("utf-8")


def refuse_size(path: str | os.PathLike[str], size_bytes: int) -> None:
    """Refuse a file that is too large to be read whole.

    Raises:
        OSError: It is.
    """
    if size_bytes > MOST_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MOST_BYTES >> 20} MiB", os.fspath(Path(path)))


def remove(path: Path) -> None:
    """Remove what has a name: a folder with all that is in it, or anything else; of a link only the link.

    Raises:
        OSError: It cannot be removed.
    """
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:  # `rmtree` would wait for a FIFO
        path.unlink()
