"""However rounds attend, the caption is stock's, token for token in fp32 on the CPU."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from specvlm import attention
from specvlm.attention import RoundAttention, VisibleNodes
from specvlm.captioner import Captioner, PreparedVideo
from tests.emulated_graphs import attend_by
from tests.tiny import FamilyName, Size, caption_rows, random_frames, stock_ids, tiny_captioner

TARGET = Size(layers=3, seed=1, vocabulary=320)


def captioner_for(family: FamilyName, how: RoundAttention) -> Captioner:
    """A draft that errs at times; target and draft attend as told."""
    captioner = tiny_captioner(family, TARGET, TARGET)
    draft = captioner.draft.model  # type: ignore[union-attr]
    torch.manual_seed(5)
    for parameter in draft.model.parameters():
        parameter += 0.02 * parameter.std(correction=0) * torch.randn_like(parameter)
    captioner.target.round_attention = draft.round_attention = how
    return captioner


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("how", get_args(RoundAttention))
@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_rounds_that_attend_otherwise_are_stock(
    how: RoundAttention, family: FamilyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row and three of other lengths; trees, and none."""
    monkeypatch.setattr(attention, "PREFIX_STEP", 8)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 8)
    captioner = captioner_for(family, how)
    model, videos = captioner.target.model, videos_of(captioner)
    stock = [stock_ids(model, video.inputs.tensors, 20) for video in videos]
    for tree in ("chain", "static", "dynamic"):
        for prune_ratio in (0.0, 0.9):
            options = {"tree": tree, "prune_ratio": prune_ratio, "max_new_tokens": 20}
            assert captioner.caption(videos[0], **options).token_ids == stock[0], options  # type: ignore[arg-type]
        rows = caption_rows(captioner, videos, **options)
        assert [caption.token_ids for caption in rows] == stock, tree
    plain = caption_rows(captioner, videos, speculate=False, max_new_tokens=20)
    assert [caption.token_ids for caption in plain] == stock


def videos_of(captioner: Captioner) -> list[PreparedVideo]:
    """Of other lengths."""
    told = ((3, 4, "Hi there."), (4, 2, "Look at <video>."), (5, 6, "What?"))
    return [captioner.prepare(random_frames(seed, frames), prompt) for seed, frames, prompt in told]


@pytest.mark.covering
@pytest.mark.parametrize("how", ["split", "varlen"])
@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
def test_the_draft_sees_the_same_however_it_attends(
    how: RoundAttention, step: int, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many guesses are accepted in every round: a draft that looked elsewhere would show here alone.

    With steps of one slot, each prefix ends where the row's committed slots do.
    """
    monkeypatch.setattr(attention, "PREFIX_STEP", step)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", step)
    captioner = captioner_for("qwen", "masked")
    captioner.generation_config.eos_token_id = []
    options = {"tree": tree, "prune_ratio": 0.0, "max_new_tokens": 40}
    videos = videos_of(captioner)
    masked = [caption.stats.acceptance_histogram for caption in caption_rows(captioner, videos, **options)]
    attend_by(captioner, how)
    got = [caption.stats.acceptance_histogram for caption in caption_rows(captioner, videos, **options)]
    assert got == masked
    assert all(sum(one[1:]) > 0 for one in got)


@pytest.mark.parametrize("how", get_args(RoundAttention))
def test_each_row_has_a_prefix_of_its_own(how: RoundAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is split off of a row follows its own length, whoever is beside it; so do its numbers."""
    monkeypatch.setattr(attention, "PREFIX_STEP", 8)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 8)
    captioner = captioner_for("llava", how)
    captioner.generation_config.eos_token_id = []
    seen: list[list[tuple[int, int]]] = []
    real = attention._of_rows

    def note(query: Any, key: Any, value: Any, rows: VisibleNodes, *more: Any) -> Any:
        seen[-1].append((query.shape[0], rows.prefix))
        return real(query, key, value, rows, *more)

    monkeypatch.setattr(attention, "_of_rows", note)
    videos = videos_of(captioner)
    for some in (videos, *([video] for video in videos)):
        seen.append([])
        caption_rows(captioner, some, tree="chain", depth=1, max_new_tokens=4, exact=False)
    together, *alone = seen
    if how == "split":
        assert {rows for rows, _ in together} == {1}
        assert sorted(together) == sorted(one for each in alone for one in each)
        assert len({prefix for _, prefix in together}) > 1
        assert min(prefix for _, prefix in together) >= 8
    else:
        assert {prefix for _, prefix in together} == {0}
        assert 3 in {rows for rows, _ in together}
