"""Test videos, written with PyAV. Every frame carries its number in its pixels, for tests to read it back.

The number stands upright: a file with rotation metadata stores its frames turned the other way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

_BITS = 12
_COLUMNS = 4  # of the grid of bits: 4 x 3 blocks, most significant first
RATE = 30
_QUIET = "log-level=none"  # of x264 and x265
os.environ.setdefault("SVT_LOG", "0")
_FAST_VPX = {"deadline": "realtime", "cpu-used": "8"}


def _grid(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    rows = _BITS // _COLUMNS
    for bit in range(_BITS):
        row, column = divmod(bit, _COLUMNS)
        yield (
            slice(row * height // rows, (row + 1) * height // rows),
            slice(column * width // _COLUMNS, (column + 1) * width // _COLUMNS),
        )


def draw(number: int, width: int, height: int, noise: int = 0) -> NDArray[np.uint8]:
    """[height, width, 3]: `number` as black and white blocks, with a coloured ramp along the lower edge.

    With `noise`, a moving texture of that amplitude lies over it, so that packets hold more than headers.
    """
    picture = np.zeros((height, width, 3), np.uint8)
    for bit, (rows, columns) in enumerate(_grid(height * 3 // 4, width)):
        picture[rows, columns] = 235 if number >> (_BITS - 1 - bit) & 1 else 16
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    picture[height * 3 // 4 :] = np.stack([ramp, ramp[::-1], np.full_like(ramp, number * 5 % 256)], -1)
    return _with_texture(picture, number, noise) if noise else picture


def _with_texture(picture: NDArray[np.uint8], number: int, amplitude: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    texture = np.random.default_rng(7).integers(-amplitude, amplitude + 1, (2 * height, 2 * width, 3))
    down, across = 3 * number % height, 2 * number % width
    moved = texture[down : down + height, across : across + width]
    textured: NDArray[np.uint8] = np.clip(picture + moved, 0, 255).astype(np.uint8)
    return textured


def number_of(picture: NDArray[np.uint8]) -> int:
    """The number that `draw` put into a picture, at any size."""
    height, width = picture.shape[:2]
    number = 0
    for rows, columns in _grid(height * 3 // 4, width):
        block = picture[rows, columns]
        inner = block[
            block.shape[0] // 4 : -(block.shape[0] // 4), block.shape[1] // 4 : -(block.shape[1] // 4)
        ]
        number = number << 1 | int(inner.mean() > 128)
    return number


def numbers_of(pixels: NDArray[np.uint8]) -> list[int]:
    return [number_of(picture) for picture in pixels]


def write_video(
    path: Path,
    *,
    codec: str = "libx264",
    frames: int = 60,
    width: int = 96,
    height: int = 64,
    pixel_format: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    rotation: int = 0,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    container_format: str | None = None,
    noise: int = 0,
) -> Path:
    """Write frames 0, 1, 2, ... at 30 a second, or at `times_ms`; shown turned by `rotation` degrees."""
    base = Fraction(1, RATE) if times_ms is None else Fraction(1, 1000)
    with av.open(str(path), "w", format=container_format, options=dict(container_options or {})) as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=dict(options or {}))
        stream.width, stream.height = (height, width) if rotation % 180 else (width, height)
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames if times_ms is None else len(times_ms)):
            picture = np.ascontiguousarray(np.rot90(draw(number, width, height, noise), -rotation // 90))
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = number if times_ms is None else times_ms[number]
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """One second of silence, no picture."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_clip(source: Path, target: Path, first: int) -> Path:
    """What `ffmpeg -ss -c copy` does: packets from a key frame on, an edit list hiding all before `first`."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        assert stream.time_base is not None
        shift = round(first / RATE / stream.time_base)
        packets = [packet for packet in reader.demux(stream) if packet.size and packet.pts is not None]
        begin = max(i for i, p in enumerate(packets) if p.is_keyframe and (p.pts or 0) <= shift)
        for packet in packets[begin:]:
            packet.pts, packet.dts = (packet.pts or 0) - shift, (packet.dts or 0) - shift
            packet.stream = copy
            writer.mux(packet)
    return target


def hide_packets(source: Path, target: Path, every: int) -> Path:
    """Turn every n-th VP8 frame into one that is decoded but not shown, as two-pass encoders make them."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        packets = [packet for packet in reader.demux(stream) if packet.size]
        for number, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            if number % every == every - 1:
                data[0] &= ~0x10  # show_frame of RFC 6386, section 9.1
            hidden: Any = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe, hidden.stream = packet.is_keyframe, copy
            writer.mux(hidden)
    return target


