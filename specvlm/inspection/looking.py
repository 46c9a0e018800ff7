"""The target's prefill and the pruner's choice for one video, as numbers. Draws nothing, needs no draft."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from specvlm.config import PrunerName, SpeculationSettings
from specvlm.errors import NonFiniteLogitsError
from specvlm.families.base import ModelInputs, VideoGrid
from specvlm.prefill import embed, prefill_target
from specvlm.pruning import kept_by_stage
from specvlm.records import Frames

if TYPE_CHECKING:
    from specvlm.captioner import Captioner

DROPPED, FIRST, SECOND = 0, 1, 2  # values of `Inspection.stage`

# What the stages are called with each pruner.
_STAGE_NAMES: dict[PrunerName, dict[int, str]] = {
    "specvlm": {FIRST: "stage I, most attention", SECOND: "stage II, evenly over the rest"},
    "attention": {FIRST: "most attention"},
    "uniform": {SECOND: "evenly over the video"},
    "random": {SECOND: "at random"},
    "window": {SECOND: "the end of the video"},
    "none": {SECOND: "all of them"},
}


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
class Step:
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
    """

    frames: Frames
    grid: VideoGrid
    scores: NDArray[np.float32]
    stage: NDArray[np.int8]
    prompt_tokens: int
    settings: SpeculationSettings

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
        """The stages that this pruner has."""
        return tuple(
            StageFigures(stage, name, self.kept(stage), self.attention_kept(stage))
            for stage, name in _STAGE_NAMES[self.settings.pruner].items()
        )

    @property
    def pruner_words(self) -> str:
        """The pruner and the settings that it heeds."""
        settings = self.settings
        if settings.pruner == "none":
            return "none"
        words = f"{settings.pruner}, prune ratio {settings.prune_ratio:g}"
        return words + (f", top-p {settings.top_p:g}" if settings.pruner == "specvlm" else "")

    def cells(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the video tokens [V] by place, [T, rows, columns]."""
        grid = self.grid
        return values[: grid.cells].reshape(grid.steps, grid.rows, grid.columns)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The grid's T steps in time."""
        return tuple(self._step(number) for number in range(self.grid.steps))

    def _step(self, number: int) -> Step:
        last = len(self.frames.pixels) - 1
        begin = number * self.grid.frames_per_step
        frames = begin, min(begin + self.grid.frames_per_step - 1, last)
        stage, shares = self.cells(self.stage)[number], self.cells(self.shares)[number]
        times_s = self.frames.times_s
        return Step(
            frames=frames,
            times_s=(float(times_s[frames[0]]), float(times_s[frames[1]])),
            kept_first=int((stage == FIRST).sum()),
            kept_second=int((stage == SECOND).sum()),
            attention=float(shares.sum()),
        )

    def figures(self) -> dict[str, Any]:
        """All numbers as plain JSON; `video_tokens_kept` is by step, and by stage."""
        settings = self.settings
        return {
            "num_frames": len(self.frames.pixels),
            "grid": self.grid._asdict(),
            "prompt_tokens": self.prompt_tokens,
            "video_tokens": self.video_tokens,
            "video_tokens_kept": self.kept(),
            "kept_first": self.kept(FIRST),
            "kept_second": self.kept(SECOND),
            "attention_to_video": self.attention_to_video,
            "attention_kept": self.attention_kept(),
            "attention_kept_first": self.attention_kept(FIRST),
            "pruner": settings.pruner,
            "prune_ratio": None if settings.pruner == "none" else settings.prune_ratio,
            "top_p": settings.top_p if settings.pruner == "specvlm" else None,
            "no_cells": self._no_cells(),
            "steps": [asdict(step) | {"kept": step.kept} for step in self.steps],
        }

    def _no_cells(self) -> dict[str, Any]:
        """Video tokens that stand for no place, a newline behind the video say."""
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
    scores = _scores(captioner, inputs)
    stage = np.full(len(scores), DROPPED, np.int8)
    kept = kept_by_stage(scores, settings)
    stage[kept.first.numpy()] = FIRST
    stage[kept.second.numpy()] = SECOND
    return Inspection(
        frames=frames,
        grid=captioner.target.family.video_grid(captioner.processor, inputs),
        scores=scores.numpy(),
        stage=stage,
        prompt_tokens=inputs.prompt_tokens,
        settings=settings,
    )


def _scores(captioner: Captioner, inputs: ModelInputs) -> torch.Tensor:
    """The target's scores, float32 [V] on the CPU, as a caption of the same prompt would have them."""
    target = captioner.target
    with torch.inference_mode():
        prompt = embed(target, inputs)
        scores = prefill_target(target, prompt, target.new_cache(1, prompt.length), 0).scores
        scores = scores.float().cpu()
    if not bool(scores.isfinite().all()):
        raise NonFiniteLogitsError(
            "the target pays NaN attention to the video; load it in another dtype, bfloat16 or float32"
        )
    return scores
