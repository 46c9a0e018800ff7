"""Streams of bytes in pieces that end where a line ends. Knows no encoding and no format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

CHUNK_BYTES = 256 << 10


class LongLineError(ValueError):
    """A line is longer than lines may be; `line` is its number, from 1."""

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line} is too long")
        self.line = line


def pieces(
    stream: BinaryIO, most_bytes: int, separator: bytes = b"\n", begin: bytes = b""
) -> Iterator[bytes]:
    """Yield a stream as it comes, each piece up to the end of a line; the last line may have no end.

    Args:
        stream: Read to its end, at most `CHUNK_BYTES` at a time.
        most_bytes: A line that is longer is never held whole.
        separator: One byte that ends a line.
        begin: What was read of the stream already.

    Raises:
        LongLineError: A line is longer than `most_bytes`, perhaps by less than a chunk.
    """
    read = getattr(stream, "read1", stream.read)
    rest: list[bytes] = []
    rest_bytes, line = 0, 1
    chunk = begin or read(CHUNK_BYTES)
    while chunk:
        whole, found, tail = chunk.rpartition(separator)
        if found:
            piece = b"".join((*rest, whole, found))
            yield piece
            line += piece.count(separator)
            rest, rest_bytes = [], 0
        rest.append(tail)
        rest_bytes += len(tail)
        if rest_bytes > most_bytes:
            raise LongLineError(line)
        chunk = read(CHUNK_BYTES)
    if rest_bytes:
        yield b"".join(rest)
