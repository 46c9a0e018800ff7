"""The default reader: PyAV. What comes out of the decoder is the truth; docs/reading.md says how.

A frame is given only if it is intact: every packet from its key frame to its own was there, decoded without a
complaint and gave its picture. What a decoder conceals without saying so cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from specvlm.config import FrameSettings
from specvlm.errors import VideoDecodeError, VideoRangeError
from specvlm.video.demuxing import (
    CORRUPT,
    DISCARD,
    HIDDEN,
    UNKNOWN,
    OpenVideo,
    Packets,
    demux,
    open_source,
    rate_of,
)
from specvlm.video.opening import VideoFile
from specvlm.video.pixels import (
    UPRIGHT,
    Decoded,
    FrameStore,
    Memory,
    Orientation,
    orientation_of,
    pixel_limit,
)
from specvlm.video.plan import BROADCAST, FramePlan, length_of
from specvlm.video.sampling import select_frames
from specvlm.video.timing import Stamp, frame_times

NAME = f"pyav {av.__version__}"
# FFmpeg's own decoder gives whatever a damaged VP9 packet says; libvpx, as fast, sees most of the damage.
_STRICTER = {"vp9": "libvpx-vp9"}
# Decoders that give a picture and an error only if asked to. Others would refuse spliced videos, which are sound.
_EXPLODE = frozenset({"hevc"})
# Here a packet may say "as before", and give no picture of its own.
_MAY_GIVE_NONE = frozenset("mpeg4 h263 flv1 theora msmpeg4v1 msmpeg4v2 msmpeg4v3 wmv1 wmv2 wmv3 vc1".split())
_SLICES = range(1, 6)  # parts of a packet of H.264 that are of a picture
_CLOCK_MAY_JUMP = frozenset({"mpegts", "mpeg", "ogg"})


class FrameRequest(NamedTuple):
    """What is asked of a video."""

    settings: FrameSettings
    frame_multiple: int
    memory: Memory

    def choose(self, times_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """[F] which of frames at these times are wanted; none, if the part asked for is past the end."""
        return select_frames(times_s, self.settings, self.frame_multiple)

    def room_for(self, frames: int) -> FrameStore:
        return FrameStore(frames, pixel_limit(self.settings, max(1, frames)), self.memory)


class DecodedFrames(NamedTuple):
    """What one read found."""

    decoded: Decoded  # `places` among the chosen frames
    plan: FramePlan  # as the decoder confirmed or corrected it
    chosen: NDArray[np.int64]  # [F] of the plan's frames, never empty


def decode(source: OpenVideo, packets: Packets, plan: FramePlan, request: FrameRequest) -> DecodedFrames:
    """Decode those of the chosen frames that are intact. There are no stand-ins.

    Args:
        source: The open file.
        packets: All its packets.
        plan: Made from them.
        request: What is wanted.

    Raises:
        VideoDecodeError: Not one of the frames is intact.
        VideoRangeError: The part begins after the end of the video.
        VideoUnavailableError: The system failed to read the file.
    """
    reading = decode_by_plan(source, packets, plan, request) if plan.trusted else None
    return reading or _decode_straight(source, packets, plan, request)


def decode_by_plan(
    source: OpenVideo, packets: Packets, plan: FramePlan, request: FrameRequest
) -> DecodedFrames | None:
    """Decode what the chosen frames need, and no more; None at the first disagreement of decoder and plan.

    `packets` may be those of a part. For the rest see `decode`.
    """
    chosen = request.choose(plan.times_s)
    if not len(chosen):
        raise past_the_end(source.file, plan, request.settings.start_s)
    places = {int(number): place for place, number in enumerate(plan.numbers[chosen])}
    store, losses = request.room_for(len(chosen)), plan.losses
    for run in _decode_runs(source, packets, _spans(plan, chosen), places, store):
        silent, damaged = run.silent(packets), _any_between(plan.losses, run.start, run.last)
        as_planned = not silent and not run.untimely(packets)
        if not damaged and not (run.begins_well() and (as_planned or run.failed)):
            return None
        losses = np.union1d(losses, np.array([*run.failed, *silent], np.int64))
    return _without_lost(source, plan, chosen, store, losses)


def _decode_straight(
    source: OpenVideo, packets: Packets, plan: FramePlan, request: FrameRequest
) -> DecodedFrames:
    """Decode everything, and once more where other frames are chosen than the plan let expect."""
    expected, chosen = None, request.choose(plan.times_s)
    while expected is None or not np.array_equal(chosen, expected):
        store, expected = request.room_for(len(chosen)), chosen
        places = {int(count): place for place, count in enumerate(chosen)}
        (run,) = _decode_runs(source, packets, [(0, len(packets))], places, store, by_count=True)
        if not run.frames:
            raise too_few(source.file, 0, max(1, len(chosen)))
        stamps = [frame.stamp for frame in run.frames]
        # Where two packets make a picture, its decoder speaks of one.
        step_s = stamps[0].duration * source.tick_s or float(1 / rate_of(source))
        step_s *= max(1, round(len(packets) / len(stamps)))
        times_s = frame_times(stamps, source.tick_s, step_s, jumps=source.format in _CLOCK_MAY_JUMP)
        chosen = request.choose(times_s)
    numbers = np.array([frame.number for frame in run.frames])
    keys = np.maximum.accumulate([frame.number * frame.is_key for frame in run.frames])
    duration_s, fps = length_of(source, times_s, packets.last_duration)
    headless = [number for number in run.failed if number < numbers[0] and source.format not in BROADCAST]
    seen = replace(plan, times_s=times_s, numbers=numbers, duration_s=duration_s, fps=fps)
    seen = replace(seen, starts=np.minimum(keys, numbers), losses=np.union1d(plan.losses, headless))
    if not len(chosen):
        raise past_the_end(source.file, seen, request.settings.start_s)
    # Second fields give no picture of their own, nor do packets that say "as before".
    second = {frame.number + 1 for frame in run.frames if frame.is_interlaced}
    silent = set() if source.codec in _MAY_GIVE_NONE else {*run.silent(packets)} - second
    lost = run.failed | silent | run.untimely(packets)
    losses = np.union1d(seen.losses, np.array([*lost], np.int64))
    return _without_lost(source, seen, chosen, store, losses)


def _without_lost(
    source: OpenVideo,
    plan: FramePlan,
    chosen: NDArray[np.int64],
    store: FrameStore,
    losses: NDArray[np.int64],
) -> DecodedFrames:
    """Keep the frames that no loss has reached."""
    lost = _any_between(losses, plan.starts[chosen], plan.numbers[chosen])
    intact = [place for place in range(len(chosen)) if place in store.filled and not lost[place]]
    if not intact:
        raise too_few(source.file, 0, len(chosen))
    return DecodedFrames(store.result(intact), plan, chosen)


def past_the_end(file: VideoFile, plan: FramePlan, start_s: float) -> VideoRangeError:
    """The error for a part that begins after the end."""
    reason = f"start_s={start_s:g} is past the video's {plan.duration_s:.3f} s; start earlier"
    return VideoRangeError(file.label, reason)


def too_few(file: VideoFile, intact: int, chosen: int) -> VideoDecodeError:
    """The error for a video of which too little is left."""
    reason = f"only {intact} of {chosen} chosen frames can be decoded; damaged, copy it again"
    return VideoDecodeError(file.label, reason)


def _any_between(losses: NDArray[np.int64], first: Any, last: Any) -> Any:
    """For each span of packets whether a loss is in it."""
    return np.searchsorted(losses, first, side="left") < np.searchsorted(losses, last, side="right")


def _spans(plan: FramePlan, chosen: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and last packet of what the chosen frames need, in the order of the file, without overlap."""
    spans: list[tuple[int, int]] = []
    for start, number in sorted(np.stack([plan.starts[chosen], plan.numbers[chosen]], 1).tolist()):
        if spans and start <= spans[-1][1] + 1:
            spans[-1] = spans[-1][0], max(spans[-1][1], number)
        else:
            spans.append((start, number))
    return spans


