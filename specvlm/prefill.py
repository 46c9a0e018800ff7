"""Prefill: the target in two parts with the score side-channel, the draft on the kept tokens only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specvlm.attention import AttentionPlan, ScoreSum
from specvlm.cache import SlabCache
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM


class Prompt(NamedTuple):
    """One prompt inside one model, ready to prefill. Rows of a job differ in S."""

    inputs: ModelInputs
    embeds: torch.Tensor  # [1, S, hidden]
    positions: torch.Tensor  # int64 [P, S]

    @property
    def length(self) -> int:
        """S, or what pruning left of it."""
        return self.embeds.shape[1]

    @property
    def next_position(self) -> int:
        """Position of the first new token, the same in every row of M-RoPE.

        As stock `generate()` does, count on from the last text token, though the time row of a long video may be ahead.
        """
        return int(self.positions[0, -1]) + 1


class TargetPrefill(NamedTuple):
    """What the target knows when it has read a prompt."""

    logits: torch.Tensor  # float32 [1, 1, C], for the first new token
    scores: torch.Tensor  # float32 [V], mean attention of the text after the video to each video token


def embed(model: VideoLM, inputs: ModelInputs) -> Prompt:
    """Run the vision tower and look up the text."""
    embeds = model.embed_prompt(inputs)
    return Prompt(inputs, embeds, model.positions(inputs).to(embeds.device))


def _run(
    model: VideoLM, prompt: Prompt, cache: SlabCache, row: int, part: slice, plan: AttentionPlan
) -> torch.Tensor:
    cache.aim_prefill(row, part.start, part.stop - part.start, prompt.embeds.device)
    return model.forward(prompt.embeds[:, part], prompt.positions[:, None, part], cache, plan)


def prefill_target(model: VideoLM, prompt: Prompt, cache: SlabCache, row: int) -> TargetPrefill:
    """Read the prompt into `row` of the cache; SpecVLM, arXiv 2508.16201, section 3.2.

    Part one ends with the last video token. Part two is the text behind it; each of its layers adds the attention
    that these rows pay to the video tokens, so the full attention never exists.

    Scores are taken even where nobody asks for them: plain decoding then starts from the same bits as speculation.
    """
    where = prompt.inputs.is_video.nonzero().squeeze(1)
    boundary = int(where[-1]) + 1
    scores = ScoreSum(where, prompt.embeds.device)
    _run(model, prompt, cache, row, slice(0, boundary), AttentionPlan())
    text = slice(boundary, prompt.length)
    hidden = _run(model, prompt, cache, row, text, AttentionPlan(first=boundary, scores=scores))
    return TargetPrefill(model.logits(hidden[:, -1:]), scores.mean())


def prefill_draft(model: VideoLM, prompt: Prompt, cache: SlabCache, row: int) -> None:
    """Read a pruned prompt into `row` of the draft's cache."""
    _run(model, prompt, cache, row, slice(0, prompt.length), AttentionPlan())


def prune_prompt(prompt: Prompt, keep: torch.Tensor, *, compact: bool) -> Prompt:
    """Drop the video tokens that `keep` [V] drops.

    What is left keeps its positions, or is renumbered 0, 1, 2, ... in every row (`compact`).
    """
    seen = torch.ones_like(prompt.inputs.is_video)
    seen[prompt.inputs.is_video.nonzero().squeeze(1)] = keep.to(seen.device)
    where = seen.nonzero().squeeze(1).to(prompt.embeds.device)
    positions = prompt.positions.index_select(1, where)
    if compact:
        positions = torch.arange(where.numel(), device=where.device).expand_as(positions)
    return Prompt(prompt.inputs, prompt.embeds.index_select(1, where), positions)
