"""`specvlm slurm`: what it prints, and what it refuses before any task can."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Result, Specvlm, forked_fakes, forked_readers, snapshot, specvlm
from tests.test_docs import commands

__all__ = ["forked_fakes", "forked_readers", "specvlm"]  # fixtures

CAPTION = ("--", "caption", "videos", "--preset", "demo")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def directives(result: Result) -> list[str]:
    assert (result.code, result.err) == (0, "")
    return [line[8:] for line in result.out.splitlines() if line.startswith("#SBATCH ")]


def begin(out: Path, shards: int) -> None:
    """Make a run folder as far as its settings."""
    (out / ".specvlm").mkdir(parents=True)
    run = {"settings": {}, "config_hash": "", "resolved": {}, "shards": shards, "kept": {}, "format": 1}
    (out / ".specvlm" / "run.json").write_text(json.dumps(run))


def test_script_of_a_new_run(specvlm: Specvlm, out: Path) -> None:
    result = specvlm("slurm", out, "--shards", 8, *CAPTION)
    assert directives(result) == [
        "--job-name=specvlm",
        "--array=0-7",
        f"--output={out}/logs/%x-%A_%a.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=4",
        "--gres=gpu:1",
    ]
    assert result.out.startswith("#!/bin/bash\n")
    assert f"out={out}\n" in result.out
    assert "arguments=(\n    videos\n    --preset demo\n)\n" in result.out
    assert (out / "logs").is_dir(), "Slurm makes none, and says nothing where it is missing"
    checked = subprocess.run(["bash", "-n"], input=result.out, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_what_a_task_asks_for(specvlm: Specvlm, out: Path) -> None:
    flags = (
        "--time 1-12 --gpus-per-task a100:2 --cpus-per-task 16 --mem 64G --partition gpu,long --account me"
    )
    more = "--name films --stop-before 10m --max-running 3 --sbatch exclusive --sbatch comment=ab=c"
    script = specvlm("slurm", out, "--shards", 4, *flags.split(), *more.split(), *CAPTION)
    said = directives(script)
    assert said[:2] == ["--job-name=films", "--array=0-3%3"]
    assert said[5] == "--signal=B:USR1@600"
    assert said[8:] == [
        "--time=1-12",
        "--cpus-per-task=16",
        "--gres=gpu:a100:2",
        "--mem=64G",
        "--partition=gpu,long",
        "--account=me",
        "--exclusive",
        "--comment=ab=c",
    ]


def test_an_array_of_a_thousand_tasks_is_one(specvlm: Specvlm, out: Path) -> None:
    assert "--array=0-999" in directives(specvlm("slurm", out, "--shards", 1000, *CAPTION))


@pytest.mark.parametrize("shards", [1001, 2500])
def test_more_tasks_than_an_array_has_are_submitted_by_the_lines_that_are_printed(
    specvlm: Specvlm, out: Path, shards: int
) -> None:
    result = specvlm("slurm", out, "--shards", shards, "--name", "films", "--max-running", 40, *CAPTION)
    warning, *lines = result.err.splitlines()
    assert (result.code, warning.startswith(f"warning: {shards:,} tasks are more than")) == (0, True)
    assert "save the script as films.sbatch" in warning
    assert "#SBATCH --array" not in result.out, (
        "submitted without these lines, not a part of it may pass for all"
    )
    assert all(f"# {line}\n" in result.out for line in lines)
    submitted: list[int] = []
    limits = 0
    for line in lines:
        first, last, limit, offset = map(
            int,
            re.fullmatch(r"sbatch --array=(\d+)(?:-(\d+))?%(\d+) films.sbatch (\d+)", line).groups("0"),  # type: ignore[union-attr]
        )
        assert max(first, last) < 1001
        submitted += range(offset + first, offset + max(first, last) + 1)
        limits += limit
    assert submitted == list(range(shards))
    assert limits <= 40
    checked = subprocess.run(["bash", "-n"], input=result.out, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_missing_shards_of_several_windows(
    specvlm: Specvlm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(out, 3000)
    monkeypatch.setattr("specvlm_cli.run.progress.missing_shards", lambda _: (7, 999, 1000, 1002, 2500))
    said = specvlm("slurm", out, "--only-missing", *CAPTION).err.splitlines()[1:]
    assert said == [
        "sbatch --array=7,999 specvlm.sbatch 0",
        "sbatch --array=0,2 specvlm.sbatch 1000",
        "sbatch --array=500 specvlm.sbatch 2000",
    ]


def test_no_gpu(specvlm: Specvlm, out: Path) -> None:
    said = directives(specvlm("slurm", out, "--shards", 2, "--gpus-per-task", 0, *CAPTION))
    assert not [line for line in said if line.startswith("--gres")]


def test_a_run_folder_knows_its_shards(specvlm: Specvlm, out: Path) -> None:
    begin(out, 6)
    assert "--array=0-5" in directives(specvlm("slurm", out, *CAPTION))
    result = specvlm("slurm", out, "--shards", 4, *CAPTION)
    assert result.code == 2
    assert "was begun with 6" in result.err


def test_overwrite_is_for_the_first_start_alone(specvlm: Specvlm, out: Path) -> None:
    words = (*CAPTION, "--overwrite", "--prompt", "--overwrite?", "--retry-failed", "-v")
    script = specvlm("slurm", out, "--shards", 2, *words).out
    assert "first_start=(--overwrite --retry-failed)\n" in script
    assert "    --prompt --overwrite?\n" not in script  # it is quoted
    assert "--prompt\n    '--overwrite?'\n    -v\n" in script


def test_folders_have_the_names_that_the_shell_has_for_them(
    specvlm: Specvlm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/home/me may be /mnt/disk7/me on this machine alone."""
    (out.parent / "real").mkdir()
    (out.parent / "home").symlink_to("real")
    monkeypatch.chdir(out.parent / "home")
    monkeypatch.setenv("PWD", str(out.parent / "home"))
    said = specvlm("slurm", "out", "--shards", 2, *CAPTION).out
    assert f"cd -- {out.parent}/home || exit 1\nout={out.parent}/home/out\n" in said
    monkeypatch.setenv("PWD", "/nowhere")
    said = specvlm("slurm", "out", "--shards", 2, *CAPTION).out
    assert f"cd -- {out.parent}/real || exit 1\n" in said


