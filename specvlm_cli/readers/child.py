"""One reading child: confined, it reads one video, hands the frames over, and ends.

It is forked by the read server, so all it needs is loaded. From the moment that the file is opened its memory is
not to be trusted.
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specvlm.errors import ConfigError, VideoDecodeError, VideoError, VideoUnavailableError
from specvlm.records import Frames
from specvlm.video.reading import Hooks
from specvlm_cli.caption.failure import failure_of
from specvlm_cli.process import die_with_parent
from specvlm_cli.readers import shared
from specvlm_cli.readers.jobs import MOST_EXTRA_S, Limits, ReadJob
from specvlm_cli.readers.messages import Said, began_line, failed_line, job_of, read_line


class ReaderProcess(NamedTuple):
    """What reads a video in a child."""

    read: Callable[..., Frames]  # called like `specvlm.video.read_video`, with the path in bytes
    takes_hooks: bool  # and with `hooks`, if it can


_OPEN_FILES = 64
_MOST_DESCRIPTORS = 1 << 12  # the read server has a handful
_LAST_RESORT_S = 0.5  # after the time limit the child ends by itself, if its parent cannot kill it
_KILL_ME_FIRST = b"1000"  # to the system, where memory runs out


def main(descriptor: int, parent: int, reader: ReaderProcess, limits: Limits) -> None:
    """Serve the coordinator at the other end of a socket once. Does not return."""
    code = 70  # of sysexits: an error of our own
    try:
        connection = socket.socket(fileno=_confined(descriptor, parent, limits))
        _serve(connection, reader, limits)
        code = 0
    finally:
        os._exit(code)


def _confined(descriptor: int, parent: int, limits: Limits) -> int:
    """Give up what a reader does not need; return the number that the socket has now."""
    os.setsid()  # what it may start can be killed with it
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        die_with_parent(parent)
        with suppress(OSError):
            _write("/proc/self/oom_score_adj", _KILL_ME_FIRST)
    os.dup2(0, 1)
    os.dup2(0, 2)  # decoders print
    os.dup2(descriptor, 3)
    for number in _descriptors():
        if number > 3:
            with suppress(OSError):  # the one that listed them
                os.close(number)
    _limit(limits)
    return 3


def _descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return list(range(min(os.sysconf("SC_OPEN_MAX"), _MOST_DESCRIPTORS)))


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _limit(limits: Limits) -> None:
    signal.setitimer(signal.ITIMER_REAL, limits.timeout_s + _LAST_RESORT_S)
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits.whole_cpu_s(),
        resource.RLIMIT_FSIZE: limits.frames_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_AS: limits.address_space_bytes,
    }
    for which, most in wanted.items():
        hard = resource.getrlimit(which)[1]
        most = kill = _within(most, hard)
        if which == resource.RLIMIT_CPU:  # first a signal that says why; and a large file may have more
            kill = _within(limits.whole_cpu_s(MOST_EXTRA_S) + 1, hard)
        with suppress(ValueError, OSError):  # not every system has all of them
            resource.setrlimit(which, (most, kill))


def _within(most: int, hard: int) -> int:
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


class _Progress:
    """Reports each step to the coordinator, and takes the time that the file's size allows once it is open."""

    def __init__(self, connection: socket.socket, job: ReadJob, limits: Limits) -> None:
        self._connection, self._job, self._limits = connection, job, limits
        self._size_bytes = 0

    def began(self, step: str) -> None:
        if step != "open" and not self._size_bytes:
            with suppress(OSError):
                self._size_bytes = os.stat(self._job.path).st_size
            self._extend()
        self._connection.sendall(began_line(step, self._size_bytes))

    def _extend(self) -> None:
        extra_s = self._limits.extra_s(self._size_bytes)
        signal.setitimer(signal.ITIMER_REAL, self._limits.timeout_s + extra_s + _LAST_RESORT_S)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (_within(self._limits.whole_cpu_s(extra_s), hard), hard))


