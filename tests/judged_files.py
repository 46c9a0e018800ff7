"""Small videos of many kinds, and what the `ffmpeg` program makes of each: its frames by their numbers, and times.

Every file is written by PyAV or changed byte by byte; a few frames of 96 x 64 pixels each. `write` makes the fixed
set, `write_random` files of the same kinds with values from a random generator.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from tests import field_pictures, video_files
from tests.video_files import RATE, draw

FFMPEG = shutil.which("ffmpeg")
WIDTH, HEIGHT = 96, 64
_QUIET = "log-level=none:scenecut=0"
_TS, _PID = 188, 0x100
_ONE, _UNIT = 0x10000, 0x40000000
Picture = NDArray[np.uint8]


class Judged(NamedTuple):
    """One file.

    Attributes:
        name: What is special about it.
        path: The file.
        timed: What `ffmpeg` says of its times can be believed.
    """

    name: str
    path: Path
    timed: bool = True


def judge(path: Path) -> tuple[list[int], list[float]]:
    """Numbers and times, in seconds from the first frame, of all frames that `ffmpeg` decodes."""
    assert FFMPEG is not None
    command = [FFMPEG, "-hide_banner", "-nostdin", "-threads", "1", "-i", str(path), "-an", "-sn", "-dn"]
    command += ["-filter_threads", "1", "-vf", "showinfo", "-vsync", "passthrough", "-enc_time_base", "-1"]
    command += ["-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    ticks = re.search(r"config in time_base: (\d+)/(\d+)", said)
    tick = int(ticks[1]) / int(ticks[2]) if ticks else 1.0
    times = [int(time) * tick for time in re.findall(r" pts:\s*(-?\d+)", said)]
    sizes = re.findall(r" s:(\d+)x(\d+)", said)
    if not times:
        return [], []
    width, height = map(int, sizes[0])
    pictures = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    assert len(pictures) == len(times), (path, len(pictures), len(times))
    return video_files.numbers_of(pictures), [time - times[0] for time in times]


# Pictures are encoded once for each codec and timing, and then copied into containers.

_CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": (
        "libx264",
        {"preset": "ultrafast", "bf": "2", "x264-params": f"keyint=8:bframes=2:b-adapt=0:{_QUIET}"},
    ),
    "h264 plain": ("libx264", {"preset": "ultrafast", "x264-params": f"keyint=9:bframes=0:{_QUIET}"}),
    "h264 open": (
        "libx264",
        {"preset": "ultrafast", "x264-params": f"keyint=8:bframes=3:b-adapt=0:open-gop=1:{_QUIET}"},
    ),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=8:bframes=2:log-level=none"}),
    "mpeg4": ("mpeg4", {"b": "2M", "g": "8"}),
    "mpeg4 b": ("mpeg4", {"b": "2M", "g": "8", "bf": "2"}),
    "mpeg2": ("mpeg2video", {"b": "2M", "g": "8", "bf": "2"}),
    "msmpeg4v3": ("msmpeg4", {"b": "2M", "g": "8"}),
    "flv1": ("flv", {"b": "2M", "g": "8"}),
    "wmv2": ("wmv2", {"b": "2M", "g": "8"}),
    "mjpeg": ("mjpeg", {"qmin": "2", "qmax": "2"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "g": "8", "b": "2M"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "8", "b": "2M"}),
}
_CONTAINERS = {
    "h264": ("mp4", "mov", "mkv", "ts", "m2ts", "flv", "mpg", "frag.mp4"),
    "h264 plain": ("mp4", "mkv", "ts", "avi", "flv", "vob", "asf"),
    "h264 open": ("mp4", "mkv", "ts"),
    "hevc": ("mp4", "mkv", "ts"),
    "mpeg4": ("mp4", "mkv", "avi", "asf"),
    "mpeg4 b": ("mp4", "mkv", "avi"),
    "mpeg2": ("mkv", "ts", "mpg", "vob", "mov"),
    "msmpeg4v3": ("avi", "asf"),
    "flv1": ("flv", "avi"),
    "wmv2": ("asf", "avi"),
    "mjpeg": ("mov", "avi", "mkv"),
    "vp8": ("webm", "mkv"),
    "vp9": ("webm", "mkv", "mp4"),
}
_RAW = ("avi", "mpg", "vob")  # whose H.264 has no lengths but start codes
_UNTIMED = (
    "mpg",
    "vob",
)  # where few pictures have times, and `ffmpeg` itself guesses them wrong unless steady
_MUXERS = {"m2ts": "mpegts", "frag.mp4": "mp4", "mpg": "mpeg"}
_OPTIONS = {
    "m2ts": {"mpegts_m2ts_mode": "1"},
    "frag.mp4": {"movflags": "frag_keyframe+empty_moov+default_base_moof"},
}


def _steady(count: int) -> list[int]:
    return [round(1000 * number / RATE) for number in range(count)]


_TIMINGS: dict[str, Callable[[int], list[int]]] = {
    "steady": _steady,
    "late": lambda count: [3700 + time for time in _steady(count)],
    "variable": lambda count: [
        time + 100 * (number // 5) + 5 * (number % 2) for number, time in enumerate(_steady(count))
    ],
}


def encode(
    path: Path,
    codec: str,
    times_ms: Sequence[int],
    first: int = 0,
    turn: Callable[[Picture], Picture] | None = None,
) -> Path:
    """Pictures `first`, `first` + 1, ... as Matroska; `turn` makes the stored picture of the one that is shown."""
    name, options = _CODECS[codec]
    with av.open(
        str(path), "w", format="avi" if codec in ("flv1", "wmv2", "msmpeg4v3") else "matroska"
    ) as out:
        stream: Any = out.add_stream(name, rate=RATE, options=options)
        pictures = [draw(first + number, WIDTH, HEIGHT) for number in range(len(times_ms))]
        if turn is not None:
            pictures = [np.ascontiguousarray(turn(picture)) for picture in pictures]
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if name == "mjpeg" else "yuv420p"
        base = Fraction(1, RATE) if list(times_ms) == _steady(len(times_ms)) else Fraction(1, 1000)
        if name in ("mpeg4", "mpeg2video", "msmpeg4", "flv", "wmv2"):
            base = Fraction(1, RATE)  # they take no other clock
        stream.codec_context.time_base = base
        for time_ms, picture in zip(times_ms, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time_ms / 1000 / base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def copy(source: Path, target: Path, *, shift_ms: int = 0, all_keys: bool = False) -> Path:
    """Copy packets into another container, `shift_ms` later; `all_keys`: each is marked as a key frame."""
    kind = next((kind for kind in _OPTIONS if target.name.endswith("." + kind)), target.suffix[1:])
    with (
        av.open(str(source)) as reader,
        av.open(str(target), "w", format=_MUXERS.get(kind), options=_OPTIONS.get(kind, {})) as writer,
    ):
        stream = reader.streams.video[0]
        copied = writer.add_stream_from_template(stream)
        packets = [packet for packet in reader.demux(stream) if packet.size]
        if stream.codec_context.name == "h264" and kind in _RAW:
            to_raw = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream)
            packets = [raw for packet in packets for raw in to_raw.filter(packet)]
        for packet in packets:
            if packet.pts is not None:
                packet.pts += shift_ms
            if packet.dts is not None:
                packet.dts += shift_ms
            packet.stream = copied
            packet.is_keyframe = packet.is_keyframe or all_keys
            writer.mux(packet)
    return target


# Changes of bytes.


def without_stamps(data: bytes, keep: Callable[[int, bool], bool]) -> bytes:
    """A transport stream whose PES packets keep their stamps only where `keep(number, is key)` says so."""
    changed, count = bytearray(data), 0
    for start in range(0, len(changed), _TS):
        if not changed[start + 1] & 0x40 or (changed[start + 1] & 0x1F) << 8 | changed[start + 2] != _PID:
            continue
        body, key = start + 4, False
        if changed[start + 3] & 0x20:
            key = changed[body] > 0 and bool(changed[body + 1] & 0x40)
            body += 1 + changed[body]
        stamps = changed[body + 7] >> 6
        if stamps and not keep(count, key):
            changed[body + 7] &= 0x3F
            size = 10 if stamps == 3 else 5
            changed[body + 9 : body + 9 + size] = b"\xff" * size
        count += 1
    return bytes(changed)


def without_index(data: bytes) -> bytes:
    """An AVI whose index, which is optional, was never written."""
    kept = bytearray(data[: data.rindex(b"idx1")])
    flags = kept.index(b"avih") + 8 + 12
    struct.pack_into("<I", kept, flags, struct.unpack_from("<I", kept, flags)[0] & ~0x30)
    struct.pack_into("<I", kept, 4, len(kept) - 8)
    return bytes(kept)


def with_matrix(data: bytes, matrix: Sequence[int]) -> bytes:
    """An mp4 with another display matrix (ISO 14496-12, 6.2.2)."""
    changed, start = bytearray(data), data.index(b"tkhd") - 4
    changed[start + 48 : start + 84] = struct.pack(">9i", *matrix)
    return bytes(changed)


def longer_packets(data: bytes, before: int, behind: int) -> bytes:
    """A transport stream with bytes before and behind each of its packets."""
    return b"".join(bytes(before) + data[at : at + _TS] + bytes(behind) for at in range(0, len(data), _TS))


# How a picture is stored so that it is upright once the matrix is applied.
TURNS: dict[str, tuple[Callable[[Picture], Picture], tuple[int, int, int, int]]] = {
    "as it is": (lambda picture: picture, (1, 0, 0, 1)),
    "mirrored": (lambda picture: picture[:, ::-1], (-1, 0, 0, 1)),
    "upside down": (lambda picture: picture[::-1], (1, 0, 0, -1)),
    "turned by 180": (lambda picture: picture[::-1, ::-1], (-1, 0, 0, -1)),
    "turned by 90": (lambda picture: picture.transpose(1, 0, 2)[::-1], (0, 1, -1, 0)),
    "turned by 270": (lambda picture: picture.transpose(1, 0, 2)[:, ::-1], (0, -1, 1, 0)),
    "transposed": (lambda picture: picture.transpose(1, 0, 2), (0, 1, 1, 0)),
    "transposed otherwise": (lambda picture: picture.transpose(1, 0, 2)[::-1, ::-1], (0, -1, -1, 0)),
}


class Maker:
    """Writes files into a folder; encodes each source once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def source(self, codec: str, timing: str = "steady", frames: int = 20, first: int = 0) -> Path:
        path = self._folder / f"{codec} {timing} {frames} {first}.source"
        return path if path.exists() else encode(path, codec, _TIMINGS[timing](frames), first)

    def path(self, kind: str) -> Path:
        self._count += 1
        return self._folder / f"{self._count}.{kind}"

    def copied(
        self,
        kind: str,
        codec: str,
        timing: str = "steady",
        *,
        frames: int = 20,
        number: int = 0,
        **options: Any,
    ) -> Path:
        return copy(self.source(codec, timing, frames, number), self.path(kind), **options)

    def changed(self, kind: str, data: bytes) -> Path:
        path = self.path(kind)
        path.write_bytes(data)
        return path

    def joined(self, kind: str, codec: str, shifts_ms: Sequence[int], frames: int = 16) -> Path:
        """Recordings one behind the other, each with a clock that begins at its shift."""
        parts = [
            self.copied(kind, codec, frames=frames, number=100 * place, shift_ms=shift).read_bytes()
            for place, shift in enumerate(shifts_ms)
        ]
        return self.changed(kind, b"".join(parts))


