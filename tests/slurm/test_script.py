"""The batch script run by bash alone: a made-up specvlm, `squeue` and `scontrol` stand where the real ones would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from specvlm_cli.exits import UsageError
from specvlm_cli.slurm import ArrayJob, quoted, script, submissions

HOSTILE = [
    "with space",
    "it's",
    'say "it"',
    "$HOME $(touch gone) `touch gone`",
    "back\\slash\\",
    "line\nbreak\r\n#SBATCH --array=0-999",
    "\x1b[31mred\x07",
    "\u202edesrever",
    "日本語.mp4",
    os.fsdecode(b"\xff\xfe.mp4"),
    "*?[a-z]{1,2}",
    "!history",
    "",
    "--",
    "-dash",
]

# Writes down its arguments, then does what PLAN says: a bash command line.
_SPECVLM = """\
#!/bin/bash
printf '%s\\0' "$@" >>"$SEEN/arguments"
printf '\\n' >>"$SEEN/arguments"
eval "$PLAN"
"""


@dataclass(frozen=True)
class Bench:
    """A place where scripts are run as Slurm would run them."""

    root: Path
    job: ArrayJob

    def start(
        self, job: ArrayJob | None = None, plan: str = "exit 0", state: str = "RUNNING", *words: str
    ) -> Running:
        """Start task 3 of the job; `words` follow the script's name on the line that submits it."""
        variables = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "SEEN": str(self.root),
            "PLAN": plan,
            "STATE": state,
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_JOB_NAME": "specvlm",
        }
        text = script(job or self.job).encode()
        path = self.root / "script"
        path.write_bytes(text)
        return Running(
            subprocess.Popen(
                ["bash", path, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=variables,
                text=True,
            )
        )

    def run(self, job: ArrayJob | None = None, plan: str = "exit 0", state: str = "RUNNING") -> Ended:
        """Run task 3 of the job to its end."""
        return self.start(job, plan, state).end()

    def requeued(self) -> list[str]:
        """Return what `scontrol` was asked to do, each time."""
        path = self.root / "scontrol"
        return path.read_text().splitlines() if path.exists() else []

    def arguments(self) -> list[list[str]]:
        """Return the arguments of each start of specvlm."""
        starts = (self.root / "arguments").read_bytes().split(b"\0\n")[:-1]
        return [[os.fsdecode(word) for word in start.split(b"\0")] for start in starts]


@dataclass(frozen=True)
class Ended:
    """How a task ended, and what it said."""

    code: int
    said: str


@dataclass(frozen=True)
class Running:
    """A task at work."""

    process: subprocess.Popen[str]

    def end(self) -> Ended:
        said, _ = self.process.communicate(timeout=30)
        return Ended(self.process.returncode, said)

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.01)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    programs = {
        "specvlm": _SPECVLM,
        "scontrol": '#!/bin/bash\necho "$*" >>"$SEEN/scontrol"\n',
        "squeue": '#!/bin/bash\necho "$STATE"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    out = tmp_path / "out"
    for folder in (out / "logs", out / "captions"):
        folder.mkdir(parents=True)
    return Bench(tmp_path, _job(tmp_path))


def _job(root: Path) -> ArrayJob:
    return ArrayJob(
        program=[str(root / "bin" / "specvlm")],
        folder=root,
        out=root / "out",
        logs=root / "out" / "logs",
        shards=8,
        tasks=range(8),
        arguments=["videos", "--preset", "demo"],
        first_start=[],
        setup=[],
        name="specvlm",
        directives=[],
        max_running=None,
        stop_before_s=300,
        max_requeues=2,
        version="1.2.3",
    )


def _read_back(words: Sequence[str]) -> list[bytes]:
    """Return what bash makes of quoted words."""
    line = "printf '%s\\0' " + " ".join(map(quoted, words))
    done = subprocess.run(["bash"], input=line.encode(), capture_output=True, check=True, timeout=30)
    return done.stdout.split(b"\0")[:-1]


def test_any_word_comes_back_from_bash_as_it_was() -> None:
    dice = random.Random(0)
    alphabet = [bytes([code]) for code in range(1, 256)] + ["é".encode(), "\u2028".encode(), b"'", b"\\"] * 9
    made = [os.fsdecode(b"".join(dice.choices(alphabet, k=dice.randrange(12)))) for _ in range(400)]
    words = [*HOSTILE, *made]
    assert _read_back(words) == [os.fsencode(word) for word in words]
    assert all(quoted(word).isprintable() for word in words), "safe to look at, and on one line"


def test_hostile_names_reach_specvlm_unharmed(bench: Bench) -> None:
    place = bench.root / 'it\'s a "$PWD" 50%'
    (place / "logs").mkdir(parents=True)
    job = replace(bench.job, folder=place, out=place, logs=place / "logs", arguments=HOSTILE)
    assert bench.run(job).code == 0
    assert bench.arguments() == [["caption", "-o", str(place), "--shard", "3/8", *HOSTILE]]
    assert not list(bench.root.rglob("gone"))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 137])
