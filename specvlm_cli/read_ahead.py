"""Videos on their way to the workers: read ahead of them, a bounded number of bytes. Knows no model.

Nothing of it is claimed in the ledger, so a crash finds these videos pending, and suspects none of them.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from specvlm.errors import ConfigError
from specvlm_cli.decoding import DecodingPool, ReadFailure, ReadJob, ReadVideo
from specvlm_cli.ledger import BAD_INPUT, Claim, Ledger
from specvlm_cli.policy import Policy

_FETCH = 64  # claims taken from the ledger at a time
_MOST_READ = 32  # videos that may wait for a worker, however small they are: each holds a descriptor
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 60.0


class Taken(NamedTuple):
    """A video that a worker is to caption now."""

    claim: Claim
    video: ReadVideo
    prepared: bool  # the worker was lent it before


class Queue:
    """Videos on their way to the workers: still to come, being read, read, and waiting for another try.

    A worker may be lent a video that is read, to prepare it before its turn. It goes on waiting here, with its
    frames, and goes to whoever is free first.
    """

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self._ledger = ledger
        self._policy = policy
        self._pool: DecodingPool | None = None
        self._frame_multiple = 1
        self._last = -1  # ordinal of the last claim that was fetched
        self._coming: deque[Claim] = deque()
        self._exhausted = False
        self._started = 0
        self._reading: dict[int, Claim] = {}
        self._read: deque[tuple[Claim, ReadVideo]] = deque()
        self._lent: dict[object, tuple[Claim, ReadVideo]] = {}  # by whom it was lent to; at most one each
        self._impossible: deque[tuple[Claim, ReadFailure]] = deque()
        self._largest_bytes = 0
        self._tries: dict[int, int] = {}
        self._again: list[tuple[float, int, Claim]] = []  # a heap of (when, tie break, claim)
        self._tie = count()

    def begin(self, pool: DecodingPool, frame_multiple: int) -> None:
        """Read with this pool from now on."""
        self._pool, self._frame_multiple = pool, frame_multiple

    def __bool__(self) -> bool:
        """Whether anything is still to come."""
        return bool(self._waiting() or self._reading or self._again or self._impossible or self._peek())

    def ready(self) -> tuple[int, int]:
        """Return how many videos wait for a worker, and the bytes of their frames."""
        waiting = self._waiting()
        return len(waiting), sum(video.size_bytes for _, video in waiting)

    def _waiting(self) -> list[tuple[Claim, ReadVideo]]:
        return [*self._lent.values(), *self._read]

    def retrying(self) -> int:
        """Return how many videos wait for another try."""
        return len(self._again)

    def due_in_s(self) -> float | None:
        """Return in how many seconds a video is to be tried again; None: none is waiting for that."""
        return self._again[0][0] - time.monotonic() if self._again else None

    def read_ahead(self) -> None:
        """Have videos read as long as there is room for their frames and a process to read them."""
        assert self._pool is not None
        while len(self._pool) < self._policy.decode_workers and self._has_room():
            claim = self._next()
            if claim is None:
                return
            try:
                job = self._job(claim)
            except ConfigError as error:  # its own start and end are impossible
                failure = ReadFailure(claim.ordinal, "open", BAD_INPUT, str(error), transient=False)
                self._impossible.append((claim, failure))
                continue
            self._reading[claim.ordinal] = claim
            self._pool.submit(job)

    def _has_room(self) -> bool:
        """Say whether one more video may be read; each is taken to be as large as the largest so far."""
        waiting, waiting_bytes = self.ready()
        if not (waiting or self._reading):
            return True
        waiting_bytes += self._largest_bytes * (len(self._reading) + 1)
        return waiting_bytes <= self._policy.ahead_bytes and waiting < _MOST_READ

    def _next(self) -> Claim | None:
        if self._again and self._again[0][0] <= time.monotonic():
            return heapq.heappop(self._again)[2]
        return self._coming.popleft() if self._peek() else None

    def _peek(self) -> bool:
        """Say whether there is a video that was not begun yet, fetching more from the ledger where needed."""
        if self._coming or self._exhausted:
            return bool(self._coming)
        limit = self._policy.limit
        most = _FETCH if limit is None else min(_FETCH, limit - self._started)
        self._coming.extend(self._ledger.pending(self._last, most) if most > 0 else ())
        self._exhausted = not self._coming
        self._started += len(self._coming)
        if self._coming:
            self._last = self._coming[-1].ordinal
        return bool(self._coming)

    def _job(self, claim: Claim) -> ReadJob:
        item, frames = claim.item, self._policy.frames
        if item.start_s is not None or item.end_s is not None:
            frames = replace(frames, start_s=item.start_s or 0.0, end_s=item.end_s)
        return ReadJob(claim.ordinal, item.path, frames, self._frame_multiple, self._policy.root)

    def collect(self) -> Iterator[tuple[Claim, ReadFailure]]:
        """Take what was read; yield what could not be."""
        assert self._pool is not None
        while self._impossible:
            yield self._impossible.popleft()
        for outcome in self._pool.collect() if self._reading else ():
            claim = self._reading.pop(outcome.key)
            if isinstance(outcome, ReadFailure):
                yield claim, outcome
            else:
                self._largest_bytes = max(self._largest_bytes, outcome.size_bytes)
                self._read.append((claim, outcome))

    def lend(self, holder: object) -> tuple[Claim, ReadVideo] | None:
        """Return the next video that is read, for a worker that has none ahead to prepare; None: there is none.

        A video that is tried again is not lent: it may be what a worker died of.
        """
        assert holder not in self._lent
        if not self._read or self._read[0][0].attempts > 1:
            return None
        self._lent[holder] = self._read.popleft()
        return self._lent[holder]

    def has_lent(self, holder: object) -> bool:
        """Say whether a worker has a video ahead."""
        return holder in self._lent

    def give_back(self, holder: object) -> None:
        """Have what a worker was lent, which is gone now, wait in front of all others."""
        if holder in self._lent:
            self._read.appendleft(self._lent.pop(holder))

    def take(self, holder: object) -> Taken | None:
        """Return the next video for a worker: what it was lent, else the next that is read, else what another was.

        That other one will get another, or has nothing more to do.
        """
        if holder in self._lent:
            return Taken(*self._lent.pop(holder), prepared=True)
        if self._read:
            return Taken(*self._read.popleft(), prepared=False)
        return Taken(*self._lent.popitem()[1], prepared=False) if self._lent else None

    def try_again(self, claim: Claim) -> bool:
        """Have a video tried again after a while; False: it was tried often enough."""
        tries = self._tries[claim.ordinal] = self._tries.get(claim.ordinal, 0) + 1
        if tries > self._policy.retries:
            return False
        delay_s = min(_FIRST_BACKOFF_S * 2 ** (tries - 1), _LONGEST_BACKOFF_S)
        again = replace(claim, attempts=claim.attempts + 1)
        heapq.heappush(self._again, (time.monotonic() + delay_s, next(self._tie), again))
        return True

    def drop(self) -> None:
        """Forget everything; nothing of it was claimed, so the next start finds it pending."""
        if self._pool is not None:
            self._pool.cancel()
        for _, video in self._waiting():
            video.close()
        self._lent.clear()
        self._read.clear()
        self._reading.clear()
        self._coming.clear()
        self._again.clear()
        self._impossible.clear()
        self._exhausted = True
