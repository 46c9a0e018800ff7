"""Frames in memory that processes share: made by a child, sealed, checked, and mapped where they are needed.

Where the system can seal memory (Linux), it cannot be changed or shortened afterwards, so what was checked once
stays true. Elsewhere the receiver takes a copy of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specvlm.records import Frames, VideoSource

_CAN_SEAL = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if _CAN_SEAL else 0
_COPY_BYTES = 1 << 24
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_MOST_SENT = 4  # descriptors that are taken from one message, to be closed if they are too many
TIME_BYTES = 8  # of a frame's time, which follows the pixels
MOST_BYTES = 1 << 16  # of all that a child may say


class MisreportError(Exception):
    """What a child process handed over is not what it says, or makes no sense."""


@dataclass(frozen=True, slots=True)
class SharedFrames:
    """What has to be known of frames in shared memory to map them.

    Attributes:
        shape: [F, height, width, 3] of the pixels.
        times_s: [F] times in seconds from the first frame of the video.
        source: The file's own facts.
        size_bytes: Length of the memory.
    """

    shape: tuple[int, int, int, int]
    times_s: tuple[float, ...]
    source: VideoSource
    size_bytes: int


def pixel_bytes(shape: tuple[int, int, int, int]) -> int:
    """Return how many bytes frames of this shape take."""
    frames, height, width, channels = shape
    return frames * height * width * channels


def new_memory() -> int:
    """Return the descriptor of new, empty memory that has no name."""
    if _CAN_SEAL:
        return os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def seal(descriptor: int) -> None:
    """Seal this memory against changes; it must not be mapped for writing."""
    if _CAN_SEAL:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


def accept(
    descriptor: int, shape: tuple[int, int, int, int], source: VideoSource
) -> tuple[int, SharedFrames]:
    """Take over memory that a child has filled; the descriptor is closed where this fails or takes a copy.

    Raises:
        MisreportError: It is no sealed memory of the size that belongs to the shape, or holds no times.
    """
    try:
        size = pixel_bytes(shape) + TIME_BYTES * shape[0]
        _require_memory(descriptor, size)
        descriptor = descriptor if _CAN_SEAL else _own_copy(descriptor, size)
        times_s = np.frombuffer(os.pread(descriptor, TIME_BYTES * shape[0], pixel_bytes(shape)), np.float64)
        if len(times_s) != shape[0] or not np.isfinite(times_s).all() or (np.diff(times_s) <= 0).any():
            raise MisreportError("times that do not increase")
        return descriptor, SharedFrames(shape, tuple(times_s.tolist()), source, size)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise


def _require_memory(descriptor: int, size: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise MisreportError(f"{status.st_size} bytes of memory for {size}")
    if _CAN_SEAL:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            raise MisreportError("a file that is no memory") from None
        if seals & _SEALS != _SEALS:
            raise MisreportError("memory that is not sealed")


def _own_copy(descriptor: int, size: int) -> int:
    copy = new_memory()
    try:
        for start in range(0, size, _COPY_BYTES):
            write_all(copy, os.pread(descriptor, min(_COPY_BYTES, size - start), start))
        _require_memory(copy, size)
    except BaseException:
        os.close(copy)
        raise
    os.close(descriptor)
    return copy


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return all that waits in a socket, up to a bit more than may be said, and the descriptors with it."""
    data, descriptors = b"", list[int]()
    with suppress(OSError):  # BlockingIOError: that was all; others come of what the peer did
        while len(data) <= MOST_BYTES:
            more, sent, _, _ = socket.recv_fds(connection, MOST_BYTES, _MOST_SENT, CLOSE_ON_EXEC)
            descriptors += sent
            if not more:
                break
            data += more
    return data, descriptors


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that were not asked for."""
    for descriptor in descriptors:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however many calls that takes."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def open_frames(descriptor: int, shared: SharedFrames) -> Frames:
    """Map frames, without a copy, in any process that was given the descriptor, and close that.

    The array may be written to: what is written stays in this process.
    """
    try:
        return _mapped(descriptor, shared)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, shared: SharedFrames) -> Frames:
    memory = mmap.mmap(descriptor, shared.size_bytes, access=mmap.ACCESS_COPY)
    pixels: NDArray[np.uint8] = np.frombuffer(memory, np.uint8, pixel_bytes(shared.shape))
    return Frames(pixels.reshape(shared.shape), np.array(shared.times_s, np.float64), shared.source)


class ReadVideo:
    """A video that was read: its frames lie in shared memory until `close`, and in what is mapped beyond.

    Attributes:
        key: The job's.
        size_bytes: Memory that it holds.
        source: The file's own facts.
    """

    def __init__(self, key: int, descriptor: int, shared: SharedFrames) -> None:
        self.key = key
        self.size_bytes = shared.size_bytes
        self.source = shared.source
        self._descriptor: int | None = descriptor
        self._shared = shared

    def frames(self) -> Frames:
        """Map the frames in this process; they stay valid after `close`."""
        return _mapped(self.handle()[0], self._shared)

    def handle(self) -> tuple[int, SharedFrames]:
        """Return what another process needs for `open_frames`; the descriptor stays ours."""
        assert self._descriptor is not None, "it is closed"
        return self._descriptor, self._shared

    def close(self) -> None:
        """Give the memory back, as far as it is mapped nowhere."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