def test_other_exit_codes_are_the_tasks_own(bench: Bench, code: int) -> None:
    ended = bench.run(plan=f"exit {code}")
    assert ended.code == code
    assert f"ended with exit code {code}" in ended.said
    assert bench.requeued() == []


def test_a_task_that_stopped_early_is_requeued(bench: Bench) -> None:
    ended = bench.run(plan="exit 75")
    assert ended.code == 75
    assert bench.requeued() == ["requeue 12_3"], "this task, and not the whole array"


def test_a_task_that_slurm_is_ending_is_left_to_slurm(bench: Bench) -> None:
    """A requeue would bring back a task that its owner has cancelled."""
    ended = bench.run(plan="exit 75", state="COMPLETING")
    assert ended.code == 75
    assert bench.requeued() == []


def test_a_task_that_gets_nowhere_is_not_requeued_for_ever(bench: Bench) -> None:
    codes = [bench.run(plan="exit 75") for _ in range(3)]
    assert [ended.code for ended in codes] == [75, 75, 75]
    assert len(bench.requeued()) == bench.job.max_requeues == 2
    assert "3 times in a row without a new caption" in codes[-1].said
    assert list((bench.root / "out" / "logs").iterdir()) == [], "the next submission counts anew"


def test_a_task_that_makes_captions_is_requeued_as_often_as_it_takes(bench: Bench) -> None:
    for start in range(6):
        plan = f'echo rows >"{bench.job.out}/captions/part-00003-{start:05d}.parquet"; exit 75'
        bench.run(plan=plan if start % 2 else "exit 75")
    assert len(bench.requeued()) == 6


def test_captions_of_other_shards_are_no_progress_of_ours(bench: Bench) -> None:
    for start in range(3):
        bench.run(plan=f'echo rows >"{bench.job.out}/captions/part-00004-{start:05d}.parquet"; exit 75')
    assert len(bench.requeued()) == 2


def test_overwrite_is_asked_for_until_a_start_had_results(bench: Bench) -> None:
    job = replace(bench.job, first_start=["--overwrite"])
    part = f"{bench.job.out}/captions/part-00003-00000.parquet"
    for plan in ("exit 75", f'echo rows >"{part}"; exit 75', "exit 75", "exit 0"):
        bench.run(job, plan)
    assert ["--overwrite" in start for start in bench.arguments()] == [True, True, False, False]
    bench.run(job)
    assert "--overwrite" in bench.arguments()[-1], "the job has ended; submitted again, it begins anew"


def test_slurms_warning_is_passed_on(bench: Bench) -> None:
    """It comes to the shell alone."""
    ready = bench.root / "ready"
    plan = f"trap 'sleep 0.1; exit 75' USR1; touch {ready}; while :; do sleep 0.05; done"
    running = bench.start(plan=plan)
    running.wait_for(ready)
    running.process.send_signal(signal.SIGUSR1)
    assert running.end().code == 75
    assert bench.requeued() == ["requeue 12_3"]


