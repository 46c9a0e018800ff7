"""The sizes of published checkpoints, in one table, and how many tokens a video becomes there. Imports no torch.

What a pair costs in memory and time is arithmetic over these numbers: `specvlm presets`, the choice of `--preset auto`
and the models with random weights of `benchmarks/modelled.py` all start from them.
"""

from __future__ import annotations

from dataclasses import dataclass

QWEN2, QWEN25, QWEN3, QWEN3_MOE, LLAVA = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava_onevision",
)

# Of Qwen3-VL, before and behind the video tokens of each step in time: "<12.3 seconds>" and a marker, and a marker.
STAMP_BEFORE, STAMP_AFTER = 8, 1
MERGE, PAIR = 2, 2  # patches to a side, frames
LLAVA_SIDE, _LLAVA_PATCH, _LLAVA_POOL = 384, 14, 2


@dataclass(frozen=True, slots=True)
class Experts:
    """The feed-forward layers of a mixture of experts: of `count` experts, `active` are used for each token."""

    count: int
    active: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class TextShape:
    """The decoder, in the words of config.json.

    Attributes:
        vocabulary: Padding included.
        tied: The LM head is the embedding.
        head_size: Width of one attention head; None: the heads share the width of hidden states.
        normed: Queries and keys are normed and no projection has a bias (Qwen3); else they have biases (Qwen2).
        experts: In place of one feed-forward layer of width `intermediate`, which is then that of the active ones.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    head_size: int | None = None
    normed: bool = False
    experts: Experts | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.hidden // self.heads

    def slot_bytes(self, element: int) -> int:
        """Keys and values of one token in all layers, at `element` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower. `deepstack`: layers whose features go to the decoder's first layers as well."""

    depth: int
    hidden: int
    intermediate: int
    heads: int
    patch: int = 14  # pixels to a side
    deepstack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """One published model.

    Attributes:
        name: What the user types.
        checkpoint: Hub id of the model whose config.json this is.
        family: As `model_type` in config.json.
        text: The decoder.
        vision: The vision tower.
        parameters: Of all of it, tied weights once, as the architectures in `transformers` count them.
        video_token: Id of the video's placeholder.
    """

    name: str
    checkpoint: str
    family: str
    text: TextShape
    vision: VisionShape
    parameters: int
    video_token: int


def _qwen2(size: str, text: TextShape, parameters: int) -> Shape:
    """Qwen2-VL (arXiv 2409.12191, and each checkpoint's config.json)."""
    checkpoint = f"Qwen/Qwen2-VL-{size.upper()}-Instruct"
    vision = VisionShape(32, 1280, 5120, 16)
    return Shape(f"qwen2-vl-{size}", checkpoint, QWEN2, text, vision, parameters, 151656)


def _qwen25(size: str, text: TextShape, vision_mlp: int, parameters: int) -> Shape:
    """Qwen2.5-VL (arXiv 2502.13923, table 1, and each checkpoint's config.json)."""
    checkpoint = f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    vision = VisionShape(32, 1280, vision_mlp, 16)
    return Shape(f"qwen2.5-vl-{size}", checkpoint, QWEN25, text, vision, parameters, 151656)


_SMALL_TOWER = VisionShape(24, 1024, 4096, 16, 16, (5, 11, 17))
_LARGE_TOWER = VisionShape(27, 1152, 4304, 16, 16, (8, 16, 24))


def _qwen3(size: str, text: TextShape, vision: VisionShape, parameters: int) -> Shape:
    """Qwen3-VL (arXiv 2511.21631, and each checkpoint's config.json)."""
    checkpoint = f"Qwen/Qwen3-VL-{size.upper()}-Instruct"
    family = QWEN3 if text.experts is None else QWEN3_MOE
    return Shape(f"qwen3-vl-{size}", checkpoint, family, text, vision, parameters, 151656)


def _llava(size: str, text: TextShape, parameters: int) -> Shape:
    """LLaVA-OneVision (arXiv 2408.03326): Qwen2 with another padding of its vocabulary, SigLIP less its last layer."""
    checkpoint = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    vision = VisionShape(26, 1152, 4304, 16)
    return Shape(f"llava-onevision-{size}", checkpoint, LLAVA, text, vision, parameters, 151647)


def _qwen3_text(
    hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = False, kv_heads: int = 8
) -> TextShape:
    return TextShape(hidden, intermediate, layers, heads, kv_heads, 151936, tied, 128, normed=True)


def _mixture(hidden: int, layers: int, heads: int, expert: int) -> TextShape:
    return TextShape(
        hidden, 8 * expert, layers, heads, 4, 151936, False, 128, normed=True, experts=Experts(128, 8, expert)
    )


