"""Files in folders that somebody else may write into: links, FIFOs and second names are refused, and not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specvlm_cli import safe_files
from specvlm_cli.safe_files import (
    UnsafeFileError,
    new_file,
    open_lock,
    open_regular,
    read_whole,
    require_file,
)


def _link(path: Path) -> None:
    path.with_name("other").write_text("precious")
    path.symlink_to("other")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


ODD: dict[str, Callable[[Path], Any]] = {
    "link": _link,
    "dangling link": _dangling,
    "FIFO": os.mkfifo,
    "folder": os.mkdir,
}


@pytest.mark.parametrize("use", [open_regular, read_whole, open_lock, require_file])
@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str, use: Callable[[Path], Any]) -> None:
    path = tmp_path / "it"
    ODD[kind](path)
    with pytest.raises(UnsafeFileError, match=f"{path}: (a link|not a regular file); .*move it away"):
        use(path)
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for use in (open_regular, read_whole, require_file):
        with pytest.raises(FileNotFoundError):
            use(tmp_path / "it")
    with open_lock(tmp_path / "it") as lock:
        lock.write("mine")
    assert read_whole(tmp_path / "it") == b"mine"


def test_a_lock_has_no_second_name(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    os.link(tmp_path / "other", tmp_path / "lock")
    with pytest.raises(UnsafeFileError, match="hard link"):
        open_lock(tmp_path / "lock")
    with pytest.raises(UnsafeFileError, match="hard link"):
        require_file(tmp_path / "lock", to_write=True)
    assert read_whole(tmp_path / "lock") == b"precious"  # reading does no harm


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO"])
def test_a_new_file_takes_the_place_of_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    ODD[kind](path)
    with new_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    if kind == "link":
        assert (tmp_path / "other").read_text() == "precious"


def test_a_file_is_read_whole_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_files, "MOST_BYTES", 3)
    (tmp_path / "it").write_bytes(b"abc")
    assert read_whole(tmp_path / "it") == b"abc"
    (tmp_path / "it").write_bytes(b"abcd")
    with pytest.raises(UnsafeFileError, match="larger than"):
        read_whole(tmp_path / "it")
