"""One read: open, demux, choose, decode. What `specvlm.video.read_video` calls."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError, VideoDecodeError, VideoRangeError
from specvlm.records import Frames, VideoSource
from specvlm.video import decord_reader, ffmpeg_log, pyav_reader
from specvlm.video.demuxing import Packets, Source, is_long, open_source, read_packets, read_part
from specvlm.video.opening import VideoFile, open_video
from specvlm.video.pixels import Decoded, FrameStore, Memory, own_memory, pixel_limit
from specvlm.video.plan import Plan, plan_of
from specvlm.video.pyav_reader import Reading
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
    with ffmpeg_log.listening() as heard, open_video(path, root) as file:
        hooks.began("index")
        this = _Read(file, heard, settings, frame_multiple, hooks)
        reading = _read_part(this) or _read_whole(this)
        if not len(reading.times_s):
            reason = (
                f"start_s={settings.start_s:g} is past the video's {reading.duration_s:.3f} s; start earlier"
            )
            raise VideoRangeError(file.label, reason)
        decoded = _require_enough(file, reading, settings, frame_multiple)
    source = VideoSource(
        duration_s=reading.duration_s,
        fps=reading.fps,
        width=decoded.width,
        height=decoded.height,
        backend=decord_reader.name() if settings.backend == "decord" else pyav_reader.NAME,
        decode_s=time.perf_counter() - began,
        flags=tuple(_flags(reading, decoded)),
        size_bytes=file.identity.size_bytes,
        mtime_ns=file.identity.mtime_ns,
    )
    return Frames(decoded.pixels, reading.times_s[decoded.places], source)


def _check(settings: FrameSettings, frame_multiple: int) -> None:
    if frame_multiple < 1:
        raise ConfigError(f"frame_multiple={frame_multiple} is out of range; give 1 or more")
    if settings.backend == "decord" and not decord_reader.is_installed():
        raise ConfigError(
            "video backend 'decord' is not installed; pip install decord, or use --video-backend pyav"
        )


class _Read(NamedTuple):
    """What is to be read, of an open file."""

    file: VideoFile
    heard: list[ffmpeg_log.Line]
    settings: FrameSettings
    frame_multiple: int
    hooks: Hooks

    def choose(self, times_s: NDArray[np.float64]) -> NDArray[np.int64]:
        return select_frames(times_s, self.settings, self.frame_multiple)

    def store_for(self, frames: int) -> FrameStore:
        return FrameStore(frames, pixel_limit(self.settings, max(1, frames)), self.hooks.memory)


def _read_part(this: _Read) -> Reading | None:
    """Read what a part of a long film needs; None where the whole has to be read."""
    start_s, end_s = this.settings.start_s, this.settings.end_s
    if this.settings.backend == "decord" or not is_long(this.file, start_s, end_s):
        return None
    with open_source(this.file, this.heard) as source:
        part = read_part(source, start_s, end_s)
        plan = part and plan_of(source, part.packets, part)
        if not part or not plan or not plan.trusted or not len(this.choose(plan.times_s)):
            return None
        this.hooks.began("pyav")
        return pyav_reader.decode_by_plan(source, part.packets, plan, this.choose, this.store_for)


def _read_whole(this: _Read) -> Reading:
    """Read the file from its beginning to its end."""
    with open_source(this.file, this.heard) as source:
        packets = read_packets(source)
        plan = plan_of(source, packets)
        if this.settings.backend == "decord":
            return _read_by_decord(this, source, packets, plan)
        this.hooks.began("pyav")
        return pyav_reader.decode(source, packets, plan, this.choose, this.store_for)


def _read_by_decord(this: _Read, source: Source, packets: Packets, plan: Plan) -> Reading:
    chosen, decoded = this.choose(plan.times_s), Decoded.empty()
    reason = decord_reader.refusal(source, packets, plan)
    if reason is None and len(chosen):
        this.hooks.began("decord")
        try:
            decoded = decord_reader.decode(this.file, plan.times_s, chosen, this.store_for(len(chosen)))
        except decord_reader.DecordFailedError as error:
            reason = str(error)
    if reason is not None:
        advice = f"decord cannot be trusted with it: {reason}; use --video-backend auto or pyav"
        raise VideoDecodeError(this.file.label, advice)
    return Reading(decoded, plan.times_s[chosen], plan, plan.duration_s, plan.fps)


def _require_enough(
    file: VideoFile, reading: Reading, settings: FrameSettings, frame_multiple: int
) -> Decoded:
    """Refuse a video of which too little is left; keep the multiple where the rest holds one."""
    decoded, chosen = reading.decoded, len(reading.times_s)
    intact = len(decoded.places)
    if intact < chosen * settings.min_decoded:
        raise pyav_reader.too_few(file, intact, chosen)
    kept = intact if intact == chosen else intact - intact % frame_multiple or intact
    return decoded._replace(pixels=decoded.pixels[:kept], places=decoded.places[:kept])


def _flags(reading: Reading, decoded: Decoded) -> Iterator[str]:
    """What was unusual. Damage behind the last frame that was needed does not count."""
    partial = len(decoded.places) < len(reading.times_s)
    if reading.plan.truncated:
        yield "truncated"
    if partial or reading.damaged:
        yield "damaged"
    if partial:
        yield "partial"


def preload() -> None:
    """Load the decoders now and read once, so that processes forked from this one start warm."""
    with suppress(Exception):  # each read will say what is wrong with it
        if decord_reader.is_installed():
            decord_reader.load()
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
