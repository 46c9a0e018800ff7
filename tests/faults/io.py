"""Input/output that fails: the nth write, sync, rename, open, truncation or removal; full disks; damaged state.

    python -m tests.faults.io --step 1 --write-step 7 --jobs 2

A shim (`iofault.c`, compiled here) lets the nth such operation of the coordinator below the run folder fail, for
n = 1, 2, ... until a run goes through without meeting the fault; of writes, of which a run of six videos makes
about a thousand, every seventh. Besides: run folders on file systems of 1, 2, 4
and 8 MB that fill up (needs root), a ledger that another program holds, ledgers that are deleted, cut, flipped or
overwritten between two starts, and a torn run.json.

A start never says that it is done where it is not; otherwise it ends with 1 and one line that gives the reason,
without a traceback; the next start, unhindered, completes the run and keeps every caption that was there.

Prints a table, and ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from tests.cli import invariants
from tests.cli.drive import Fault
from tests.faults.harness import Driver, Tally, Trial, conclude, make_videos, place, spread, table

SHIM = Path(__file__).with_name("iofault.c")
VIDEOS = 6
FAILED = 1
DONE = 3  # one video fails
_LINE = re.compile(r"specvlm: error: (.+)")
_WRITES = ("write", "sync", "rename", "create", "truncate", "unlink")
_FULL = ("No space left on device", "disk is full", "Disk quota exceeded")

Scene = Literal["first", "again", "overwrite"]


def compiler() -> str | None:
    """Return a C compiler; None: there is none, and so no shim."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compiled(folder: Path) -> Path:
    """Compile the shim."""
    library = folder / "iofault.so"
    command = [str(compiler()), "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True)
class Series:
    """Trials with n = 1, 1 + step, ... until the fault is not met any more."""

    scene: Scene
    kinds: tuple[str, ...]
    error: int
    for_ever: bool = False
    step: int = 1

    @property
    def kind(self) -> str:
        what = self.kinds[0] if len(self.kinds) == 1 else "any"
        return f"{what} {errno.errorcode[self.error]}{' for ever' if self.for_ever else ''}, {self.scene}"


def series(step: int = 1, write_step: int = 7) -> list[Series]:
    """Return all series, with their steps from one n to the next."""
    full, broken, refused, quota = errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT
    plan: list[tuple[Scene, tuple[str, ...], int, bool]] = [
        *(("first", ("write",), error, False) for error in (full, broken, quota)),
        ("first", ("write",), full, True),
        ("first", _WRITES, broken, True),
        *(("first", ("sync",), error, False) for error in (full, broken)),
        *(("first", ("create",), error, False) for error in (full, broken, refused)),
        ("first", ("create",), refused, True),
        *(("first", ("rename",), error, False) for error in (full, broken, refused)),
        *(("first", ("unlink",), error, False) for error in (broken, refused)),
        ("first", ("truncate",), broken, False),
        *(("again", ("write",), error, False) for error in (full, broken)),
        ("again", ("write",), full, True),
        *(("again", ("sync", "rename", "create", "unlink"), error, False) for error in (broken, refused)),
        ("overwrite", ("write",), full, False),
        ("overwrite", ("sync", "rename", "create", "unlink"), broken, False),
    ]
    return [Series(*what, step=write_step if "write" in what[1] else step) for what in plan]


class Ground:
    """Where one process makes its trials."""

    def __init__(self, folder: Path, driver: Driver) -> None:
        self.folder = folder
        self.driver = driver
        self.videos = make_videos(folder / "videos", VIDEOS)
        self._number = 0
        self.done = self.trial()
        assert self.done.run(self.done.order()) == DONE, self.done.said()
        self.half = self.trial()
        assert self.half.run(self.half.order("--limit", "4")) == DONE, self.half.said()

    def trial(self) -> Trial:
        """Return a new place for a run."""
        self._number += 1
        folder = self.folder / f"trial-{self._number}"
        folder.mkdir()
        return Trial(self.driver, folder, self.videos, environment={"DRIVE_PART_ROWS": "2"})

    def begun(self, scene: Scene) -> Trial:
        """Return a place with a run as a scene begins with it."""
        trial = self.trial()
        if scene != "first":
            template = self.half if scene == "again" else self.done
            shutil.copytree(template.out, trial.out)
        return trial


def reason_of(said: str) -> str:
    """Return the reason of the one line by which a start ended.

    Raises:
        AssertionError: There is a traceback, or not exactly one such line.
    """
    assert "Traceback" not in said, said
    assert "Exception ignored" not in said, said
    found = [match.group(1) for line in said.splitlines() if (match := _LINE.fullmatch(line))]
    others = [line for line in said.splitlines() if not line.startswith(("specvlm: error: ", "failed: "))]
    assert len(found) == 1, f"{len(found)} lines of error: {said}"
    assert not others, f"more than a line: {said}"
    return found[0]


def run_series(ground: Ground, what: Series) -> Iterator[Tally]:
    """Make the trials of a series."""
    for nth in count(1, what.step):
        tally = Tally(Counter(trials=1))
        try:
            met = _one(ground, what, nth, tally)
        except AssertionError as error:
            met = bool(tally.counts["met"])
            tally.violations.append(f"{what.kind}, n = {nth}: {error}")
        yield tally
        if not met:
            return


def _one(ground: Ground, what: Series, nth: int, tally: Tally) -> bool:
    """Make one trial; return whether the fault was met."""
    trial = ground.begun(what.scene)
    report = trial.folder / "report"
    fault = Fault(str(trial.out), what.kinds, what.error, nth, what.for_ever, str(report))
    code = trial.run(trial.order(*(["--overwrite"] if what.scene == "overwrite" else []), fault=fault))
    met = int(report.read_text()) >= nth
    said = trial.said()
    tally.counts.update({f"exit {code}": 1, "met": met})
    trial.check_nobody_is_left()
    check_ended(trial, ground.videos, code, said, what.error, tally)
    assert met or code == DONE, f"exit code {code} without a fault: {said}"
    before = invariants.known(trial.out)
    complete(trial, ground.videos, before)
    if what.scene != "overwrite":
        tally.note("redone", trial.redone())
    trial.remove()
    return met


def check_ended(trial: Trial, videos: Path, code: int, said: str, error: int, tally: Tally) -> None:
    """See that a start that met a fault ended in order, and said no more than is true."""
    if trial.out.exists():
        invariants.check_readers(trial.out)
    if code == DONE:
        invariants.check(trial.out, videos, failed=FAILED)
        assert "Traceback" not in said, said
        return
    assert code == 1 or (code == 2 and error == errno.EACCES), f"exit code {code}: {said}"
    reason = reason_of(said)
    named = (os.strerror(error), "disk I/O error", "unable to open database file", "disk is full", "readonly")
    tally.counts["unnamed"] += not any(name in reason for name in named)
    tally.counts[f"said {_shape(reason)}"] += 1


def _shape(reason: str) -> str:
    return re.sub(r"/dev/shm/\S+/|\d+", "", reason)[:110]


def complete(trial: Trial, videos: Path, before: invariants.Known, *flags: str) -> None:
    """Make an unhindered start; all is there then, and what was there before is unchanged."""
    code = trial.run(trial.order(*flags))
    said = trial.said()
    assert code in (0, DONE), f"the next start ended with {code}: {said}"  # 0: there was nothing left to do
    invariants.check(trial.out, videos, failed=FAILED)
    end = invariants.known(trial.out)
    for key, row in before.captions.items():
        if before.states[key[0]] == "done":
            assert end.captions.get(key) == row, f"the caption of {row['path']} was lost or changed"


# Full disks


@contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[None]:
    """Mount a file system in memory of so many KB. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def can_mount(folder: Path) -> str | None:
    """Return why no file system can be mounted; None: it can."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    try:
        with small_disk(folder / "probe", 100):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no file system can be mounted ({error})"


@dataclass(frozen=True)
class Full:
    """A run whose captions do not fit: on so many MB, each of so many words of 65 bytes."""

    size_mb: int
    words: int

    @property
    def kind(self) -> str:
        return f"full disk of {self.size_mb} MB"


def fulls(variants: int = 6) -> list[Full]:
    """Return runs that fill disks, each at other moments."""
    return [Full(size, 700 + 97 * number) for size in (1, 2, 4, 8) for number in range(variants)]


def run_full(folder: Path, driver: Driver, what: Full) -> Tally:
    """Fill a disk, then make it larger and go on."""
    tally = Tally(Counter(trials=1))
    trial = Trial(driver, folder / "full", Path())
    trial.environment = {"DRIVE_WORDS": str(what.words), "DRIVE_PART_ROWS": "5", "DRIVE_DELAY_S": "0"}
    number = what.size_mb * 1024 * 1024 // (what.words * 65) + 8
    trial.videos = make_videos(trial.folder / "videos", number, bad=False)
    with small_disk(trial.out, what.size_mb * 1024):
        code = trial.run(trial.order())
        said = trial.said()
        assert code == 1, f"exit code {code}: {said}"
        reason = reason_of(said)
        assert any(words in reason for words in _FULL), reason
        tally.counts.update({"exit 1": 1, "met": 1, f"said {_shape(reason)}": 1})
        trial.check_nobody_is_left()
        invariants.check_readers(trial.out)
        before = invariants.known(trial.out)
        assert not any(before.crashes.values()), before.crashes
        code = trial.run(trial.order())
        reason = reason_of(trial.said())
        assert code == 1, f"exit code {code} while it is still full"
        assert any(words in reason for words in _FULL), reason
        subprocess.run(["mount", "-o", "remount,size=200m", trial.out], check=True)
        code = trial.run(trial.order())
        assert code == 0, f"the next start ended with {code}: {trial.said()}"
        invariants.check(trial.out, trial.videos)
        end = invariants.known(trial.out)
        assert all(end.captions[key] == row for key, row in before.captions.items()), "a caption changed"
        tally.note("redone", trial.redone())
    trial.remove()
    return tally


# Ledgers that others hold, or that were damaged


def run_held(ground: Ground, tally: Tally, *, how: str, for_s: float | None) -> None:
    """Another program holds the ledger: from before the start and for ever, or in the middle and for a while."""
    trial = ground.begun("again")
    trial.environment |= {"DRIVE_BUSY_S": "1.0" if for_s is None else "20", "DRIVE_DELAY_S": "0.7"}
    ledger = trial.out / ".specvlm" / "state-00000.db"
    with closing(sqlite3.connect(ledger, isolation_level=None, check_same_thread=False)) as other:
        if for_s is None:
            _hold(other, how)
            code = trial.run(trial.order())
        else:
            process = trial.driver.start(trial.order())
            assert trial.driver.wait(process, 0.5) is None, "it ended before it could be hindered"
            _hold(other, how)
            timer = threading.Timer(for_s, other.rollback)
            timer.start()
            found = trial.driver.wait(process)
            timer.join()
            assert found is not None
            code = found
        with suppress(sqlite3.Error):
            other.rollback()
    said = trial.said()
    tally.counts[f"exit {code}"] += 1
    if for_s is None:
        assert code == 75, f"exit code {code}: {said}"
        tally.counts[f"said {_shape(reason_of(said))}"] += 1
    else:
        assert code == DONE, f"exit code {code}: {said}"
    complete(trial, ground.videos, invariants.known(trial.out))
    tally.note("redone", trial.redone())
    trial.remove()


def _hold(other: sqlite3.Connection, how: str) -> None:
    while True:
        try:
            other.execute(f"BEGIN {how}")
            other.execute("SELECT count(*) FROM item").fetchone()
            return
        except sqlite3.OperationalError:
            time.sleep(0.01)


def damaged(data: bytes, how: str, dice: random.Random) -> bytes | None:
    """Return a damaged file; None: it is gone."""
    if how == "deleted":
        return None
    if how == "cut":
        return data[: dice.randrange(1, len(data))]
    if how == "emptied":
        return b""
    if how == "overwritten":
        return dice.randbytes(len(data))
    if how == "text":
        return b"no database\n" * 100
    changed = bytearray(data)
    for _ in range(1 if how == "bit flipped" else 200):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


DAMAGE = ("deleted", "cut", "emptied", "overwritten", "text", "bit flipped", "200 bits flipped")


def run_damaged(ground: Ground, tally: Tally, how: str, seed: int) -> None:
    """Damage the ledger of a run that is half done; it is mended, or refused and then rebuilt, or proved whole."""
    trial = ground.begun("again")
    ledger = trial.out / ".specvlm" / "state-00000.db"
    before = invariants.known(trial.out)
    data = damaged(ledger.read_bytes(), how, random.Random(seed))
    ledger.unlink()
    if data is not None:
        ledger.write_bytes(data)
    code = trial.run(trial.order())
    said = trial.said()
    tally.counts[f"exit {code}"] += 1
    if code == 1:
        reason = reason_of(said)
        tally.counts[f"said {_shape(reason)}"] += 1
        assert "delete it to have it rebuilt" in reason, reason
        ledger.unlink()
        ledger.with_name(f"{ledger.name}-journal").unlink(missing_ok=True)
        code = trial.run(trial.order())
        said = trial.said()
    assert code == DONE, f"exit code {code}: {said}"
    _check_rebuilt(trial, ground.videos, before, tally)
    trial.remove()


def _check_rebuilt(trial: Trial, videos: Path, before: invariants.Known, tally: Tally) -> None:
    """All is there, as it was. SQLite has no checksums: a caption that differs is found by `status --verify`.

    Other columns are in no other place to be compared with; how often one of them differs is counted.
    """
    verified = trial.run(trial.command("status", str(trial.out), "--verify"))
    trial.said()
    try:
        invariants.check(trial.out, videos, failed=FAILED)
        end = invariants.known(trial.out).captions
        assert len(trial.captioned()) == VIDEOS - 4, "captioned again"
    except (AssertionError, sqlite3.Error, ValueError) as error:
        tally.counts["silent"] += 1
        noticed, difference = verified != 0, str(error)
    else:
        tally.counts["silent"] += end != end | before.captions
        words = [key for key, row in before.captions.items() if end[key]["caption"] != row["caption"]]
        noticed, difference = not words or verified != 0, f"other captions: {words}"
    assert noticed, f"nobody noticed: {difference}"


def run_torn(ground: Ground, tally: Tally, content: bytes) -> None:
    """A torn run.json is refused by name; once deleted, it is written again."""
    trial = ground.begun("again")
    before = invariants.known(trial.out)
    path = trial.out / ".specvlm" / "run.json"
    path.write_bytes(content)
    code = trial.run(trial.order())
    reason = reason_of(trial.said())
    tally.counts.update({f"exit {code}": 1, f"said {_shape(reason)}": 1})
    assert code == 1, reason
    assert "run.json" in reason, reason
    assert "delete it" in reason, reason
    path.unlink()
    complete(trial, ground.videos, before)
    trial.remove()


# All together


@dataclass(frozen=True)
class State:
    """Trials with a run's state."""

    kind: str
    number: int


def states(flips: int) -> list[State]:
    """Return the trials of ledgers and run.json."""
    damage = [State(f"ledger {how}", seed) for how in DAMAGE for seed in range(_trials_of(how, flips))]
    held = [State(f"ledger held, {how}", 0) for how in _HELD]
    return [*damage, *held, *(State("run.json torn", number) for number in range(6))]


def _trials_of(how: str, flips: int) -> int:
    return flips if "flip" in how or how == "cut" else 1


_HELD: dict[str, tuple[str, float | None]] = {
    "EXCLUSIVE for ever": ("EXCLUSIVE", None),
    "IMMEDIATE for ever": ("IMMEDIATE", None),
    "EXCLUSIVE for 1 s": ("EXCLUSIVE", 1.0),
    "IMMEDIATE for 1 s": ("IMMEDIATE", 1.0),
    "DEFERRED for 1 s": ("DEFERRED", 1.0),
}


def run_state(ground: Ground, what: State) -> Tally:
    """Make one trial with a run's state."""
    tally = Tally(Counter(trials=1, met=1))
    word, _, rest = what.kind.partition(" ")
    if word == "run.json":
        whole = (ground.half.out / ".specvlm" / "run.json").read_bytes()
        cuts = [b"", b"\0" * len(whole), b"[]", b"{}", whole[: len(whole) // 2], whole[:-2]]
        run_torn(ground, tally, cuts[what.number % len(cuts)])
    elif rest.startswith("held, "):
        how, for_s = _HELD[rest.removeprefix("held, ")]
        run_held(ground, tally, how=how, for_s=for_s)
    else:
        run_damaged(ground, tally, rest, what.number)
    return tally


Trials = Sequence[Series | State | Full]


def work(given: Trials) -> Iterator[tuple[str, Tally]]:
    """Make trials in this process; yield their kind and what came of each."""
    with place() as folder, Driver(LD_PRELOAD=str(compiled(folder))) as driver:
        ground = (
            Ground(folder / "ground", driver) if any(not isinstance(what, Full) for what in given) else None
        )
        for what in given:
            yield from ((what.kind, tally) for tally in _made(folder, driver, ground, what))


def _made(
    folder: Path, driver: Driver, ground: Ground | None, what: Series | State | Full
) -> Iterator[Tally]:
    if isinstance(what, Series):
        assert ground is not None
        yield from run_series(ground, what)
        return
    make: Callable[[], Tally] = (
        partial(run_full, folder, driver, what) if isinstance(what, Full) else lambda: Tally()
    )
    if isinstance(what, State):
        assert ground is not None
        make = partial(run_state, ground, what)
    try:
        yield make()
    except AssertionError as error:
        yield Tally(Counter(trials=1), violations=[f"{what}: {error}"])
        shutil.rmtree(folder / "full", ignore_errors=True)


def main() -> int:
    """Run at full size unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=int, default=1, help="from one n to the next")
    parser.add_argument("--write-step", type=int, default=7, help="the same for writes")
    parser.add_argument(
        "--flips", type=int, default=40, help="ledgers that are cut or have bits flipped, of each kind"
    )
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if compiler() is None:
        print("not run: there is no C compiler to make the shim with; install gcc")
        return 1
    began_s = time.monotonic()
    with place() as folder:
        no_mount = can_mount(folder)
    trials: list[Series | State | Full] = [*series(given.step, given.write_step), *states(given.flips)]
    trials += [] if no_mount else fulls()
    tallies: dict[str, Tally] = {}
    for kind, tally in spread(work, trials, given.jobs):
        tallies.setdefault(kind, Tally()).add(tally)
        for text in tally.violations:
            print(f"VIOLATION {text}", file=sys.stderr, flush=True)
    show(tallies)
    if no_mount:
        print(f"full disks: not run, {no_mount}")
    return conclude([text for tally in tallies.values() for text in tally.violations], began_s)


def show(tallies: dict[str, Tally]) -> None:
    """Print a table, and what was said how often."""
    codes = ("exit 0", "exit 1", "exit 2", "exit 3", "exit 75")
    head = ("fault", "trials", "met", *codes, "silent", "redone", "violations")
    rows = [
        (
            kind,
            tally.counts["trials"],
            tally.counts["met"],
            *(tally.counts[code] for code in codes),
            tally.counts["silent"],
            int(tally.most.get("redone", 0)),
            len(tally.violations),
        )
        for kind, tally in sorted(tallies.items())
    ]
    print(table(head, rows))
    total = sum((tally.counts for tally in tallies.values()), Counter[str]())
    print(f"{total['trials']} trials; reasons without the system's own word: {total['unnamed']}")
    for name, number in total.most_common():
        if name.startswith("said "):
            print(f"{number:6}  {name.removeprefix('said ')}")


if __name__ == "__main__":
    sys.exit(main())
