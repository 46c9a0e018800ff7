"""Slabs: what is written, what is seen, what a commit moves, and where rows go when others leave."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specvlm.batch import CaptionBatch
from specvlm.cache import KVCache, PrefillPart, Slab, SlabShape, rounded
from tests.tiny import Size, random_frames, tiny_captioner

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """As every decoder works."""
    with torch.inference_mode():
        yield


def small_cache(*slots: int, features: int = 0) -> KVCache:
    """Two layers; a row for each number."""
    shape = SlabShape(2, 4, torch.float32, (CPU, CPU), features, CPU)
    cache = KVCache(shape, CPU)
    cache.add(slots)
    return cache


def states(rows: int, count: int, start: float) -> torch.Tensor:
    """[rows, 2, count, 4] of distinct numbers."""
    return start + torch.arange(rows * 2 * count * 4, dtype=torch.float32).reshape(rows, 2, count, 4)


def see_all(cache: KVCache, slots: torch.Tensor, visible: int) -> None:
    """Aim at slots of all rows, which see their first ones."""
    reads = [(group.slab, slice(0, len(group.rows)), visible) for group in cache.groups]
    cache.aim_nodes(slots, reads)


def test_a_packed_prefill_writes_each_sequence_into_its_row() -> None:
    """Rows of two slabs; sequences that begin see what they write, all of it in order."""
    cache = small_cache(10, 100, 20)
    cache.aim_prefill([PrefillPart(2, 0, 3), PrefillPart(1, 0, 2), PrefillPart(0, 0, 1)], CPU)
    written = states(1, 6, 1)
    for layer in (0, 1):
        (keys,), (values,) = cache.update(written, -written, layer)
        assert torch.equal(keys, written)
        assert torch.equal(values, -written)
    for row, first, count in ((2, 0, 3), (1, 3, 2), (0, 5, 1)):
        kept = cache.copy_out(row, count)[0]  # [layers, 2, count, kv heads, d]
        for layer in (0, 1):
            assert torch.equal(kept[layer, 0].transpose(0, 1), written[0, :, first : first + count])
            assert torch.equal(kept[layer, 1], -kept[layer, 0])


def test_a_prefill_that_continues_a_row_sees_what_is_there() -> None:
    cache = small_cache(10, 10)
    cache.aim_prefill([PrefillPart(1, 0, 3)], CPU)
    cache.update(states(1, 3, 1), states(1, 3, 100), 1)
    cache.aim_prefill([PrefillPart(1, 3, 2), PrefillPart(0, 0, 1)], CPU)
    more = states(1, 3, 50)
    (keys, other), _ = cache.update(more, more, 1)
    assert torch.equal(keys, torch.cat((states(1, 3, 1), more[:, :, :2]), dim=2))
    assert torch.equal(other, more[:, :, 2:])


def test_what_is_copied_out_of_a_row_can_begin_another() -> None:
    cache, other = small_cache(10, 10), small_cache(300)
    cache.aim_prefill([PrefillPart(1, 0, 4)], CPU)
    for layer in (0, 1):
        cache.update(states(1, 4, layer), states(1, 4, 100 + layer), layer)
    kept = cache.copy_out(1, 3)
    cache.zero(torch.arange(4).expand(2, 4))
    other.copy_in(0, kept)
    for got, expected in zip(other.copy_out(0, 3), kept, strict=True):
        assert torch.equal(got, expected)
        assert got.abs().sum() > 0


@pytest.mark.parametrize("slots", [(6, 6), (6, 100)])
def test_commit_moves_paths_row_by_row_as_if_read_at_once(slots: tuple[int, int]) -> None:
    """In one slab, and in two."""
    cache = small_cache(*slots)
    written = states(2, 6, 1)
    see_all(cache, torch.arange(6).expand(2, 6), 6)
    for layer in (0, 1):
        cache.update(written, -written, layer)
    cache.commit(torch.tensor([[2, 4, 5], [2, 1, 3]]), torch.tensor([[2, 3, 4], [1, 2, 3]]))
    see_all(cache, torch.tensor([[9], [9]]), 6)
    for layer in (0, 1):
        keys, values = cache.update(states(2, 1, 0), states(2, 1, 0), layer)
        for got, source in ((torch.cat(keys), written), (torch.cat(values), -written)):
            assert torch.equal(got[0], source[0][:, [0, 1, 2, 4, 5, 5]])
            assert torch.equal(got[1], source[1][:, [0, 2, 1, 3, 4, 5]])


def test_features_are_kept_beside_keys_and_move_with_them() -> None:
    cache = small_cache(6, 100, 6, features=3)
    told = torch.arange(3 * 4 * 3, dtype=torch.float32).reshape(3, 4, 3)
    see_all(cache, torch.arange(4).expand(3, 4), 4)
    cache.keep_features(told)
    slots = torch.tensor([[0, 3], [1, 2], [2, 2]])
    expected = torch.stack([told[row, at] for row, at in enumerate(slots)])
    assert torch.equal(cache.features(slots), expected)
    cache.commit(torch.tensor([[3], [3], [3]]), torch.tensor([[0], [1], [2]]))
    assert torch.equal(cache.features(torch.tensor([[0], [1], [2]]))[:, 0], told[:, 3])
    assert torch.equal(cache.row_features(1, 2), torch.stack((told[1, 0], told[1, 3]))[None])
    cache.keep([2, 1])
    assert torch.equal(cache.features(torch.tensor([[2], [1]]))[:, 0], told[[2, 1], 3])


def test_zeroing_spares_other_slots_and_ends_at_the_capacity() -> None:
    cache = small_cache(64, 64)
    for slab in cache._slabs:
        for part, _ in slab.parts():
            part.fill_(1.0)
    cache.zero(torch.tensor([[5, 6], [62, 90]]))
    for row, gone in ((0, [5, 6]), (1, [62, 63])):
        for part in cache.copy_out(row, 64):
            assert (part == 0).all(dim=(0, 1, 3, 4)).nonzero().flatten().tolist() == gone


def test_a_row_refuses_more_than_it_holds() -> None:
    with pytest.raises(ValueError, match="a row of 64 slots cannot hold 66 tokens"):
        small_cache(10).aim_prefill([PrefillPart(0, 60, 6)], CPU)


def test_size_is_what_the_sequences_need() -> None:
    """Of two layers, keys and values, two heads of four floats: 128 bytes a slot, at most a quarter more of them."""
    assert SlabShape(2, 4, torch.float32, (CPU, CPU)).slot_bytes == 128
    assert SlabShape(2, 4, torch.float32, (CPU, CPU), 3, CPU).slot_bytes == 140
    assert small_cache(64, 64).size_bytes == 2 * 64 * 128
    assert small_cache(64, features=3).size_bytes == 64 * 140
    for slots in (*range(1, 3000), 20_000, 123_457):
        assert slots <= rounded(slots) <= slots + max(63, slots // 4)
    many = [20_000, *[500] * 15]
    assert small_cache(*many).size_bytes <= 1.3 * 128 * sum(many)


class Filled:
    """A cache whose every row holds a number of its own in all of its slots."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.cache = small_cache(features=3)
        self.marks: list[int] = []
        self.slots: list[int] = []

    def add(self) -> None:
        new = [self.dice.choice((10, 60, 70, 130, 140, 500)) for _ in range(self.dice.randint(1, 4))]
        self.cache.add(new, self.dice.choice((0, 8)))
        for slots in new:
            row = len(self.marks)
            assert all((part == 0).all() for part in self.cache.copy_out(row, slots)), "not what others left"
            self.marks.append(self.dice.randint(1, 10**6))
            self.slots.append(slots)
            slab, at = self.cache._places[row]
            for part in slab.row(at):
                part.fill_(float(self.marks[-1]))

    def keep(self) -> None:
        rows = [row for row in range(len(self.marks)) if self.dice.random() < 0.6]
        if self.dice.random() < 0.5:
            self.dice.shuffle(rows)
        self.cache.keep(rows)
        self.marks, self.slots = [self.marks[row] for row in rows], [self.slots[row] for row in rows]
        if self.dice.random() < 0.5:
            order = self.cache.in_order()
            self.cache.keep(order)
            self.marks, self.slots = [self.marks[row] for row in order], [self.slots[row] for row in order]
            assert all(isinstance(group.where, slice) for group in self.cache.groups)

    def check(self) -> None:
        cache = self.cache
        assert cache.rows == len(self.marks)
        for row, (mark, slots) in enumerate(zip(self.marks, self.slots, strict=True)):
            assert all((part == mark).all() for part in cache.copy_out(row, slots))
        told = torch.arange(cache.rows)
        assert sorted(row for group in cache.groups for row in group.rows) == told.tolist()
        for group in cache.groups:
            assert group.of(told).tolist() == list(group.rows)
            assert len(group.rows) == group.slab.taken <= group.slab.rows
            assert group.of(cache.base).tolist() == [n * group.slab.capacity for n in range(len(group.rows))]


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_come_and_go_leave_the_others_as_they_are(seed: int) -> None:
    filled = Filled(seed)
    for _ in range(25):
        filled.add() if filled.dice.random() < 0.5 else filled.keep()
        filled.check()


