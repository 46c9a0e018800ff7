"""The target's prefill, and the pruner's or a trained head's choice for one video, as numbers. Draws nothing.

A small model is not needed for it; a head is, since its compressor is trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from specvlm.cache import KVCache
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.drafts.base import DraftRow
from specvlm.drafts.head import HeadDraft
from specvlm.errors import ConfigError, NonFiniteLogitsError
from specvlm.families.base import ModelInputs, VideoGrid
from specvlm.prefill import PrefillRow, Prompt, TargetPrefill, ToSee, embed, prefill_target
from specvlm.pruning import PRUNER_TABLE, kept_by_stage
from specvlm.records import Frames
from specvlm.sampling import TokenRule, logits_rules

if TYPE_CHECKING:
    from specvlm.captioner import Captioner

DROPPED, FIRST, SECOND = 0, 1, 2  # values of `Inspection.stage`

# What the operators of a head's compressor do that keep video tokens as they are.
_OF_HEADS = {
    "none": "all of them",
    "prune": "at random, by the head's compressor",
    "prune-guided": "by the target's attention, then evenly, by the head's compressor",
}
_OF_A_STEP = ("kept", "kept_first", "kept_second")


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What one stage of the pruner kept.

    Attributes:
        stage: `FIRST` or `SECOND`.
        name: What it does, in words.
        kept: Video tokens.
        attention: Share of the attention to the video that lies on them.
    """

    stage: int
    name: str
    kept: int
    attention: float


@dataclass(frozen=True, slots=True)
class FrameStep:
    """One step of the video's tokens in time: the cells of the frames that it covers.

    Attributes:
        frames: Numbers of its first and last frame, from 0, among the frames that were read.
        times_s: Their times, from the first frame of the video.
        kept_first: Cells that stage I kept.
        kept_second: Cells that stage II, or a pruner that asks no attention, kept.
        attention: Its share of the attention that the text pays to the video.
    """

    frames: tuple[int, int]
    times_s: tuple[float, float]
    kept_first: int
    kept_second: int
    attention: float

    @property
    def kept(self) -> int:
        """Cells that the draft sees."""
        return self.kept_first + self.kept_second


@dataclass(frozen=True, slots=True)
class Compression:
    """What a trained head's compressor made of the video tokens (SpecVLM, arXiv 2509.11815, section 3.2).

    Attributes:
        name: How it is built: the mode, or its one operator.
        operator: What it used for this video; operators used together are joined by `+`.
        seen: Tokens that the head sees in place of the video's.
        prunes: They are video tokens as they were; else new ones, which cover no cells.
    """

    name: str
    operator: str
    seen: int
    prunes: bool

    @property
    def words(self) -> str:
        """The operator, and the mode where that chose it."""
        return self.operator if self.operator == self.name else f"{self.operator}, chosen by {self.name}"


