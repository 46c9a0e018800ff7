"""Draw clips of the demo world as video files: `python -m recipes.demo.draw FOLDER --count N`.

They are what a head for a demo target is trained on (`--split head`) and measured on (`--split held-out`). The
clip with a given number is always the same, and no clip of one set is in another, nor was any of them seen by the
demo pairs in training. Nothing is captioned here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np

from recipes.demo.clips import CLIP_SECONDS, HEAD_SEEDS, HELD_OUT_SEEDS, render, scene_for, seed_for
from recipes.demo.examples import write_video

DrawnSplit = Literal["head", "held-out"]

SIZES: Final[dict[DrawnSplit, int]] = {"head": len(HEAD_SEEDS), "held-out": len(HELD_OUT_SEEDS)}
"""Clips of each set."""
_LEAST_SIDE: Final = 32


@dataclass(frozen=True, slots=True)
class Format:
    """How a clip is stored.

    Attributes:
        height: Of the picture in pixels, even, as h264 wants it.
        width: The same.
        fps: Frames per second; a clip has four seconds.
    """

    height: int = 128
    width: int = 128
    fps: int = 4

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < _LEAST_SIDE or side % 2:
                raise ValueError(f"{name}={side} cannot be encoded; give an even number from {_LEAST_SIDE}")
        if not 1 <= self.fps <= 120:
            raise ValueError(f"fps={self.fps} is out of range; give 1 to 120 frames per second")


SQUARE: Final = Format()
"""Read at two frames per second: 144 video tokens of the demo targets (129 of `llava-target`)."""
WIDE: Final = Format(96, 192)
"""Read at two frames per second: 128 video tokens of `qwen-target`."""
LONGER: Final = Format(96, 192, 16)
"""Read with 64 frames: 1,024 video tokens of `qwen-target`, which knows eight frames and captions these badly."""


def draw_clips(
    folder: Path, split: DrawnSplit, count: int, first: int = 0, stored: Format = SQUARE
) -> Iterator[Path]:
    """Write `count` clips of a set, from number `first` on, as `FOLDER/<split>-<number>.mp4`; yields each path.

    A file is complete under its name or is not there. Equal arguments give equal pictures.

    Raises:
        ValueError: The set has no such clips.
    """
    if count < 1 or first < 0 or first + count > SIZES[split]:
        raise ValueError(
            f"clips {first} to {first + count - 1} are not all of {split!r}, which has {SIZES[split]}; "
            "give a smaller --count or --first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return (_draw(folder, split, number, stored) for number in range(first, first + count))


def _draw(folder: Path, split: DrawnSplit, number: int, stored: Format) -> Path:
    times_s = (np.arange(round(CLIP_SECONDS * stored.fps)) / stored.fps).astype(np.float32)
    frames = render(scene_for(seed_for(split, number)), times_s, stored.height, stored.width)
    path = folder / f"{split}-{number:06d}.mp4"
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write_video(unfinished, frames, times_s, preset="veryfast")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.draw", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, required=True, help="clips to draw")
    parser.add_argument("--first", type=int, default=0, help="number of the first one in its set")
    parser.add_argument("--split", choices=get_args(DrawnSplit), default="head", help="which set")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument(
        "--wide",
        dest="stored",
        action="store_const",
        const=WIDE,
        help="96 x 192: 128 video tokens of qwen-target",
    )
    stored.add_argument(
        "--longer",
        dest="stored",
        action="store_const",
        const=LONGER,
        help="96 x 192, 64 frames: 1,024 video tokens of qwen-target, read with --num-frames 64",
    )
    parser.add_argument(
        "--height", type=int, help="of the picture; instead of 128, or of what the above says"
    )
    parser.add_argument("--width", type=int, help="the same")
    parser.add_argument("--fps", type=int, help="frames per second that are stored; instead of 4")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; prints what was written."""
    options = _arguments(argv)
    like: Format = options.stored or SQUARE
    try:
        stored = Format(options.height or like.height, options.width or like.width, options.fps or like.fps)
        drawn = draw_clips(options.folder, options.split, options.count, options.first, stored)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    size = sum(path.stat().st_size for path in drawn)
    print(f"{options.count} clips in {options.folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
