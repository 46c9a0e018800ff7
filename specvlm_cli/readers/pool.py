"""The coordinator's side: videos to read go in, frames or reasons come out, each within its limits.

One event loop drives it: nothing here waits, except for the last two seconds of a process that was killed. The
read server dies with the *thread* that made the pool, so make it in one that lives as long as the pool.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

from specvlm_cli.exits import FatalError
from specvlm_cli.readers import endings, shared
from specvlm_cli.readers.jobs import DEFAULT_READER, Limits, ReadFailure, ReadJob
from specvlm_cli.readers.messages import ENDED, STARTED, ReaderReport, Said, job_line, report_of
from specvlm_cli.readers.read_client import ReadClient, ReadServerLostError
from specvlm_cli.readers.shared import MisreportError, ReadVideo

_GIVE_UP_S = 2.0  # after killing: a process that hangs in the kernel does not die
_START_S = 60.0  # a read server that has not forked by then is stuck
_ROOM_BYTES = 1 << 17  # in a socket for what is asked of a child: paths can be long

Outcome = ReadVideo | ReadFailure


@dataclass(slots=True)
class _Attempt:
    """One child and the video it reads.

    Attributes:
        job: What was asked for.
        connection: Our end of the child's socket.
        due_s: When its time is over, on the monotonic clock; before it runs, when that must have begun.
        runs: It is known to run.
        extended: It was looked whether its file is so large that it may take longer.
        killed: Its time was over, and it was killed.
        again: An earlier child of this video was lost without a fault of the video's.
    """

    job: ReadJob
    connection: socket.socket
    due_s: float
    runs: bool = False
    extended: bool = False
    killed: bool = False
    again: bool = False


class DecodingPool:
    """Reads videos in child processes, at most `workers` at a time.

    Raises, from `submit` and `collect`:
        FatalError: The read server cannot be started.
    """

    def __init__(self, workers: int, limits: Limits | None = None, *, reader: str = DEFAULT_READER) -> None:
        """`reader` is `module:function`, called in the child like `specvlm.video.read_video`, path in bytes."""
        self._workers = workers
        self._limits = Limits() if limits is None else limits
        self._client = ReadClient(reader, self._limits)
        self._attempts: dict[int, _Attempt] = {}
        self._outcomes: list[Outcome] = []
        self._numbers = count()

    def submit(self, job: ReadJob) -> None:
        """Begin to read a video. There must be room: `len(pool) < workers`."""
        assert len(self) < self._workers, "the pool is full"
        self._begin(job)

    def __len__(self) -> int:
        """Return how many videos are being read, or were and are not collected yet."""
        return len(self._attempts) + len(self._outcomes)

    def descriptors(self) -> list[int]:
        """Return what to wait on: one of them is readable when `collect` may have something."""
        return self._client.descriptors()

    def next_deadline_s(self) -> float | None:
        """Return in how many seconds `collect` has to be called because of a limit; None: never."""
        if self._outcomes:
            return 0.0
        soonest = min((attempt.due_s for attempt in self._attempts.values()), default=None)
        return None if soonest is None else max(0.0, soonest - time.monotonic())

    def collect(self) -> list[Outcome]:
        """Return what has come; kill what is past its limit. Does not wait."""
        try:
            self._hear()
            self._enforce()
        except ReadServerLostError:
            self._replace_server()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def cancel(self) -> None:
        """Kill all reading and forget about it; what was not collected is closed. The pool stays usable."""
        numbers = self._forget()
        try:
            self._client.end(numbers, _GIVE_UP_S)
        except ReadServerLostError:
            with suppress(FatalError):  # the next reader gets the error
                self._client.restart()

    def close(self) -> None:
        """End all processes; none is left, and no descriptor."""
        self._forget()
        self._client.close()

    def _forget(self) -> list[int]:
        """Let go of all that is under way; return the numbers of the attempts."""
        for outcome in self._outcomes:
            if isinstance(outcome, ReadVideo):
                outcome.close()
        for attempt in self._attempts.values():
            attempt.connection.close()
        numbers = list(self._attempts)
        self._outcomes.clear()
        self._attempts.clear()
        return numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _begin(self, job: ReadJob, *, again: bool = False) -> None:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._fail(job, endings.of_no_socket(error))
            return
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM_BYTES)
        number, due_s = next(self._numbers), time.monotonic() + _START_S
        self._attempts[number] = _Attempt(job, ours, due_s, again=again)
        with theirs:
            ours.sendall(job_line(job))
            try:
                self._client.fork(number, theirs)
            except ReadServerLostError:
                self._replace_server()

    def _hear(self) -> None:
        for what, number, value in self._client.hear():
            attempt = self._attempts.get(number)
            if attempt is None:  # it was given up
                continue
            if what == STARTED:
                attempt.runs, attempt.due_s = True, time.monotonic() + self._limits.timeout_s
            elif what == ENDED:
                self._on_end(self._attempts.pop(number), value)

    def _enforce(self) -> None:
        now_s = time.monotonic()
        for number, attempt in list(self._attempts.items()):
            if attempt.due_s > now_s:
                continue
            if not attempt.runs:
                raise ReadServerLostError
            if attempt.killed:
                self._give_up(self._attempts.pop(number))
            elif not attempt.extended:
                attempt.extended = True
                attempt.due_s += self._limits.extra_s(_size_bytes(attempt.connection))
            else:
                self._client.kill(number)
                attempt.killed, attempt.due_s = True, now_s + _GIVE_UP_S

    def _give_up(self, attempt: _Attempt) -> None:
        attempt.connection.close()
        self._fail(attempt.job, endings.of_hanging_process(self._limits))

    def _replace_server(self) -> None:
        """Start again what the lost read server's children were reading, each once."""
        lost, self._attempts = list(self._attempts.values()), {}
        for attempt in lost:
            attempt.connection.close()
        self._client.restart()
        for attempt in lost:
            if attempt.again:
                self._fail(attempt.job, endings.of_lost_process())
            else:
                self._begin(attempt.job, again=True)

    def _on_end(self, attempt: _Attempt, status: int) -> None:
        with attempt.connection:
            data, descriptors = shared.receive(attempt.connection)
        try:
            report = report_of(data)
            if report.shape is not None:
                self._succeed(attempt, report, descriptors)
                return
            said = endings.of(report, status, killed=attempt.killed, limits=self._limits)
        except MisreportError as error:
            report, said = ReaderReport(), endings.of_misreport(error)
        finally:
            shared.close_all(descriptors)
        self._fail(attempt.job, said)

    def _succeed(self, attempt: _Attempt, report: ReaderReport, descriptors: list[int]) -> None:
        """Take the frames over, and their descriptor out of the list."""
        if report.shape is None or report.source is None or len(descriptors) != 1:
            raise MisreportError("frames without their memory")
        owned, frames = shared.accept(descriptors.pop(), report.shape, report.source)
        self._outcomes.append(ReadVideo(attempt.job.key, owned, frames))

    def _fail(self, job: ReadJob, said: Said) -> None:
        self._outcomes.append(
            ReadFailure(job.key, said.stage, said.error_type, said.error, transient=said.transient)
        )


def _size_bytes(connection: socket.socket) -> int:
    """Return how large a child said that its file is, leaving what it said to be received; 0: it did not."""
    try:
        said = connection.recv(shared.MOST_BYTES, socket.MSG_PEEK)
        return report_of(said[: said.rfind(b"\n") + 1]).size_bytes
    except (OSError, MisreportError):
        return 0
