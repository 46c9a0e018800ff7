"""kill -9 of the coordinator, of its whole process group, and of its children; at named points and at random.

    python -m tests.faults.kills --hits 10 --random 500 --jobs 2 --batch-size 8

After each kill every finished file can be read and holds no caption twice; no process is left of a killed
coordinator; then a start that nobody kills ends in order, and: no caption that was in the ledger is lost or
changed, none is doubled, the invariants hold, exports have the bytes of an uninterrupted run's, and at most as many
captions were made again for each kill as videos were claimed: a batch and a quarter.

Prints a table, and ends with 1 where something did not hold, or where fewer kills came than were asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from tests.cli import family, invariants
from tests.cli.drive import POINTS, Kill, Victim
from tests.faults.harness import (
    BAD,
    Driver,
    Tally,
    Trial,
    conclude,
    exported,
    make_videos,
    place,
    spread,
    table,
)

When = Literal["before", "after"]
Scene = Literal["first", "resume", "overwrite", "rebuild", "reshard", "export"]
SHARDS = 3
_KILLED = -signal.SIGKILL
_DELAY_S = 0.04  # of a step, for each video in flight
_SLOWEST = 16.0  # times as long
_HITS_OF_CHILDREN = 4  # whether a point was passed shows only where the coordinator dies

# Which points each scene passes, as a first start, or one that finds something, does.
FIRST = """lock share sign_off register recover pending claim finish fail store commit number add_part insert_part
    mark_failures repair write check describe fsync rename sync run_file start_worker prepare give hear
    submit collect""".split()
SCENES: dict[Scene, list[str]] = {
    "first": FIRST,
    "resume": "lock recover register repair claim finish commit write rename add_part mark_failures".split(),
    "overwrite": "reopen claim finish take_out outdate commit write fsync rename renew_part repair".split(),
    "rebuild": "adopt adopt_failures commit rename sync lock".split(),
    "reshard": """divide deal_out complete take_over unlink write_parts rmtree commit rename sync write add_part
        run_file""".split(),
    "export": "export_table export_write fsync sync export_sync export_publish export_rename rmtree".split(),
}
OF_CHILDREN: dict[Victim, list[str]] = {
    "worker": "start_worker claim prepare give finish write".split(),
    "server": "submit collect give finish".split(),
    "reader": "submit collect".split(),
}
OF_GROUP = "claim finish give commit rename submit".split()


@dataclass(frozen=True)
class Named:
    """Trials with a kill at a point: one for each hit of it, as long as it is hit."""

    scene: Scene
    point: str
    when: When
    hits: int
    victim: Victim = "parent"

    @property
    def kind(self) -> str:
        return self.scene if self.victim == "parent" else f"first, {self.victim}"

    def kills(self) -> Iterator[Kill]:
        return (Kill(self.point, self.when, nth, self.victim) for nth in range(1, self.hits + 1))


@dataclass(frozen=True)
class AtRandom:
    """A trial with kills at random times, as shares of how long an uninterrupted run takes."""

    number: int
    kills: tuple[tuple[Victim, float], ...]

    @property
    def kind(self) -> str:
        return "at random"


def named(hits: int) -> list[Named]:
    """Return the trials with named points: before and after each of the first hits."""
    trials: list[Named] = []
    for when in get_args(When):
        for scene, points in SCENES.items():
            trials += [Named(scene, point, when, hits) for point in points]
        trials += [Named("first", point, when, hits, "group") for point in OF_GROUP]
        for victim, points in OF_CHILDREN.items():
            trials += [Named("first", point, when, min(hits, _HITS_OF_CHILDREN), victim) for point in points]
    return trials


def at_random(kills: int, seed: int) -> list[AtRandom]:
    """Return trials with so many kills, two to a trial: three of one video's company would make it suspect."""
    dice = random.Random(seed)
    victims: list[Victim] = dice.choices(get_args(Victim), (40, 20, 20, 10, 10), k=kills)
    pairs = [
        tuple((victim, 0.9 * dice.random()) for victim in victims[at : at + 2]) for at in range(0, kills, 2)
    ]
    return [AtRandom(number, pair) for number, pair in enumerate(pairs)]