def test_a_layout_means_the_same_addresses() -> None:
    """Rows that leave and others that take their places: what graphs are keyed by changes with what they read."""
    cache = small_cache(10, 10, 10)
    known: dict[Any, list[list[int]]] = {}
    dice = random.Random(0)
    for _ in range(60):
        cache.keep(dice.sample(range(cache.rows), dice.randint(0, cache.rows)))
        cache.add([dice.choice((10, 100)) for _ in range(dice.randint(1, 3))], 8)
        tables = [table.tolist() for table in cache.tables.tensors]
        assert known.setdefault(cache.layout, tables) == tables
    assert len(known) < 61, "some layout came again"


def test_no_two_slabs_have_one_number() -> None:
    shape = SlabShape(1, 2, torch.float32, (CPU,))
    assert len({Slab(shape, 1, 64).number for _ in range(5)}) == 5


def test_a_cache_without_sequences_can_give_its_memory_back() -> None:
    cache = small_cache(10, 100)
    cache.keep([])
    assert cache.size_bytes > 0
    cache.release()
    assert cache.size_bytes == 0


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
def test_a_rewound_cache_equals_one_that_never_advanced(tree: str) -> None:
    """After rounds with refused guesses, committed keys and values are those of plain decoding."""
    captioner = tiny_captioner("qwen", Size(layers=2, seed=1), Size(layers=2, seed=9))
    video = captioner.prepare(random_frames(2), "Tell me.")
    kept = []
    for speculate in (False, True):
        kind = captioner.kind(speculate, {"tree": tree, "prune_ratio": 0.0, "max_new_tokens": 20})  # type: ignore[typeddict-item]
        batch = CaptionBatch(captioner, 1)
        batch.add(0, video, kind)
        while not batch.step():
            assert batch._decoder is not None
            text, cache = list(batch.text_of(0)), batch._decoder._verifier.cache
            kept.append((text, cache.copy_out(0, video.inputs.prompt_tokens + len(text) - 1)))
        batch.close()
    rounds = sum(len(text) > 1 for text, _ in kept)
    assert rounds > 20
    longest = max(kept, key=lambda one: len(one[0]))
    for text, parts in kept:  # the last token is never run
        assert text == longest[0][: len(text)]
        for ours, others in zip(parts, longest[1], strict=True):
            torch.testing.assert_close(ours, others[:, :, : ours.shape[2]], rtol=1e-4, atol=1e-5)
