"""One read: open, index, choose, decode by the right reader. What `specvlm.video.read_video` calls."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError, VideoDecodeError, VideoRangeError
from specvlm.records import Frames, VideoSource
from specvlm.video import decord_log, decord_reader, ffmpeg_log, pyav_reader
from specvlm.video.index import PacketIndex, read_index
from specvlm.video.opening import VideoFile, open_video
from specvlm.video.pixels import Decoded, Memory, own_memory, pixel_limit
from specvlm.video.sampling import select_frames

Step = Literal["open", "index", "decord", "pyav"]


def _unheard(_: Step) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a process that reads for another one puts in.

    Attributes:
        memory: Gives the memory that frames are put into.
        began: Told each step as it begins.
    """

    memory: Memory = own_memory
    began: Callable[[Step], None] = _unheard


_NO_HOOKS = Hooks()


def read(
    path: str | os.PathLike[str] | bytes,
    settings: FrameSettings,
    frame_multiple: int = 1,
    root: str | os.PathLike[str] | bytes | None = None,
    hooks: Hooks = _NO_HOOKS,
) -> Frames:
    """See `specvlm.video.read_video`."""
    began = time.perf_counter()
    _check(settings, frame_multiple)
    hooks.began("open")
    with ffmpeg_log.listening(), open_video(path, root) as file:
        hooks.began("index")
        index = read_index(file)
        chosen = _choose(file, index, settings, frame_multiple)
        decoded, backend, fell_back = _decode(file, index, chosen, settings, hooks)
        decoded = _require_enough(file, decoded, len(chosen), settings, frame_multiple)
    flags = _flags(index, chosen, decoded, fell_back)
    source = VideoSource(
        duration_s=index.duration_s,
        fps=index.fps,
        width=decoded.width,
        height=decoded.height,
        backend=backend,
        decode_s=time.perf_counter() - began,
        flags=tuple(flags),
        size_bytes=file.identity.size_bytes,
        mtime_ns=file.identity.mtime_ns,
    )
    return Frames(decoded.pixels, index.times_s[chosen[decoded.places]], source)


def _check(settings: FrameSettings, frame_multiple: int) -> None:
    if frame_multiple < 1:
        raise ConfigError(f"frame_multiple={frame_multiple} is out of range; give 1 or more")
    if settings.backend == "decord" and not decord_reader.is_installed():
        raise ConfigError(
            "video backend 'decord' is not installed; pip install decord, or use --video-backend pyav"
        )


def _choose(
    file: VideoFile, index: PacketIndex, settings: FrameSettings, frame_multiple: int
) -> NDArray[np.int64]:
    chosen = select_frames(index.times_s, settings, frame_multiple)
    if not len(chosen):
        reason = f"start_s={settings.start_s:g} is past the video's {index.duration_s:.3f} s; start earlier"
        raise VideoRangeError(file.label, reason)
    return chosen


def _decode(
    file: VideoFile, index: PacketIndex, chosen: NDArray[np.int64], settings: FrameSettings, hooks: Hooks
) -> tuple[Decoded, str, bool]:
    """The frames, the name of the reader that gave them, and whether another one had failed before."""
    limit = pixel_limit(settings, len(chosen))
    reason = _against_decord(index, settings)
    tried = reason is None
    if tried:
        hooks.began("decord")
        try:
            return *decord_reader.decode(file, index, chosen, limit, hooks.memory), False
        except decord_reader.DecordFailedError as error:
            reason = str(error)
    if settings.backend == "decord":
        advice = f"decord cannot be trusted with it: {reason}; use --video-backend auto or pyav"
        raise VideoDecodeError(file.label, advice)
    hooks.began("pyav")
    return pyav_reader.decode(file, index, chosen, limit, hooks.memory), pyav_reader.NAME, tried


def _against_decord(index: PacketIndex, settings: FrameSettings) -> str | None:
    if settings.backend == "pyav" or not decord_reader.is_installed():
        return "it is not wanted, or not there"
    return decord_reader.refusal(index)


def _require_enough(
    file: VideoFile, decoded: Decoded, chosen: int, settings: FrameSettings, frame_multiple: int
) -> Decoded:
    """Refuse a video of which too little is left; keep the multiple where the rest holds one."""
    intact = len(decoded.places)
    if intact < chosen * settings.min_decoded:
        raise pyav_reader.too_few(file, intact, chosen)
    kept = intact if intact == chosen else intact - intact % frame_multiple or intact
    return decoded._replace(pixels=decoded.pixels[:kept], places=decoded.places[:kept])


def _flags(index: PacketIndex, chosen: NDArray[np.int64], decoded: Decoded, fell_back: bool) -> Iterator[str]:
    """What was unusual. Damage behind the last frame that was needed does not count."""
    partial = len(decoded.places) < len(chosen)
    if index.truncated:
        yield "truncated"
    if partial or (index.losses <= index.numbers[chosen].max()).any():
        yield "damaged"
    if partial:
        yield "partial"
    if fell_back:
        yield "fallback"


def preload() -> None:
    """Load the decoders now and read once, so that processes forked from this one start warm."""
    with suppress(Exception):  # each read will say what is wrong with it
        if decord_reader.is_installed():
            decord_reader.load()
            with decord_log.listening():
                pass
        _read_something()


def _read_something() -> None:
    """Read a clip of one black picture: first use costs more than the imports."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=1)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode(None))
        file.flush()
        read(file.name, FrameSettings(num_frames=1, backend="pyav"))