def _serve(connection: socket.socket, reader: ReaderProcess, limits: Limits) -> None:
    job = job_of(_line(connection))
    memory = FrameMemory(os.fsdecode(job.path), limits.frames_bytes)
    try:
        line = _read(reader, job, memory, _Progress(connection, job, limits))
    except BaseException as error:
        said = _said(error.with_traceback(None), limits)  # which holds what may have taken all memory
        memory.close()
        connection.sendall(failed_line(said))
        return
    socket.send_fds(connection, [line], [memory.descriptor])


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            os._exit(0)  # not needed any more
        data += more
    return data


def _read(reader: ReaderProcess, job: ReadJob, memory: FrameMemory, progress: _Progress) -> bytes:
    options: dict[str, Any] = {"frame_multiple": job.frame_multiple, "root": job.root}
    if reader.takes_hooks:
        options["hooks"] = Hooks(memory.allocate, progress.began)
    frames = reader.read(job.path, job.settings, **options)
    assert frames.source is not None
    line = read_line(frames.pixels.shape, frames.source)
    memory.hold(frames.pixels)
    size, times_s = frames.pixels.nbytes, np.ascontiguousarray(frames.times_s, np.float64)
    del frames
    memory.finish(size, times_s)
    return line


def _said(error: BaseException, limits: Limits) -> Said:
    if isinstance(error, MemoryError):
        most = limits.address_space_bytes >> 20
        reason = f"reading it takes more than the {most} MiB a reader may have; give fewer or smaller frames"
        return Said("decode", "DecoderOutOfMemory", reason, transient=False)
    stage = error.stage if isinstance(error, VideoError) else "decode"
    failure = failure_of("open" if isinstance(error, ConfigError) else stage, error)
    transient = isinstance(error, VideoUnavailableError)
    return Said(failure.stage, failure.error_type, failure.error, transient)


class FrameMemory:
    """Shared memory that a reader puts frames into, so that they need not be copied.

    Attributes:
        descriptor: Of the memory, once there is some.
    """

    def __init__(self, label: str, most_bytes: int) -> None:
        self.descriptor = -1
        self._label = label
        self._most_bytes = most_bytes
        self._map: mmap.mmap | None = None
        self._start = 0

    def allocate(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return memory for frames; what was allocated before is given up.

        Raises:
            VideoDecodeError: They are larger than allowed.
        """
        self.close()
        frames, height, width, _ = shape
        size = shared.pixel_bytes(shape)
        if size + shared.TIME_BYTES * frames > self._most_bytes:
            reason = (
                f"its {frames} frames of {width}x{height} take {size >> 20} MiB, and {self._most_bytes >> 20} MiB "
                "are allowed; give fewer or smaller ones (--num-frames, --max-pixels)"
            )
            raise VideoDecodeError(self._label, reason)
        self.descriptor = shared.new_memory()
        os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        pixels: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8).reshape(shape)
        self._start = pixels.ctypes.data
        return pixels

    def hold(self, pixels: NDArray[np.uint8]) -> None:
        """See that these frames are in the memory, at its start; copy them where they are not."""
        if self._map is None or pixels.ctypes.data != self._start or not pixels.flags.c_contiguous:
            own = np.ascontiguousarray(pixels, np.uint8)
            self.close()
            self.descriptor = shared.new_memory()
            shared.write_all(self.descriptor, own.data)

    def finish(self, size: int, times_s: NDArray[np.float64]) -> None:
        """Put the times behind `size` bytes of frames, and seal it. Nothing may refer to the frames any more."""
        self._unmap()
        os.ftruncate(self.descriptor, size)
        os.lseek(self.descriptor, size, os.SEEK_SET)
        shared.write_all(self.descriptor, times_s.data)
        shared.seal(self.descriptor)

    def _unmap(self) -> None:
        if self._map is None:
            return
        try:
            self._map.close()
        except BufferError:  # a cycle holds the array
            gc.collect()
            self._map.close()
        self._map = None

    def close(self) -> None:
        """Give the memory up."""
        self._map = None  # unmapped once nothing refers to it
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
