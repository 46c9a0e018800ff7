"""Many starts at the same moment, on one run folder.

    python -m tests.faults.starts --rounds 25 --starts 20

Without `--if-locked` exactly one works, to the end, and the others end with 75 and one line that names it; with
`--if-locked skip` these end with 0, and with -q in silence; with `wait` all end with 0. Nothing is captioned twice.
Also: eight shards at once, and several starts that all ask for another number of shards.

Prints a table, and ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tests.cli import invariants
from tests.faults.harness import Driver, Tally, Trial, conclude, make_videos, place, table

VIDEOS = 16
BUSY = 75
_HELD = re.compile(r"specvlm: error: .* is in use by process (\d+) on .+ since .+; wait for it to end.*\n")
_DIVIDED = re.compile(
    r"specvlm: error: .*(its shard count is being changed|a start of it is at work|is in use by).*\n"
)


class Ground:
    """Where rounds are made."""

    def __init__(self, folder: Path, driver: Driver, starts: int) -> None:
        self.folder = folder
        self.driver = driver
        self.starts = starts
        self.videos = make_videos(folder / "videos", VIDEOS, bad=False)
        self._number = 0

    def trial(self, delay_s: float) -> Trial:
        """Return a new place for a run."""
        self._number += 1
        folder = self.folder / f"round-{self._number}"
        folder.mkdir()
        environment = {"DRIVE_PART_ROWS": "4", "DRIVE_DELAY_S": str(delay_s)}
        return Trial(self.driver, folder, self.videos, environment=environment)


def at_once(trial: Trial, flags: Sequence[Sequence[str]]) -> list[tuple[int, str, int]]:
    """Make one start for each list of flags; return exit code, stderr and process of each."""
    orders = [replace(trial.order(*some), stderr=f"stderr-{number}") for number, some in enumerate(flags)]
    processes = [trial.driver.start(order) for order in orders]
    codes = [trial.driver.wait(process) for process in processes]
    assert None not in codes, f"some did not end: {codes}"
    said = [(trial.folder / order.stderr).read_text() for order in orders]
    return list(zip([code or 0 for code in codes], said, processes, strict=True))


def check_once(trial: Trial, videos: Path) -> None:
    """See that all is captioned, once."""
    invariants.check(trial.out, videos)
    made = trial.captioned()
    assert len(made) == len(set(made)) == VIDEOS, f"{len(made)} captions of {len(set(made))} videos were made"


def locked(ground: Ground, tally: Tally) -> None:
    """One works; the others say who."""
    trial = ground.trial(0.1)
    ended = at_once(trial, [()] * ground.starts)
    winners = [process for code, _, process in ended if code == 0]
    assert len(winners) == 1, f"{len(winners)} worked: {[code for code, *_ in ended]}"
    for code, said, _ in ended:
        tally.counts[f"exit {code}"] += 1
        if code == 0:
            assert not said, said
            continue
        assert code == BUSY, said
        named = _HELD.fullmatch(said)
        assert named is not None, f"does not name the holder: {said!r}"
        assert int(named.group(1)) == winners[0]
    check_once(trial, ground.videos)
    trial.remove()


def skipping(ground: Ground, tally: Tally) -> None:
    """One works; the others end in silence, as if all were well."""
    trial = ground.trial(0.1)
    ended = at_once(trial, [("--if-locked", "skip")] * ground.starts)
    tally.counts.update(f"exit {code}" for code, *_ in ended)
    assert [code for code, *_ in ended] == [0] * ground.starts
    assert not any(said for _, said, _ in ended), [said for _, said, _ in ended]
    check_once(trial, ground.videos)
    trial.remove()


def waiting(ground: Ground, tally: Tally) -> None:
    """All end well, one after the other; only the first finds something to do."""
    trial = ground.trial(0.0)
    ended = at_once(trial, [("--if-locked", "wait")] * ground.starts)
    tally.counts.update(f"exit {code}" for code, *_ in ended)
    assert [code for code, *_ in ended] == [0] * ground.starts, ended
    check_once(trial, ground.videos)
    trial.remove()


def sharded(ground: Ground, tally: Tally) -> None:
    """Eight shards work at the same time."""
    trial = ground.trial(0.02)
    ended = at_once(trial, [("--shard", f"{index}/8") for index in range(8)])
    tally.counts.update(f"exit {code}" for code, *_ in ended)
    assert [code for code, *_ in ended] == [0] * 8, ended
    check_once(trial, ground.videos)
    trial.remove()


def divided(ground: Ground, tally: Tally) -> None:
    """Starts that divide a finished run anew, all at once: its captions stay what they were."""
    trial = ground.trial(0.0)
    assert trial.run(trial.order()) == 0, trial.said()
    before = invariants.known(trial.out).captions
    ended = at_once(trial, [("--shard", f"{index % 4}/4", "--reshard") for index in range(8)])
    for code, said, _ in ended:
        tally.counts[f"exit {code}"] += 1
        assert code in (0, BUSY), said
        assert not said if code == 0 else _DIVIDED.fullmatch(said), repr(said)
    assert any(code == 0 for code, *_ in ended)
    for index in range(4):
        assert trial.run(trial.order("--shard", f"{index}/4")) == 0, trial.said()
    assert invariants.known(trial.out).captions == before
    check_once(trial, ground.videos)
    trial.remove()


Round = Callable[[Ground, Tally], None]
ROUNDS: dict[str, Round] = {
    "fail": locked,
    "skip -q": skipping,
    "wait": waiting,
    "8 shards": sharded,
    "--reshard": divided,
}


def run(kind: str, rounds: int, ground: Ground) -> Tally:
    """Make rounds of one kind."""
    tally = Tally()
    for number in range(rounds):
        tally.counts["rounds"] += 1
        try:
            ROUNDS[kind](ground, tally)
        except AssertionError as error:
            tally.violations.append(f"{kind}, round {number}: {error}")
            for left in ground.folder.glob("round-*"):
                shutil.rmtree(left, ignore_errors=True)
    return tally


def main() -> int:
    """Run at full size unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--starts", type=int, default=20)
    given = parser.parse_args()
    began_s = time.monotonic()
    with place() as folder, Driver() as driver:
        ground = Ground(folder, driver, given.starts)
        tallies = {kind: run(kind, given.rounds, ground) for kind in ROUNDS}
    head = ("starts", "rounds", "starts made", "exit 0", "exit 75", "violations")
    print(table(head, [_row(kind, tally) for kind, tally in tallies.items()]))
    return conclude([text for tally in tallies.values() for text in tally.violations], began_s)


def _row(kind: str, tally: Tally) -> tuple[object, ...]:
    counts: Counter[str] = tally.counts
    made = sum(number for name, number in counts.items() if name.startswith("exit"))
    return kind, counts["rounds"], made, counts["exit 0"], counts[f"exit {BUSY}"], len(tally.violations)


if __name__ == "__main__":
    sys.exit(main())
