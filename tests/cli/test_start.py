"""The real command in a process of its own: how fast it starts, and that it starts without torch."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.conftest import Specvlm, snapshot

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specvlm_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def used() -> float:
    """Return the seconds that processes that we started and that have ended were at work."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_finished_run_is_seen_in_under_two_seconds(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    before = snapshot(out)
    run("--version")  # the interpreter's own files are read once
    started, used_s = time.perf_counter(), used()
    done = run("caption", videos, "-o", out)
    took_s, used_s = time.perf_counter() - started, used() - used_s
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing to do: 4 done" in done.stderr
    assert snapshot(out) == before
    assert used_s < 2.0, "of the processor, which others may want too"
    assert took_s < 20.0


def test_no_model_library_is_imported_before_there_is_work(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    program = f"""
import sys
from specvlm_cli.app import main
assert main(["caption", {str(videos)!r}, "-o", {str(out)!r}, "-q"]) == 0
assert main(["caption", {str(videos)!r}, "-o", {str(out)!r}, "-q", "--fps", "1"]) == 2
assert main(["caption", "nowhere.mp4"]) == 2
print({{"torch", "transformers", "torchvision", "decord", "av"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"


def test_version() -> None:
    import specvlm

    assert run("--version").stdout == f"specvlm {specvlm.__version__}\n"
