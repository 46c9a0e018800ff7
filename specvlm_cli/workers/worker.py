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

from specvlm_cli.caption.engine import EngineFactory, Models
from specvlm_cli.caption.policy import Policy
from specvlm_cli.caption.queue import VideoGroup
from specvlm_cli.process import python_command
from specvlm_cli.run.ledger import Claim
from specvlm_cli.workers.messages import (
    FromWorker,
    Ready,
    Task,
    ToWorker,
    WorkerReport,
    WorkerSetup,
    send_descriptor,
)

HARD_LIMIT_S = 5.0  # a worker that does not answer this long after its time limit is killed
_GOODBYE_S = 2.0
_TALK_S = 5  # a message passes in less, or the other side does not run


class _InFlight:
    """A claimed video: its slots, and when its worker must have answered."""

    def __init__(self, claim: Claim, sequences: int, due_s: float | None) -> None:
        self.claim = claim
        self.sequences = sequences
        self.due_s = due_s
        self.admitted = False


class Worker:
    """One worker process, and the videos that were claimed for it.

    Attributes:
        device: Where to load the models; None: where the settings say.
        models: What it loaded; None before that.
        batch_size: The most sequences that it has in flight.
        group: Videos that it decodes by themselves once it has nothing else in flight; None: there are none.
        decodes: The group that it decodes now; None: what it has in flight may be joined by others.
        withdrew: A video was withdrawn from it, and may still be prepared there.
        connection: Readable when it has something to say, or is dead.
    """

    def __init__(self, factory: EngineFactory, device: str | None, policy: Policy, stderr: int) -> None:
        """Start it; `stderr` is a descriptor for what it prints."""
        self.models: Models | None = None
        self.device = device
        self.batch_size = 1
        self.group: VideoGroup | None = None
        self.decodes: VideoGroup | None = None
        self.withdrew = False
        self._in_flight: dict[int, _InFlight] = {}
        self._policy = policy
        ours, theirs = socket.socketpair()
        with theirs:
            statement = f"from specvlm_cli.workers.child import main; main({theirs.fileno()}, {os.getpid()})"
            self._process = subprocess.Popen(
                python_command(statement),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[theirs.fileno()],
            )
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # one that was stopped must not stop us
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _TALK_S, 0))
        self.connection = Connection(ours.detach())
        with suppress(OSError):  # it is dead already, and the connection will say so
            self.connection.send(
                WorkerSetup(factory, device, policy.cpu_workers, policy.timeout_s, policy.on_oom)
            )

    @property
    def claims(self) -> list[Claim]:
        """The videos that were claimed for it and have not ended."""
        return [one.claim for one in self._in_flight.values()]

    @property
    def sequences(self) -> int:
        """The slots of those videos."""
        return sum(one.sequences for one in self._in_flight.values())

    @property
    def running(self) -> int:
        """The slots that are taken, as far as it has said."""
        return sum(one.sequences for one in self._in_flight.values() if one.admitted)

    def hold(self, claim: Claim) -> None:
        """Have a video in flight from now on."""
        self._in_flight[claim.ordinal] = _InFlight(claim, self._policy.sequences(claim), self._due_s())

    def drop(self, key: int) -> Claim:
        """Forget a video that has ended."""
        claim = self._in_flight.pop(key).claim
        if not self._in_flight:
            self.decodes = None
        return claim

    def _due_s(self) -> float | None:
        if self._policy.timeout_s is None:
            return None
        return time.monotonic() + self._policy.timeout_s + HARD_LIMIT_S

    def prepare(self, task: Task, descriptor: int) -> bool:
        """Have it prepare a video; the descriptor may be closed afterwards.

        False: it does not take it, because it is dead or stopped.
        """
        try:
            self.connection.send(task)
            send_descriptor(self.connection.fileno(), descriptor)
        except OSError:
            return False
        return True

    def give(self, message: ToWorker) -> bool:
        """Say what is to become of videos that it prepares.

        False: it does not hear, because it is dead or stopped.
        """
        try:
            self.connection.send(message)
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
            self.models, self.batch_size = message.models, message.batch_size
        if isinstance(message, WorkerReport):
            self._note(message)
        return message

    def _note(self, report: WorkerReport) -> None:
        """Count the time of what is admitted from now, and that of what waits too: the worker is alive."""
        self.batch_size = report.batch_size
        due_s = self._due_s()
        for key, one in self._in_flight.items():
            if key in report.admitted or not one.admitted:
                one.due_s = due_s
            one.admitted |= key in report.admitted

    def overdue_in_s(self) -> float | None:
        """Return in how many seconds it will have to be killed for not answering; None: never."""
        soonest = min((one.due_s for one in self._in_flight.values() if one.due_s is not None), default=None)
        return None if soonest is None else soonest - time.monotonic()

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
