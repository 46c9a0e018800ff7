"""Reading good videos: the right frames at the right times, alike from both readers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError, VideoDecodeError, VideoRangeError
from specvlm.records import Frames
from specvlm.video import decord_reader, read_video
from specvlm.video.pixels import fit
from tests import video_files
from tests.video_files import KINDS, kind_times_s, numbers_of

Make = Callable[[str], Path]

needs_decord = pytest.mark.skipif(not decord_reader.is_installed(), reason="decord has no wheel here")

# What `auto` must leave to PyAV, and why. Most of them decord 0.6.0 reads wrongly without an error.
_NOT_FOR_DECORD = {
    "h264 10 bit": "converts yuv420p10le",
    "vp8": "it reads vp8 wrongly",
    "vp9": "it reads vp9 wrongly",
    "vp9 odd": "vp9",
    "vp9 hidden frames": "vp9",
    "h264 avi": "packets of a avi file",
    "h264 flv": "packets of a flv file",
    "mpeg4 avi": "it reads mpeg4 wrongly",
    "mpeg4 avi b": "it reads mpeg4 wrongly",
    "h264 open gop": "open groups",
    "hevc open gop": "it reads hevc wrongly",
    "vp9 variable": "vp9",
    "h264 ts": "packets of a mpegts file",
    "h264 m2ts": "packets of a mpegts file",
    "mpeg2 ts": "it reads mpeg2video wrongly",
    "mpeg2 ps": "it reads mpeg2video wrongly",
    "av1": "av1",
    "wmv": "it reads wmv2 wrongly",
    "gif": "it reads gif wrongly",
}
_FOR_DECORD = [kind for kind in KINDS if kind not in _NOT_FOR_DECORD]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return video_files.maker(tmp_path_factory.mktemp("videos"))


def assert_right(frames: Frames, all_times_s: list[float]) -> None:
    """Every picture shows the frame whose time it is said to have."""
    shown = numbers_of(frames.pixels)
    np.testing.assert_allclose(frames.times_s, [all_times_s[number] for number in shown], atol=1.3e-3)
    assert frames.pixels.dtype == np.uint8
    assert frames.times_s.dtype == np.float64


@pytest.mark.parametrize("backend", ["pyav", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_right_frames(make: Make, kind: str, backend: Literal["pyav", "auto"]) -> None:
    path, times_s = make(kind), kind_times_s(kind)

    everything = read_video(path, FrameSettings(num_frames=len(times_s), backend=backend))
    assert_right(everything, times_s)
    assert numbers_of(everything.pixels) == list(range(len(times_s)))

    few = read_video(path, FrameSettings(num_frames=7, backend=backend))
    assert_right(few, times_s)
    assert len(few.times_s) == min(7, len(times_s))

    if len(times_s) > 1:
        part = read_video(path, FrameSettings(fps=5.0, start_s=0.7, backend=backend))
        assert_right(part, times_s)


@needs_decord
@pytest.mark.parametrize("kind", _FOR_DECORD)
@pytest.mark.parametrize("max_pixels", [None, 40 * 30])
def test_both_readers_agree_to_the_bit(make: Make, kind: str, max_pixels: int | None) -> None:
    """Same frames, same times, and a pixel tolerance of 0: also after scaling."""
    by_decord, by_pyav = (
        read_video(make(kind), FrameSettings(num_frames=9, max_pixels=max_pixels, backend=backend))
        for backend in ("decord", "pyav")
    )
    np.testing.assert_array_equal(by_decord.times_s, by_pyav.times_s)
    np.testing.assert_array_equal(by_decord.pixels, by_pyav.pixels)
    assert by_decord.source is not None
    assert by_pyav.source is not None
    assert by_decord.source.backend.startswith("decord ")
    assert by_pyav.source.backend.startswith("pyav ")
    assert by_decord.source[:4] == by_pyav.source[:4]


@needs_decord
@pytest.mark.parametrize(("kind", "reason"), _NOT_FOR_DECORD.items())
def test_files_that_decord_misreads_go_to_pyav(make: Make, kind: str, reason: str) -> None:
    with pytest.raises(
        VideoDecodeError, match=f"decord cannot be trusted with it: .*{reason}.*; use --video-backend"
    ):
        read_video(make(kind), FrameSettings(backend="decord"))
    source = read_video(make(kind), FrameSettings()).source
    assert source is not None
    assert source.backend.startswith("pyav ")


def test_default_is_two_frames_a_second_from_the_left_edge(tmp_path: Path) -> None:
    path = video_files.write_video(tmp_path / "four.mp4", frames=120)
    frames = read_video(path)
    np.testing.assert_allclose(frames.times_s, np.arange(8) / 2, atol=1e-9)
    assert numbers_of(frames.pixels) == list(range(0, 120, 15))
    assert frames.source is not None
    assert frames.source[:4] == pytest.approx((4.0, 30.0, 96, 64))
    assert frames.source.decode_s > 0


def test_times_count_from_the_first_frame(make: Make) -> None:
    frames = read_video(make("h264 late start"), FrameSettings(start_s=1.0, end_s=2.0, fps=4.0))
    assert numbers_of(frames.pixels) == [25, 31, 37, 43]
    np.testing.assert_allclose(frames.times_s, [1.0, 1.24, 1.48, 1.72], atol=1e-3)


def test_frame_multiple(make: Make) -> None:
    assert len(read_video(make("h264"), FrameSettings(num_frames=7), frame_multiple=2).times_s) == 6
    assert len(read_video(make("h264 one frame"), frame_multiple=2).times_s) == 1
    with pytest.raises(ConfigError, match="frame_multiple=0"):
        read_video(make("h264"), frame_multiple=0)


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize(("kind", "size"), [("h264 rotated 90", (96, 64)), ("h264 rotated 270", (96, 64))])
def test_rotated_video_is_upright(
    make: Make, kind: str, size: tuple[int, int], backend: Literal["auto", "pyav"]
) -> None:
    with av.open(str(make(kind))) as container:
        context = container.streams.video[0].codec_context
        assert (context.width, context.height) == size[::-1], "stored lying down"
    frames = read_video(make(kind), FrameSettings(num_frames=4, max_pixels=2400, backend=backend))
    assert frames.pixels.shape == (4, 40, 60, 3)
    assert frames.source is not None
    assert (frames.source.width, frames.source.height) == size
    assert_right(frames, kind_times_s(kind))


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (FrameSettings(num_frames=4, max_pixels=10**6), (4, 64, 96, 3)),
        (FrameSettings(num_frames=4, max_pixels=96 * 64), (4, 64, 96, 3)),
        (FrameSettings(num_frames=4, max_pixels=96 * 64 - 1), (4, 62, 94, 3)),
        (FrameSettings(num_frames=4, total_pixels=4 * 48 * 32), (4, 32, 48, 3)),
        (FrameSettings(num_frames=8, total_pixels=4 * 48 * 32, max_pixels=16), (8, 2, 4, 3)),
    ],
)
def test_scaling(make: Make, settings: FrameSettings, shape: tuple[int, ...]) -> None:
    assert read_video(make("h264"), settings).pixels.shape == shape


def test_fit_never_enlarges_and_never_passes_the_limit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height, limit = (int(x) for x in rng.integers((1, 1, 16), (4000, 4000, 10**6)))
        new_width, new_height = fit(width, height, limit)
        assert 1 <= new_width <= width
        assert 1 <= new_height <= height
        assert new_width * new_height <= limit or min(new_width, new_height) == 1
    assert fit(1920, 1080, None) == (1920, 1080)


@pytest.mark.parametrize("source", ["h264", "h264 open gop"])
@pytest.mark.parametrize("first", [12, 17, 30])
def test_stream_copied_clip(make: Make, tmp_path: Path, source: str, first: int) -> None:
    """Files on which decord 0.6.0 hangs: frames before the cut are in the file, but not to be shown."""
    clip = video_files.copy_clip(make(source), tmp_path / "clip.mp4", first)
    frames = read_video(clip, FrameSettings(num_frames=9))
    shown = numbers_of(frames.pixels)
    np.testing.assert_allclose(
        frames.times_s, [(n - shown[0]) / video_files.RATE for n in shown], atol=1.3e-3
    )
    assert shown[0] == first
    assert len(set(shown)) == 9


def test_hidden_vp8_packets_are_no_frames(make: Make, tmp_path: Path) -> None:
    path = video_files.hide_packets(make("vp8"), tmp_path / "hidden.webm", every=7)
    frames = read_video(path, FrameSettings(num_frames=60))
    assert numbers_of(frames.pixels) == [n for n in range(60) if n % 7 != 6]
    assert_right(frames, kind_times_s("vp8"))


@needs_decord
def test_decord_with_other_times_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decord = decord_reader.load()
    stamps = decord.VideoReader.get_frame_timestamp
    monkeypatch.setattr(
        decord.VideoReader, "get_frame_timestamp", lambda self, chosen: 1.01 * stamps(self, chosen)
    )
    with pytest.raises(VideoDecodeError, match="its frame times are not those of the packets"):
        read_video(make("h264"), FrameSettings(num_frames=7, backend="decord"))


@needs_decord
def test_decord_failure_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(decord_reader.load(), "VideoReader", fail)
    with pytest.raises(VideoDecodeError, match=r"it failed \(RuntimeError\)"):
        read_video(make("h264"), FrameSettings(backend="decord"))


def test_without_decord(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decord_reader, "is_installed", lambda: False)
    assert_right(read_video(make("h264")), kind_times_s("h264"))
    with pytest.raises(
        ConfigError, match=r"'decord' is not installed; pip install decord, or use --video-backend pyav"
    ):
        read_video(make("h264"), FrameSettings(backend="decord"))


def test_start_beyond_the_end(make: Make) -> None:
    with pytest.raises(VideoRangeError, match=r"start_s=2 is past the video's 2.000 s; start earlier"):
        read_video(make("h264"), FrameSettings(start_s=2.0))


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.mp4", b"new\nline.mp4", b"http:x %d.mp4", "emoji \U0001f600.mp4".encode()]
)
def test_odd_names(make: Make, tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    try:
        os.link(make("h264"), path)
    except OSError as error:
        pytest.skip(f"this file system refuses the name: {error}")
    assert_right(read_video(path), kind_times_s("h264"))
    assert_right(read_video(Path(os.fsdecode(path))), kind_times_s("h264"))


_CHILD = """
import os, resource, sys
import numpy as np
sys.path.insert(0, {root!r})
from specvlm.config import FrameSettings
from specvlm.video import read_video

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def read(backend):
    return read_video({path!r}, FrameSettings(num_frames=8, backend=backend))

