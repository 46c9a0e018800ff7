"""Models of published shapes with random weights, and captioners of them whose acceptance is assumed.

The cost of a forward pass depends on a model's shape alone, so a pair can be timed without its checkpoints. Weights
are made on the device itself; prompts are random tokens and pixels. Vision, prefill, pruning and the loop are those of
any caption; how many guesses a round accepts is an assumption, so figures from here are called modelled. Used by
shapes.py and the other scripts in this folder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
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

from specvlm import decode
from specvlm.attention import ATTENTION, register_attention
from specvlm.batch import Kind
from specvlm.captioner import Captioner, ModelInfo, PreparedVideo
from specvlm.config import FrameSettings, SpeculationSettings
from specvlm.decode import CaptionSequence, Decoder, DecodeSettings
from specvlm.drafts.small_model import SmallModelDraft
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
    SHAPES,
    STAMP_AFTER,
    STAMP_BEFORE,
    Shape,
    TextShape,
    frame_multiple,
    frame_tokens,
    has_stamps,
    patch_grid,
    stamp_tokens,
    steps_of,
    video_tokens,
)
from specvlm.records import Frames
from specvlm.stats import StageClock, device_words
from specvlm.tree import STATIC_PATHS, Guesses
from specvlm.verify import Accepted, accept
from specvlm.words import counted

FRAME_SIZE = (360, 640)  # height, width
# Tokens around the video, as the families' chat templates give for "Describe the video in detail.".
TEXT_BEFORE, TEXT_AFTER = 15, 12
DEEPEST = 64  # guesses; no tree is deeper
# Spread of random weights, and of the logits that they give. Sharp logits let dynamic trees grow deep, as a trained
# draft's do; under flat ones the likeliest nodes are all next to the root.
_WEIGHT_STD, _LOGIT_STD = 0.02, 8.0
_NOISE = (1 << 22) + 15  # numbers drawn; weights repeat them from random places on
_STATIC_DEPTH = max(map(len, STATIC_PATHS))
_DRAWS = 1 << 12  # rounds until the draws repeat
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


# --- shapes ---


def find_shape(name: str) -> Shape:
    """The published shape of this name.

    Raises:
        ConfigError: There is none.
    """
    found = next((shape for shape in SHAPES if shape.name == name), None)
    if found is None:
        known = ", ".join(shape.name for shape in SHAPES)
        raise ConfigError(f"shape={name!r} is unknown; choose one of {known}")
    return found


def pass_bytes(text: TextShape, slots: int, element: int) -> int:
    """What one pass over one token must read: all layers, the LM head, and the keys and values of `slots` tokens.

    Of experts only the active ones are read; a pass over several tokens reads more of them.
    """
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention = text.hidden * (2 * queries + 2 * keys)
    attention += 2 * text.head_dim if text.normed else queries + 2 * keys
    forward = 3 * text.hidden * text.intermediate
    if text.experts is not None:
        forward += text.hidden * text.experts.count  # the router
    layer = attention + forward + 2 * text.hidden
    weights = text.layers * layer + text.hidden + text.vocabulary * text.hidden
    return weights * element + slots * text.slot_bytes(element)


def prompt_tokens(shape: Shape, frames: int, size: tuple[int, int]) -> int:
    """S of a prompt with a video of so many frames; `size`: height and width of each."""
    around = TEXT_BEFORE + stamp_tokens(shape, frames) + TEXT_AFTER
    return video_tokens(shape, frames, size) + around


def _share(count: int, layers: int, whole: int) -> int:
    return max(1, round(count * layers / whole))


def shrunk(shape: Shape, layers: int, whole: int) -> Shape:
    """The shape with `layers / whole` of its depth in the decoder and in the vision tower, at least one layer each."""
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

    Its captions have no end of sequence, so that lengths are exact. Qwen2.5-VL keeps the repetition penalty of its
    published generation config, since that is work for every node.
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
        ConfigError: The family takes another number or another size of frames.
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
    """Default height and width of a frame: those of the presets' limit, or the one size that the family takes."""
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
    """Where the video tokens are, int64 [V]; families that write the time of each step have it before them."""
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


# --- assumed acceptance ---


