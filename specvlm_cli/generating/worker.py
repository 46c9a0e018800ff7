"""The coordinator's side of one worker process: start it, give it videos, hear from it, kill it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

from specvlm_cli.engine import EngineFactory, Models
from specvlm_cli.generating.messages import (
    Broken,
    Failed,
    FromWorker,
    GoAhead,
    Made,
    Ready,
    Setup,
    Task,
)
from specvlm_cli.process import python_command

HARD_LIMIT_S = 5.0  # a worker that does not answer this long after its time limit is killed
_GOODBYE_S = 2.0
_TALK_S = 5  # a message passes in less, or the other side does not run


class Worker:
    """One worker process.

    Attributes:
        device: Where it was told to load the models; None: where the settings say.
        models: What it loaded; None before that.
        task: The video that it works on; None: it waits for one.
        connection: Readable when it has something to say, or is dead.
    """

    def __init__(self, factory: EngineFactory, device: str | None, stderr: int) -> None:
        """Start it; `stderr` is a descriptor for what it prints."""
        self.models: Models | None = None
        self.task: Task | None = None
        self.device = device
        ours, theirs = socket.socketpair()
        with theirs:
            statement = (
                f"from specvlm_cli.generating.child import main; main({theirs.fileno()}, {os.getpid()})"
            )
            self._process = subprocess.Popen(
                python_command(statement),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[theirs.fileno()],
            )
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # one that was stopped must not stop us
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _TALK_S, 0))
        self.connection = Connection(ours.detach())
        self._deadline_s: float | None = None
        with suppress(OSError):  # it is dead already, and the connection will say so
            self.connection.send(Setup(factory, device))

    def is_idle(self) -> bool:
        """Say whether it can be given a video."""
        return self.models is not None and self.task is None

    def prepare(self, task: Task, descriptor: int) -> bool:
        """Have it prepare a video, also while it works on another; the descriptor may be closed afterwards.

        False: it does not take it, because it is dead or stopped.
        """
        try:
            self.connection.send(task)
            send_handle(self.connection, descriptor, self._process.pid)
        except OSError:
            return False
        return True

    def give(self, task: Task, descriptor: int | None) -> bool:
        """Have it caption a video; no descriptor: the last one that it was to prepare.

        False: it does not take it, because it is dead or stopped.
        """
        assert self.is_idle()
        self.task = task
        if task.time_limit_s is not None:
            self._deadline_s = time.monotonic() + task.time_limit_s + HARD_LIMIT_S
        if descriptor is not None and not self.prepare(task, descriptor):
            return False
        try:
            self.connection.send(GoAhead())
        except OSError:
            return False
        return True

    def hear(self) -> FromWorker | None:
        """Return what it says; None: it is dead. Call it when the connection is readable."""
        try:
            message: FromWorker = self.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, Ready):
            self.models = message.models
        if isinstance(message, (Made, Failed, Broken)):
            self.task, self._deadline_s = None, None
        return message

    def overdue_in_s(self) -> float | None:
        """Return in how many seconds it will have to be killed for not answering; None: never."""
        return None if self._deadline_s is None else self._deadline_s - time.monotonic()

    def kill(self) -> None:
        """End it at once."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def bury(self) -> str:
        """Hang up, let it end by itself or kill it if it does not, and say how it ended."""
        self.connection.close()
        try:
            code = self._process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "it hung up"
        return signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"exit code {code}"
