"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with absolute time in its positions and window attention in its tower."""

from __future__ import annotations

from specvlm.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Any size of Qwen2.5-VL, heads tied or untied. Time steps of positions follow the seconds between frames."""

    name = "qwen2_5_vl"
    vision_geometry = (*Qwen2VL.vision_geometry, "tokens_per_second")
