"""Qwen2.5-VL (arXiv 2502.13923): M-RoPE with absolute time, window attention in the vision tower, merged patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specvlm.families.base import Family, ModelInputs, VideoGrid


class Qwen25VL(Family):
    """Any size of Qwen2.5-VL, heads tied or untied."""

    name = "qwen2_5_vl"
    position_rows = 3

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

    def embed_videos(self, model: Any, videos: Sequence[ModelInputs]) -> list[torch.Tensor]:
        """Each [V, hidden]: one feature per 2 x 2 patches of two frames. Videos are packed, whatever their sizes."""
        device = next(model.model.visual.parameters()).device
        pixels, grids = (
            torch.cat([video.tensors[name] for video in videos]).to(device)
            for name in ("pixel_values_videos", "video_grid_thw")
        )
        return list(model.model.get_video_features(pixels, grids, return_dict=True).pooler_output)

    def positions(self, model: Any, inputs: ModelInputs) -> torch.Tensor:
        """[3, S]: time, row, column, by the model's own rule; time steps follow the seconds between frames."""
        positions, _ = model.model.get_rope_index(
            inputs.token_ids.cpu(),
            mm_token_type_ids=inputs.tensors["mm_token_type_ids"].cpu(),
            video_grid_thw=inputs.tensors["video_grid_thw"].cpu(),
            second_per_grid_ts=inputs.tensors["second_per_grid_ts"].cpu(),
        )
        return torch.as_tensor(positions)[:, 0]

    def geometry(self, model: Any, processor: Any) -> dict[str, Any]:
        """Patch sizes and normalisation."""
        vision, video = model.config.vision_config, processor.video_processor
        return {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "tokens_per_second": vision.tokens_per_second,
            "image_mean": tuple(video.image_mean),
            "image_std": tuple(video.image_std),
        }
