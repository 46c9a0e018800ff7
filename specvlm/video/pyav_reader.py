"""The default reader: PyAV. What comes out of the decoder is the truth.

By plan, where the container's index can be trusted: only what the chosen frames need is decoded, each frame known
by the packet it came from, until decoder and index disagree. Straight through otherwise, as `ffmpeg` does: all is
decoded, frames are numbered as they come out, and their times are the decoder's.

A frame is given only if it is intact: every packet from its key frame to its own was there, decoded without a
complaint and gave its picture. What a decoder conceals without saying so cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from specvlm.errors import VideoDecodeError
from specvlm.video.demuxing import CORRUPT, DISCARD, HIDDEN, Packets, Source, demux, open_source, rate_of
from specvlm.video.opening import VideoFile
from specvlm.video.pixels import UPRIGHT, Decoded, FrameStore, Orientation, orientation_of
from specvlm.video.plan import Plan, length_of
from specvlm.video.timing import Stamp, frame_times

NAME = f"pyav {av.__version__}"
# FFmpeg's own decoder gives whatever a damaged VP9 packet says; libvpx, as fast, sees most of the damage.
_STRICTER = {"vp9": "libvpx-vp9"}
# Decoders that give a picture and an error only if told to. Others would refuse spliced videos, which are sound.
_EXPLODE = frozenset({"hevc"})
# Here a packet may say "as before", and give no picture of its own.
_MAY_GIVE_NONE = frozenset("mpeg4 h263 flv1 theora msmpeg4v1 msmpeg4v2 msmpeg4v3 wmv1 wmv2 wmv3 vc1".split())
_CLOCK_MAY_JUMP = frozenset({"mpegts", "mpeg", "ogg"})
_DAMAGE = (av.error.FFmpegError, OSError, ValueError)

Choose = Callable[[NDArray[np.float64]], NDArray[np.int64]]  # [T] times in seconds -> [F] chosen of them
StoreFor = Callable[[int], FrameStore]


class Reading(NamedTuple):
    """What one read found."""

    decoded: Decoded  # `places` among the chosen frames
    times_s: NDArray[np.float64]  # [F] of the chosen frames, seconds from the first of the video
    plan: Plan
    duration_s: float
    fps: float
    damaged: bool = False  # data are missing before or among the chosen frames


class _Chosen(NamedTuple):
    """Frames that are wanted, and the packets that they lean on."""

    times_s: NDArray[np.float64]  # [F]
    numbers: NDArray[np.int64]  # [F] of their own packets
    starts: NDArray[np.int64]  # [F] of the packets from which they can be decoded


def decode(source: Source, packets: Packets, plan: Plan, choose: Choose, store_for: StoreFor) -> Reading:
    """Decode those of the chosen frames that are intact. There are no stand-ins.

    Args:
        source: The open file.
        packets: All its packets.
        plan: Made from them.
        choose: Which frames of those at certain times are wanted; none, if the part asked for is past the end.
        store_for: Makes room for a number of frames.

    Raises:
        VideoDecodeError: Not one of them is intact.
        VideoUnavailableError: The system failed to read the file.
    """
    reading = decode_by_plan(source, packets, plan, choose, store_for) if plan.trusted else None
    return reading or _decode_straight(source, packets, plan, choose, store_for)


def decode_by_plan(
    source: Source, packets: Packets, plan: Plan, choose: Choose, store_for: StoreFor
) -> Reading | None:
    """Decode what the chosen frames need, and no more; None at the first disagreement of decoder and plan.

    `packets` may be those of a part. For the rest see `decode`.
    """
    picks = choose(plan.times_s)
    chosen = _Chosen(plan.times_s[picks], plan.numbers[picks], plan.starts[picks])
    places = {int(number): place for place, number in enumerate(chosen.numbers)}
    store, losses = store_for(len(picks)), plan.losses
    for run in _decode_runs(source, packets, _spans(chosen), places, store):
        silent, damaged = run.silent(packets), _any_between(plan.losses, run.start, run.last)
        as_planned = not silent and run.is_timely(packets)
        if not damaged and not (run.begins_well and (as_planned or run.failed)):
            return None
        losses = np.union1d(losses, np.array([*run.failed, *silent], np.int64))
    return _reading(source, plan, chosen, store, losses, (plan.duration_s, plan.fps))


def _decode_straight(
    source: Source, packets: Packets, plan: Plan, choose: Choose, store_for: StoreFor
) -> Reading:
    """Decode everything, and once more where other frames are chosen than the plan let expect."""
    expected, picks = None, choose(plan.times_s)
    while expected is None or not np.array_equal(picks, expected):
        store, expected = store_for(len(picks)), picks
        places = {int(count): place for place, count in enumerate(picks)}
        (run,) = _decode_runs(source, packets, [(0, len(packets))], places, store, by_count=True)
        if not run.frames:
            raise too_few(source.file, 0, max(1, len(picks)))
        times_s = _times_of(source, run.frames, len(packets))
        picks = choose(times_s)
    numbers = np.array([frame.number for frame in run.frames])
    keys = np.maximum.accumulate([frame.number * frame.is_key for frame in run.frames])
    chosen = _Chosen(times_s[picks], numbers[picks], np.minimum(keys, numbers)[picks])
    # Second fields give no picture of their own, nor do packets that say "as before".
    second = {frame.number + 1 for frame in run.frames if frame.is_interlaced}
    silent = set() if source.codec in _MAY_GIVE_NONE else {*run.silent(packets)} - second
    losses = np.union1d(plan.losses, np.array([*run.failed, *silent], np.int64))
    return _reading(source, plan, chosen, store, losses, length_of(source, times_s, packets.last_duration))


def _reading(
    source: Source,
    plan: Plan,
    chosen: _Chosen,
    store: FrameStore,
    losses: NDArray[np.int64],
    length: tuple[float, float],
) -> Reading:
    """Keep the frames that no loss has reached."""
    count = len(chosen.times_s)
    if count == 0:
        return Reading(Decoded.empty(), chosen.times_s, plan, *length)
    lost = _any_between(losses, chosen.starts, chosen.numbers)
    intact = [place for place in range(count) if place in store.filled and not lost[place]]
    if not intact:
        raise too_few(source.file, 0, count)
    damaged = bool((plan.losses <= chosen.numbers.max()).any())
    return Reading(store.result(intact), chosen.times_s, plan, *length, damaged)


def too_few(file: VideoFile, intact: int, chosen: int) -> VideoDecodeError:
    """The error for a video of which too little is left."""
    reason = f"only {intact} of {chosen} chosen frames can be decoded; damaged, copy it again"
    return VideoDecodeError(file.label, reason)


def _any_between(losses: NDArray[np.int64], first: Any, last: Any) -> Any:
    """For each span of packets whether a loss lies in it."""
    return np.searchsorted(losses, first, side="left") < np.searchsorted(losses, last, side="right")


def _spans(chosen: _Chosen) -> list[tuple[int, int]]:
    """First and last packet of what the chosen frames need, in the order of the file, without overlap."""
    spans: list[tuple[int, int]] = []
    for start, number in sorted(zip(chosen.starts.tolist(), chosen.numbers.tolist(), strict=True)):
        if spans and start <= spans[-1][1] + 1:
            spans[-1] = spans[-1][0], max(spans[-1][1], number)
        else:
            spans.append((start, number))
    return spans


def _times_of(source: Source, frames: Sequence[_Frame], packets: int) -> NDArray[np.float64]:
    """Times of all frames. Where two packets make a picture, its decoder speaks of one."""
    step_s = frames[0].stamp.duration * source.tick_s or float(1 / rate_of(source))
    step_s *= max(1, round(packets / len(frames)))
    stamps = [frame.stamp for frame in frames]
    return frame_times(stamps, source.tick_s, step_s, jumps=source.format in _CLOCK_MAY_JUMP)


class _Frame(NamedTuple):
    """What is remembered of a frame that came out of a decoder."""

    number: int  # of its packet
    stamp: Stamp
    is_key: bool
    is_interlaced: bool


class _Run:
    """Packets that were decoded in one go, and what became of them."""

    def __init__(self, start: int, last: int, knows_keys: bool) -> None:
        self.start = start
        self.last = last
        self.due: list[int] = []  # packets that were not skipped
        self.failed: set[int] = set()
        self.frames: list[_Frame] = []
        self._knows_keys = knows_keys

    @property
    def begins_well(self) -> bool:
        """Whether its first packet is what it is marked as: a key frame."""
        keys = {frame.number for frame in self.frames if frame.is_key or not self._knows_keys}
        return self.start in keys

    def is_timely(self, packets: Packets) -> bool:
        """Whether every frame has the time of its packet."""
        numbers = [frame.number for frame in self.frames]
        times: list[int] = packets.pts[numbers].tolist()
        return [frame.stamp.pts for frame in self.frames] == times

    def silent(self, packets: Packets) -> list[int]:
        """Packets that should have given a picture, and gave none without a word.

        Leading frames, whose reference was never there, should not.
        """
        if not self.frames:
            return self.due
        shown = {frame.number for frame in self.frames} | self.failed
        first, pts, hidden = self.frames[0].number, packets.pts, packets.flags & (DISCARD | HIDDEN | CORRUPT)
        return [
            number
            for number in self.due
            if number not in shown and number > first and pts[number] > pts[first] and not hidden[number]
        ]


def _decode_runs(
    source: Source,
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
        numbered = enumerate(all_packets)
        for start, last in spans:
            run = _Run(start, last, decoder.knows_keys)
            for number, packet in numbered:
                if number < start:
                    continue
                # Another packet than the last one shows whether that was a whole picture.
                skips = not (by_count or {number, number - 1} & places.keys())
                frames = decoder.decode(number, packet, run, skips=skips and source.codec == "h264")
                _take(frames, run, decoder, places, store, by_count)
                if number > last:
                    break
            _take(decoder.drain(), run, decoder, places, store, by_count)
            yield run


def _take(
    frames: Sequence[VideoFrame],
    run: _Run,
    decoder: _Decoder,
    places: dict[int, int],
    store: FrameStore,
    by_count: bool,
) -> None:
    for frame in frames:
        number = cast("tuple[int]", frame.opaque)[0]
        place = places.get(len(run.frames) if by_count else number)
        stamp = Stamp(frame.pts, frame.dts, frame.duration or 0)
        run.frames.append(_Frame(number, stamp, frame.key_frame, frame.interlaced_frame))
        if frame.is_corrupt:
            run.failed.add(number)
        elif place is not None:
            store.put(place, frame, decoder.orientation(frame))


class _Decoder:
    """The decoder of a stream, whose frames bring the number of the packet that they came from."""

    def __init__(self, source: Source) -> None:
        self._native: VideoCodecContext = source.stream.codec_context
        self._context = self._native
        self._orientation: Orientation | None = None
        self._skips = False
        if source.codec in _STRICTER and source.pixel_format == "yuv420p":
            self._context = _other_decoder(_STRICTER[source.codec], self._native)
        if source.codec in _EXPLODE:
            self._context.options = {**self._context.options, "err_detect": "explode"}
        self._context.copy_opaque = True
        self._context.flush_buffers()

    @property
    def knows_keys(self) -> bool:
        """Whether it says of frames that they are key frames; libvpx does not."""
        return self._context is self._native

    def decode(
        self, number: int, packet: Packet[VideoStream], run: _Run, *, skips: bool
    ) -> Sequence[VideoFrame]:
        """What comes out when packet `number` goes in; `skips`: nothing of it, if no other packet leans on it."""
        packet.opaque = (number,)  # PyAV knows it by its identity: no two may share a small integer
        if self._context is not self._native and self._orientation is None:
            self._orientation = _orientation_by(self._native, packet)
        if skips is not self._skips:
            self._context.skip_frame = "NONREF" if skips else "DEFAULT"
            self._skips = skips
        if not skips:
            run.due.append(number)
        try:
            return self._context.decode(packet)
        except _DAMAGE:
            run.failed.add(number)
            return ()

    def drain(self) -> Sequence[VideoFrame]:
        """All that is still to come. After this the decoder begins anew."""
        try:
            frames: Sequence[VideoFrame] = self._context.decode(None)
        except _DAMAGE:
            frames = ()
        self._context.flush_buffers()
        return frames

    def orientation(self, frame: VideoFrame) -> Orientation:
        """How a frame is to be mirrored and turned."""
        return orientation_of(frame) if self.knows_keys else self._orientation or UPRIGHT


def _other_decoder(name: str, native: VideoCodecContext) -> VideoCodecContext:
    try:
        context = CodecContext.create(name, "r")
    except av.codec.codec.UnknownCodecError:  # not part of this build
        return native
    assert isinstance(context, VideoCodecContext)
    context.thread_count = native.thread_count
    context.options = dict(native.options)
    return context


def _orientation_by(native: VideoCodecContext, packet: Packet[VideoStream]) -> Orientation | None:
    """What the container says of the first frame; only the container's own decoder is told."""
    try:
        return next((orientation_of(frame) for frame in native.decode(packet)), None)
    except _DAMAGE:
        return None


@contextmanager
def _from_start(source: Source, packets: Packets) -> Iterator[tuple[Source, Iterable[Packet[VideoStream]]]]:
    """The packets once more: from memory, or by reading the file again."""
    if packets.held is not None:
        yield source, packets.held
        return
    with open_source(source.file, source.heard) as again:
        yield again, _read_again(again)


def _read_again(source: Source) -> Iterator[Packet[VideoStream]]:
    """As they were counted: up to the end or the first one that cannot be read."""
    try:
        for packet in demux(source):
            source.heard.clear()  # a damaged file has its decoder say more than memory should hold
            yield packet
    except (av.error.FFmpegError, OSError):
        return
