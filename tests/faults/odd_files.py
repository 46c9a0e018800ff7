"""Inputs that are no videos, or lead elsewhere: each with the outcome that reading it must have."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import av

from tests import video_files

CANARY = 0xABC  # the number on every picture of a video that must not be read
SOUND = ""  # instead of an error


@dataclass(frozen=True)
class Odd:
    """One input.

    Attributes:
        name: What it is.
        path: What is asked for.
        allowed: Names of the errors that may come of it; `SOUND`: its frames, and they are right.
    """

    name: str
    path: bytes
    allowed: tuple[str, ...]


class Listener:
    """A server on this host that counts who connects to it."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def write(folder: Path, port: int) -> Iterator[Odd]:
    """Make all of them in a folder; its parent gets a video that must not be read."""
    good = video_files.write_video(folder / "good.mp4", options={"g": "12"})
    canary = _canary(folder.parent / "canary.ts")
    yield from _no_videos(folder, good)
    yield from _not_files(folder, good, canary)
    yield from _half_videos(folder, good)
    yield from _playlists(folder, canary, port)
    yield from _paths(good, canary, port)
    yield from _names(folder, good)
    yield from _references(folder, good, canary, port)
    yield from _bombs(folder)


def _canary(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"x264-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(video_files.draw(CANARY, 96, 64))))
        container.mux(stream.encode(None))
    return path


_NO = ("NotAVideoError",)
_BROKEN = ("VideoDecodeError",)


def _no_videos(folder: Path, good: Path) -> Iterator[Odd]:
    contents = {
        "zero bytes": b"",
        "one byte": b"G",
        "text": b"This is the story of a video.\n" * 99,
        "random": random.Random(0).randbytes(1 << 20),
        "NULs": bytes(1 << 20),
        "image": b"\x89PNG\r\n\x1a\n" + bytes(999),
        "zip": b"PK\x03\x04" + bytes(999),
        "script": b"#!/bin/sh\nexit 1\n",
    }
    for name, data in contents.items():
        path = folder / f"{name}.mp4"
        path.write_bytes(data)
        yield Odd(name, os.fsencode(path), _NO)
    sparse = folder / "sparse.mp4"
    sparse.touch()
    os.truncate(sparse, 1 << 40)
    yield Odd("1 TB of nothing", os.fsencode(sparse), _NO)
    huge = folder / "huge.mp4"
    huge.write_bytes(good.read_bytes()[:40])
    os.truncate(huge, 1 << 40)
    yield Odd("1 TB behind a signature", os.fsencode(huge), _BROKEN)
    yield Odd("audio only", os.fsencode(video_files.write_audio(folder / "song.m4a")), _NO)


def _not_files(folder: Path, good: Path, canary: Path) -> Iterator[Odd]:
    for name, target in (
        ("dangling", "nowhere"),
        ("loop", "loop.mp4"),
        ("zero device", "/dev/zero"),
        ("random device", "/dev/urandom"),
        ("terminal", "/dev/tty"),
        ("canary link", str(canary)),
        ("password file", "/etc/passwd"),
    ):
        (folder / f"{name}.mp4").symlink_to(target)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.mp4"))
    denied = ("PathDeniedError",)
    for name, allowed in {
        "dangling": ("VideoNotFoundError",),
        "loop": ("VideoError",),
        "zero device": denied,
        "random device": denied,
        "terminal": (*denied, "VideoError"),
        "canary link": denied,
        "password file": denied,
        "pipe": _NO,
        "folder": _NO,
        "socket": ("VideoError", *_NO),
        "missing": ("VideoNotFoundError",),
        "good.mp4/below": ("VideoNotFoundError",),
    }.items():
        yield Odd(name, os.fsencode(folder / f"{name}.mp4"), allowed)
    del good


def _half_videos(folder: Path, good: Path) -> Iterator[Odd]:
    data = good.read_bytes()
    without_index = folder / "no moov.mp4"
    without_index.write_bytes(data.replace(b"moov", b"junk"))
    yield Odd("without an index", os.fsencode(without_index), _BROKEN)
    for name, head in {
        "ftyp alone": data[:32],
        "EBML alone": b"\x1a\x45\xdf\xa3",
        "RIFF alone": b"RIFF\x10\0\0\0AVI ",
        "FLV alone": b"FLV\x01\x05\0\0\0\x09\0\0\0\0",
        "Ogg alone": b"OggS" + bytes(60),
        "GIF alone": b"GIF89a",
        "TS alone": (b"G" + bytes(187)) * 9,
        "ASF alone": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(99),
        "PS alone": b"\0\0\x01\xba" + bytes(99),
    }.items():
        path = folder / f"{name}.mp4"
        path.write_bytes(head)
        yield Odd(name, os.fsencode(path), (*_BROKEN, *_NO))


def _playlists(folder: Path, canary: Path, port: int) -> Iterator[Odd]:
    url = f"http://127.0.0.1:{port}/x.ts"
    texts = {
        "hls with a file": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{canary}\n#EXT-X-ENDLIST\n",
        "hls with a name": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n../canary.ts\n#EXT-X-ENDLIST\n",
        "hls with a URL": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
        "ffconcat": "ffconcat version 1.0\nfile ../canary.ts\n",
        "ffconcat with a URL": f"ffconcat version 1.0\nfile {url}\n",
        "dash": f'<?xml version="1.0"?><MPD><BaseURL>{url}</BaseURL></MPD>',
        "asx": f'<ASX version="3"><Entry><Ref href="{url}"/></Entry></ASX>',
        "rtsp text": f"[Reference]\nRef1=http://127.0.0.1:{port}/a\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        for ending in ("mp4", "m3u8", "ts"):
            path = folder / f"{name}.{ending}"
            path.write_text(text)
            yield Odd(f"{name} as {ending}", os.fsencode(path), _NO)


def _paths(good: Path, canary: Path, port: int) -> Iterator[Odd]:
    for path in (
        f"http://127.0.0.1:{port}/x.mp4",
        f"https://127.0.0.1:{port}/x.mp4",
        f"tcp://127.0.0.1:{port}",
        f"rtmp://127.0.0.1:{port}/a/b",
        f"file://{good}",
        f"file:{good}",
        f"concat:{good}|{canary}",
        f"subfile,,start,0,end,0,,:{canary}",
        f"crypto:{canary}",
        f"async:cache:{canary}",
        f"data:video/mp4;base64,{'A' * 99}",
        "pipe:0",
        "fd:0",
        "-",
        "",
        "a\0b.mp4",
        "/x" * 5000,
        f"{good.parent}/../canary.ts",
        "/proc/self/fd/0",
        "/proc/self/mem",
    ):
        yield Odd(
            f"path {path[:40]!r}", os.fsencode(path), ("VideoNotFoundError", "PathDeniedError", "VideoError")
        )


def _names(folder: Path, good: Path) -> Iterator[Odd]:
    for name in (
        b"\xff\xfe.mp4",
        b"new\nline.mp4",
        b"%d%03d%s.mp4",
        b"-i.mp4",
        b"a:b.mp4",
        b"file:x.mp4",
        b"http:x.mp4",
        b"concat:a|b.mp4",
        b"tab\tescape\x1b[31m.mp4",
        b" .mp4",
        b"*?[a].mp4",
        "emoji \U0001f600 \u202ertl.mp4".encode(),
        b"x" * 251 + b".mp4",
        b"no ending",
    ):
        path = os.fsencode(folder) + b"/" + name
        os.link(good, path)
        yield Odd(f"name {name[:40]!r}", path, (SOUND,))
    below = folder / "..." / "a b"
    below.mkdir(parents=True)
    os.link(good, below / "x.mp4")
    yield Odd("folder names", os.fsencode(below / "x.mp4"), (SOUND,))
    (folder / "inner.mp4").symlink_to("good.mp4")
    yield Odd("link inside", os.fsencode(folder / "inner.mp4"), (SOUND,))


def _references(folder: Path, good: Path, canary: Path, port: int) -> Iterator[Odd]:
    """An mp4 may say that its samples are in another file."""
    for name, url in {
        "URL": f"http://127.0.0.1:{port}/x",
        "file": f"file://{canary}",
        "name": "canary.ts",
    }.items():
        path = folder / f"reference to a {name}.mp4"
        path.write_bytes(_with_reference(good.read_bytes(), url))
        yield Odd(f"mp4 with a reference to a {name}", os.fsencode(path), (SOUND, *_BROKEN))


def _with_reference(data: bytes, url: str) -> bytes:
    """Replace the data reference of an mp4 whose index is at the end."""
    old = b"\0\0\0\x0curl \0\0\0\x01"  # flag: in this very file
    new = struct.pack(">I4sI", 12 + len(url) + 1, b"url ", 0) + url.encode() + b"\0"
    place, grown = data.index(old), bytearray(data)
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        size_at = data.rindex(box, 0, place) - 4
        struct.pack_into(
            ">I", grown, size_at, struct.unpack_from(">I", data, size_at)[0] + len(new) - len(old)
        )
    return bytes(grown[:place]) + new + bytes(grown[place + len(old) :])


def _bombs(folder: Path) -> Iterator[Odd]:
    for width, height, allowed in ((16000, 16000, _BROKEN), (65535, 65535, _BROKEN), (8000, 8000, (SOUND,))):
        path = folder / f"{width}x{height}.mov"
        _write_png(path, width, height)
        yield Odd(f"pictures of {width}x{height}", os.fsencode(path), allowed)


def _write_png(path: Path, width: int, height: int) -> None:
    """A video of one black PNG, one bit a pixel; a header that says 65535 has no more to it than that."""
    rows = min(height, 16000)
    pixels = zlib.compress(bytes((1 + -(-width // 8)) * rows), 1)
    picture = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", pixels),
        (b"IEND", b""),
    ):
        picture += struct.pack(">I", len(content)) + kind + content
        picture += struct.pack(">I", zlib.crc32(kind + content))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = "rgb24"
        packet = av.Packet(picture)
        packet.pts = packet.dts = 0
        packet.is_keyframe, packet.stream = True, stream
        container.mux(packet)
