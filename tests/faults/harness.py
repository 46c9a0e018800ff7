"""What the scripts share: a process that makes starts, places to work, digests of exports, tables.

Starts run with fakes for models and videos (`tests/cli/fake.py`); everything else is the product.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from specvlm_cli import app
from specvlm_cli.run.parts import CAPTION_SCHEMA
from tests.cli import family
from tests.cli.drive import Fault, Kill, Start
from tests.cli.fork_server import LONGEST_START_S, ForkServer

CHILDREN_END_S = 20.0  # after their parent was killed
VOLATILE = (
    "created_at",
    "run_id",
    "attempts",
    "mean_batch_size",
)  # columns that differ between two runs of the same videos
FORK = {"DRIVE_FORK": "1"}  # see `tests.cli.drive`
BAD = {"text": 3, "damaged": 9}  # videos that fail, by their number

Given = TypeVar("Given")
Found = TypeVar("Found")


def memory() -> Path | None:
    """Return a folder in memory, where syncs are quick: kills do not care. None: there is no such place."""
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def place(folder: Path | None = None) -> Iterator[Path]:
    """Make a folder to work in, and remove it."""
    with tempfile.TemporaryDirectory(dir=folder or memory(), prefix="specvlm-faults-") as name:
        yield Path(name).resolve()


def make_videos(folder: Path, number: int, *, bad: bool = True, word: str = "video") -> Path:
    """Make videos, two of which fail where `bad` says so."""
    folder.mkdir(parents=True)
    words = {number: word for word, number in BAD.items()} if bad else {}
    for index in range(number):
        (folder / f"{index:03d}.mp4").write_text(f"{words.get(index, word)} {index}")
    return folder


class Driver(ForkServer):
    """A process that has everything imported and forks a start on request."""

    def __init__(self, **environment: str) -> None:
        super().__init__("tests.cli.drive", "serve", **FORK, **environment)

    def start(self, order: Start) -> int:
        """Make a start; return its process id, which is its process group too."""
        return self.fork(asdict(order))


@dataclass
class Trial:
    """One run folder, and what was done to it."""

    driver: Driver
    folder: Path  # starts work in it, and keep their temporary files there
    videos: Path
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def order(
        self, *flags: str, kill: Kill | None = None, fault: Fault | None = None, quiet: bool = True
    ) -> Start:
        """Return the order for one start of `specvlm caption`."""
        arguments = ("caption", str(self.videos), "-o", str(self.out), *(["-q"] if quiet else []))
        return self.command(*arguments, *self.flags, *flags, kill=kill, fault=fault)

    def command(self, *arguments: str, kill: Kill | None = None, fault: Fault | None = None) -> Start:
        """Return the order for any command."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        more = {"DRIVE_JOURNAL": str(self.journal), "TMPDIR": str(self.folder / "tmp")} | self.environment
        return Start(tuple(arguments), str(self.folder), environment=more, kill=kill, fault=fault)

    def run(self, order: Start) -> int:
        """Run one start to its end; one that does not end is killed, and that is a violation."""
        process = self.driver.start(order)
        code = self.driver.wait(process)
        if code is None:
            os.killpg(process, 9)
            raise AssertionError(f"did not end within {LONGEST_START_S} s: {' '.join(order.arguments)}")
        return code

    def captioned(self) -> list[str]:
        """Return what the engines captioned, one entry each time."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [text for word, text, *_ in map(json.loads, lines) if word == "captioned"]

    def most_in_flight(self) -> int:
        """Return how many sequences a step had at most."""
        lines = self.journal.read_text().splitlines()
        return max(line[1] for line in map(json.loads, lines) if line[0] == "step")

    def redone(self) -> int:
        """Return how many captions were made more than once."""
        made = self.captioned()
        return len(made) - len(set(made))

    def said(self) -> str:
        """Return what the starts wrote to stderr, and forget it."""
        path = self.folder / "stderr"
        text = path.read_text(errors="replace") if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def check_nobody_is_left(self) -> None:
        """See that all processes of a start that was killed end in time."""
        left = family.wait_until_gone(self.folder, CHILDREN_END_S)
        assert not left, f"processes left {CHILDREN_END_S} s after their parent was killed: {left}"

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def exported(out: Path, work: Path) -> dict[str, str]:
    """Return the sha256 of each file of exports as Parquet and as JSON lines.

    All columns are in them but those that differ between two runs of the same videos. Failures come as lines.
    """
    columns = ",".join(name for name in CAPTION_SCHEMA.names if name not in VOLATILE)
    work.mkdir()
    _export(out, work / "parquet", "--columns", columns, "--failures", "without")
    _export(out, work / "captions.jsonl", "--columns", columns)
    _export(out, work / "failures.jsonl", "--failures", "only")
    digests = {str(path.relative_to(work)): _sha256(path.read_bytes()) for path in _files(work)}
    lines = [json.loads(line) for line in (work / "failures.jsonl").read_text().splitlines()]
    for line in lines:
        del line["at"], line["attempts"]
    digests["failures.jsonl"] = _sha256(json.dumps(lines, sort_keys=True).encode())
    shutil.rmtree(work)
    return digests


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _export(out: Path, destination: Path, *flags: str) -> None:
    said = StringIO()
    with redirect_stderr(said):
        code = app.main(["export", str(out), str(destination), "-q", *flags])
    assert code == 0, f"export: exit code {code}: {said.getvalue()}"


@dataclass
class Tally:
    """What came of the trials of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    most: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def note(self, name: str, value: float) -> None:
        """Keep the largest value of this name."""
        self.most[name] = max(self.most.get(name, 0.0), value)

    def add(self, other: Tally) -> None:
        """Take in another one."""
        self.counts.update(other.counts)
        for name, value in other.most.items():
            self.note(name, value)
        self.violations += other.violations


def spread(
    work: Callable[[Sequence[Given]], Iterator[Found]], all_given: Sequence[Given], jobs: int
) -> Iterator[Found]:
    """Run `work` on slices in processes of their own; yield what it yields, a slice at a time."""
    if jobs == 1:
        yield from work(all_given)
        return
    slices = [all_given[start :: jobs * 4] for start in range(jobs * 4)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(_listed, [(work, one) for one in slices if one]):
            yield from found


def _listed(what: tuple[Callable[[Sequence[Given]], Iterator[Found]], Sequence[Given]]) -> list[Found]:
    work, given = what
    return list(work(given))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return columns under their heads, the first to the left."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def conclude(violations: Sequence[str], began_s: float) -> int:
    """Print what was violated, and how long all took; return the exit code."""
    for violation in violations[:50]:
        print(f"VIOLATION {violation}")
    print(f"{len(violations)} violations, {time.monotonic() - began_s:.0f} s")
    return 1 if violations else 0