def cut(source: Path, target: Path, share: float) -> Path:
    """The first part of a file, as after a broken download."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def blank_packets(source: Path, target: Path, first: int, last: int) -> Path:
    """Overwrite the bytes of packets `first` to `last` (file order), as a failing disk does."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as reader:
        for number, packet in enumerate(reader.demux(video=0)):
            if first <= number <= last and packet.pos is not None:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    target.write_bytes(data)
    return target


def packet_spans(path: Path) -> list[tuple[int, int]]:
    """(position, size) of each packet in the file, in file order."""
    with av.open(str(path)) as reader:
        return [(packet.pos, packet.size) for packet in reader.demux(video=0) if packet.pos is not None]


_GOP = f"keyint=12:min-keyint=12:scenecut=0:{_QUIET}"
_VARIABLE_MS = [
    0,
    33,
    66,
    100,
    500,
    533,
    1500,
    1510,
    1520,
    1530,
    1800,
    2600,
    2633,
    2666,
    2700,
    2733,
    3900,
    3933,
]

# name -> (file name, how to write it). Frame n of each has the number n.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("h264.mp4", {"options": {"x264-params": _GOP}}),
    "h264 no b": ("h264_nob.mp4", {"options": {"bf": "0", "x264-params": _GOP}}),
    "h264 mkv": ("h264.mkv", {"options": {"x264-params": _GOP}}),
    "h264 flv": ("h264.flv", {"options": {"x264-params": _GOP}}),
    "h264 avi": ("h264.avi", {"options": {"x264-params": _GOP}}),
    "h264 ts": ("h264.ts", {"options": {"x264-params": _GOP}}),
    "h264 m2ts": (
        "h264.m2ts",
        {"options": {"x264-params": _GOP}, "container_options": {"mpegts_m2ts_mode": "1"}},
    ),
    "h264 open gop": ("open.mp4", {"options": {"x264-params": f"open-gop=1:b-adapt=0:bframes=3:{_GOP}"}}),
    "h264 fragments": (
        "fragments.mp4",
        {"options": {"x264-params": _GOP}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "h264 10 bit": ("ten.mp4", {"pixel_format": "yuv420p10le", "options": {"x264-params": _GOP}}),
    "h264 444 odd": (
        "odd444.mp4",
        {"width": 97, "height": 67, "pixel_format": "yuv444p", "options": {"x264-params": _GOP}},
    ),
    "h264 variable": ("variable.mp4", {"times_ms": _VARIABLE_MS, "options": {"x264-params": _GOP}}),
    "h264 late start": (
        "late.mkv",
        {"times_ms": [5000 + 40 * n for n in range(60)], "options": {"x264-params": _GOP}},
    ),
    "h264 one frame": ("one.mp4", {"frames": 1, "options": {"x264-params": _GOP}}),
    "h264 rotated 90": ("r90.mp4", {"rotation": 90, "options": {"x264-params": _GOP}}),
    "h264 rotated 180": ("r180.mp4", {"rotation": 180, "options": {"x264-params": _GOP}}),
    "h264 rotated 270": ("r270.mp4", {"rotation": 270, "options": {"x264-params": _GOP}}),
    "hevc open gop": (
        "open_hevc.mp4",
        {
            "codec": "libx265",
            "options": {"preset": "ultrafast", "x265-params": f"keyint=12:bframes=3:{_QUIET}"},
        },
    ),
    "vp8": ("vp8.webm", {"codec": "libvpx", "options": _FAST_VPX}),
    "vp9": ("vp9.webm", {"codec": "libvpx-vp9", "options": {**_FAST_VPX, "g": "20"}}),
    "vp9 variable": ("vfr.webm", {"codec": "libvpx-vp9", "options": _FAST_VPX, "times_ms": _VARIABLE_MS}),
    "vp9 odd": ("odd.webm", {"codec": "libvpx-vp9", "options": _FAST_VPX, "width": 97, "height": 67}),
    "vp9 hidden frames": (
        "vp9_good.webm",
        {
            "codec": "libvpx-vp9",
            "options": {"deadline": "good", "cpu-used": "8", "lag-in-frames": "16", "b": "60k"},
        },
    ),
    "av1": ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "8", "crf": "2"}}),
    "mpeg4 avi": ("mpeg4.avi", {"codec": "mpeg4", "options": {"b": "2M", "g": "12"}}),
    "mpeg4 avi b": ("mpeg4b.avi", {"codec": "mpeg4", "options": {"b": "2M", "g": "12", "bf": "2"}}),
    "mpeg2 ts": ("mpeg2.ts", {"codec": "mpeg2video", "options": {"b": "2M", "g": "12", "bf": "2"}}),
    "mpeg2 ps": ("mpeg2.mpg", {"codec": "mpeg2video", "options": {"b": "2M", "g": "12", "bf": "2"}}),
    "wmv": ("wmv2.wmv", {"codec": "wmv2", "options": {"b": "2M"}}),
    "gif": (
        "small.gif",
        {"codec": "gif", "pixel_format": "rgb8", "times_ms": [100 * n for n in range(20)]},
    ),
}


