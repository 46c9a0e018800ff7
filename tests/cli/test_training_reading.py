"""Videos on their way to a training: what nobody asks for any more stands in nobody's way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from specvlm.config import FrameSettings
from specvlm.records import Frames
from specvlm_cli.readers import DecodingPool, ReadFailure, ReadJob
from specvlm_cli.training import frames
from specvlm_cli.training.frames import ReadLimits, TrainingReader
from tests.cli.train_reader import PLACE


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodingPool]:
    with DecodingPool(4, reader=PLACE) as made:
        yield made


def jobs(folder: Path, count: int, bad: int = 0) -> list[ReadJob]:
    """The first `bad` of `count` jobs are of one video that is broken."""
    (folder / "bad.mp4").write_text("text")
    (folder / "good.mp4").write_text("video")
    names = ["bad.mp4" if key < bad else "good.mp4" for key in range(count)]
    return [ReadJob(key, os.fsencode(folder / name), FrameSettings(), 1) for key, name in enumerate(names)]


def check() -> None:
    """Nobody stops."""


def test_samples_that_were_left_out_take_no_room(pool: DecodingPool, tmp_path: Path) -> None:
    """A broken video with 100 prompts is asked for once; the next to be asked for is behind all of them."""
    reader = TrainingReader(pool, ReadLimits(4), check)
    reader.begin(jobs(tmp_path, 101, bad=100))
    assert isinstance(reader.take(0), ReadFailure)
    assert isinstance(reader.take(100), Frames)


def test_videos_that_are_passed_take_no_bytes(pool: DecodingPool, tmp_path: Path) -> None:
    reader = TrainingReader(pool, ReadLimits(2, ahead_bytes=1), check)
    reader.begin(jobs(tmp_path, 12))
    for key in (0, 5, 6, 11):
        assert isinstance(reader.take(key), Frames)
    assert not reader._read


def test_a_video_that_is_to_be_tried_again_is_forgotten_when_it_is_passed(
    pool: DecodingPool, tmp_path: Path
) -> None:
    (tmp_path / "stale.mp4").write_text("stale")
    reader = TrainingReader(pool, ReadLimits(1), check)
    stale = ReadJob(0, os.fsencode(tmp_path / "stale.mp4"), FrameSettings(), 1)
    reader.begin([stale, *jobs(tmp_path, 3)[1:]])
    assert isinstance(reader.take(1), Frames)
    assert isinstance(reader.take(2), Frames)
    assert (reader._again, reader._reading, reader._read) == ([], {}, {})


def test_few_wait_at_a_time_those_that_are_being_read_included(
    pool: DecodingPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_MOST_READ", 3)
    reader = TrainingReader(pool, ReadLimits(4), check)
    reader.begin(jobs(tmp_path, 8))
    for key in range(8):
        assert len(reader._read) + len(reader._reading) <= 3
        assert isinstance(reader.take(key), Frames)
