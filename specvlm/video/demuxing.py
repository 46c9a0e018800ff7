"""The packets of a video: which stream, what each says of itself, what was lost. Decodes nothing, plans nothing."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from specvlm.errors import NotAVideoError, VideoDecodeError, VideoError
from specvlm.video import ffmpeg_log
from specvlm.video.contents import Contents
from specvlm.video.opening import VideoFile

MAX_PIXELS = 8192 * 8192
UNKNOWN = -(1 << 63)
KEY, DISCARD, CORRUPT, HIDDEN = 1, 2, 4, 8
INDEXED = frozenset({"mov", "matroska"})  # containers with an index of their own
# FFmpeg's names of demuxers that open no second file or URL, and ours. Playlists and `concat` are not among them.
_FORMATS = {
    "mov,mp4,m4a,3gp,3g2,mj2": "mov",
    "matroska,webm": "matroska",
    **{name: name for name in ("avi", "flv", "mpegts", "mpeg", "asf", "ogg", "gif")},
}
# Old, common, fuzzed decoders. What else FFmpeg carries has no place in front of untrusted files.
# fmt: off
_CODECS = frozenset({
    "h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv1", "theora",
    "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1",
    "mjpeg", "png", "gif", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "rawvideo",
})
# fmt: on
_Disposition = av.stream.Disposition
_BESIDE = _Disposition.attached_pic | _Disposition.timed_thumbnails | _Disposition.still_image
# Entropy-coded to the last byte, by decoders that take zeros for pictures: a lost disk block shows here alone.
_DENSE = frozenset({"vp8", "vp9", "hevc"})
_HOLE = bytes(256)
_ONLY_THE_END = ("ended prematurely", "partial file")  # complaints that are no loss in the middle
_MOST_COMPLAINTS = 1000
_PLACE = re.compile(r"\bat (?:pos )?(\d+|0x[0-9a-f]+)\b")
_GUESS_STAMPS = 1  # AVFMT_FLAG_GENPTS
_BUFFER_BYTES = 1 << 16
_HELD_BYTES = 256 << 20  # packets that are kept for decoding; of larger files they are read again
_REORDERED = 33  # packets within which the first frame to be shown is found, whatever the order
_HIGHEST_RATE = 240  # frames a second; more is what FFmpeg guesses from too few times
_FAR_TICKS = 1 << 50
_PAUSE_S = (
    3.0  # before a key packet: there a recording was stopped, or joined to another one; losses are shorter
)


class OpenVideo(NamedTuple):
    """An open container and its video stream. Valid inside `open_source` only."""

    file: VideoFile
    container: InputContainer
    stream: VideoStream
    format: str  # mov, matroska, avi, flv, mpegts, mpeg, asf, ogg or gif
    codec: str  # FFmpeg's name
    heard: list[ffmpeg_log.Line]  # FFmpeg's complaints in this thread since they were last looked at

    @property
    def tick_s(self) -> float:
        """Length of one unit of the packets' times."""
        return float(self.stream.time_base or 1)

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name of the decoded pixels' format."""
        context = self.stream.codec_context
        return context.format.name if context.format else "unknown"


@contextmanager
def open_source(file: VideoFile, heard: list[ffmpeg_log.Line]) -> Iterator[OpenVideo]:
    """Open the file's demuxer and its main video stream, set to decode on one thread.

    Raises:
        NotAVideoError: It is no container that is read, or there is no video stream in it.
        VideoDecodeError: The container cannot be read, or its codec or frame size is not accepted.
        VideoUnavailableError: The system failed to read the file.
    """
    contents = Contents(file)
    try:
        with _demuxer(contents, file, heard) as container:
            stream = _main_stream(container, file)
            for other in container.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            # PyAV asks for guessed stamps; a decoder guesses better.
            container.flags &= ~_GUESS_STAMPS
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may grow in mid-stream
            name = _FORMATS[container.format.name]
            yield OpenVideo(file, container, stream, name, _codec_name(stream), heard)
    except VideoError:
        contents.require_read()  # says more than what it made the demuxer say
        raise
    contents.require_read()


