"""Tiny random models of the real architectures, with real processors, in milliseconds on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.demo.models import llava_processor, qwen_processor
from recipes.demo.tokenizer import tokenizer_from
from specvlm.attention import ATTENTION, register_attention
from specvlm.captioner import Captioner, ModelInfo, PreparedVideo
from specvlm.config import FrameSettings
from specvlm.drafts.base import Draft
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.families import family_of
from specvlm.model import VideoLM
from specvlm.records import Caption, Frames

FamilyName = Literal["qwen", "llava", "qwen2", "qwen3", "qwen3-moe"]
_PROCESSORS: dict[str, Any] = {}


@dataclass(frozen=True)
class Size:
    """One random text model. Larger `spread` makes sharper choices."""

    layers: int = 2
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 300
    tied: bool = False
    seed: int = 0
    spread: float = 0.3


def processor_for(family: FamilyName) -> Any:
    """A real processor over a byte vocabulary; shared, since it has no state."""
    if family not in _PROCESSORS:
        alphabet = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
        tokenizer = tokenizer_from(alphabet, [], "llava" if family == "llava" else "qwen")
        kinds: dict[FamilyName, Any] = {"qwen": qwen_processor, "llava": llava_processor}
        _PROCESSORS[family] = kinds.get(family, partial(_processor, family))(tokenizer)
    return _PROCESSORS[family]


def _processor(family: FamilyName, tokenizer: Any) -> Any:
    """Of the families that have no demo pair: any clip becomes about 96 x 96 pixels."""
    options: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    options["size"] = {"shortest_edge": 8192, "longest_edge": 9800}
    kind: Any = Qwen2VLProcessor if family == "qwen2" else Qwen3VLProcessor
    video: Any = Qwen2VLVideoProcessor if family == "qwen2" else Qwen3VLVideoProcessor
    return kind(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=tokenizer,
        video_processor=video(**options, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    )


def _text(size: Size, end: int) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 65536,
        "initializer_range": size.spread,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
        "tie_word_embeddings": size.tied,
    }


_MODELS: dict[FamilyName, tuple[Any, Any]] = {
    "qwen": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen3": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3-moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
    "llava": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}
_TOWERS: dict[FamilyName, dict[str, Any]] = {
    "qwen": {"window_size": 48, "fullatt_block_indexes": [1], "hidden_size": 32, "intermediate_size": 64},
    "qwen2": {"embed_dim": 32, "mlp_ratio": 2},
    # More DeepStack layers than the smallest text model has layers, which adds those that it can.
    "qwen3": {"hidden_size": 32, "intermediate_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1]},
}
_TOWERS["qwen3-moe"] = _TOWERS["qwen3"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


def _qwen_config(family: FamilyName, size: Size, tokenizer: Any) -> Any:
    pair = size.width // size.heads // 2
    sections = [pair - 2 * (pair // 3), pair // 3, pair // 3]
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(f"<|{n}_pad|>") for n in ("image", "video")}
    ids |= {
        f"vision_{n}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{n}|>") for n in ("start", "end")
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "initializer_range": 0.2} | _TOWERS[family]
    vision["hidden_size" if family == "qwen2" else "out_hidden_size"] = size.width
    text = _text(size, tokenizer.convert_tokens_to_ids("<|im_end|>")) | {"rope_parameters": rope}
    text["head_dim"] = size.width // size.heads
    if family == "qwen3-moe":
        text |= _EXPERTS
    kind, _ = _MODELS[family]
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=size.tied, **ids)


def _llava_config(size: Size, tokenizer: Any) -> LlavaOnevisionConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 12,
        "vision_use_head": False,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = _text(size, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return LlavaOnevisionConfig(
        text_config=text | {"rope_parameters": rope, "model_type": "qwen2"},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[96, 96]],
        tie_word_embeddings=size.tied,
    )


def tiny_model(family: FamilyName, size: Size) -> Any:
    """A random stock model in fp32; its text part uses this library's attention, stock sdpa without a plan."""
    register_attention()
    tokenizer = processor_for(family).tokenizer
    torch.manual_seed(size.seed)
    config = _llava_config(size, tokenizer) if family == "llava" else _qwen_config(family, size, tokenizer)
    _, kind = _MODELS[family]
    attention = {"": "sdpa", "text_config": ATTENTION, "vision_config": "sdpa"}
    model = kind._from_config(config, attn_implementation=attention)
    # Random biases and norms, so that no path through the model is trivially zero.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
    return model.eval().requires_grad_(False)


def tiny_lm(family: FamilyName, size: Size) -> VideoLM:
    """A random model, ready for the library."""
    model = tiny_model(family, size)
    return VideoLM(model, family_of(model.config, "tiny"))


def tiny_captioner(family: FamilyName, target: Size, draft: Size | None) -> Captioner:
    """A captioner over random models."""
    large = tiny_lm(family, target)
    small: Draft | None = None
    if draft is not None:
        guess = tiny_lm(family, draft)
        small = SmallModelDraft(guess, min(large.vocabulary, guess.vocabulary))
    info = ModelInfo("tiny", None, "tiny" if draft else None, None, family, "float32", "cpu", "", {})
    return Captioner(large, processor_for(family), small, info, FrameSettings())


def random_frames(seed: int, frames: int = 4, height: int = 32, width: int = 48) -> Frames:
    """Noise with a drifting gradient; times half a second apart."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Frames(pixels, np.arange(frames) * 0.5)


def stock_ids(model: Any, tensors: Any, max_new_tokens: int, **options: Any) -> tuple[int, ...]:
    """What stock `generate()` writes, greedy unless told otherwise."""
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    with torch.inference_mode():
        out = model.generate(**tensors, **options)
    return tuple(out[0, tensors["input_ids"].shape[1] :].tolist())


def caption_rows(captioner: Captioner, videos: Sequence[PreparedVideo], **options: Any) -> list[Caption]:
    """Caption videos all at once; -> their captions, in order.

    Raises:
        SpecvlmError: Why one of them has no caption.
    """
    found: dict[int, Caption] = {}
    many = captioner.caption_many(videos, batch_size=max(len(videos), 1), on_error="raise", **options)
    for done in many:
        assert done.caption is not None
        found[done.index] = done.caption
    return [found[index] for index in range(len(videos))]
