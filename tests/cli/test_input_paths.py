"""`input_path` and kept columns in captions and failures; which paths an export names."""

from __future__ import annotations

import io
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specvlm_cli.inputs import InputOptions, Inputs
from specvlm_cli.run.parts import CAPTION_SCHEMA, FAILURE_SCHEMA
from tests.cli.conftest import Specvlm, rows


@pytest.fixture
def here(videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(videos.parent)
    return videos


def written(*given: str, stdin: bytes = b"") -> list[bytes | None]:
    return [item.input_path for item in Inputs(given, InputOptions(), io.BytesIO(stdin))]


def manifest(folder: Path, *lines: dict[str, Any], name: str = "clips.jsonl") -> Path:
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("videos", ["videos/a.mp4", "videos/b.webm", "videos/c.MP4", "videos/more/d.mkv"]),
        ("./videos/more/", ["./videos/more/d.mkv"]),
        ("videos/a.mp4", ["videos/a.mp4"]),
        ("videos/*.mp4", ["videos/a.mp4"]),
        ("./videos/**/*.mkv", ["./videos/more/d.mkv"]),
    ],
)
def test_a_path_is_kept_as_it_was_given(here: Path, given: str, expected: list[str]) -> None:
    assert written(given) == [os.fsencode(one) for one in expected]
    absolute = f"{here.parent}/{given.removeprefix('./')}"
    assert written(absolute) == [os.fsencode(f"{here.parent}/{one.removeprefix('./')}") for one in expected]


def test_lists_and_manifests_are_taken_literally(here: Path) -> None:
    assert written("-", stdin=b"videos/../videos/a.mp4\n./x \xff.mp4\n") == [
        b"videos/../videos/a.mp4",
        b"./x \xff.mp4",
    ]
    clips = manifest(here, {"video": "../videos/a.mp4"}, {"video": str(here / "a.mp4"), "start": 1, "end": 2})
    assert written(str(clips)) == [b"../videos/a.mp4", os.fsencode(here / "a.mp4")]


def test_rows_and_failures_join_with_the_manifest(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "b.webm").write_text("text")
    lines = [
        {"video": "./a.mp4", "score": 1, "error": "mine"},
        {"video": "./b.webm", "score": 2, "error": "mine too"},
        {"video": "more/d.mkv", "score": 3, "start": 9, "end": 1},
        {"video": "https://x/y.mp4", "score": 4},
        {"video": None, "score": 5},
        {"video": 17, "score": 6},
        {"video": "n\x00l.mp4", "score": 7},
    ]
    clips = manifest(videos, *lines)
    assert specvlm("caption", clips, "-o", out, "--keep-columns", "score,error").code == 3
    (row,) = rows(out)
    assert (row["input_path"], row["score"], row["error"]) == ("./a.mp4", "1", "mine")
    failed = {row["score"]: row for row in rows(out, "failures")}
    assert {score: row["input_path"] for score, row in failed.items()} == {
        "2": "./b.webm",
        "3": "more/d.mkv",
        "4": "https://x/y.mp4",
        "5": None,
        "6": "17",
        "7": "n\x00l.mp4",
    }
    assert failed["2"]["input_error"] == "mine too"
    assert failed["2"]["error_type"] == "NotAVideoError"
    assert {row["error_type"] for score, row in failed.items() if score != "2"} == {"BadInput"}
    schema = pq.read_schema(out / "failures/part-00000.parquet")
    assert schema.names == [*FAILURE_SCHEMA.names, "score", "input_error"]
    assert set(json.loads(schema.metadata[b"huggingface"])["info"]["features"]) == set(schema.names)
    assert specvlm("status", out, "--verify").code == 0


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_columns_of_our_names_are_kept_under_another(
    specvlm: Specvlm, videos: Path, out: Path, kind: str
) -> None:
    table = pa.table(
        {"video": ["a.mp4"], "caption": ["old"], "input_caption": ["older"], "id": ["x"], "n": ["1"]}
    )
    clips = videos / f"clips.{kind}"
    if kind == "parquet":
        pq.write_table(table, clips)
    elif kind == "csv":
        clips.write_text("video,caption,input_caption,id,n\na.mp4,old,older,x,1\n")
    else:
        manifest(videos, table.to_pylist()[0])
    result = specvlm("caption", clips, "-o", out, "--keep-columns", "n,caption,input_caption,id")
    assert result.code == 0
    assert (
        "--keep-columns caption: a row has a caption of its own, so it is called input_input_caption"
        in result.err
    )
    (row,) = rows(out)
    ours = {"n": "1", "input_input_caption": "old", "input_caption": "older", "input_id": "x"}
    assert {name: row[name] for name in ours} == ours
    assert (row["id"], row["caption"]) == ("x", "a caption of video a.mp4")
    names = pq.read_schema(out / "captions/part-00000-00000.parquet").names
    assert names == [*CAPTION_SCHEMA.names, "n", "input_input_caption", "input_caption", "input_id"]
    assert specvlm("caption", clips, "-o", out, "--keep-columns", "n,caption,input_caption,id").code == 0


