"""Qwen2-VL (arXiv 2409.12191): M-RoPE, patches merged 2 x 2, frames in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from specvlm.families.base import Family, ModelInputs, VideoFeatures, VideoGrid

# What the model's own rule of positions reads of the tensors, where the processor makes it.
_POSITIONED_BY = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")


class Qwen2VL(Family):
    """Any size of Qwen2-VL, heads tied or untied; and what its successors have in common with it."""

    name = "qwen2_vl"
    position_rows = 3
    vision_geometry: ClassVar[tuple[str, ...]] = ("patch_size", "temporal_patch_size", "spatial_merge_size")

    def frame_multiple(self, processor: Any) -> int:
        """Frames are merged in pairs by the patch embedding."""
        return int(processor.video_processor.temporal_patch_size)

    def processor_options(self, processor: Any) -> dict[str, Any]:
        """Bound a video's total pixels as the reference implementation does, where this `transformers` can.

        Its default changes between releases of `transformers`, and with it the frames of long videos.
        """
        known = hasattr(processor.video_processor, "cap_pixels_per_frame")
        return {"cap_pixels_per_frame": True} if known else {}

    def video_token(self, processor: Any) -> str:
        """The placeholder of one merged patch."""
        return str(processor.video_token)

    def video_grid(self, processor: Any, inputs: ModelInputs) -> VideoGrid:
        """Patches are merged 2 x 2, frames in pairs; an odd number of frames ends with its last one twice."""
        steps, rows, columns = inputs.tensors["video_grid_thw"][0].tolist()
        merged = int(processor.video_processor.merge_size)
        return VideoGrid(steps, rows // merged, columns // merged, self.frame_multiple(processor))

    def text_model(self, model: Any) -> Any:
        """The decoder."""
        return model.model.language_model

    def see(self, model: Any, videos: Sequence[ModelInputs]) -> list[VideoFeatures]:
        """One feature per 2 x 2 patches of two frames. Videos are packed, whatever their sizes."""
        seen = self._tower(model, videos)
        return [VideoFeatures(embeds) for embeds in seen.pooler_output]

    def _tower(self, model: Any, videos: Sequence[ModelInputs]) -> Any:
        """What the vision tower gives for several videos, by the names of `transformers`, a tensor for each video."""
        device = next(model.model.visual.parameters()).device
        pixels, grids = (
            torch.cat([video.tensors[name] for video in videos]).to(device)
            for name in ("pixel_values_videos", "video_grid_thw")
        )
        return model.model.get_video_features(pixels, grids, return_dict=True)

    def positions(self, model: Any, inputs: ModelInputs) -> torch.Tensor:
        """[3, S]: time, row, column, by the model's own rule."""
        told = {name: inputs.tensors[name].cpu() for name in _POSITIONED_BY if name in inputs.tensors}
        positions, _ = model.model.get_rope_index(inputs.token_ids.cpu(), **told)
        return torch.as_tensor(positions)[:, 0]

    def geometry(self, model: Any, processor: Any) -> dict[str, Any]:
        """Patch sizes and normalisation."""
        vision, video = model.config.vision_config, processor.video_processor
        return {name: getattr(vision, name) for name in self.vision_geometry} | {
            "image_mean": tuple(video.image_mean),
            "image_std": tuple(video.image_std),
        }
