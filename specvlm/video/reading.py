"""One read: open, index, choose, decode by the right reader. What `specvlm.video.read_video` calls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
from numpy.typing import NDArray

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError, VideoDecodeError, VideoRangeError
from specvlm.records import Frames, VideoSource
from specvlm.video import decord_reader, pyav_reader
from specvlm.video.index import PacketIndex, read_index
from specvlm.video.opening import VideoFile, open_video
from specvlm.video.pixels import Decoded, pixel_limit
from specvlm.video.sampling import select_frames


def read(path: str | os.PathLike[str] | bytes, settings: FrameSettings, frame_multiple: int) -> Frames:
    """See `specvlm.video.read_video`."""
    began = time.perf_counter()
    _check(settings, frame_multiple)
    with _quiet_ffmpeg(), open_video(path) as file:
        index = read_index(file)
        chosen = _choose(file, index, settings, frame_multiple)
        decoded, backend = _decode(file, index, chosen, settings)
    source = VideoSource(
        duration_s=index.duration_s,
        fps=index.fps,
        width=decoded.width,
        height=decoded.height,
        backend=backend,
        decode_s=time.perf_counter() - began,
    )
    return Frames(decoded.pixels, index.times_s[chosen], source)


def _check(settings: FrameSettings, frame_multiple: int) -> None:
    if frame_multiple < 1:
        raise ConfigError(f"frame_multiple={frame_multiple} is out of range; give 1 or more")
    if settings.backend == "decord" and not decord_reader.is_installed():
        raise ConfigError(
            "video backend 'decord' is not installed; pip install decord, or use --video-backend pyav"
        )


@contextmanager
def _quiet_ffmpeg() -> Iterator[None]:
    """Keep FFmpeg's own lines off the screen; what matters is in the errors. The level is put back."""
    level = av.logging.get_level()
    av.logging.set_level(None)
    try:
        yield
    finally:
        av.logging.set_level(level)


def _choose(
    file: VideoFile, index: PacketIndex, settings: FrameSettings, frame_multiple: int
) -> NDArray[np.int64]:
    chosen = select_frames(index.times_s, settings, frame_multiple)
    if not len(chosen):
        reason = f"start_s={settings.start_s:g} is past the video's {index.duration_s:.3f} s; start earlier"
        raise VideoRangeError(file.label, reason)
    return chosen


def _decode(
    file: VideoFile, index: PacketIndex, chosen: NDArray[np.int64], settings: FrameSettings
) -> tuple[Decoded, str]:
    """The frames, and the name of the reader that gave them."""
    limit = pixel_limit(settings, len(chosen))
    if settings.backend != "pyav" and decord_reader.is_installed():
        try:
            return decord_reader.decode(file, index, chosen, limit)
        except decord_reader.DecordFailedError as error:
            if settings.backend == "decord":
                reason = f"decord cannot be trusted with it: {error}; use --video-backend auto or pyav"
                raise VideoDecodeError(file.label, reason) from None
    return pyav_reader.decode(file, index, chosen, limit), pyav_reader.NAME