def test_no_column_is_lost_with_the_ledger_or_by_dividing_anew(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    (videos / "b.webm").write_text("text")
    clips = manifest(videos, {"video": "a.mp4", "at": "x"}, {"video": "b.webm", "at": "y"}, {"at": "z"})
    specvlm("caption", clips, "-o", out, "--keep-columns", "at")
    kept = [{**row, "at": None} for row in rows(out, "failures")]
    assert sorted((row["input_path"] or "", row["input_at"]) for row in kept) == [("", "z"), ("b.webm", "y")]
    (out / ".specvlm/state-00000.db").unlink()
    manifest(videos, {"video": "a.mp4", "at": "x"})
    assert specvlm("caption", clips, "-o", out, "--keep-columns", "at", "--overwrite").code in (0, 3)
    assert [{**row, "at": None} for row in rows(out, "failures")] == kept
    assert (
        specvlm("caption", clips, "-o", out, "--shard", "0/2", "--reshard", "--keep-columns", "at").code == 0
    )
    assert [{**row, "at": None} for row in rows(out, "failures")] == kept
    assert [row["input_path"] for row in rows(out)] == ["a.mp4"]


def test_a_failure_of_a_row_follows_the_manifest(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "a.mp4").write_text("text")
    clips = manifest(videos, {"video": "a.mp4", "mine": "x"})
    specvlm("caption", clips, "-o", out, "--keep-columns", "mine")
    manifest(videos, {"video": "./a.mp4", "mine": "y"})
    specvlm("caption", clips, "-o", out, "--keep-columns", "mine", "--retry-failed")
    (failed,) = rows(out, "failures")
    assert (failed["input_path"], failed["mine"]) == ("./a.mp4", "y")


# Exports


def exported(specvlm: Specvlm, out: Path, dest: Path, *flags: str) -> tuple[list[Any], list[Any]]:
    assert specvlm("export", out, dest, *flags).code == 0
    return tuple(pq.read_table(dest / name).to_pylist() for name in ("data", "failures"))  # type: ignore[return-value]


def test_the_three_kinds_of_paths(specvlm: Specvlm, here: Path, out: Path, tmp_path: Path) -> None:
    (here / "more/e.mp4").write_text("text")
    specvlm("caption", "./videos", "-o", out)
    found = {}
    for how in ("relative", "absolute", "input"):
        captions, failures = exported(specvlm, out, tmp_path / how, "--paths", how)
        found[how] = [(row["path"], row["input_path"]) for row in (*captions, *failures)]
    assert [path for path, _ in found["relative"]] == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv", "more/e.mp4"]
    below = [path for path, _ in found["relative"]]
    assert [path for path, _ in found["absolute"]] == [str(here / one) for one in below]
    assert found["input"] == [(f"./videos/{one}", f"./videos/{one}") for one in below]
    assert all(
        written == f"./videos/{one}"
        for how in found
        for one, (_, written) in zip(below, found[how], strict=True)
    )
    captions, _ = exported(specvlm, out, tmp_path / "by default")
    assert [row["path"] for row in captions] == below[:4]


def everything(folder: Path) -> str:
    """Return all that an export says, as text."""
    said = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.is_file() and not path.is_symlink():
            table = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else path.read_bytes()
            said += [
                path.name,
                str(table),
                str(pq.read_schema(path).metadata) if path.suffix == ".parquet" else "",
            ]
    return "\n".join(said)


@pytest.mark.parametrize("dest", ["folder", "one.parquet", "one.jsonl", "one.csv"])
@pytest.mark.parametrize("ids", ["own", "made"])
@pytest.mark.parametrize("paths", ["absolute", "above", "elsewhere", "relative"])
def test_an_export_names_no_folder_of_this_machine(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path, dest: str, ids: str, paths: str
) -> None:
    (videos / "b.webm").write_text("text")
    (tmp_path / "lists").mkdir()
    begin = {"absolute": f"{videos}/", "above": "../videos/", "elsewhere": f"{videos}/", "relative": ""}[
        paths
    ]
    folder = videos if paths == "relative" else tmp_path / "lists"
    lines = [{"video": f"{begin}{name}"} for name in ("a.mp4", "b.webm", "more/d.mkv")]
    if paths == "elsewhere":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/z.mp4").write_text("video z")
        lines.append({"video": f"{tmp_path}/elsewhere/z.mp4"})
    if ids == "own":
        lines = [line | {"id": str(number)} for number, line in enumerate(lines)]
    assert specvlm("caption", manifest(folder, *lines), "-o", out).code == 3
    with closing(sqlite3.connect(out / ".specvlm/state-00000.db")) as database, database:
        database.execute(
            "UPDATE item SET error = 'cannot open ' || CAST(path AS TEXT) WHERE state = 'failed'"
        )
        sql = "UPDATE caption SET row = json_set(row, '$.target_model', ?, '$.draft_model', ?)"
        database.execute(sql, (f"{tmp_path}/models/target", f"{tmp_path}/models/draft/"))
    run = json.loads((out / ".specvlm/run.json").read_text())
    run["settings"]["target"] = f"{tmp_path}/models/target"
    (out / ".specvlm/run.json").write_text(json.dumps(run))
    place = tmp_path / dest
    assert specvlm("export", out, place).code == 0
    said = everything(place)
    assert "d.mkv" in said
    assert str(tmp_path) not in said
    assert tmp_path.name not in said
    if dest == "folder":
        captions, failures = (
            pq.read_table(place / "data").to_pylist(),
            pq.read_table(place / "failures").to_pylist(),
        )
        begin = "videos/" if paths == "elsewhere" else ""
        assert {row["path"] for row in captions} >= {f"{begin}a.mp4", f"{begin}more/d.mkv"}
        assert {row["input_path"] for row in captions} >= {f"{begin}a.mp4", f"{begin}more/d.mkv"}
        assert [(row["path"], row["error"]) for row in failures] == [
            (f"{begin}b.webm", f"cannot open {begin}b.webm")
        ]
        assert (captions[0]["target_model"], captions[0]["draft_model"]) == ("target", "draft")
    assert specvlm("export", out, place, "--overwrite", "--paths", "absolute").code == 0
    assert str(videos / "a.mp4") in everything(place)


@pytest.mark.parametrize("format_", ["videofolder", "txt", "srt"])
def test_folders_with_videos_or_texts_name_none_either(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path, format_: str
) -> None:
    (videos / "b.webm").write_text("text")
    specvlm("caption", videos, "-o", out)
    assert specvlm("export", out, tmp_path / "dest", "--format", format_).code == 0
    said = everything(tmp_path / "dest")
    assert str(tmp_path) not in said
    assert "a.mp4" in said or format_ != "videofolder"
    assert specvlm("export", out, tmp_path / "dest", "--format", format_, "--overwrite").code == 0


def test_two_inputs_have_paths_below_each(specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/z.mp4").write_text("video z")
    specvlm("caption", videos, tmp_path / "others", "-o", out)
    captions, _ = exported(specvlm, out, tmp_path / "dest")
    assert sorted(row["path"] for row in captions) == ["a.mp4", "b.webm", "c.MP4", "more/d.mkv", "z.mp4"]


def test_a_name_that_is_not_utf8(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xff.mp4"), "w") as file:
        file.write("video odd")
    specvlm("caption", os.fsdecode(folder), "-o", out)
    (row,) = rows(out)
    assert row["input_path"] == row["path"] == f"file://{tmp_path}/odd/%FF.mp4"
    captions, _ = exported(specvlm, out, tmp_path / "dest")
    assert (captions[0]["path"], captions[0]["input_path"]) == ("file://%FF.mp4", "file://%FF.mp4")
