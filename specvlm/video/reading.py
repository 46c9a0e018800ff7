"""One read: open, demux, choose, decode. What `specvlm.video.read_video` calls."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import av
from av.video.frame import VideoFrame

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError, Setting, VideoDecodeError
from specvlm.records import Frames, VideoSource
from specvlm.video import decord_reader, ffmpeg_log, pyav_reader
from specvlm.video.demuxing import open_source, read_packets, read_part
from specvlm.video.ffmpeg_log import Line
from specvlm.video.opening import VideoFile, open_video
from specvlm.video.pixels import Decoded, Memory, own_memory
from specvlm.video.plan import plan_of
from specvlm.video.pyav_reader import DecodedFrames, FrameRequest

_LONG_BYTES = 16 << 20  # files from which a part is worth seeking for

Step = Literal["open", "index", "decord", "pyav"]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a process that reads for another one puts in.

    Attributes:
        memory: Gives the memory that frames are put into.
        began: Called with each step as it begins.
    """

    memory: Memory = own_memory
    began: Callable[[Step], object] = lambda _: None


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
    request = FrameRequest(settings, frame_multiple, hooks.memory)
    with ffmpeg_log.listening() as heard, open_video(path, root) as file:
        hooks.began("index")
        reading = _read_part(file, heard, request, hooks) or _read_whole(file, heard, request, hooks)
        decoded = _require_enough(file, reading, request)
    plan = reading.plan
    source = VideoSource(
        duration_s=plan.duration_s,
        fps=plan.fps,
        width=decoded.width,
        height=decoded.height,
        backend=decord_reader.name() if settings.backend == "decord" else pyav_reader.NAME,
        decode_s=time.perf_counter() - began,
        flags=tuple(_flags(reading, decoded)),
        size_bytes=file.identity.size_bytes,
        mtime_ns=file.identity.mtime_ns,
    )
    return Frames(decoded.pixels, plan.times_s[reading.chosen[decoded.places]], source)


def _check(settings: FrameSettings, frame_multiple: int) -> None:
    if frame_multiple < 1:
        raise ConfigError(Setting("frame_multiple", frame_multiple), "is out of range", fix="give 1 or more")
    if settings.backend == "decord" and not decord_reader.is_installed():
        raise ConfigError(
            "video backend 'decord' is not installed; pip install decord, or use --video-backend pyav"
        )


def _read_part(
    file: VideoFile, heard: list[Line], request: FrameRequest, hooks: Hooks
) -> DecodedFrames | None:
    """Read what a part of a long film needs; None where the whole has to be read."""
    start_s, end_s, backend = request.settings.start_s, request.settings.end_s, request.settings.backend
    is_part = start_s > 0.0 or end_s is not None
    if not is_part or file.identity.size_bytes < _LONG_BYTES or backend == "decord":
        return None
    with open_source(file, heard) as source:
        packets = read_part(source, start_s, end_s)
        if packets is None:
            return None
        plan = plan_of(source, packets)
        if not plan.trusted or not len(request.choose(plan.times_s)):
            return None
        hooks.began("pyav")
        return pyav_reader.decode_by_plan(source, packets, plan, request)


def _read_whole(file: VideoFile, heard: list[Line], request: FrameRequest, hooks: Hooks) -> DecodedFrames:
    """Read the file from its beginning to its end."""
    with open_source(file, heard) as source:
        packets = read_packets(source)
        plan = plan_of(source, packets)
        if request.settings.backend != "decord":
            hooks.began("pyav")
            return pyav_reader.decode(source, packets, plan, request)
        chosen = request.choose(plan.times_s)
        if not len(chosen):
            raise pyav_reader.past_the_end(file, plan, request.settings.start_s)
        reason = decord_reader.refusal(source, packets, plan)
        if reason is None:
            hooks.began("decord")
            try:
                decoded = decord_reader.decode(source, plan.times_s, chosen, request.room_for(len(chosen)))
                return DecodedFrames(decoded, plan, chosen)
            except decord_reader.DecordFailedError as error:
                reason = str(error)
        advice = f"decord cannot be trusted with it: {reason}; use --video-backend auto or pyav"
        raise VideoDecodeError(file.label, advice)


def _require_enough(file: VideoFile, reading: DecodedFrames, request: FrameRequest) -> Decoded:
    """Refuse a video of which too little is left; keep the multiple where the rest holds one."""
    decoded, chosen = reading.decoded, len(reading.chosen)
    intact = len(decoded.places)
    if intact < chosen * request.settings.min_decoded:
        raise pyav_reader.too_few(file, intact, chosen)
    kept = intact if intact == chosen else intact - intact % request.frame_multiple or intact
    return decoded._replace(pixels=decoded.pixels[:kept], places=decoded.places[:kept])


def _flags(reading: DecodedFrames, decoded: Decoded) -> Iterator[str]:
    """What was unusual. Damage behind the last frame that was needed does not count."""
    partial = len(decoded.places) < len(reading.chosen)
    if reading.plan.truncated:
        yield "truncated"
    if partial or (reading.plan.losses <= reading.plan.numbers[reading.chosen].max()).any():
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
