"""LLaVA-OneVision (arXiv 2408.03326): SigLIP frames, each pooled 2 x 2, and one newline token behind them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from specvlm.families.base import Family, ModelInputs, VideoFeatures, VideoGrid


class LlavaOnevision(Family):
    """Any size of LLaVA-OneVision in the Hugging Face layout."""

    name = "llava_onevision"
    position_rows = 1

    def frame_multiple(self, processor: Any) -> int:
        """Frames are encoded one by one."""
        return 1

    def processor_options(self, processor: Any) -> dict[str, Any]:
        """Nothing whose default changes."""
        return {}

    def video_token(self, processor: Any) -> str:
        """The placeholder of one pooled feature, or of the newline."""
        return str(processor.video_token)

    def _content(self, before: str, after: str, video_token: str) -> list[dict[str, str]]:
        """The family's template puts every video before every text; text before it is written around a placeholder."""
        if before:
            return [{"type": "text", "text": f"{before}{video_token}{after}"}]
        return super()._content(before, after, video_token)

    def video_grid(self, processor: Any, inputs: ModelInputs) -> VideoGrid:
        """A square of pooled features for each frame; the newline behind the last one is no cell."""
        frames = inputs.tensors["pixel_values_videos"].shape[1]
        side = math.isqrt((inputs.video_tokens - 1) // frames)
        return VideoGrid(frames, side, side, 1)

    def text_model(self, model: Any) -> Any:
        """The decoder."""
        return model.model.language_model

    def see(self, model: Any, videos: Sequence[ModelInputs]) -> list[VideoFeatures]:
        """F * ceil(side / 2)^2 pooled features and the newline for each video. All frames are one batch."""
        device = next(model.model.vision_tower.parameters()).device
        pixels = [video.tensors["pixel_values_videos"] for video in videos]
        frames = [one.shape[1] for one in pixels]
        features = model.model.get_video_features(
            # A lone video keeps its layout in memory: in another one, convolutions round otherwise than in stock.
            (pixels[0] if len(pixels) == 1 else torch.cat(pixels, dim=1)).to(device),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        newline = model.model.image_newline[None].to(device, model.dtype)
        # One newline follows the frames of each video; transformers 5.17 leaves it to the model's own forward.
        per_frame = sum(video.video_tokens - 1 for video in videos) // sum(frames)
        by_frame = torch.as_tensor(features)[0][: per_frame * sum(frames)]
        return [
            VideoFeatures(torch.cat((part, newline)))
            for part in torch.split(by_frame, [per_frame * count for count in frames])
        ]

    def positions(self, model: Any, inputs: ModelInputs) -> torch.Tensor:
        """[1, S]: 0..S-1."""
        return torch.arange(inputs.prompt_tokens)[None]

    def geometry(self, model: Any, processor: Any) -> dict[str, Any]:
        """Frame and patch size, normalisation, and which features of the tower are taken."""
        vision, video = model.config.vision_config, processor.video_processor
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
            "image_mean": tuple(video.image_mean),
            "image_std": tuple(video.image_std),
        }
