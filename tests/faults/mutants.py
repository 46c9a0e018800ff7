"""Ways to damage a video file: bytes and a random generator in, other bytes out. Knows no decoder."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import NamedTuple

Mutate = Callable[[bytearray, random.Random], bytes]
_HEADER_BYTES = 4096
_HOLE_BYTES = 1 << 16
_LARGEST_SPAN = 1 << 14


def _flip(data: bytearray, rng: random.Random, count: int, most: int) -> bytes:
    for _ in range(count):
        data[rng.randrange(min(len(data), most))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _span(data: bytearray, rng: random.Random) -> tuple[int, int]:
    size = min(int(2 ** rng.uniform(0, _LARGEST_SPAN.bit_length() - 1)), len(data) - 1)
    start = rng.randrange(len(data) - size)
    return start, start + size


def few_bits(data: bytearray, rng: random.Random) -> bytes:
    return _flip(data, rng, rng.randrange(1, 4), len(data))


def many_bits(data: bytearray, rng: random.Random) -> bytes:
    """Flip 4 to 1,000 bits, the larger numbers as often as the smaller ones."""
    return _flip(data, rng, int(4 * 250 ** rng.random()), len(data))


def header_bits(data: bytearray, rng: random.Random) -> bytes:
    return _flip(data, rng, rng.randrange(1, 30), _HEADER_BYTES)


def zeroed(data: bytearray, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    data[start:end] = bytes(end - start)
    return bytes(data)


def deleted(data: bytearray, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    del data[start:end]
    return bytes(data)


def inserted(data: bytearray, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    data[start:start] = rng.randbytes(end - start)
    return bytes(data)


def hole(data: bytearray, rng: random.Random) -> bytes:
    """Lose 64 KB, as where a download or a disk has left them out; a third of smaller files."""
    size = min(_HOLE_BYTES, len(data) // 3)
    start = rng.randrange(len(data) - size)
    data[start : start + size] = bytes(size)
    return bytes(data)


def cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: int(len(data) * rng.choice([0.3, 0.6, 0.9, rng.uniform(0.05, 0.99)]))])


DAMAGES: dict[str, Mutate] = {
    damage.__name__: damage
    for damage in (few_bits, many_bits, header_bits, zeroed, deleted, inserted, hole, cut)
}


class Field(NamedTuple):
    """A number in a header that readers may believe."""

    marker: bytes  # what stands before it
    offset: int  # from the end of the marker
    format: str  # of `struct`
    lies: tuple[float, ...]


_COUNTS = (0, 1, 0x7FFFFFFF, 0x07FFFFFF, 0xFFFFFFFF)
_FIELDS = {
    "mp4": (
        Field(b"mvhd", 16, ">I", _COUNTS),  # length of the whole
        Field(b"mvhd", 12, ">I", (1, 0x7FFFFFFF)),  # units in a second
        Field(b"mdhd", 16, ">I", _COUNTS),
        Field(b"mdhd", 12, ">I", (1, 7, 0x7FFFFFFF)),
        Field(b"elst", 8, ">I", _COUNTS),
        Field(b"stts", 4, ">I", _COUNTS),  # how many entries
        Field(b"stts", 8, ">I", _COUNTS),  # how many frames in the first
        Field(b"stts", 12, ">I", (0, 1, 0x10000000, 0xFFFFFFFF)),  # how long each
        Field(b"ctts", 4, ">I", _COUNTS),
        Field(b"stsz", 8, ">I", _COUNTS),  # how many frames
        Field(b"stsz", 4, ">I", (1, 0x7FFFFFFF)),  # how large each
        Field(b"stss", 4, ">I", _COUNTS),
        Field(b"stsc", 4, ">I", _COUNTS),
        Field(b"stco", 4, ">I", _COUNTS),
        Field(b"tkhd", 76, ">I", (0, 16384 << 16, 0xFFFFFFFF)),  # width
        Field(b"avc1", 24, ">H", (0, 16384, 65535)),
    ),
    "matroska": (
        Field(b"\x44\x89\x88", 0, ">d", (0.0, 1e15, -1.0, float("inf"), float("nan"))),  # Duration
        Field(b"\x2a\xd7\xb1\x83", -1, ">I", (0x83000000, 0x83000001, 0x83FFFFFF)),  # TimestampScale
        Field(b"\xb0\x81", 0, ">B", (0, 1, 255)),  # PixelWidth
        Field(b"\x18\x53\x80\x67", 4, ">I", (0, 0xFFFFFF, 0x7FFFFFFF)),  # size of the segment
    ),
    "avi": (
        Field(b"avih", 4, "<I", (0, 1, 0xFFFFFFFF)),  # microseconds a frame
        Field(b"avih", 20, "<I", _COUNTS),  # frames
        Field(b"strh", 24, "<I", (0, 1, 0xFFFFFFFF)),  # scale and rate of the times
        Field(b"strh", 28, "<I", (0, 1, 0xFFFFFFFF)),
        Field(b"strh", 36, "<I", _COUNTS),
        Field(b"strf", 8, "<I", (0, 16384, 0x7FFFFFFF)),
        Field(b"idx1", 0, "<I", _COUNTS),
        Field(b"movi", -8, "<I", _COUNTS),
    ),
}


def can_lie(name: str) -> bool:
    """Say whether headers of this kind of file have numbers that may lie."""
    return _family(name) in _FIELDS


def _family(name: str) -> str:
    ending = name.rpartition(".")[2]
    return {"webm": "matroska", "mkv": "matroska"}.get(ending, ending)


def lying(name: str, data: bytearray, rng: random.Random) -> bytes:
    """Have one number in the header say something else."""
    present = [field for field in _FIELDS[_family(name)] if data.find(field.marker) >= 0]
    field = rng.choice(present)
    place = data.find(field.marker) + len(field.marker) + field.offset
    struct.pack_into(field.format, data, place, rng.choice(field.lies))
    return bytes(data)
