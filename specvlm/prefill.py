"""Prefill: prompts are read into a cache, short ones packed into one pass; the target also scores the video tokens.

What the prompts of one video have in common is done once: a vision tower's features, and the target's keys and values
up to the last video token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from specvlm.attention import AttentionPlan, ScoreSum, Segment
from specvlm.cache import KVCache, PrefillPart
from specvlm.families.base import ModelInputs, VideoFeatures
from specvlm.model import VideoLM


class Prompt(NamedTuple):
    """One prompt inside one model, ready to prefill."""

    inputs: ModelInputs
    embeds: torch.Tensor  # [1, S, hidden]
    positions: torch.Tensor  # int64 [P, S]
    video_at: torch.Tensor  # int64 [V] on the CPU, where the video tokens are, or those that pruning left
    deep: tuple[torch.Tensor, ...] = ()  # each [V, hidden], theirs; see VideoFeatures

    @property
    def length(self) -> int:
        """S, or what pruning left of it."""
        return self.embeds.shape[1]

    @property
    def boundary(self) -> int:
        """How much of the prompt ends with the last video token; what follows is scored text."""
        return int(self.video_at[-1]) + 1

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
        self.of: dict[VideoLM, VideoFeatures] = {}


class Begun:
    """What is known of one video when the target has read one of its prompts, for its further prompts.

    Attributes:
        features: Of the vision towers.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.features = Features()
        self._prompt: Prompt | None = None
        self._kept: list[torch.Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether the target has read a prompt of the video."""
        return self._prompt is not None

    def keep(self, prompt: Prompt, cache: KVCache, row: int) -> None:
        """Copy the keys and values of a prompt's first part, all up to the last video token, out of a row."""
        if self._prompt is None:
            self._kept = cache.copy_out(row, prompt.boundary)
            self._prompt = prompt._replace(embeds=prompt.embeds[:, :0], deep=())

    def give(self, prompt: Prompt, cache: KVCache, row: int) -> int:
        """Write what is kept into a row, where this prompt begins in the same way; -> tokens that need not be read."""
        known = self._prompt
        if known is None or not _begin_alike(known, prompt):
            return 0
        cache.copy_in(row, self._kept)
        return known.boundary


def _begin_alike(one: Prompt, other: Prompt) -> bool:
    """Whether two prompts of one video are the same up to the last video token."""
    end = one.boundary
    return (
        other.boundary == end
        and torch.equal(one.inputs.token_ids[:, :end], other.inputs.token_ids[:, :end])
        and torch.equal(one.positions[:, :end], other.positions[:, :end])
    )


class ToSee(NamedTuple):
    """A video that a model is to see."""

    inputs: ModelInputs
    features: Features | None = None  # seen before, or to be kept


def packs(tokens: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of things of so many tokens each, in groups for one pass; those of one size are together.

    A group has at most `most` tokens, or a single thing.
    """
    pack, filled = list[int](), 0
    for index in sorted(range(len(tokens)), key=tokens.__getitem__):
        if pack and filled + tokens[index] > most:
            yield pack
            pack, filled = [], 0
        pack.append(index)
        filled += tokens[index]
    if pack:
        yield pack


def embed(model: VideoLM, videos: Sequence[ToSee], *, alone: bool = False) -> list[Prompt]:
    """Look up the text of each prompt, and put its video's features in; what is not encoded yet is encoded in packs.

    `alone`: each video in a pass of its own.
    """
    new: list[ToSee] = []
    for video in videos:
        known = video.features is not None and model in video.features.of
        if not known and not any(
            video.features is not None and one.features is video.features for one in new
        ):
            new.append(video)
    seen: dict[int, VideoFeatures] = {}
    most = 0 if alone else model.packed_tokens
    for pack in packs([video.inputs.video_tokens for video in new], most):
        some = [new[index] for index in pack]
        for video, features in zip(some, model.see([video.inputs for video in some]), strict=True):
            seen[id(video.inputs)] = features
            if video.features is not None:
                video.features.of[model] = features
    return [_prompt(model, video, seen) for video in videos]


def _prompt(model: VideoLM, video: ToSee, seen: dict[int, VideoFeatures]) -> Prompt:
    inputs = video.inputs
    features = seen[id(inputs)] if video.features is None else video.features.of[model]
    embeds = model.embed_prompt(inputs, features)
    positions = model.positions(inputs).to(embeds.device)
    return Prompt(inputs, embeds, positions, inputs.video_at.cpu(), features.deep)


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prompt to read into a row of a cache, which has the first `known` tokens of it already."""

    prompt: Prompt
    row: int
    known: int = 0

    @property
    def count(self) -> int:
        """Tokens to read."""
        return self.prompt.length - self.known


def _pass(
    model: VideoLM, cache: KVCache, readings: Sequence[PrefillRow], scores: Sequence[ScoreSum | None]
) -> torch.Tensor:
    """Read some prompts in one pass; -> hidden states of the last token of each, [1, prompts, hidden]."""
    device = readings[0].prompt.embeds.device
    segments, ends, done = list[Segment](), list[int](), 0
    for reading, score in zip(readings, scores, strict=True):
        scored = 0 if score is None else reading.prompt.boundary - reading.known
        segments.append(Segment(done, reading.count, reading.known, scored, score))
        done += reading.count
        ends.append(done - 1)
    cache.aim_prefill([PrefillPart(one.row, one.known, one.count) for one in readings], device)
    hidden = model.forward(
        torch.cat([one.prompt.embeds[:, one.known :] for one in readings], dim=1),
        torch.cat([one.prompt.positions[:, one.known :] for one in readings], dim=1)[:, None],
        cache,
        AttentionPlan(tuple(segments)),
        _deep_arguments(model, readings, segments),
    )
    return hidden[:, ends]


def _deep_arguments(
    model: VideoLM, readings: Sequence[PrefillRow], segments: Sequence[Segment]
) -> dict[str, Any]:
    """What the text model gets about the video tokens of a pass besides their embeddings."""
    if not any(one.prompt.deep for one in readings):
        return {}
    rows, places = list[tuple[torch.Tensor, ...]](), list[torch.Tensor]()
    for reading, segment in zip(readings, segments, strict=True):
        video_at = reading.prompt.video_at
        known = int(torch.searchsorted(video_at, reading.known))
        places.append(video_at[known:] - reading.known + segment.start)
        rows.append(tuple(layer[known:] for layer in reading.prompt.deep))
    deep = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    where = torch.zeros(1, segments[-1].start + segments[-1].count, dtype=torch.bool)
    where[0, torch.cat(places)] = True
    return model.family.text_arguments(where.to(deep[0].device), deep)


def prefill_target(
    model: VideoLM,
    cache: KVCache,
    readings: Sequence[PrefillRow],
    *,
    scored: bool = True,
    alone: bool = False,
) -> list[TargetPrefill]:
    """Read prompts into their rows of the target's cache; SpecVLM, arXiv 2508.16201, section 3.2.

    Each layer adds the attention that the text after the video pays to the video tokens, so the full attention never
    exists. It is a product of its own that changes no output, so plain decoding, which needs no scores (`scored`),
    starts from the same bits without it.

    `alone`: each prompt in a pass of its own, which runs what stock `generate()` runs, on the same shapes.

    Returns:
        What the target knows of each prompt, in their order.
    """
    found: dict[int, TargetPrefill] = {}
    for part in (False, True):  # prompts that continue what a row has need another kernel
        mine = [index for index, one in enumerate(readings) if bool(one.known) is part]
        most = 0 if alone else model.packed_tokens
        for pack in packs([readings[index].count for index in mine], most):
            some = [readings[mine[index]] for index in pack]
            scores = [ScoreSum(one.prompt.video_at, one.prompt.embeds.device) for one in some]
            logits = model.logits(_pass(model, cache, some, scores if scored else [None] * len(some)))
            for at, index in enumerate(pack):
                found[mine[index]] = TargetPrefill(logits[:, at : at + 1], scores[at].mean())
    return [found[index] for index in range(len(readings))]


def prefill_draft(model: VideoLM, cache: KVCache, readings: Sequence[PrefillRow]) -> None:
    """Read pruned prompts into their rows of the draft's cache."""
    for pack in packs([one.count for one in readings], model.packed_tokens):
        some = [readings[index] for index in pack]
        _pass(model, cache, some, [None] * len(some))


def prune_prompt(prompt: Prompt, keep: torch.Tensor, *, compact: bool) -> Prompt:
    """Drop the video tokens that `keep` [V] drops.

    What is left keeps its positions, or is renumbered 0, 1, 2, ... in every row (`compact`).
    """
    seen, kept = torch.ones(prompt.length, dtype=torch.bool), keep.cpu()
    seen[prompt.video_at] = kept
    video_at = (seen.cumsum(0) - 1)[prompt.video_at[kept]]
    where = seen.nonzero().squeeze(1).to(prompt.embeds.device)
    positions = prompt.positions.index_select(1, where)
    if compact:
        positions = torch.arange(where.numel(), device=where.device).expand_as(positions)
    deep = tuple(layer[keep.to(layer.device)] for layer in prompt.deep)
    return Prompt(prompt.inputs, prompt.embeds.index_select(1, where), positions, video_at, deep)