def write(folder: Path, *, whole: bool) -> Iterator[Judged]:
    """The fixed set: containers x codecs x stamps x rotations x edits, and what real files have besides.

    Not the whole: each codec in each container with one kind of stamps, and with two of the ways to join recordings,
    in turn.
    """
    make, turn = Maker(folder), itertools.count()
    for codec, kinds in _CONTAINERS.items():
        for kind in kinds:
            timings = [*_TIMINGS] if kind not in _UNTIMED else ["steady"]
            for timing in timings if whole else [timings[next(turn) % len(timings)]]:
                yield Judged(f"{codec}, {kind}, {timing}", make.copied(kind, codec, timing))
    for name, (turn, (a, b, c, d)) in TURNS.items():
        source = encode(make.path("source"), "h264", _steady(10), 1, turn)
        matrix = [a * _ONE, b * _ONE, 0, c * _ONE, d * _ONE, 0, 0, 0, _UNIT]
        yield Judged(
            name, make.changed("mp4", with_matrix(copy(source, make.path("mp4")).read_bytes(), matrix))
        )
    for codec in ("h264", "h264 open", "h264 plain", "hevc", "mpeg4"):
        source = make.copied("mp4", codec)
        for first in (5, 11):
            yield Judged(f"{codec} cut at {first}", video_files.copy_clip(source, make.path("mp4"), first))
    yield from (one for number, one in enumerate(_joined(make)) if whole or (number + number // 6) % 3 == 0)
    yield from _without_stamps(make)
    yield from _key_flags(make)
    yield from _leading(make)
    yield from _fields(make)
    yield from _beside(make)


def _joined(make: Maker) -> Iterator[Judged]:
    for kind, codec in (
        ("ts", "h264"),
        ("ts", "mpeg2"),
        ("ts", "h264 plain"),
        ("vob", "mpeg2"),
        ("mpg", "mpeg2"),
        ("m2ts", "h264"),
        ("flv", "h264"),
        ("flv", "flv1"),
    ):
        for name, shifts in {
            "two": (0, 0),
            "three": (0, 0, 0),
            "backwards": (9000, 1000),
            "overlapping": (0, 300),
            "after a pause": (0, 4000),
            "much later": (0, 60000),
        }.items():
            yield Judged(f"{name}, joined, {codec} in {kind}", make.joined(kind, codec, shifts))


def _without_stamps(make: Maker) -> Iterator[Judged]:
    for codec in ("h264", "h264 plain"):
        data = make.copied("ts", codec).read_bytes()
        for name, keep in {
            "every third": lambda count, _: count % 3 == 0,
            "every fifth": lambda count, _: count % 5 == 0,
            "keys": lambda _, key: key,
            "first": lambda count, _: count == 0,
            "none": lambda *_: False,
        }.items():
            yield Judged(f"{codec}, stamps: {name}", make.changed("ts", without_stamps(data, keep)))


def _key_flags(make: Maker) -> Iterator[Judged]:
    for codec in ("h264 plain", "mpeg4", "msmpeg4v3", "flv1", "wmv2", "mjpeg"):
        yield Judged(
            f"{codec} without idx1",
            make.changed("avi", without_index(make.copied("avi", codec).read_bytes())),
        )
    for codec in ("h264", "h264 plain", "hevc", "mpeg4", "vp8", "vp9"):
        for kind in ("mp4", "mkv"):
            if kind in _CONTAINERS[codec]:
                yield Judged(f"{codec} in {kind}, all keys", make.copied(kind, codec, all_keys=True))


def _leading(make: Maker) -> Iterator[Judged]:
    ts, ps = make.copied("ts", "h264", frames=40).read_bytes(), make.copied("vob", "mpeg2").read_bytes()
    fragments = make.copied("frag.mp4", "h264").read_bytes()
    for name, kind, data in (
        ("cut in a packet", "ts", ts[77:]),
        ("cut late in a packet", "ts", ts[180:]),
        ("192 bytes", "m2ts", longer_packets(ts, 4, 0)),
        ("192 bytes, cut", "m2ts", longer_packets(ts, 4, 0)[50:]),
        ("204 bytes", "ts", longer_packets(ts, 0, 16)),
        ("204 bytes, cut", "ts", longer_packets(ts, 0, 16)[33:]),
        ("40 bytes of a recorder", "mp4", b"IMKH" + bytes(36) + ps),
        ("uuid box", "mp4", struct.pack(">I4s30x", 38, b"uuid") + fragments),
        ("junk box", "mov", struct.pack(">I4s4x", 12, b"junk") + fragments),
        ("udta box", "mp4", struct.pack(">I4s8x", 16, b"udta") + fragments),
        ("free box", "mp4", struct.pack(">I4s8x", 16, b"free") + fragments),
    ):
        yield Judged(f"leading: {name}", make.changed(kind, data))


def _fields(make: Maker) -> Iterator[Judged]:
    for kind in ("ts", "mkv", "mp4"):
        for whole in (0, 2, 5):
            path = field_pictures.write(make.path(kind), 18, rate=30 if whole else 25, whole=whole)
            yield Judged(f"fields in {kind}, every {whole}th whole", path)


def _beside(make: Maker) -> Iterator[Judged]:
    """A picture, or a preview, in front of the video."""
    for kind in ("mp4", "mov"):
        for count in (1, 5):
            path = make.path(kind)
            with (
                av.open(str(make.source("mjpeg", frames=count, first=900))) as small,
                av.open(str(make.source("h264"))) as large,
                av.open(str(path), "w") as out,
            ):
                streams = [
                    (reader, out.add_stream_from_template(reader.streams.video[0]))
                    for reader in (small, large)
                ]
                for reader, copied in streams:
                    for packet in reader.demux(video=0):
                        if packet.size:
                            packet.stream = copied
                            out.mux(packet)
            yield Judged(f"{count} pictures beside the video in {kind}", path)


def write_random(folder: Path, dice: random.Random) -> Judged:
    """One file of random kind and values."""
    make = Maker(folder)
    codec = dice.choice([*_CONTAINERS])
    kind = dice.choice(_CONTAINERS[codec])
    frames, shift = dice.randrange(2, 40), dice.choice([0, dice.randrange(90_000)])
    timing = dice.choice([*_TIMINGS])
    what = dice.choice(["copied", "copied", "cut", "joined", "stamps", "index", "leading"])
    name = f"{what} {codec} {kind} {timing} {frames} {shift}"
    path = make.copied(kind, codec, timing, frames=frames, shift_ms=shift)
    if what == "cut" and kind in ("mp4", "mov") and codec != "mjpeg":
        path = video_files.copy_clip(path, make.path(kind), dice.randrange(frames))
    elif what == "joined" and kind in ("ts", "m2ts", "mpg", "vob"):
        shifts = [dice.randrange(30_000) for _ in range(dice.randrange(2, 4))]
        path, name = make.joined(kind, codec, shifts, frames), f"{name} {shifts}"
    elif what == "stamps" and kind == "ts":
        every = dice.randrange(2, 9)
        path = make.changed(kind, without_stamps(path.read_bytes(), lambda count, _: count % every == 0))
    elif what == "index" and kind == "avi":
        path = make.changed(kind, without_index(path.read_bytes()))
    elif what == "leading" and kind == "ts":
        path = make.changed(kind, path.read_bytes()[dice.randrange(188) :])
    # Here times are guesses, and `ffmpeg` 5.1 guesses otherwise.
    guessed = kind in _UNTIMED or what == "joined" or (what == "stamps" and timing == "variable")
    return Judged(name, path, timed=not guessed)
