"""Reading what is no video, or a damaged one: one error of our own, in one line, and no other noise."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from specvlm.config import FrameSettings
from specvlm.errors import (
    NotAVideoError,
    VideoDecodeError,
    VideoError,
    VideoNotFoundError,
)
from specvlm.video import demuxing, read_video
from tests import video_files
from tests.video_files import numbers_of, write_video

Backend = Literal["auto", "pyav"]
_X264 = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:log-level=none"}


def _video(folder: Path) -> Path:
    return write_video(folder / "good.mp4", options=_X264)


def _written(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "file.mp4").write_bytes(data)
        return folder / "file.mp4"

    return write


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def _loop(folder: Path) -> Path:
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    return folder / "loop.mp4"


def _cut_with_index_at_the_end(folder: Path) -> Path:
    return video_files.cut(_video(folder), folder / "cut.mp4", 0.6)


def _unsupported(folder: Path) -> Path:
    return write_video(folder / "snow.avi", codec="snow", pixel_format="yuv420p", frames=3)


def _blank(folder: Path) -> Path:
    return video_files.blank_packets(_video(folder), folder / "blank.mp4", 0, 59)


_PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
_BAD: dict[str, tuple[Callable[[Path], Path], type[VideoError], str]] = {
    "missing": (lambda folder: folder / "none.mp4", VideoNotFoundError, "no such file"),
    "below a file": (lambda folder: _video(folder) / "x.mp4", VideoNotFoundError, "no such file"),
    "NUL in the name": (lambda folder: folder / "a\0b.mp4", VideoNotFoundError, "NUL"),
    "folder": (lambda folder: folder, NotAVideoError, "is a folder"),
    "empty": (_written(b""), NotAVideoError, r"is empty \(0 bytes\)"),
    "text": (
        _written(b"This is the story of a video.\n" * 99),
        NotAVideoError,
        "does not begin like a video",
    ),
    "few bytes": (_written(b"\x47"), NotAVideoError, "does not begin like a video"),
    "playlist": (_written(_PLAYLIST), NotAVideoError, "does not begin like a video"),
    "concat list": (
        _written(b"ffconcat version 1.0\nfile good.mp4\n"),
        NotAVideoError,
        "does not begin like",
    ),
    "pipe": (_fifo, NotAVideoError, "is a pipe or device"),
    "device": (lambda folder: Path("/dev/zero"), NotAVideoError, "is a pipe or device"),
    "link to itself": (_loop, VideoError, "cannot be opened"),
    "audio only": (
        lambda folder: video_files.write_audio(folder / "song.m4a"),
        NotAVideoError,
        "no video stream",
    ),
    "only a signature": (
        _written(b"\x00\x00\x00\x10ftypisom\x00\x00\x02\x00"),
        VideoDecodeError,
        "cut short",
    ),
    "ebml and noise": (
        _written(b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 9),
        NotAVideoError,
        "does not begin like",
    ),
    "index cut off": (
        _cut_with_index_at_the_end,
        VideoDecodeError,
        "its mov container is cut short or damaged",
    ),
    "unsupported codec": (_unsupported, VideoDecodeError, "codec snow is not supported"),
    "all packets lost": (_blank, VideoDecodeError, "only 0 of 4 chosen frames"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a POSIX file system")
@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("kind", _BAD)
def test_one_line_of_our_own(
    kind: str, backend: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, error_type, words = _BAD[kind]
    path = make(tmp_path)
    capfd.readouterr()
    with pytest.raises(VideoError, match=words) as caught:
        read_video(path, FrameSettings(backend=backend))
    assert type(caught.value) is error_type
    assert caught.value.path == str(path)
    assert str(caught.value).isprintable()
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value), "the fix follows the reason"
    assert caught.value.__cause__ is None
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x.mp4", "https://example.org/a", "file:///etc/passwd", "s3://a/b"]
)
def test_urls_are_not_opened(url: str) -> None:
    with pytest.raises(VideoNotFoundError, match="remote URLs are not read; download the video first"):
        read_video(url)


@pytest.mark.parametrize("prefix", ["file:", "concat:", "subfile,,start,0,end,0,,:", "pipe:0"])
def test_protocol_prefixes_are_only_names(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(VideoNotFoundError):
        read_video(f"{prefix}{_video(tmp_path)}")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(VideoError, match="permission denied; give this user the right to read it"):
        read_video(_video(tmp_path))


def test_frames_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demuxing, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(VideoDecodeError, match="its frames of 96x64 are not within 1 to 6143 pixels"):
        read_video(_video(tmp_path))


_CUT: dict[str, tuple[str, dict[str, Any]]] = {
    "vp9 webm": ("cut.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mpeg ts": ("cut.ts", {"options": _X264}),
    "avi": (
        "cut.avi",
        {"codec": "mpeg4", "options": {"g": "12", "qmin": "1", "qmax": "1"}, "width": 192, "height": 128},
    ),
    "fragmented mp4": (
        "cut.mp4",
        {"options": _X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "mp4, index first": ("cut.mp4", {"options": _X264, "container_options": {"movflags": "faststart"}}),
}


@pytest.mark.parametrize("share", [0.45, 0.7, 0.95])
@pytest.mark.parametrize("kind", _CUT)
def test_cut_file_gives_the_frames_that_are_there(
    kind: str, share: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, wanted = _CUT[kind]
    whole = write_video(tmp_path / f"whole-{name}", **wanted)
    path = video_files.cut(whole, tmp_path / name, share)
    capfd.readouterr()
    frames = read_video(path, FrameSettings(num_frames=6))
    assert capfd.readouterr() == ("", "")
    shown = numbers_of(frames.pixels)
    assert [round(time * video_files.RATE) for time in frames.times_s] == shown
    assert shown == sorted(set(shown))
    assert frames.source is not None
    assert frames.source.duration_s <= 2.0


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_lost_frames_are_counted_and_never_replaced(tmp_path: Path, backend: Backend) -> None:
    damaged = video_files.blank_packets(_video(tmp_path), tmp_path / "damaged.mp4", 24, 24)  # a key frame
    with pytest.raises(VideoDecodeError, match=r"only 4\d of 60 chosen frames can be decoded"):
        read_video(damaged, FrameSettings(num_frames=60, min_decoded=1.0, backend=backend))
    intact = read_video(damaged, FrameSettings(num_frames=12, end_s=0.7, backend=backend))
    assert [round(time * video_files.RATE) for time in intact.times_s] == numbers_of(intact.pixels)
