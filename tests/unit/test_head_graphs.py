"""Rounds with a head as graphs, and on a device that is not there: nothing baked in, nothing asked, nothing copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specvlm import attention, graphs
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.drafts import head as head_file
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadModel
from tests.emulated_graphs import FORBIDDEN, Emulator, address, draft_text, emulate, held_tensors
from tests.fake_cuda import Case, run_round
from tests.heads import config_of, fitted_head, head_captioner, target_captioner, videos_of, written
from tests.parity.test_changing_trees import ByChance
from tests.tiny import FamilyName, random_frames
from tests.unit.test_graphs import SHAPES, Written

NEW_TOKENS = 18
Told = list[Written]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "STEP", 8)
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
    for model in models(captioner):
        model.graphs, model.round_attention = None, "masked"
    return captioner, [*videos_of(captioner), captioner.prepare(random_frames(9), "Hi their.")]


def models(captioner: Captioner) -> tuple[Any, Any]:
    assert captioner.draft is not None
    return captioner.target, draft_text(captioner.draft)


def told(captioner: Captioner, videos: list[PreparedVideo], **options: Any) -> Told:
    rows = captioner.caption_rows(videos, **({"max_new_tokens": NEW_TOKENS} | options))
    return [Written(row.token_ids, row.stats.acceptance_histogram) for row in rows]


@pytest.mark.parametrize(
    ("family", "tree", "rows", "temperature", "how"),
    [
        ("qwen", "chain", 1, 0.0, "masked"),
        ("llava", "static", 1, 0.0, "masked"),
        ("llava", "dynamic", 1, 0.0, "masked"),
        ("llava", "chain", 2, 0.7, "split"),
        ("qwen", "static", 2, 0.7, "split"),
        ("qwen", "dynamic", 2, 0.7, "split"),
    ],
)
def test_graphs_write_what_eager_rounds_write(
    family: FamilyName, tree: str, rows: int, temperature: float, how: attention.RoundAttention
) -> None:
    """Two jobs in one rig; the second one's rounds are graphs of the first one's."""
    captioner, (first, other, _, like_first) = pair(family)
    captioner.generation_config.repetition_penalty = 1.2 if temperature else None
    jobs = [[first], [like_first]] if rows == 1 else [[first, other], [other, like_first]]
    options: dict[str, Any] = {"tree": tree, "temperature": temperature}
    eager = [told(captioner, job, seed=seed, **options) for seed, job in enumerate(jobs)]
    emulator = emulate(captioner)
    for model in models(captioner):
        model.round_attention = how
    assert [told(captioner, job, seed=seed, **options) for seed, job in enumerate(jobs)] == eager
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


@pytest.mark.parametrize(("family", "tree"), [("qwen", "dynamic"), ("llava", "chain")])
def test_graphs_read_nothing_that_nobody_keeps(family: FamilyName, tree: str) -> None:
    """Weights, slabs and features, tensors in their places, constants of the tree, and what the stages before gave."""
    captioner, videos = pair(family)
    emulator = emulate(captioner)
    told(captioner, videos[:1], tree=tree, temperature=0.7)
    assert isinstance(captioner.draft, HeadDraft)
    rig = captioner.target.graphs._kept  # type: ignore[union-attr]
    small = captioner.draft.text.graphs._kept  # type: ignore[union-attr]
    assert rig is not None
    assert small is not None
    assert rig.slabs.features is not None
    assert small.slabs.features is None
    modules = (captioner.target.model, captioner.draft.head)
    kept = [
        *rig.slabs.by_device.values(),
        *small.slabs.by_device.values(),
        rig.slabs.features,
        *rig.rig._tensors.values(),
        *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers())),
        *held_tensors([key[0] for key in rig.rig._rounds]),  # type: ignore[index]
    ]
    known = {address(tensor) for tensor in kept}
    assert emulator.captured
    for number, recorder in enumerate(emulator.captured):
        before = emulator.captured[number - number % 3 : number]
        mine = known | {made for earlier in before for made in earlier.made}
        assert not {where: t.shape for where, t in recorder.read.items() if where not in mine}, number


def test_a_larger_video_gets_larger_slabs_and_features_move_with_them() -> None:
    captioner, videos = pair("qwen")
    short, long = videos[1], captioner.prepare(random_frames(9, 12), "What?")
    eager = [told(captioner, [video], tree="static") for video in (short, long, short)]
    emulate(captioner)
    seen = []
    for video, expected in zip((short, long, short), eager, strict=True):
        assert told(captioner, [video], tree="static") == expected
        slabs = captioner.target.graphs._kept.slabs  # type: ignore[union-attr]
        assert slabs.features.shape == (slabs.capacity, captioner.target.hidden_size)
        seen.append(slabs)
    assert seen[0] is not seen[1]
    assert seen[1] is seen[2]


def test_what_a_broken_video_left_does_not_spread() -> None:
    captioner, videos = pair("llava")
    eager = told(captioner, videos[:2], tree="static")
    emulate(captioner)
    told(captioner, videos[:2], tree="static")
    for model in models(captioner):
        slabs = model.graphs._kept.slabs
        for slab in (*slabs.by_device.values(), slabs.features):
            if slab is not None:
                with torch.inference_mode():
                    slab.fill_(float("nan"))
    assert told(captioner, videos[:2], tree="static") == eager


def test_only_the_first_head_of_a_target_costs_it_its_slabs() -> None:
    target = target_captioner("qwen").target
    before = target.graphs = graphs.Graphs(lambda _: Emulator())
    made = []
    for seed in range(2):
        HeadDraft(HeadModel.fresh(target, config_of(target), seed).eval(), target)
        made.append(target.graphs)
    assert made[0] is not before
    assert made[1] is made[0]


def test_two_heads_of_one_target_do_not_mix() -> None:
    """They share the target's slabs and rig, and neither replays the other's graphs."""
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
    for draft in (second, fresh):
        captioner.draft = draft
        draft.text.graphs = graphs.Graphs(lambda _: Emulator())
    captioner.draft = first
    assert run() == eager
    assert emulator.replayed > 3
    assert all(one[0].tokens == written(captioner, videos[0], max_new_tokens=NEW_TOKENS) for one in eager)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "root"])
@pytest.mark.parametrize("how", ["masked", "split"])
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
    flash = dtype == torch.bfloat16
    monkeypatch.setattr(attention, "_cuda_kernels", lambda *_: attention._Kernels(flash, True))
    seen = run_round(Case(family, SHAPES[shape], how, dtype, exact, trimmed, headed=True), 4000)
    assert seen.elsewhere == set()
    assert [name for name in seen.names if any(word in name for word in FORBIDDEN)] == []
    if how == "split":  # the mask of `masked` is as long as the prompt
        assert (
            seen.largest < 4000 * 2 * 16
        )  # one row's keys in one layer, and less than features of the prompt
