"""The sheet on the page of a bench: of which clip, with which pruning, and when there is none."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from specvlm.bench.clips import Clip
from specvlm.bench.grid import Grid
from specvlm.bench.pictures import sheets_of
from specvlm.bench.records import BenchReport
from specvlm.captioner import Captioner
from specvlm.config import FrameSettings
from specvlm.inspection.drawing import SECOND_COLOUR
from tests.bench_reports import made
from tests.tiny import Size, random_frames, tiny_captioner
from tests.video_files import write_video


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    made = tiny_captioner("qwen", Size(seed=1), None)
    made.frames = FrameSettings(num_frames=4)
    return made


def report(grid: Grid, *videos: str) -> BenchReport:
    found = made(grid)
    return replace(found, conditions=replace(found.conditions, videos=videos))


def boxes(png: bytes) -> int:
    """Count pixels of the second stage's colour on a sheet."""
    with Image.open(io.BytesIO(png)) as picture:
        return int((np.asarray(picture) == SECOND_COLOUR).all(axis=-1).sum())


def test_it_is_of_the_first_clip_that_was_captioned_with_the_strongest_pruning(
    captioner: Captioner, tmp_path: Path
) -> None:
    clips = [
        Clip("left out", "nowhere.mp4"),
        Clip("read before", random_frames(1)),
        Clip("a file", str(write_video(tmp_path / "a.mp4", frames=20)), 0.1, 0.5, "What is it?"),
    ]
    few, many = (
        sheets_of(captioner, report(Grid(pruners=("uniform",), prune_ratios=ratios), "read before"), clips)
        for ratios in ((0.2, 0.9), (0.2, 0.3))
    )
    assert [one.title for one in (*few, *many)] == 2 * ["What the draft saw of read before"]
    assert 0 < boxes(few[0].png) < boxes(many[0].png)
    (of_a_file,) = sheets_of(captioner, report(Grid(num_frames=(2, 3)), "a file"), clips)
    assert of_a_file.title.endswith("a file")


def test_there_is_none_without_pruning(captioner: Captioner) -> None:
    clips = [Clip("read before", random_frames(1))]
    for grid in (Grid(("stock", "plain", "sd")), Grid(pruners=("none",)), Grid(prune_ratios=(0.0,))):
        assert sheets_of(captioner, report(grid, "read before"), clips) == ()
    assert sheets_of(captioner, report(Grid(), "another"), clips) == ()
