"""The clips of a bench: the eight example clips if the user gives none. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import specvlm
from specvlm.config import FrameSettings
from specvlm.records import Frames


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
    """The eight example clips as files: with an installed package in its data, in a checkout in examples/videos."""
    package = Path(specvlm.__file__).parent
    folder = package / "demo" / "videos"
    if not folder.is_dir():
        folder = package.parent / "examples" / "videos"
    return tuple(Clip(path.name, str(path)) for path in sorted(folder.glob("*.[mw]*[4m]")))
