"""The published shapes of the model families, and models of these shapes with random weights.

What a forward pass costs depends on a model's shape alone, so a pair can be timed without its checkpoints. Weights
are made on the device itself; prompts are made of random tokens and pixels, with no processor or tokenizer. It knows
neither drafts nor clocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
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
)

from specvlm.attention import ATTENTION, register_attention
from specvlm.errors import ConfigError
from specvlm.families import family_of
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM

QWEN, LLAVA = "qwen2_5_vl", "llava_onevision"

# Tokens around the video, as the families' chat templates give for "Describe the video in detail.".
TEXT_BEFORE, TEXT_AFTER = 15, 12
FRAME_SIZE = (360, 640)  # height, width
LLAVA_SIDE = 384
_PATCH, _MERGE, _PAIR = 14, 2, 2  # pixels, patches, frames
_LLAVA_POOL = 2
# Spread of random weights, and of the logits that they give. Sharp logits let dynamic trees grow deep, as a trained
# draft's do; under flat ones the likeliest nodes are all next to the root.
_WEIGHT_STD, _LOGIT_STD = 0.02, 8.0
_NOISE = (1 << 22) + 15  # numbers drawn; weights repeat them from random places on


@dataclass(frozen=True, slots=True)
class TextShape:
    """The decoder, in the words of config.json. `tied`: the LM head is the embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int  # padding included
    tied: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def slot_bytes(self, element: int) -> int:
        """Keys and values of one token in all layers, at `element` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element

    def pass_bytes(self, slots: int, element: int) -> int:
        """What one pass over few tokens must read: all layers, the LM head, and what `slots` tokens left behind."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys) + queries + 2 * keys
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        weights = self.layers * layer + self.hidden + self.vocabulary * self.hidden
        return weights * element + slots * self.slot_bytes(element)


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower."""

    depth: int
    hidden: int
    intermediate: int
    heads: int


@dataclass(frozen=True, slots=True)
class Shape:
    """One published model.

    Attributes:
        name: What the user types.
        checkpoint: Hub id of the model whose config.json this is.
        family: As `model_type` in config.json.
        text: The decoder.
        vision: The vision tower.
        parameters: Of all of it, tied weights once.
        video_token: Id of the video's placeholder.
    """

    name: str
    checkpoint: str
    family: str
    text: TextShape
    vision: VisionShape
    parameters: int
    video_token: int


def _qwen(size: str, text: TextShape, vision_mlp: int, parameters: int) -> Shape:
    """Qwen2.5-VL (arXiv 2502.13923, table 1, and each checkpoint's config.json)."""
    vision = VisionShape(32, 1280, vision_mlp, 16)
    checkpoint = f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    return Shape(f"qwen2.5-vl-{size}", checkpoint, QWEN, text, vision, parameters, 151656)


def _llava(size: str, text: TextShape, parameters: int) -> Shape:
    """LLaVA-OneVision (arXiv 2408.03326): Qwen2 with its vocabulary padded anew, SigLIP less its last layer."""
    vision = VisionShape(26, 1152, 4304, 16)
    checkpoint = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    return Shape(f"llava-onevision-{size}", checkpoint, LLAVA, text, vision, parameters, 151647)


SHAPES = (
    _qwen("3b", TextShape(2048, 11008, 36, 16, 2, 151936, True), 3420, 3_754_622_976),
    _qwen("7b", TextShape(3584, 18944, 28, 28, 4, 152064, False), 3420, 8_292_166_656),
    _qwen("32b", TextShape(5120, 27648, 64, 40, 8, 152064, False), 3456, 33_452_718_336),
    _qwen("72b", TextShape(8192, 29568, 80, 64, 8, 152064, False), 3456, 73_410_777_344),
    _llava("0.5b", TextShape(896, 4864, 24, 14, 2, 152000, True), 893_675_552),
    _llava("7b", TextShape(3584, 18944, 28, 28, 4, 152128, False), 8_030_807_584),
    _llava("72b", TextShape(8192, 29568, 80, 64, 8, 152128, False), 73_181_570_592),
)


def find_shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        ConfigError: There is none.
    """
    found = next((shape for shape in SHAPES if shape.name == name), None)
    if found is None:
        known = ", ".join(shape.name for shape in SHAPES)
        raise ConfigError(f"shape={name!r} is unknown; choose one of {known}")
    return found


def _share(count: int, layers: int, whole: int) -> int:
    return max(1, round(count * layers / whole))


def shrunk(shape: Shape, layers: int, whole: int) -> Shape:
    """The shape with `layers / whole` of its depth, in the decoder and in the vision tower, at least one layer each."""
    text = replace(shape.text, layers=_share(shape.text.layers, layers, whole))
    vision = replace(shape.vision, depth=_share(shape.vision.depth, layers, whole))
    return replace(shape, text=text, vision=vision)


# --- models ---


def _qwen_config(shape: Shape) -> Qwen2_5_VLConfig:
    text, vision = shape.text, shape.vision
    pairs = text.head_dim // 2
    sections = [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]  # of 64: 16, 24, 24
    whole = sorted({*range(7, vision.depth, 8), vision.depth - 1})  # of 32: 7, 15, 23, 31
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    tower = {
        "depth": vision.depth,
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_heads": vision.heads,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _PAIR,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": whole,
        "out_hidden_size": text.hidden,
    }
    decoder = _text_config(text) | {"rope_parameters": rope, "max_position_embeddings": 128000}
    return Qwen2_5_VLConfig(
        text_config=decoder,
        vision_config=tower,
        video_token_id=shape.video_token,
        tie_word_embeddings=text.tied,
    )


def _llava_config(shape: Shape) -> LlavaOnevisionConfig:
    text, vision = shape.text, shape.vision
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "image_size": LLAVA_SIDE,
        "patch_size": _PATCH,
        "vision_use_head": False,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6}
    decoder = _text_config(text) | {"rope_parameters": rope, "max_position_embeddings": 32768}
    return LlavaOnevisionConfig(
        text_config=decoder | {"model_type": "qwen2"},
        vision_config=tower,
        video_token_index=shape.video_token,
        tie_word_embeddings=text.tied,
    )


def _text_config(text: TextShape) -> dict[str, Any]:
    return {
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


def empty_model(shape: Shape, dtype: torch.dtype) -> Any:
    """The stock model of this shape: parameters on the meta device, buffers (rotary frequencies) real."""
    register_attention()
    attention = {"": "sdpa", "text_config": ATTENTION, "vision_config": "sdpa"}
    kind: Any = Qwen2_5_VLForConditionalGeneration
    config: Any = None
    if shape.family == QWEN:
        config = _qwen_config(shape)
    else:
        kind, config = LlavaOnevisionForConditionalGeneration, _llava_config(shape)
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
    penalty = {"repetition_penalty": 1.05} if shape.family == QWEN else {}
    model.generation_config = GenerationConfig(do_sample=False, **penalty)  # type: ignore[no-untyped-call]
    return VideoLM(model.eval(), family_of(model.config, shape.name))


# --- prompts ---


def frame_multiple(shape: Shape) -> int:
    """Frames come in multiples of this many."""
    return _PAIR if shape.family == QWEN else 1


def _grid(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of a frame, scaled to whole merged patches as Qwen2.5-VL's processor does."""
    cell = _PATCH * _MERGE
    height, width = (max(1, round(side / cell)) * _MERGE for side in size)
    return height, width


def video_tokens(shape: Shape, frames: int, size: tuple[int, int]) -> int:
    """V of a video of so many frames; `size`: height and width of each."""
    if shape.family == QWEN:
        rows, columns = _grid(size)
        return frames // _PAIR * (rows // _MERGE) * (columns // _MERGE)
    side = -(-(LLAVA_SIDE // _PATCH) // _LLAVA_POOL)
    return frames * side * side + 1  # and the newline


def vision_patches(shape: Shape, frames: int, size: tuple[int, int]) -> int:
    """Patches that the vision tower sees."""
    if shape.family == QWEN:
        rows, columns = _grid(size)
        return frames // _PAIR * rows * columns
    return frames * (LLAVA_SIDE // _PATCH) ** 2


def prompt_tokens(shape: Shape, frames: int, size: tuple[int, int]) -> int:
    """S of a prompt with such a video."""
    return TEXT_BEFORE + video_tokens(shape, frames, size) + TEXT_AFTER


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
    if min(size) < _PATCH * _MERGE:
        raise ConfigError(f"{given} is too small; give at least 28x28")


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
    count = video_tokens(shape, frames, size)
    is_video = torch.zeros(TEXT_BEFORE + count + TEXT_AFTER, dtype=torch.bool)
    is_video[TEXT_BEFORE : TEXT_BEFORE + count] = True
    highest = min(shape.video_token, shape.text.vocabulary)
    ids = torch.randint(0, highest, is_video.shape, generator=torch.Generator().manual_seed(seed))
    ids = torch.where(is_video, shape.video_token, ids)[None]
    make = _qwen_tensors if shape.family == QWEN else _llava_tensors
    pixels = make(frames, size, is_video, generator)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    return ModelInputs(ids, is_video, tensors)


def _qwen_tensors(
    frames: int, size: tuple[int, int], is_video: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Patches [T * rows * columns, 3 * 2 * 14 * 14]; half a second between frames."""
    rows, columns = _grid(size)
    steps = frames // _PAIR
    shape = (steps * rows * columns, 3 * _PAIR * _PATCH * _PATCH)
    return {
        "mm_token_type_ids": is_video[None].long() * 2,
        "pixel_values_videos": torch.randn(shape, generator=generator, device=generator.device),
        "video_grid_thw": torch.tensor([[steps, rows, columns]]),
        "second_per_grid_ts": torch.tensor([_PAIR * 0.5]),
    }


def _llava_tensors(
    frames: int, size: tuple[int, int], is_video: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Frames [1, F, 3, 384, 384]."""
    shape = (1, frames, 3, LLAVA_SIDE, LLAVA_SIDE)
    return {"pixel_values_videos": torch.randn(shape, generator=generator, device=generator.device)}
