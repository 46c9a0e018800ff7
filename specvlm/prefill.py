"""Prefill: the target in two parts with the score side-channel, the draft on the kept tokens only.

What the prompts of one video have in common is done once: a vision tower's features, and the target's part one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from specvlm.attention import AttentionPlan, ScoreSum
from specvlm.cache import SlabCache
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM
from specvlm.stats import StageClock


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
    def boundary(self) -> int:
        """How much of an unpruned prompt ends with the last video token; the text behind it is part two."""
        return int(self.inputs.is_video.nonzero()[-1]) + 1

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


class Features:
    """What the models saw in one video: their towers' features, kept for its further prompts."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._of: dict[VideoLM, torch.Tensor] = {}  # each [V, hidden]

    def __contains__(self, model: VideoLM) -> bool:
        """Whether this model has seen the video."""
        return model in self._of

    def of(self, model: VideoLM, inputs: ModelInputs) -> torch.Tensor:
        """The features [V, hidden] in a model, whose tower runs when they are first asked for."""
        if model not in self._of:
            self._of[model] = model.see(inputs)
        return self._of[model]


def embed(model: VideoLM, inputs: ModelInputs, features: Features | None = None) -> Prompt:
    """Look up the text, and put the video's features in; without any, the vision tower runs."""
    seen = model.see(inputs) if features is None else features.of(model, inputs)
    embeds = model.embed_prompt(inputs, seen)
    return Prompt(inputs, embeds, model.positions(inputs).to(embeds.device))


def _run(
    model: VideoLM, prompt: Prompt, cache: SlabCache, row: int, part: slice, plan: AttentionPlan
) -> torch.Tensor:
    cache.aim_prefill(row, part.start, part.stop - part.start, prompt.embeds.device)
    return model.forward(prompt.embeds[:, part], prompt.positions[:, None, part], cache, plan)


def prefill_video(model: VideoLM, prompt: Prompt, cache: SlabCache, row: int) -> None:
    """Read part one of a prompt, all up to the last video token, into `row` of the target's cache."""
    _run(model, prompt, cache, row, slice(0, prompt.boundary), AttentionPlan())


def prefill_text(model: VideoLM, prompt: Prompt, cache: SlabCache, row: int) -> TargetPrefill:
    """Read part two, the text behind the video; SpecVLM, arXiv 2508.16201, section 3.2.

    Each layer adds the attention that these rows pay to the video tokens, so the full attention never exists.
    Scores are taken even where nobody asks for them: plain decoding then starts from the same bits as speculation.
    """
    scores = ScoreSum(prompt.inputs.is_video.nonzero().squeeze(1), prompt.embeds.device)
    plan = AttentionPlan(first=prompt.boundary, scores=scores)
    hidden = _run(model, prompt, cache, row, slice(prompt.boundary, prompt.length), plan)
    return TargetPrefill(model.logits(hidden[:, -1:]), scores.mean())


def prefill_target(model: VideoLM, prompt: Prompt, cache: SlabCache, row: int) -> TargetPrefill:
    """Read both parts of a prompt into `row` of the target's cache."""
    prefill_video(model, prompt, cache, row)
    return prefill_text(model, prompt, cache, row)


class _Held(NamedTuple):
    """The prompt that a row of the target's cache holds."""

    token_ids: torch.Tensor  # int64 [1, S]
    positions: torch.Tensor  # int64 [P, S]
    boundary: int
    read: TargetPrefill

    def begins_like(self, prompt: Prompt) -> bool:
        """Whether part one is the same."""
        one = slice(0, self.boundary)
        return (
            prompt.boundary == self.boundary
            and torch.equal(prompt.inputs.token_ids[:, one], self.token_ids[:, one])
            and torch.equal(prompt.positions[:, one], self.positions[:, one])
        )

    def is_like(self, prompt: Prompt) -> bool:
        """Whether all is the same; positions of text follow from what stands before it."""
        return self.begins_like(prompt) and torch.equal(prompt.inputs.token_ids, self.token_ids)


class TargetReader:
    """The target's cache of B rows, and the prompt that each row holds.

    A row's next prompt, about the same video, reads only what is new to the cache: the text behind the video where
    the same stands before it, and nothing where this prompt was the last one. What decoding wrote stands behind the
    prompt and is forgotten.
    """

    def __init__(self, model: VideoLM) -> None:
        """No room yet, and nothing read."""
        self._model = model
        self._cache: SlabCache | None = None
        self._held: dict[int, _Held] = {}

    def make_room(self, rows: int, capacity: int) -> SlabCache:
        """The cache, with room for `capacity` tokens of each row; a smaller one goes, and with it all that was read.

        Raises:
            GenerationError: Some layers see a sliding window that is shorter than this.
        """
        if self._cache is None or self._cache.rows != rows or self._cache.capacity < capacity:
            self._cache = None  # first, for the two together may not fit
            self._held.clear()
            self._cache = self._model.new_cache(rows, capacity)
        return self._cache

    def forget(self) -> None:
        """Give the cache up: what decoding left in it is not to be trusted."""
        self._cache = None
        self._held.clear()

    def read(self, prompt: Prompt, row: int, clock: StageClock) -> TargetPrefill:
        """Read a prompt into its row; the stages `read_video` and `read_text` take the time of what had to be done."""
        assert self._cache is not None
        held = self._held.pop(row, None)  # what fails half-way leaves nothing to rely on
        if held is None or not held.begins_like(prompt):
            with clock.awaited_stage("read_video"):
                prefill_video(self._model, prompt, self._cache, row)
            held = None
        if held is None or not held.is_like(prompt):
            with clock.awaited_stage("read_text"):
                read = prefill_text(self._model, prompt, self._cache, row)
            held = _Held(prompt.inputs.token_ids, prompt.positions, prompt.boundary, read)
        self._held[row] = held
        return held.read


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
