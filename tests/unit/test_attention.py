"""The attention function against a plain reference, and the scores that it gathers."""

from __future__ import annotations

import pytest
import torch

from specvlm import attention
from specvlm.attention import AttentionPlan, ScoreSum, round_mask, tree_plan
from specvlm.prefill import embed, prefill_target
from tests.tiny import FamilyName, Size, random_frames, tiny_captioner, tiny_lm


def tensors(count: int, slots: int, heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(count * 100 + slots)
    return (
        torch.randn(1, heads, count, 8),
        torch.randn(1, kv_heads, slots, 8),
        torch.randn(1, kv_heads, slots, 8),
    )


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with repeated keys, and its weights; `visible` bool [n, slots]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = (query @ key.transpose(2, 3) * 8**-0.5).masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def causal(first: int, count: int, slots: int) -> torch.Tensor:
    return torch.arange(slots) <= torch.arange(first, first + count)[:, None]


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("rows_at_once", [3, 128])
def test_causal_prefill(first: int, scored: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORED_ROWS", rows_at_once)
    query, key, value = tensors(7, first + 7)
    scores = ScoreSum(torch.tensor([1, 3, 4]), torch.device("cpu")) if scored else None
    out, _ = attention._attend(torch.nn.Identity(), query, key, value, AttentionPlan(first, None, scores))
    expected, weights = reference(query, key, value, causal(first, 7, first + 7))
    torch.testing.assert_close(out, expected)
    if scores is not None:
        torch.testing.assert_close(scores.mean(), weights.mean(dim=(0, 1, 2))[[1, 3, 4]])


def test_tree_mask() -> None:
    query, key, value = tensors(3, 8)
    sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    visible = round_mask(torch.tensor([5]), sees, 8)
    out, _ = attention._attend(torch.nn.Identity(), query, key, value, tree_plan(visible, 2, torch.float32))
    expected, _ = reference(query, key, value, visible[0])
    torch.testing.assert_close(out, expected)


def test_round_mask_of_rows_of_different_length() -> None:
    sees = torch.tensor([[[True, False], [True, True]]]).expand(2, 2, 2)
    mask = round_mask(torch.tensor([1, 3]), sees, 6)
    assert mask.int().tolist() == [
        [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    ]


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_scores_are_the_mean_attention_of_the_text_to_the_video(family: FamilyName) -> None:
    """Against stock eager attention with its weights put out."""
    captioner = tiny_captioner(family, Size(layers=3), None)
    inputs = captioner.prepare(random_frames(1), "Look at <video> and tell me more.").inputs
    with torch.inference_mode():
        prompt = embed(captioner.target, inputs)
        cache = captioner.target.new_cache(1, prompt.length)
        scores = prefill_target(captioner.target, prompt, cache, 0).scores
        model = tiny_lm(family, Size(layers=3)).model
        model.set_attn_implementation("eager")
        weights = model(**inputs.tensors, output_attentions=True).attentions
    video = inputs.is_video.nonzero().flatten()
    rows = slice(int(video[-1]) + 1, None)
    expected = torch.stack([layer[0, :, rows][..., video].mean(dim=(0, 1)) for layer in weights]).mean(0)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)
