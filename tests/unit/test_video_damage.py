"""Damaged videos: what is intact is given, with its true times; what is not is left out; and it is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError, VideoDecodeError
from specvlm.records import Frames
from specvlm.video import decord_reader, read_video
from specvlm.video.reading import Hooks, read
from tests import video_files
from tests.video_files import KINDS, RATE, numbers_of, write_video

Make = Callable[[str], Path]
Backend = Literal["auto", "pyav"]
needs_decord = pytest.mark.skipif(not decord_reader.is_installed(), reason="decord has no wheel here")
both = pytest.mark.parametrize("backend", ["auto", "pyav"])


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return video_files.maker(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return video_files.noisy_maker(tmp_path_factory.mktemp("noisy"))


def flags_of(frames: Frames) -> tuple[str, ...]:
    assert frames.source is not None
    return frames.source.flags


def assert_true_times(frames: Frames) -> None:
    assert numbers_of(frames.pixels) == [round(time * RATE) for time in frames.times_s]


@both
@pytest.mark.parametrize("kind", KINDS)
def test_sound_videos_have_no_flags(kind: str, make: Make, backend: Backend) -> None:
    part = {} if kind == "h264 one frame" else {"fps": 7.0, "start_s": 0.5, "end_s": 1.5}
    for wanted in ({"num_frames": 5}, part):
        settings = FrameSettings(backend=backend, **wanted)
        assert flags_of(read_video(make(kind), settings)) == ()


@both
@pytest.mark.parametrize(
    "options",
    ["intra-refresh=1:keyint=20", "slices=4", "tff=1:keyint=12", "ref=4:b-pyramid=normal:bframes=5"],
)
@pytest.mark.parametrize("name", ["x.mp4", "x.ts"])
def test_unusual_streams_are_sound(name: str, options: str, tmp_path: Path, backend: Backend) -> None:
    """In intra refresh a picture builds up over many frames: decoding has to begin before the key frame."""
    path = write_video(tmp_path / name, options={"x264-params": f"{options}:log-level=none"})
    for count in (4, 60):
        frames = read_video(path, FrameSettings(num_frames=count, backend=backend))
        assert flags_of(frames) == ()
        assert len(frames.pixels) == count
        assert_true_times(frames)


_X264 = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:log-level=none"}
_TRUNCATED: dict[str, tuple[str, dict[str, Any]]] = {
    "mp4, index first": ("v.mp4", {"options": _X264, "container_options": {"movflags": "faststart"}}),
    "fragmented mp4": (
        "v.mp4",
        {"options": _X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "webm": ("v.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mkv": ("v.mkv", {"options": _X264}),
    "avi": ("v.avi", {"codec": "mpeg4", "options": {"b": "2M", "g": "12"}}),
    "ts": ("v.ts", {"options": _X264}),
}


@both
@pytest.mark.parametrize("kind", _TRUNCATED)
def test_a_file_that_ends_early_says_so(kind: str, tmp_path: Path, backend: Backend) -> None:
    name, wanted = _TRUNCATED[kind]
    whole = write_video(tmp_path / f"whole-{name}", **wanted)
    assert flags_of(read_video(whole, FrameSettings(backend=backend))) == ()
    frames = read_video(
        video_files.cut(whole, tmp_path / name, 0.7), FrameSettings(num_frames=6, backend=backend)
    )
    assert "truncated" in flags_of(frames)
    assert_true_times(frames)


@both
def test_frames_that_damage_has_reached_are_left_out(tmp_path: Path, make: Make, backend: Backend) -> None:
    damaged = video_files.blank_packets(make("h264"), tmp_path / "damaged.mp4", 24, 24)  # a key frame
    settings = FrameSettings(num_frames=56, backend=backend)
    frames = read_video(damaged, settings)
    assert_true_times(frames)
    shown = numbers_of(frames.pixels)
    assert 40 < len(shown) < 46
    assert not {*range(24, 36)} & {*shown}
    assert flags_of(frames) == ("damaged", "partial")
    even = read_video(damaged, settings, frame_multiple=8)
    assert numbers_of(even.pixels) == shown[: len(shown) // 8 * 8]


@both
def test_damage_that_no_chosen_frame_needs_is_no_damage(tmp_path: Path, make: Make, backend: Backend) -> None:
    damaged = video_files.blank_packets(make("h264"), tmp_path / "damaged.mp4", 24, 24)
    before = read_video(damaged, FrameSettings(num_frames=12, end_s=0.6, backend=backend))
    assert len(before.pixels) == 12
    assert flags_of(before) == ()
    behind = read_video(damaged, FrameSettings(num_frames=12, start_s=1.3, backend="pyav"))
    assert (len(behind.pixels), flags_of(behind)) == (12, ())
    assert_true_times(behind)


def test_how_much_must_be_left_is_a_setting(tmp_path: Path, make: Make) -> None:
    damaged = video_files.blank_packets(make("h264"), tmp_path / "damaged.mp4", 12, 59)
    for least, enough in ((0.0, True), (0.2, True), (0.21, False), (0.5, False), (1.0, False)):
        settings = FrameSettings(num_frames=60, min_decoded=least)
        if enough:
            assert numbers_of(read_video(damaged, settings).pixels) == list(range(12))
            continue
        with pytest.raises(VideoDecodeError, match=r"only 12 of 60 chosen frames can be decoded; damaged"):
            read_video(damaged, settings)
    with pytest.raises(ConfigError, match=r"min_decoded=1\.5 is out of range; give a share"):
        FrameSettings(min_decoded=1.5)


def test_a_frame_is_given_up_where_one_that_it_leans_on_is_concealed(noisy: Make, tmp_path: Path) -> None:
    """A hole in one P-frame: its decoder patches it up, and the frames after it look sound."""
    data = bytearray(noisy("h264").read_bytes())
    start, size = video_files.packet_spans(noisy("h264"))[30]
    data[start + size // 3 : start + size] = bytes(size - size // 3)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    frames = read_video(path, FrameSettings(num_frames=60))
    assert_true_times(frames)
    lost = set(range(60)) - set(numbers_of(frames.pixels))
    assert len(lost) > 10, "all that follow in its group of pictures"
    assert lost <= {*range(24, 48)}
    assert 47 in lost
    assert flags_of(frames)[:2] == ("damaged", "partial")


def test_a_video_that_lost_its_beginning_is_damaged(make: Make, tmp_path: Path) -> None:
    """Its times count from the first frame that is left, so they are not what they were."""
    damaged = video_files.blank_packets(make("h264"), tmp_path / "damaged.mp4", 0, 11)
    frames = read_video(damaged, FrameSettings(num_frames=4))
    assert flags_of(frames) == ("damaged",)
    assert [round(time * RATE) + 12 for time in frames.times_s] == numbers_of(frames.pixels)


@pytest.mark.parametrize("kind", ["vp8", "vp9", "hevc", "mkv"])
def test_a_lost_block_in_matroska_is_seen(kind: str, noisy: Make, tmp_path: Path) -> None:
    """Packets are missing and the rest decodes as if nothing were: only the demuxer's complaint tells."""
    data = bytearray(noisy(kind).read_bytes())
    spans = video_files.packet_spans(noisy(kind))
    del data[spans[20][0] + 100 : spans[23][0] + 200]
    path = tmp_path / "lost.mkv"
    path.write_bytes(data)
    frames = read_video(path, FrameSettings(num_frames=40))
    assert "damaged" in flags_of(frames)
    assert_true_times(frames)


