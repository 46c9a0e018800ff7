"""Sizes, processors and folders of the demo checkpoints, all of stock `transformers` classes.

Only the sizes are ours. The targets are deep and narrow because one decoding step on a CPU costs about a
constant per layer: a deep target leaves a draft of one layer something to save, as a large one does on a GPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.demo.tokenizer import Family, token_id, train_tokenizer

Role = Literal["target", "draft"]

FRAMES: Final = 8
CELL: Final = 16
"""Side of one Qwen video token in pixels: patches of 8, merged 2 by 2."""
LLAVA_SIDE: Final = 96
LLAVA_PATCH: Final = 12
HEAD_DIM: Final = 32
QWEN_REPETITION_PENALTY: Final = 1.05
"""As the checkpoints of Qwen2.5-VL ship it, so that the tool meets it here too."""
_QWEN_PIXELS: Final = {"shortest_edge": 8192, "longest_edge": 9800}
_QWEN3_FRAME_TOKENS: Final = 38
"""Most video tokens that a pair of frames may take; 36 make a square picture."""
_QWEN3_MOST_FRAMES: Final = 768
_QWEN3_GRID: Final = 12
"""Side of the grid of learned positions, in patches."""
_HALF: Final = [0.5, 0.5, 0.5]
_PATCHES: Final[dict[str, Any]] = {"patch_size": CELL // 2, "merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class Sizes:
    """What differs between the checkpoints.

    Training starts with `first_layers` text layers. What the vision layers in `deepstack` give is added to the
    hidden states behind the first text layers, one each.
    """

    vocab_size: int
    text_width: int
    text_mlp: int
    text_layers: int
    first_layers: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    tied: bool
    deepstack: tuple[int, ...] = ()


CHECKPOINTS: Final[dict[tuple[Family, Role], Sizes]] = {
    ("qwen", "target"): Sizes(640, 96, 192, 18, 6, 96, 192, 2, tied=True),
    ("qwen", "draft"): Sizes(624, 64, 128, 1, 1, 64, 128, 2, tied=True),
    ("llava", "target"): Sizes(640, 96, 192, 18, 6, 96, 192, 3, tied=False),
    ("llava", "draft"): Sizes(624, 64, 128, 1, 1, 64, 128, 2, tied=False),
    ("qwen3", "target"): Sizes(640, 96, 192, 18, 6, 96, 192, 3, tied=True, deepstack=(0, 1)),
    ("qwen3", "draft"): Sizes(624, 64, 128, 1, 1, 64, 128, 2, tied=True, deepstack=(0,)),
}


def build_processor(family: Family) -> Any:
    """The family's processor with our tokenizer and a size that gives about 140 video tokens a clip."""
    tokenizer = train_tokenizer(family)
    makers = {"qwen": qwen_processor, "llava": llava_processor, "qwen3": qwen3_processor}
    return makers[family](tokenizer)


def qwen_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """Processor of the Qwen2.5-VL architecture: any clip becomes about 96 x 96 pixels."""
    size: dict[str, Any] = {"size": dict(_QWEN_PIXELS)}
    kind: Any = Qwen2_5_VLProcessor
    processor: Qwen2_5_VLProcessor = kind(
        image_processor=Qwen2VLImageProcessor(**size, **_PATCHES),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**size, **_PATCHES, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    )
    return processor


def qwen3_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Processor of the Qwen3-VL architecture: any larger clip becomes about 96 x 96 pixels.

    Its edges bound the pixels of all frames together, so what bounds a frame is the cap on its tokens.
    """
    half: dict[str, Any] = {"image_mean": _HALF, "image_std": _HALF}
    least = _QWEN_PIXELS["shortest_edge"]
    frames = {"shortest_edge": least, "longest_edge": _QWEN3_MOST_FRAMES * _QWEN_PIXELS["longest_edge"]}
    kind: Any = Qwen3VLProcessor
    processor: Qwen3VLProcessor = kind(
        image_processor=Qwen2VLImageProcessor(size=dict(_QWEN_PIXELS), **_PATCHES, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size=frames, **_PATCHES, **half, cap_pixels_per_frame=True, max_video_tokens=_QWEN3_FRAME_TOKENS
        ),
        chat_template=tokenizer.chat_template,
    )
    return processor


def llava_processor(tokenizer: Qwen2Tokenizer) -> LlavaOnevisionProcessor:
    """Processor of the LLaVA-OneVision architecture: any clip becomes 96 x 96 pixels."""
    pixels: dict[str, Any] = {"image_mean": _HALF, "image_std": _HALF}
    pixels["size"] = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
    kind: Any = LlavaOnevisionProcessor
    processor: LlavaOnevisionProcessor = kind(
        image_processor=LlavaOnevisionImageProcessor(
            **pixels, image_grid_pinpoints=[[LLAVA_SIDE, LLAVA_SIDE]]
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=(LLAVA_SIDE // LLAVA_PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return processor


def build_model(family: Family, role: Role, tokenizer: Qwen2Tokenizer, layers: int) -> PreTrainedModel:
    """A fresh model with this many text layers, initialised from torch's global seed."""
    sizes = CHECKPOINTS[family, role]
    kind: Any
    config: Any
    if family == "qwen":
        kind, config = Qwen2_5_VLForConditionalGeneration, _qwen_config(sizes, tokenizer, layers)
    elif family == "qwen3":
        kind, config = Qwen3VLForConditionalGeneration, _qwen3_config(sizes, tokenizer, layers)
    else:
        kind, config = LlavaOnevisionForConditionalGeneration, _llava_config(sizes, tokenizer, layers)
    model: PreTrainedModel = kind._from_config(config, attn_implementation="sdpa")
    model.generation_config = _generation_config(family, tokenizer)
    return model


