"""Reading ahead: never more bytes than allowed, never more videos than asked for, retries after a while."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from specvlm.config import FrameSettings
from specvlm_cli import read_ahead
from specvlm_cli.inputs.item import Item
from specvlm_cli.ledger import Claim
from specvlm_cli.policy import Policy
from specvlm_cli.read_ahead import Queue


@dataclass
class FakeLedger:
    """Has so many pending videos."""

    number: int

    def pending(self, after: int, limit: int) -> list[Claim]:
        last = min(after + 1 + limit, self.number)
        return [Claim(ordinal, Item(str(ordinal), b"/x"), 1) for ordinal in range(after + 1, last)]


@dataclass
class FakeVideo:
    """Frames of a given size."""

    key: int
    size_bytes: int
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakePool:
    """Reads at once whatever it is given."""

    size_bytes: int
    jobs: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.jobs)

    def submit(self, job: Any) -> None:
        self.jobs.append(job)

    def collect(self) -> list[FakeVideo]:
        made = [FakeVideo(job.key, self.size_bytes) for job in self.jobs]
        self.jobs.clear()
        return made

    def cancel(self) -> None:
        self.jobs.clear()


def queue_of(number: int, size_bytes: int, **policy: Any) -> tuple[Queue, Any]:
    pool: Any = FakePool(size_bytes)
    ledger: Any = FakeLedger(number)
    queue = Queue(ledger, Policy(FrameSettings(), ("why?",), **policy))
    queue.begin(pool, 1)
    return queue, pool


def read_all_that_may_be_read(queue: Queue, pool: FakePool) -> None:
    before = -1
    while before != queue.ready()[0]:
        before = queue.ready()[0]
        queue.read_ahead()
        assert list(queue.collect()) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_frames_that_wait_stay_within_their_bytes(workers: int) -> None:
    queue, pool = queue_of(100, 10, ahead_bytes=45, decode_workers=workers)
    read_all_that_may_be_read(queue, pool)
    assert queue.ready()[1] <= 45
    assert queue.ready()[0] >= 4 if workers == 1 else queue.ready()[0] >= 3


def test_one_video_is_read_however_large_it_is() -> None:
    queue, pool = queue_of(3, 1000, ahead_bytes=45)
    read_all_that_may_be_read(queue, pool)
    assert queue.ready() == (1, 1000)


def test_small_videos_do_not_take_all_descriptors() -> None:
    queue, pool = queue_of(500, 1, decode_workers=4)
    read_all_that_may_be_read(queue, pool)
    assert queue.ready()[0] <= read_ahead._MOST_READ + 4


def test_no_more_than_the_limit_is_begun() -> None:
    queue, pool = queue_of(500, 1, limit=7)
    read_all_that_may_be_read(queue, pool)
    assert queue.ready()[0] == 7
    assert queue, "they wait to be taken"
    while queue.take():
        pass
    assert not queue


def test_a_try_comes_again_after_a_while_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("specvlm_cli.read_ahead.time.monotonic", lambda: now[0])
    queue, pool = queue_of(1, 1, retries=2)
    read_all_that_may_be_read(queue, pool)
    taken = queue.take()
    assert taken is not None
    claim = taken[0]
    for delay_s in (1.0, 2.0):
        assert queue.try_again(claim)
        assert queue.due_in_s() == delay_s
        assert (bool(queue), queue.retrying()) == (True, 1)
        queue.read_ahead()
        assert len(pool) == 0, "not yet"
        now[0] += delay_s
        read_all_that_may_be_read(queue, pool)
        taken = queue.take()
        assert taken is not None
        assert taken[0].attempts == claim.attempts + 1
        claim = taken[0]
    assert not queue.try_again(claim)
    assert not queue
