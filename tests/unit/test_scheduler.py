"""Who runs: order, kinds, room, faults, and that nobody is lost, doubled or forgotten."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specvlm.scheduler import QueuedSequence, Scheduler


def with_entries(batch_size: int, *entries: QueuedSequence, memory_bytes: int | None = None) -> Scheduler:
    scheduler = Scheduler(batch_size, memory_bytes)
    for entry in entries:
        scheduler.add(entry)
    return scheduler


def named(names: str, **about: Any) -> list[QueuedSequence]:
    return [QueuedSequence(name, **about) for name in names]


def turns(scheduler: Scheduler) -> list[str]:
    """Who runs together until all are done, where everyone who is admitted together ends together."""
    found = []
    while len(scheduler):
        scheduler.admit()
        found.append("".join(map(str, scheduler.running)))
        for key in scheduler.running:
            scheduler.remove(key)
    return found


def test_they_run_in_the_order_in_which_they_came() -> None:
    scheduler = with_entries(3, *named("abcde"))
    assert scheduler.waiting == tuple("abcde")
    assert scheduler.admit() == list("abc")
    assert (scheduler.running, scheduler.waiting) == (tuple("abc"), tuple("de"))
    assert scheduler.admit() == []
    assert len(scheduler) == 5


def test_a_place_is_filled_as_soon_as_it_is_free() -> None:
    scheduler = with_entries(2, *named("abcd"))
    scheduler.admit()
    scheduler.remove("a")
    assert scheduler.admit() == ["c"]
    scheduler.remove("c")
    scheduler.remove("b")
    assert scheduler.admit() == ["d"]
    assert scheduler.running == ("d",)


def test_nothing_waits_nothing_runs() -> None:
    scheduler = Scheduler(2)
    assert (scheduler.admit(), len(scheduler), scheduler.kind) == ([], 0, None)
    assert scheduler.preempt(alone=True) == []
    scheduler.remove("nobody")


@pytest.mark.parametrize("kinds", [*itertools.product("xy", repeat=4)])
def test_only_one_kind_runs_at_a_time_and_none_is_overtaken(kinds: tuple[str, ...]) -> None:
    scheduler = with_entries(3, *(QueuedSequence(str(at), kind) for at, kind in enumerate(kinds)))
    assert scheduler.kind == kinds[0]
    expected, at = [], 0
    for _, run in itertools.groupby(kinds):
        members = "".join(str(at + step) for step in range(len(list(run))))
        expected += [members[:3], members[3:]] if len(members) > 3 else [members]
        at += len(members)
    assert turns(scheduler) == expected


def test_the_kind_is_that_of_what_runs_and_else_of_what_is_next() -> None:
    scheduler = with_entries(3, QueuedSequence("a", "x"), QueuedSequence("b", "y"))
    scheduler.admit()
    kinds = [scheduler.kind]
    scheduler.remove("a")
    assert [*kinds, scheduler.kind] == ["x", "y"]


@pytest.mark.parametrize("alone", range(4))
def test_who_runs_alone_runs_alone(alone: int) -> None:
    scheduler = with_entries(4, *(QueuedSequence(name, alone=at == alone) for at, name in enumerate("abcd")))
    parts = ["abcd"[:alone], "abcd"[alone], "abcd"[alone + 1 :]]
    assert turns(scheduler) == [part for part in parts if part]


def test_only_as_many_run_as_memory_holds() -> None:
    scheduler = with_entries(9, *named("abcd", size_bytes=40), memory_bytes=100)
    assert turns(scheduler) == ["ab", "cd"]


def test_memory_is_filled_to_the_last_byte_and_no_further() -> None:
    scheduler = with_entries(9, *named("abcd", size_bytes=50), memory_bytes=100)
    assert scheduler.admit() == ["a", "b"]
    scheduler.memory_bytes = 199
    assert scheduler.admit() == ["c"]
    scheduler.memory_bytes = None
    assert scheduler.admit() == ["d"]


def test_one_may_always_run_and_a_large_one_is_not_overtaken_by_small_ones() -> None:
    entries = [
        QueuedSequence("a", size_bytes=60),
        QueuedSequence("b", size_bytes=500),
        *named("cd", size_bytes=1),
    ]
    assert turns(with_entries(9, *entries, memory_bytes=100)) == ["a", "b", "cd"]
    assert turns(with_entries(9, *named("ab", size_bytes=5), memory_bytes=0)) == ["a", "b"]


def test_what_ran_goes_back_to_the_front_in_its_order() -> None:
    scheduler = with_entries(3, *named("abcde"))
    scheduler.admit()
    scheduler.remove("b")
    scheduler.admit()
    assert scheduler.preempt() == list("acd")
    assert (scheduler.running, scheduler.waiting) == ((), tuple("acde"))
    assert scheduler.admit() == list("acd")


def test_after_memory_ran_out_fewer_run_for_good() -> None:
    scheduler = with_entries(4, *named("abcdef"))
    scheduler.admit()
    scheduler.preempt(batch_size=2)
    assert scheduler.batch_size == 2
    scheduler.preempt(batch_size=3)  # never more again
    assert scheduler.batch_size == 2
    assert turns(scheduler) == ["ab", "cd", "ef"]
    scheduler.preempt(batch_size=0)  # and never none
    assert scheduler.batch_size == 1


def test_after_a_fault_each_runs_alone_and_the_others_go_on_together() -> None:
    scheduler = with_entries(3, *named("abcdef"))
    scheduler.admit()
    scheduler.preempt(alone=True)
    assert turns(scheduler) == ["a", "b", "c", "def"]


def test_who_runs_alone_once_stays_alone_when_memory_runs_out() -> None:
    scheduler = with_entries(2, *named("ab"))
    scheduler.admit()
    scheduler.preempt(alone=True)
    scheduler.admit()
    scheduler.preempt(batch_size=2)
    assert turns(scheduler) == ["a", "b"]


@pytest.mark.parametrize("gone", "abcd")
def test_whoever_is_removed_leaves_the_others_in_order(gone: str) -> None:
    scheduler = with_entries(2, *named("abcd"))
    scheduler.admit()
    scheduler.remove(gone)
    scheduler.remove(gone)  # nothing any more
    left = "abcd".replace(gone, "")
    assert "".join(map(str, scheduler.running + scheduler.waiting)) == left
    scheduler.admit()
    assert "".join(map(str, scheduler.running)) == left[:2]


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: nobody is lost, doubled, overtaken or run against the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(4, 100)
        self.entries: dict[int, QueuedSequence] = {}  # in the order in which they may run
        self.alone: set[int] = set()
        self.admitted: set[int] = set()
        self.most = 4
        self.number = 0

    @rule(
        kind=st.sampled_from("xxy"),
        size=st.sampled_from((0, 10, 40, 100, 150)),
        alone=st.sampled_from((0, 0, 1)),
    )
    def add(self, kind: str, size: int, alone: int) -> None:
        entry = QueuedSequence(self.number, kind, size, bool(alone))
        self.entries[self.number] = entry
        if alone:
            self.alone.add(self.number)
        self.scheduler.add(entry)
        self.number += 1

    @rule()
    def admit(self) -> None:
        before = self.scheduler.running
        admitted = self.scheduler.admit()
        assert self.scheduler.running == (*before, *admitted)
        waiting = [key for key in self.entries if key not in before]
        assert admitted == waiting[: len(admitted)]  # none is overtaken
        assert bool(self.scheduler.running) == bool(self.entries)  # somebody runs where anybody is there
        self.admitted |= set(admitted)  # type: ignore[arg-type]

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.entries)))
        self.scheduler.remove(key)
        del self.entries[key]
        self.admitted.discard(key)

    @rule(batch_size=st.sampled_from((None, None, 0, 1, 3)), alone=st.booleans())
    def preempt(self, batch_size: int | None, alone: bool) -> None:
        running = self.scheduler.running
        assert self.scheduler.preempt(batch_size=batch_size, alone=alone) == list(running)
        assert self.scheduler.running == ()
        assert self.scheduler.waiting[: len(running)] == running
        if alone:
            self.alone |= set(running)  # type: ignore[arg-type]
        if batch_size is not None:
            self.most = max(1, min(self.most, batch_size))
        self.admitted.clear()

    @rule(memory=st.sampled_from((None, 0, 60, 100, 300)))
    def measure(self, memory: int | None) -> None:
        if not self.scheduler.running:  # as `CaptionBatch` does
            self.scheduler.memory_bytes = memory

    @invariant()
    def nobody_is_lost_doubled_or_overtaken(self) -> None:
        assert (*self.scheduler.running, *self.scheduler.waiting) == tuple(self.entries)
        assert set(self.scheduler.running) == self.admitted
        assert len(self.scheduler) == len(self.entries)

    @invariant()
    def those_who_run_may_run_together(self) -> None:
        running = [self.entries[key] for key in self.scheduler.running]  # type: ignore[index]
        assert self.scheduler.batch_size == self.most
        assert len(running) <= self.most
        assert len({entry.kind for entry in running}) <= 1
        if len(running) > 1:
            assert not self.alone & {entry.key for entry in running}
            memory = self.scheduler.memory_bytes
            assert memory is None or sum(entry.size_bytes for entry in running) <= memory

    def teardown(self) -> None:
        """Nobody starves: everyone runs, one turn after the other."""
        ran = [key for turn in iter(self._turn, ()) for key in turn]
        assert ran == list(self.entries)

    def _turn(self) -> tuple[Any, ...]:
        self.scheduler.admit()
        running = self.scheduler.running
        for key in running:
            self.scheduler.remove(key)
        return running


TestAnyOrder = AnyOrder.TestCase