def text_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The text model's layers; the same place in all families."""
    layers: nn.ModuleList = model.model.language_model.layers
    return layers


def places(sizes: Sizes, old: int, new: int) -> list[int]:
    """Where `old` text layers stand among `new` ones.

    Spread evenly, except that those behind which features of the vision tower are added stay where they are.
    """
    first = min(len(sizes.deepstack), old)
    step = (new - first) // max(1, old - first)
    return [*range(first), *(first + step * index for index in range(old - first))]


def deepened(
    model: PreTrainedModel, family: Family, role: Role, tokenizer: Qwen2Tokenizer, layers: int
) -> PreTrainedModel:
    """A deeper model that computes the same: new layers, which add nothing yet, stand between the old."""
    deep = build_model(family, role, tokenizer, layers)
    old, new = text_layers(model), text_layers(deep)
    rest = {k: v for k, v in model.state_dict().items() if ".language_model.layers." not in k}
    deep.load_state_dict(rest, strict=False)
    kept = dict(zip(places(CHECKPOINTS[family, role], len(old), layers), old, strict=True))
    layer: Any
    for index, layer in enumerate(new):
        if index in kept:
            layer.load_state_dict(kept[index].state_dict())
        else:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep


def save_folder(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write the ordinary Hugging Face folder; turns the weights into float16 for good."""
    folder.mkdir(parents=True, exist_ok=True)
    halved: Any = model
    halved.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _rope(extra: dict[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **extra}


def _text_config(sizes: Sizes, tokenizer: Qwen2Tokenizer, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.text_width,
        "intermediate_size": sizes.text_mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.text_width // HEAD_DIM,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "initializer_range": 0.06,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": token_id(tokenizer, "<|im_end|>"),
        "pad_token_id": None,
        "tie_word_embeddings": sizes.tied,
    }


def _qwen_tower(sizes: Sizes) -> dict[str, Any]:
    """What the vision towers of both Qwen architectures have in common."""
    return {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_mlp,
        "num_heads": sizes.vision_width // HEAD_DIM,
        "patch_size": CELL // 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.text_width,
        "initializer_range": 0.06,
    }


def _qwen_config(sizes: Sizes, tokenizer: Qwen2Tokenizer, layers: int) -> Qwen2_5_VLConfig:
    vision = _qwen_tower(sizes) | {
        "tokens_per_second": 2,
        "window_size": 3 * CELL,
        "fullatt_block_indexes": [sizes.vision_layers - 1],
    }
    ids = _vision_ids(tokenizer)
    text = _text_config(sizes, tokenizer, layers) | {"rope_parameters": _rope({"mrope_section": [4, 6, 6]})}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=sizes.tied, **ids)


def _qwen3_config(sizes: Sizes, tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3VLConfig:
    vision = _qwen_tower(sizes) | {
        "num_position_embeddings": _QWEN3_GRID**2,
        "deepstack_visual_indexes": list(sizes.deepstack),
    }
    ids = _vision_ids(tokenizer)
    rope = _rope({"mrope_section": [6, 5, 5], "mrope_interleaved": True})
    text = _text_config(sizes, tokenizer, layers) | {"rope_parameters": rope, "head_dim": HEAD_DIM}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=sizes.tied, **ids)


def _vision_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }


def _llava_config(sizes: Sizes, tokenizer: Qwen2Tokenizer, layers: int) -> LlavaOnevisionConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_mlp,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_width // HEAD_DIM,
        "image_size": LLAVA_SIDE,
        "patch_size": LLAVA_PATCH,
        "vision_use_head": False,
    }
    text = _text_config(sizes, tokenizer, layers) | {"rope_parameters": _rope({}), "model_type": "qwen2"}
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=[[LLAVA_SIDE, LLAVA_SIDE]],
        tie_word_embeddings=sizes.tied,
    )


def _generation_config(family: Family, tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    ends = [token_id(tokenizer, token) for token in ("<|im_end|>", "<|endoftext|>")]
    penalty = {"repetition_penalty": QWEN_REPETITION_PENALTY} if family == "qwen" else {}
    kind: Any = GenerationConfig
    made: GenerationConfig = kind(do_sample=False, eos_token_id=ends, pad_token_id=ends[1], **penalty)
    return made
