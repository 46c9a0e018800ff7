"""The read server: a process that has the decoders loaded and forks one child for every video.

It opens no video itself, has one thread, and ends when the coordinator does. It forks and kills on request, and
reports each end; as long as it has not waited for a child, that child's number cannot pass to another process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from specvlm_cli.process import die_with_parent
from specvlm_cli.readers import child
from specvlm_cli.readers.jobs import Limits
from specvlm_cli.readers.messages import ENDED, FORK, KILL, NOT_STARTED, READY, RECORD, STARTED

_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(descriptor: int, parent: int, reader: str, limits: dict[str, Any]) -> None:
    """Serve the coordinator at the other end of a socket until it hangs up."""
    for number in _STOPPING:  # the coordinator decides what becomes of a video in progress
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent(parent)
        system = ctypes.CDLL(None)
        system.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        system.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    read = _loaded(reader)
    gc.collect()
    gc.freeze()  # so that no collection in a child touches, and so copies, what all share
    with socket.socket(fileno=descriptor) as control:
        ReadServer(control, read, Limits(**limits)).run()


def _loaded(reader: str) -> child.ReaderProcess:
    """Import a reader, `module:function`, with all that its module says it will need."""
    module_name, _, function = reader.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "preload", lambda: None)()
    read = getattr(module, function)
    return child.ReaderProcess(read, "hooks" in inspect.signature(read).parameters)


class ReadServer:
    """Forks, kills and waits, until the coordinator hangs up."""

    def __init__(self, control: socket.socket, reader: child.ReaderProcess, limits: Limits) -> None:
        self._control = control
        self._reader = reader
        self._limits = limits
        self._attempts: dict[int, int] = {}  # process id -> number of the attempt

    def run(self) -> None:
        """Serve until the coordinator hangs up, then kill what is left."""
        ended, wake = socket.socketpair()
        wake.setblocking(False)
        ended.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with ended, wake, suppress(ConnectionError):
            self._say(READY, 0, os.getpid())
            while self._step(ended):
                pass
        for process in self._attempts:
            _kill(process)
        for process in self._attempts:
            os.waitpid(process, 0)

    def _step(self, ended: socket.socket) -> bool:
        """Wait for something to do, and do it; False: the coordinator has hung up."""
        readable = select.select([self._control, ended], [], [])[0]
        if ended in readable:
            with suppress(BlockingIOError):
                ended.recv(1 << 12)
            self._reap()
        return self._control not in readable or self._obey()

    def _say(self, what: bytes, number: int, value: int) -> None:
        self._control.sendall(RECORD.pack(what, number, value))

    def _obey(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, RECORD.size, 1)
        while data and len(data) < RECORD.size:
            more = self._control.recv(RECORD.size - len(data))
            data = data + more if more else b""
        if not data:
            return False
        what, number, _ = RECORD.unpack(data)
        if what == FORK:
            self._fork(number, descriptors[0])
        elif what == KILL:
            for process in [process for process, attempt in self._attempts.items() if attempt == number]:
                _kill(process)
        return True

    def _fork(self, number: int, descriptor: int) -> None:
        us = os.getpid()
        try:
            process = os.fork()
        except OSError:  # too many processes, or no memory for one
            os.close(descriptor)
            self._say(ENDED, number, NOT_STARTED)
            return
        if process == 0:
            child.main(descriptor, us, self._reader, self._limits)
        os.close(descriptor)
        self._attempts[process] = number
        self._say(STARTED, number, process)

    def _reap(self) -> None:
        for process, status in _ended():
            number = self._attempts.pop(process, None)
            if number is not None:
                with suppress(OSError):
                    os.killpg(process, signal.SIGKILL)  # what it may have started
                self._say(ENDED, number, status)
        for stray in _children() - self._attempts.keys():
            with suppress(OSError):
                os.kill(stray, signal.SIGKILL)


def _kill(process: int) -> None:
    for kill in (os.kill, os.killpg):
        with suppress(OSError):
            kill(process, signal.SIGKILL)


def _ended() -> Iterator[tuple[int, int]]:
    """(process, status) of every child that has ended, also of those that children left to us."""
    with suppress(ChildProcessError):
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            yield process, status


def _children() -> set[int]:
    """All our children, if the system lists them; else none."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return {int(process) for process in file.read().split()}
    except OSError:
        return set()
