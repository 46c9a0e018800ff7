"""Starts the command's child processes as forks of a small process that has imported what they need.

A fresh interpreter takes a fifth of a second of processor time, and a fork of the tests' own process has torch and
all tests in it. Forks are children of the process that asks, as if it had started them itself. Linux only.

    python -m tests.cli.forks DESCRIPTOR    serves the other end of this socket until it is closed
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.cli import family

ROOT = Path(__file__).parents[2]
_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())  # the number of the system call
_CLONE_PARENT = 0x8000
_USED = (
    *("specvlm_cli.readers.read_server", "specvlm_cli.workers.child"),
    *("tests.cli.fake", "tests.cli.fake_reader", "tests.cli.train_reader"),
)
_MOST_BYTES = 1 << 20
_NOT_PASSED_ON = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONUTF8")


@dataclass(frozen=True)
class Order:
    """What a child runs, and with what. Its descriptors are those of stdin, stdout and stderr, and those passed."""

    statement: str
    passed: list[int]  # the numbers that the child knows them by
    folder: str
    environment: dict[str, str]
    session: bool  # of its own


class Forked(subprocess.Popen[bytes]):
    """A child as `subprocess.Popen` would start it with `python -c STATEMENT`, but for the interpreter."""

    def __init__(
        self,
        command: list[str],
        *,
        stdin: int,
        stderr: Any,
        pass_fds: Sequence[int],
        stdout: int | None = None,
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert stdin == subprocess.DEVNULL
        self.returncode: int | None = None
        self.stdin = self.stdout = self.stderr = None
        self.args, self._child_created = command, False
        self._waitpid_lock = threading.Lock()
        error = stderr if isinstance(stderr, int) else stderr.fileno()
        with open(os.devnull, "r+b", 0) as nowhere:
            streams = [nowhere.fileno(), 1 if stdout is None else nowhere.fileno(), error]
            order = Order(
                command[-1],
                passed=list(pass_fds),
                folder=os.getcwd(),
                environment=dict(os.environ) if env is None else env,
                session=start_new_session,
            )
            self.pid = self._fork(order, [*streams, *pass_fds])
        self._child_created = True

    def _fork(self, order: Order, descriptors: list[int]) -> int:
        """Run the order in a fork with copies of these descriptors; return its process id."""
        return server().fork(order, descriptors)


class _Server:
    """The process that forks, as the one that asks sees it."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cli.forks", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PATH": os.defpath, "PYTHONPATH": str(ROOT), **dict.fromkeys(_NOT_PASSED_ON, "1")},
            )
        atexit.register(self.close)

    def fork(self, order: Order, descriptors: list[int]) -> int:
        """Have an order run in a fork with these descriptors; return its process id."""
        with self._asking:
            socket.send_fds(self._control, [json.dumps(asdict(order)).encode()], descriptors)
            process = int(self._control.recv(64))
        assert process > 0, "it cannot fork"
        return process

    def close(self) -> None:
        self._control.close()
        self._process.wait(10)


@cache
def server() -> _Server:
    """Return the one of this process. The thread that asks first has to live as long as any fork."""
    return _Server()


def can_fork() -> bool:
    """Whether this system can."""
    return sys.platform == "linux" and _CLONE is not None


def _sibling() -> int:
    """Fork a child of our own parent; return its process id here, and 0 there."""
    # PyDLL: no other thread may run in between, and there is none.
    process: int = ctypes.PyDLL(None).syscall(_CLONE, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    if process == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return process


def be_child(order: Order, descriptors: list[int]) -> None:
    """Be the child that an order describes. Does not return."""
    code = 1
    try:
        high = max([*descriptors, *order.passed]) + 64
        moved = [os.dup2(one, high + place) for place, one in enumerate(descriptors)]
        for one, number in zip(moved, [0, 1, 2, *order.passed], strict=True):
            os.dup2(one, number)
        kept = sorted(order.passed)
        for low, above in zip([2, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low + 1, above)
        if order.session:
            os.setsid()
        os.chdir(order.folder)
        os.environ.clear()
        os.environ.update(order.environment)
        family.name_me("server" if "read_server" in order.statement else "worker")
        exec(order.statement, {})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _serve(control: socket.socket) -> None:
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _MOST_BYTES, 16)
        if not data:
            return
        process = _sibling()
        if process == 0:
            be_child(Order(**json.loads(data)), list(descriptors))
        for one in descriptors:
            os.close(one)
        control.send(str(process).encode())


def main() -> None:
    """Serve."""
    for name in _USED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # so that collections in a fork neither look through all this nor copy it
    with socket.socket(fileno=int(sys.argv[1])) as control:
        _serve(control)


if __name__ == "__main__":
    main()
