"""H.264 in field pictures, as camcorders and broadcasts have it: two packets make one picture.

No free encoder writes them. This one does, with macroblocks that are not compressed (ITU-T H.264, 7.3).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tests.video_files import draw

WIDTH, HEIGHT = 64, 64
_SYNC_FIELDS = 8  # frames of a group


class _Bits:
    def __init__(self) -> None:
        self._text = ""

    def fixed(self, value: int, width: int = 1) -> _Bits:
        self._text += format(value, f"0{width}b")
        return self

    def golomb(self, *values: int) -> _Bits:
        for value in values:
            code = format(value + 1, "b")
            self._text += "0" * (len(code) - 1) + code
        return self

    def data(self) -> bytes:
        text = self._text + "0" * (-len(self._text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")


def _unit(head: int, body: bytes) -> bytes:
    out, zeros = bytearray(), 0
    for byte in body:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = 0 if byte else zeros + 1
    return b"\0\0\0\1" + bytes([head]) + bytes(out)


def _parameters(fields_per_s: int) -> bytes:
    sequence = _Bits().fixed(77, 8).fixed(0, 8).fixed(30, 8).golomb(0, 0, 0, 4, 1).fixed(0)
    sequence.golomb(WIDTH // 16 - 1, HEIGHT // 32 - 1)
    sequence.fixed(0).fixed(0).fixed(1).fixed(
        0
    )  # fields allowed, no adaptive frames, direct_8x8, no cropping
    sequence.fixed(1, 1).fixed(0, 4).fixed(1).fixed(1, 32).fixed(fields_per_s, 32).fixed(1).fixed(0, 4).fixed(
        1
    )
    picture = _Bits().golomb(0, 0).fixed(0, 2).golomb(0, 0, 0).fixed(0, 3).golomb(0, 0, 0)
    picture.fixed(1).fixed(0, 2).fixed(1)
    return _unit(0x67, sequence.data()) + _unit(0x68, picture.data())


def _slice(luma: NDArray[np.uint8], bottom: int | None, frame: int) -> bytes:
    """One picture: a field, or (`bottom` is None) a whole frame."""
    place = frame % _SYNC_FIELDS
    first = place == 0 and bottom != 1
    bits = _Bits().golomb(0, 7, 0).fixed(place, 4)
    if bottom is None:
        bits.fixed(0)
    else:
        bits.fixed(1).fixed(bottom)
    if first:
        bits.golomb(frame // _SYNC_FIELDS % 2)
    bits.fixed(2 * place + (bottom or 0), 8)
    bits.fixed(0, 2 if first else 1).golomb(0, 1)  # reference marking, quantiser, no deblocking
    body = b""
    for top in range(0, len(luma), 16):
        for left in range(0, WIDTH, 16):
            body += bits.golomb(25).data()  # I_PCM
            body += luma[top : top + 16, left : left + 16].tobytes() + b"\x80" * 128
            bits = _Bits()
    return _unit(0x65 if first else 0x61, body + b"\x80")


def write(path: Path, frames: int, *, rate: int = 25, whole: int = 0) -> Path:
    """Frames 0, 1, ... as pairs of fields; `whole`: every n-th one is coded in one picture instead."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=2 * rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 2 * rate)
        for frame in range(frames):
            luma = draw(frame, WIDTH, HEIGHT)[:, :, 1]
            in_fields = not whole or frame % whole != 1
            for bottom in (0, 1) if in_fields else (None,):
                data = _slice(luma if bottom is None else luma[bottom::2], bottom, frame)
                key = frame % _SYNC_FIELDS == 0 and not bottom
                packet: Any = av.Packet(b"\0\0\0\1\x09\x10" + (_parameters(2 * rate) if key else b"") + data)
                packet.pts = packet.dts = 2 * frame + (bottom or 0)
                packet.time_base, packet.is_keyframe = stream.codec_context.time_base, key
                packet.stream = stream
                out.mux(packet)
    return path
