"""The programs in examples/ run as they stand."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specvlm_cli import app
from specvlm_cli.inputs.item import item_id
from specvlm_cli.run import lock
from specvlm_cli.run.shard import shard_of
from tests.cli.conftest import forked, forked_readers

__all__ = ["forked", "forked_readers"]  # fixtures

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_caption_one() -> None:
    """As a program of its own; the others run in this process, which has torch imported."""
    command = [sys.executable, "-W", "error::SyntaxWarning", EXAMPLES / "caption_one.py"]
    variables = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=variables
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "same tokens as plain decoding: True" in said
    assert len(said.splitlines()[0]) > 40


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a program in this process as its own first lines say; return what it prints."""

    def run_it(name: str, *arguments: object) -> str:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run_it


def test_stream_caption(run: Callable[..., str]) -> None:
    assert len(run("stream_caption.py").strip()) > 40


def test_own_frames(run: Callable[..., str]) -> None:
    assert "video tokens" in run("own_frames.py")


def test_demo_and_read_captions(
    tmp_path: Path, forked: None, run: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    """What `make demo` does: every row decoded twice, with the very same tokens."""
    out = tmp_path / "demo-out"
    videos = EXAMPLES / "videos"
    assert (
        app.main(["caption", str(videos), "--preset", "demo", "--baseline-sample", "1.0", "-o", str(out)])
        == 0
    )
    count = len([path for path in videos.iterdir() if path.suffix in (".mp4", ".webm")])
    assert f"{count}/{count}" in capfd.readouterr().err
    table = run("read_captions.py", out)
    assert table.count("yes") == count
    assert max(map(len, table.splitlines())) <= 80


def test_caption_folder(two_videos: Path, run: Callable[..., str]) -> None:
    """A line for each video; one that is broken says why, and costs the others nothing."""
    (two_videos / "broken.mp4").write_text("no video")
    (two_videos / "notes.txt").write_text("not looked at")
    said = dict(line.split(": ", 1) for line in run("caption_folder.py", two_videos).splitlines())
    assert said.keys() == {"broken.mp4", "one-grows.mp4", "two-still-and-rising-vp9.webm"}
    assert said["broken.mp4"].startswith("no caption: ")
    assert "grows" in said["one-grows.mp4"]
    assert len(said["two-still-and-rising-vp9.webm"]) > 40


# Scripts of the shell


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An active environment, as far as scripts can tell: `specvlm` is a command, with a fake engine.

    `test_caption_one` and `test_demo_and_read_captions` run the real one.
    """
    command = tmp_path / ".venv" / "bin" / "specvlm"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.cli.drive run "$@"\n')
    command.chmod(0o755)
    return {
        "PATH": f"{command.parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(EXAMPLES.parent),
        "DRIVE_FORK": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def two_videos(tmp_path: Path) -> Path:
    """Two clips of long ago, in a folder with a space in its name."""
    folder = tmp_path / "two videos"
    folder.mkdir()
    for name in ("one-grows.mp4", "two-still-and-rising-vp9.webm"):
        shutil.copyfile(EXAMPLES / "videos" / name, folder / name)
        os.utime(folder / name, (0, 0))
    return folder


@pytest.fixture
def two_texts(two_videos: Path) -> Path:
    """The same two, as the fake reader takes them."""
    for number, path in enumerate(sorted(two_videos.iterdir())):
        path.write_text(f"video {number}")
        os.utime(path, (0, 0))
    return two_videos


def shell(name: str, *arguments: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script as its own first line says, without a terminal."""
    return subprocess.run(
        [EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
        cwd=environment["HOME"],
    )


def captioned(out: Path) -> list[str]:
    """Return the names of the videos that have a caption."""
    tables = [pq.read_table(path, columns=["path"]) for path in (out / "captions").glob("*.parquet")]
    return sorted(Path(path).name for table in tables for path in table["path"].to_pylist())


def test_cron(two_texts: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """It says nothing, leaves a file that may still be on its way, and stands back where another start is at work."""
    out = tmp_path / "captions of today"
    (tmp_path / "examples").mkdir()
    script = shutil.copy(EXAMPLES / "cron.sh", tmp_path / "examples")  # it takes the command of its checkout
    (two_texts / "two-still-and-rising-vp9.webm").touch()
    done = shell(script, two_texts, out, environment=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert captioned(out) == ["one-grows.mp4"]
    assert "1 done" in (out / "cron.log").read_text()
    os.utime(two_texts / "two-still-and-rising-vp9.webm", (0, 0))
    with lock.take(out / ".specvlm" / "state-00000.lock", "another"):
        done = shell(script, two_texts, out, environment=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert captioned(out) == ["one-grows.mp4"]


def test_multi_gpu(two_texts: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    done = shell("multi_gpu.sh", two_texts, tmp_path / "out", environment=environment)
    assert done.returncode == 0, done.stderr
    assert captioned(tmp_path / "out") == ["one-grows.mp4", "two-still-and-rising-vp9.webm"]


def test_slurm_array(two_texts: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """One task, told what Slurm would tell it; tests/slurm has a real one."""
    mine = shard_of(item_id(b"one-grows.mp4"), 4)
    assert mine != shard_of(item_id(b"two-still-and-rising-vp9.webm"), 4)
    task = {"ID": mine, "COUNT": 4, "MIN": 0, "MAX": 3, "STEP": 1}
    variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in task.items()}
    variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    done = shell("slurm_array.sbatch", two_texts, tmp_path / "out", environment=environment | variables)
    assert done.returncode == 0, done.stderr
    assert captioned(tmp_path / "out") == ["one-grows.mp4"]
