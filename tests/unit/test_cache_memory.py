"""Memory of caches follows the tokens in flight, in any order of coming and going, and no row is lost on the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm import cache as caches
from specvlm.cache import KVCache, SlabShape, rounded

CPU = torch.device("cpu")
TARGET = SlabShape(1, 2, torch.float32, (CPU, CPU), 4, CPU)  # with features
DRAFT = SlabShape(1, 2, torch.float32, (CPU,))
LONG, SHORT = 20_000, 500
MIXED = [LONG, *[SHORT] * 15]


@pytest.fixture(autouse=True)
def spare(monkeypatch: pytest.MonkeyPatch) -> int:
    """Room that is allocated ahead is as much of these tiny rows as 64 MiB are of a model's of 7 billion weights."""
    token_bytes = 28 * 2 * 4 * 128 * 2
    room = (64 << 20) * TARGET.slot_bytes // token_bytes
    monkeypatch.setattr(caches, "_SPARE_BYTES", room)
    return room


def needed(shape: SlabShape, slots: Sequence[int]) -> int:
    return sum(slots) * shape.slot_bytes


@pytest.mark.parametrize("shape", [TARGET, DRAFT])
def test_a_long_video_does_not_make_short_ones_pay(shape: SlabShape) -> None:
    cache = KVCache(shape, CPU)
    cache.add(MIXED, len(MIXED))
    assert cache.size_bytes <= 1.3 * needed(shape, MIXED)


@pytest.mark.parametrize("shape", [TARGET, DRAFT])
@pytest.mark.parametrize("seed", range(6))
def test_nor_when_they_come_one_by_one_and_in_any_order(shape: SlabShape, seed: int) -> None:
    cache, draw = KVCache(shape, CPU), random.Random(seed)
    to_come = draw.sample(MIXED, len(MIXED))
    here: list[int] = []
    while to_come:
        some = [to_come.pop() for _ in range(min(len(to_come), draw.choice((1, 1, 2, 5))))]
        cache.add(some, len(MIXED))
        here += some
    assert cache.size_bytes <= 1.3 * needed(shape, here)


def test_room_that_nobody_needs_is_given_back() -> None:
    cache = KVCache(TARGET, CPU)
    cache.add(MIXED, len(MIXED))
    cache.keep([row for row in range(len(MIXED)) if row])  # the long one ends
    cache.add([4000])  # a new length makes room of what is empty
    assert cache.size_bytes <= 1.3 * needed(TARGET, [*MIXED[1:], 4000])
    cache.keep([])
    cache.release()
    assert cache.size_bytes == 0


def test_a_row_is_at_most_a_quarter_or_63_slots_longer_than_its_sequence() -> None:
    for count in range(1, 70_000, 7):
        assert count <= rounded(count) <= count + max(63, count // 4)
        assert rounded(rounded(count)) == rounded(count)


class Rows:
    """A cache, and what must be in it: every row holds its own number in all of its slots."""

    def __init__(self) -> None:
        self.cache = KVCache(TARGET, CPU)
        self.held: list[tuple[int, int]] = []  # number, slots
        self._next = 1
        self.peak: Counter[int] = Counter()  # most slots at once of each capacity

    def add(self, slots: Sequence[int], most: int) -> None:
        first = len(self.held)
        self.cache.add(slots, most)
        for row, count in enumerate(slots, first):
            parts = self.cache.copy_out(row, rounded(count))
            assert all(not part.any() for part in parts), "a sequence begins with what another one left"
            self.cache.copy_in(row, [torch.full_like(part, self._next) for part in parts])
            self.held.append((self._next, count))
            self._next += 1

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)
        self.held = [self.held[row] for row in rows]

    def check(self) -> None:
        cache = self.cache
        assert cache.rows == len(self.held)
        for row, (number, count) in enumerate(self.held):
            assert all((part == number).all() for part in cache.copy_out(row, rounded(count)))
        seen: list[int] = []
        for group in cache.groups:
            assert group.slab.taken == len(group.rows)
            where = torch.arange(cache.rows)[group.where]
            assert where.tolist() == list(group.rows)
            starts = [at * group.slab.capacity for at in range(len(group.rows))]
            assert cache.base[group.where].tolist() == starts
            numbers = [self.held[row][0] for row in group.rows]
            first = next(group.slab.parts())[0][0, 0, starts, 0, 0]
            assert first.tolist() == numbers
            seen += group.rows
        assert sorted(seen) == list(range(cache.rows))
        here: Counter[int] = Counter()
        for _, count in self.held:
            here[rounded(count)] += rounded(count)
        self.peak |= here
        assert cache.size_bytes <= (
            sum(self.peak.values()) * TARGET.slot_bytes + len(self.peak) * caches._SPARE_BYTES
        )


LENGTHS = st.sampled_from((1, 40, 64, 65, 128, 130, 300, 500, 2000))
ADDED = st.tuples(st.just("add"), st.lists(LENGTHS, min_size=1, max_size=5), st.integers(0, 24))
DROPPED = st.tuples(st.just("keep"), st.randoms(use_true_random=False), st.floats(0, 1))
OTHERS = st.tuples(st.sampled_from(("order", "release")), st.none(), st.none())


@settings(max_examples=120, deadline=None)
@given(st.lists(st.one_of(ADDED, DROPPED, OTHERS), max_size=14))
def test_what_a_row_holds_stays_with_it(
    changes: list[tuple[str, list[int] | random.Random | None, int | float | None]],
) -> None:
    rows = Rows()
    for change, what, number in changes:
        if isinstance(what, list):
            assert isinstance(number, int)
            rows.add(what, number)
        elif isinstance(what, random.Random):
            assert isinstance(number, float)
            left = what.sample(range(rows.cache.rows), round(number * rows.cache.rows))
            rows.keep(left)
        elif change == "order":
            rows.keep(rows.cache.in_order())
            assert rows.cache.in_order() == list(range(rows.cache.rows))
            assert all(isinstance(group.where, slice) for group in rows.cache.groups)
        else:
            rows.cache.release()
        rows.check()


def test_a_row_that_moves_takes_its_place_in_all_layers_along() -> None:
    rows = Rows()
    rows.add([100] * 5, 0)
    rows.keep([4, 0, 3])  # the last ones take the holes
    rows.check()
    assert [group.rows for group in rows.cache.groups] != [(0, 1, 2)]
    rows.keep(rows.cache.in_order())
    rows.check()
    rows.add([100, 400], 0)
    rows.check()
