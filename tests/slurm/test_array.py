"""What `specvlm slurm` prints, run by a real Slurm: stopped, cancelled and killed on the way.

With fakes for models and videos, and, among the slow tests, with the demo pair and the example clips.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specvlm_cli.inputs.item import item_id
from specvlm_cli.run.holder import holder_of
from specvlm_cli.run.shard import shard_of
from tests.slurm import cluster
from tests.slurm.cluster import Cluster, Task

ROOT = Path(__file__).parents[2]
SHARDS = 4
CLIPS_OF_SHARD = 12
END_S = 150.0  # no task takes nearly as long; one that hangs must not hang the tests
REASON = cluster.why_not()

pytestmark = [
    pytest.mark.early,
    pytest.mark.skipif(REASON is not None, reason=f"no Slurm here: {REASON}"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster.running(tmp_path_factory.mktemp("slurm") / "cluster") as one:
        one.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield one


@pytest.fixture(scope="module", params=["fakes", pytest.param("demo pair", marks=pytest.mark.slow)])
def program(request: pytest.FixtureRequest, slurm: Cluster) -> Iterator[list[str]]:
    """What jobs run instead of specvlm; nothing: specvlm itself. Either way a caption takes a moment."""
    before = dict(slurm.environment)
    slurm.environment["DRIVE_DELAY_S"] = "0.4"
    yield [sys.executable, "-m", "tests.cli.drive", "run"] if request.param == "fakes" else []
    slurm.environment.clear()
    slurm.environment.update(before)


@pytest.fixture(scope="module")
def videos(program: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the example clips, or texts, as many in each shard, below a name that is hard on scripts."""
    folder, texts = tmp_path_factory.mktemp('it\'s a "$HOME"; 100% *'), tmp_path_factory.mktemp("texts")
    for number in range(8):
        (texts / f"{number}.mp4").write_text(f"video {number}")
    source = texts if program else ROOT / "examples" / "videos"
    clips = itertools.cycle(sorted(path for path in source.iterdir() if path.suffix != ".md"))
    left = dict.fromkeys(range(SHARDS), CLIPS_OF_SHARD)
    for number in itertools.count():
        clip = next(clips)
        name = f"clip {number}{clip.suffix}"
        shard = shard_of(item_id(name.encode()), SHARDS)
        if left[shard]:
            shutil.copyfile(clip, folder / name)
            left[shard] -= 1
        if not any(left.values()):
            return folder
    raise AssertionError


def wait_for(true: Callable[[], bool], problem: str) -> None:
    """Wait until something is true, but not for ever."""
    deadline = time.monotonic() + END_S
    while not true():
        assert time.monotonic() < deadline, problem
        time.sleep(0.02)


class Run:
    """One run folder, and the arrays that work on it."""

    def __init__(self, slurm: Cluster, videos: Path, out: Path, program: Sequence[str] = ()) -> None:
        self.slurm, self.videos, self.out, self._program = slurm, videos, out, program

    def script(self, *flags: object) -> str:
        """Return what `specvlm slurm` prints; another program stands in it where one is to be run."""
        needs = ("--gpus-per-task", 0, "--cpus-per-task", 1, "--time", 5, "--stop-before", "60s")
        # Without a draft and one at a time, so that there is time to disturb a task.
        slow = ("--draft", "none", "--batch-size", 1)
        caption = ("caption", self.videos, "--preset", "demo", *slow, "--grace", "30s")
        command = ("slurm", self.out, *needs, *flags, "--", *caption)
        done = subprocess.run(
            [sys.executable, "-m", "specvlm_cli", *map(str, command)],
            capture_output=True,
            text=True,
            env=self.slurm.environment,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if not self._program or not done.stdout:
            return done.stdout
        ours = f"\nspecvlm=({shlex.join(self._program)})\n"
        text, found = re.subn(r"\nspecvlm=\(.*\)\n", lambda _: ours, done.stdout)
        assert found == 1
        return text

    def wait_for_a_caption(self, shard: int) -> None:
        """Wait until a task is in the middle of its work."""
        wait_for(lambda: self._count(shard, "done") > 0, f"task {shard} makes no caption")
        assert self._count(shard, "pending")

    def _count(self, shard: int, state: str) -> int:
        path = self.out / ".specvlm" / f"state-{shard:05d}.db"
        if not path.exists():
            return 0
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30)) as ledger:
            return int(ledger.execute("SELECT count(*) FROM item WHERE state = ?", (state,)).fetchone()[0])

    def kill(self, shard: int) -> None:
        """Kill the process that works on a shard, as the kernel does where memory runs out."""
        holder = holder_of(self.out / ".specvlm" / f"state-{shard:05d}.lock")
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)

    def log(self, job: int, task: int) -> str:
        return (self.out / "logs" / f"specvlm-{job}_{task}.log").read_text()

    def lose(self, shard: int) -> None:
        """Remove all that is known of a shard."""
        for path in (self.out / "captions", self.out / ".specvlm"):
            for file in path.glob(f"*-{shard:05d}*"):
                file.unlink()

    def check_that_it_is_complete(self) -> None:
        """One row for each video, the same caption for the same clip, no failure, and no work left."""
        rows = self._rows("captions")
        names = sorted(os.fsencode(path) for path in self.videos.iterdir())
        assert sorted(os.fsencode(row["path"]) for row in rows) == names
        captions: dict[bytes, set[str]] = {}
        for row in rows:
            captions.setdefault(Path(row["path"]).read_bytes(), set()).add(row["caption"])
        assert all(len(one) == 1 for one in captions.values())
        assert self._rows("failures") == []
        assert self.script("--only-missing") == ""

    def _rows(self, folder: str) -> list[dict[str, Any]]:
        tables = [pq.read_table(path) for path in sorted((self.out / folder).glob("*.parquet"))]
        return [row for table in tables for row in table.to_pylist()]


