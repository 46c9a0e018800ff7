"""Readers that misbehave in a reading child, each under the name of a path. No video is opened."""

from __future__ import annotations

import array
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specvlm.config import FrameSettings
from specvlm.errors import VideoDecodeError, VideoUnavailableError
from specvlm.records import Frames, VideoSource
from specvlm.video.reading import Hooks
from specvlm_cli.readers import shared

READER = "tests.cli.readers:read"
SOCKET = 3  # of a child, towards the coordinator
SOURCE = VideoSource(2.0, 25.0, 6, 4, "fake 1", 0.1, size_bytes=9, mtime_ns=-1)
TIMES_S = (0.0, 0.5, 1.25)


def frames() -> Frames:
    """What a reader that behaves gives."""
    pixels = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
    return Frames(pixels, np.array(TIMES_S), SOURCE)


def _hang() -> None:
    time.sleep(1e6)


def _hang_and_ignore_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    _hang()


def _spin() -> None:
    while True:
        pass


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _segfault() -> None:
    ctypes.string_at(0)


def _allocate() -> None:
    kept = []
    while True:
        kept.append(np.ones(1 << 22, np.uint8))


def _write_to_disk() -> None:
    with tempfile.TemporaryFile() as file:
        while True:
            file.write(bytes(1 << 20))


def _die_in_a_loop_of_errors() -> None:
    raise RuntimeError("first line\n\x1b[31msecond line \udcff")


def _leave_processes_behind() -> None:
    for detach in (False, True):
        if os.fork() == 0:
            if detach:
                os.setsid()
            _hang()


def _print() -> None:
    os.write(1, b"to stdout\n")
    os.write(2, b"to stderr\n")
    print("from Python", flush=True)


def _tell_environment() -> None:
    raise VideoDecodeError("x", json.dumps(sorted(os.environ)))


def _tell_descriptors() -> None:
    names = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if _is_open(entry.path)]
    raise VideoDecodeError("x", json.dumps(sorted(names)))


def _is_open(path: str) -> bool:
    return os.path.lexists(path)


def _tell_modules() -> None:
    raise VideoDecodeError(
        "x", json.dumps([name for name in ("torch", "transformers") if name in sys.modules])
    )


def _be_unavailable() -> None:
    raise VideoUnavailableError("x", "stale file handle; try again")


def _say(data: bytes, *descriptors: int) -> None:
    rights = array.array("i", descriptors)
    connection = socket.socket(fileno=os.dup(SOCKET))
    connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else [])
    os._exit(0)


def _line(shape: object = (3, 4, 6, 3), **changes: object) -> bytes:
    return json.dumps({"shape": shape, "source": SOURCE._asdict() | changes}).encode() + b"\n"


def _memory(data: bytes = bytes(216) + np.array(TIMES_S).tobytes(), *, sealed: bool = True) -> int:
    descriptor = shared.new_memory()
    os.write(descriptor, data)
    if sealed:
        shared.seal(descriptor)
    return descriptor


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(216 + 24))
        file.flush()
        return os.dup(file.fileno())


# What a child that is in the hands of a hostile file may say.
LIES: dict[str, Callable[[], None]] = {
    "garbage": lambda: _say(b"\x80\x04}garbage\n"),
    "nothing": lambda: _say(b"\n"),
    "a pickle": lambda: _say(b"cos\nsystem\n(S'false'\ntR.\n"),
    "a flood": lambda: _say(b'{"began": "pyav"}\n' * 7000),
    "deep": lambda: _say(b"[" * 50_000 + b"\n"),
    "no memory": lambda: _say(_line()),
    "two memories": lambda: _say(_line(), _memory(), _memory()),
    "not sealed": lambda: _say(_line(), _memory(sealed=False)),
    "a file": lambda: _say(_line(), _file()),
    "a device": lambda: _say(_line(), os.open("/dev/zero", os.O_RDWR)),
    "a socket": lambda: _say(_line(), os.dup(SOCKET)),
    "too small": lambda: _say(_line((3, 4, 7, 3)), _memory()),
    "too large": lambda: _say(_line((100_000, 65_536, 65_536, 3)), _memory()),
    "no frames": lambda: _say(_line((0, 4, 6, 3)), _memory(b"")),
    "negative": lambda: _say(_line((3, -4, -6, 3)), _memory()),
    "not whole": lambda: _say(_line((3.0, 4, 6, 3)), _memory()),
    "unordered times": lambda: _say(_line(), _memory(bytes(216) + np.array([0.0, 2.0, 1.0]).tobytes())),
    "no times": lambda: _say(_line(), _memory(bytes(216) + np.array([0.0, np.nan, np.inf]).tobytes())),
    "endless": lambda: _say(_line(duration_s=float("inf")), _memory()),
    "huge number": lambda: _say(_line(fps=10**400), _memory()),
    "escapes": lambda: _say(_line(backend="\x1b[31mred"), _memory()),
    "own flags": lambda: _say(_line(flags=["fine"]), _memory()),
    "unknown fact": lambda: _say(_line(more=1), _memory()),
    "failure of a wrong type": lambda: _say(b'{"failed": {"stage": "open", "error_type": "a b"}}\n'),
    "failure and frames": lambda: _say(b'{"began": "pyav"}\n' + _line() + _line(), _memory()),
}
ACTS: dict[str, Callable[[], None]] = {
    "hang": _hang,
    "hang and ignore signals": _hang_and_ignore_signals,
    "spin": _spin,
    "stop": _stop,
    "abort": os.abort,
    "segfault": _segfault,
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "allocate": _allocate,
    "write to disk": _write_to_disk,
    "raise": _die_in_a_loop_of_errors,
    "leave processes": _leave_processes_behind,
    "print": _print,
    "environment": _tell_environment,
    "descriptors": _tell_descriptors,
    "modules": _tell_modules,
    "unavailable": _be_unavailable,
    "slow": lambda: time.sleep(0.3),
    "good": lambda: None,
    **LIES,
}


def read(
    path: bytes, settings: FrameSettings, *, frame_multiple: int = 1, root: bytes | None = None
) -> Frames:
    """Do what the path says, then behave."""
    ACTS[os.fsdecode(path)]()
    return frames()


def read_in_steps(
    path: bytes,
    settings: FrameSettings,
    *,
    frame_multiple: int = 1,
    root: bytes | None = None,
    hooks: Hooks,
) -> Frames:
    """`step:act:file`: begin a step, note the reader in the file, and do what the second word says."""
    step, act, journal = os.fsdecode(path).split(":")
    with Path(journal).open("a") as file:
        print(settings.backend, file=file)
    hooks.began(step)  # type: ignore[arg-type]
    ACTS[act]()
    return frames()


def read_slowly(
    path: bytes,
    settings: FrameSettings,
    *,
    frame_multiple: int = 1,
    root: bytes | None = None,
    hooks: Hooks,
) -> Frames:
    """Take longer than a small file may."""
    hooks.began("open")
    hooks.began("index")
    time.sleep(1.2)
    hooks.began("pyav")
    return frames()
