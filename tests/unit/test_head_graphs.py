"""Rounds with a head as graphs, and on a device that is not there: nothing baked in, nothing asked, nothing copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specvlm import attention, decode
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.drafts import head as head_file
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadModel
from tests.emulated_graphs import (
    attend_by,
    caches_of,
    emulate,
    kept_decoders,
    run_eagerly,
    slabs_of,
    strangers,
)
from tests.fake_cuda import Case, round_that_stays
from tests.heads import config_of, fitted_head, head_captioner, target_captioner, videos_of, written
from tests.parity.test_changing_trees import ByChance
from tests.tiny import FamilyName, caption_rows, random_frames
from tests.unit.test_graphs import SHAPES, Written

NEW_TOKENS = 18
Told = list[Written]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TOLD_STEP", 8)
    monkeypatch.setattr(attention, "PREFIX_STEP", 8)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 8)


_CAPTIONERS: dict[FamilyName, Captioner] = {}


def pair(family: FamilyName) -> tuple[Captioner, list[PreparedVideo]]:
    """A captioner with a fitted head, eager when handed out, and videos; the first and the last are of one length."""
    if family not in _CAPTIONERS:
        _CAPTIONERS[family] = head_captioner(family, "pool")
    captioner = _CAPTIONERS[family]
    captioner.generation_config.repetition_penalty = None
    captioner.generation_config.eos_token_id = []
    run_eagerly(captioner)
    return captioner, [*videos_of(captioner), captioner.prepare(random_frames(9), "Hi their.")]


def told(captioner: Captioner, videos: list[PreparedVideo], **options: Any) -> Told:
    rows = caption_rows(captioner, videos, **({"max_new_tokens": NEW_TOKENS} | options))
    return [Written(row.token_ids, row.stats.acceptance_histogram) for row in rows]


@pytest.mark.parametrize(
    ("family", "tree", "rows", "temperature", "how"),
    [
        ("llava", "static", 1, 0.0, "masked"),
        ("qwen", "dynamic", 2, 0.7, "split"),
        pytest.param("qwen", "chain", 1, 0.0, "masked", marks=pytest.mark.slow),
        pytest.param("llava", "dynamic", 2, 0.0, "varlen", marks=pytest.mark.slow),
        pytest.param("llava", "dynamic", 1, 0.0, "masked", marks=pytest.mark.slow),
        pytest.param("llava", "chain", 2, 0.7, "split", marks=pytest.mark.slow),
        pytest.param("qwen", "static", 2, 0.7, "split", marks=pytest.mark.slow),
        pytest.param("qwen", "chain", 2, 0.0, "varlen", marks=pytest.mark.slow),
    ],
)
def test_graphs_write_what_eager_rounds_write(
    family: FamilyName, tree: str, rows: int, temperature: float, how: attention.RoundAttention
) -> None:
    """Two batches in one rig; the second one's rounds are graphs of the first one's."""
    captioner, (first, other, _, like_first) = pair(family)
    captioner.generation_config.repetition_penalty = 1.2 if temperature else None
    batches = [[first], [like_first]] if rows == 1 else [[first, other], [like_first, other]]
    options: dict[str, Any] = {"tree": tree, "temperature": temperature, "seed": 3}
    eager = [told(captioner, batch, **options) for batch in batches]
    emulator = emulate(captioner)
    attend_by(captioner, how)
    assert [told(captioner, batch, **options) for batch in batches * 2] == eager * 2
    assert emulator.replayed >= 6
    if temperature == 0.0:
        assert sum(eager[0][0].histogram[1:]) > 0


def test_plain_rounds_between_share_the_rig(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head catches up outside of the graphs, in the same places."""
    monkeypatch.setattr(head_file, "CATCH_UP", 2)
    captioner, videos = pair("qwen")

    def run() -> list[Told]:
        found = []
        for seed in range(2):
            chooser = ByChance(seed, plain_first=2 * seed)
            monkeypatch.setattr(captioner, "chooser", lambda *_, chosen=chooser: chosen)
            found += [told(captioner, [videos[0]]), told(captioner, videos[:2])]
        return found

    eager = run()
    emulator = emulate(captioner)
    assert run() == eager
    assert emulator.replayed > 0


@pytest.mark.parametrize(
    ("family", "tree"), [("qwen", "dynamic"), pytest.param("llava", "chain", marks=pytest.mark.slow)]
)
def test_graphs_read_nothing_that_nobody_keeps(family: FamilyName, tree: str) -> None:
    """Weights, slabs and features, tensors in their places, constants of the tree, and what the stages before gave."""
    captioner, videos = pair(family)
    for how in ("masked", "split", "varlen"):
        emulator = emulate(captioner)
        attend_by(captioner, how)  # type: ignore[arg-type]
        for _ in range(2):
            told(captioner, videos[:2], tree=tree, temperature=0.7)
        target, head = caches_of(kept_decoders(captioner)[-1])
        assert all(slab.features is not None for slab in target._slabs)
        assert all(slab.features is None for slab in head._slabs)
        assert emulator.captured
        assert strangers(captioner, emulator) == [], how


