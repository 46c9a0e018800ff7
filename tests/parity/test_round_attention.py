"""However rounds attend, the caption is stock's, token for token in fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from specvlm import attention
from specvlm.attention import RoundAttention
from specvlm.captioner import Captioner
from tests.tiny import FamilyName, Size, random_frames, stock_ids, tiny_captioner

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


@pytest.mark.parametrize(
    ("how", "family", "trees"),
    [
        ("split", "qwen", ("chain", "static", "dynamic")),
        ("split", "llava", ("chain", "static", "dynamic")),
        ("flex", "qwen", ("static",)),  # slow where it is not compiled
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rounds_that_attend_otherwise_are_stock(
    how: RoundAttention, family: FamilyName, trees: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row and three of other lengths; trees, and none."""
    monkeypatch.setattr(attention, "PREFIX_STEP", 8)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 8)
    captioner = captioner_for(family, how)
    model = captioner.target.model
    videos = [
        captioner.prepare(random_frames(seed, frames), prompt)
        for seed, frames, prompt in ((3, 4, "Hi there."), (4, 2, "Look at <video>."), (5, 6, "What?"))
    ]
    stock = [stock_ids(model, video.inputs.tensors, 20) for video in videos]
    for tree in trees:
        for prune_ratio in (0.0, 0.9):
            options = {"tree": tree, "prune_ratio": prune_ratio, "max_new_tokens": 20}
            assert captioner.caption(videos[0], **options).token_ids == stock[0], options  # type: ignore[arg-type]
        rows = captioner.caption_rows(videos, **options)  # type: ignore[arg-type]
        assert [caption.token_ids for caption in rows] == stock, tree
    plain = captioner.caption_rows(videos, speculate=False, max_new_tokens=20)
    assert [caption.token_ids for caption in plain] == stock