class Ground:
    """Where one process makes its trials: videos, run folders to begin from, and what must come out."""

    def __init__(self, folder: Path, driver: Driver, videos: int = 14, batch_size: int = 1) -> None:
        self.driver = driver
        self.batch_size = batch_size
        self.folder = folder
        self.videos = make_videos(folder / "videos", videos)
        self._number = 0
        self.duration_s = 0.0
        self._templates: dict[Scene, Path] = {}
        self._slower = 1.0
        shutil.rmtree(self._full())  # the first one takes longer than all others
        self.done = self._full()
        self.expected = exported(self.done / "out", folder / "work")
        self.expected_rows = invariants.known(self.done / "out").captions

    def trial(self, name: str = "trial") -> Trial:
        """Return a new place for a run."""
        self._number += 1
        folder = self.folder / f"{name}-{self._number}"
        folder.mkdir()
        flags = ("--batch-size", str(self.batch_size), "--decode-workers", "4")
        environment = {"DRIVE_PART_ROWS": "4", "DRIVE_STEPS": "1" if self.batch_size == 1 else "3"}
        return Trial(self.driver, folder, self.videos, flags, environment)

    @property
    def delay_s(self) -> float:
        """How long a step takes in random trials: long enough for readers to keep a batch full."""
        return _DELAY_S * self.batch_size * self._slower

    @property
    def most_redone(self) -> int:
        """Captions that may be made again for each kill: those of the videos that are claimed."""
        return self.batch_size + self.batch_size // 4

    def _full(self) -> Path:
        """Return an uninterrupted run whose batch was full once; on a busy machine that takes longer steps."""
        while (trial := self._uninterrupted()).most_in_flight() < self.batch_size:
            assert self._slower < _SLOWEST, "so many are to be in flight"
            self._slower *= 2.0
            shutil.rmtree(trial.folder)
        return trial.folder

    def _uninterrupted(self) -> Trial:
        trial = self.trial("done")
        trial.environment["DRIVE_DELAY_S"] = str(self.delay_s)
        began_s = time.monotonic()
        assert trial.run(trial.order()) == 3, trial.said()
        self.duration_s = time.monotonic() - began_s
        invariants.check(trial.out, self.videos, failed=len(BAD))
        return trial

    def begin(self, trial: Trial, scene: Scene) -> None:
        """Bring a run folder into the state that a scene begins with."""
        if scene == "first":
            return
        if scene == "resume":
            self._begin_resume(trial)
            return
        shutil.copytree(self.done / "out", trial.out)
        if scene == "rebuild":
            (trial.out / ".specvlm" / "state-00000.db").unlink()

    def _begin_resume(self, trial: Trial) -> None:
        """Have a part that was renamed and not recorded, a part that is gone, and a video that was in work."""
        if "resume" not in self._templates:
            template = self.trial("template")
            kill = Kill("add_part", "before", 2)
            assert template.run(template.order(kill=kill)) == _KILLED
            template.check_nobody_is_left()
            next((template.out / "captions").glob("part*")).unlink()
            self._templates["resume"] = template.folder
        shutil.copytree(self._templates["resume"] / "out", trial.out)
        shutil.copy(self._templates["resume"] / "journal", trial.journal)


def flags_of(scene: Scene) -> tuple[str, ...]:
    """Return what the start that is killed is asked for, beyond the rest."""
    flags: dict[Scene, tuple[str, ...]] = {
        "overwrite": ("--overwrite",),
        "reshard": ("--shard", f"1/{SHARDS}", "--reshard"),
    }
    return flags.get(scene, ())


def finish(trial: Trial, scene: Scene) -> None:
    """Make starts that nobody kills, until all is done."""
    shards = [("--shard", f"{index}/{SHARDS}") for index in range(SHARDS)] if scene == "reshard" else [()]
    if scene == "reshard":
        assert trial.run(trial.order("--shard", f"0/{SHARDS}", "--reshard")) in (0, 3), trial.said()
    codes = {trial.run(trial.order(*flags)) for flags in shards}
    assert codes <= {0, 3}, f"the finishing start ended with {codes}: {trial.said()}"


def run_named(ground: Ground, what: Named) -> Iterator[Tally]:
    """Make trials with a kill at a point, until it is not passed so often."""
    for kill in what.kills():
        tally = _one_named(ground, what.scene, kill)
        yield tally
        if tally.counts["not reached"]:
            return


def _one_named(ground: Ground, scene: Scene, kill: Kill) -> Tally:
    trial = ground.trial()
    ground.begin(trial, scene)
    if scene == "export":
        return _killed_export(ground, trial, kill)
    tally, before = Tally(), trial.redone()
    code = trial.run(trial.order(*flags_of(scene), kill=kill))
    if kill.victim in ("parent", "group"):
        _note_kill(trial, code, tally, kill.point)
        after = _look(trial, code)
    else:
        _check_survived(trial, code)
        tally.counts.update({f"reached {kill.point}": 1, "children": 1})
        after = invariants.Known({}, {}, {}, {})
    finish(trial, scene)
    _check_end(ground, trial, scene, after)
    _note_redone(ground, trial.redone() - before, 1, tally)
    trial.remove()
    return tally


