"""Signals at random times: while models load, a crash is repaired, videos are read or generated, parts are closed.

    python -m tests.faults.signals --signals 200 --jobs 2 --batch-size 8

After each the start ends within the grace plus five seconds, with 75, or with 0 or 3 where all was done by then.
No process is left, nobody's crash is recorded, files are whole; then a start that nobody signals completes the
run, no caption that was there is made again, and exports have the bytes of an uninterrupted run's.

Prints a table, and ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from tests.cli import invariants
from tests.faults.harness import BAD, Driver, Tally, Trial, conclude, exported, place, spread, table
from tests.faults.kills import Ground

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
BEYOND_GRACE_S = 5.0
STOPPED = 75

Scene = Literal["first", "loading", "repair", "closing", "hanging", "stuck"]
_HINDERED = {"hanging": "hangs", "stuck": "stuck"}  # what the first word of one video is


@dataclass(frozen=True)
class Signalled:
    """One trial.

    Attributes:
        scene: What is going on.
        number: The signal.
        to_group: All processes get it, as from a terminal.
        share: When, as a share of how long an uninterrupted start takes.
    """

    scene: Scene
    number: int
    to_group: bool
    share: float

    @property
    def grace_s(self) -> float:
        return 1.0 if self.scene in _HINDERED else 10.0


def trials(signals: int, seed: int = 2508) -> list[Signalled]:
    """Return so many trials, all scenes and signals in turn."""
    dice = random.Random(seed)
    scenes: tuple[Scene, ...] = get_args(Scene)
    return [
        Signalled(
            scenes[index % len(scenes)], SIGNALS[index % len(SIGNALS)], dice.random() < 0.5, dice.random()
        )
        for index in range(signals)
    ]


def _prepared(ground: Ground, what: Signalled) -> Trial:
    trial = ground.trial()
    trial.environment |= {
        "DRIVE_DELAY_S": str(ground.delay_s / 2.0),
        "DRIVE_LOAD_S": "1.0" if what.scene == "loading" else "0",
        "DRIVE_PART_ROWS": "1" if what.scene == "closing" else "4",
    }
    trial.flags += ("--grace", f"{what.grace_s:g}s")
    ground.begin(trial, "resume" if what.scene == "repair" else "first")
    if what.scene in _HINDERED:
        (ground.videos / "006.mp4").write_text(f"{_HINDERED[what.scene]} 6")
    return trial


def run(ground: Ground, what: Signalled) -> Tally:
    """Make one trial."""
    tally, trial = Tally(), _prepared(ground, what)
    try:
        code = _signalled(trial, what, ground.duration_s + (1.0 if what.scene == "loading" else 0.0), tally)
    finally:
        (ground.videos / "006.mp4").write_text("video 6")
    said = trial.said()
    trial.check_nobody_is_left()
    if code == -what.number and not trial.captioned():
        tally.counts["before"] += 1  # it did not listen yet, the interpreter was at work elsewhere
        tally.counts["signals"] -= 1
        code = STOPPED
    before = _check_stopped(trial, ground.videos, code, said, crashes=what.scene == "repair")
    made = trial.redone()
    assert trial.run(trial.order()) in (0, 3), trial.said()
    _check_end(ground, trial, before)
    tally.note("redone", trial.redone() - made)
    trial.remove()
    return tally


def _signalled(trial: Trial, what: Signalled, duration_s: float, tally: Tally) -> int:
    process = trial.driver.start(trial.order())
    if trial.driver.wait(process, what.share * duration_s) is not None:
        tally.counts["too late"] += 1
        return 3
    began_s = time.monotonic()
    with suppress(ProcessLookupError):
        (os.killpg if what.to_group else os.kill)(process, what.number)
    code = trial.driver.wait(process, what.grace_s + BEYOND_GRACE_S)
    if code is None:
        os.killpg(process, signal.SIGKILL)
        trial.driver.wait(process)
        raise AssertionError(f"still runs {what.grace_s + BEYOND_GRACE_S:g} s later: {trial.said()}")
    tally.note("beyond grace", time.monotonic() - began_s - what.grace_s)
    tally.note("seconds", time.monotonic() - began_s)
    tally.counts["signals"] += 1
    tally.counts[f"exit {code}"] += 1
    return code


def _check_stopped(trial: Trial, videos: Path, code: int, said: str, *, crashes: bool) -> invariants.Known:
    """Look at what a stopped start left."""
    assert code in (STOPPED, 0, 3), f"exit code {code}: {said}"
    assert "Traceback" not in said, said
    lock = trial.out / ".specvlm" / "state-00000.lock"
    if not crashes:
        assert not lock.exists() or not lock.stat().st_size, "it would be taken for a crash"
    invariants.check_readers(trial.out)
    left = [path.name for path in trial.out.glob("*/.part*")]
    assert not left, f"parts that are not closed: {left}"
    known = invariants.known(trial.out)
    assert max(known.crashes.values(), default=0) <= crashes, known.crashes
    if code != STOPPED:
        invariants.check(trial.out, videos, failed=len(BAD))
    return known


def _check_end(ground: Ground, trial: Trial, before: invariants.Known) -> None:
    invariants.check(trial.out, ground.videos, failed=len(BAD))
    end = invariants.known(trial.out)
    for key, row in before.captions.items():
        assert end.captions.get(key) == row, f"the caption of {row['path']} was lost or changed"
    assert exported(trial.out, trial.folder / "work") == ground.expected, "exports differ"


def work(given: Sequence[Signalled], *, batch_size: int = 1) -> Iterator[tuple[str, Tally]]:
    """Make trials in this process; yield their scene and what came of each."""
    with place() as folder, Driver() as driver:
        ground = Ground(folder, driver, 14 + 2 * batch_size, batch_size)
        for what in given:
            try:
                tally = run(ground, what)
            except AssertionError as error:
                tally = Tally(violations=[f"{what}: {error}"])
                shutil.rmtree(folder / "work", ignore_errors=True)
            tally.counts["trials"] += 1
            yield what.scene, tally


def gather(given: Sequence[Signalled], jobs: int, batch_size: int) -> dict[str, Tally]:
    """Make trials; return what came of them by scene."""
    tallies: dict[str, Tally] = {}
    for scene, tally in spread(partial(work, batch_size=batch_size), given, jobs):
        tallies.setdefault(scene, Tally()).add(tally)
        for text in tally.violations:
            print(f"VIOLATION {text}", file=sys.stderr, flush=True)
    return tallies


def main() -> int:
    """Run at full size unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2508)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="videos in flight")
    given = parser.parse_args()
    began_s = time.monotonic()
    tallies: dict[str, Tally] = {}
    seed = given.seed
    while (sent := sum(tally.counts["signals"] for tally in tallies.values())) < given.signals:
        for scene, tally in gather(trials(given.signals - sent, seed), given.jobs, given.batch_size).items():
            tallies.setdefault(scene, Tally()).add(tally)
        if any(tally.violations for tally in tallies.values()):
            break
        seed += 1
    show(tallies)
    return conclude([text for tally in tallies.values() for text in tally.violations], began_s)


def show(tallies: dict[str, Tally]) -> None:
    """Print a table."""
    head = (
        "during",
        "signals",
        "too early",
        "too late",
        "75",
        "0 or 3",
        "slowest s",
        "beyond grace s",
        "redone",
        "violations",
    )
    rows = [
        (
            scene,
            tally.counts["signals"],
            tally.counts["before"],
            tally.counts["too late"],
            tally.counts[f"exit {STOPPED}"],
            tally.counts["exit 0"] + tally.counts["exit 3"],
            f"{tally.most.get('seconds', 0.0):.2f}",
            f"{tally.most.get('beyond grace', 0.0):.2f}",
            int(tally.most.get("redone", 0)),
            len(tally.violations),
        )
        for scene, tally in tallies.items()
    ]
    print(table(head, rows))


if __name__ == "__main__":
    sys.exit(main())
