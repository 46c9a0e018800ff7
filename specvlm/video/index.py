"""The packet index: every frame's time and where to begin decoding for it, read without decoding anything.

Headers lie about durations and frame counts; packets do not. Both readers lean on this index, and on nothing
in the headers but the frame size. What demuxing shows of damage stands here too. It knows no pixels and no
choice of frames.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from specvlm.errors import NotAVideoError, VideoDecodeError, VideoError
from specvlm.video import ffmpeg_log
from specvlm.video.contents import Contents, ends_early
from specvlm.video.opening import VideoFile
from specvlm.video.sampling import mean_gap_s

Clock = Literal["pts", "dts", "count"]

MAX_PIXELS = 8192 * 8192
_BUFFER_BYTES = 1 << 16
_UNKNOWN = -(1 << 63)
_KEY, _DISCARD, _CORRUPT, _HIDDEN = 1, 2, 4, 8
# Old, common, fuzzed decoders. What else FFmpeg carries has no place in front of untrusted files.
# fmt: off
_CODECS = frozenset({
    "h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv1", "theora",
    "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1",
    "mjpeg", "png", "gif", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "rawvideo",
})
# fmt: on
# Entropy-coded to the last byte, by decoders that take zeros for pictures: a lost disk block shows here alone.
_DENSE = frozenset({"vp8", "vp9", "hevc"})
_HOLE = bytes(256)
_ONLY_THE_END = ("ended prematurely", "partial file")  # complaints that are no loss in the middle
_MOST_COMPLAINTS = 1000
_PLACE = re.compile(r"\bat (?:pos )?(\d+|0x[0-9a-f]+)\b")
_BROADCAST = frozenset({"mpegts", "mpeg"})


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """All frames of a video, in presentation order.

    Attributes:
        times_s: [T] presentation times in seconds from the first frame.
        labels: [T] what a decoded frame is known by: its time on `clock`, increasing.
        numbers: [T] number of the frame's own packet, in file order.
        starts: [T] number of the packet from which decoding must begin for this frame.
        clock: Where times come from: `pts`; `dts` where there are no others (AVI), and frames come in the order
            of their packets; `count` where they do not: the n-th frame that comes out has the n-th time.
        losses: [K] numbers of packets that are corrupt, or behind which data are missing; increasing.
        truncated: The file ends before its container says, or demuxing it ended in an error.
        duration_s: Length of the video; the last frame is taken to last as long as the mean one.
        fps: Mean frame rate; 0 where a single frame does not tell.
        width: Coded width from the header, before rotation.
        height: Coded height from the header, before rotation.
        pixel_format: FFmpeg's name of the decoded pixels' format.
        container: FFmpeg's name of the container.
        codec: FFmpeg's name of the codec.
        doubts: Why a reader that trusts headers and seeks by frame number may go wrong; empty where nothing
            speaks against it.
    """

    times_s: NDArray[np.float64]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]
    clock: Clock
    losses: NDArray[np.int64]
    truncated: bool
    duration_s: float
    fps: float
    width: int
    height: int
    pixel_format: str
    container: str
    codec: str
    doubts: tuple[str, ...]


@contextmanager
def open_container(file: VideoFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file's demuxer and its first real video stream, set to decode on one thread.

    Raises:
        NotAVideoError: There is no video stream in it.
        VideoDecodeError: The container cannot be read, or its codec or frame size is not accepted.
        VideoUnavailableError: The system failed to read the file.
    """
    contents = Contents(file)
    try:
        with _demuxer(contents, file) as container:
            stream = _video_stream(container, file)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may grow in mid-stream
            yield container, stream
    except VideoError:
        contents.require_read()  # says more than what it made the demuxer say
        raise
    contents.require_read()


def _demuxer(contents: Contents, file: VideoFile) -> InputContainer:
    try:
        # The container is fixed by the signature, and these demuxers open no second file or URL: no playlist,
        # no `concat`, and mov's external references are off unless asked for.
        return av.open(contents, "r", format=file.container, buffer_size=_BUFFER_BYTES)
    except (av.error.FFmpegError, OSError, ValueError):
        raise VideoDecodeError(
            file.label, f"its {file.container} container is cut short or damaged; copy or download it again"
        ) from None


def _video_stream(container: InputContainer, file: VideoFile) -> VideoStream:
    streams = _real_streams(container)
    if not streams:
        raise NotAVideoError(file.label, "holds no video stream (audio only?); give a file with pictures")
    stream = streams[0]
    codec = _codec_name(stream)
    if codec not in _CODECS:
        raise VideoDecodeError(file.label, f"its codec {codec} is not supported; convert it to h264 first")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= MAX_PIXELS:
        raise VideoDecodeError(
            file.label,
            f"its frames of {width}x{height} are not within 1 to {MAX_PIXELS} pixels; scale it first",
        )
    return stream


