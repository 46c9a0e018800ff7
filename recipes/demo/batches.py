"""Training batches drawn on the fly: pixels, prompt, caption and what each cell of the picture shows.

All clips of a batch have one shape and one question, so that a batch is a plain rectangle. What the cells show
trains the vision tower directly, through a head that is thrown away afterwards.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.video_utils import VideoMetadata

from recipes.demo.captions import PROMPTS, caption_for, fact_words
from recipes.demo.clips import (
    BACKGROUNDS,
    CLIP_SECONDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    render,
    scene_for,
    seed_for,
    state_at,
)
from recipes.demo.models import CELL, FRAMES, LLAVA_SIDE
from recipes.demo.tokenizer import Family

FPS: Final = 2.0
_QWEN_SHAPES: Final = ((96, 96), (80, 112), (112, 80), (64, 128), (128, 64))
_LLAVA_SHAPES: Final = ((96, 96), (80, 112), (112, 80), (72, 128), (128, 72))
_SHAPE_SHARES: Final = (0.72, 0.09, 0.09, 0.05, 0.05)
_FACT_WORDS: Final = re.compile(rf"\b({'|'.join(sorted(fact_words()))})\b")
_CELL_SIDE_LLAVA: Final = 4

CELL_FACTS: Final[dict[str, int]] = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES),
    "size": 5,
    "motion": len(MOTIONS),
    "row": 3,
    "column": 3,
    "background": len(BACKGROUNDS),
}
"""Classes a cell is labelled with; a colour beyond the last means that no shape covers the cell."""
IGNORED: Final = -100
_RADII: Final = (0.08, 0.125, 0.18, 0.26)
"""Edges between the five classes of a shape's size at one moment."""


@dataclass(frozen=True)
class Batch:
    """B clips of one shape with one question. P prompt tokens, C caption tokens, V video tokens."""

    pixels: dict[str, Tensor]
    prompt_ids: Tensor
    """[B, P]; rows differ in the times that Qwen3-VL prints, which all have one length."""
    caption_ids: Tensor
    """[B, C], ends with the end token, then filled with it."""
    weights: Tensor
    """[B, C], 0 where filled."""
    cells: dict[str, Tensor]
    """Class of each video token, [B, V]; LLaVA's newline token has none."""
    scenes: list[Scene]
    seconds_per_grid: float = 1.0
    """Seconds from one pair of frames to the next, which spaces the time positions of M-RoPE."""