SHAPES = (
    _qwen3("2b", _qwen3_text(2048, 6144, 28, 16, tied=True), _SMALL_TOWER, 2_127_532_032),
    _qwen3("4b", _qwen3_text(2560, 9728, 36, 32, tied=True), _SMALL_TOWER, 4_437_815_808),
    _qwen3("8b", _qwen3_text(4096, 12288, 36, 32), _LARGE_TOWER, 8_767_123_696),
    _qwen3("32b", _qwen3_text(5120, 25600, 64, 64), _LARGE_TOWER, 33_357_390_064),
    _qwen3("30b-a3b", _mixture(2048, 48, 32, 768), _LARGE_TOWER, 31_070_754_032),
    _qwen3("235b-a22b", _mixture(4096, 94, 64, 1536), _LARGE_TOWER, 235_670_022_896),
    _qwen25("3b", TextShape(2048, 11008, 36, 16, 2, 151936, True), 3420, 3_754_622_976),
    _qwen25("7b", TextShape(3584, 18944, 28, 28, 4, 152064, False), 3420, 8_292_166_656),
    _qwen25("32b", TextShape(5120, 27648, 64, 40, 8, 152064, False), 3456, 33_452_718_336),
    _qwen25("72b", TextShape(8192, 29568, 80, 64, 8, 152064, False), 3456, 73_410_777_344),
    _qwen2("2b", TextShape(1536, 8960, 28, 12, 2, 151936, True), 2_208_985_600),
    _qwen2("7b", TextShape(3584, 18944, 28, 28, 4, 152064, False), 8_291_375_616),
    _qwen2("72b", TextShape(8192, 29568, 80, 64, 8, 152064, False), 73_405_560_320),
    _llava("0.5b", TextShape(896, 4864, 24, 14, 2, 152000, True), 893_675_552),
    _llava("7b", TextShape(3584, 18944, 28, 28, 4, 152128, False), 8_030_807_584),
    _llava("72b", TextShape(8192, 29568, 80, 64, 8, 152128, False), 73_181_570_592),
)


def shape_of(checkpoint: str) -> Shape | None:
    """The shape of a hub id; None: it is not in the table."""
    return next((shape for shape in SHAPES if shape.checkpoint == checkpoint), None)


def frame_multiple(shape: Shape) -> int:
    """Frames come in multiples of this many."""
    return 1 if shape.family == LLAVA else PAIR


def patch_grid(shape: Shape, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of a frame of this height and width.

    Qwen's processors scale a frame to whole merged patches; LLaVA-OneVision's scales every frame to one size.
    """
    if shape.family == LLAVA:
        return LLAVA_SIDE // _LLAVA_PATCH, LLAVA_SIDE // _LLAVA_PATCH
    cell = shape.vision.patch * MERGE
    height, width = (max(1, round(side / cell)) * MERGE for side in size)
    return height, width


def frame_tokens(shape: Shape, size: tuple[int, int]) -> int:
    """Video tokens of one step in time: a pair of frames, of LLaVA-OneVision one frame."""
    rows, columns = patch_grid(shape, size)
    if shape.family == LLAVA:
        return -(-rows // _LLAVA_POOL) * -(-columns // _LLAVA_POOL)
    return (rows // MERGE) * (columns // MERGE)


def steps_of(shape: Shape, frames: int) -> int:
    """Steps in time of so many frames."""
    return -(-frames // frame_multiple(shape))


def video_tokens(shape: Shape, frames: int, size: tuple[int, int]) -> int:
    """V of a video of so many frames; `size`: height and width of each. LLaVA-OneVision adds a newline."""
    return steps_of(shape, frames) * frame_tokens(shape, size) + (shape.family == LLAVA)


def has_stamps(shape: Shape) -> bool:
    """Whether the prompt states the time of each step."""
    return shape.family in (QWEN3, QWEN3_MOE)


def stamp_tokens(shape: Shape, frames: int) -> int:
    """Text tokens between the video tokens of so many frames."""
    return steps_of(shape, frames) * (STAMP_BEFORE + STAMP_AFTER) if has_stamps(shape) else 0


def tokens_within(shape: Shape, frames: int, max_pixels: int | None) -> int:
    """The most video tokens that so many frames can become, of at most so many pixels each (None: as few as can be)."""
    if shape.family == LLAVA:
        return video_tokens(shape, frames, (LLAVA_SIDE, LLAVA_SIDE))
    cell = (shape.vision.patch * MERGE) ** 2
    return steps_of(shape, frames) * max(1, (max_pixels or cell) // cell)