def _real_streams(container: InputContainer) -> list[VideoStream]:
    """Video streams that are not a song's cover."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def _codec_name(stream: VideoStream) -> str:
    context = stream.codec_context
    return context.codec.canonical_name if context is not None else "unknown"


@dataclass(slots=True)
class _Packets:
    """What demuxing tells of each packet, in file order; compact, because a day of video has millions."""

    pts: array[int]
    dts: array[int]
    flags: array[int]  # _KEY, _DISCARD, _CORRUPT, _HIDDEN: shows no frame of its own
    places: array[int]  # in the file; _UNKNOWN where the container does not tell
    complaints: list[tuple[int, str]] = field(default_factory=list)  # before which packet, and what was said
    last_duration: int = 0
    ended_early: bool = False


def _flags(packet: Packet[VideoStream], codec: str) -> int:
    # VP8's alternate references are packets with a time of their own that are never shown (RFC 6386, 9.1).
    hidden = codec == "vp8" and not bytes(packet)[0] >> 4 & 1
    corrupt = packet.is_corrupt or (codec in _DENSE and _HOLE in bytes(packet).rstrip(b"\0"))
    return _KEY * packet.is_keyframe | _DISCARD * packet.is_discard | _CORRUPT * corrupt | _HIDDEN * hidden


def demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """All packets of the stream that are not empty.

    Raises:
        av.error.FFmpegError, OSError: They cannot be read on.
    """
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except IndexError:
        return  # PyAV's, at the end, where a transport stream has announced further streams on its way


def _demux(container: InputContainer, stream: VideoStream, errors: list[ffmpeg_log.Line]) -> _Packets:
    packets = _Packets(array("q"), array("q"), array("B"), array("q"))
    codec = _codec_name(stream)
    try:
        for packet in demux(container, stream):
            _note_complaints(container, packets, errors)
            packets.pts.append(_UNKNOWN if packet.pts is None else packet.pts)
            packets.dts.append(_UNKNOWN if packet.dts is None else packet.dts)
            packets.flags.append(_flags(packet, codec))
            packets.places.append(_UNKNOWN if packet.pos is None else packet.pos)
            packets.last_duration = packet.duration or 0
    except (av.error.FFmpegError, OSError):
        packets.ended_early = True
    _note_complaints(container, packets, errors)
    return packets


def _note_complaints(container: InputContainer, packets: _Packets, errors: list[ffmpeg_log.Line]) -> None:
    """Note where the demuxer has lost its way, and forget what was said until now."""
    room = _MOST_COMPLAINTS - len(packets.complaints)
    for _, who, what in errors[:room]:
        if container.format.name in who.split(",") and not any(words in what for words in _ONLY_THE_END):
            packets.complaints.append((len(packets.pts), what))
    errors.clear()


def read_index(file: VideoFile) -> PacketIndex:
    """Demux the whole file, decode nothing.

    Raises:
        NotAVideoError: There is no video stream in it.
        VideoDecodeError: Not one frame with a known time is in it, or the file cannot be demuxed.
        VideoUnavailableError: The system failed to read the file.
    """
    with ffmpeg_log.listening() as errors, open_container(file) as (container, stream):
        packets = _demux(container, stream, errors)
        return _build(container, stream, packets, file)


def _build(container: InputContainer, stream: VideoStream, packets: _Packets, file: VideoFile) -> PacketIndex:
    if not packets.pts:
        raise _no_frame(file)
    flags = np.array(packets.flags, np.uint8)
    pts, dts = np.array(packets.pts, np.int64), np.array(packets.dts, np.int64)
    clock = _clock(stream, file, pts)
    if clock == "count":
        ticks, labels, numbers, starts = _by_count(pts, dts, flags)
    else:
        ticks, labels, numbers, starts = _by_time(pts if clock == "pts" else dts, flags)
    if len(ticks) == 0:
        raise _no_frame(file)
    base = stream.time_base or Fraction(1)
    times_s = (ticks - ticks[0]).astype(np.float64) * base.numerator / base.denominator
    gap_s = mean_gap_s(times_s)
    truncated = packets.ended_early or ends_early(file)
    context = stream.codec_context
    return PacketIndex(
        times_s=times_s,
        labels=labels,
        numbers=numbers,
        starts=starts,
        clock=clock,
        losses=_losses(file, packets, flags),
        truncated=truncated,
        duration_s=float(times_s[-1]) + (gap_s or float(packets.last_duration * base)),
        fps=1.0 / gap_s if gap_s else float(stream.average_rate or 0),
        width=context.width,
        height=context.height,
        pixel_format=context.format.name if context.format else "unknown",
        container=file.container,
        codec=_codec_name(stream),
        doubts=("it is cut short",) * truncated + tuple(_doubts(container, stream, packets, pts, flags)),
    )


def _clock(stream: VideoStream, file: VideoFile, pts: NDArray[np.int64]) -> Clock:
    if file.container != "avi" and 2 * int((pts != _UNKNOWN).sum()) >= len(pts):
        return "pts"
    return "count" if stream.codec_context.has_b_frames else "dts"


def _losses(file: VideoFile, packets: _Packets, flags: NDArray[np.uint8]) -> NDArray[np.int64]:
    places = np.array(packets.places)
    gaps = np.array([_gap(places, before, what) for before, what in packets.complaints], np.int64)
    corrupt = np.flatnonzero(flags & _CORRUPT)
    keys = np.flatnonzero(flags & _KEY)
    # Broadcasts may be recorded from anywhere on; other files begin with a key frame, unless it is lost.
    headless = np.arange(keys[0] if len(keys) and file.container not in _BROADCAST else 0)
    # Where the demuxer loses its way, what came last may have had the wrong length, and so the wrong end.
    doubtful = np.union1d(gaps - 1, gaps - 2)
    return np.union1d(np.union1d(doubtful, corrupt), headless).astype(np.int64)


def _gap(places: NDArray[np.int64], before: int, what: str) -> int:
    """The packet before which data are missing.

    Opening a file demuxes the first part of it, so what is said then may be of any packet; Matroska tells the
    place in the file.
    """
    place = _PLACE.search(what)
    if before or place is None:
        return before
    return int(np.searchsorted(places, int(place[1], 0)))


def _no_frame(file: VideoFile) -> VideoDecodeError:
    return VideoDecodeError(file.label, "holds no frame: cut short or damaged; copy or download it again")


class _Order(NamedTuple):
    ticks: NDArray[np.int64]  # [T] times in units of the stream's time base
    labels: NDArray[np.int64]  # and so on, as in PacketIndex
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]


def _by_time(pts: NDArray[np.int64], flags: NDArray[np.uint8]) -> _Order:
    """Frames known by their time. Nothing before the first key frame, in either order, can be decoded."""
    keys = np.flatnonzero((flags & (_KEY | _CORRUPT) == _KEY) & (pts != _UNKNOWN))
    shown = (pts != _UNKNOWN) & (flags & (_DISCARD | _CORRUPT | _HIDDEN) == 0)
    if len(keys):
        shown &= (np.arange(len(pts)) >= keys[0]) & (pts >= pts[keys[0]])
    numbers = np.flatnonzero(shown)
    ticks, where = np.unique(pts[numbers], return_index=True)
    return _Order(ticks, ticks, numbers[where], _starts(ticks, numbers[where], pts, keys))


def _starts(
    ticks: NDArray[np.int64], numbers: NDArray[np.int64], pts: NDArray[np.int64], keys: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The last key packet that is shown no later than each frame; leading frames get an earlier one."""
    if not len(keys):
        return np.zeros(len(ticks), np.int64)
    in_time = keys[np.argsort(pts[keys], kind="stable")]
    start = in_time[np.maximum(np.searchsorted(pts[in_time], ticks, side="right") - 1, 0)]
    return np.where(start <= numbers, start, keys[0]).astype(np.int64)