def test_a_warning_before_specvlm_listens_is_a_stop_too(bench: Bench) -> None:
    ready = bench.root / "ready"
    running = bench.start(plan=f"touch {ready}; exec sleep 20")
    running.wait_for(ready)
    running.process.send_signal(signal.SIGUSR1)
    assert running.end().code == 75
    assert bench.requeued() == ["requeue 12_3"]


def test_term_is_not_passed_on_and_does_not_end_the_shell(bench: Bench) -> None:
    """Slurm sends it to every process of the task, so that specvlm has it already."""
    ready, told = bench.root / "ready", bench.root / "told"
    plan = f"trap 'echo x >>{told}' TERM; touch {ready}; sleep 0.5; sleep 0.1; exit 75"
    running = bench.start(plan=plan, state="COMPLETING")
    running.wait_for(ready)
    running.process.send_signal(signal.SIGTERM)
    ended = running.end()
    assert (ended.code, told.exists()) == (75, False)
    assert "Slurm is ending this task" in ended.said


def test_it_works_where_it_was_printed_with_the_setup_and_the_threads(bench: Bench) -> None:
    job = replace(bench.job, setup=["export FROM_SETUP='a b'"])
    seen = bench.root / "seen"
    bench.run(job, f'echo "$PWD|$FROM_SETUP|$OMP_NUM_THREADS" >{seen}; cat >>{seen}')
    assert seen.read_text() == f"{bench.root}|a b|1\n", "and there is nothing on its standard input"


def test_outside_an_array_it_says_so(bench: Bench) -> None:
    (bench.root / "script").write_text(script(bench.job))
    done = subprocess.run(
        ["bash", bench.root / "script"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
        timeout=30,
    )
    assert done.returncode != 0
    assert "this is a job array; submit it as its first lines say" in done.stderr


def test_a_window_of_shards_has_its_offset_for_an_argument(bench: Bench) -> None:
    job = replace(bench.job, shards=2500, tasks=range(2500), max_requeues=0)
    (bench.root / "out" / "captions" / "part-02003-00000.parquet").touch()
    ended = bench.start(job, "exit 75", "RUNNING", "2000").end()
    assert bench.arguments()[0][:5] == ["caption", "-o", f"{bench.root}/out", "--shard", "2003/2500"]
    assert ended.said.startswith("20")
    assert "shard 2003 of 2500 on" in ended.said
    bench.run(job)
    assert bench.arguments()[1][4] == "3/2500"


def test_shards_of_one_window_need_no_argument(bench: Bench) -> None:
    job = replace(bench.job, shards=2500, tasks=[1003, 1999])
    assert submissions(job) == []
    assert "#SBATCH --array=3,999\n" in script(job)
    bench.run(job)
    assert bench.arguments()[0][4] == "1003/2500"


def test_directives(bench: Bench) -> None:
    job = replace(
        bench.job,
        tasks=[1, 2, 5],
        max_running=2,
        logs=Path('/shared/5% of "all"/logs'),
        directives=[("time", "04:00:00"), ("comment", 'two "words"'), ("exclusive", "")],
    )
    lines = [line for line in script(job).splitlines() if line.startswith("#SBATCH")]
    assert [line.removeprefix("#SBATCH --") for line in lines] == [
        "job-name=specvlm",
        "array=1-2,5%2",
        r'output="/shared/5%% of \"all\"/logs/%x-%A_%a.log"',
        "open-mode=append",
        "requeue",
        "signal=B:USR1@300",
        "nodes=1",
        "ntasks=1",
        "time=04:00:00",
        r'comment="two \"words\""',
        "exclusive",
    ]


@pytest.mark.parametrize("name", ["a\nb", "a\\b", os.fsdecode(b"\xff"), "\x1b[0m"])
def test_a_log_folder_that_sbatch_cannot_read_is_refused(bench: Bench, name: str) -> None:
    with pytest.raises(UsageError, match="give another --logs folder") as caught:
        script(replace(bench.job, logs=Path("/shared") / name))
    assert str(caught.value).isprintable()
