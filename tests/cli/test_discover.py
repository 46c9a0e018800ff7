"""INPUT arguments to videos."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from specvlm_cli.discover import discover
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import item_id


def names(folder: Path, *inputs: object, **options: bool) -> list[str]:
    """Return what was found, relative to `folder`."""
    found = discover([str(one) for one in inputs], **options)
    return [os.fsdecode(os.path.relpath(item.path, os.fsencode(folder))) for item in found.items]


def test_id_is_sha1_of_relative_path_start_and_end() -> None:
    assert item_id(b"a/b.mp4") == hashlib.sha1(b"a/b.mp4\0\0").hexdigest()
    assert item_id(b"a/b.mp4", 1, 2.5) == hashlib.sha1(b"a/b.mp4\x001.0\x002.5").hexdigest()
    assert len({item_id(b"a", 1, None), item_id(b"a", None, 1), item_id(b"a")}) == 3


def test_folder_is_searched_below_and_by_extension(videos: Path) -> None:
    assert names(videos, videos) == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv"]
    assert names(videos, videos, recursive=False) == ["a.mp4", "b.webm", "c.MP4"]
    assert [item.path for item in discover([str(videos)], extensions=["txt"]).items] == [
        os.fsencode(videos / "notes.txt")
    ]


def test_hidden_files_and_folders_are_left_out(videos: Path) -> None:
    (videos / "._a.mp4").write_text("what macOS leaves beside a.mp4")
    (videos / ".trash").mkdir()
    (videos / ".trash" / "x.mp4").write_text("thrown away")
    assert names(videos, videos) == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv"]
    assert names(videos, videos / "._a.mp4") == ["._a.mp4"]


def test_links_to_folders_are_followed_once(videos: Path) -> None:
    (videos / "more" / "up").symlink_to(videos)
    (videos / "again").symlink_to(videos / "more")
    assert names(videos, videos) == ["a.mp4", "b.webm", "c.MP4", "again/d.mkv"]


def test_glob_is_relative_to_its_fixed_folder(videos: Path) -> None:
    assert names(videos, videos / "*.mp4") == ["a.mp4"]
    assert names(videos, videos / "**" / "*") == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv"]
    (item,) = discover([str(videos / "mo*" / "d.*")]).items
    assert item.id == item_id(b"more/d.mkv")


def test_the_same_video_is_found_once(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(videos)
    assert names(videos, "a.mp4", videos, "./a.mp4", "more/../a.mp4", "*.mp4") == [
        "a.mp4",
        "b.webm",
        "c.MP4",
        "more/d.mkv",
    ]


def test_two_videos_with_one_id_are_refused(videos: Path) -> None:
    (videos / "more" / "a.mp4").write_text("another one")
    with pytest.raises(UsageError, match="so one id"):
        discover([str(videos / "a.mp4"), str(videos / "more" / "a.mp4")])


def test_a_glob_character_may_be_part_of_a_name(videos: Path) -> None:
    (videos / "[1].mp4").write_text("video")
    assert names(videos, videos / "[1].mp4") == ["[1].mp4"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere.mp4", "no such file or folder"),
        ("", "no such file or folder"),
        ("*.nothing", "matches nothing"),
        ("*.txt", "none with a video extension"),
        ("https://example.org/v.mp4?x=*", "remote addresses are not read"),
        ("list.csv", "manifests are not read"),
    ],
)
def test_wrong_inputs_say_why(videos: Path, monkeypatch: pytest.MonkeyPatch, given: str, reason: str) -> None:
    monkeypatch.chdir(videos)
    (videos / "list.csv").write_text("path\na.mp4\n")
    with pytest.raises(UsageError, match=reason):
        discover([given])


def test_a_link_to_nothing_is_a_video_that_will_fail(videos: Path) -> None:
    (videos / "z.mp4").symlink_to("nowhere")
    assert names(videos, videos)[-2:] == ["z.mp4", "more/d.mkv"]
    assert names(videos, videos / "z.mp4") == ["z.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed_is_reported(videos: Path) -> None:
    (videos / "more").chmod(0)
    found = discover([str(videos)])
    (videos / "more").chmod(0o700)
    assert len(found.items) == 3
    assert "Permission denied" in found.unreadable[0]


def test_links_that_cannot_be_looked_at_never_end_the_search(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "loop.mp4").symlink_to("loop.mp4")
    (videos / "loop").symlink_to("loop")
    (videos / "to").symlink_to("more")
    (videos / "shut.mp4").symlink_to("more/d.mkv")
    seen = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if os.fsdecode(path).endswith("/to"):
            raise PermissionError(13, "Permission denied")
        return seen(path, *arguments, **options)

    monkeypatch.setattr("os.stat", stat)
    found = discover([str(videos)])
    paths = [os.path.relpath(os.fsdecode(item.path), videos) for item in found.items]
    assert paths == ["a.mp4", "b.webm", "c.MP4", "loop.mp4", "shut.mp4", "more/d.mkv"]
    assert found.unreadable == [
        f"{videos}/loop: Too many levels of symbolic links",
        f"{videos}/to: Permission denied",
    ]


def test_names_may_be_any_bytes(videos: Path) -> None:
    name = b"\xff\xfe \x1b[31m\n.mp4"
    (videos / os.fsdecode(name)).write_text("video")
    assert os.fsencode(videos) + b"/" + name in [item.path for item in discover([str(videos)]).items]
