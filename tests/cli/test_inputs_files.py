"""INPUT arguments that name files: folders, videos, globs; and what is left out of them."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import InputOptions, Inputs, Item, item_id
from specvlm_cli.inputs.options import MOST_NAMED
from specvlm_cli.run.shard import Shard


def found(*inputs: object, **options: Any) -> list[Item]:
    return list(Inputs([str(one) for one in inputs], InputOptions(**options)))


def names(folder: Path, *inputs: object, **options: Any) -> list[str]:
    """Return what was found, relative to `folder`."""
    return [
        os.fsdecode(os.path.relpath(item.path, os.fsencode(folder))) for item in found(*inputs, **options)
    ]


def test_id_is_sha1_of_relative_path_start_and_end() -> None:
    assert item_id(b"a/b.mp4") == hashlib.sha1(b"a/b.mp4\0\0").hexdigest()
    assert item_id(b"a/b.mp4", 1, 2.5) == hashlib.sha1(b"a/b.mp4\x001.0\x002.5").hexdigest()
    assert len({item_id(b"a", 1, None), item_id(b"a", None, 1), item_id(b"a")}) == 3


def test_folder_is_searched_below_and_by_extension(videos: Path) -> None:
    assert names(videos, videos) == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv"]
    assert names(videos, videos, recursive=False) == ["a.mp4", "b.webm", "c.MP4"]
    assert names(videos, videos, extensions=("txt",)) == ["notes.txt"]
    assert [item.id for item in found(videos)][-1] == item_id(b"more/d.mkv")


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


def test_a_folder_is_below_its_real_place(videos: Path) -> None:
    (videos.parent / "link").symlink_to(videos)
    assert found(videos.parent / "link") == found(videos)


def test_glob_is_relative_to_its_fixed_folder(videos: Path) -> None:
    assert names(videos, videos / "*.mp4") == ["a.mp4"]
    assert names(videos, videos / "**" / "*") == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv"]
    (item,) = found(videos / "mo*" / "d.*")
    assert item.id == item_id(b"more/d.mkv")


def test_inputs_follow_each_other_and_nothing_is_held_against_doubles(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(videos)
    assert names(videos, "more/../a.mp4", "more", "./a.mp4") == ["a.mp4", "more/d.mkv", "a.mp4"]
    assert {item.path for item in found("a.mp4", "./a.mp4")} == {os.fsencode(videos / "a.mp4")}


def test_a_glob_character_may_be_part_of_a_name(videos: Path) -> None:
    (videos / "[1].mp4").write_text("video")
    assert names(videos, videos / "[1].mp4") == ["[1].mp4"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere.mp4", "no such file or folder"),
        ("nowhere.csv", "no such file or folder"),
        ("", "no such file or folder"),
        ("*.nothing", "matches nothing"),
        ("*.txt", "none with a video extension"),
        ("*.csv", "manifests by name"),
        ("https://example.org/v.mp4?x=*", "remote addresses are not read"),
        ("s3://bucket/list.parquet", "remote addresses are not read"),
        ("list.csv.gz", "packed manifests are not read"),
        ("list.tsv", r"give it as \.parquet, \.csv or \.jsonl"),
        ("fifo.csv", "is no file"),
    ],
)
def test_wrong_inputs_say_why_before_any_work(
    videos: Path, monkeypatch: pytest.MonkeyPatch, given: str, reason: str
) -> None:
    monkeypatch.chdir(videos)
    for name in ("list.csv", "list.csv.gz", "list.tsv"):
        (videos / name).write_text("path\na.mp4\n")
    os.mkfifo(videos / "fifo.csv")
    with pytest.raises(UsageError, match=reason) as caught:
        Inputs([given])
    assert clean(str(caught.value)) == str(caught.value)


def test_a_folder_may_be_called_like_a_manifest(videos: Path) -> None:
    videos.rename(videos.with_name("clips.parquet"))
    assert len(found(videos.with_name("clips.parquet"))) == 4


def test_protocols_of_decoders_are_names_of_files(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(videos)
    (videos / "concat:a.mp4").write_text("video")
    (item,) = found("concat:a.mp4")
    assert item.path == os.fsencode(videos / "concat:a.mp4")


def test_a_link_to_nothing_is_a_video_that_will_fail(videos: Path) -> None:
    (videos / "z.mp4").symlink_to("nowhere")
    assert names(videos, videos)[-2:] == ["z.mp4", "more/d.mkv"]
    assert names(videos, videos / "z.mp4") == ["z.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed_is_reported(videos: Path) -> None:
    (videos / "more").chmod(0)
    inputs = Inputs([str(videos)])
    assert len(list(inputs)) == 3
    (videos / "more").chmod(0o700)
    assert "Permission denied" in inputs.report.unreadable[0]


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
    inputs = Inputs([str(videos)])
    paths = [os.path.relpath(os.fsdecode(item.path), videos) for item in inputs]
    assert paths == ["a.mp4", "b.webm", "c.MP4", "loop.mp4", "shut.mp4", "more/d.mkv"]
    assert inputs.report.unreadable == [
        f"{videos}/loop: Too many levels of symbolic links",
        f"{videos}/to: Permission denied",
    ]


def test_only_the_first_unreadable_folders_are_named(videos: Path) -> None:
    for number in range(MOST_NAMED + 7):
        (videos / f"loop{number}").symlink_to(f"loop{number}")
    inputs = Inputs([str(videos)])
    assert len(list(inputs)) == 4
    assert (len(inputs.report.unreadable), inputs.report.more_unreadable) == (MOST_NAMED, 7)


def test_a_folder_that_has_gone_is_reported(videos: Path) -> None:
    inputs = Inputs([str(videos)])
    videos.rename(videos.with_name("elsewhere"))
    assert list(inputs) == []
    assert inputs.report.unreadable == [f"{videos}/: No such file or directory"]


def test_names_may_be_any_bytes(videos: Path) -> None:
    name = b"\xff\xfe \x1b[31m\n.mp4"
    (videos / os.fsdecode(name)).write_text("video")
    assert os.fsencode(videos) + b"/" + name in [item.path for item in found(videos)]


def test_young_files_are_left_for_the_next_run(videos: Path) -> None:
    now = time.time()
    for name in ("a.mp4", "more/d.mkv"):
        os.utime(videos / name, (now - 100, now - 100))
    (videos / "z.mp4").symlink_to("nowhere")
    inputs = Inputs([str(videos)], InputOptions(min_age_s=60.0))
    assert [os.path.basename(item.path) for item in inputs] == [b"a.mp4", b"z.mp4", b"d.mkv"]
    assert inputs.report.too_young == 2


def test_shards_share_the_videos(videos: Path) -> None:
    shards = [Inputs([str(videos)], InputOptions(shard=Shard(index, 3))) for index in range(3)]
    ours = [{item.id for item in inputs} for inputs in shards]
    assert sum(map(len, ours)) == 4
    assert set.union(*ours) == {item.id for item in found(videos)}
    assert [inputs.report.other_shards for inputs in shards] == [4 - len(ids) for ids in ours]


@pytest.mark.parametrize("option", ["path_column", "id_column", "prompt_column", "keep_columns"])
def test_columns_are_refused_where_there_is_no_manifest(videos: Path, option: str) -> None:
    asked = ("speaker",) if option == "keep_columns" else "speaker"
    with pytest.raises(UsageError, match="speaker has no manifest to go with"):
        Inputs([str(videos)], InputOptions(**{option: asked}))


def test_a_text_file_is_a_list_of_paths_below_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "night.TXT").write_bytes(b"\xef\xbb\xbfa b.mp4\r\n\r\n../up.mkv\r\n/abs/c.mp4")
    inputs = Inputs([str(folder / "night.TXT")])
    assert [item.path for item in inputs] == [
        os.fsencode(folder / "a b.mp4"),
        os.fsencode(tmp_path / "up.mkv"),
        b"/abs/c.mp4",
    ]
    assert inputs.report.empty == []


def test_a_list_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match="is no file; give a list that is one"):
        Inputs([str(tmp_path / "pipe.txt")])


def test_parquet_parts_in_a_folder_or_by_a_glob_are_one_manifest(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (2, 0, 1):
        table = pa.table({"path": [f"{number}.mp4"], "mood": [number]})
        pq.write_table(table, parts / f"train-{number}.parquet")
    pq.write_table(
        pa.table({"path": pa.array([], pa.string()), "mood": pa.array([], pa.int64())}), parts / "z.parquet"
    )
    (parts / "README.md").write_text("not one of them")
    (parts / ".hidden.parquet").write_text("neither")
    options = InputOptions(keep_columns=("mood",))
    for given in (str(parts), f"{parts}/*.parquet"):
        inputs = Inputs([given], options)
        assert inputs.kept == {"mood": "int64"}
        items = list(inputs)
        assert [item.path for item in items] == [os.fsencode(parts / f"{n}.mp4") for n in range(3)]
        assert [item.kept for item in items] == [f'{{"mood":{n}}}' for n in range(3)]
        assert inputs.report.empty == []
    (parts / "film.webm").write_text("a video")
    assert [item.path for item in Inputs([str(parts)])] == [os.fsencode(parts / "film.webm")]
