"""The bytes of an open file as FFmpeg asks for them, and where its container says they end. Decodes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from specvlm.video.opening import VideoFile, read_at, unreadable

_TS_PACKET_BYTES = (188, 192)
_MANY_PARTS = 1 << 18  # what is followed of a chain of boxes
_UNKNOWN_SIZE = -1
# fmt: off
_BOXES = frozenset({
    b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"sidx", b"ssix", b"mfra",
    b"uuid", b"meta", b"prft", b"emsg", b"udta", b"pdin",
})
# fmt: on


class Contents:
    """A file for `av.open` that remembers why the system refused to read on.

    FFmpeg takes a failing disk for the end of the file; this keeps the two apart.
    """

    def __init__(self, file: VideoFile) -> None:
        self._file = file
        self._position = 0
        self._fault: OSError | None = None

    def read(self, size: int) -> bytes:
        if self._position >= self._file.identity.size_bytes:  # offsets may be any number that the file holds
            return b""
        try:
            data = read_at(self._file.descriptor, size, self._position)
        except OSError as error:
            self._fault = error
            return b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.identity.size_bytes}
        self._position = max(0, base[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def require_read(self) -> None:
        """See that all that was asked for could be read.

        Raises:
            VideoUnavailableError: The system failed to read.
        """
        if self._fault is not None:
            raise unreadable(self._file.label, self._fault) from None


def ends_early(file: VideoFile) -> bool:
    """Whether the file is shorter than its container says; False where that says nothing.

    Raises:
        VideoUnavailableError: The system failed to read.
    """
    follow = _ENDS.get(file.container)
    size = file.identity.size_bytes
    if follow is None:
        return False
    try:
        return any(end > size for end in follow(file.descriptor, size))
    except OSError as error:
        raise unreadable(file.label, error) from None


def _ends_of_boxes(descriptor: int, size: int) -> Iterator[int]:
    """Of mp4 and mov: where each box at the top level ends. What is no known box is not followed."""
    start = 0
    for _ in range(_MANY_PARTS):
        head = read_at(descriptor, 16, start)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if len(head) < 8 or head[4:8] not in _BOXES or length < 8:  # 0: up to the end of the file
            return
        start += length
        yield start
        if start >= size:
            return


def _end_of_segment(descriptor: int, _: int) -> Iterator[int]:
    """Of mkv and webm: where the one segment ends, if its size is known."""
    head = read_at(descriptor, 4096, 0)
    length, start = _element_size(head, 4)
    if length < 0 or head[start + length : start + length + 4] != b"\x18\x53\x80\x67":
        return
    segment, first = _element_size(head, start + length + 4)
    if segment >= 0:
        yield first + segment


def _element_size(head: bytes, place: int) -> tuple[int, int]:
    """(size, where the element's content starts) of the EBML size at `place`; a negative size is unknown."""
    width = 9 - head[place].bit_length() if place < len(head) else 9
    if width > 8 or place + width > len(head):
        return _UNKNOWN_SIZE, place
    mask = (1 << 7 * width) - 1
    size = int.from_bytes(head[place : place + width], "big") & mask
    return (_UNKNOWN_SIZE if size == mask else size), place + width


def _ends_of_riffs(descriptor: int, size: int) -> Iterator[int]:
    """Of avi: where each RIFF chunk ends; one without a size was never finished by its writer."""
    start = 0
    while start < size:
        head = read_at(descriptor, 8, start)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            return
        start += 8 + length
        yield start - 1  # a last chunk of odd length may lack its padding


def _end_of_last_packet(descriptor: int, size: int) -> Iterator[int]:
    """Of ts and m2ts: a transport stream is made of whole packets."""
    head = read_at(descriptor, 5, 0)
    packet = _TS_PACKET_BYTES[head[:1] != b"\x47"]
    yield -(-size // packet) * packet


_ENDS: dict[str, Callable[[int, int], Iterator[int]]] = {
    "mov": _ends_of_boxes,
    "matroska": _end_of_segment,
    "avi": _ends_of_riffs,
    "mpegts": _end_of_last_packet,
}
