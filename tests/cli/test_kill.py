"""kill -9 at every step: no caption lost, none doubled, no unreadable file. Full size: `tests.faults.kills`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import invariants
from tests.cli.conftest import rows
from tests.cli.drive import POINTS, Kill
from tests.faults import kills
from tests.faults.harness import BAD, Driver, Trial, make_videos, place
from tests.faults.kills import Ground, Named

VIDEOS = 10  # two of which fail


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with place() as folder, Driver() as driver:
        yield Ground(folder, driver, VIDEOS)


def test_every_point_is_in_a_scene() -> None:
    assert {point for points in kills.SCENES.values() for point in points} == POINTS.keys()


NEXT_TO_OTHERS = {
    "store",
    "insert_part",
    "describe",
    "check",
    "hear",
    "collect",
    "sync",
}  # at full size alone
SCENE_OF = {
    point: scene
    for scene, points in reversed(kills.SCENES.items())
    for point in points
    if point not in NEXT_TO_OTHERS
}
CASES = [
    *(Named(scene, point, ("before", "after")[n % 2], 1) for n, (point, scene) in enumerate(SCENE_OF.items())),
    Named("overwrite", "commit", "after", 2),
    Named("resume", "add_part", "before", 1),
    Named("first", "finish", "before", 1, "group"),
    Named("first", "give", "after", 1, "worker"),
    Named("first", "submit", "after", 1, "server"),
    Named("first", "submit", "after", 1, "reader"),
]  # fmt: skip


@pytest.mark.parametrize("what", CASES, ids=lambda what: f"{what.kind}-{what.when}-{what.point}")
def test_killed_at_a_point(what: Named, ground: Ground) -> None:
    tallies = list(kills.run_named(ground, what))
    assert sum(tally.counts["kills"] + tally.counts["children"] for tally in tallies) >= 1, "never passed"


@pytest.mark.parametrize("number", range(2))
def test_killed_at_random(number: int, ground: Ground) -> None:
    kills.run_at_random(ground, kills.at_random(6, seed=1)[number])


def test_suspect_of_three_crashes_is_not_tried_again(ground: Ground) -> None:
    """A video in whose company the process dies three times fails; the others get their captions."""
    trial = ground.trial()
    kill = Kill("finish", "before", 1)
    one_reader = (
        "--decode-workers",
        "1",
    )  # of several, any may be the first: another video would be the suspect
    for _ in range(3):
        assert trial.run(trial.order(*one_reader, kill=kill)) == -9
    assert trial.run(trial.order()) == 3
    invariants.check(trial.out, ground.videos, failed=len(BAD) + 1)


@pytest.fixture(scope="module")
def full() -> Iterator[Ground]:
    """Eight videos in flight."""
    with place() as folder, Driver() as driver:
        yield Ground(folder, driver, 24, batch_size=8)


@pytest.mark.parametrize("number", range(2))
def test_killed_at_random_with_eight_in_flight(number: int, full: Ground) -> None:
    kills.run_at_random(full, kills.at_random(6, seed=8)[number])


@pytest.mark.parametrize(
    "what",
    [
        Named("first", "claim", "after", 4),
        Named("first", "finish", "after", 3),
        Named("first", "give", "before", 2, "group"),
        Named("first", "finish", "after", 1, "worker"),
    ],
    ids=lambda what: f"{what.kind}-{what.when}-{what.point}",
)
def test_killed_at_a_point_with_eight_in_flight(what: Named, full: Ground) -> None:
    for tally in kills.run_named(full, what):
        assert not tally.violations


def test_a_video_that_kills_the_whole_start_is_found_and_its_company_captioned(full: Ground) -> None:
    """Two crashes with eight in flight, then it runs alone, and is to blame for the third."""
    trial = full.trial()
    (full.videos / "005.mp4").write_text("kills all")
    try:
        codes = [trial.run(trial.order()) for _ in range(4)]
    finally:
        (full.videos / "005.mp4").write_text("video 5")
    assert codes == [-9, -9, -9, 3]
    invariants.check(trial.out, full.videos, failed=len(BAD) + 1)
    (suspect,) = [row for row in rows(trial.out, "failures") if row["error_type"] == "crash_suspect"]
    assert str(suspect["path"]).endswith("005.mp4")


def test_the_drivers_words_survive_the_way(tmp_path: Path) -> None:
    """A kill that was asked for and did not come would make every other test here pass."""
    videos = make_videos(tmp_path / "videos", 1, bad=False)
    with Driver() as driver:
        trial = Trial(driver, tmp_path, videos)
        assert trial.run(trial.order(kill=Kill("lock", "before", 1))) == -9
        assert not (trial.out / ".specvlm" / "state-00000.lock").exists()
        assert trial.run(trial.order(kill=Kill("lock", "after", 1))) == -9
        assert (trial.out / ".specvlm" / "state-00000.lock").stat().st_size > 0