def _note_kill(trial: Trial, code: int, tally: Tally, point: str) -> None:
    assert code in (_KILLED, 0, 3), f"exit code {code}: {trial.said()}"
    tally.counts["kills"] += code == _KILLED
    tally.counts["not reached"] += code != _KILLED
    tally.counts[f"reached {point}"] += code == _KILLED


def _check_survived(trial: Trial, code: int) -> None:
    assert code in (0, 3), f"the loss of a child cost the run: exit code {code}: {trial.said()}"


def _look(trial: Trial, code: int) -> invariants.Known:
    """Look at what a kill left, touching nothing."""
    if code == _KILLED:
        trial.check_nobody_is_left()
    invariants.check_readers(trial.out)
    return invariants.known(trial.out)


def _check_end(ground: Ground, trial: Trial, scene: Scene, after: invariants.Known) -> None:
    invariants.check(trial.out, ground.videos, failed=len(BAD))
    invariants.check_readers(trial.out)
    end = invariants.known(trial.out)
    for key, row in after.captions.items():
        if after.states[key[0]] == "done":
            assert end.captions.get(key) == row, f"the caption of {row['path']} was lost or changed"
    if scene in ("rebuild", "reshard"):
        assert end.captions == ground.expected_rows, "captions changed"
        assert not trial.captioned(), "videos were captioned again"
    assert exported(trial.out, trial.folder / "work") == ground.expected, "exports differ"


def _note_redone(ground: Ground, redone: int, kills: int, tally: Tally) -> None:
    tally.note("redone", redone)
    assert redone <= ground.most_redone * kills, f"{redone} captions made again after {kills} kills"


def _killed_export(ground: Ground, trial: Trial, kill: Kill) -> Tally:
    """Kill an export that replaces another; one of the two is there as a whole, and the next is as it should be."""
    tally, destination = Tally(), trial.folder / "exported"
    export = ("export", str(trial.out), str(destination))
    assert trial.run(trial.command(*export)) == 0, trial.said()
    expected = _content(destination)
    assert trial.run(trial.command(*export, "--overwrite", "--columns", "id,caption")) == 0, trial.said()
    earlier = _content(destination)
    assert earlier != expected
    code = trial.run(trial.command(*export, "--overwrite", kill=kill))
    _note_kill(trial, code, tally, kill.point)
    assert _content(destination) in (expected, earlier), "a part of an export is there"
    assert trial.run(trial.command(*export, "--overwrite")) == 0, trial.said()
    assert _content(destination) == expected, "exports differ"
    left = [path.name for path in trial.folder.glob(".specvlm-export-*")]
    assert not left, f"left over: {left}"
    trial.remove()
    return tally


def _content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run_at_random(ground: Ground, what: AtRandom) -> Tally:
    """Make one trial with kills at random times."""
    tally, trial = Tally(), ground.trial()
    trial.environment["DRIVE_DELAY_S"] = str(ground.delay_s)
    kills = 0
    after = invariants.Known({}, {}, {}, {})
    for victim, share in what.kills:
        killed, code = _killed_after(trial, victim, share * ground.duration_s)
        kills += killed
        tally.counts["kills"] += killed
        tally.counts["not reached"] += not killed
        tally.counts[f"random {victim}"] += killed
        if victim in ("parent", "group"):
            assert code in (_KILLED, 0, 3), f"exit code {code}: {trial.said()}"
        else:
            _check_survived(trial, code)
        _check_kept(after, now := _look(trial, code))
        after = now
    finish(trial, "first")
    _check_end(ground, trial, "first", after)
    _note_redone(ground, trial.redone(), max(kills, 1), tally)
    trial.remove()
    return tally


def _check_kept(before: invariants.Known, now: invariants.Known) -> None:
    for key, row in before.captions.items():
        assert now.captions.get(key) == row, f"the caption of {row['path']} was lost or changed"


