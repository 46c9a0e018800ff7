"""Models of published shapes with random weights.

What a forward pass costs depends on a model's shape alone, so a pair can be timed without its checkpoints. Weights
are made on the device itself; prompts are made of random tokens and pixels, with no processor or tokenizer. It knows
neither drafts nor clocks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from specvlm.attention import ATTENTION, register_attention
from specvlm.errors import ConfigError
from specvlm.families import family_of
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM
from specvlm.published import (
    LLAVA,
    LLAVA_SIDE,
    MERGE,
    PAIR,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    QWEN25,
    STAMP_AFTER,
    STAMP_BEFORE,
    TEXT_AFTER,
    TEXT_BEFORE,
    Shape,
    TextShape,
    frame_multiple,
    frame_tokens,
    has_stamps,
    patch_grid,
    prompt_tokens,
    steps_of,
)

FRAME_SIZE = (360, 640)  # height, width
# Spread of random weights, and of the logits that they give. Sharp logits let dynamic trees grow deep, as a trained
# draft's do; under flat ones the likeliest nodes are all next to the root.
_WEIGHT_STD, _LOGIT_STD = 0.02, 8.0
_NOISE = (1 << 22) + 15  # numbers drawn; weights repeat them from random places on


def _share(count: int, layers: int, whole: int) -> int:
    return max(1, round(count * layers / whole))


def shrunk(shape: Shape, layers: int, whole: int) -> Shape:
    """The shape with `layers / whole` of its depth, in the decoder and in the vision tower, at least one layer each."""
    text = replace(shape.text, layers=_share(shape.text.layers, layers, whole))
    depth = _share(shape.vision.depth, layers, whole)
    deepstack = tuple(at for at in shape.vision.deepstack if at < depth)
    return replace(shape, text=text, vision=replace(shape.vision, depth=depth, deepstack=deepstack))


# --- models ---


def _qwen_config(shape: Shape) -> dict[str, Any]:
    text = shape.text
    pairs = text.head_dim // 2
    sections = [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]  # of 64: 16, 24, 24
    if shape.text.normed:
        sections = [pairs - 2 * (5 * pairs // 16), 5 * pairs // 16, 5 * pairs // 16]  # of 64: 24, 20, 20
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    decoder = _text_config(text) | {"rope_parameters": rope, "max_position_embeddings": 128000}
    return {
        "text_config": decoder | {"head_dim": text.head_dim},
        "vision_config": _qwen_tower(shape),
        "video_token_id": shape.video_token,
        "tie_word_embeddings": text.tied,
    }


def _qwen_tower(shape: Shape) -> dict[str, Any]:
    vision, width = shape.vision, shape.text.hidden
    tower: dict[str, Any] = {
        "depth": vision.depth,
        "num_heads": vision.heads,
        "patch_size": vision.patch,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": PAIR,
    }
    if shape.family == QWEN2:
        ratio = vision.intermediate // vision.hidden
        return tower | {"embed_dim": vision.hidden, "mlp_ratio": ratio, "hidden_size": width}
    tower |= {"hidden_size": vision.hidden, "intermediate_size": vision.intermediate}
    tower["out_hidden_size"] = width
    if shape.family == QWEN25:
        whole = sorted({*range(7, vision.depth, 8), vision.depth - 1})  # of 32: 7, 15, 23, 31
        return tower | {"tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": whole}
    return tower | {"deepstack_visual_indexes": list(vision.deepstack)}


def _llava_config(shape: Shape) -> dict[str, Any]:
    text, vision = shape.text, shape.vision
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "image_size": LLAVA_SIDE,
        "patch_size": vision.patch,
        "vision_use_head": False,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6}
    decoder = _text_config(text) | {"rope_parameters": rope, "max_position_embeddings": 32768}
    return {
        "text_config": decoder | {"model_type": "qwen2"},
        "vision_config": tower,
        "video_token_index": shape.video_token,
        "tie_word_embeddings": text.tied,
    }


def _text_config(text: TextShape) -> dict[str, Any]:
    experts = {}
    if text.experts is not None:
        experts = {
            "num_experts": text.experts.count,
            "num_experts_per_tok": text.experts.active,
            "moe_intermediate_size": text.experts.intermediate,
        }
    return experts | {
        "vocab_size": text.vocabulary,
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": text.tied,
    }


_KINDS: dict[str, tuple[Any, Any]] = {
    QWEN2: (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    QWEN25: (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    QWEN3: (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    QWEN3_MOE: (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
    LLAVA: (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}


def empty_model(shape: Shape, dtype: torch.dtype) -> Any:
    """The stock model of this shape: parameters on the meta device, buffers (rotary frequencies) real."""
    register_attention()
    attention = {"": "sdpa", "text_config": ATTENTION, "vision_config": "sdpa"}
    described, kind = _KINDS[shape.family]
    config = described(**(_llava_config(shape) if shape.family == LLAVA else _qwen_config(shape)))
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    return model


def parameter_count(shape: Shape) -> int:
    """Parameters of a model of this shape, tied weights once."""
    return sum(parameter.numel() for parameter in empty_model(shape, torch.bfloat16).parameters())


class _Filler:
    """Gives parameters their memory and random values, on the device itself."""

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self._noise = torch.randn(_NOISE, generator=generator, device=device).repeat(2)
        self._places, self._device = random.Random(seed), device
        self._scaled: dict[float, torch.Tensor] = {}
        self._made: dict[int, nn.Parameter] = {}  # tied weights stay one

    def parameter(self, meta: nn.Parameter, name: str, std: float) -> nn.Parameter:
        """A parameter like `meta`: matrices random, norms one, biases zero."""
        if id(meta) not in self._made:
            real = torch.empty(meta.shape, dtype=meta.dtype, device=self._device)
            if meta.ndim > 1:
                self._randomise(real.view(-1), std)
            else:
                real.fill_(0.0 if name == "bias" else 1.0)
            self._made[id(meta)] = nn.Parameter(real, requires_grad=False)
        return self._made[id(meta)]

    def _randomise(self, flat: torch.Tensor, std: float) -> None:
        if std not in self._scaled:
            self._scaled[std] = (self._noise * std).to(flat.dtype)
        for piece in torch.split(flat, _NOISE):
            start = self._places.randrange(_NOISE)
            piece.copy_(self._scaled[std][start : start + len(piece)])


@torch.no_grad()
def _fill(model: Any, device: torch.device, seed: int) -> None:
    filler = _Filler(device, seed)
    head = model.get_output_embeddings().weight
    sharp = _LOGIT_STD / head.shape[1] ** 0.5  # the last norm makes each hidden value about 1
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is not None:
                module._parameters[name] = filler.parameter(
                    meta, name, sharp if meta is head else _WEIGHT_STD
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> VideoLM:
    """A model of this shape with random weights, made on the device; the host's memory holds none of it.

    Its captions have no end of sequence, so that lengths are exact; Qwen2.5-VL keeps the repetition penalty of its
    published generation config, since that is work to be done for every node.
    """
    model = empty_model(shape, dtype)
    _fill(model, device, seed)
    penalty = {"repetition_penalty": 1.05} if shape.family == QWEN25 else {}
    model.generation_config = GenerationConfig(do_sample=False, **penalty)  # type: ignore[no-untyped-call]
    return VideoLM(model.eval(), family_of(model.config, shape.name))


# --- prompts ---


def check_frames(shape: Shape, frames: int, size: tuple[int, int]) -> None:
    """Refuse frames that the family does not take.

    Raises:
        ConfigError: It does not.
    """
    multiple = frame_multiple(shape)
    if frames < 1 or frames % multiple:
        raise ConfigError(f"num_frames={frames} does not suit {shape.name}; give a multiple of {multiple}")
    given = f"frame_size={size[0]}x{size[1]}"
    if shape.family == LLAVA and size != frame_size_of(shape):
        raise ConfigError(
            f"{given} does not suit {shape.name}, which scales every frame to 384x384; leave it out"
        )
    cell = shape.vision.patch * MERGE
    if min(size) < cell:
        raise ConfigError(f"{given} is too small; give at least {cell}x{cell}")


def frame_size_of(shape: Shape) -> tuple[int, int]:
    """Height and width of a frame where nobody says: those of the preset's limit, or the one that there is."""
    return (LLAVA_SIDE, LLAVA_SIDE) if shape.family == LLAVA else FRAME_SIZE


