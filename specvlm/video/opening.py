"""From a path to an open, regular file that looks like a video.

It knows files and the first bytes of containers; it knows no decoder. Everything is judged on the opened
descriptor, and decoders are given that descriptor's name: no pipe can block them, no path can be taken for a
URL, a playlist or an option.
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

from specvlm.errors import NotAVideoError, VideoError, VideoNotFoundError

_HEAD_BYTES = 512
_TS_PACKET_BYTES = 188
_TS_SYNC = 0x47
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_MOV_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp"})
_MAGIC = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"FLV\x01", "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"OggS", "ogg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class VideoFile(NamedTuple):
    """An open video file. Valid inside `open_video` only."""

    label: str  # the path as the caller named it, for messages
    location: str  # what decoders open: the descriptor's own name where the system has one
    container: str  # FFmpeg's name of the container, from the first bytes


@contextmanager
def open_video(path: str | os.PathLike[str] | bytes) -> Iterator[VideoFile]:
    """Open `path` for decoders.

    Raises:
        VideoNotFoundError: There is no such file, or it is a URL.
        NotAVideoError: A folder, a pipe, a device, an empty file, or one that begins like no known container.
        VideoError: The system refuses to open it.
    """
    label = os.fsdecode(path)
    descriptor = _open(label)
    try:
        _require_content(descriptor, label)
        yield VideoFile(label, _location(descriptor, label), _container(descriptor, label))
    finally:
        os.close(descriptor)


def _open(label: str) -> int:
    try:
        return os.open(os.fsencode(label), _OPEN_FLAGS)
    except ValueError:
        raise VideoNotFoundError(
            label, "is no possible file name (NUL byte or broken text); check the path"
        ) from None
    except OSError as error:
        raise _open_error(label, error) from None


def _open_error(label: str, error: OSError) -> VideoError:
    if _URL.match(label):
        return VideoNotFoundError(label, "remote URLs are not read; download the video first")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return VideoNotFoundError(label, "no such file; check the path")
    if error.errno in (errno.EACCES, errno.EPERM):
        return VideoError(label, "permission denied; give this user the right to read it")
    if error.errno == errno.EISDIR:
        return _folder(label)
    return VideoError(label, f"cannot be opened ({error.strerror}); check the path and its file system")


def _folder(label: str) -> NotAVideoError:
    return NotAVideoError(label, "is a folder, not a video; name a file in it")


def _require_content(descriptor: int, label: str) -> None:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise _folder(label)
    if not stat.S_ISREG(status.st_mode):
        raise NotAVideoError(label, "is a pipe or device, not a video; copy it to a regular file first")
    if status.st_size == 0:
        raise NotAVideoError(label, "is empty (0 bytes); copy or download it again")


def _location(descriptor: int, label: str) -> str:
    own_name = f"/proc/self/fd/{descriptor}"
    if sys.platform == "linux" and os.path.exists(own_name):
        return own_name
    return os.path.abspath(label)


def _container(descriptor: int, label: str) -> str:
    try:
        head = _read_head(descriptor)
    except OSError as error:
        raise VideoError(label, f"cannot be read ({error.strerror}); check its file system") from None
    container = sniff(head)
    if container is None:
        raise NotAVideoError(
            label, "does not begin like a video file; give mp4, mov, webm, mkv, avi, ts or the like"
        )
    return container


def _read_head(descriptor: int) -> bytes:
    head = os.read(descriptor, _HEAD_BYTES)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return head


def sniff(head: bytes) -> str | None:
    """FFmpeg's name of the container that starts with `head`, or None."""
    if head[4:8] in _MOV_BOXES:
        return "mov"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    for magic, container in _MAGIC:
        if head.startswith(magic):
            return container
    return "mpegts" if _is_transport_stream(head, 0) or _is_transport_stream(head, 4) else None


def _is_transport_stream(head: bytes, offset: int) -> bool:
    """Two sync bytes one packet apart; Blu-ray's m2ts puts 4 bytes before each packet."""
    second = offset + _TS_PACKET_BYTES + offset
    return len(head) > second and head[offset] == head[second] == _TS_SYNC
