"""The environment of our processes in a temp folder that is shared with others."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specvlm_cli.process import keep_torch_out_of_foreign_folders


@pytest.mark.parametrize("kind", ["nothing", "our folder", "file", "FIFO", "link", "folder of another user"])
def test_torch_stays_out_of_what_others_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back at the end
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    usual = tmp_path / f"torchinductor_{getpass.getuser()}"
    if kind in ("our folder", "folder of another user"):
        usual.mkdir()
    elif kind == "file":
        usual.touch()
    elif kind == "FIFO":
        os.mkfifo(usual)
    elif kind == "link":
        usual.symlink_to(tmp_path)
    if kind == "folder of another user":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    keep_torch_out_of_foreign_folders()
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    assert (chosen is None) == (kind in ("nothing", "our folder"))
    assert chosen in (None, str(tmp_path / "home/.cache/torch/inductor"))


def test_a_process_that_watches_its_parent_ends_with_it() -> None:
    child = (
        "import os, time; from specvlm_cli.process import watch_parent; watch_parent(os.getppid());"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    starter = (
        "import subprocess, sys, threading;"
        f"start = lambda: made.append(subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE));"
        "made = []; thread = threading.Thread(target=start); thread.start(); thread.join();"
        "print(int(made[0].stdout.readline()), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        watching = Path("/proc", str(int(process.stdout.readline())))
        time.sleep(1.5)
        assert watching.exists()  # although the thread that started it has ended
        process.kill()
    for _ in range(300):
        if not watching.exists() or watching.joinpath("stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it is still there")