def _demuxer(contents: Contents, file: VideoFile, heard: list[ffmpeg_log.Line]) -> InputContainer:
    options = {"format_whitelist": ",".join(_FORMATS)}
    try:
        return av.open(contents, "r", container_options=options, buffer_size=_BUFFER_BYTES)
    except (av.error.FFmpegError, OSError, ValueError):
        known = {_FORMATS[who] for _, who, _ in heard if who in _FORMATS}
    if not known:
        reason = "does not begin like a video file; give mp4, mov, webm, mkv, avi, ts or the like"
        raise NotAVideoError(file.label, reason)
    reason = f"its {known.pop()} container is cut short or damaged; copy or download it again"
    raise VideoDecodeError(file.label, reason)


def _main_stream(container: InputContainer, file: VideoFile) -> VideoStream:
    """The one that FFmpeg finds best, unless it is a picture, such as a cover."""
    streams = [one for one in container.streams.video if not one.disposition & _BESIDE]
    if not streams:
        raise NotAVideoError(file.label, "holds no video stream (audio only?); give a file with pictures")
    stream = next((one for one in streams if one is container.streams.best("video")), streams[0])
    codec = _codec_name(stream)
    if codec not in _CODECS:
        raise VideoDecodeError(file.label, f"its codec {codec} is not supported; convert it to h264 first")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= MAX_PIXELS:
        reason = f"its frames of {width}x{height} are not within 1 to {MAX_PIXELS} pixels; scale it first"
        raise VideoDecodeError(file.label, reason)
    return stream


def _codec_name(stream: VideoStream) -> str:
    context = stream.codec_context
    return context.codec.canonical_name if context is not None else "unknown"


@dataclass(slots=True)
class Packets:
    """What demuxing gives for each packet, in file order; compact, because a day of video has millions.

    Attributes:
        held: The packets themselves; None where they are too many.
        whole: If these are of a part: first tick, duration in seconds and frame rate of the whole film.
        ended_early: The file ends before its container says, or demuxing it ended in an error.
    """

    held: list[Packet[VideoStream]] | None = field(default_factory=list)
    whole: tuple[int, float, float] | None = None
    last_duration: int = 0
    ended_early: bool = False
    _rows: array[int] = field(default_factory=lambda: array("q"))
    _complaints: list[tuple[int, str]] = field(default_factory=list)  # before which packet, and what
    _size: int = 0

    def __len__(self) -> int:
        return len(self._rows) // 4

    def columns(self) -> NDArray[np.int64]:
        """[4, N]: presentation times and decoding times in ticks, or `UNKNOWN`; flags; places in the file.

        Flags are KEY, DISCARD (decoded, but not shown), CORRUPT and HIDDEN (shows no frame of its own).
        """
        return np.array(self._rows, np.int64).reshape(-1, 4).T

    def add(self, packet: Packet[VideoStream], source: OpenVideo) -> None:
        self.note_complaints(source)
        numbers = (packet.pts, packet.dts, _flags(packet, source.codec), packet.pos)
        self._rows.extend(UNKNOWN if number is None else number for number in numbers)
        self.last_duration = packet.duration or 0
        self._size += packet.size
        if self.held is not None:
            self.held.append(packet)
            if self._size > _HELD_BYTES:
                self.held = None

    def note_complaints(self, source: OpenVideo) -> None:
        """Note where the demuxer has lost its way, and forget what was said until now."""
        if source.heard:
            name = source.container.format.name
            for _, who, what in source.heard[: _MOST_COMPLAINTS - len(self._complaints)]:
                if any(words in what for words in _ONLY_THE_END):
                    self.ended_early = True
                elif who == name:
                    self._complaints.append((len(self), what))
            source.heard.clear()

    def losses(self, tick_s: float, *, headless: bool) -> NDArray[np.int64]:
        """[K] numbers of packets that are corrupt, or behind which data are missing; increasing.

        headless: Where the first packet is no key packet, the beginning was lost.
        """
        pts, _, flags, places = self.columns()
        gaps = np.array([_gap(places, before, what) for before, what in self._complaints], np.int64)
        keys = np.flatnonzero(flags & KEY)
        # Where recordings are joined, the count of transport packets breaks off, but nothing is missing.
        later = (pts[keys] - pts[keys - 1]) * tick_s
        known = (keys > 0) & (pts[keys] != UNKNOWN) & (pts[keys - 1] != UNKNOWN)
        joins = keys[known & ((later < 0) | (later > _PAUSE_S))]
        corrupt = np.setdiff1d(np.flatnonzero(flags & CORRUPT), [joins, joins - 1, joins - 2])
        # Where the demuxer loses its way, what came last may have had the wrong length, and so the wrong end.
        lost = np.union1d(np.union1d(gaps - 1, gaps - 2), corrupt)
        return np.union1d(lost, np.arange(keys[0] if headless and len(keys) else 0)).astype(np.int64)