@dataclass(frozen=True)
class Inspection:
    """What the target looked at, and what of it the draft would see.

    Attributes:
        frames: What was read.
        grid: Where in the video its tokens are.
        scores: float32 [V], mean attention of a text row behind the video to each video token, over heads, rows
            and layers (SpecVLM, arXiv 2508.16201, section 3.2).
        stage: int8 [V]: 0 dropped, 1 kept by stage I, 2 kept by stage II or by a pruner that asks no attention.
        prompt_tokens: S, the video tokens included.
        settings: Pruner, prune ratio, top-p.
        compression: Of a trained head, in place of the pruner; None: the draft is a small model.
    """

    frames: Frames
    grid: VideoGrid
    scores: NDArray[np.float32]
    stage: NDArray[np.int8]
    prompt_tokens: int
    settings: SpeculationSettings
    compression: Compression | None = None

    @property
    def has_cells(self) -> bool:
        """Whether what the draft sees are cells of the video, as they were."""
        return self.compression is None or self.compression.prunes

    @property
    def seen(self) -> int:
        """Tokens that the draft sees of the video: kept ones, or those that a head's compressor made."""
        return self.kept() if self.compression is None else self.compression.seen

    @property
    def video_tokens(self) -> int:
        """V."""
        return len(self.scores)

    def kept(self, stage: int | None = None) -> int:
        """Video tokens that the draft sees: of one stage, or of both."""
        return int(np.count_nonzero(self.stage if stage is None else self.stage == stage))

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """Scores as shares of what the text pays to the video, [V]; they sum to 1."""
        whole = self.scores.astype(np.float64)
        return whole / max(float(whole.sum()), np.finfo(np.float64).tiny)

    def attention_kept(self, stage: int | None = None) -> float:
        """Share of the attention to the video that lies on kept tokens: of one stage, or of both."""
        return float(self.shares[self.stage > 0 if stage is None else self.stage == stage].sum())

    @property
    def attention_to_video(self) -> float:
        """Share of the attention of the text behind the video that the video gets; the rest is on text."""
        return float(self.scores.sum(dtype=np.float64))

    @property
    def stages(self) -> tuple[StageFigures, ...]:
        """The stages that this pruner has; none where a compressor makes new tokens."""
        pruner = PRUNER_TABLE[self.settings.pruner]
        names = {FIRST: pruner.first, SECOND: pruner.second}
        if self.compression is not None:
            names = {SECOND: _OF_HEADS[self.compression.operator]} if self.compression.prunes else {}
        return tuple(
            StageFigures(stage, name, self.kept(stage), self.attention_kept(stage))
            for stage, name in names.items()
            if name is not None
        )

    @property
    def pruner_words(self) -> str:
        """The pruner and the settings that it heeds; of a head, its compressor."""
        settings = self.settings
        if self.compression is not None:
            return f"{self.compression.words}, {self._ratio_words()}"
        if settings.pruner == "none":
            return "none"
        words = f"{settings.pruner}, prune ratio {settings.prune_ratio:g}"
        return words + (f", top-p {settings.top_p:g}" if settings.pruner == "specvlm" else "")

    def _ratio_words(self) -> str:
        assert self.compression is not None
        seen = self.compression.seen
        return f"{self.video_tokens / seen:.1f} video tokens to one" if seen else "nothing of the video"

    def cells(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the video tokens [V] by place, [T, rows, columns]."""
        grid = self.grid
        return values[: grid.cells].reshape(grid.steps, grid.rows, grid.columns)

    @cached_property
    def steps(self) -> tuple[FrameStep, ...]:
        """The grid's T steps in time."""
        return tuple(self._step(number) for number in range(self.grid.steps))

    def _step(self, number: int) -> FrameStep:
        last = len(self.frames.pixels) - 1
        begin = number * self.grid.frames_per_step
        frames = begin, min(begin + self.grid.frames_per_step - 1, last)
        stage, shares = self.cells(self.stage)[number], self.cells(self.shares)[number]
        times_s = self.frames.times_s
        return FrameStep(
            frames=frames,
            times_s=(float(times_s[frames[0]]), float(times_s[frames[1]])),
            kept_first=int((stage == FIRST).sum()),
            kept_second=int((stage == SECOND).sum()),
            attention=float(shares.sum()),
        )

    def figures(self) -> dict[str, Any]:
        """All numbers as plain JSON; `video_tokens_kept` is by step, and by stage.

        What says which cells were kept is null where a compressor made new tokens of all of them.
        """
        numbers = self._numbers() | self._choice()
        if not self.has_cells:
            numbers |= dict.fromkeys(("kept_first", "kept_second", "attention_kept", "attention_kept_first"))
            numbers["no_cells"] |= dict.fromkeys(("kept_first", "kept_second"))
            numbers["steps"] = [step | dict.fromkeys(_OF_A_STEP) for step in numbers["steps"]]
        return numbers

    def _choice(self) -> dict[str, Any]:
        """What chose, and how it was set."""
        settings, made = self.settings, self.compression
        if made is not None:
            ratio = self.video_tokens / made.seen if made.seen else None
            chosen = {"compressor": made.operator, "compressor_mode": made.name, "compression_ratio": ratio}
            return dict.fromkeys(("pruner", "prune_ratio", "top_p")) | chosen
        return {
            "pruner": settings.pruner,
            "prune_ratio": None if settings.pruner == "none" else settings.prune_ratio,
            "top_p": settings.top_p if settings.pruner == "specvlm" else None,
            **dict.fromkeys(("compressor", "compressor_mode", "compression_ratio")),
        }

    def _numbers(self) -> dict[str, Any]:
        return {
            "num_frames": len(self.frames.pixels),
            "grid": self.grid._asdict(),
            "prompt_tokens": self.prompt_tokens,
            "video_tokens": self.video_tokens,
            "video_tokens_kept": self.seen,
            "kept_first": self.kept(FIRST),
            "kept_second": self.kept(SECOND),
            "attention_to_video": self.attention_to_video,
            "attention_kept": self.attention_kept(),
            "attention_kept_first": self.attention_kept(FIRST),
            "no_cells": self._no_cells(),
            "steps": [asdict(step) | {"kept": step.kept} for step in self.steps],
        }

    def _no_cells(self) -> dict[str, Any]:
        """Video tokens that cover no place, a newline behind the video say."""
        stage, shares = self.stage[self.grid.cells :], self.shares[self.grid.cells :]
        return {
            "video_tokens": len(stage),
            "kept_first": int((stage == FIRST).sum()),
            "kept_second": int((stage == SECOND).sum()),
            "attention": float(shares.sum()),
        }


def look(
    captioner: Captioner,
    frames: Frames,
    prompt: str,
    settings: SpeculationSettings,
    *,
    system: str | None = None,
) -> Inspection:
    """Prefill the target with a video and a prompt, and ask the pruner what the draft would see.

    Args:
        captioner: With a target; a draft is not needed.
        frames: As `read_video` gives them.
        prompt: The user's text, as in `Captioner.caption`.
        settings: Pruner, prune ratio and top-p count; the rest does not matter here.
        system: The system message; None leaves it to the chat template.

    Raises:
        PromptError: The prompt cannot be used.
        PreprocessError: The model's processor refuses these frames.
        GenerationError: The prompt does not fit the model.
        NonFiniteLogitsError: The target's attention is NaN somewhere.
    """
    inputs = captioner.prepare(frames, prompt, system=system).inputs
    scores = _scores(_read(captioner, inputs))
    kept = kept_by_stage(scores, settings)
    stage = _marked(scores, {FIRST: kept.first, SECOND: kept.second})
    grid = captioner.target.family.video_grid(captioner.processor, inputs)
    return Inspection(frames, grid, scores.numpy(), stage, inputs.prompt_tokens, settings)


def look_through_head(
    captioner: Captioner, frames: Frames, prompt: str, *, system: str | None = None
) -> Inspection:
    """Prefill the target with a video and a prompt, and have a trained head's compressor do its part.

    Args:
        captioner: With a target and a head for it.
        frames: As `read_video` gives them.
        prompt: The user's text, as in `Captioner.caption`.
        system: The system message; None leaves it to the chat template.

    Raises:
        ConfigError: The captioner's draft is no head.
        PromptError, PreprocessError, GenerationError, NonFiniteLogitsError: As of `look`.
    """
    draft = captioner.draft
    if not isinstance(draft, HeadDraft):
        raise ConfigError("the draft is no trained head; give a captioner with one, or use look()")
    inputs = captioner.prepare(frames, prompt, system=system).inputs
    read = _read(captioner, inputs)
    scores, settings = _scores(read), SpeculationSettings()
    operator, seen = _compressed(captioner, draft, read, settings)
    kept = torch.arange(len(scores)) if operator == "none" else _kept(draft, scores, operator, settings)
    made = Compression(draft.head.config.compressor.name, operator, seen, kept is not None)
    stage = _marked(scores, {} if kept is None else {SECOND: kept})
    grid = captioner.target.family.video_grid(captioner.processor, inputs)
    return Inspection(frames, grid, scores.numpy(), stage, inputs.prompt_tokens, settings, made)


class _TargetRead(NamedTuple):
    """What the target knows of a prompt, and where it keeps it."""

    prompt: Prompt
    cache: KVCache
    told: TargetPrefill


def _read(captioner: Captioner, inputs: ModelInputs) -> _TargetRead:
    """Prefill the target as for a caption of the same prompt."""
    target = captioner.target
    with torch.inference_mode():
        (prompt,) = embed(target, [ToSee(inputs)])
        cache = target.new_cache(prompt.length)
        (told,) = prefill_target(target, cache, [PrefillRow(prompt, 0)])
        return _TargetRead(prompt, cache, told)


def _scores(read: _TargetRead) -> torch.Tensor:
    """The target's scores, float32 [V] on the CPU."""
    scores = read.told.scores.float().cpu()
    if not bool(scores.isfinite().all()):
        raise NonFiniteLogitsError(
            "the target pays NaN attention to the video; load it in another dtype, bfloat16 or float32"
        )
    return scores


def _marked(scores: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> NDArray[np.int8]:
    """Which stage kept which video token, int8 [V]."""
    stage = np.full(len(scores), DROPPED, np.int8)
    for number, where in kept.items():
        stage[where.cpu().numpy()] = number
    return stage


def _compressed(
    captioner: Captioner, draft: HeadDraft, read: _TargetRead, settings: SpeculationSettings
) -> tuple[str, int]:
    """What the head's compressor used, and how many tokens it made: the head begins as for a caption."""
    target, generation = captioner.target, GenerationSettings()
    rules = logits_rules(captioner.generation_config, generation)
    rule = TokenRule(rules, generation, target.vocabulary, target.device)
    with torch.inference_mode():
        row = DraftRow(0, read.prompt, read.told.scores, int(read.told.logits.argmax()), 1)
        (seen,) = draft.proposer(settings, rule, read.cache).add([row])
    assert seen.compressor is not None
    return seen.compressor, seen.kept


def _kept(
    draft: HeadDraft, scores: torch.Tensor, operator: str, settings: SpeculationSettings
) -> torch.Tensor | None:
    """The video tokens that an operator keeps; None: it makes new ones."""
    generator = torch.Generator().manual_seed(settings.seed)
    return draft.head.compressor.kept(scores, operator, generator)
