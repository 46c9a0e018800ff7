"""Reading ahead: never more bytes than allowed, never more videos than asked for, groups, retries after a while."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from specvlm.config import FrameSettings, GenerationSettings, SpeculationSettings
from specvlm_cli.caption.policy import Policy
from specvlm_cli.caption.queue import _MOST_READ, Queue
from specvlm_cli.caption.settings import CaptionSettings, ModelChoice
from specvlm_cli.inputs.item import Item
from specvlm_cli.readers import ReadFailure
from specvlm_cli.run.ledger import Claim

SETTINGS = CaptionSettings(
    ModelChoice("tiny"), ("why?",), None, FrameSettings(), GenerationSettings(), SpeculationSettings()
)


def claim_of(ordinal: int) -> Claim:
    return Claim(ordinal, Item(str(ordinal), b"/x"), 1)


@dataclass
class FakeLedger:
    """Has so many pending videos, the first of which were there at crashes."""

    number: int
    crashed: int = 0

    def pending(self, after: int, limit: int) -> list[Claim]:
        first = max(after + 1, self.crashed)
        return [claim_of(ordinal) for ordinal in range(first, min(first + limit, self.number))]

    def suspects(self, limit: int | None) -> list[Claim]:
        most = self.crashed if limit is None else min(limit, self.crashed)
        return [claim_of(ordinal) for ordinal in range(most)]


@dataclass
class FakeSource:
    """What is known of a file."""

    decode_s: float = 0.1


@dataclass
class FakeVideo:
    """Frames of a given size."""

    key: int
    size_bytes: int
    closed: bool = False
    source: FakeSource = field(default_factory=FakeSource)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakePool:
    """Reads at once whatever it is given, but for what is bad."""

    size_bytes: int
    bad: tuple[int, ...] = ()
    jobs: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.jobs)

    def submit(self, job: Any) -> None:
        self.jobs.append(job)

    def collect(self) -> list[FakeVideo | ReadFailure]:
        made = [self._outcome(job.key) for job in self.jobs]
        self.jobs.clear()
        return made

    def _outcome(self, key: int) -> FakeVideo | ReadFailure:
        if key in self.bad:
            return ReadFailure(key, "open", "NotAVideoError", "no", transient=False)
        return FakeVideo(key, self.size_bytes)

    def cancel(self) -> None:
        self.jobs.clear()


def queue_of(
    number: int, size_bytes: int, *, crashed: int = 0, bad: tuple[int, ...] = (), **policy: Any
) -> tuple[Queue, Any]:
    pool: Any = FakePool(size_bytes, bad)
    ledger: Any = FakeLedger(number, crashed)
    queue = Queue(ledger, Policy(SETTINGS, **policy))
    queue.begin(pool, 1)
    return queue, pool


def read_all_that_may_be_read(queue: Queue, pool: FakePool) -> list[int]:
    """Return the ordinals of those that could not be read."""
    failed: list[int] = []
    while True:
        before = len(failed), queue.ready()[0]
        queue.read_ahead()
        failed += [claim.ordinal for claim, _ in queue.collect()]
        if before == (len(failed), queue.ready()[0]):
            return failed


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


@pytest.mark.parametrize("batch_size", [1, 100])
def test_small_videos_take_no_more_descriptors_than_a_batch_needs(batch_size: int) -> None:
    queue, pool = queue_of(500, 1, decode_workers=4)
    queue.batch_size = batch_size
    read_all_that_may_be_read(queue, pool)
    assert max(_MOST_READ, batch_size) <= queue.ready()[0] <= max(32, batch_size) + 4


def test_no_more_than_the_limit_is_begun() -> None:
    queue, pool = queue_of(500, 1, limit=7)
    read_all_that_may_be_read(queue, pool)
    assert queue.ready()[0] == 7
    assert queue, "they wait to be taken"
    while queue.has_read():
        queue.lend("worker")
        queue.take("worker")
    assert not queue


def test_what_is_lent_goes_on_waiting_and_counts() -> None:
    queue, pool = queue_of(100, 10, ahead_bytes=45)
    read_all_that_may_be_read(queue, pool)
    before = queue.ready()
    for worker in ("one", "two"):
        queue.lend(worker)
        assert queue.lent_bytes(worker) == 10
    assert queue.ready() == before
    read_all_that_may_be_read(queue, pool)
    assert queue.ready() == before


def test_what_waits_behind_others_is_withdrawn_and_read_again() -> None:
    queue, pool = queue_of(3, 1)
    read_all_that_may_be_read(queue, pool)
    for worker in ("one", "two", "two"):
        queue.lend(worker)
    assert queue.is_over()
    holder, claim = queue.withdraw() or ("", claim_of(9))
    assert (holder, claim.ordinal) == ("two", 2)
    assert not queue.is_over()
    read_all_that_may_be_read(queue, pool)
    assert queue.lend("three").claim.ordinal == 2
    assert [each.ordinal for each in queue.recall("two")] == [1]
    assert queue.recall("two") == []


def test_a_try_comes_again_after_a_while_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("specvlm_cli.caption.queue.time.monotonic", lambda: now[0])
    queue, pool = queue_of(1, 1, retries=2)
    read_all_that_may_be_read(queue, pool)
    claim = queue.lend("worker").claim
    queue.take("worker")
    for delay_s in (1.0, 2.0):
        assert queue.try_again(claim)
        assert queue.due_in_s() == delay_s
        assert (bool(queue), queue.retrying()) == (True, 1)
        queue.read_ahead()
        assert len(pool) == 0, "not yet"
        now[0] += delay_s
        read_all_that_may_be_read(queue, pool)
        taken = queue.lend("worker")
        queue.take("worker")
        assert taken.claim.attempts == claim.attempts + 1
        claim = taken.claim
    assert not queue.try_again(claim)
    assert not queue


def test_suspects_make_groups_of_one_before_all_that_is_to_be_read() -> None:
    queue, pool = queue_of(40, 1)
    read_all_that_may_be_read(queue, pool)
    claim = queue.lend("worker").claim
    queue.take("worker")
    queue.suspect(claim)
    queue.put_back(claim)
    read_all_that_may_be_read(queue, pool)
    (group,) = queue.groups
    assert (group.alone, [one.ordinal for one in group.claims], group.unread) == (True, [0], set())
    assert not queue.has_charged


def test_what_crashed_whole_starts_comes_first_and_alone() -> None:
    queue, pool = queue_of(5, 1, crashed=2)
    read_all_that_may_be_read(queue, pool)
    assert queue.has_charged
    assert not queue.has_read(), "nothing else is even read"
    assert [[one.ordinal for one in group.claims] for group in queue.groups] == [[0], [1]]
    for group in list(queue.groups):
        queue.groups.remove(group)
        queue.settle(group.claims[0])
    assert not queue.has_charged
    read_all_that_may_be_read(queue, pool)
    assert queue.ready()[0] == 3


def test_the_limit_counts_what_crashed_whole_starts() -> None:
    queue, pool = queue_of(9, 1, crashed=2, limit=3)
    read_all_that_may_be_read(queue, pool)
    for group in list(queue.groups):
        queue.groups.remove(group)
        queue.settle(group.claims[0])
    read_all_that_may_be_read(queue, pool)
    assert queue.ready()[0] == 1


def test_sampled_videos_make_sets_of_a_batch() -> None:
    queue, pool = queue_of(10, 1, baseline_sample=1.0)
    queue.batch_size = 4
    read_all_that_may_be_read(queue, pool)
    (group,) = queue.groups
    assert [one.ordinal for one in group.claims] == [0, 1, 2, 3], "one set for each worker"
    queue.groups.remove(group)
    read_all_that_may_be_read(queue, pool)
    queue.groups.clear()
    read_all_that_may_be_read(queue, pool)
    (group,) = queue.groups
    assert [one.ordinal for one in group.claims] == [8, 9], "the rest"
    queue.groups.clear()
    assert not queue


def test_a_set_goes_on_without_what_cannot_be_read() -> None:
    queue, pool = queue_of(4, 1, baseline_sample=1.0, bad=(1, 2))
    queue.batch_size = 2
    assert read_all_that_may_be_read(queue, pool) == [1]
    (group,) = queue.groups
    assert [one.ordinal for one in group.claims] == [0]
    queue.groups.clear()
    assert read_all_that_may_be_read(queue, pool) == [2]
    queue.groups.clear()
    assert not queue


def test_a_set_of_which_nothing_can_be_read_is_forgotten() -> None:
    queue, pool = queue_of(2, 1, baseline_sample=1.0, bad=(0, 1))
    queue.batch_size = 2
    assert read_all_that_may_be_read(queue, pool) == [0, 1]
    assert not queue.groups
    assert not queue


def test_a_lost_worker_leaves_the_rest_of_its_set() -> None:
    queue, pool = queue_of(3, 1, baseline_sample=1.0)
    queue.batch_size = 3
    read_all_that_may_be_read(queue, pool)
    (group,) = queue.groups
    group.read.popleft()
    assert [one.ordinal for one in queue.lose(group)] == [0]
    assert [one.ordinal for one in group.claims] == [1, 2]
    group.read.clear()
    queue.lose(group)
    assert not queue.groups


def test_what_is_dropped_is_closed() -> None:
    queue, pool = queue_of(4, 1)
    read_all_that_may_be_read(queue, pool)
    waiting: Any = queue._read[-1].video
    queue.drop()
    assert waiting.closed
    assert not queue
