"""Another tree in every round, none at times: the draft falls behind and catches up, and the caption stays the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specvlm.captioner import Captioner
from specvlm.choosing import Batch, FixedTree
from specvlm.config import SpeculationSettings
from specvlm.drafts import small_model
from specvlm.tree import ROOT, STATIC_PATHS, StaticShape, TreeShape, make_shape
from tests.tiny import FamilyName, Size, caption_rows, random_frames, tiny_captioner

CPU = torch.device("cpu")
TARGET = Size(layers=3, seed=1, vocabulary=320)
SHAPES = [
    make_shape(SpeculationSettings(tree="chain", depth=1), 290, CPU),
    make_shape(SpeculationSettings(tree="chain", depth=6), 290, CPU),
    make_shape(SpeculationSettings(tree="static"), 290, CPU),
    make_shape(SpeculationSettings(tree="dynamic", nodes=9, width=3), 290, CPU),
    StaticShape(STATIC_PATHS[:12], CPU, ranks=4),
]


class ByChance(FixedTree):
    """Any of the shapes, or none for some rounds."""

    def __init__(self, seed: int, plain_first: int, shapes: Sequence[TreeShape] = SHAPES) -> None:
        super().__init__(shapes[0])
        self.nodes, self.slots = max(s.nodes for s in shapes), max(s.slots for s in shapes)
        self._random, self._plain, self._shapes = random.Random(seed), plain_first, shapes
        self.chosen: list[int] = []

    def choose(self, batch: Batch) -> TreeShape:
        if not self._plain and self._random.random() < 0.4:
            self._plain = self._random.randrange(1, 7)
        if self._plain:
            self._plain -= 1
            self.chosen.append(0)
            return ROOT
        shape = self._random.choice(self._shapes)
        self.chosen.append(shape.depth)
        return shape


def captioner_with(family: FamilyName, chooser: ByChance, noise: float) -> Captioner:
    captioner = tiny_captioner(family, TARGET, TARGET)
    torch.manual_seed(5)
    for parameter in captioner.draft.model.model.parameters():  # type: ignore[union-attr]
        parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    captioner.chooser = lambda *_: chooser  # type: ignore[method-assign]
    return captioner


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("catch_up", [2, 64])
def test_the_caption_is_that_of_plain_decoding(
    family: FamilyName, options: dict[str, Any], seed: int, catch_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_model, "CATCH_UP", catch_up)
    chooser = ByChance(seed, plain_first=(0, 1, 2, 11)[seed])
    captioner = captioner_with(family, chooser, noise=0.02)
    captioner.generation_config.repetition_penalty = 1.1
    captioner.generation_config.eos_token_id = [] if seed % 2 else captioner.generation_config.eos_token_id
    videos = [captioner.prepare(random_frames(s, f), "Tell me.") for s, f in ((1, 4), (2, 2), (3, 6))]
    plain = [captioner.caption(v, speculate=False, max_new_tokens=40, **options).token_ids for v in videos]
    got = [captioner.caption(v, max_new_tokens=40, **options).token_ids for v in videos]
    assert got == plain
    rows = caption_rows(captioner, videos, max_new_tokens=40, **options)
    assert [one.token_ids for one in rows] == plain
    assert {0} < set(chooser.chosen)


def test_a_draft_that_caught_up_is_one_that_never_fell_behind() -> None:
    """A draft equal to its target is right every time, whatever rounds went without it."""
    always_full = [shape for shape in SHAPES if isinstance(shape, StaticShape)]
    chooser = ByChance(1, 9, always_full)
    captioner = captioner_with("qwen", chooser, noise=0.0)
    captioner.generation_config.eos_token_id = []
    video = captioner.prepare(random_frames(1), "Tell me.")
    stats = captioner.caption(video, prune_ratio=0.0, max_new_tokens=150).stats
    depths = [depth for depth in chooser.chosen if depth]
    assert len(depths) > 5
    assert stats.num_accepted_tokens >= sum(depths[:-1])


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("seed", range(3))
def test_drafts_that_begin_and_fall_behind_row_by_row(
    family: FamilyName, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Videos that are admitted one after the other, between rounds with guesses and without; captions of any length."""
    monkeypatch.setattr(small_model, "CATCH_UP", 2)
    captioner = captioner_with(family, ByChance(seed, plain_first=seed), noise=0.02)
    captioner.generation_config.eos_token_id = []
    videos = [captioner.prepare(random_frames(s, f), "Tell me.") for s, f in ((1, 4), (2, 2), (3, 6))]
    plain = [captioner.caption(v, speculate=False, max_new_tokens=40).token_ids for v in videos]
    ends = {text[5 * number + 4] for number, text in enumerate(plain)}
    captioner.generation_config.eos_token_id = sorted(ends)
    plain = [captioner.caption(v, speculate=False, max_new_tokens=40).token_ids for v in videos]
    many = captioner.caption_many(videos * 4, batch_size=3, max_new_tokens=40, on_error="raise")
    got = {done.index: done.caption for done in many}
    assert sorted(got) == list(range(12))
    for index, caption in got.items():
        assert caption is not None
        assert caption.token_ids == plain[index % 3], index


def test_plain_steps_between_rounds_give_an_estimate_and_change_nothing() -> None:
    """`auto` times plain steps anyway; what they take is told with each caption, and never asked for."""
    captioner = tiny_captioner("qwen", TARGET, TARGET)
    video = captioner.prepare(random_frames(1), "Tell me.")
    plain = captioner.caption(video, speculate=False, max_new_tokens=40)
    assert captioner.caption(video, tree="chain", max_new_tokens=40).stats.plain_token_s is None
    for _ in range(3):  # until all trials were made
        told = [captioner.caption(video, tree="auto", max_new_tokens=n) for n in (1, 2, 40)]
        assert [one.token_ids for one in told] == [plain.token_ids[:n] for n in (1, 2, 40)]
    assert told[0].stats.plain_token_s is None, "a caption of one token has no step to time"
    assert told[2].stats.plain_token_s > 0  # type: ignore[operator]
