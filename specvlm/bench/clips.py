"""The clips of a bench: the eight example clips if the user gives none. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import specvlm
from specvlm.config import FrameSettings
from specvlm.records import Frames

EXAMPLES: Final = (
    "one-drifts-left.mp4",
    "one-grows.mp4",
    "two-meet.mp4",
    "one-vanishes-vp9.webm",
    "two-still-and-rising-vp9.webm",
    "two-grows-and-shrinks.mp4",
    "one-sinks-rotated.mp4",
    "one-slides-right-variable-rate.mp4",
)
"""The example clips in the order in which a bench takes them."""


class Clip(NamedTuple):
    """One video, or one part of it.

    Attributes:
        name: Unique in a bench.
        video: A path, or frames that are read already.
        start_s: Start of the part.
        end_s: Its end; None: that of the video.
        prompt: Its own; None: that of the bench.
    """

    name: str
    video: str | bytes | Frames
    start_s: float = 0.0
    end_s: float | None = None
    prompt: str | None = None

    def frame_settings(self, base: FrameSettings, num_frames: int | None) -> FrameSettings:
        """Which of its frames to read: so many, or with None as `base` says."""
        settings = replace(base, start_s=self.start_s, end_s=self.end_s)
        return settings if num_frames is None else replace(settings, fps=None, num_frames=num_frames)


def example_clips() -> tuple[Clip, ...]:
    """The eight example clips as files: data of an installed package, examples/videos in a checkout."""
    package = Path(specvlm.__file__).parent
    folder = package / "demo" / "videos"
    if not folder.is_dir():
        folder = package.parent / "examples" / "videos"
    return tuple(Clip(name, str(folder / name)) for name in EXAMPLES)
