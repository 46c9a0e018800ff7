"""The `ffmpeg` program is the judge: the same frames at the same times, whatever the file looks like."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from specvlm.config import BackendName, FrameSettings
from specvlm.errors import SpecvlmError, VideoDecodeError
from specvlm.video import decord_reader, read_video
from specvlm.video.sampling import select_frames
from tests import judged_files
from tests.judged_files import Judged
from tests.video_files import numbers_of

pytestmark = pytest.mark.skipif(judged_files.FFMPEG is None, reason="there is no ffmpeg program here")
_TOLERANCE_S = 2e-3  # Matroska and FLV count milliseconds


def _differences(file: Judged) -> list[str]:
    """What a reader gives otherwise than `ffmpeg`: all frames, and five of them."""
    numbers, times = judged_files.judge(file.path)
    if not numbers:
        return []
    found = []
    times_s = np.maximum.accumulate(times)
    wanted: list[tuple[BackendName, FrameSettings]] = [("pyav", FrameSettings(num_frames=len(numbers)))]
    if file.timed:
        wanted += [("pyav", FrameSettings(num_frames=5))]
        wanted += [("decord", FrameSettings(num_frames=5, backend="decord"))] * decord_reader.is_installed()
    for backend, settings in wanted:
        chosen = select_frames(times_s, settings) if file.timed else np.arange(len(numbers))
        try:
            frames = read_video(file.path, settings)
        except SpecvlmError as error:
            if not (backend == "decord" and isinstance(error, VideoDecodeError)):
                found.append(f"{file.name}: {error}")
            continue
        assert frames.source is not None
        right = [numbers[which] for which in chosen]
        if numbers_of(frames.pixels) != right or frames.source.flags:
            found.append(
                f"{file.name}, {backend}: {numbers_of(frames.pixels)}, {frames.source.flags}, not {right}"
            )
        elif file.timed and np.abs(frames.times_s - times_s[chosen]).max() > _TOLERANCE_S:
            found.append(f"{file.name}, {backend}: {frames.times_s.round(3)}, not {times_s[chosen].round(3)}")
    return found


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frames_and_times_are_those_of_ffmpeg(whole: bool, tmp_path: Path) -> None:
    files = list(judged_files.write(tmp_path, whole=whole))
    assert len(files) >= (200 if whole else 100)
    assert [difference for file in files for difference in _differences(file)] == []


@pytest.mark.fuzz
def test_random_files_are_read_as_ffmpeg_reads_them(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    first, cases = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-cases")
    made, found = 0, []
    for seed in range(first, first + cases):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            file = judged_files.write_random(folder, random.Random(seed))
        except (av.error.FFmpegError, ValueError):  # a container that does not take these times
            continue
        made += 1
        found += [f"seed {seed}: {difference}" for difference in _differences(file)]
    assert made > cases / 2
    assert found == []