def survival(mean: float, depth: int) -> float:
    """The chance q of one more accepted guess at which a tree of this depth accepts `mean` guesses a round.

    The number of accepted guesses is geometric and cut at the depth: P(at least k) = q^k for k = 1..D, as if each
    guess were right with the same chance. So mean = q + q^2 + ... + q^D.

    Raises:
        ConfigError: No q gives that mean.
    """
    if not 0.0 <= mean <= depth:
        raise ConfigError(
            f"assume_accepted={mean:g} is not what a tree of depth {depth} can give; give 0 to {depth}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if sum(middle**k for k in range(1, depth + 1)) < mean:
            low = middle
        else:
            high = middle
    return high


def _draws(chance: float, seed: int) -> list[int]:
    """Accepted guesses of `_DRAWS` rounds, before any tree cuts them.

    They are evenly spread (multiples of the golden ratio) rather than independent, so that a caption of a few dozen
    rounds has the mean that was asked for as well.
    """
    spread = ((seed * math.sqrt(2.0) + 0.5 + i * _GOLDEN) % 1.0 for i in range(_DRAWS))
    if chance <= 0.0:
        return [0] * _DRAWS
    if chance >= 1.0:
        return [DEEPEST] * _DRAWS
    return [min(DEEPEST, int(math.log(max(u, 1e-12)) / math.log(chance))) for u in spread]


class ForcedAcceptance:
    """Replaces `specvlm.verify.accept`: accepts as many guesses as were drawn before, whatever the target chose.

    It accepts the path to the first node of the drawn depth: in chains and static trees that of the draft's first
    choices. The target's choices are overwritten along it and passed to the real `accept`, so that a round does all of
    its own work. The draws are on the device, and so is the count of rounds, which each call increments in place:
    nothing asks the host, and a captured graph advances as an eager run does.

    All trees get the same chance q of one more accepted guess. In truth a tree with branches accepts more than a chain
    of its depth with the same draft, so trees are compared by their costs alone.
    """

    def __init__(self, mean: float, depth: int, device: torch.device, seed: int = 0) -> None:
        """`mean`: accepted guesses of a round with a tree of `depth`; other depths follow from the same q.

        Raises:
            ConfigError: A tree of that depth cannot give that mean.
        """
        draws = _draws(survival(mean, depth), seed)
        self._drawn = torch.tensor(draws, device=device)
        self._round = torch.zeros(1, dtype=torch.long, device=device)

    def restart(self) -> None:
        """Start the draws from the beginning, so that every caption gets the same."""
        self._round.zero_()

    def __call__(self, guesses: Guesses, choices: torch.Tensor, depth: int) -> Accepted:
        """See `specvlm.verify.accept`. A round that guesses nothing takes no draw."""
        if depth == 0:
            return accept(guesses, choices, depth)
        rows, nodes = choices.shape
        row = torch.arange(rows, device=choices.device)
        drawn = self._drawn[(self._round + row * 97) % _DRAWS]  # [B]
        self._round.add_(1)
        wanted = torch.minimum(drawn, guesses.depths.max(dim=1).values)
        last = (guesses.depths == wanted[:, None]).to(torch.uint8).argmax(dim=1)  # [B]
        path = guesses.ancestors.gather(1, last[:, None, None].expand(-1, 1, nodes)).squeeze(1)
        path = path & (guesses.depths > 0)  # [B, N]
        # Each node of the path becomes the target's choice at its parent. All other nodes write to the path's end,
        # which then gets a token that no guess has, so that nothing below the end is accepted.
        written = torch.where(path, guesses.parents, last[:, None])
        forced = choices.scatter(1, written, guesses.tokens)
        forced = forced.scatter(1, last[:, None], -1)
        accepted = accept(guesses, forced, depth)
        bonus = choices.gather(1, last[:, None])
        return accepted._replace(tokens=torch.where(accepted.tokens < 0, bonus, accepted.tokens))


# --- the pair ---


@dataclass(frozen=True, slots=True)
class Pair:
    """What is modelled.

    Attributes:
        target: Its shape, shrunk or whole.
        draft: The draft's; None: no draft.
        accepted: Mean accepted guesses of a round, the bonus token not counted.
        layers: Layers of the target if it was shrunk; else None.
    """

    target: Shape
    draft: Shape | None
    accepted: float
    layers: int | None = None

    @property
    def label(self) -> str:
        """What is printed with all figures of this pair."""
        what = "a published shape" if self.draft is None else "published shapes"
        depth = "" if self.layers is None else f", shrunk to {counted(self.layers, 'layer')} of the target"
        assumed = "" if self.draft is None else f", {self.accepted:g} accepted tokens assumed"
        return f"modelled: {what} with random weights{depth}{assumed}"


def make_pair(target: Shape, draft: Shape | None, accepted: float, layers: int | None = None) -> Pair:
    """Check a pair; with `layers`, the target has that many and everything else is shrunk in proportion.

    Raises:
        ConfigError: The families differ, `layers` or `accepted` is out of range.
    """
    if draft is not None and draft.family != target.family:
        raise ConfigError(
            f"draft shape {draft.name} is of the family {draft.family}, {target.name} of {target.family}; "
            "use a draft of the same family"
        )
    if not 0.0 <= accepted <= DEEPEST:
        raise ConfigError(f"assume_accepted={accepted:g} is out of range; give 0 to the depth of the tree")
    if layers is None:
        return Pair(target, draft, accepted)
    whole = target.text.layers
    if not 1 <= layers <= whole:
        raise ConfigError(f"layers={layers} is not what {target.name} can have; give 1 to {whole}")
    small = None if draft is None else shrunk(draft, layers, whole)
    return Pair(shrunk(target, layers, whole), small, accepted, layers)


class RandomCaptioner(Captioner):
    """A captioner of random weights. It has no processor: prompts and videos are random, and tokens have no text."""

    def __init__(
        self, pair: Pair, target: VideoLM, draft: VideoLM | None, frame_size: tuple[int, int] | None = None
    ) -> None:
        """Make ready.

        Args:
            pair: What is modelled.
            target: A model of its target's shape, as `build` makes it.
            draft: The same of its draft; None: it has none.
            frame_size: Height and width of frames; None: `frame_size_of` the target.
        """
        guess = None
        if draft is not None:
            guess = SmallModelDraft(draft, min(target.vocabulary, draft.vocabulary))
        super().__init__(target, None, guess, _info(pair, target), FrameSettings())
        self.pair, self.frame_size = pair, frame_size or frame_size_of(pair.target)
        self.settling = None  # rounds are timed as they are
        self._videos: dict[tuple[int, int], PreparedVideo] = {}

    @property
    def frame_multiple(self) -> int:
        """That of the shape's family."""
        return frame_multiple(self.pair.target)

    def video(self, num_frames: int, seed: int = 0) -> PreparedVideo:
        """A prompt with a video of random pixels on the target's device. It is made once, so using it takes no time.

        Raises:
            ConfigError: The family does not take such frames.
        """
        if (num_frames, seed) not in self._videos:
            device = self.target.device
            inputs = random_inputs(self.pair.target, num_frames, self.frame_size, device, seed)
            self._videos[num_frames, seed] = PreparedVideo(inputs, num_frames, None, 0.0, 0.0)
        return self._videos[num_frames, seed]

    def prepare(self, video: Any, prompt: str | None = None, **_: Any) -> PreparedVideo:
        """The random video of a `random_clip`; it has a prompt of its own."""
        return self.video(len(video.pixels), int(video.pixels[0, 0, 0, 0]))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Nothing: random tokens have no text."""
        return ""


def random_clip(num_frames: int, seed: int = 0) -> Frames:
    """What `RandomCaptioner.prepare` takes: so many frames of one pixel, whose value is the seed (0 to 255)."""
    return Frames(np.full((num_frames, 1, 1, 3), seed, np.uint8), np.arange(num_frames) / 2.0)


class ModelledCaptioner(RandomCaptioner):
    """Random weights whose rounds accept as many guesses as the pair assumes."""

    def decoder(self, settings: SpeculationSettings) -> Decoder:
        """A decoder for rounds of these settings."""
        depth = reference_depth(settings)
        return _ForcedDecoder(self, ForcedAcceptance(self.pair.accepted, depth, self.target.device))

    def take_decoder(self, kind: Kind) -> Decoder:
        """As any captioner's; rounds of guesses accept what is assumed."""
        if kind.speculation is not None and kind not in self._decoders:
            self._decoders[kind] = self.decoder(kind.speculation)
        return super().take_decoder(kind)


class _ForcedDecoder(Decoder):
    """A decoder whose rounds accept what was drawn, in place of what the target chose."""

    def __init__(self, captioner: Captioner, forced: ForcedAcceptance) -> None:
        target = captioner.target
        super().__init__(target, StageClock(target.device), captioner.make_capture)
        self._forced = forced

    def configure(self, settings: DecodeSettings) -> None:
        """As any decoder's; the draws start from the beginning."""
        self._forced.restart()
        super().configure(settings)

    def step(self) -> list[CaptionSequence]:
        """As any decoder's, with the forced `accept` in the place of the real one."""
        real, decode.accept = decode.accept, self._forced
        try:
            return super().step()
        finally:
            decode.accept = real


def reference_depth(settings: SpeculationSettings) -> int:
    """The depth at which a tree accepts the assumed mean: its own, or the static tree's if depths vary (`auto`)."""
    if settings.tree == "chain":
        return settings.most_depth
    if settings.tree == "dynamic":
        return min(settings.most_depth, settings.most_nodes - 1)
    return _STATIC_DEPTH


def _info(pair: Pair, target: VideoLM) -> ModelInfo:
    def named(shape: Shape) -> str:
        return f"{shape.name} (modelled, {counted(shape.text.layers, 'layer')})"

    return ModelInfo(
        target=named(pair.target),
        target_revision=None,
        draft=None if pair.draft is None else named(pair.draft),
        draft_revision=None,
        family=pair.target.family,
        dtype=str(target.dtype).removeprefix("torch."),
        device=device_words(target.device),
        transformers_version=transformers.__version__,
        processor_options={},
    )


def build_pair(
    pair: Pair,
    device: torch.device,
    dtype: torch.dtype,
    frame_size: tuple[int, int] | None = None,
    seed: int = 0,
) -> ModelledCaptioner:
    """Make both models on the device."""
    target = build(pair.target, device, dtype, seed)
    draft = None if pair.draft is None else build(pair.draft, device, dtype, seed + 1)
    return ModelledCaptioner(pair, target, draft, frame_size)