def _killed_after(trial: Trial, victim: Victim, delay_s: float) -> tuple[bool, int]:
    """Make a start, kill somebody after a while; return whether there was somebody, and the exit code."""
    process = trial.driver.start(trial.order())
    code = trial.driver.wait(process, delay_s)
    killed = False
    while code is None and not killed:  # a child may have to be waited for
        killed = _kill(process, victim)
        code = None if killed else trial.driver.wait(process, 0.001)
    if code is None:
        code = trial.driver.wait(process)
    assert code is not None, "did not end"
    return (code == _KILLED if victim in ("parent", "group") else killed), code


def _kill(process: int, victim: Victim) -> bool:
    """Kill somebody; return whether there was somebody."""
    with suppress(ProcessLookupError):
        if victim == "group":
            os.killpg(process, signal.SIGKILL)
            return True
        found = [process] if victim == "parent" else family.members(process, victim)
        if found:
            os.kill(found[-1], signal.SIGKILL)
            return True
    return False


def work(
    trials: Sequence[Named | AtRandom], *, videos: int = 14, batch_size: int = 1
) -> Iterator[tuple[str, Tally]]:
    """Make trials in this process; yield their kind and what came of each."""
    with place() as folder, Driver() as driver:
        ground = Ground(folder, driver, videos, batch_size)
        for what in trials:
            yield from ((what.kind, tally) for tally in _made(ground, what))


def _made(ground: Ground, what: Named | AtRandom) -> Iterator[Tally]:
    try:
        for tally in run_named(ground, what) if isinstance(what, Named) else [run_at_random(ground, what)]:
            tally.counts["trials"] += 1
            yield tally
    except AssertionError as error:
        yield Tally(Counter(trials=1), violations=[f"{what}: {error}"])
        shutil.rmtree(ground.folder / "work", ignore_errors=True)


def gather(trials: Sequence[Named | AtRandom], jobs: int, videos: int, batch_size: int) -> dict[str, Tally]:
    """Make trials; return what came of them by their kind."""
    tallies: dict[str, Tally] = {}
    for kind, tally in spread(partial(_listed_work, videos=videos, batch_size=batch_size), trials, jobs):
        tallies.setdefault(kind, Tally()).add(tally)
        for text in tally.violations:
            print(f"VIOLATION {text}", file=sys.stderr, flush=True)
    return tallies


def _listed_work(
    trials: Sequence[Named | AtRandom], videos: int, batch_size: int
) -> Iterator[tuple[str, Tally]]:
    yield from work(trials, videos=videos, batch_size=batch_size)


def never_reached(tallies: dict[str, Tally], trials: Sequence[Named | AtRandom]) -> list[str]:
    """Return the points that no trial came to."""
    reached = {name for tally in tallies.values() for name, number in tally.counts.items() if number}
    points = {what.point for what in trials if isinstance(what, Named)}
    return sorted(point for point in points if f"reached {point}" not in reached)


def main() -> int:
    """Run at full size unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hits", type=int, default=10, help="of each point: the first, the second ...")
    parser.add_argument("--random", type=int, default=500, help="kills at random times")
    parser.add_argument("--seed", type=int, default=2508)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="videos in flight")
    given = parser.parse_args()
    began_s = time.monotonic()
    trials: list[Named | AtRandom] = [*named(given.hits)] if given.hits else []
    ground = (14 + 2 * given.batch_size, given.batch_size)
    tallies = gather(trials, given.jobs, *ground)
    violations = [f"point {name} is never reached" for name in never_reached(tallies, trials)]
    seed = given.seed
    while (missing := given.random - tallies.get("at random", Tally()).counts["kills"]) > 0:
        for kind, tally in gather(at_random(missing, seed), given.jobs, *ground).items():
            tallies.setdefault(kind, Tally()).add(tally)
        seed += 1
    show(tallies)
    violations += [text for tally in tallies.values() for text in tally.violations]
    return conclude(violations, began_s)


def show(tallies: dict[str, Tally]) -> None:
    """Print a table."""
    head = (
        "killed",
        "trials",
        "kills",
        "child kills",
        "not reached",
        "most redone",
        "violations",
    )
    rows = [
        (
            kind,
            tally.counts["trials"],
            tally.counts["kills"],
            tally.counts["children"],
            tally.counts["not reached"],
            int(tally.most.get("redone", 0)),
            len(tally.violations),
        )
        for kind, tally in tallies.items()
    ]
    print(table(head, rows))
    print(f"points: {len(POINTS)}")
    at_random_of = tallies.get("at random", Tally()).counts
    victims = {victim: at_random_of[f"random {victim}"] for victim in get_args(Victim)}
    print(f"at random: {', '.join(f'{victim} {number}' for victim, number in victims.items())}")


if __name__ == "__main__":
    sys.exit(main())