REFUSED = {
    "--nope": (("--nope",), "No such option: --nope"),
    "no number": (("--limit", "many"), "--limit"),
    "unknown choice": (("--pruner", "magic"), "--pruner"),
    "out twice": (("-o", "elsewhere"), "--out elsewhere after caption: it is OUT"),
    "dry run": (("--dry-run",), "--dry-run"),
    "standard input": (("-",), "put the paths into a manifest"),
    "another folder": (("--on-config-change", "new"), "give the new folder as OUT"),
    "overwrite as a value": (("--overwrite", "--prompt", "--overwrite"), "--overwrite would start over"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_would_fail_in_each_task_is_refused_now(specvlm: Specvlm, out: Path, case: str) -> None:
    words, message = REFUSED[case]
    result = specvlm("slurm", out, "--shards", 2, *CAPTION, *words)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not out.exists()


WRONG = {
    "another command": (("--shards", 2, "--", "bench", "videos"), "only caption runs in shards"),
    "nothing to caption": (("--shards", 2, "--", "caption"), "nothing to caption: give a folder"),
    "no shards": (CAPTION, "--shards N"),
    "no shard": (("--shards", 0, *CAPTION), "--shards"),
    "a name with a slash": (("--shards", 2, "--name", "a/b", *CAPTION), "--name 'a/b'"),
    "two words": (("--shards", 2, "--partition", "a b", *CAPTION), "--partition 'a b'"),
    "a line break": (("--shards", 2, "--sbatch", "comment=a\nb", *CAPTION), "--comment a\\x0ab"),
    "no key": (("--shards", 2, "--sbatch", "-x", *CAPTION), "--sbatch '-x'"),
    "our key": (("--shards", 2, "--sbatch", "array=0-3", *CAPTION), "--array is what this script"),
    "half a GPU": (("--shards", 2, "--gpus-per-task", "0.5", *CAPTION), "--gpus-per-task '0.5'"),
    "no time": (("--shards", 2, "--time", "4h", *CAPTION), "--time 4h is no time limit"),
    "no time to work": (("--shards", 2, "--time", "5", *CAPTION), "--time 5 leaves no time"),
    "no span": (("--shards", 2, "--stop-before", "soon", *CAPTION), "--stop-before soon"),
    "too long": (("--shards", 2, "--stop-before", "1d", *CAPTION), "--stop-before 1d"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_flags_are_refused_by_name(specvlm: Specvlm, out: Path, case: str) -> None:
    words, message = WRONG[case]
    result = specvlm("slurm", out, *words)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("limit", ["7", "6:01", "00:06:01", "0-1", "0-0:7", "0-0:6:1", "UNLIMITED"])
def test_time_limits_as_slurm_writes_them(specvlm: Specvlm, out: Path, limit: str) -> None:
    assert f"--time={limit}" in directives(specvlm("slurm", out, "--shards", 2, "--time", limit, *CAPTION))


@pytest.mark.parametrize("limit", ["6", "6:00", "00:06:00", "0-0:6", "0-0:6:0"])
def test_a_limit_has_to_leave_time_to_work(specvlm: Specvlm, out: Path, limit: str) -> None:
    result = specvlm("slurm", out, "--shards", 2, "--time", limit, *CAPTION)
    assert (result.code, result.out) == (2, "")


def test_nothing_is_made_but_the_folder_of_the_logs(specvlm: Specvlm, out: Path) -> None:
    begin(out, 2)
    before = snapshot(out / ".specvlm")
    specvlm("slurm", out, "--logs", out.parent / "logs", *CAPTION)
    assert snapshot(out / ".specvlm") == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["logs", "out"]


def test_every_flag_is_documented_with_its_meaning() -> None:
    table = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `-"))
    documented = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", rows))
    assert documented == commands()["slurm"] - {"out", "words", "-h"}
