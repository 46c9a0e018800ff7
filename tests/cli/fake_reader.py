"""Reads a video that is a text file. Each start of the command imports this anew, so it imports little."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from specvlm.config import FrameSettings
from specvlm.errors import NotAVideoError, VideoDecodeError, VideoNotFoundError, VideoUnavailableError
from specvlm.records import Frames, VideoSource

READER = "tests.cli.fake_reader:read"


def read(
    path: bytes, settings: FrameSettings, *, frame_multiple: int = 1, root: bytes | None = None
) -> Frames:
    """Return frames whose pixels are the text, which may say what is wrong. Runs in the reading child."""
    name = os.fsdecode(path)
    if not os.path.exists(path):
        raise VideoNotFoundError(name, "no such file")
    text = Path(name).read_text()
    if text.startswith("text"):
        raise NotAVideoError(name, "not a video")
    if text.startswith("damaged"):
        raise VideoDecodeError(name, "no frame can be decoded")
    if text.startswith("stale"):
        raise VideoUnavailableError(name, "stale file handle")
    if text.startswith(("slow", "stuck")):
        time.sleep(0.1 if text.startswith("slow") else 600.0)
    pixels = np.frombuffer(text.encode(), np.uint8).repeat(3).reshape(1, 1, -1, 3)
    source = VideoSource(2.0, 25.0, 64, 48, "fake 1", 0.1, size_bytes=len(text), mtime_ns=1)
    return Frames(pixels.repeat(8, axis=0), np.arange(8.0), source)


def text_of(frames: Frames) -> str:
    """Return the text that `read` put into the pixels."""
    return bytes(np.ascontiguousarray(frames.pixels[0, 0, :, 0])).decode()
