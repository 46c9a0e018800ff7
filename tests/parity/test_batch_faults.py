"""Faults that other servers shipped with batches and speculation: here each one is put in, and must be seen.

Every test makes the same captions twice: by the sound decoder, which writes what stock `generate()` writes about each
video alone and guesses as well as alone, and with one fault put into the smallest piece that can have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from specvlm import attention, decode, model
from specvlm.attention import ragged_mask
from specvlm.batch import CaptionBatch
from specvlm.cache import KVCache, SlabRows
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.choosing import Batch, FixedTree
from specvlm.drafts.head import _HeadProposer
from specvlm.drafts.small_model import SmallModelDraft, _SmallModelProposer
from specvlm.model import Lengths, Nodes, TextModel, VideoLM
from specvlm.prefill import Prompt
from specvlm.tree import ROOT, Guesses, StaticShape, TreeShape
from specvlm.verify import Accepted, accept
from tests.emulated_graphs import emulate
from tests.heads import head_captioner, videos_of
from tests.parity.test_stock import captioner_for
from tests.tiny import FamilyName, random_frames, stock_ids

CPU = torch.device("cpu")
NEW_TOKENS = 20
# Of several lengths, so that rows are padded, and a slab of another size takes part.
VIDEOS = (
    (1, 2, "Hi there."),
    (2, 6, "Look at <video> and tell."),
    (3, 4, "What?"),
    (4, 2, "Before it all.<video>"),
    (5, 4, "Tell all of it, one thing after the other. " * 3),
    (6, 2, "Go on."),
    (7, 6, "Hi there."),
    (8, 4, "And now?"),
)


class Told(NamedTuple):
    """What became of one video."""

    tokens: tuple[int, ...]
    histogram: tuple[int, ...]


_RIGHT: dict[Any, list[Told]] = {}  # by captioner, ends, videos and options


def failed(batch: CaptionBatch, error: Exception) -> Any:
    """In place of trying again, one by one, which would hide what is wrong with a batch."""
    raise error


class Case:
    """Videos, and what is right for each of them."""

    def __init__(
        self, captioner: Captioner, videos: Sequence[PreparedVideo], batch_size: int = 3, **options: Any
    ) -> None:
        self.captioner, self.videos, self.batch_size = captioner, videos, batch_size
        self.options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS} | options
        captioner._decoders.clear()
        ends = tuple(captioner.generation_config.eos_token_id)
        key = (captioner, ends, *map(id, videos), *sorted(self.options.items()))
        if key not in _RIGHT:
            _RIGHT[key] = [self._alone(video) for video in videos]
        self.right = _RIGHT[key]

    def _alone(self, video: PreparedVideo) -> Told:
        """What stock writes about one video, and how its guesses go when no other video is there."""
        alone = self.captioner.caption(video, **self.options)
        stock = stock_ids(self.captioner.target.model, video.inputs.tensors, self.options["max_new_tokens"])
        assert alone.token_ids == stock
        return Told(stock, alone.stats.acceptance_histogram)

    def told(self) -> list[Told]:
        """What a batch gives for each of them."""
        self.captioner._decoders.clear()
        found = {}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(CaptionBatch, "_after_fault", failed)
            for done in self.captioner.caption_many(self.videos, batch_size=self.batch_size, **self.options):
                assert done.caption is not None, done.error
                found[done.index] = Told(done.caption.token_ids, done.caption.stats.acceptance_histogram)
        self.captioner._decoders.clear()
        return [found[number] for number in range(len(self.videos))]

    def writes_stock(self) -> bool:
        """Whether every caption is stock's."""
        return [one.tokens for one in self.told()] == [one.tokens for one in self.right]

    def guesses_as_alone(self) -> bool:
        """Whether every caption is stock's, by rounds that accept what they accept when no other video is there."""
        return self.told() == self.right

    def accepted(self) -> int:
        """Guesses that are accepted in all captions together; each caption is stock's."""
        told = self.told()
        assert [one.tokens for one in told] == [one.tokens for one in self.right]
        return sum(count * times for one in told for count, times in enumerate(one.histogram))