def random_inputs(
    shape: Shape, frames: int, size: tuple[int, int], device: torch.device, seed: int = 0
) -> ModelInputs:
    """A prompt with a video, as the family's processor would make it, of random tokens and pixels.

    Raises:
        ConfigError: The family does not take so many frames, or frames so small.
    """
    check_frames(shape, frames, size)
    generator = torch.Generator(device).manual_seed(seed)
    video_at = _video_at(shape, frames, size)
    is_video = torch.zeros(prompt_tokens(shape, frames, size), dtype=torch.bool)
    is_video[video_at] = True
    highest = min(shape.video_token, shape.text.vocabulary)
    ids = torch.randint(0, highest, is_video.shape, generator=torch.Generator().manual_seed(seed))
    ids = torch.where(is_video, shape.video_token, ids)[None]
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == LLAVA:
        tensors |= _llava_tensors(frames, generator)
    else:
        tensors |= _qwen_tensors(shape, frames, size, generator)
        tensors["mm_token_type_ids"] = is_video[None].long() * 2
    return ModelInputs(ids, video_at, tensors)


def _video_at(shape: Shape, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """Where the video tokens are, int64 [V]: behind the time of each step where the family tells it."""
    if not has_stamps(shape):
        return torch.arange(TEXT_BEFORE, prompt_tokens(shape, frames, size) - TEXT_AFTER)
    each = frame_tokens(shape, size)
    firsts = STAMP_BEFORE + torch.arange(steps_of(shape, frames)) * (STAMP_BEFORE + each + STAMP_AFTER)
    return (TEXT_BEFORE + firsts[:, None] + torch.arange(each)).flatten()


def _qwen_tensors(
    shape: Shape, frames: int, size: tuple[int, int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Patches [T * rows * columns, 3 * 2 * patch * patch]; half a second between frames."""
    rows, columns = patch_grid(shape, size)
    steps = steps_of(shape, frames)
    patches = (steps * rows * columns, 3 * PAIR * shape.vision.patch**2)
    tensors = {
        "pixel_values_videos": torch.randn(patches, generator=generator, device=generator.device),
        "video_grid_thw": torch.tensor([[steps, rows, columns]]),
    }
    if shape.family == QWEN25:
        tensors["second_per_grid_ts"] = torch.tensor([PAIR * 0.5])
    return tensors


def _llava_tensors(frames: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Frames [1, F, 3, 384, 384]."""
    shape = (1, frames, 3, LLAVA_SIDE, LLAVA_SIDE)
    return {"pixel_values_videos": torch.randn(shape, generator=generator, device=generator.device)}
