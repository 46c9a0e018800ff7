"""The clips of a bench where the user gives none: the eight that the demo pairs were made for. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import specvlm
from specvlm.config import FrameSettings
from specvlm.records import Frames

_SHIPPED = Path(specvlm.__file__).parent.parent / "examples" / "videos"


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


class Examples(NamedTuple):
    """Clips, and in words where they came from."""

    clips: tuple[Clip, ...]
    words: str


def example_clips(scratch: Path, shipped: Path = _SHIPPED) -> Examples:
    """The example clips as files, so that reading them is measured like any other.

    Where the source tree is at hand they are there; an installed package draws and encodes the same scenes into
    `scratch`, which takes about a second.
    """
    from specvlm.demo.examples import EXAMPLES, write_examples

    paths = [shipped / example.name for example in EXAMPLES]
    if all(path.is_file() for path in paths):
        return Examples(_named(paths), "the example clips, from examples/videos")
    return Examples(_named(write_examples(scratch)), "the example clips, drawn anew")


def _named(paths: list[Path]) -> tuple[Clip, ...]:
    return tuple(Clip(path.name, str(path)) for path in paths)