class _Frame(NamedTuple):
    """What is remembered of a frame that came out of a decoder."""

    number: int  # of its packet
    stamp: Stamp
    is_key: bool
    is_interlaced: bool


@dataclass
class _Run:
    """Packets that were decoded in one go, and what became of them."""

    start: int
    last: int
    knows_keys: bool
    due: list[int] = field(default_factory=list)  # packets that were not skipped
    failed: set[int] = field(default_factory=set)
    frames: list[_Frame] = field(default_factory=list)

    def begins_well(self) -> bool:
        """Whether its first packet is what it is marked as: a key frame."""
        return any(one.number == self.start and (one.is_key or not self.knows_keys) for one in self.frames)

    def untimely(self, packets: Packets) -> set[int]:
        """Packets whose frames came with the time of another one, or too late."""
        pts = packets.columns()[0].tolist()
        frames = [frame for frame in self.frames if frame.stamp.pts is not None]
        others = {frame.number for frame in frames if pts[frame.number] not in (frame.stamp.pts, UNKNOWN)}
        pairs = ((before.stamp.pts or 0, frame.stamp.pts or 0, frame) for before, frame in pairwise(frames))
        return others | {frame.number for last, now, frame in pairs if now < last and not frame.is_key}

    def silent(self, packets: Packets) -> list[int]:
        """Packets that should have given a picture, and gave none without a word.

        Leading frames, whose reference was never there, should not.
        """
        if not self.frames:
            return self.due
        shown = {frame.number for frame in self.frames} | self.failed
        first, (pts, _, flags, _) = self.frames[0].number, packets.columns()
        due = (pts > pts[first]) & (flags & (DISCARD | HIDDEN | CORRUPT) == 0)
        return [number for number in self.due if number > first and due[number] and number not in shown]


