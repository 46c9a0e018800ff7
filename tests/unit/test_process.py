"""The environment of our processes in a temp folder that is shared with others."""

from __future__ import annotations

import getpass
import os
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
