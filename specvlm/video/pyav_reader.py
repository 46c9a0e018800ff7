"""The reader that trusts packets only: PyAV, frames matched by their presentation time.

It never seeks. Packets before the key frame that the next chosen frame needs are read and dropped without
decoding: it always lands where the index says, also in containers that cannot seek, and next to decoding the
cost is small.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from operator import itemgetter

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from specvlm.errors import VideoDecodeError
from specvlm.video.index import PacketIndex, open_container
from specvlm.video.opening import VideoFile
from specvlm.video.pixels import Decoded, FrameStore

NAME = f"pyav {av.__version__}"


def decode(file: VideoFile, index: PacketIndex, chosen: NDArray[np.int64], limit: int | None) -> Decoded:
    """Decode the chosen frames.

    Args:
        file: The open file.
        index: Its packet index.
        chosen: [F] indices into the index, increasing.
        limit: Most pixels of a frame; None for no scaling.

    Raises:
        VideoDecodeError: Not all chosen frames could be decoded. There are no stand-ins.
    """
    done, store = _attempt(file, index, _Pass(index, chosen), limit)
    if done < len(chosen) and index.starts[chosen].any():
        # A packet may be marked as a key frame and be none: decode everything from the first packet on.
        done, store = max(
            (done, store), _attempt(file, index, _Pass(index, chosen, skip=False), limit), key=itemgetter(0)
        )
    if done < len(chosen):
        raise VideoDecodeError(
            file.label, f"only {done} of {len(chosen)} chosen frames can be decoded; damaged, copy it again"
        )
    return store.result()


class _Pass:
    """One pass through the file: which of the chosen frames are still to come, and which packets failed."""

    def __init__(self, index: PacketIndex, chosen: NDArray[np.int64], *, skip: bool = True) -> None:
        self._labels: list[int] = index.labels[chosen].tolist()
        self._numbers: list[int] = index.numbers[chosen].tolist()
        self._starts: list[int] = index.starts[chosen].tolist()
        self._skip = skip
        self._place = 0
        self._failed: list[int] = []

    def __len__(self) -> int:
        return len(self._labels)

    def is_over(self) -> bool:
        return self._place == len(self._labels)

    def next_start(self) -> int:
        """Number of the packet from which the next chosen frame can be decoded."""
        return self._starts[self._place] if self._skip else 0

    def note_failure(self, number: int) -> None:
        """Packet `number` could not be decoded."""
        self._failed.append(number)

    def take(self, label: int | None) -> int | None:
        """The place of frame `label`, None if it is not chosen. Those due before it will never come."""
        if label is None:
            return None
        while not self.is_over() and self._labels[self._place] < label:
            self._place += 1
        if self.is_over() or self._labels[self._place] != label:
            return None
        self._place += 1
        return self._place - 1

    def is_intact(self, place: int) -> bool:
        """Whether every packet from this frame's key frame to its own was decoded."""
        first = bisect.bisect_left(self._failed, self._starts[place])
        return first == len(self._failed) or self._failed[first] > self._numbers[place]


def _attempt(file: VideoFile, index: PacketIndex, todo: _Pass, limit: int | None) -> tuple[int, FrameStore]:
    """How many of the frames decoded without damage, and these."""
    store, done = FrameStore(len(todo), limit), 0
    with open_container(file) as (container, stream):
        for count, frame in enumerate(_decoded_frames(container, stream, todo)):
            place = todo.take(count if index.by_count else frame.pts)
            if place is not None and todo.is_intact(place) and not frame.is_corrupt:
                store.put(place, frame, frame.rotation if frame.rotation % 90 == 0 else 0)
                done += 1
            if todo.is_over():
                break
    return done, store


def _decoded_frames(container: InputContainer, stream: VideoStream, todo: _Pass) -> Iterator[VideoFrame]:
    """All frames that come out while decoding what `todo` needs next. Damaged packets give none."""
    for number, packet in _needed_packets(container, stream, todo):
        try:
            frames = stream.codec_context.decode(packet)
        except (av.error.FFmpegError, OSError, ValueError):
            todo.note_failure(number)
            continue
        yield from frames


def _needed_packets(
    container: InputContainer, stream: VideoStream, todo: _Pass
) -> Iterator[tuple[int, Packet[VideoStream] | None]]:
    """(number, packet) of packets to decode, None for the end. Those before the next start are dropped."""
    start, number = todo.next_start(), -1
    for number, packet in enumerate(_packets(container, stream)):
        if number < start:
            continue
        if number == start:
            stream.codec_context.flush_buffers()
        yield number, packet
        start = todo.next_start()
    yield number + 1, None


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """As the index counted them: without empty ones, up to the end or the first one that cannot be read."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.error.FFmpegError, OSError):
        return
