"""The bytes of an open file as FFmpeg asks for them, and where some containers say they end. Decodes nothing."""

from __future__ import annotations

import os

from specvlm.video.opening import VideoFile, read_at, unreadable

_TS_PACKET_BYTES = (188, 192, 204)
_TS_SYNC = b"\x47"


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


def ends_early(file: VideoFile, container: str) -> bool:
    """Whether an `avi` or `mpegts` file is shorter than it says; for others the demuxer says so.

    Raises:
        VideoUnavailableError: The system failed to read.
    """
    try:
        if container == "avi":
            return _ends_in_riff(file)
        return container == "mpegts" and _ends_in_packet(file)
    except OSError as error:
        raise unreadable(file.label, error) from None


def _ends_in_riff(file: VideoFile) -> bool:
    """Whether a RIFF chunk continues past the end; one without a size was never finished by its writer."""
    start, size = 0, file.identity.size_bytes
    while start < size:
        head = read_at(file.descriptor, 8, start)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            return False
        start += 8 + length
    return start > size + 1  # a last chunk of odd length may lack its padding


def _ends_in_packet(file: VideoFile) -> bool:
    """Whether a transport stream, perhaps behind a piece of a packet, does not consist of whole ones."""
    head = read_at(file.descriptor, 8192, 0)
    for start in range(_TS_PACKET_BYTES[-1]):
        for packet in _TS_PACKET_BYTES:
            if len(head) > start and not head[start::packet].strip(_TS_SYNC):
                before = 4 * (packet == 192)  # m2ts puts a time before each packet
                return (file.identity.size_bytes - start + before) % packet > 0
    return False
