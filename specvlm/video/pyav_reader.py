"""The reader that trusts packets only: PyAV, each frame known by the packet it came from.

It never seeks. Packets before the key frame that the next chosen frame needs are read and dropped without
decoding: it always lands where the index says, also in containers that cannot seek, and next to decoding the
cost is small.

A frame is given only if it is intact: every packet from its key frame to its own was there, decoded without a
complaint and gave its picture. What a decoder conceals without saying so cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import av
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from specvlm.errors import VideoDecodeError
from specvlm.video import ffmpeg_log
from specvlm.video.index import PacketIndex, demux, open_container
from specvlm.video.opening import VideoFile
from specvlm.video.pixels import Decoded, FrameStore, Memory, own_memory

NAME = f"pyav {av.__version__}"
# FFmpeg's own decoder gives whatever a damaged VP9 packet says; libvpx, as fast, sees most of the damage.
_STRICTER = {"vp9": "libvpx-vp9"}
# Decoders that give a picture and an error only if told to. Others would refuse spliced videos, which are sound.
_EXPLODE = frozenset({"hevc"})
# Here a packet may say "as before", and give no picture of its own.
_MAY_GIVE_NONE = frozenset("mpeg4 h263 flv1 theora msmpeg4v1 msmpeg4v2 msmpeg4v3 wmv1 wmv2 wmv3 vc1".split())
_FEW_PACKETS = 4000  # of which all may be decoded to get at one frame


def decode(
    file: VideoFile,
    index: PacketIndex,
    chosen: NDArray[np.int64],
    limit: int | None,
    memory: Memory = own_memory,
) -> Decoded:
    """Decode those of the chosen frames that are intact. There are no stand-ins.

    Args:
        file: The open file.
        index: Its packet index.
        chosen: [F] indices into the index, increasing.
        limit: Most pixels of a frame; None for no scaling.
        memory: Where frames are put.

    Raises:
        VideoDecodeError: Not one of them is intact.
        VideoUnavailableError: The system failed to read the file.
    """
    store = FrameStore(len(chosen), limit, memory)
    places = np.arange(len(chosen))
    intact = _attempt(file, index, _Wanted(index, chosen, places, index.starts[chosen]), store)
    for place in _retry(file, index, chosen, np.setdiff1d(places, intact), store):
        intact.append(place)
    if not intact:
        raise too_few(file, 0, len(chosen))
    return store.result(sorted(intact))


def too_few(file: VideoFile, intact: int, chosen: int) -> VideoDecodeError:
    """The error for a video of which too little is left."""
    reason = f"only {intact} of {chosen} chosen frames can be decoded; damaged, copy it again"
    return VideoDecodeError(file.label, reason)


def _retry(
    file: VideoFile,
    index: PacketIndex,
    chosen: NDArray[np.int64],
    places: NDArray[np.int64],
    store: FrameStore,
) -> list[int]:
    """Go for the frames at `places` from an earlier packet on.

    A packet may be marked as a key frame and be none, or be one from which the picture only builds up.
    """
    again = chosen[places]
    healable = ~_any_between(index.losses, index.starts[again], index.numbers[again])
    places, again = places[healable], again[healable]
    starts = _earlier(index, again)
    if not len(again) or (starts == index.starts[again]).all():
        return []
    return _attempt(file, index, _Wanted(index, again, places, starts), store)


def _earlier(index: PacketIndex, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first packet of all, or, where that would be too much to decode, one more group of pictures."""
    starts = index.starts[chosen]
    if len(chosen) and index.numbers[chosen].max() > _FEW_PACKETS:
        known = np.unique(index.starts)
        return known[np.maximum(np.searchsorted(known, starts) - 1, 0)]
    return np.zeros_like(starts)