@pytest.mark.parametrize("kind", ["vp8", "vp9", "hevc"])
def test_a_lost_disk_block_in_a_packet_is_seen(kind: str, noisy: Make, tmp_path: Path) -> None:
    data = bytearray(noisy(kind).read_bytes())
    start, size = video_files.packet_spans(noisy(kind))[24]
    assert size > 1024
    data[start + 300 : start + 300 + 512] = bytes(512)
    path = tmp_path / "hole.mkv"
    path.write_bytes(data)
    frames = read_video(path, FrameSettings(num_frames=60))
    assert flags_of(frames)[:1] == ("damaged",)
    assert_true_times(frames)


def test_a_lost_packet_in_avi_shifts_no_time(noisy: Make, tmp_path: Path) -> None:
    """There frames have no times of their own: their order alone would put each one too early."""
    source = noisy("avi")
    for first in (10, 30):
        damaged = video_files.blank_packets(source, tmp_path / "damaged.avi", first, first + 1)
        frames = read_video(damaged, FrameSettings(num_frames=60, min_decoded=0.1))
        assert flags_of(frames)[:2] == ("damaged", "partial")
        assert_true_times(frames)
        assert set(numbers_of(frames.pixels)) >= {*range(first - first % 12), *range(first + 12, 60)}


@needs_decord
def test_decord_is_not_believed_when_its_decoder_complains(noisy: Make, tmp_path: Path) -> None:
    """It hides that a picture was patched up, and gives it as a good one."""
    data, rng = bytearray(noisy("h264").read_bytes()), random.Random(0)
    start, size = video_files.packet_spans(noisy("h264"))[24]
    for _ in range(20):
        data[start + 50 + rng.randrange(size - 50)] ^= 1 << rng.randrange(8)
    path = tmp_path / "flipped.mp4"
    path.write_bytes(data)
    frames = read_video(path, FrameSettings(num_frames=30))
    assert flags_of(frames) == ("damaged", "partial")
    assert_true_times(frames)
    with pytest.raises(VideoDecodeError, match=r"it complained \d+ times"):
        read_video(path, FrameSettings(num_frames=30, backend="decord"))


