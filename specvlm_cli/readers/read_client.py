"""The read server as its coordinator sees it: start it, ask it to fork and to kill, hear from it, replace it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.process import python_command
from specvlm_cli.readers import shared
from specvlm_cli.readers.jobs import Limits
from specvlm_cli.readers.messages import ENDED, FORK, KILL, READY, RECORD, STARTED

_GOODBYE_S = 2.0
_MOST_RECORDS = 256
_MOST_VAIN_STARTS = 3  # that something outside has ended
# All of the environment that a child needs: where libraries are, and how text is encoded. No names, no tokens,
# no settings of decoders (a wrong DECORD_EOF_RETRY_MAX ends the process at the import).
_KEPT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
)  # fmt: skip
# One thread, so that forking is safe; and little address space for memory that is not used.
_SET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}

Record = tuple[bytes, int, int]  # what, number of the attempt, value


class ReadServerLostError(Exception):
    """The read server is dead or does not answer. Does not leave this package."""


class ReadClient:
    """Holds one read server at a time."""

    def __init__(self, reader: str, limits: Limits) -> None:
        self._reader = reader
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._vain_starts = 0
        self._start()

    def _start(self) -> None:
        try:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._complaints = open(shared.new_memory(), "w+b")  # noqa: SIM115  as long as the process lives
                self._process = self._execute(theirs)
        except OSError as error:
            raise FatalError(
                f"no reading process can be started ({error.strerror}); see how many processes and files are open"
            ) from None
        self._control.setblocking(False)
        self._heard = b""
        self._ready = False
        self._children: dict[int, int] = {}  # number of the attempt -> process id

    def _execute(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        call = (
            f"read_server.main({theirs.fileno()}, {os.getpid()}, {self._reader!r}, {asdict(self._limits)!r})"
        )
        return subprocess.Popen(
            python_command(f"from specvlm_cli.readers import read_server; {call}"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._complaints,
            env={name: os.environ[name] for name in _KEPT if name in os.environ} | _SET,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C at the terminal is for the coordinator
        )

    def descriptors(self) -> list[int]:
        """Return what is readable when there is something to hear."""
        return [] if self._process is None else [self._control.fileno()]

    def fork(self, number: int, theirs: socket.socket) -> None:
        """Have a child forked that serves this end of a socket.

        Raises:
            ReadServerLostError: It cannot be asked.
            FatalError: The read server cannot be started.
        """
        if self._process is None:
            self._start()
        self._ask(FORK, number, [theirs.fileno()])

    def kill(self, number: int) -> None:
        """Have a child killed.

        Raises:
            ReadServerLostError: It cannot be asked.
        """
        self._ask(KILL, number, [])

    def _ask(self, what: bytes, number: int, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._control, [RECORD.pack(what, number, 0)], descriptors)
        except OSError:  # it is dead, or has left so much unread that it must be stuck
            raise ReadServerLostError from None

    def hear(self) -> list[Record]:
        """Return its reports on its children since the last call.

        Raises:
            ReadServerLostError: It is dead, and all its reports were read.
        """
        records: list[Record] = []
        if self._process is None:
            return records
        with suppress(BlockingIOError):
            while len(records) < _MOST_RECORDS:
                data = self._receive()
                if not data:
                    if records:
                        return records
                    raise ReadServerLostError
                records += self._records(data)
        return records

    def _receive(self) -> bytes:
        try:
            return self._control.recv(RECORD.size * _MOST_RECORDS)
        except ConnectionError:
            return b""

    def _records(self, data: bytes) -> list[Record]:
        data = self._heard + data
        whole = len(data) // RECORD.size * RECORD.size
        self._heard = data[whole:]
        records = list(RECORD.iter_unpack(data[:whole]))
        for what, number, value in records:
            self._ready = self._ready or what == READY
            if what == STARTED:
                self._children[number] = value
            elif what == ENDED:
                self._children.pop(number, None)
        return records

    def end(self, numbers: Collection[int], within_s: float) -> None:
        """Have children killed, and wait until they are gone.

        Raises:
            ReadServerLostError: Not in time.
        """
        left, until_s = set(numbers), time.monotonic() + within_s
        for number in numbers:
            self.kill(number)
        while left:
            if not select.select([self._control], [], [], max(0.0, until_s - time.monotonic()))[0]:
                raise ReadServerLostError
            left -= {number for what, number, _ in self.hear() if what == ENDED}

    def restart(self) -> None:
        """Replace it, and with it all its children.

        Raises:
            FatalError: It has never come so far as to be of use.
        """
        code = self._bury(wait_s=0.0)
        self._vain_starts = 0 if self._ready else self._vain_starts + 1
        with self._complaints:
            if self._vain_starts and (code >= 0 or self._vain_starts == _MOST_VAIN_STARTS):
                raise FatalError(f"the reading processes cannot be started: {self._last_words()}")
        self._start()

    def close(self) -> None:
        """End it and all its children."""
        if self._process is not None:
            self._bury(wait_s=_GOODBYE_S)
            self._complaints.close()

    def _bury(self, wait_s: float) -> int:
        """Hang up, upon which it ends by itself; kill it where that takes too long. Return its exit code."""
        assert self._process is not None
        self._control.close()
        try:
            code = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            code = self._kill_all()
        self._process = None
        return code

    def _kill_all(self) -> int:
        assert self._process is not None
        if sys.platform != "linux":  # there the kernel kills them when the read server dies
            for process in self._children.values():
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
        self._process.kill()
        return self._process.wait()

    def _last_words(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read()[-4096:].decode("utf-8", "replace").split("\n")
        return clean(next((line for line in reversed(lines) if line.strip()), "no reason given"))
