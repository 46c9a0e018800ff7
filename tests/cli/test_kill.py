"""kill -9 at every step: no caption lost, none doubled, no unreadable file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli import invariants
from tests.cli.conftest import rows
from tests.cli.drive import POINTS

VIDEOS = 8
OF_REPAIR = ("adopt", "outdate", "renew_part")  # these are not called in a first start


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Work in memory where there is a place for it: kills do not care, and fsyncs are quick there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="specvlm-test-") as folder:
        yield Path(folder)


@pytest.fixture
def some_videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(VIDEOS):
        (folder / f"{number}.mp4").write_text("text" if number == 3 else f"video {number}")
    return folder


def drive(tmp_path: Path, videos: Path, kills: list[list[dict[str, Any]]], **variables: str) -> list[Path]:
    """Run one trial for each list of kills; return the run folders, after checking how the starts ended."""
    outs = [tmp_path / f"out-{number}" for number in range(len(kills))]
    plan = [
        {"kills": kill, "arguments": ["caption", str(videos), "-o", str(out), "-q"]}
        for kill, out in zip(kills, outs, strict=True)
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.drive", "kill", str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
    )
    for kill, codes in zip(kills, json.loads(done.stdout), strict=True):
        assert set(codes[:-1]) <= {-9, 0, 3}, done.stderr
        assert codes[-1] in {0, 3}, done.stderr
        if any(one.get("nth") == 1 for one in kill):
            assert -9 in codes, f"{kill} never came"
    return outs


@pytest.mark.parametrize("point", [point for point in POINTS if point not in OF_REPAIR])
def test_killed_at_a_point(point: str, tmp_path: Path, some_videos: Path) -> None:
    kills = [
        [{"point": point, "when": when, "nth": nth}] for when in ("before", "after") for nth in (1, 2, 4)
    ]
    for out in drive(tmp_path, some_videos, kills):
        invariants.check(out, some_videos, failed=1)


def test_killed_twice_in_a_row(tmp_path: Path, some_videos: Path) -> None:
    """The second start is killed while it repairs what the first one left."""
    first = {"point": "rename", "when": "after", "nth": 1}
    points = ("repair", "claim", "write", "add_part", "mark_failures")
    kills = [
        [first, {"point": point, "when": when, "nth": 1}] for point in points for when in ("before", "after")
    ]
    for out in drive(tmp_path, some_videos, kills):
        invariants.check(out, some_videos, failed=1)


def test_killed_at_random(tmp_path: Path, some_videos: Path) -> None:
    chance = random.Random(2508)
    kills = [[{"after_s": chance.uniform(0.0, 0.15)} for _ in range(3)] for _ in range(10)]
    for out in drive(tmp_path, some_videos, kills, DRIVE_DELAY_S="0.01"):
        invariants.check(out, some_videos, failed=1)


def test_killed_while_rebuilding(tmp_path: Path, some_videos: Path) -> None:
    """The ledger was deleted; every kill of the rebuild leaves the parts as they are."""
    (out,) = drive(tmp_path, some_videos, [[]])
    (out / ".specvlm" / "state-00000.db").unlink()
    kills = [[{"point": "adopt", "when": when, "nth": nth} for when in ("before", "after") for nth in (1, 2)]]
    kills[0].append({"point": "rename", "when": "before", "nth": 1})
    plan = {"kills": kills[0], "arguments": ["caption", str(some_videos), "-o", str(out), "-q"]}
    (tmp_path / "plan.json").write_text(json.dumps([plan]))
    subprocess.run(
        [sys.executable, "-m", "tests.cli.drive", "kill", str(tmp_path / "plan.json")], check=True, timeout=60
    )
    invariants.check(out, some_videos, failed=1)


@pytest.mark.parametrize(
    "point", ["reopen", "claim", "finish", "outdate", "write", "fsync", "rename", "renew_part", "repair"]
)
def test_killed_while_overwriting(point: str, tmp_path: Path, some_videos: Path) -> None:
    """A reader always finds each caption once, the old or the new; the next start goes on."""
    (some_videos / "3.mp4").write_text("video 3")
    kills = [
        {"point": point, "when": when, "nth": nth} for when in ("before", "after") for nth in (1, 2, 4, 7)
    ]
    outs = drive(tmp_path, some_videos, [[] for _ in kills])
    plan = [
        {
            "kills": [kill],
            "arguments": ["caption", str(some_videos), "-o", str(out), "-q", "--overwrite"],
            "finish": False,
        }
        for kill, out in zip(kills, outs, strict=True)
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.cli.drive", "kill", str(tmp_path / "plan.json")]
    codes = json.loads(subprocess.run(command, check=True, timeout=120, capture_output=True).stdout)
    assert codes[0] == codes[4] == [-9]
    for out in outs:
        assert len({row["id"] for row in rows(out)}) == len(rows(out)) == VIDEOS
    drive(tmp_path, some_videos, [[] for _ in kills])
    for out in outs:
        invariants.check(out, some_videos)


def test_suspect_of_three_crashes_is_not_tried_again(tmp_path: Path, some_videos: Path) -> None:
    """A video in whose company the process dies three times fails; the others get their captions."""
    kill = {"point": "finish", "when": "before", "nth": 1}
    (out,) = drive(tmp_path, some_videos, [[kill, kill, kill]])
    invariants.check(out, some_videos, failed=2)