@needs_decord
def test_where_decord_cannot_be_heard_it_is_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decord_reader, "_heard", [])
    with pytest.raises(VideoDecodeError, match="its messages cannot be heard here"):
        read_video(make("h264"), FrameSettings(backend="decord"))


@both
@pytest.mark.parametrize("damaged", [False, True])
def test_frames_are_put_into_the_memory_that_is_given(
    damaged: bool, make: Make, tmp_path: Path, backend: Backend
) -> None:
    path = make("h264")
    if damaged:
        path = video_files.blank_packets(path, tmp_path / "damaged.mp4", 24, 24)
    given: list[NDArray[np.uint8]] = []

    def memory(shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        given.append(np.zeros(shape, np.uint8))
        return given[-1]

    settings = FrameSettings(num_frames=20, max_pixels=1000, backend=backend)
    frames = read(path, settings, hooks=Hooks(memory=memory))
    assert given[-1].shape[0] == 20
    assert frames.pixels.ctypes.data == given[-1].ctypes.data
    np.testing.assert_array_equal(frames.pixels, read_video(path, settings).pixels)


def test_threads_read_without_disturbing_one_another(
    noisy: Make, make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """FFmpeg has one log for all: each thread must hear its own file's complaints, and nobody else's."""
    hole = video_files.blank_packets(make("h264"), tmp_path / "hole.mp4", 24, 24)
    lost = bytearray(noisy("mkv").read_bytes())
    del lost[len(lost) // 2 : len(lost) // 2 + 2000]
    (tmp_path / "lost.mkv").write_bytes(lost)
    paths = [hole, make("h264"), tmp_path / "lost.mkv", make("vp8"), make("h264 ts"), noisy("mkv")]
    settings = FrameSettings(num_frames=30, backend="pyav")
    alone = [flags_of(read_video(path, settings)) for path in paths]
    av.logging.set_level(av.logging.PANIC)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = [*threads.map(lambda path: flags_of(read_video(path, settings)), paths * 8)]
        assert av.logging.get_level() == av.logging.PANIC, "as it was before"
    finally:
        av.logging.set_level(None)
    assert found == alone * 8
    assert [bool(flags) for flags in alone] == [True, False, True, False, False, False]
    assert capfd.readouterr() == ("", "")