def kind_times_s(kind: str) -> list[float]:
    """Times of all frames of `KINDS[kind]`, from the first frame."""
    wanted = KINDS[kind][1]
    times_ms = wanted.get("times_ms")
    if times_ms is not None:
        return [(time - times_ms[0]) / 1000 for time in times_ms]
    return [n / RATE for n in range(wanted.get("frames", 60))]


# Files to damage: up to a few hundred kilobytes, groups of 12 or 24 frames, the same bytes each time.
_BITS_PER_S = {"b": "1M", "g": "12"}
# Real time would look at the clock.
_STEADY_VPX = {"deadline": "good", "cpu-used": "8", "lag-in-frames": "0", **_BITS_PER_S}
_SAME_IDS = {"fflags": "bitexact"}  # Matroska's are random
_LONG_GOP = f"keyint=24:min-keyint=24:scenecut=0:{_QUIET}"
NOISY: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("noisy.mp4", {"options": {"x264-params": _LONG_GOP, "preset": "veryfast"}}),
    "front": (
        "front.mp4",
        {
            "options": {"x264-params": _LONG_GOP, "preset": "veryfast"},
            "container_options": {"movflags": "faststart"},
        },
    ),
    "fragments": (
        "fragments.mp4",
        {
            "options": {"x264-params": _LONG_GOP, "preset": "veryfast"},
            "container_options": {"movflags": "frag_keyframe+empty_moov"},
        },
    ),
    "mkv": (
        "noisy.mkv",
        {"options": {"x264-params": _LONG_GOP, "preset": "veryfast"}, "container_options": _SAME_IDS},
    ),
    "hevc": (
        "hevc.mkv",
        {
            "codec": "libx265",
            "options": {
                "preset": "ultrafast",
                "crf": "20",
                "x265-params": f"keyint=24:bframes=3:open-gop=0:{_QUIET}",
            },
            "container_options": _SAME_IDS,
        },
    ),
    "vp9": (
        "vp9.webm",
        {"codec": "libvpx-vp9", "options": _STEADY_VPX, "container_options": _SAME_IDS},
    ),
    "vp8": ("vp8.webm", {"codec": "libvpx", "options": _STEADY_VPX, "container_options": _SAME_IDS}),
    "ts": ("noisy.ts", {"options": {"x264-params": _LONG_GOP, "preset": "veryfast"}}),
    "mpeg2": ("mpeg2.ts", {"codec": "mpeg2video", "options": {**_BITS_PER_S, "bf": "2"}}),
    "avi": ("noisy.avi", {"codec": "mpeg4", "options": _BITS_PER_S}),
}
_NOISY_SHAPE = {"width": 160, "height": 128, "noise": 24}


def maker(folder: Path) -> Callable[[str], Path]:
    """A function that gives the file of a kind, written at its first use."""
    return _maker(folder, KINDS, {})


def noisy_maker(folder: Path) -> Callable[[str], Path]:
    """The same for `NOISY`."""
    return _maker(folder, NOISY, _NOISY_SHAPE)


def _maker(
    folder: Path, kinds: Mapping[str, tuple[str, dict[str, Any]]], common: Mapping[str, Any]
) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        name, wanted = kinds[kind]
        path = folder / name
        return path if path.exists() else write_video(path, **{**common, **wanted})

    return make
