"""Signals: the first asks to stop and go on later, the second insists. Full size: `tests.faults.signals`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import invariants
from tests.cli.fork_server import ROOT
from tests.faults import signals
from tests.faults.harness import Driver, Trial, place
from tests.faults.kills import Ground
from tests.faults.signals import SIGNALS, Signalled

STOPPED = 75


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with place() as folder, Driver() as driver:
        yield Ground(folder, driver, 10)


@pytest.fixture(scope="module")
def full() -> Iterator[Ground]:
    """Eight videos in flight."""
    with place() as folder, Driver() as driver:
        yield Ground(folder, driver, 24, batch_size=8)


def begun(trial: Trial, *flags: str) -> int:
    """Make a start, wait for its first caption, and return its process id."""
    process = trial.driver.start(trial.order(*flags))
    end_s = time.monotonic() + 60
    while not trial.captioned():
        assert time.monotonic() < end_s, trial.said()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_stops_after_the_video_in_hand(number: signal.Signals, ground: Ground) -> None:
    trial = ground.trial()
    trial.environment["DRIVE_DELAY_S"] = "0.2"
    process = begun(trial)
    os.kill(process, number)
    assert trial.driver.wait(process) == STOPPED
    assert f"stopped by {number.name}" in trial.said()
    known = invariants.known(trial.out)
    assert 1 <= len(known.captions) < 8
    assert not any(known.crashes.values())
    assert not list(trial.out.rglob(".part*")), "the part is closed"
    invariants.check_readers(trial.out)
    trial.environment["DRIVE_DELAY_S"] = "0"
    assert trial.run(trial.order()) == 3
    assert trial.redone() == 0
    invariants.check(trial.out, ground.videos, failed=2)


@pytest.mark.parametrize(
    "what",
    [
        Signalled("loading", signal.SIGTERM, to_group=True, share=0.5),
        Signalled("repair", signal.SIGUSR1, to_group=False, share=0.3),
        Signalled("closing", signal.SIGINT, to_group=True, share=0.6),
        Signalled("stuck", signal.SIGUSR2, to_group=False, share=0.7),
    ],
    ids=lambda what: what.scene,
)
def test_signal_at_another_moment(what: Signalled, ground: Ground) -> None:
    signals.run(ground, what)


def test_a_stop_that_ends_in_sigkill_is_no_crash(ground: Ground) -> None:
    """Slurm sends SIGTERM and, after a while, SIGKILL: a long video must not become suspect by that."""
    trial = ground.trial()
    trial.environment["DRIVE_DELAY_S"] = "0.5"
    for _ in range(2):
        trial.journal.unlink(missing_ok=True)
        process = begun(trial)
        os.kill(process, signal.SIGTERM)
        time.sleep(0.1)
        os.killpg(process, signal.SIGKILL)
        trial.driver.wait(process)
        assert max(invariants.known(trial.out).crashes.values()) == 0


def test_what_is_not_done_within_the_grace_goes_back(ground: Ground) -> None:
    """A video that is generated for longer than the grace is dropped; that is no crash of it."""
    trial = ground.trial()
    (ground.videos / "001.mp4").write_text("hangs")
    try:
        process = begun(trial, "--grace", "1s")
        while "hangs" not in trial.journal.read_text():
            time.sleep(0.01)
        began_s = time.monotonic()
        os.kill(process, signal.SIGTERM)
        assert trial.driver.wait(process) == STOPPED
    finally:
        (ground.videos / "001.mp4").write_text("video 1")
    assert 0.9 < time.monotonic() - began_s < 20.0
    known = invariants.known(trial.out)
    (dropped,) = (
        key for key, attempts in known.attempts.items() if attempts and known.states[key] == "pending"
    )
    assert (known.crashes[dropped], known.attempts[dropped]) == (0, 1)


def test_second_signal_ends_at_once(ground: Ground) -> None:
    trial = ground.trial()
    (ground.videos / "001.mp4").write_text("hangs")
    try:
        process = begun(trial)
        while "hangs" not in trial.journal.read_text():
            time.sleep(0.01)
        began_s = time.monotonic()
        os.kill(process, signal.SIGINT)
        time.sleep(0.5)  # two that come before the first is handled are one
        os.kill(process, signal.SIGINT)
        assert trial.driver.wait(process) == 130
    finally:
        (ground.videos / "001.mp4").write_text("video 1")
    assert time.monotonic() - began_s < 20.0, "far less than the grace"
    assert not any(invariants.known(trial.out).crashes.values())


@pytest.mark.parametrize(
    "what",
    [
        Signalled("first", signal.SIGTERM, to_group=True, share=0.6),
        Signalled("hanging", signal.SIGUSR1, to_group=False, share=0.7),
    ],
    ids=lambda what: what.scene,
)
def test_signal_with_eight_in_flight(what: Signalled, full: Ground) -> None:
    signals.run(full, what)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_videos_are_listed(number: signal.Signals, tmp_path: Path) -> None:
    """Nothing was begun, and the scheduler is to start it again; temporary files are removed."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.drive", "run", "caption", "-", "-o", str(tmp_path / "out")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.defpath, "TMPDIR": str(temporary)},
    )
    with running:
        while not list(temporary.iterdir()):  # where the list is gathered
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(number)
        assert running.stderr is not None
        said = running.stderr.read().decode()
    assert running.returncode == STOPPED
    assert said.endswith(f"specvlm: error: stopped by {number.name}; start again to resume\n")
    assert not list(temporary.iterdir())
    assert not (tmp_path / "out").exists()
