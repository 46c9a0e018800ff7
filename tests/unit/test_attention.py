"""The attention function against a plain reference, and the scores that it gathers."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from specvlm import attention
from specvlm.attention import (
    AttentionPlan,
    ScoreSum,
    Segment,
    VisibleNodes,
    own_mask,
    prefix_of,
    ragged_mask,
    tail_mask,
)
from specvlm.prefill import PrefillRow, ToSee, embed, prefill_target
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


def prefill(query: torch.Tensor, keys: list[torch.Tensor], *segments: Segment) -> torch.Tensor:
    """Attention of packed segments, whose keys are values too, turned round."""
    values = [key.flip(3) for key in keys]
    out, _ = attention._attend(
        torch.nn.Identity(), query, keys, values, None, attention_plan=AttentionPlan(tuple(segments))
    )
    return out


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("scored", [None, 0, 4])
@pytest.mark.parametrize("rows_at_once", [3, 128])
def test_causal_prefill(
    first: int, scored: int | None, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, or what is left of one; the attention of its tokens from the scored one on is summed."""
    monkeypatch.setattr(attention, "SCORED_ROWS", rows_at_once)
    query, key, _ = tensors(7, first + 7)
    scores = None if scored is None else ScoreSum(torch.tensor([1, 3, 4]), torch.device("cpu"))
    out = prefill(query, [key], Segment(0, 7, first, scored or 0, scores))
    expected, weights = reference(query, key, key.flip(3), causal(first, 7, first + 7))
    torch.testing.assert_close(out, expected)
    if scores is not None:
        torch.testing.assert_close(scores.mean(), weights[:, :, scored:].mean(dim=(0, 1, 2))[[1, 3, 4]])


