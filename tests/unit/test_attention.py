"""The attention function against a plain reference, and the scores that it gathers."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from specvlm import attention
from specvlm.attention import (
    AttentionPlan,
    NodeTable,
    ScoreSum,
    node_table,
    prefix_of,
    round_plan,
    tail_plan,
)
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


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    out, _ = attention._attend(torch.nn.Identity(), query, key, value, plan)
    return out


def test_tree_mask() -> None:
    query, key, value = tensors(3, 8)
    sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    visible = torch.cat((torch.ones(3, 5, dtype=torch.bool), sees[0]), dim=1)
    expected, _ = reference(query, key, value, visible)
    table = node_table(torch.tensor([5]), sees, 2, torch.float32)
    torch.testing.assert_close(attend(query, key, value, round_plan(table, 8)), expected)
    torch.testing.assert_close(attend(query, key, value, tail_plan(sees, 8, 2, torch.float32)), expected)


@pytest.mark.parametrize("prefix", [0, 1])
def test_round_mask_of_rows_of_different_length(prefix: int) -> None:
    """Two heads share each key head, so nodes stand there twice; what lies behind a round is not seen."""
    sees = torch.tensor([[[True, False], [True, True]]]).expand(2, 2, 2)
    plan = round_plan(node_table(torch.tensor([1, 3]), sees, 2, torch.float32), 7, prefix)
    assert plan.mask is not None
    seen = [
        [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
    ]
    assert (plan.mask == 0).int().tolist() == [[[node[prefix:] for node in row * 2]] for row in seen]
    assert plan.mask[plan.mask != 0].eq(float("-inf")).all()
    assert plan.prefix == prefix


class Case(NamedTuple):
    """One round of random rows, attended under one mask, and what the other ways need."""

    tensors: tuple[torch.Tensor, ...]
    table: NodeTable
    visible: int
    certain: int
    expected: torch.Tensor


def random_case(seed: int, dtype: torch.dtype = torch.float32, large: float = 1.0) -> Case:
    dice = random.Random(seed)
    rows, kv_heads, groups, nodes = (dice.randint(1, most) for most in (3, 3, 4, 9))
    own, width = dice.randint(nodes, nodes + 4), 8 * dice.randint(1, 4)
    lengths = torch.tensor([dice.randint(20, 400) for _ in range(rows)])
    visible = int(lengths.max()) + own + dice.randint(0, 20)
    torch.manual_seed(seed)
    sees = torch.rand(rows, nodes, own) < 0.5
    query = torch.randn(rows, nodes, kv_heads * groups, width).transpose(1, 2) * large
    # As in a slab: [B, slots, kv heads, d] seen as [B, kv heads, slots, d], of which more is there than is visible.
    key, value = torch.randn(2, rows, visible + 5, kv_heads, width)[:, :, :visible].transpose(2, 3)
    made = tuple(one.to(dtype) for one in (query, key, value))
    table = node_table(lengths, sees, groups, dtype)
    expected = attend(*made, round_plan(table, visible))
    return Case(made, table, visible, int(lengths.min()) - 1, expected)


@pytest.mark.parametrize("seed", range(40))
def test_a_prefix_that_is_split_off_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any prefix that every row has committed; by the kernels that tell their log-sum-exp, and by hand."""
    case = random_case(seed, large=10.0 if seed % 4 == 0 else 1.0)
    for prefix in {1, case.certain // 2, case.certain} - {0}:
        plan = round_plan(case.table, case.visible, prefix)
        torch.testing.assert_close(attend(*case.tensors, plan), case.expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(attention, "_part", attention._part_by_hand)
    torch.testing.assert_close(attend(*case.tensors, plan), case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_split_in_half_precision_is_as_near_to_the_truth(seed: int, dtype: torch.dtype) -> None:
    """Each part is rounded once more; the error against float32 stays within twice the rounding of the output."""
    case = random_case(seed, dtype)
    exact = attend(
        *(one.float() for one in case.tensors),
        round_plan(case.table._replace(columns=case.table.columns.float()), case.visible),
    )
    out = attend(*case.tensors, round_plan(case.table, case.visible, case.certain)).float()
    assert (out - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_lone_row_that_knows_its_length_splits_alike() -> None:
    query, key, value = tensors(3, 50)
    sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    whole = attend(query, key, value, tail_plan(sees, 50, 2, torch.float32))
    part = attend(query, key, value, tail_plan(sees, 50, 2, torch.float32, prefix=46))
    torch.testing.assert_close(part, whole)


def test_prefixes_come_in_steps_and_short_ones_not_at_all() -> None:
    assert [prefix_of(certain) for certain in (0, 511, 512, 639, 640, 25_000)] == [
        0,
        0,
        512,
        512,
        640,
        24_960,
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same(seed: int) -> None:
    """Its reference; compiled it is for CUDA alone."""
    case = random_case(seed)
    plan = AttentionPlan(table=case.table)
    torch.testing.assert_close(attend(*case.tensors, plan), case.expected, rtol=1e-5, atol=1e-5)


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
