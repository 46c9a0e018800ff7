"""Signals: the first asks to stop and go on later, the second insists."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli import invariants


def start(videos: Path, out: Path, delay_s: float, *flags: str) -> subprocess.Popen[str]:
    """Start a run and wait until it has made its first caption."""
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.cli.drive",
            "run",
            "caption",
            str(videos),
            "-o",
            str(out),
            "-v",
            *flags,
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "DRIVE_DELAY_S": str(delay_s)},
    )
    assert running.stderr is not None
    while "a caption of" not in running.stderr.readline():
        assert running.poll() is None
    return running


@pytest.fixture
def many(videos: Path) -> Path:
    for number in range(20):
        (videos / f"more-{number}.mp4").write_text(f"video {number}")
    return videos


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
)
def test_first_signal_stops_after_the_video_in_hand(number: signal.Signals, many: Path, out: Path) -> None:
    running = start(many, out, 0.3)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 75
    assert f"stopped by {number.name}" in err
    assert not list(out.rglob(".part*")), "the part is closed"
    assert list((out / "captions").iterdir())
    again = subprocess.run(
        [sys.executable, "-m", "tests.cli.drive", "run", "caption", str(many), "-o", str(out)],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert again.returncode == 0
    invariants.check(out, many)


def test_a_stop_that_ends_in_sigkill_is_no_crash(many: Path, out: Path) -> None:
    """Slurm sends SIGTERM and, after a while, SIGKILL: a long video must not become suspect by that."""
    for _ in range(4):
        running = start(many, out, 0.5)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        running.kill()
        running.communicate(timeout=60)
        with closing(sqlite3.connect(out / ".specvlm" / "state-00000.db")) as database:
            assert database.execute("SELECT max(crashes) FROM item").fetchone() == (0,)


def test_what_is_not_done_within_the_grace_goes_back(many: Path, out: Path) -> None:
    """A video that is generated for longer than the grace is dropped; that is no crash of it."""
    (many / "b.webm").write_text("hangs")
    running = start(many, out, 0.1, "--grace", "1s")
    time.sleep(0.5)  # into the second video
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 75
    assert 0.9 < time.monotonic() - began < 6.0
    with closing(sqlite3.connect(out / ".specvlm" / "state-00000.db")) as database:
        found = database.execute(
            "SELECT state, crashes, attempts FROM item WHERE CAST(path AS TEXT) LIKE '%b.webm'"
        ).fetchall()
    assert found == [("pending", 0, 1)]


def test_second_signal_ends_at_once(many: Path, out: Path) -> None:
    running = start(many, out, 3.0)
    time.sleep(0.5)  # into the next video
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert time.monotonic() - began < 2.5