@pytest.mark.parametrize(
    "how", ["varlen", *(pytest.param(how, marks=pytest.mark.slow) for how in ("masked", "split"))]
)
def test_batches_that_shrink_and_fill_again(how: attention.RoundAttention) -> None:
    """Rows that end at different moments and others that take their slots: features go where their rows go."""
    captioner, videos = pair("qwen")
    options: dict[str, Any] = {"tree": "static", "max_new_tokens": 20}
    texts = [one.tokens for one in told(captioner, videos, **options)]
    captioner.generation_config.eos_token_id = [text[4 + 4 * number] for number, text in enumerate(texts)]
    many = videos * 3

    def run() -> dict[int, Written]:
        captions = captioner.caption_many(many, batch_size=3, on_error="raise", **options)
        return {
            done.index: Written(done.caption.token_ids, done.caption.stats.acceptance_histogram)
            for done in captions
            if done.caption is not None
        }

    eager = run()
    assert sorted(eager) == list(range(len(many)))
    assert len({len(one.tokens) for one in eager.values()}) > 1
    emulator = emulate(captioner)
    attend_by(captioner, how)
    assert [run(), run()] == [eager, eager]
    assert emulator.replayed > 0
    assert strangers(captioner, emulator) == []


def test_a_larger_video_gets_larger_slabs_and_features_move_with_them() -> None:
    captioner, videos = pair("qwen")
    short, long = videos[1], captioner.prepare(random_frames(9, 12), "What?")
    eager = [told(captioner, [video], tree="static") for video in (short, long, short)]
    emulate(captioner)
    capacities = []
    for video, expected in zip((short, long, short), eager, strict=True):
        assert told(captioner, [video], tree="static") == expected
        slabs = caches_of(kept_decoders(captioner)[-1])[0]._slabs
        for slab in slabs:
            assert slab.features is not None
            assert slab.features.shape == (slab.rows * slab.capacity, captioner.target.hidden_size)
        capacities.append(max(slab.capacity for slab in slabs))
    assert capacities[0] < capacities[1]


def test_what_a_broken_video_left_does_not_spread() -> None:
    captioner, videos = pair("llava")
    eager = told(captioner, videos[:2], tree="static")
    emulate(captioner)
    told(captioner, videos[:2], tree="static")
    for slab in slabs_of(kept_decoders(captioner)[-1]):
        for row in range(slab._written):
            for part in slab.row(row):
                with torch.inference_mode():
                    part.fill_(float("nan"))
    assert told(captioner, videos[:2], tree="static") == eager


def test_a_second_head_of_a_target_costs_it_nothing() -> None:
    """The first one makes it keep features; what it keeps then stays."""
    target = target_captioner("qwen").target
    plain = target.slot_bytes
    sizes = []
    for seed in range(2):
        HeadDraft(HeadModel.fresh(target, config_of(target), seed).eval(), target)
        sizes.append(target.slot_bytes)
    assert sizes == [plain + 4 * target.hidden_size] * 2


def test_two_heads_of_one_target_do_not_mix() -> None:
    """They share the target, and neither replays the other's graphs."""
    captioner, videos = pair("qwen")
    target, first = captioner.target, captioner.draft
    second = HeadDraft(fitted_head(target, "qwen"), target)
    fresh = HeadDraft(HeadModel.fresh(target, config_of(target), 1).eval(), target)

    def run() -> list[Told]:
        found = []
        for draft in (first, second, fresh, first, second, fresh):
            captioner.draft = draft
            found.append(told(captioner, videos[:1], tree="chain"))
        captioner.draft = first
        return found

    eager = run()
    assert len({tuple(one) for one in eager}) == 3
    emulator = emulate(captioner)
    assert run() == eager
    assert emulator.replayed > 3
    assert all(one[0].tokens == written(captioner, videos[0], max_new_tokens=NEW_TOKENS) for one in eager)


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "root"])
@pytest.mark.parametrize("how", ["masked", "split", "varlen"])
@pytest.mark.parametrize(
    ("family", "dtype", "exact", "trimmed"),
    [("qwen", torch.bfloat16, True, True), ("llava", torch.float32, False, False)],
)
def test_a_round_on_cuda_stays_there(
    shape: str,
    how: attention.RoundAttention,
    family: FamilyName,
    dtype: torch.dtype,
    exact: bool,
    trimmed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No operation touches the host's memory or asks for a value, and none copies the cache or its features."""
    round_that_stays(Case(family, SHAPES[shape], how, dtype, exact, trimmed, headed=True), monkeypatch)
