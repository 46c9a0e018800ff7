"""Paths on standard input."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import Inputs, Item, item_id


class Pipe(io.RawIOBase):
    """Gives its content a few bytes at a time, as a pipe may, and counts how much was asked for."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = list(chunks)
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._chunks:
            return 0
        chunk, rest = self._chunks[0][: len(buffer)], self._chunks[0][len(buffer) :]
        self._chunks[:1] = [rest] if rest else []
        buffer[: len(chunk)] = chunk
        self.taken += len(chunk)
        return len(chunk)


def lines(content: bytes) -> list[Item]:
    return list(Inputs(["-"], stdin=io.BytesIO(content)))


@pytest.fixture(autouse=True)
def _in_videos(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(videos)


def test_one_path_a_line_relative_to_the_current_folder(videos: Path) -> None:
    items = lines(b"./a.mp4\n\nmore/d.mkv\n" + os.fsencode(videos / "c.MP4"))
    assert [item.path for item in items] == [
        os.fsencode(videos / name) for name in ("a.mp4", "more/d.mkv", "c.MP4")
    ]
    assert [item.id for item in items] == [item_id(name) for name in (b"a.mp4", b"more/d.mkv", b"c.MP4")]
    assert [item.id for item in items] == [item.id for item in Inputs(["a.mp4", "m*/*", "c.MP4"])]


def test_a_path_outside_has_the_id_of_its_absolute_path(videos: Path) -> None:
    inside, outside = lines(b"more/../a.mp4\n../other//x.mp4\n")
    assert inside.id == item_id(b"a.mp4")
    assert outside.path == os.fsencode(videos.parent / "other" / "x.mp4")
    assert outside.id == item_id(outside.path[1:])


def test_a_nul_anywhere_near_the_beginning_separates(videos: Path) -> None:
    assert [os.path.basename(item.path) for item in lines(b"new\nline.mp4\0\0b.mp4\0")] == [
        b"new\nline.mp4",
        b"b.mp4",
    ]
    piped = io.BufferedReader(Pipe(b"new\nli", b"ne.mp4", b"\0b.mp4\0"))
    assert [os.path.basename(item.path) for item in Inputs(["-"], stdin=piped)] == [
        b"new\nline.mp4",
        b"b.mp4",
    ]


def test_paths_are_bytes_and_kept_as_they_are() -> None:
    assert [os.path.basename(item.path) for item in lines(b"\xff\x1b.mp4\r\n sp ace \nconcat:a.mp4")] == [
        b"\xff\x1b.mp4\r",
        b" sp ace ",
        b"concat:a.mp4",
    ]


def test_what_cannot_be_read_is_an_item_and_the_others_go_on() -> None:
    content = b"https://example.org/\x1bv.mp4\n" + b"x" * 5000 + b"\na.mp4\n"
    address, long, good = lines(content * 3)[:3]
    assert address.problem == (
        r"standard input line 1: https://example.org/\x1bv.mp4: remote addresses are not read; "
        "download the video and give its path"
    )
    assert long.problem is not None
    assert "5000 bytes" in long.problem
    assert (address.path, long.path, good.problem) == (b"", b"", None)
    ids = [item.id for item in lines(content)]
    assert ids == [item.id for item in lines(content)]
    assert len(set(ids)) == 3
    assert lines(b"a.mp4\n" + content)[1].id == address.id


def test_a_late_nul_is_part_of_a_line() -> None:
    items = lines(b"a.mp4\n" * 2000 + b"b\0.mp4\n")
    assert items[-1].problem is not None
    assert "holds a NUL" in items[-1].problem
    assert {item.problem for item in items[:-1]} == {None}


def test_lines_are_read_as_they_are_asked_for() -> None:
    pipe = Pipe(*(b"clip%08d.mp4\n" % number for number in range(20_000)))
    reading = iter(Inputs(["-"], stdin=io.BufferedReader(pipe)))
    assert os.path.basename(next(reading).path) == b"clip00000000.mp4"
    assert pipe.taken < 20_000
    assert sum(1 for _ in reading) == 19_999


@pytest.mark.parametrize("filler", [b"x", b"\xff"])
def test_a_line_without_end_is_refused(filler: bytes) -> None:
    with pytest.raises(UsageError, match="standard input line 2 is longer than"):
        lines(b"a.mp4\n" + filler * 2_000_000)


def test_nuls_alone_name_nothing() -> None:
    assert lines(b"\0" * 3_000_000) == []


def test_stdin_is_read_once() -> None:
    with pytest.raises(UsageError, match="- was given 2 times"):
        Inputs(["-", "a.mp4", "-"])


def test_stdin_that_is_closed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        Inputs(["-"])


class Broken(io.BytesIO):
    """A stream whose device has gone."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


def test_stdin_that_cannot_be_read_says_why() -> None:
    with pytest.raises(UsageError, match="standard input: Input/output error"):
        list(Inputs(["-"], stdin=Broken()))