def _flags(packet: Packet[VideoStream], codec: str) -> int:
    flags = KEY * packet.is_keyframe | DISCARD * packet.is_discard | CORRUPT * packet.is_corrupt
    if codec in _DENSE:
        data = bytes(packet)
        # VP8's alternate references are packets with a time of their own that are never shown (RFC 6386, 9.1).
        flags |= HIDDEN * (codec == "vp8" and not data[0] >> 4 & 1) | CORRUPT * (_HOLE in data.rstrip(b"\0"))
    return flags


def _gap(places: NDArray[np.int64], before: int, what: str) -> int:
    """The packet before which data are missing: of what is said at opening, Matroska gives the place."""
    place = None if before else _PLACE.search(what)
    return before if place is None else int(np.searchsorted(places, int(place[1], 0)))


def demux(source: OpenVideo) -> Iterator[Packet[VideoStream]]:
    """All packets of the stream that are not empty, from where the container stands.

    Raises:
        av.error.FFmpegError, OSError: They cannot be read on.
    """
    try:
        for packet in source.container.demux(source.stream):
            if packet.size:
                yield packet
    except IndexError:
        return  # PyAV's, at the end, where a transport stream has announced further streams on its way


def read_packets(source: OpenVideo, count: int | None = None, end: int = _FAR_TICKS) -> Packets:
    """Demux up to the end of the file, to a number of packets, or until all later ones are shown after `end`."""
    packets, later = Packets(), 0
    try:
        for packet in demux(source):
            packets.add(packet, source)
            later = later + 1 if (packet.pts or 0) > end else 0
            if later == _REORDERED or len(packets) == count:
                break
    except (av.error.FFmpegError, OSError):
        packets.ended_early = True
    packets.note_complaints(source)
    return packets


def read_part(source: OpenVideo, start_s: float, end_s: float | None) -> Packets | None:
    """Read a part and a little more by the container's index; None: it has none, or the part is too large."""
    stream, seek, rate = source.stream, source.container.seek, source.stream.average_rate
    is_complete = source.format == "matroska" or 0 < stream.frames == len(stream.index_entries)
    if source.format not in INDEXED or not is_complete or not rate:
        return None
    try:
        first, _ = _shown(read_packets(source, _REORDERED))
        seek(_FAR_TICKS, stream=stream)
        _, last = _shown(read_packets(source))
        begin, end = (first + round(moment_s / source.tick_s) for moment_s in (start_s, end_s or 0.0))
        seek(begin, stream=stream)
        packets = read_packets(source, None, _FAR_TICKS if end_s is None else end)
        _shown(packets)  # all are known
    except (av.error.FFmpegError, OSError, ValueError):
        return None
    pts, _, flags, _ = packets.columns()
    if packets.held is None or packets.ended_early or not flags[0] & KEY or pts[0] > begin:
        return None
    packets.whole = first, (last - first) * source.tick_s + float(1 / rate), float(rate)
    return packets


def _shown(packets: Packets) -> tuple[int, int]:
    """The first and the last time of what is shown; a ValueError where there is none, or not all are known."""
    pts, _, flags, _ = packets.columns()
    pts = pts[flags & (DISCARD | HIDDEN) == 0]
    if (pts == UNKNOWN).any():
        raise ValueError("packets without a time")
    return int(pts.min()), int(pts.max())


def rate_of(source: OpenVideo) -> Fraction:
    """Frames a second as the container or the codec says; 25, FFmpeg's own guess, where neither makes sense."""
    rate = source.stream.average_rate or source.stream.guessed_rate or Fraction(25)
    return rate if rate <= _HIGHEST_RATE else Fraction(25)