@cache
def videos(family: FamilyName) -> list[PreparedVideo]:
    captioner = captioner_for(family, "same")
    return [captioner.prepare(random_frames(seed, frames), prompt) for seed, frames, prompt in VIDEOS]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of qwen end at different lengths: rows are freed, moved and filled again while others run."""
    for draft in ("noisy", "same"):
        monkeypatch.setattr(captioner_for("qwen", draft).generation_config, "eos_token_id", [75, 152, 255])


def noisy(**options: Any) -> Case:
    return Case(captioner_for("qwen", "noisy"), videos("qwen"), **{"tree": "static", **options})


@pytest.mark.usefixtures("ends")
def test_1_rejected_positions_are_zeroed_instead_of_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy(batch_size=4)
    assert case.writes_stock()

    def unmasked(
        lengths: torch.Tensor,
        sees: torch.Tensor,
        visible: int,
        groups: int,
        dtype: torch.dtype,
        prefix: int = 0,
    ) -> torch.Tensor:
        mask = ragged_mask(lengths, sees, visible, groups, dtype, prefix)
        after = torch.arange(prefix, visible) >= (lengths + sees.shape[-1])[:, None]
        return mask.masked_fill(after[:, None, None], 0.0)

    sound = decode._Verifier.commit

    def commit(self: Any, shape: TreeShape, accepted: Accepted, step: torch.Tensor) -> None:
        sound(self, shape, accepted, step)
        self.forget(shape, step + accepted.guessed + 1)

    monkeypatch.setattr(model, "ragged_mask", unmasked)
    monkeypatch.setattr(decode._Verifier, "commit", commit)
    assert not case.writes_stock()


@pytest.mark.usefixtures("ends")
def test_2_the_rope_offset_is_not_rewound_after_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy()
    assert case.writes_stock()
    sound = decode._Verifier.commit

    def commit(self: Any, shape: TreeShape, accepted: Accepted, step: torch.Tensor) -> None:
        sound(self, shape, accepted, step)
        self._positions = self._positions + shape.depth - accepted.guessed

    monkeypatch.setattr(decode._Verifier, "commit", commit)
    assert not case.writes_stock()


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize("stale", ["_positions", "_lengths"])
def test_3_positions_or_lengths_of_a_moved_row_are_stale(stale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy(batch_size=len(VIDEOS))
    assert case.writes_stock()
    sound = decode._Verifier.keep

    def keep(self: Any, rows: Sequence[int]) -> None:
        before = getattr(self, stale)
        sound(self, rows)
        setattr(self, stale, before[: len(rows)])

    monkeypatch.setattr(decode._Verifier, "keep", keep)
    assert not case.writes_stock()


class NowAndThen(FixedTree):
    """Guesses in every third round only, so that the draft begins with some rows while it knows others."""

    def __init__(self, depth: int) -> None:
        super().__init__(StaticShape(tuple((0,) * (level + 1) for level in range(depth)), CPU))
        self._round = 0

    def choose(self, batch: Batch) -> TreeShape:
        self._round += 1
        return ROOT if self._round % 3 else super().choose(batch)


@pytest.mark.usefixtures("ends")
def test_4_rows_that_had_no_guesses_yet_read_another_rows_state(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = captioner_for("qwen", "same")
    monkeypatch.setattr(captioner, "chooser", lambda *_: NowAndThen(3))
    case = Case(captioner, videos("qwen"), 4, tree="chain", prune_ratio=0.0)

    def only_right_guesses() -> bool:
        """The draft is the target: every guess is accepted but those beyond a caption's end."""
        told = case.told()
        assert [one.tokens for one in told] == [one.tokens for one in case.right]
        return all(sum(one.histogram[:-1]) <= 1 for one in told)

    assert only_right_guesses()
    sound = _SmallModelProposer.keep

    def keep(self: _SmallModelProposer, rows: Sequence[int]) -> None:
        if len(rows) < self.rows:  # else rows only change places
            sound(self, rows)

    monkeypatch.setattr(_SmallModelProposer, "keep", keep)
    assert not only_right_guesses()


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize("depth", [1, 4])
def test_5_a_rejection_is_applied_one_step_late(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy(tree="chain", depth=depth)
    assert case.writes_stock()
    before: list[torch.Tensor] = []

    def late(guesses: Guesses, choices: torch.Tensor, depth: int) -> Accepted:
        accepted = accept(guesses, choices, depth)
        before.append(accepted.guessed)
        old = before[-2:][0]
        return accepted._replace(guessed=old) if len(old) == len(accepted.guessed) else accepted

    monkeypatch.setattr("specvlm.decode.accept", late)
    assert not case.writes_stock()


@pytest.mark.usefixtures("ends")
def test_6_a_freed_row_is_used_again_while_its_old_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy()
    assert case.writes_stock()
    sound, sound_add = KVCache.keep, KVCache.add

    def keep(self: KVCache, rows: Sequence[int]) -> None:
        before = self.base
        sound(self, rows)
        self.base = before[list(rows)]

    def add(self: KVCache, slots: Sequence[int], most_rows: int = 0) -> None:
        before = self.base
        sound_add(self, slots, most_rows)
        self.base = torch.cat((before, self.base[len(before) :]))

    monkeypatch.setattr(KVCache, "keep", keep)
    monkeypatch.setattr(KVCache, "add", add)
    assert not case.writes_stock()


def test_7_a_graph_is_replayed_with_other_strides_than_it_was_captured_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captioner = captioner_for("qwen", "noisy")
    monkeypatch.setattr(captioner.generation_config, "eos_token_id", [])
    case = Case(captioner, videos("qwen")[:2], 2, tree="chain", depth=3, max_new_tokens=40)
    target, draft = case.captioner.target, case.captioner.draft
    assert isinstance(draft, SmallModelDraft)
    for home, name in ((target, "captures"), (target, "told_step"), (case.captioner, "make_capture")):
        monkeypatch.setattr(home, name, getattr(home, name))  # to be put back
    monkeypatch.setattr(decode, "TOLD_STEP", 16)
    monkeypatch.setattr(draft.model, "told_step", 16)
    emulator = emulate(case.captioner)
    assert case.writes_stock()
    assert emulator.replayed
    # The key of a graph leaves out how many slots of a row are read.
    monkeypatch.setattr(TextModel, "host_state", lambda _, lengths, cache: cache.layout)
    assert not case.writes_stock()


def test_8_hidden_states_are_not_expanded_to_rows_that_had_no_guesses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captioner = head_captioner("qwen")
    case = Case(captioner, videos_of(captioner) * 2, 3, tree="chain", depth=2)
    assert case.guesses_as_alone()
    sound = _HeadProposer.commit

    def commit(self: _HeadProposer, *round_of: Any) -> None:
        sound(self, *round_of)
        self._root.copy_(self._root[:1].expand_as(self._root))

    monkeypatch.setattr(_HeadProposer, "commit", commit)
    assert not case.guesses_as_alone()
    assert case.writes_stock()  # a wrong guess is only refused


@pytest.mark.usefixtures("ends")
def test_9_the_position_of_new_tokens_is_lost_when_rows_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy()
    assert case.writes_stock()
    sound = decode._Verifier.add

    def add(self: Any, prompts: Sequence[Prompt], slots: int, most_rows: int) -> None:
        sound(self, prompts, slots, most_rows)
        self._positions[: -len(prompts)] = self._lengths[: -len(prompts)]

    monkeypatch.setattr(decode._Verifier, "add", add)
    assert not case.writes_stock()


@pytest.mark.parametrize("border", ["into the video", "out of the video"])
def test_10_positions_jump_backwards_at_the_border_of_video_and_text(
    border: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = noisy(tree="chain")
    assert case.writes_stock()
    sound = VideoLM.positions

    def positions(self: VideoLM, inputs: Any) -> torch.Tensor:
        found = sound(self, inputs)
        where = inputs.video_at
        at = int(where[0]) if border == "into the video" else int(where[-1]) + 1
        found = found.clone()
        found[:, at:] -= 2
        return found

    for video in case.videos:  # the sound ones: no text is before any text that it follows
        is_text = torch.ones(video.inputs.prompt_tokens, dtype=torch.bool)
        is_text[video.inputs.video_at] = False
        text = sound(case.captioner.target, video.inputs)[:, is_text]
        assert (text.diff() > 0).all()
    monkeypatch.setattr(VideoLM, "positions", positions)
    assert not case.writes_stock()


@pytest.mark.usefixtures("ends")
def test_11_the_batch_is_clamped_to_the_row_that_accepts_least(monkeypatch: pytest.MonkeyPatch) -> None:
    case = noisy(tree="chain", depth=5, batch_size=8)
    assert case.guesses_as_alone()
    alone = case.accepted()

    def clamped(guesses: Guesses, choices: torch.Tensor, depth: int) -> Accepted:
        accepted = accept(guesses, choices, depth)
        return accepted._replace(guessed=accepted.guessed.min().expand_as(accepted.guessed))

    monkeypatch.setattr("specvlm.decode.accept", clamped)
    assert not case.guesses_as_alone()
    assert case.accepted() < 0.8 * alone  # though the captions are the same


@torch.inference_mode()
def round_of(target: VideoLM, lengths: Sequence[int]) -> torch.Tensor:
    """Hidden states [B, 3, hidden] of a round of three nodes after rows of so many tokens, alike for a length."""
    sequences = [torch.Generator().manual_seed(count) for count in lengths]
    cache, hidden = target.new_cache(*(max(lengths) + 8 for _ in lengths)), target.hidden_size
    for row, (count, generator) in enumerate(zip(lengths, sequences, strict=True)):
        for part, at in cache._places[row].slab.parts():
            first = row * cache._places[row].slab.capacity
            shape = [*part.shape[:at], count, *part.shape[at + 1 :]]
            part.narrow(at, first, count).copy_(torch.randn(shape, generator=generator))
    slots = torch.tensor(lengths)
    sees = torch.ones(3, 3, dtype=torch.bool).tril().expand(len(lengths), -1, -1)
    nodes = Nodes(
        torch.zeros(len(lengths), 3, dtype=torch.long),
        (slots[:, None] + torch.arange(3))[None],
        slots[:, None] + torch.arange(3),
        sees,
    )
    embeds = torch.randn(1, 3, hidden, generator=torch.Generator().manual_seed(0))
    known = Lengths(slots, tuple(lengths), tuple(lengths))
    return target.run_nodes(embeds.expand(len(lengths), -1, -1), nodes, cache, known, 3)


def test_12_a_rows_numbers_depend_on_the_lengths_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    target = captioner_for("llava", "same").target
    monkeypatch.setattr(target, "round_attention", "split")
    monkeypatch.setattr(attention, "PREFIX_STEP", 16)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 32)

    def same() -> bool:
        first = round_of(target, [150, 151])[0]
        return all(torch.equal(round_of(target, [150, other])[0], first) for other in (40, 90, 149))

    assert same()

    def at_the_shortest(
        self: TextModel, group: SlabRows, nodes: Nodes, lengths: Lengths, own: int
    ) -> list[model._Read]:
        least = min(lengths.least)
        everyone = lengths._replace(least=(least,) * len(lengths.least))
        read = partial(self._read, nodes=nodes, lengths=everyone, own=own)
        return [
            read(group, (row,), slice(row, row + 1), slice(at, at + 1)) for at, row in enumerate(group.rows)
        ]

    monkeypatch.setattr(TextModel, "_reads", at_the_shortest)
    assert not same()


@pytest.mark.usefixtures("ends")
def test_the_batches_of_these_tests_free_move_and_fill_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[bool] = []
    sizes: set[int] = set()
    sound, step = KVCache.keep, CaptionBatch.step

    def keep(self: KVCache, rows: Sequence[int]) -> None:
        before = list(self._places)
        sound(self, rows)
        moved.extend(place != before[row] for place, row in zip(self._places, rows, strict=True))
        sizes.update(group.slab.capacity for group in self._groups)

    def stepped(self: CaptionBatch) -> Any:
        done = step(self)
        assert self.running <= self.batch_size
        return done

    monkeypatch.setattr(KVCache, "keep", keep)
    monkeypatch.setattr(CaptionBatch, "step", stepped)
    case = noisy()
    assert len({len(one.tokens) for one in case.right}) > 4
    assert case.writes_stock()
    assert any(moved)
    assert len(sizes) > 1
