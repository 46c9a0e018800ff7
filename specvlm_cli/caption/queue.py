"""Videos on their way to the workers: read ahead of them, a bounded number of bytes. Knows no model.

Nothing of it is claimed in the ledger, so a crash finds these videos pending, and suspects none of them.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from specvlm_cli.caption import baseline
from specvlm_cli.caption.policy import Policy
from specvlm_cli.readers import DecodingPool, ReadFailure, ReadJob, ReadVideo
from specvlm_cli.run.ledger import Claim, Ledger

_FETCH = 64  # claims taken from the ledger at a time
_MOST_READ = 32  # videos that may wait for a worker, however small they are: each holds a descriptor
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 60.0


class Read(NamedTuple):
    """A video whose frames wait for a worker."""

    claim: Claim
    video: ReadVideo


class _Lent(NamedTuple):
    """A video that a worker has, to prepare it; its frames are read again where that worker is lost."""

    claim: Claim
    size_bytes: int


class VideoGroup:
    """Videos that a worker decodes by themselves: a sampled set, or a suspect alone.

    Attributes:
        alone: It is one video, in whose company a worker died; nothing is even prepared next to it.
        unread: Ordinals of those that are still being read.
        read: Those whose frames wait for the worker.
        claims: Those that are read, whether the worker has them or not.
    """

    def __init__(self, claims: Sequence[Claim], *, alone: bool = False) -> None:
        self.alone = alone
        self.unread = {claim.ordinal for claim in claims}
        self.read: deque[Read] = deque()
        self.claims: list[Claim] = []

    def add(self, claim: Claim, video: ReadVideo) -> None:
        """Take in a video that is read."""
        self.unread.discard(claim.ordinal)
        self.read.append(Read(claim, video))
        self.claims.append(claim)


class Queue:
    """Videos on their way to the workers: still to come, being read, read, lent, and waiting for another try.

    A worker is lent videos that are read, to prepare them before they are admitted. Those that are to be decoded by
    themselves make groups.

    Attributes:
        batch_size: Sequences that make a sampled set.
        workers: Workers that want groups: no more sets than that are read ahead.
        groups: Groups that no worker has begun.
        first_read_s: What reading the first video took.
    """

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self.batch_size = self.workers = 1
        self.groups: list[VideoGroup] = []
        self.first_read_s: float | None = None
        self._ledger = ledger
        self._policy = policy
        self._pool: DecodingPool | None = None
        self._frame_multiple = 1
        self._last = -1  # ordinal of the last claim that was fetched
        self._coming: deque[Claim] = deque()
        self._aside: deque[Claim] = deque()  # sampled ones, until they make a set
        self._set: deque[Claim] = deque()  # to be read for the set that was made last
        self._alone: deque[Claim] = deque()  # suspects that are to be read
        self._suspects: set[int] = set()
        self._charged: set[int] = set()  # of them, those that the ledger suspects
        self._exhausted = False
        self._started = 0
        self._reading: dict[int, Claim] = {}
        self._read: deque[Read] = deque()
        self._group_of: dict[int, VideoGroup] = {}  # those that are being read
        self._lent: dict[object, deque[_Lent]] = {}  # by whom they are lent to
        self._impossible: deque[tuple[Claim, ReadFailure]] = deque()
        self._largest_bytes = 0
        self._tries: dict[int, int] = {}
        self._again: list[tuple[float, int, Claim]] = []  # a heap of (when, tie break, claim)
        self._tie = count()

    def begin(self, pool: DecodingPool, frame_multiple: int) -> None:
        """Read with this pool from now on; first what was running at several crashes of whole starts."""
        self._pool, self._frame_multiple = pool, frame_multiple
        for claim in self._ledger.suspects(self._policy.limit):
            self._charged.add(claim.ordinal)
            self._suspects.add(claim.ordinal)
            self._alone.append(claim)
        self._started = len(self._alone)

    @property
    def has_charged(self) -> bool:
        """Whether some videos must run with nothing else in the whole start."""
        return bool(self._charged)

    def __bool__(self) -> bool:
        """Whether anything is still to come."""
        return bool(
            self._read
            or any(self._lent.values())
            or self.groups
            or self._reading
            or self._alone
            or self._set
            or self._aside
            or self._again
            or self._impossible
            or self._peek()
        )

    def ready(self) -> tuple[int, int]:
        """Return how many videos wait to be admitted, and the bytes of their frames."""
        lent = [one.size_bytes for holder in self._lent.values() for one in holder]
        read = [one.video.size_bytes for one in self._read]
        grouped = [one.video.size_bytes for group in self.groups for one in group.read]
        return len(lent) + len(read) + len(grouped), sum(lent) + sum(read) + sum(grouped)

    def retrying(self) -> int:
        """Return how many videos wait for another try."""
        return len(self._again)

    def due_in_s(self) -> float | None:
        """Return in how many seconds a video is to be tried again; None: none is waiting for that."""
        return self._again[0][0] - time.monotonic() if self._again else None

    # Reading

    def read_ahead(self) -> None:
        """Have videos read as long as there is room for their frames and a process to read them."""
        assert self._pool is not None
        while len(self._pool) < self._policy.decode_workers and self._has_room():
            claim = self._next()
            if claim is None:
                return
            job = self._job(claim)
            if isinstance(job, ReadFailure):
                self._impossible.append((claim, job))
                continue
            self._reading[claim.ordinal] = claim
            self._pool.submit(job)

    def _has_room(self) -> bool:
        """Say whether one more video may be read; each is taken to be as large as the largest so far."""
        waiting, waiting_bytes = self.ready()
        if not (waiting or self._reading):
            return True
        waiting_bytes += self._largest_bytes * (len(self._reading) + 1)
        most = max(_MOST_READ, self.batch_size)
        return waiting_bytes <= self._policy.ahead_bytes and len(self._read) < most

    def _next(self) -> Claim | None:
        self._take_due()
        if self._alone:
            return self._in_group(self._alone.popleft())
        if self._charged:
            return None
        has_others = self._peek()
        if not self._set and self._makes_set():
            self._make_set()
        if self._set:
            return self._set.popleft()
        return self._coming.popleft() if has_others else None

    def _take_due(self) -> None:
        while self._again and self._again[0][0] <= time.monotonic():
            self.put_back(heapq.heappop(self._again)[2])

    def put_back(self, claim: Claim) -> None:
        """Have a video read next, or with the next set, or for its turn alone."""
        if claim.ordinal in self._suspects:
            self._alone.append(claim)
        elif self.is_sampled(claim):
            self._aside.append(claim)
        else:
            self._coming.appendleft(claim)

    def is_sampled(self, claim: Claim) -> bool:
        """Say whether a video is also decoded plainly."""
        share = self._policy.baseline_sample
        return share > 0.0 and baseline.sampled(claim.item.id, share)

    def _in_group(self, claim: Claim) -> Claim:
        group = VideoGroup([claim], alone=True)
        self.groups.append(group)
        self._group_of[claim.ordinal] = group
        return claim

    def _makes_set(self) -> bool:
        """Say whether the next sampled set is to be read: it is as full as it gets, and some worker has none."""
        if not self._aside or len(self.groups) >= self.workers:
            return False
        return self._sequences(self._aside) >= self.batch_size or not self._peek()

    def _make_set(self) -> None:
        claims = [self._aside.popleft()]
        while self._aside and self._sequences([*claims, self._aside[0]]) <= self.batch_size:
            claims.append(self._aside.popleft())
        group = VideoGroup(claims)
        self.groups.append(group)
        self._group_of |= {claim.ordinal: group for claim in claims}
        self._set.extend(claims)

    def _sequences(self, claims: Sequence[Claim]) -> int:
        return sum(self._policy.sequences(claim) for claim in claims)

    def _peek(self) -> bool:
        """Say whether there is a video that was not begun yet, fetching more from the ledger where needed.

        Sampled ones are laid aside; while they make several sets, nothing more is fetched.
        """
        while not self._coming and not self._exhausted and len(self._aside) < 2 * self.batch_size:
            limit = self._policy.limit
            most = _FETCH if limit is None else min(_FETCH, limit - self._started)
            fetched = self._ledger.pending(self._last, most) if most > 0 else []
            self._exhausted = not fetched
            self._started += len(fetched)
            for claim in fetched:
                self._last = claim.ordinal
                (self._aside if self.is_sampled(claim) else self._coming).append(claim)
        return bool(self._coming)

    def _job(self, claim: Claim) -> ReadJob | ReadFailure:
        item = claim.item
        like = ReadJob(0, b"", self._policy.captions.frames, self._frame_multiple, self._policy.root)
        return like.for_video(claim.ordinal, item.path, item.start_s, item.end_s)

    def collect(self) -> Iterator[tuple[Claim, ReadFailure]]:
        """Take what was read; yield what could not be."""
        assert self._pool is not None
        while self._impossible:
            claim, failure = self._impossible.popleft()
            self._leave_out(claim)
            yield claim, failure
        for outcome in self._pool.collect() if self._reading else ():
            claim = self._reading.pop(outcome.key)
            if isinstance(outcome, ReadFailure):
                self._leave_out(claim)
                yield claim, outcome
                continue
            if self.first_read_s is None:
                self.first_read_s = outcome.source.decode_s
            self._largest_bytes = max(self._largest_bytes, outcome.size_bytes)
            group = self._group_of.pop(outcome.key, None)
            if group is None:
                self._read.append(Read(claim, outcome))
            else:
                group.add(claim, outcome)

    def _leave_out(self, claim: Claim) -> None:
        """Continue a group without a video that cannot be read."""
        group = self._group_of.pop(claim.ordinal, None)
        if group is not None:
            group.unread.discard(claim.ordinal)
            self._forget_if_empty(group)

    def _forget_if_empty(self, group: VideoGroup) -> None:
        if not group.unread and not group.claims and group in self.groups:
            self.groups.remove(group)

    def lose(self, group: VideoGroup) -> list[Claim]:
        """Return those of a group that its worker had, which is gone now; the others wait for another worker."""
        waiting = {read.claim.ordinal for read in group.read}
        lost = [claim for claim in group.claims if claim.ordinal not in waiting]
        group.claims = [claim for claim in group.claims if claim.ordinal in waiting]
        self._forget_if_empty(group)
        return lost

    # Lending

    def has_read(self) -> bool:
        """Say whether a video waits that can be lent."""
        return bool(self._read)

    def lend(self, holder: object) -> Read:
        """Return the next video that is read, for a worker to prepare; close its frames once they are sent."""
        read = self._read.popleft()
        self._lent.setdefault(holder, deque()).append(_Lent(read.claim, read.video.size_bytes))
        return read

    def lent(self, holder: object) -> list[Claim]:
        """Return what a worker prepares ahead, in order."""
        return [one.claim for one in self._lent.get(holder, ())]

    def lent_bytes(self, holder: object) -> int:
        """Return the frames of that, in bytes."""
        return sum(one.size_bytes for one in self._lent.get(holder, ()))

    def take(self, holder: object) -> Claim:
        """Return the first video that a worker was lent, which is admitted now."""
        return self._lent[holder].popleft().claim

    def is_over(self) -> bool:
        """Say whether nothing is left to be read, but for groups and what is to be tried again."""
        return not (self._read or self._reading or self._peek())

    def withdraw(self) -> tuple[object, Claim] | None:
        """Take the last video from whoever was lent most, so that it is read again for another; None: there is none."""
        holder = max(self._lent, key=lambda one: len(self._lent[one]), default=None)
        if holder is None or not self._lent[holder]:
            return None
        claim = self._lent[holder].pop().claim
        self._coming.appendleft(claim)
        return holder, claim

    def recall(self, holder: object) -> list[Claim]:
        """Return what a worker was lent, which is gone now."""
        return [one.claim for one in self._lent.pop(holder, ())]

    # Trying again

    def suspect(self, claim: Claim) -> None:
        """Have a video run alone from now on."""
        self._suspects.add(claim.ordinal)

    def settle(self, claim: Claim) -> None:
        """Take note that a video has its captions or has failed."""
        self._suspects.discard(claim.ordinal)
        self._charged.discard(claim.ordinal)
        self._tries.pop(claim.ordinal, None)

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
        """Forget everything but what is lent; nothing of it was claimed, so the next start finds it pending."""
        if self._pool is not None:
            self._pool.cancel()
        for read in [*self._read, *(one for group in self.groups for one in group.read)]:
            read.video.close()
        for kept in (
            self.groups,
            self._read,
            self._reading,
            self._group_of,
            self._coming,
            self._aside,
            self._set,
            self._alone,
            self._again,
            self._impossible,
        ):
            kept.clear()
        self._exhausted = True