def _any_between(
    losses: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """For each span of packets whether a loss lies in it."""
    return np.searchsorted(losses, first, side="left") < np.searchsorted(losses, last, side="right")


class _Wanted:
    """Which frames one pass through the file is to give, and which are still to come."""

    def __init__(
        self,
        index: PacketIndex,
        chosen: NDArray[np.int64],
        places: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> None:
        """`places` are those of the chosen frames in the result, `starts` the packets to decode from."""
        self.places = places
        self.starts = starts
        self.numbers = index.numbers[chosen]
        self._labels: list[int] = index.labels[chosen].tolist()
        self._starts: list[int] = starts.tolist()
        self._next = 0

    def is_over(self) -> bool:
        return self._next == len(self._labels)

    def next_start(self) -> int:
        """Number of the packet from which the next wanted frame can be decoded."""
        return self._starts[self._next]

    def take(self, label: int) -> int | None:
        """Which of the wanted frames has this label, None if none. Those due before it will never come."""
        while not self.is_over() and self._labels[self._next] < label:
            self._next += 1
        if self.is_over() or self._labels[self._next] != label:
            return None
        self._next += 1
        return self._next - 1


class _Fed(NamedTuple):
    """A packet that was given to the decoder."""

    number: int
    run: int  # the first packet of the unbroken run it belongs to


class _Record:
    """What became of each packet that a pass decoded."""

    def __init__(self) -> None:
        self.fed: list[_Fed] = []
        self.shown: set[int] = set()
        self.failed: set[int] = set()

    def losses(self, index: PacketIndex) -> NDArray[np.int64]:
        """All of the index, packets that failed, and packets that silently gave no picture; increasing."""
        return np.union1d(index.losses, np.array([*self.failed, *self._silent(index)], np.int64))

    def _silent(self, index: PacketIndex) -> set[int]:
        if not self.fed or (index.codec in _MAY_GIVE_NONE and index.clock != "count"):
            return set()
        numbers, runs = np.array(self.fed, np.int64).T
        in_order = np.argsort(index.numbers)
        place = np.minimum(np.searchsorted(index.numbers[in_order], numbers), len(in_order) - 1)
        rank = in_order[place]
        # Frames that lean on an earlier group than the run began with do not come, and should not.
        due = (index.numbers[rank] == numbers) & (index.starts[rank] >= runs)
        silent = set(numbers[due].tolist()) - self.shown - self.failed
        # Two fields in two packets give one picture: then this says nothing.
        return silent if 3 * len(silent) <= len(self.fed) or index.clock == "count" else set()


def _attempt(file: VideoFile, index: PacketIndex, wanted: _Wanted, store: FrameStore) -> list[int]:
    """Store the wanted frames; return the places of those that turned out to be intact."""
    record, stored = _Record(), []
    with ffmpeg_log.listening() as heard, open_container(file) as (container, stream):
        decoder = _Decoder(stream, index)
        packets = _packets(container, stream, heard)
        for label, frame in _decoded_frames(packets, decoder, wanted, record):
            which = wanted.take(label)
            if which is not None and not frame.is_corrupt:
                store.put(int(wanted.places[which]), frame, decoder.rotation(frame))
                stored.append(which)
    kept = np.array(stored, np.int64)
    lost = _any_between(record.losses(index), wanted.starts[kept], wanted.numbers[kept])
    return [int(place) for place in wanted.places[kept[~lost]]]


class _Decoder:
    """The decoder of a stream, which tells for each frame the packet that it came from."""

    def __init__(self, stream: VideoStream, index: PacketIndex) -> None:
        self._native: VideoCodecContext = stream.codec_context
        self._context = self._native
        self._clock = index.clock
        self._count = 0
        self._native_rotation: int | None = None
        if index.codec in _STRICTER and index.pixel_format == "yuv420p":
            self._context = _other_decoder(_STRICTER[index.codec], self._native)
        if index.codec in _EXPLODE:
            self._context.options = {**self._context.options, "err_detect": "explode"}
        self._context.copy_opaque = True

    def decode(
        self, number: int, packet: Packet[VideoStream], record: _Record
    ) -> Iterator[tuple[int, VideoFrame]]:
        """(label, frame) of the frames that come out when packet `number` goes in."""
        time = packet.pts if self._clock == "pts" else packet.dts
        packet.opaque = (number, time)
        if self._context is not self._native and self._native_rotation is None:
            self._native_rotation = _rotation_of(self._native, packet)
        try:
            frames = self._context.decode(packet)
        except (av.error.FFmpegError, OSError, ValueError):
            record.failed.add(number)
            return
        yield from self._labelled(frames, record)

    def drain(self, record: _Record) -> Iterator[tuple[int, VideoFrame]]:
        """(label, frame) of all that is still to come. After this the decoder begins anew."""
        try:
            frames = self._context.decode(None)
        except (av.error.FFmpegError, OSError, ValueError):
            frames = []
        yield from self._labelled(frames, record)
        self._context.flush_buffers()

    def rotation(self, frame: VideoFrame) -> int:
        """Degrees, counter-clockwise, by which a frame is to be turned: a multiple of 90."""
        degrees = frame.rotation if self._context is self._native else self._native_rotation or 0
        return degrees if degrees % 90 == 0 else 0

    def _labelled(self, frames: list[VideoFrame], record: _Record) -> Iterator[tuple[int, VideoFrame]]:
        for frame in frames:
            number, time = cast("tuple[int, int | None]", frame.opaque)
            label = self._count if self._clock == "count" else time
            self._count += 1
            record.shown.add(number)
            if frame.is_corrupt or (self._clock == "pts" and frame.pts != time):
                record.failed.add(number)
            if label is not None:
                yield label, frame


def _other_decoder(name: str, native: VideoCodecContext) -> VideoCodecContext:
    try:
        context = CodecContext.create(name, "r")
    except av.codec.codec.UnknownCodecError:  # not part of this build
        return native
    assert isinstance(context, VideoCodecContext)
    context.thread_count = native.thread_count
    context.options = dict(native.options)
    return context


def _rotation_of(native: VideoCodecContext, packet: Packet[VideoStream]) -> int | None:
    """What the container says of the first frame; only the container's own decoder is told."""
    try:
        return next((frame.rotation for frame in native.decode(packet)), None)
    except (av.error.FFmpegError, OSError, ValueError):
        return None


def _decoded_frames(
    packets: Iterator[Packet[VideoStream]], decoder: _Decoder, wanted: _Wanted, record: _Record
) -> Iterator[tuple[int, VideoFrame]]:
    """(label, frame) of all frames that come out while decoding what is wanted next."""
    run: int | None = None
    for number, packet in enumerate(packets):
        if wanted.is_over():
            break
        if number < wanted.next_start():
            if run is not None:
                yield from decoder.drain(record)
                run = None
            continue
        run = number if run is None else run
        record.fed.append(_Fed(number, run))
        yield from decoder.decode(number, packet, record)
    if run is not None:
        yield from decoder.drain(record)  # also for what it tells of the packets that came before


def _packets(
    container: InputContainer, stream: VideoStream, heard: list[ffmpeg_log.Line]
) -> Iterator[Packet[VideoStream]]:
    """As the index counted them: up to the end or the first one that cannot be read."""
    try:
        for packet in demux(container, stream):
            heard.clear()  # a damaged file has its decoder say more than memory should hold
            yield packet
    except (av.error.FFmpegError, OSError):
        return
