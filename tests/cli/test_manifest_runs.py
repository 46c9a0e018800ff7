"""Runs over manifests: rows in, rows out; what changes between starts; parts, prompts and columns of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows


@pytest.fixture
def manifest(videos: Path) -> Path:
    """A manifest beside the videos, with ids, parts, a column to keep, and two rows that name nothing."""
    return write(
        videos / "clips.jsonl",
        [
            {"id": "one", "video": "a.mp4", "source": "x"},
            {"id": "two", "video": "a.mp4", "start": 1, "end": "0:02", "source": "y"},
            {"id": "three", "video": "more/d.mkv", "source": None},
            {"id": "four", "video": None},
            {"id": "five", "video": "b.webm", "start": 9, "end": 3},
        ],
    )


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_row_comes_out_once(specvlm: Specvlm, manifest: Path, out: Path) -> None:
    result = specvlm("caption", manifest, "-o", out, "--keep-columns", "source")
    assert result.code == 3
    found = {row["id"]: row for row in rows(out)}
    assert {key: row["source"] for key, row in found.items()} == {"one": "x", "two": "y", "three": None}
    assert (found["two"]["start"], found["two"]["end"]) == (1.0, 2.0)
    failed = {row["id"]: row for row in rows(out, "failures")}
    assert set(failed) == {"four", "five"}
    assert {(row["stage"], row["error_type"]) for row in failed.values()} == {("open", "BadInput")}
    assert "line 4" in failed["four"]["error"]
    again = specvlm("caption", manifest, "-o", out, "--keep-columns", "source")
    assert (again.code, "nothing to do: 3 done, 2 failed" in again.err) == (0, True)


def test_a_row_that_was_mended_is_tried(specvlm: Specvlm, manifest: Path, out: Path) -> None:
    specvlm("caption", manifest, "-o", out)
    manifest.write_text(manifest.read_text().replace('"video": null', '"video": "c.MP4"'))
    assert specvlm("caption", manifest, "-o", out).code == 3
    assert {row["id"] for row in rows(out)} == {"one", "two", "three", "four"}
    assert {row["id"] for row in rows(out, "failures")} == {"five"}


def test_rows_may_come_go_and_change_places(specvlm: Specvlm, videos: Path, out: Path) -> None:
    clips = videos / "clips.csv"
    clips.write_text("id,path\none,a.mp4\ntwo,b.webm\n")
    specvlm("caption", clips, "-o", out)
    clips.write_text("id,path\nthree,c.MP4\ntwo,b.webm\n")
    assert specvlm("caption", clips, "-o", out).code == 0
    assert sorted(row["id"] for row in rows(out)) == ["one", "three", "two"]
    assert len(specvlm.engine.captioned) == 3


def test_prompts_of_their_own(specvlm: Specvlm, videos: Path, out: Path) -> None:
    clips = write(
        videos / "clips.jsonl",
        [
            {"id": "one", "video": "a.mp4", "prompt": "first"},
            {"id": "two", "video": "b.webm", "prompt": ["first", "second"]},
            {"id": "three", "video": "c.MP4"},
        ],
    )
    assert specvlm("caption", clips, "-o", out, "--prompt", "of the run").code == 0
    asked = {(row["id"], row["prompt_index"]): row["prompt"] for row in rows(out)}
    assert asked == {
        ("one", 0): "first",
        ("two", 0): "first",
        ("two", 1): "second",
        ("three", 0): "of the run",
    }


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_prompt_that_changed_is_no_silent_mixture(
    specvlm: Specvlm, videos: Path, out: Path, rebuild: bool
) -> None:
    clips = write(videos / "clips.jsonl", [{"id": "one", "video": "a.mp4", "prompt": "first, ü"}])
    specvlm("caption", clips, "-o", out)
    if rebuild:
        (out / ".specvlm" / "state-00000.db").unlink()
        assert specvlm("caption", clips, "-o", out).code == 0, "the same prompt, as the parts say"
    write(clips, [{"id": "one", "video": "a.mp4", "prompt": "second"}])
    refused = specvlm("caption", clips, "-o", out)
    assert (refused.code, "has another prompt in the manifest" in refused.err) == (2, True)
    assert specvlm("caption", clips, "-o", out, "--on-config-change", "reuse").code == 0
    assert [row["prompt"] for row in rows(out)] == ["first, ü"]
    assert specvlm("caption", clips, "-o", out, "--overwrite").code == 0
    assert [row["prompt"] for row in rows(out)] == ["second"]
    assert specvlm("caption", clips, "-o", out).code == 0


def test_a_prompt_of_one_row_that_cannot_be_used_is_its_failure(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    (videos / "a.mp4").write_text("prompt")
    clips = write(
        videos / "clips.jsonl",
        [{"video": "a.mp4", "prompt": "bad"}, {"video": "b.webm", "prompt": "good"}],
    )
    assert specvlm("caption", clips, "-o", out).code == 3
    (row,) = rows(out, "failures")
    assert (row["stage"], row["error_type"]) == ("preprocess", "PromptError")


def test_kept_columns_are_those_of_the_first_start(specvlm: Specvlm, manifest: Path, out: Path) -> None:
    keep = ["--keep-columns", "source"]
    specvlm("caption", manifest, "-o", out, *keep, "--limit", 1)
    refused = specvlm("caption", manifest, "-o", out, "--keep-columns", "source,id")
    assert refused.code == 2
    assert specvlm("caption", manifest, "-o", out).code == 3, "a start may leave them out"
    (out / ".specvlm" / "state-00000.db").unlink()
    assert specvlm("caption", manifest, "-o", out, *keep).code in (0, 3)
    table = pq.read_table(out / "captions")
    assert table.column_names[-1] == "source"
    assert len(table) == 3


def test_standard_input(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "list"
    listing.write_text("a.mp4\nmore/d.mkv\na.mp4\n\nhttp://127.0.0.1/x.mp4\n")
    monkeypatch.chdir(videos)
    with listing.open("rb") as stdin:
        monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": stdin})())
        assert specvlm("caption", "-", "-o", out).code == 3
    assert sorted(Path(row["path"]).name for row in rows(out)) == ["a.mp4", "d.mkv"]
    (row,) = rows(out, "failures")
    assert row["error_type"] == "BadInput"


def test_shards_of_a_manifest(specvlm: Specvlm, manifest: Path, out: Path) -> None:
    for index in range(3):
        specvlm("caption", manifest, "-o", out, "--shard", f"{index}/3")
    assert sorted(row["id"] for row in rows(out)) == ["one", "three", "two"]
    assert sorted(row["id"] for row in rows(out, "failures")) == ["five", "four"]


def test_files_that_are_still_being_written_wait(specvlm: Specvlm, videos: Path, out: Path) -> None:
    result = specvlm("caption", videos, "-o", out, "--min-age", "1h")
    assert (result.code, rows(out)) == (0, [])
    assert "4 files left for the next start" in result.err
    assert specvlm("caption", videos, "-o", out).code == 0
    invariants.check(out, videos)


def test_times_that_were_corrected_are_followed_or_refused(specvlm: Specvlm, videos: Path, out: Path) -> None:
    clips = videos / "clips.csv"
    clips.write_text("id,path,start,end\none,a.mp4,0,1\ntwo,b.webm,0,1\n")
    specvlm("caption", clips, "-o", out, "--limit", 1)
    clips.write_text("id,path,start,end\none,a.mp4,0,1\ntwo,b.webm,1,2\n")
    assert specvlm("caption", clips, "-o", out).code == 0
    assert {row["id"]: (row["start"], row["end"]) for row in rows(out)} == {"one": (0, 1), "two": (1, 2)}
    clips.write_text("id,path,start,end\none,a.mp4,1,2\ntwo,b.webm,1,2\n")
    refused = specvlm("caption", clips, "-o", out)
    assert (refused.code, "id 'one' has another start or end" in refused.err) == (2, True)
    assert specvlm("caption", clips, "-o", out, "--overwrite").code == 0
    assert {row["id"]: (row["start"], row["end"]) for row in rows(out)} == {"one": (1, 2), "two": (1, 2)}


def test_an_impossible_time_fails_its_row_alone(specvlm: Specvlm, videos: Path, out: Path) -> None:
    clips = videos / "clips.csv"
    clips.write_text("path,start\na.mp4,\nb.webm,1200000000\n")
    assert specvlm("caption", clips, "-o", out).code == 3
    (row,) = rows(out, "failures")
    assert row["error_type"] == "BadInput"
    assert len(rows(out)) == 1


def test_a_row_that_was_spoilt_meanwhile_fails(specvlm: Specvlm, videos: Path, out: Path) -> None:
    clips = write(
        videos / "clips.jsonl", [{"id": name, "video": "a.mp4"} for name in ("one", "two", "three")]
    )
    specvlm("caption", clips, "-o", out, "--limit", 1)
    write(clips, [{"id": "one", "video": "a.mp4"}, {"id": "two", "video": ""}])
    result = specvlm("caption", clips, "-o", out)
    assert (result.code, "1 done, 1 failed, 0 to do" in result.err) == (3, True)


def test_bad_rows_are_told_and_count_as_failures(specvlm: Specvlm, manifest: Path, out: Path) -> None:
    planned = specvlm("caption", manifest, "-o", out, "-n")
    assert planned.out.splitlines()[1].endswith("a.mp4\t1\t2")
    assert planned.err.count("would fail: clips.jsonl line") == 2
    stopped = specvlm("caption", manifest, "-o", out, "--fail-fast", "--json")
    assert stopped.code == 4
    assert stopped.json["figures"]["failures_by_kind"] == {"open:BadInput": 2}
    assert stopped.err.count("failed: ") >= 2


def test_kept_columns_stay_in_their_order_and_empty_cells_are_null(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    clips = videos / "clips.csv"
    clips.write_text("path,zeta,alpha\na.mp4,1,\n")
    specvlm("caption", clips, "-o", out, "--keep-columns", "zeta,alpha")
    table = pq.read_table(out / "captions")
    assert table.column_names[-2:] == ["zeta", "alpha"]
    assert (rows(out)[0]["zeta"], rows(out)[0]["alpha"]) == ("1", None)