def _by_count(pts: NDArray[np.int64], dts: NDArray[np.int64], flags: NDArray[np.uint8]) -> _Order:
    """Frames known by their rank: the n-th frame that comes out has the n-th of all packets' times."""
    ticks = np.where(pts != _UNKNOWN, pts, dts)
    first_key = int(np.argmax(flags & _KEY))  # 0 where there is none
    numbers = first_key + np.flatnonzero(flags[first_key:] & (_DISCARD | _HIDDEN) == 0)
    numbers = numbers[np.argsort(ticks[numbers], kind="stable")]
    good = (ticks[numbers] != _UNKNOWN) & (flags[numbers] & _CORRUPT == 0)
    ranks = np.flatnonzero(good).astype(np.int64)
    numbers = numbers[good]
    return _Order(ticks[numbers], ranks, numbers, np.full(len(ranks), first_key, np.int64))


def _doubts(
    container: InputContainer,
    stream: VideoStream,
    packets: _Packets,
    pts: NDArray[np.int64],
    flags: NDArray[np.uint8],
) -> Iterator[str]:
    known = pts[pts != _UNKNOWN]
    if len(_real_streams(container)) > 1:
        yield "several video streams"
    if packets.complaints or (flags & _CORRUPT).any():
        yield "damaged packets"
    if not flags[0] & _KEY:
        yield "it does not begin with a key frame"
    if len(known) < len(pts):
        yield "packets without a time"
    if len(np.unique(known)) < len(known):
        yield "packets with the same time"
    if (flags & (_DISCARD | _HIDDEN)).any():
        yield "packets that are not shown"
    if _has_leading_frames(pts, flags):
        yield "open groups of pictures"
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        yield "reordered frames in a container without presentation times"
    if not _count_agrees(container, stream, len(pts)):
        yield "its header and its packets disagree on the number of frames"


def _has_leading_frames(pts: NDArray[np.int64], flags: NDArray[np.uint8]) -> bool:
    """Whether any frame is shown before a key frame that comes earlier in the file."""
    keys = np.where(flags & _KEY > 0, pts, _UNKNOWN)
    return bool((pts < np.maximum.accumulate(keys)).any())


def _count_agrees(container: InputContainer, stream: VideoStream, packets: int) -> bool:
    if stream.frames:
        return bool(stream.frames == packets)
    if not container.duration or not stream.average_rate:
        return False
    expected = container.duration / av.time_base * float(stream.average_rate)
    return abs(expected - packets) <= max(4.0, 0.02 * packets)