@pytest.mark.parametrize("counts", [(7,), (7, 7, 7), (3, 7, 7, 9), (1, 1, 5)])
@pytest.mark.parametrize("continued", [False, True])
def test_packed_prompts_do_not_see_each_other(counts: tuple[int, ...], continued: bool) -> None:
    """Prompts of one length and of others in one pass, each with scores of its own: as if each were alone."""
    firsts = [(2 + number if continued else 0) for number in range(len(counts))]
    query, key, _ = tensors(sum(counts), sum(counts) + sum(firsts))
    segments, expected, keys, means, done, taken = [], [], [], [], 0, 0
    for first, count in zip(firsts, counts, strict=True):
        mine = key[:, :, taken : taken + first + count]
        alone, weights = reference(
            query[:, :, done : done + count], mine, mine.flip(3), causal(first, count, first + count)
        )
        scores = ScoreSum(torch.tensor([0]), torch.device("cpu"))
        segments.append(Segment(done, count, first, count // 2, scores))
        keys.append(mine)
        expected.append(alone)
        means.append(weights[:, :, count // 2 :].mean(dim=(0, 1, 2))[:1])
        done, taken = done + count, taken + first + count
    out = prefill(query, keys if continued else [torch.cat(keys, dim=2)], *segments)
    torch.testing.assert_close(out, torch.cat(expected, dim=1))
    for segment, mean in zip(segments, means, strict=True):
        assert segment.scores is not None
        torch.testing.assert_close(segment.scores.mean(), mean)


EVERYONE = slice(0, None)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rows: VisibleNodes) -> torch.Tensor:
    """Attention of the nodes of a round; all rows see the same keys tensor, or each group its own rows of it."""
    keys, values = [key[one.where] for one in rows], [value[one.where] for one in rows]
    out, _ = attention._attend(
        torch.nn.Identity(), query, keys, values, None, attention_plan=AttentionPlan(rows=rows)
    )
    return out


def test_tree_mask() -> None:
    query, key, value = tensors(3, 8)
    sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    visible = torch.cat((torch.ones(3, 5, dtype=torch.bool), sees[0]), dim=1)
    expected, _ = reference(query, key, value, visible)
    lengths = torch.tensor([5])
    for rows in (
        VisibleNodes(EVERYONE, ragged_mask(lengths, sees, 8, 2, torch.float32)),
        VisibleNodes(EVERYONE, tail_mask(sees, 8, 2, torch.float32)),
        VisibleNodes(EVERYONE, own_mask(sees, 2, torch.float32), lengths=lengths),
    ):
        torch.testing.assert_close(attend(query, key, value, rows), expected)


@pytest.mark.parametrize("prefix", [0, 1])
def test_round_mask_of_rows_of_different_length(prefix: int) -> None:
    """Two heads share each key head, so nodes stand there twice; what lies after a round is not seen."""
    sees = torch.tensor([[[True, False], [True, True]]]).expand(2, 2, 2)
    mask = ragged_mask(torch.tensor([1, 3]), sees, 7, 2, torch.float32, prefix)
    seen = [
        [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
    ]
    assert (mask == 0).int().tolist() == [[[node[prefix:] for node in row * 2]] for row in seen]
    assert mask[mask != 0].eq(float("-inf")).all()


class Case(NamedTuple):
    """One round of random rows, attended under one mask, and what the other ways need."""

    tensors: tuple[torch.Tensor, ...]
    lengths: torch.Tensor
    sees: torch.Tensor
    groups: int
    visible: int
    expected: torch.Tensor

    def masked(self, where: slice, prefix: int = 0) -> VisibleNodes:
        """Rows under one mask, but for a prefix."""
        dtype = self.tensors[0].dtype
        mask = ragged_mask(self.lengths[where], self.sees[where], self.visible, self.groups, dtype, prefix)
        return VisibleNodes(where, mask, prefix)

    def each(self, share: float) -> list[VisibleNodes]:
        """Each row by itself, with so much of its own length split off."""
        rows = [slice(row, row + 1) for row in range(len(self.lengths))]
        return [self.masked(where, int(share * int(self.lengths[where]))) for where in rows]

    def varlen(self) -> VisibleNodes:
        """All rows, what is committed by a kernel of its own."""
        mask = own_mask(self.sees, self.groups, self.tensors[0].dtype)
        return VisibleNodes(EVERYONE, mask, lengths=self.lengths)


def random_case(seed: int, dtype: torch.dtype = torch.float32, large: float = 1.0) -> Case:
    dice = random.Random(seed)
    rows, kv_heads, groups, nodes = (dice.randint(1, most) for most in (3, 3, 4, 9))
    own, width = dice.randint(nodes, nodes + 4), 8 * dice.randint(1, 4)
    lengths = torch.tensor([dice.randint(20, 400) for _ in range(rows)])
    visible = int(lengths.max()) + own + dice.randint(0, 20)
    torch.manual_seed(seed)
    sees = (torch.rand(rows, nodes, own) < 0.5) | torch.eye(nodes, own, dtype=torch.bool)
    query = torch.randn(rows, nodes, kv_heads * groups, width).transpose(1, 2) * large
    # As in a slab: [B, slots, kv heads, d] seen as [B, kv heads, slots, d], of which more is there than is visible.
    key, value = torch.randn(2, rows, visible + 5, kv_heads, width)[:, :, :visible].transpose(2, 3)
    made = tuple(one.to(dtype) for one in (query, key, value))
    case = Case(made, lengths, sees, groups, visible, torch.empty(0))
    return case._replace(expected=attend(*made, case.masked(EVERYONE)))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_split_off_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any prefix of what a row has committed, all of it included, row by row; and all of each row's by one kernel.

    By the kernels that tell their log-sum-exp, and by hand.
    """
    case = random_case(seed, large=10.0 if seed % 4 == 0 else 1.0)
    for by_hand in (False, True):
        if by_hand:
            monkeypatch.setattr(attention, "_part", attention._part_by_hand)
        for share in (0.05, 0.5, 1.0):
            out = attend(*case.tensors, *case.each(share))
            torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)
        out = attend(*case.tensors, case.varlen())
        torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["masked", "split", "varlen"])
def test_a_row_gives_the_same_whoever_is_beside_it(how: str) -> None:
    """Its prefix, its mask and its sums are its own: the very bits where kernels are, with neighbours and alone."""
    for seed in range(20):
        case = random_case(seed)
        rows = len(case.lengths)
        together = {
            "masked": [case.masked(EVERYONE)],
            "split": case.each(0.8),
            "varlen": [case.varlen()],
        }[how]
        out = attend(*case.tensors, *together)
        for row in range(rows):
            mine = slice(row, row + 1)
            alone = case._replace(
                tensors=tuple(one[mine] for one in case.tensors),
                lengths=case.lengths[mine],
                sees=case.sees[mine],
                visible=case.visible,
            )
            ways = {"masked": [alone.masked(EVERYONE)], "split": alone.each(0.8), "varlen": [alone.varlen()]}
            torch.testing.assert_close(
                attend(*alone.tensors, *ways[how]), out[mine], rtol=1e-5, atol=1e-5, msg=f"{seed} {row}"
            )


def test_rows_of_several_slabs_find_their_own_keys() -> None:
    """Groups that are no slice of the batch: outputs go where their queries came from."""
    case = next(made for seed in range(40) if len((made := random_case(seed)).lengths) == 3)
    one, two = torch.tensor([0, 2]), slice(1, 2)
    dtype = case.tensors[0].dtype
    rows = [
        VisibleNodes(
            where, ragged_mask(case.lengths[where], case.sees[where], case.visible, case.groups, dtype)
        )
        for where in (one, two)
    ]
    torch.testing.assert_close(attend(*case.tensors, *rows), case.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_in_half_precision_are_as_near_to_the_truth(seed: int, dtype: torch.dtype) -> None:
    """Each part is rounded once more; the error against float32 stays within twice the rounding of the output."""
    case = random_case(seed, dtype)
    exact = case._replace(tensors=tuple(one.float() for one in case.tensors))
    truth = attend(*exact.tensors, exact.masked(EVERYONE))
    for rows in (case.each(1.0), [case.varlen()]):
        out = attend(*case.tensors, *rows).float()
        assert (out - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()


def test_a_lone_row_that_knows_its_length_splits_alike() -> None:
    query, key, value = tensors(3, 50)
    sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    whole = attend(query, key, value, VisibleNodes(EVERYONE, tail_mask(sees, 50, 2, torch.float32)))
    for prefix in (46, 47):
        mask = tail_mask(sees, 50, 2, torch.float32, prefix)
        torch.testing.assert_close(attend(query, key, value, VisibleNodes(EVERYONE, mask, prefix)), whole)


def test_prefixes_come_in_steps_and_short_ones_not_at_all() -> None:
    assert [prefix_of(certain) for certain in (0, 511, 512, 639, 640, 25_000)] == [
        0,
        0,
        512,
        512,
        640,
        24_960,
    ]


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_scores_are_the_mean_attention_of_the_text_to_the_video(family: FamilyName) -> None:
    """Against stock eager attention with its weights put out."""
    captioner = tiny_captioner(family, Size(layers=3), None)
    inputs = captioner.prepare(random_frames(1), "Look at <video> and tell me more.").inputs
    with torch.inference_mode():
        (prompt,) = embed(captioner.target, [ToSee(inputs)])
        cache = captioner.target.new_cache(prompt.length)
        (read,) = prefill_target(captioner.target, cache, [PrefillRow(prompt, 0)])
        model = tiny_lm(family, Size(layers=3)).model
        model.set_attn_implementation("eager")
        weights = model(**inputs.tensors, output_attentions=True).attentions
    video = inputs.video_at
    rows = slice(int(video[-1]) + 1, None)
    expected = torch.stack([layer[0, :, rows][..., video].mean(dim=(0, 1)) for layer in weights]).mean(0)
    torch.testing.assert_close(read.scores, expected, rtol=1e-4, atol=1e-7)
