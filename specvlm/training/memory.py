"""What learning from one sample takes in memory, estimated beforehand, against what is free.

The estimate counts what grows with the sample: slabs, the target's passes, its vision tower, logits in float32, the
head's activations; and what an optimiser that has not stepped yet will take. Weights that are loaded are no longer
free, so they are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specvlm.drafts.compressor import CompressorConfig, stretches
from specvlm.drafts.head_model import HeadModel
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM

_MARGIN = 1.2  # kernels' own space, fragments
_ROUND_NODES = 64  # slots of a round, about
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class SampleSize:
    """How large a sample is, and what is done with it.

    Attributes:
        inputs: What the processor made of video and prompt.
        written: Tokens of its caption, or the most that there can be.
        unroll: Further passes of the head.
        moments: AdamW has no state yet, and will.
    """

    inputs: ModelInputs
    written: int
    unroll: int = 0
    moments: bool = False

    @property
    def tokens(self) -> int:
        """Of prompt and caption."""
        return self.inputs.prompt_tokens + self.written


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, by where they are needed."""

    target: int
    head: int


def need(target: VideoLM, head: HeadModel, sample: SampleSize) -> Need:
    """Estimate what a sample takes in addition to what is allocated."""
    logits = sample.written * target.vocabulary
    passes = 1 + sample.unroll
    size = _size(target.dtype)
    of_target = _slabs(target, sample) + _passes(target, sample) + _tower(target, sample.inputs)
    of_target += logits * (2 * _FLOAT + passes * (size + _FLOAT))
    of_head = logits * _FLOAT * (1 + 4 * passes) + _layer(target, head, sample)
    weights = sum(weight.numel() for weight in head.parameters())
    of_head += weights * (_size(head.dtype) + (2 * _FLOAT if sample.moments else 0))
    return Need(int(_MARGIN * of_target), int(_MARGIN * of_head))


def shortage(target: VideoLM, head: HeadModel, sample: SampleSize) -> str | None:
    """Say what is missing to learn from a sample; None: nothing is, as far as is known."""
    needed = need(target, head, sample)
    devices = {weight.device for weight in target.model.parameters()} | {target.device}
    if head.device in devices:
        demands = [(devices, needed.target + needed.head)]
    else:
        demands = [(devices, needed.target), ({head.device}, needed.head)]
    for places, wanted in demands:
        free = [free_bytes(device) for device in places]
        if None not in free and sum(map(int, free)) < wanted:  # type: ignore[arg-type]
            where = ", ".join(sorted(map(str, places)))
            return (
                f"{sample.inputs.prompt_tokens} prompt tokens and {sample.written} of a caption need about "
                f"{_gib(wanted)} in addition to the loaded models, and {where} has {_gib(sum(map(int, free)))} free"  # type: ignore[arg-type]
            )
    return None


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None: unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _slabs(target: VideoLM, sample: SampleSize) -> int:
    """Keys, values and kept features of prompt, caption and a round."""
    config = target.text.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    each += config.hidden_size
    return int((sample.tokens + _ROUND_NODES) * each * _size(target.dtype))


def _passes(target: VideoLM, sample: SampleSize) -> int:
    """One layer's activations over all tokens, the scores' attention, and the example that is kept."""
    config, size = target.text.config, _size(target.dtype)
    kept = 4 * config.hidden_size  # embeddings and features, and the example's own of both
    layer = 6 * config.hidden_size + 3 * _forward_width(config)
    video = sample.inputs.video_tokens
    scores = config.num_attention_heads * (sample.inputs.prompt_tokens - video) * video * _FLOAT
    return int(sample.tokens * (kept + layer) * size + scores)


def _tower(target: VideoLM, inputs: ModelInputs) -> int:
    """The vision tower's activations over all patches."""
    config: Any = target.model.config.vision_config
    pixels = max((value.numel() for value in inputs.tensors.values() if value.is_floating_point()), default=0)
    patch = 3 * config.patch_size**2 * getattr(config, "temporal_patch_size", 1)
    size = _size(target.dtype)
    hidden = getattr(
        config, "embed_dim", config.hidden_size
    )  # Qwen2-VL calls the decoder's width `hidden_size`
    inner = int(hidden * config.mlp_ratio) if hasattr(config, "mlp_ratio") else config.intermediate_size
    return int(pixels * size + pixels // patch * (8 * hidden + 2 * inner) * size)


def _layer(target: VideoLM, head: HeadModel, sample: SampleSize) -> int:
    """What the head keeps for its gradient: pairs of all tokens, the layer over those that are left, masks."""
    config, size = target.text.config, _size(head.dtype)
    hidden = config.hidden_size
    pairs = sample.tokens * 9 * hidden * size
    left = _left(head.config.compressor, stretches(sample.inputs.video_at))
    first = sample.tokens - sample.inputs.video_tokens + left
    each = (14 * hidden + 4 * _forward_width(config)) * size
    masks = first * first * (1 + _FLOAT + 2 * size)
    more = sample.unroll * sample.written * (each + (first + sample.unroll * sample.written) * (1 + 2 * size))
    return int(pairs + first * each + masks + more)


def _forward_width(config: Any) -> int:
    """Width of the feed-forward layer, or of those of the experts that are used for one token."""
    if experts := getattr(config, "num_experts_per_tok", 0):
        return int(experts * config.moe_intermediate_size)
    return int(config.intermediate_size)


def _left(config: CompressorConfig, counts: Sequence[int]) -> int:
    """Video tokens that a compressor leaves of stretches of so many, at most."""
    if config.mode == "none":
        return sum(counts)
    few = sum(-(-count // max(1, int(config.ratio))) for count in counts)
    each = {"resampler": config.queries * len(counts), "text-only": 0}
    left = [each.get(name, few) for name in config.operators]
    return sum(left) if config.mode == "concat" else max(left)


def _size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
