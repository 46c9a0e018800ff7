"""From a path to an open, regular file. It knows no container and no decoder.

Everything is judged on the opened descriptor, and decoders are given that descriptor: no pipe can block them, no path
can be taken for a URL, a playlist or an option, and no link leads out of the root folder.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from specvlm.errors import (
    NotAVideoError,
    PathDeniedError,
    VideoChangedError,
    VideoError,
    VideoNotFoundError,
    VideoUnavailableError,
)

_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What network file systems, full tables and failing disks answer; not all systems have all names.
_MAY_PASS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO ESTALE ETIMEDOUT EMFILE ENFILE ENOMEM EAGAIN EINTR EBUSY EDEADLK ENOBUFS ENOTCONN EREMOTEIO ENOLINK "
        "EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNREFUSED ECONNRESET EKEYEXPIRED"
    ).split()
    if hasattr(errno, name)
)


class Identity(NamedTuple):
    """Which file it is, and in which state."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


class VideoFile(NamedTuple):
    """An open video file. Valid inside `open_video` only."""

    label: str  # the path as the caller named it, for messages
    descriptor: int
    location: str  # for decoders that want a name: the descriptor's own where the system has one
    identity: Identity  # as it was opened


@contextmanager
def open_video(
    path: str | os.PathLike[str] | bytes, root: str | os.PathLike[str] | bytes | None = None
) -> Iterator[VideoFile]:
    """Open `path` for decoders, and see at the end that it is still the same file in the same state.

    Args:
        path: The file.
        root: A folder; a file that lies elsewhere, after all links, is not read. None: anywhere.

    Raises:
        VideoNotFoundError: There is no such file, or it is a URL.
        PathDeniedError: The opened file is not below `root`.
        NotAVideoError: A folder, a pipe, a device, or an empty file.
        VideoUnavailableError: The system cannot open or read it now.
        VideoChangedError: It was changed, replaced or deleted before the end.
        VideoError: The system refuses to open it.
    """
    label = os.fsdecode(path)
    descriptor = _open(label)
    try:
        if root is not None:
            _require_below(root, descriptor, label)
        identity = _identity(_require_content(descriptor, label))
        own_name = f"/proc/self/fd/{descriptor}"
        location = own_name if os.path.exists(own_name) else os.path.abspath(label)
        try:
            yield VideoFile(label, descriptor, location, identity)
        except VideoError:
            _require_unchanged(descriptor, label, identity)  # says more than what it made the decoder say
            raise
        _require_unchanged(descriptor, label, identity)
    finally:
        os.close(descriptor)


def _open(label: str) -> int:
    try:
        return os.open(os.fsencode(label), _OPEN_FLAGS)
    except ValueError:
        reason = "is no possible file name (NUL byte or broken text); check the path"
        raise VideoNotFoundError(label, reason) from None
    except OSError as error:
        raise _open_error(label, error) from None


def _open_error(label: str, error: OSError) -> VideoError:
    if _URL.match(label):
        return VideoNotFoundError(label, "remote URLs are not read; download the video first")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return VideoNotFoundError(label, "no such file; check the path")
    if error.errno in (errno.EACCES, errno.EPERM):
        return VideoError(label, "permission denied; give this user the right to read it")
    reason = f"cannot be opened ({error.strerror}); check the path and its file system"
    return (VideoUnavailableError if error.errno in _MAY_PASS else VideoError)(label, reason)


def unreadable(label: str, error: OSError) -> VideoUnavailableError:
    """The error for a file that opened, but does not give its bytes."""
    return VideoUnavailableError(label, f"cannot be read ({error.strerror}); check its file system")


def _require_below(root: str | os.PathLike[str] | bytes, descriptor: int, label: str) -> None:
    folder = os.fsencode(root)
    try:
        opened = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError):
        raise PathDeniedError(
            label, f"its root {os.fsdecode(folder)!r} cannot be opened; check --root"
        ) from None
    try:
        above, file = _real_path(opened, folder), _real_path(descriptor, os.fsencode(label))
    except OSError as error:
        raise unreadable(label, error) from None
    finally:
        os.close(opened)
    if not file.startswith(above.rstrip(b"/") + b"/"):
        raise PathDeniedError(
            label, f"lies outside {os.fsdecode(folder)!r}; only files below --root are read"
        )


def _real_path(descriptor: int, path: bytes) -> bytes:
    """Where the system says that an open file lies; the path resolved again if it does not say."""
    if sys.platform == "linux" and os.path.exists("/proc/self/fd"):
        return os.readlink(b"/proc/self/fd/%d" % descriptor)
    if sys.platform == "darwin":
        import fcntl

        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
    return os.path.realpath(path)


def _require_content(descriptor: int, label: str) -> os.stat_result:
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        raise unreadable(label, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise NotAVideoError(label, "is a folder, not a video; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise NotAVideoError(label, "is a pipe or device, not a video; copy it to a regular file first")
    if status.st_size == 0:
        raise NotAVideoError(label, "is empty (0 bytes); copy or download it again")
    return status


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _require_unchanged(descriptor: int, label: str, before: Identity) -> None:
    try:
        now, named = os.fstat(descriptor), os.stat(os.fsencode(label))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise unreadable(label, error) from None
        raise VideoChangedError(label, "was deleted while it was read; check what else uses it") from None
    if _identity(now) != before:
        raise VideoChangedError(label, "was changed while it was read; try again once it is complete")
    if (named.st_dev, named.st_ino) != before[:2]:
        raise VideoChangedError(label, "was replaced while it was read; try again")


def read_at(descriptor: int, size: int, position: int) -> bytes:
    """Up to `size` bytes from `position` on. `os.pread` does not exist on all systems."""
    os.lseek(descriptor, position, os.SEEK_SET)
    return os.read(descriptor, size)