def test_an_array_that_is_stopped_cancelled_and_killed_is_complete_in_the_end(
    slurm: Cluster, program: list[str], videos: Path, tmp_path: Path
) -> None:
    run = Run(slurm, videos, tmp_path / 'out "5%"', program)
    stopped, cancelled, killed, left_alone = range(SHARDS)
    job = slurm.submit(run.script("--shards", SHARDS))
    run.wait_for_a_caption(stopped)
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_{stopped}")
    run.wait_for_a_caption(cancelled)
    slurm.call("scancel", f"{job}_{cancelled}")
    run.wait_for_a_caption(killed)
    run.kill(killed)

    tasks = slurm.wait_for_end(job, END_S)
    assert tasks[stopped] == Task(stopped, "COMPLETED", exit_code=0, restarts=1)
    assert tasks[cancelled] == Task(cancelled, "CANCELLED", exit_code=75, restarts=0)
    assert tasks[killed] == Task(killed, "FAILED", exit_code=128 + signal.SIGKILL, restarts=0)
    assert tasks[left_alone] == Task(left_alone, "COMPLETED", exit_code=0, restarts=0)
    story = "requeued 0 times.*stopped by SIGUSR1.*; requeued, to resume.*requeued 1 times.*exit code 0"
    assert re.search(story, run.log(job, stopped), re.DOTALL), "both starts are in one log"
    assert "stopped by SIGTERM" in run.log(job, cancelled)

    missing = run.script("--only-missing")
    assert f"#SBATCH --array={cancelled}-{killed}\n" in missing
    rest = slurm.submit(missing)
    assert {task.state for task in slurm.wait_for_end(rest, END_S).values()} == {"COMPLETED"}
    run.check_that_it_is_complete()

    run.lose(left_alone)
    assert f"#SBATCH --array={left_alone}\n" in run.script("--only-missing")


@pytest.mark.parametrize("gpus", ["0", "1", "2"])
def test_slurm_accepts_what_is_asked_for(slurm: Cluster, tmp_path: Path, gpus: str) -> None:
    run = Run(slurm, tmp_path, tmp_path / "out")
    flags = (
        "--shards",
        3,
        "--gpus-per-task",
        gpus,
        "--mem",
        "1G",
        "--sbatch",
        'comment=a "b" c',
        "--time",
        "1-0",
    )
    script = run.script(*flags)
    slurm.call("sbatch", "--test-only", given=script)


def test_slurm_accepts_the_example(slurm: Cluster) -> None:
    slurm.call("sbatch", "--test-only", str(ROOT / "examples" / "slurm_array.sbatch"))


def test_a_cluster_leaves_no_process_behind(tmp_path: Path) -> None:
    """Neither a daemon nor a job, and be it one that does not listen."""
    root, begun = tmp_path / "cluster", tmp_path / "begun"
    with cluster.running(root) as one:
        one.submit(f"#!/bin/bash\n#SBATCH --output=/dev/null\ntrap '' TERM\ntouch {begun}\nsleep 300")
        wait_for(begun.exists, "the job does not begin")
        assert len(cluster.processes(root)) > len(cluster.DAEMONS)
    assert cluster.processes(root) == []