def _decode_runs(
    source: OpenVideo,
    packets: Packets,
    spans: Sequence[tuple[int, int]],
    places: dict[int, int],
    store: FrameStore,
    *,
    by_count: bool = False,
) -> Iterator[_Run]:
    """Decode spans of packets, and store the frames whose packets, or whose count, are in `places`."""
    with _from_start(source, packets) as (again, all_packets):
        decoder = _Decoder(again)

        def take(frames: Sequence[VideoFrame], run: _Run) -> None:
            for frame in frames:
                number = cast("tuple[int]", frame.opaque)[0]
                place = places.get(len(run.frames) if by_count else number)
                stamp = Stamp(frame.pts, frame.dts, frame.duration or 0)
                run.frames.append(_Frame(number, stamp, frame.key_frame, frame.interlaced_frame))
                if frame.is_corrupt:
                    run.failed.add(number)
                elif place is not None:
                    store.put(place, frame, decoder.orientation or orientation_of(frame))

        numbered = enumerate(all_packets)
        for start, last in spans:
            run = _Run(start, last, decoder.knows_keys)
            for number, packet in numbered:
                if number < start:
                    continue
                # The packet behind the last one shows whether that was a whole picture.
                near = by_count or {number, number - 1} & places.keys()
                skips = (
                    not near and decoder.length_bytes > 0 and _is_unreferenced(packet, decoder.length_bytes)
                )
                take(decoder.decode(number, packet, run, skips=skips), run)
                if number > last:
                    break
            take(decoder.drain(), run)
            yield run


class _Decoder:
    """The decoder of a stream, whose frames bring the number of the packet that they came from.

    Attributes:
        knows_keys: It says of frames whether they are key frames; libvpx does not.
        orientation: That of all frames; None: each frame has its own.
        length_bytes: Size of the lengths between parts of a packet of H.264; 0: there are none.
    """

    def __init__(self, source: OpenVideo) -> None:
        self._native: VideoCodecContext = source.stream.codec_context
        self._context = self._native
        self.knows_keys = True
        self.orientation: Orientation | None = None
        head = (self._native.extradata or b"")[:5]
        self.length_bytes = (head[4] & 3) + 1 if source.codec == "h264" and head[:1] == b"\1" else 0
        self._skips = False
        self._heard = source.heard
        if source.codec in _STRICTER and source.pixel_format == "yuv420p":
            with suppress(av.codec.codec.UnknownCodecError):  # not part of this build
                self._context = cast("VideoCodecContext", CodecContext.create(_STRICTER[source.codec], "r"))
                self._context.thread_count = self._native.thread_count
                self._context.options = dict(self._native.options)
                self.knows_keys = False
        if source.codec in _EXPLODE:
            self._context.options = {**self._context.options, "err_detect": "explode"}
        self._context.copy_opaque = True
        self._context.flush_buffers()

    def decode(
        self, number: int, packet: Packet[VideoStream], run: _Run, *, skips: bool
    ) -> Sequence[VideoFrame]:
        """What comes out when packet `number` goes in; `skips`: nothing of it, if no other packet leans on it."""
        packet.opaque = (number,)  # PyAV knows it by its identity: no two may share a small integer
        if not self.knows_keys and self.orientation is None:
            # Only the container's own decoder is set up.
            self.orientation = next(map(orientation_of, _decoded(self._native, packet) or ()), UPRIGHT)
        if skips is not self._skips:
            self._context.skip_frame = "NONREF" if skips else "DEFAULT"
            self._skips = skips
        if not skips:
            run.due.append(number)
        frames = _decoded(self._context, packet)
        self._heard.clear()  # a damaged file has its decoder say more than memory should hold
        if frames is None:
            run.failed.add(number)
        return frames or ()

    def drain(self) -> Sequence[VideoFrame]:
        """All that is still to come. After this the decoder starts over."""
        frames = _decoded(self._context, None)
        self._context.flush_buffers()
        return frames or ()


def _decoded(context: VideoCodecContext, packet: Packet[VideoStream] | None) -> list[VideoFrame] | None:
    """What comes out when a packet goes in, or the last one has; None: the decoder refuses it."""
    try:
        return context.decode(packet)
    except (av.error.FFmpegError, OSError, ValueError):
        return None


def _is_unreferenced(packet: Packet[VideoStream], length_bytes: int) -> bool:
    """Whether a packet of H.264 is a whole picture that no other one leans on (ITU-T H.264, 7.3.1)."""
    data, place, slices = memoryview(packet), 0, 0
    while place + length_bytes < len(data):
        head = data[place + length_bytes]
        if head & 0x1F in _SLICES and head & 0x60:
            return False
        slices += head & 0x1F == 1
        place += length_bytes + int.from_bytes(data[place : place + length_bytes], "big")
    return slices > 0 and place == len(data)


@contextmanager
def _from_start(
    source: OpenVideo, packets: Packets
) -> Iterator[tuple[OpenVideo, Iterable[Packet[VideoStream]]]]:
    """The packets once more: from memory, or by reading the file again, up to where that failed before."""
    if packets.held is not None:
        yield source, packets.held
    else:
        with open_source(source.file, source.heard) as again:
            yield again, islice(demux(again), len(packets))
