"""Caption frames that come from somewhere else: your own reader, a camera, a simulation.

python examples/own_frames.py
"""

from __future__ import annotations

import numpy as np

import specvlm


def moving_square(frames: int = 8, side: int = 96) -> specvlm.Frames:
    """Draw a red square that moves to the right: uint8 [F, height, width, 3], and the times in seconds."""
    pixels = np.full((frames, side, side, 3), 235, np.uint8)
    for index in range(frames):
        left = 8 + index * (side - 40) // frames
        pixels[index, 32:56, left : left + 24] = (220, 40, 40)
    return specvlm.Frames(pixels, np.arange(frames) / 2.0)


def main() -> None:
    """Caption the drawn frames."""
    captioner = specvlm.load("demo")
    result = captioner.caption(
        moving_square(), "Describe the video in detail.", tree="chain", pruner="uniform"
    )
    print(result.text)
    print(f"{result.stats.completion_tokens} tokens for {result.stats.video_tokens} video tokens")


if __name__ == "__main__":
    main()