class Drawer:
    """Draws the batches of one family. The batch with a given number is always the same."""

    def __init__(self, family: Family, processor: Any, fact_weight: float = 3.0) -> None:
        self.family = family
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.fact_weight = fact_weight
        self.end_id = int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self._noise = np.random.default_rng(7).normal(0, 6, 4_000_000).astype(np.int16)

    def batch(self, number: int, size: int, one_thing_share: float, frames: int = FRAMES) -> Batch:
        """Draw training batch `number`. More frames than `FRAMES` show the same four seconds more closely."""
        rng = np.random.default_rng((number, 20))
        rows = max(1, size * FRAMES // frames)
        scenes = [scene_for(seed_for("train", number * size + i), one_thing_share) for i in range(rows)]
        shapes = _LLAVA_SHAPES if self.family == "llava" else _QWEN_SHAPES
        height, width = shapes[int(rng.choice(len(shapes), p=_SHAPE_SHARES))]
        fps = frames / FRAMES * (FPS / float(rng.uniform(0.85, 1.15)) if rng.random() < 0.4 else FPS)
        times = [_frame_times(rng, fps, frames) for _ in scenes]
        clips = [self._clip(rng, s, t, height, width) for s, t in zip(scenes, times, strict=True)]
        prompt = PROMPTS[int(rng.choice(len(PROMPTS), p=(0.3, 0.2, 0.125, 0.125, 0.125, 0.125)))]
        captions, weights = self._captions([caption_for(s) for s in scenes])
        pixels = self._pixels(clips)
        return Batch(
            pixels=pixels,
            prompt_ids=self.prompt_ids(prompt, pixels, times),
            caption_ids=captions,
            weights=weights,
            cells=self._cells(scenes, times, height, width),
            scenes=scenes,
            seconds_per_grid=2 / fps,
        )

    def prompt_ids(
        self, prompt: str, pixels: dict[str, Tensor], times_s: list[NDArray[np.float32]]
    ) -> Tensor:
        """Token ids of the whole prompt of each clip with one id per video token, [B, P]."""
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        token = self.processor.video_token
        if self.family == "qwen3":
            written = [self._timed_tokens(pixels["video_grid_thw"][0], t) for t in times_s]
        elif self.family == "qwen":
            written = [token * (int(pixels["video_grid_thw"][0].prod()) // 4)]
        else:
            written = [token * (len(times_s[0]) * _CELL_SIDE_LLAVA**2 + 1)]
        ids = torch.tensor(self.tokenizer([text.replace(token, one) for one in written]).input_ids)
        return ids.expand(len(times_s), -1)

    def _timed_tokens(self, grid: Tensor, times_s: NDArray[np.float32]) -> str:
        """What the stock processor of Qwen3-VL writes for a clip whose frames were shown at these times."""
        milliseconds = np.rint(times_s * 1000).astype(int).tolist()
        seen = VideoMetadata(total_num_frames=len(times_s), fps=1000, frames_indices=milliseconds)
        written: str = self.processor.replace_video_token(
            {"video_grid_thw": grid[None], "video_metadata": [seen]}, 0
        )
        return written

    def _clip(
        self, rng: np.random.Generator, scene: Scene, times_s: NDArray[np.float32], height: int, width: int
    ) -> Tensor:
        frames = render(scene, times_s, height, width, softness=float(rng.uniform(0.8, 1.8)))
        if rng.random() < 0.5:
            start = int(rng.integers(max(1, len(self._noise) - frames.size)))
            noise = np.resize(self._noise[start : start + frames.size], frames.shape)
            frames = np.clip(frames + noise, 0, 255)
            frames = frames.astype(np.uint8)
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def _pixels(self, clips: list[Tensor]) -> dict[str, Tensor]:
        resize = self.family == "llava" and tuple(clips[0].shape[-2:]) != (LLAVA_SIDE, LLAVA_SIDE)
        out = self.processor.video_processor(
            clips, do_resize=resize, do_sample_frames=False, return_tensors="pt"
        )
        return {key: out[key] for key in ("pixel_values_videos", "video_grid_thw") if key in out}

    def _captions(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(captions, return_offsets_mapping=True)
        longest = max(len(ids) for ids in encoded.input_ids) + 1
        ids = torch.full((len(captions), longest), self.end_id)
        weights = torch.zeros(len(captions), longest)
        for row, (tokens, spans) in enumerate(zip(encoded.input_ids, encoded.offset_mapping, strict=True)):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            weights[row, : len(tokens) + 1] = 1.0
            facts = [m.span(1) for m in _FACT_WORDS.finditer(captions[row])]
            heavy = [any(a < right and left < b for left, right in facts) for a, b in spans]
            weights[row, : len(tokens)][torch.tensor(heavy)] = self.fact_weight
        return ids, weights

    def _cells(
        self, scenes: list[Scene], times: list[NDArray[np.float32]], height: int, width: int
    ) -> dict[str, Tensor]:
        single = self.family == "llava"
        rows, columns = (_CELL_SIDE_LLAVA,) * 2 if single else (height // CELL, width // CELL)
        made = [
            cell_facts(s, t if single else t.reshape(-1, 2).mean(1), rows, columns)
            for s, t in zip(scenes, times, strict=True)
        ]
        return {name: torch.from_numpy(np.stack([m[name].reshape(-1) for m in made])) for name in CELL_FACTS}


def _frame_times(rng: np.random.Generator, fps: float, frames: int) -> NDArray[np.float32]:
    uneven = rng.uniform(0.02, 0.1) * FRAMES / frames
    start = rng.uniform(0, 0.45)
    times = start + np.arange(frames) / fps + rng.uniform(-uneven, uneven, frames)
    return np.clip(times.astype(np.float32), 0, CLIP_SECONDS)


def cell_facts(
    scene: Scene, times_s: NDArray[np.float32], rows: int, columns: int
) -> dict[str, NDArray[np.int64]]:
    """What each cell shows at each time, int64 [T, rows, columns] by kind of fact."""
    shape = (len(times_s), rows, columns)
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    facts = {name: np.full(shape, IGNORED, np.int64) for name in CELL_FACTS}
    facts["colour"][:] = len(COLOURS)
    facts["background"][:] = BACKGROUNDS.index(scene.background)
    facts["row"][:] = np.minimum(y * 3, 2).astype(np.int64)[None, :, None]
    facts["column"][:] = np.minimum(x * 3, 2).astype(np.int64)[None, None, :]
    ratio = np.sqrt(columns / rows)
    for thing in scene.things:
        centre_x, centre_y, radius, opacity = (v[:, None, None] for v in state_at(thing, times_s))
        away = np.hypot((x[None, None, :] - centre_x) * ratio, (y[None, :, None] - centre_y) / ratio)
        nearest = away <= away.min(axis=(1, 2), keepdims=True) + 1e-6
        covered = ((away < 0.9 * radius) | nearest) & (opacity > 0.5)
        facts["colour"][covered] = list(COLOURS).index(thing.colour)
        facts["shape"][covered] = SHAPES.index(thing.shape)
        facts["size"][covered] = np.digitize(np.broadcast_to(radius, shape), _RADII)[covered]
        motion = "still" if thing.motion == "vanishes" else thing.motion
        facts["motion"][covered] = MOTIONS.index(motion)
    return facts
