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
    while queue.take("worker"):
        pass
    assert not queue


def test_what_is_lent_goes_on_waiting_and_counts() -> None:
    queue, pool = queue_of(100, 10, ahead_bytes=45)
    read_all_that_may_be_read(queue, pool)
    before = queue.ready()
    for worker in ("one", "two"):
        assert queue.lend(worker)
        assert queue.has_lent(worker)
    assert queue.ready() == before
    read_all_that_may_be_read(queue, pool)
    assert queue.ready() == before


def test_a_worker_gets_what_it_was_lent_then_what_is_read_then_what_another_was_lent() -> None:
    queue, pool = queue_of(3, 1)
    read_all_that_may_be_read(queue, pool)
    assert queue.lend("one")
    assert queue.lend("two")
    got = [queue.take("two"), queue.take("two"), queue.take("two"), queue.take("two")]
    assert [taken and (taken.claim.ordinal, taken.prepared) for taken in got] == [
        (1, True),
        (2, False),
        (0, False),
        None,
    ]
    assert not queue.has_lent("one")
    assert not queue


def test_what_was_lent_to_a_worker_that_is_gone_comes_first() -> None:
    queue, pool = queue_of(3, 1)
    read_all_that_may_be_read(queue, pool)
    assert queue.lend("one")
    queue.give_back("one")
    queue.give_back("one")
    ordinals = [taken.claim.ordinal for _ in range(3) if (taken := queue.take("other"))]
    assert ordinals == [0, 1, 2]


def test_what_is_lent_is_dropped_like_all_that_waits() -> None:
    queue, pool = queue_of(2, 1)
    read_all_that_may_be_read(queue, pool)
    lent: Any = queue.lend("one")
    queue.drop()
    assert lent[1].closed
    assert not queue
    assert queue.take("one") is None


def test_a_try_comes_again_after_a_while_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("specvlm_cli.read_ahead.time.monotonic", lambda: now[0])
    queue, pool = queue_of(1, 1, retries=2)
    read_all_that_may_be_read(queue, pool)
    taken = queue.take("worker")
    assert taken is not None
    claim = taken.claim
    for delay_s in (1.0, 2.0):
        assert queue.try_again(claim)
        assert queue.due_in_s() == delay_s
        assert (bool(queue), queue.retrying()) == (True, 1)
        queue.read_ahead()
        assert len(pool) == 0, "not yet"
        now[0] += delay_s
        read_all_that_may_be_read(queue, pool)
        assert queue.lend("worker") is None, "whatever it died of before is its own doing"
        taken = queue.take("worker")
        assert taken is not None
        assert taken.claim.attempts == claim.attempts + 1
        claim = taken.claim
    assert not queue.try_again(claim)
    assert not queue
