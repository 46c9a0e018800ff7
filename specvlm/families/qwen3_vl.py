"""Qwen3-VL (arXiv 2511.21631): a timestamp before each step in time, and DeepStack (arXiv 2406.04334)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from specvlm.families.base import ModelInputs, VideoFeatures
from specvlm.families.qwen2_vl import Qwen2VL
from specvlm.records import Frames


class Qwen3VL(Qwen2VL):
    """Any size of Qwen3-VL with dense layers, heads tied or untied."""

    name = "qwen3_vl"

    def prepare(self, processor: Any, frames: Frames, prompt: str, system: str | None = None) -> ModelInputs:
        """A lone frame is shown twice, as any last one without a partner is; the processor takes none alone."""
        if len(frames.pixels) == 1:
            twice = np.repeat(frames.pixels, 2, axis=0), np.repeat(frames.times_s, 2)
            frames = frames._replace(pixels=twice[0], times_s=twice[1])
        return super().prepare(processor, frames, prompt, system)

    def _metadata(self, frames: Frames) -> VideoMetadata:
        """The processor prints the time of each step; at one frame a second, its frame numbers are seconds."""
        seconds: list[Any] = [float(time_s) for time_s in frames.times_s]
        return replace(super()._metadata(frames), fps=1.0, frames_indices=seconds)

    def see(self, model: Any, videos: Sequence[ModelInputs]) -> list[VideoFeatures]:
        """One feature per 2 x 2 patches of two frames, and the same of some layers inside the tower."""
        seen = self._tower(model, videos)
        counts = [len(embeds) for embeds in seen.pooler_output]
        layers = [
            torch.split(layer, counts)
            if isinstance(layer, torch.Tensor)
            else layer  # one tensor in transformers 5.17
            for layer in seen.deepstack_features
        ]
        return [
            VideoFeatures(embeds, tuple(layer[index] for layer in layers))
            for index, embeds in enumerate(seen.pooler_output)
        ]

    def text_arguments(self, where: torch.Tensor, deep: Sequence[torch.Tensor]) -> dict[str, Any]:
        """What DeepStack adds, and where."""
        return {"visual_pos_masks": where, "deepstack_visual_embeds": list(deep)}


class Qwen3VLMoe(Qwen3VL):
    """Any size of Qwen3-VL whose layers are mixtures of experts."""

    name = "qwen3_vl_moe"

    @property
    def prompts_like(self) -> str:
        """A dense model can draft for a mixture."""
        return Qwen3VL.name