read_video({small!r})
before = peak_bytes()
frames = read("pyav"), read("auto")
assert peak_bytes() - before < 48 << 20, peak_bytes() - before
assert (frames[0].pixels == frames[1].pixels).all()

child = os.fork()
if child == 0:
    again = read("auto")
    os._exit(0 if (again.pixels == frames[0].pixels).all() and "torch" not in sys.modules else 1)
assert os.waitpid(child, 0)[1] == 0
assert "torch" not in sys.modules
assert "transformers" not in sys.modules
print(np.round(frames[1].times_s, 3).tolist())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fresh_and_forked_child_without_torch_in_little_memory(make: Make, tmp_path: Path) -> None:
    """3,000 frames are 276 MB of pixels; the reader holds those asked for."""
    long = video_files.write_video(
        tmp_path / "long.mp4", frames=3000, width=192, height=160, options={"preset": "ultrafast", "g": "100"}
    )
    program = _CHILD.format(root=str(Path(__file__).parents[2]), path=str(long), small=str(make("h264")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str([12.5 * n for n in range(8)])


@needs_decord
@pytest.mark.parametrize("first", ["av, decord", "decord, av", "torch, decord, av"])
def test_both_decoders_live_in_one_process(make: Make, first: str) -> None:
    """Each carries an FFmpeg of its own; whichever is loaded first, both must read."""
    program = (
        f"import {first}\nfrom specvlm.video import read_video\nfrom specvlm.config import FrameSettings\n"
        f"a, b = (read_video({str(make('h264'))!r}, FrameSettings(backend=x)) for x in ('decord', 'pyav'))\n"
        "assert (a.pixels == b.pixels).all()"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_reader_loads_no_decoder() -> None:
    program = "import sys, specvlm.video; assert not {'av', 'decord', 'torch'} & set(sys.modules), 'loaded'"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root
    )
    assert (done.returncode, done.stderr) == (0, "")
