"""Videos on their way to a training: read ahead in child processes, a bounded number of bytes. Knows no model.

Videos are asked for in the order in which they were announced. One that hangs, crashes its reader or is broken
comes as a failure, after a few tries where another try may help.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from specvlm.records import Frames
from specvlm_cli.readers import DecodingPool, ReadFailure, ReadJob, ReadVideo

_LOOK_EVERY_S = 0.5
_FIRST_BACKOFF_S = 0.5
_MOST_READ = 32  # videos that may wait, however small they are: each holds a descriptor


class ReadLimits(NamedTuple):
    """How much is read at a time."""

    workers: int
    ahead_bytes: int = 1 << 30
    retries: int = 2


class TrainingReader:
    """Reads videos ahead of those who ask for them."""

    def __init__(self, pool: DecodingPool, bounds: ReadLimits, check: Callable[[], None]) -> None:
        """`check` is called while a video is waited for; what it raises ends the waiting."""
        self._pool, self._bounds, self._check = pool, bounds, check
        self._coming: Iterator[ReadJob] = iter(())
        self._reading: dict[int, ReadJob] = {}
        self._read: dict[int, ReadVideo | ReadFailure] = {}
        self._again: list[tuple[float, ReadJob]] = []
        self._tries: dict[int, int] = {}
        self._largest_bytes = 0
        self._least = 0  # the smallest key that may still be asked for

    def begin(self, jobs: Iterable[ReadJob]) -> None:
        """Read these from now on, whose keys ascend; what was being read is forgotten."""
        self._pool.cancel()
        for one in self._read.values():
            _close(one)
        self._reading, self._read, self._again, self._tries, self._least = {}, {}, [], {}, 0
        self._coming = iter(jobs)
        self._read_ahead()

    def take(self, key: int) -> Frames | ReadFailure:
        """Return the video of a key, or why there is none; those with smaller keys are dropped."""
        self.drop_before(key)  # what is not needed must not take the room of what is waited for
        self._wait(lambda: key in self._read)
        found = self._read.pop(key)
        if isinstance(found, ReadVideo):
            frames = found.frames()
            found.close()
            self._read_ahead()
            return frames
        return found

    def first(self, count: int) -> list[Frames]:
        """Return the frames of the first videos, at most `count`, as far as they fit; they are still to be taken."""
        self._wait(lambda: len(self._read) >= count or not (self._reading or self._again))
        return [one.frames() for _, one in sorted(self._read.items())[:count] if isinstance(one, ReadVideo)]

    def has(self, key: int) -> bool:
        """Say whether `take` would return at once."""
        self._collect()
        self._read_ahead()
        return key in self._read

    def ready(self) -> list[int]:
        """Return the keys of the videos that are there, in order; waits for none."""
        self._collect()
        self._read_ahead()
        return sorted(key for key, one in self._read.items() if isinstance(one, ReadVideo))

    def peek(self, key: int) -> Frames:
        """Return a video that is there; it is still to be taken."""
        found = self._read[key]
        assert isinstance(found, ReadVideo)
        return found.frames()

    def take_ahead(self, key: int) -> Frames:
        """Return a video that is there before its turn; those with smaller keys stay."""
        frames = self.peek(key)
        _close(self._read.pop(key))
        self._read_ahead()
        return frames

    def drop_before(self, key: int) -> None:
        """Videos with smaller keys will not be asked for."""
        self._least = key
        for passed in [one for one in self._read if one < key]:
            _close(self._read.pop(passed))
        self._again = [(when_s, job) for when_s, job in self._again if job.key >= key]

    def _wait(self, ready: Callable[[], bool]) -> None:
        while True:
            self._collect()
            self._read_ahead()
            if ready():
                return
            assert self._reading or self._again, "it was not announced"
            self._check()
            limits = [_LOOK_EVERY_S, *(when - time.monotonic() for when, _ in self._again)]
            deadline_s = self._pool.next_deadline_s()
            limits += [] if deadline_s is None else [deadline_s]
            select.select(self._pool.descriptors(), (), (), max(min(limits), 0.0))

    def _collect(self) -> None:
        for outcome in self._pool.collect() if self._reading else ():
            job = self._reading.pop(outcome.key)
            if outcome.key < self._least:
                _close(outcome)
                continue
            if isinstance(outcome, ReadVideo):
                self._largest_bytes = max(self._largest_bytes, outcome.size_bytes)
            elif outcome.transient and self._tries.get(outcome.key, 0) < self._bounds.retries:
                tries = self._tries[outcome.key] = self._tries.get(outcome.key, 0) + 1
                self._again.append((time.monotonic() + _FIRST_BACKOFF_S * 2 ** (tries - 1), job))
                continue
            self._read[outcome.key] = outcome

    def _read_ahead(self) -> None:
        while len(self._pool) < self._bounds.workers:
            job = self._due_again() or (self._next() if self._has_room() else None)
            if job is None:
                return
            self._reading[job.key] = job
            self._pool.submit(job)

    def _next(self) -> ReadJob | None:
        return next((job for job in self._coming if job.key >= self._least), None)

    def _due_again(self) -> ReadJob | None:
        """A video to be tried again, for which there is always room: others may wait behind it."""
        now_s = time.monotonic()
        for index, (when_s, job) in enumerate(self._again):
            if when_s <= now_s:
                del self._again[index]
                return job
        return None

    def _has_room(self) -> bool:
        """Say whether one more may be read; each is taken to be as large as the largest so far."""
        if not (self._read or self._reading):
            return True
        waiting = [one.size_bytes for one in self._read.values() if isinstance(one, ReadVideo)]
        expected = sum(waiting) + self._largest_bytes * (len(self._reading) + 1)
        return expected <= self._bounds.ahead_bytes and len(self._read) + len(self._reading) < _MOST_READ


def _close(one: ReadVideo | ReadFailure) -> None:
    if isinstance(one, ReadVideo):
        one.close()
