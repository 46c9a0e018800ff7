"""Small files that somebody else may have made, and the removal of whatever has a name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specvlm import files
from specvlm.files import open_plain, read_text, remove


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("größer")
    (tmp_path / "here").symlink_to("there")
    assert read_text(tmp_path / "here") == "größer"


@pytest.mark.parametrize("what", ["/dev/zero", "FIFO", "folder"])
def test_what_is_not_a_regular_file_is_not_read(tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(what)
    for use in (open_plain, read_text):
        with pytest.raises(OSError, match="not a regular file"):
            use(path)


def test_a_file_that_would_fill_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 5)
    (tmp_path / "it").write_text("12345")
    assert read_text(tmp_path / "it") == "12345"
    (tmp_path / "it").write_text("123456")
    with pytest.raises(OSError, match="larger than"):
        read_text(tmp_path / "it")


@pytest.mark.parametrize("what", ["file", "folder", "FIFO", "link to a file", "link to a folder", "dangling"])
def test_what_has_a_name_is_removed_and_nothing_else(tmp_path: Path, what: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/diary").write_text("dear diary")
    path = tmp_path / "it"
    match what:
        case "file":
            path.write_text("x")
        case "folder":
            path.mkdir()
            os.mkfifo(path / "pipe")
            (path / "link").symlink_to(tmp_path / "elsewhere")
        case "FIFO":
            os.mkfifo(path)
        case "link to a file":
            path.symlink_to("elsewhere/diary")
        case "link to a folder":
            path.symlink_to("elsewhere")
        case _:
            path.symlink_to("nowhere")
    remove(path)
    assert [one.name for one in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere/diary").read_text() == "dear diary"
