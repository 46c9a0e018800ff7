"""A part of a long film: what is read of the file, and that the part is the same as in the whole film."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from specvlm.config import FrameSettings
from specvlm.errors import VideoRangeError
from specvlm.video import contents, opening, read_video, reading
from tests import video_files
from tests.video_files import RATE, draw, numbers_of

_FRAMES = 1200


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 s of noise that is not compressed much; a group of pictures is a second."""
    folder = tmp_path_factory.mktemp("films")
    options = {
        "x264-params": "keyint=30:bframes=2:scenecut=0:log-level=none",
        "preset": "ultrafast",
        "qp": "8",
    }
    pictures = np.random.default_rng(0).integers(0, 40, (8, 64, 96, 3), np.uint8)
    source = folder / "film.mp4"
    with av.open(str(source), "w", options={"movflags": "faststart"}) as out:
        stream: Any = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(_FRAMES):
            frame = av.VideoFrame.from_ndarray(
                draw(number, 96, 64) // 2 + 40 + pictures[number % 8], format="rgb24"
            )
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    made = {"mp4": source}
    for kind in ("mov", "mkv"):
        made[kind] = video_files.copy_clip(source, folder / f"film.{kind}", 0)
    return made


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    real = opening.read_at

    def count(descriptor: int, size: int, position: int) -> bytes:
        data = real(descriptor, size, position)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(contents, "read_at", count)
    return sizes


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize(
    "part", [(0.0, 1.5), (7.3, 9.0), (20.0, 20.5), (38.7, 40.0), (39.0, None), (35.0, 99.0)]
)
def test_a_part_is_the_same_as_in_the_whole_film(
    kind: str,
    part: tuple[float, float | None],
    films: dict[str, Path],
    bytes_read: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = FrameSettings(fps=6.0, start_s=part[0], end_s=part[1], min_frames=1)
    whole = read_video(films[kind], settings)
    all_bytes = sum(bytes_read)
    bytes_read.clear()
    monkeypatch.setattr(reading, "_LONG_BYTES", 0)
    frames = read_video(films[kind], settings)
    assert sum(bytes_read) < all_bytes / 3
    np.testing.assert_array_equal(frames.pixels, whole.pixels)
    np.testing.assert_allclose(frames.times_s, whole.times_s, atol=1e-6)
    assert numbers_of(frames.pixels) == [round(time * RATE) for time in frames.times_s]
    assert frames.source is not None
    assert whole.source is not None
    assert frames.source.flags == whole.source.flags == ()
    assert frames.source.duration_s == pytest.approx(whole.source.duration_s, abs=2e-3)
    assert frames.source.fps == pytest.approx(whole.source.fps, abs=0.01)


def test_a_part_past_the_end(films: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LONG_BYTES", 0)
    with pytest.raises(VideoRangeError, match=r"start_s=40 is past the video's 40.000 s; start earlier"):
        read_video(films["mp4"], FrameSettings(start_s=40.0))


@pytest.mark.parametrize(
    "kind", ["h264 fragments", "h264 ts", "mpeg4 avi", "h264 flv", "h264 late start", "vp9"]
)
def test_files_without_an_index_are_read_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video_files.maker(tmp_path)(kind)
    settings = FrameSettings(fps=10.0, start_s=0.5, end_s=1.4)
    whole = read_video(path, settings)
    monkeypatch.setattr(reading, "_LONG_BYTES", 0)
    frames = read_video(path, settings)
    np.testing.assert_array_equal(frames.pixels, whole.pixels)
    np.testing.assert_allclose(frames.times_s, whole.times_s, atol=1e-6)


def test_a_damaged_part_says_so(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = video_files.blank_packets(films["mp4"], tmp_path / "damaged.mp4", 605, 605)
    monkeypatch.setattr(reading, "_LONG_BYTES", 0)
    frames = read_video(damaged, FrameSettings(num_frames=30, start_s=19.5, end_s=20.8))
    assert frames.source is not None
    assert frames.source.flags == ("damaged", "partial")
    assert numbers_of(frames.pixels) == [round(time * RATE) for time in frames.times_s]
