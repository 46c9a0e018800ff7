"""A reader for trainings whose videos are text files: what stands in them decides the frames, or the fault.

It runs in the reading children, which import no torch.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import numpy as np

from specvlm.config import FrameSettings
from specvlm.errors import NotAVideoError, VideoNotFoundError, VideoUnavailableError
from specvlm.records import Frames, VideoSource

PLACE = "tests.cli.train_reader:read"


def read(
    path: bytes, settings: FrameSettings, *, frame_multiple: int = 1, root: bytes | None = None
) -> Frames:
    """Noise that the text decides. "text" is no video, "stuck" hangs, "stale" cannot be read, "once" only at first."""
    name = os.fsdecode(path)
    try:
        text = Path(name).read_text()
    except FileNotFoundError:
        raise VideoNotFoundError(name, "no such file") from None
    if text.startswith("text"):
        raise NotAVideoError(name, "not a video")
    if text.startswith("stuck"):
        time.sleep(600.0)
    if text.startswith("stale"):
        raise VideoUnavailableError(name, "stale file handle")
    if text.startswith("flaky") and not (seen := Path(f"{name}.seen")).exists():
        seen.touch()
        raise VideoUnavailableError(name, "stale file handle")
    generator = np.random.default_rng(zlib.crc32(f"{text} {settings.start_s} {settings.end_s}".encode()))
    count = settings.num_frames or 4
    pixels = generator.integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)
    return Frames(pixels, np.arange(count) * 0.5, VideoSource(2.0, 25.0, 48, 32, "fake 1", 0.1))
