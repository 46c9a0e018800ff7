"""`specvlm export`: what is in it, that equal ledgers give equal bytes, that it is all there or not at all."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specvlm_cli.export import lines, parquet, sidecars, staging
from specvlm_cli.export.merge import Index
from specvlm_cli.export.names import Names
from specvlm_cli.inputs.item import item_id
from specvlm_cli.run.ledger_view import LedgerView
from specvlm_cli.run.parts import CAPTION_SCHEMA, FAILURE_SCHEMA, caption_schema
from specvlm_cli.run.view import view
from tests.cli.conftest import Specvlm, snapshot
from tests.cli.made import Video, fill, make_run, videos

ROOT = Path(__file__).parents[2]
FORMATS = ("parquet", "jsonl", "csv", "txt", "srt", "videofolder")


def dest(folder: Path, kind: str) -> Path:
    return folder / (f"dest.{kind}" if kind in ("jsonl", "csv") else f"dest-{kind}")


def digest(path: Path) -> str:
    """Return one hash of a file, or of a folder with all names, links and contents."""
    total = hashlib.sha256()
    for one in sorted([path, *path.rglob("*")]):
        total.update(os.fsencode(one.relative_to(path)) + b"\0")
        if one.is_symlink():
            total.update(os.fsencode(os.readlink(one)))
        elif one.is_file():
            total.update(one.read_bytes())
    return total.hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "_manifest.json").read_text()))


@pytest.fixture
def made(out: Path) -> Path:
    """A run of two shards: whole videos, parts of one, two prompts, a failure, one to do, kept columns."""
    kept = {"topic": "string", "score": "float64", "=cmd": "int64"}
    extra = {"topic": "cats", "score": -1.5, "=cmd": -3}
    first = [
        Video("a", b"/v/x/a.mp4", ("a caption", "another"), row=extra),
        Video("f", b"/v/y/f.mp4", state="failed"),
        Video("w", b"/v/z/w.mp4", state="pending"),
    ]
    second = [
        Video("s1", b"/v/s.mp4", ("first part",), start_s=0.0, end_s=2.5, row=extra),
        Video("s2", b"/v/s.mp4", ("second part",), start_s=2.5, row=extra),
        Video("b", b"/v/x/b.mp4", ('=1+1, "q"\nnew line',), row=extra),
    ]
    return make_run(out, [first, second], kept=kept, count=2)


# What is in it


def test_every_format_of_a_real_run(
    specvlm: Specvlm, request: pytest.FixtureRequest, out: Path, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue("videos")
    (folder / "bad.mp4").write_text("damaged")
    specvlm("caption", folder, "-o", out, "--prompt", "What?", "--prompt", "Where?")
    before = snapshot(out)
    for kind in FORMATS:
        done = specvlm("export", out, dest(tmp_path, kind), "--format", kind)
        assert (done.code, done.out) == (0, "")
        assert "8 captions" in done.err
    captions = pq.read_table(dest(tmp_path, "parquet") / "data").to_pylist()
    assert [row["path"].rpartition("/")[2] for row in captions] == sorted(
        ["a.mp4", "b.webm", "c.MP4", "d.mkv"] * 2, key=lambda name: ("more/" * (name == "d.mkv")) + name
    )
    assert [row["prompt_index"] for row in captions] == [0, 1] * 4
    texts = dest(tmp_path, "txt")
    last = captions[-2:]
    assert [(row["prompt"], row["path"].rpartition("/")[2]) for row in last] == [
        ("What?", "d.mkv"),
        ("Where?", "d.mkv"),
    ]
    assert (texts / "more/d.txt").read_text() == last[0]["caption"] + "\n"
    assert (texts / "more/d.prompt-1.txt").read_text() == last[1]["caption"] + "\n"
    assert (dest(tmp_path, "videofolder") / "videos/more/d.mkv").read_text() == "video more/d.mkv"
    assert snapshot(out) == before


def test_parquet_is_a_dataset_of_the_hub(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "dest"
    assert specvlm("export", made, target).code == 0
    assert files(target) == [
        "README.md",
        "_manifest.json",
        "data/train-00000-of-00001.parquet",
        "failures/train-00000-of-00001.parquet",
    ]
    table = pq.read_table(target / "data/train-00000-of-00001.parquet", page_checksum_verification=True)
    assert (
        table.schema.names == caption_schema({"topic": "string", "score": "float64", "=cmd": "int64"}).names
    )
    assert [(row["id"], row["prompt_index"]) for row in table.to_pylist()] == [
        *(("s1", 0), ("s2", 0), ("a", 0), ("a", 1), ("b", 0)),
    ]
    assert table.column("score").to_pylist() == [-1.5] * 5
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.schema.names
    failed = pq.read_table(target / "failures/train-00000-of-00001.parquet")
    assert failed.schema.names == [*FAILURE_SCHEMA.names, "topic", "score", "=cmd"]
    assert failed.column("id").to_pylist() == ["f"]
    found = manifest(target)
    assert found["counts"] == {
        "captions": 5,
        "failures": 1,
        "videos_captioned": 4,
        "videos_failed": 1,
        "videos_pending": 1,
    }
    for entry in found["files"]:
        content = (target / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)


def test_without_a_failure_there_is_a_table_of_them_without_a_row(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    for which, tables in (("with", ["default", "failures"]), ("without", ["default"])):
        target = tmp_path / which
        found = specvlm("export", out, target, "--failures", which, "--json").json
        assert (found["captions"], found["failures"]) == (4, 0)
        card = (target / "README.md").read_text()
        assert [one["config_name"] for one in yaml.safe_load(card.split("---\n")[1])["configs"]] == tables
        assert (target / "failures").exists() == (which == "with")
        assert ('load_dataset("PATH", "failures", split="train", streaming=True)' in card) == (
            which == "with"
        )
    table = pq.read_table(tmp_path / "with/failures/train-00000-of-00001.parquet")
    assert (table.num_rows, table.schema.names) == (0, FAILURE_SCHEMA.names)
    assert "huggingface" in str(table.schema.metadata)
    assert specvlm("export", out, tmp_path / "texts", "--format", "txt").code == 0
    assert not (tmp_path / "texts/_failures.jsonl").exists()


def test_card_tells_datasets_where_the_tables_are(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "dest"
    specvlm("export", made, target)
    _, head, body = (target / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": ["data/train-*"]}]},
        {"config_name": "failures", "data_files": [{"split": "train", "path": ["failures/train-*"]}]},
    ]
    for config in found["configs"]:
        for pattern in config["data_files"][0]["path"]:
            assert list(target.glob(pattern))
    assert found["size_categories"] == ["n<1K"]
    assert "license" not in found
    for words in ("fake/target", "fake/draft", "    Describe it.", "captions: 5", "videos failed: 1"):
        assert words in body


def test_a_prompt_cannot_write_into_the_card(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    hostile = "Look.\n---\n# Heading\n```\n<script>"
    make_run(out, [[Video("a", b"/v/a.mp4", row={"prompt": hostile, "target_model": "x`y\x1b[0m"})]])
    specvlm("export", out, tmp_path / "dest")
    text = (tmp_path / "dest/README.md").read_text()
    assert len(re.findall("^---$", text, re.MULTILINE)) == 2
    assert "\n    # Heading\n    ```\n    <script>\n" in text
    assert "`x'y\\x1b[0m`" in text


def test_files_of_a_split_hold_so_many_rows(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    make_run(out, [videos(23)], part_rows=0)
    specvlm("export", out, tmp_path / "dest", "--rows-per-file", 10)
    parts = sorted((tmp_path / "dest/data").iterdir())
    assert [part.name for part in parts] == [f"train-0000{n}-of-00003.parquet" for n in range(3)]
    assert [pq.read_metadata(part).num_rows for part in parts] == [10, 10, 3]


def test_nothing_to_export_is_an_empty_dataset(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    make_run(out, [[]])
    for kind in FORMATS:
        assert specvlm("export", out, dest(tmp_path, kind), "--format", kind).code == 0
    assert pq.read_table(tmp_path / "dest-parquet/data").num_rows == 0
    assert (tmp_path / "dest.jsonl").read_text() == ""
    assert (tmp_path / "dest.csv").read_text().startswith("id,path,")


def test_jsonl_holds_text_as_it_is_one_row_a_line(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    texts = ["=1+1", "a\nb\r\nc", 'u2028:\u2028 nel:\x85 nul:\0 q:" \\', "\ud800 lone", "\U0001f600"]
    made = [Video(str(n), b"/v/%d.mp4" % n, (text,), row={"score": -0.5}) for n, text in enumerate(texts)]
    make_run(out, [made], kept={"score": "float64"})
    specvlm("export", out, tmp_path / "dest.jsonl")
    raw = (tmp_path / "dest.jsonl").read_bytes().decode()
    assert len(raw.splitlines()) == len(texts)
    rows = [json.loads(line) for line in raw.splitlines()]
    assert [row["caption"] for row in rows] == [*texts[:3], "\\ud800 lone", texts[4]]
    assert {row["score"] for row in rows} == {-0.5}
    assert rows[0]["acceptance_histogram"] == [0, 1, 2]
    assert list(rows[0]) == [*CAPTION_SCHEMA.names, "score"]


def test_what_json_does_not_have_is_null() -> None:
    row = {"a": float("nan"), "b": [1.0, float("inf")], "c": "\udc80"}
    assert lines.json_line(row) == '{"a":null,"b":[1.0,null],"c":"\\\\x80"}\n'


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_is_quoted_and_defused(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    specvlm("export", made, tmp_path / "dest.csv")
    raw = (tmp_path / "dest.csv").read_bytes()
    assert raw.endswith(b"\r\n")
    rows = read_csv(tmp_path / "dest.csv")
    assert rows[-1]["caption"] == '\'=1+1, "q"\nnew line'
    assert rows[-1]["score"] == "-1.5"
    assert rows[-1]["'=cmd"] == "-3"
    assert rows[-1]["acceptance_histogram"] == "[0, 1, 2]"
    assert (rows[0]["start"], rows[0]["end"], rows[1]["end"]) == ("0.0", "2.5", "")
    assert rows[0]["exact_match"] == ""


@pytest.mark.parametrize(
    "text",
    [
        "=1",
        "+1",
        "-1",
        "@x",
        "\t=1",
        "\rx",
        "\nx",
        '"=1',
        "'=1",
        " =1",
        "\u00a0@x",
        '" -x',
        "\uff1d1",
        "\ufeff=1",
    ],
)
def test_a_cell_that_a_spreadsheet_would_execute_is_text(text: str) -> None:
    assert lines.cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a-b", "1 = 1", "(=1)", "\u2212 1", "'quoted'", "[1]"])
def test_other_text_is_left_alone(text: str) -> None:
    assert lines.cell(text) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-5, "-5"),
        (-0.25, "-0.25"),
        (True, "true"),
        (None, ""),
        (float("-inf"), ""),
        ([], "[]"),
        (1e-7, "1e-07"),
    ],
)
def test_numbers_stay_numbers(value: object, shown: str) -> None:
    assert lines.cell(value) == shown


@settings(deadline=None)
@given(st.text())
def test_no_cell_begins_as_a_formula_and_none_is_lost(text: str) -> None:
    shown = lines.cell(text)
    assert not re.match("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]", shown)
    restored = shown[1:] if shown[:1] == "'" and shown != text.replace("\0", "\\x00") else shown
    expected = "".join(f"\\u{ord(one):04x}" if "\ud800" <= one <= "\udfff" else one for one in text)
    assert restored in (expected.replace("\0", "\\x00"), text.replace("\0", "\\x00")) or "\\x" in restored


def test_columns_are_chosen_and_ordered(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl", "csv"):
        target = dest(tmp_path, kind)
        assert specvlm("export", made, target, "--format", kind, "--columns", "caption, id,topic").code == 0
    schema = pq.read_schema(tmp_path / "dest-parquet/data/train-00000-of-00001.parquet")
    assert schema.names == ["caption", "id", "topic"]
    assert list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]) == schema.names
    assert list(json.loads((tmp_path / "dest.jsonl").read_text().splitlines()[0])) == [
        "caption",
        "id",
        "topic",
    ]
    assert (tmp_path / "dest.csv").read_text().splitlines()[0] == "caption,id,topic"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["d", "--columns", "captoin"], "did you mean caption"),
        (["d", "--columns", "id,id"], "twice"),
        (["d", "--format", "txt", "--columns", "id"], "leave it out"),
        (["d", "--format", "videofolder", "--columns", "file_name"], "leave it out"),
        (["d.csv", "--format", "jsonl"], "csv file"),
        (["d.csv", "--failures", "with"], "one table"),
        (["d", "--format", "srt", "--failures", "only"], "no place"),
        (["d", "--format", "xml"], "parquet"),
        (["out/captions/d"], "run folder's own captions"),
        (["out/.specvlm"], "run folder's own .specvlm"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    specvlm: Specvlm,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    done = specvlm("export", "out", *arguments)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert words in done.err
    assert snapshot(tmp_path) == before


# Failures


def test_rows_out_are_rows_in(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    make_run(out, [[*videos(20), *(Video(f"f{n}", b"/f/%d.mp4" % n, state="failed") for n in range(7))]])
    specvlm("export", out, tmp_path / "dest")
    captions = pq.read_table(tmp_path / "dest/data").column("id").to_pylist()
    failures = pq.read_table(tmp_path / "dest/failures").column("id").to_pylist()
    assert sorted(captions + failures) == sorted(
        [f"id{n:07d}" for n in range(20)] + [f"f{n}" for n in range(7)]
    )


def test_failures_beside_or_alone_or_not_at_all(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    for which in ("with", "without", "only"):
        assert specvlm("export", made, tmp_path / which, "--failures", which).code == 0
    assert (tmp_path / "with/failures").exists()
    assert not (tmp_path / "without/failures").exists()
    assert not (tmp_path / "only/data").exists()
    assert specvlm("export", made, tmp_path / "f.csv", "--failures", "only").code == 0
    assert [row["error"] for row in read_csv(tmp_path / "f.csv")] == ["no frame can be decoded"]
    specvlm("export", made, tmp_path / "t", "--format", "txt")
    found = [json.loads(line) for line in (tmp_path / "t/_failures.jsonl").read_text().splitlines()]
    assert [row["path"] for row in found] == ["y/f.mp4"]


# Shards and doubles


def test_of_doubles_success_wins_then_the_first(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    early, late = "2026-01-01T00:00:00.000000+00:00", "2026-01-02T00:00:00.000000+00:00"
    failed = Video("x", b"/v/x.mp4", state="failed", created_at=early)
    make_run(
        out,
        [
            [failed, Video("y", b"/v/y.mp4", ("late", "late 1"), created_at=late)],
            [
                Video("x", b"/v/x.mp4", ("won",), created_at=late),
                Video("y", b"/v/y.mp4", ("early",), created_at=early),
            ],
            [replace(failed, created_at=late), Video("z", b"/v/z.mp4", state="failed", created_at=late)],
            [
                Video("z", b"/v/z.mp4", state="failed", created_at=early),
                Video("y", b"/v/y.mp4", state="pending"),
            ],
        ],
    )
    done = specvlm("export", out, tmp_path / "dest", "--json")
    rows = pq.read_table(tmp_path / "dest/data").to_pylist()
    assert [(row["id"], row["prompt_index"], row["caption"]) for row in rows] == [
        *(("x", 0, "won"), ("y", 0, "early"), ("y", 1, "late 1")),
    ]
    failures = pq.read_table(tmp_path / "dest/failures").to_pylist()
    assert [(row["id"], row["at"].day) for row in failures] == [("z", 1)]
    assert done.json["videos"] == {"captioned": 2, "failed": 1, "pending": 0}
    assert done.json["doubles"] == 1


def history(out: Path, found: Sequence[Video], shards: int, seed: int, part_rows: int) -> Path:
    """Make a run with these videos, spread and ordered by chance."""
    chance = random.Random(seed)
    shuffled = chance.sample(found, len(found))
    return make_run(out, [shuffled[shard::shards] for shard in range(shards)], part_rows=part_rows)


def test_equal_rows_give_equal_bytes_whatever_their_history(specvlm: Specvlm, tmp_path: Path) -> None:
    roots = tmp_path / "videos"
    roots.mkdir()
    found = [replace(video, path=bytes(roots) + video.path) for video in videos(20)]
    found += [
        Video(f"p{n}", bytes(roots / "s.mkv"), (f"part {n}",), start_s=n / 2, end_s=n / 2 + 1)
        for n in range(9)
    ]
    found += [Video(f"f{n}", bytes(roots / f"f{n}.mp4"), state="failed") for n in range(3)]
    for video in found:
        Path(os.fsdecode(video.path)).parent.mkdir(parents=True, exist_ok=True)
        Path(os.fsdecode(video.path)).touch()
    runs = [
        history(tmp_path / "one", found, 1, 1, 1000),
        history(tmp_path / "five", found, 5, 2, 0),
        history(tmp_path / "rebuilt", found, 2, 3, 5),
    ]
    for ledger in (runs[2] / ".specvlm").glob("state-*.db"):
        ledger.unlink()
    for kind in FORMATS:
        digests = set()
        for run in (*runs, runs[0]):
            target = dest(run, kind) if len(digests) else dest(tmp_path, kind)
            assert specvlm("export", run, target, "--format", kind, "--overwrite").code == 0
            digests.add(digest(target))
        assert len(digests) == 1, kind


def test_a_ledger_that_is_gone_is_told_and_replaced_by_its_parts(
    specvlm: Specvlm, made: Path, tmp_path: Path
) -> None:
    specvlm("export", made, tmp_path / "before.jsonl")
    (made / ".specvlm/state-00001.db").unlink()
    before = snapshot(made)
    done = specvlm("export", made, tmp_path / "after.jsonl", "--json")
    assert done.json["notes"][0] == "the ledger of shard 1 is gone; its captions are taken from its parts"
    assert (tmp_path / "after.jsonl").read_bytes() == (tmp_path / "before.jsonl").read_bytes()
    assert snapshot(made) == before


def test_captions_alone_are_enough(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (made / "captions").rename(tmp_path / "copy/captions")
    done = specvlm("export", tmp_path / "copy", tmp_path / "dest.csv")
    assert done.code == 0
    assert len(read_csv(tmp_path / "dest.csv")) == 5


def test_shards_that_have_not_started_are_told(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    make_run(out, [videos(2)], count=3)
    done = specvlm("export", out, tmp_path / "dest.csv")
    assert "note: 2 of 3 shards have not started" in done.err


# Sidecars


@pytest.mark.parametrize(
    ("start_s", "end_s", "duration_s", "line"),
    [
        (None, None, 12.5, "00:00:00,000 --> 00:00:12,500"),
        (None, None, None, "00:00:00,000 --> 99:59:59,999"),
        (1.2345, 61.0, 12.5, "00:00:01,234 --> 00:01:01,000"),
        (3599.9996, None, 7200.0, "01:00:00,000 --> 02:00:00,000"),
        (5.0, 5.0, 5.0, "00:00:05,000 --> 00:00:05,001"),
        (360_000.0, 360_001.0, None, "100:00:00,000 --> 100:00:01,000"),
    ],
)
def test_times_of_a_cue(
    start_s: float | None, end_s: float | None, duration_s: float | None, line: str
) -> None:
    piece = sidecars.Cue(start_s, end_s, duration_s, "text")
    assert sidecars._subtitles([piece]) == f"1\n{line}\ntext\n"


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=5))
def test_a_caption_cannot_end_its_cue_or_begin_another(captions: list[str]) -> None:
    pieces = [sidecars.Cue(float(n), n + 1.0, None, text) for n, text in enumerate(captions)]
    cues = sidecars._subtitles(pieces).split("\n\n")
    assert len(cues) == len(captions)
    for number, cue in enumerate(cues, start=1):
        head, times, *text = cue.strip("\n").split("\n")
        assert head == str(number)
        assert re.fullmatch(r"\d\d:\d\d:\d\d,\d{3} --> \d\d:\d\d:\d\d,\d{3}", times)
        assert text
        assert all(line.strip() and "-->" not in line for line in text)


def test_sidecars_keep_folders_and_tell_clashes_apart(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    names = [
        "a/b.mp4",
        "a/b.webm",
        "a/b.mp4.mkv",
        "_manifest.json/e.mp4",
        "_failures.jsonl/f.mp4",
        "c.mp4",
        "a/c.txt/d.mp4",
        "a/c.mp4",
        "noext",
        ".hidden.mp4",
    ]
    make_run(out, [[Video(name, f"/root/v/{name}".encode(), (name,)) for name in names]])
    specvlm("export", out, tmp_path / "d", "--format", "txt")
    found = {
        name: (tmp_path / "d" / name).read_text().strip()
        for name in files(tmp_path / "d")
        if name != "_manifest.json"
    }
    assert found == {
        "a/b.mp4.txt": "a/b.mp4",
        "a/b.webm.txt": "a/b.webm",
        "a/b.mp4.mkv.txt": "a/b.mp4.mkv",
        "c.txt": "c.mp4",
        "_manifest.json~/e.txt": "_manifest.json/e.mp4",
        "_failures.jsonl~/f.txt": "_failures.jsonl/f.mp4",
        "a/c.txt/d.txt": "a/c.txt/d.mp4",
        "a/c.mp4.txt": "a/c.mp4",
        "noext.txt": "noext",
        ".hidden.txt": ".hidden.mp4",
    }


def test_folders_below_the_input_are_kept_though_all_videos_are_in_one(
    specvlm: Specvlm, out: Path, tmp_path: Path
) -> None:
    """Ids are made of the path below the input, which tells where that begins; a manifest's own do not."""
    below = [b"a/b/1.mp4", b"a/b/2.mp4"]
    for name, ids in (("found", [item_id(path) for path in below]), ("named", ["one", "two"])):
        run = [Video(identity, b"/data/in/" + path) for identity, path in zip(ids, below, strict=True)]
        make_run(out / name, [run])
        specvlm("export", out / name, tmp_path / name, "--format", "txt")
    assert files(tmp_path / "found") == ["_manifest.json", "a/b/1.txt", "a/b/2.txt"]
    assert files(tmp_path / "named") == ["1.txt", "2.txt", "_manifest.json"]


def test_names_do_not_depend_on_what_is_done_yet(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    make_run(out, [[Video("a", b"/v/x/b.mp4"), Video("b", b"/v/x/b.webm", state="pending"),
                    Video("c", b"/v/y.mp4", state="pending")]])  # fmt: skip
    specvlm("export", out, tmp_path / "d", "--format", "txt")
    assert files(tmp_path / "d") == ["_manifest.json", "x/b.mp4.txt"]


def test_parts_of_a_video_share_a_file_in_order_of_time(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    parts = [(2.0, None, "c\nd"), (0.0, 1.0, "a"), (1.0, 2.0, "b")]
    made = [
        Video(f"i{n}", b"/v/s.mp4", (text,), start_s=start, end_s=end)
        for n, (start, end, text) in enumerate(parts)
    ]
    make_run(out, [made])
    for kind in ("txt", "srt"):
        specvlm("export", out, tmp_path / kind, "--format", kind)
    assert (tmp_path / "txt/s.txt").read_text() == (
        "00:00:00.000 - 00:00:01.000  a\n00:00:01.000 - 00:00:02.000  b\n00:00:02.000 - 00:00:12.500  c d\n"
    )
    assert (tmp_path / "srt/s.srt").read_text().count("-->") == 3
    assert manifest(tmp_path / "srt")["files"][0]["rows"] == 3


HOSTILE_PATHS = [
    *(
        b"/v/../../../../etc/passwd.mp4",
        b"/v/..",
        b"..",
        b"/",
        b"//",
        b"/v/./a.mp4",
        b"relative.mp4",
        b"/v/a/",
    ),
    *(
        b"/v/new\nline.mp4",
        b"/v/nul\0.mp4",
        b"/v/\xff\xfe.mp4",
        b"/v/~root.mp4",
        b"/v/-rf.mp4",
        b"/v/%2e%2e/x.mp4",
    ),
    *(b"/v/" + b"n" * 255 + b".mp4", b"/v/" + b"d" * 300 + b"/x.mp4", b"/v/" + b"deep/" * 1000 + b"x.mp4"),
    *(
        b"/v/" + "\u00e9".encode() * 130 + b".mp4",
        b"/v/_manifest.json/x.mp4",
        b"/v/_failures.jsonl/x.mp4",
        b"/v/a\\b.mp4",
    ),
]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(paths=st.lists(
    st.one_of(
        st.sampled_from(HOSTILE_PATHS),
        st.lists(st.sampled_from([b"..", b".", b"", b"a", b"a.txt", b"a.mp4", b"a.webm", b"\xff", b"x\n", b"n" * 300]),
                 max_size=5).map(lambda parts: b"/" + b"/".join(parts)),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1, max_size=12, unique=True,
))  # fmt: skip
def test_no_path_leads_outside(tmp_path_factory: pytest.TempPathFactory, paths: list[bytes]) -> None:
    from specvlm_cli.export.request import ExportRequest
    from specvlm_cli.export.write import export

    folder = tmp_path_factory.mktemp("hostile")
    run = make_run(folder / "out", [[Video(str(n), path) for n, path in enumerate(paths)]], part_rows=0)
    around = folder / "around"
    around.mkdir()
    (around / "neighbour").write_text("mine")
    export(view(run), ExportRequest(around / "dest", "txt"))
    written = [name for name in files(around / "dest") if name.endswith(".txt")]
    assert len(written) == len(paths)
    assert sorted(os.listdir(around)) == ["dest", "neighbour"]
    assert sorted(os.listdir(folder)) == ["around", "out"]
    listed = [entry["name"] for entry in manifest(around / "dest")["files"]]
    assert sorted(listed) == sorted(written)


def test_every_hostile_path_at_once(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    make_run(out, [[Video(str(n), path) for n, path in enumerate(HOSTILE_PATHS)]], part_rows=0)
    for kind in FORMATS:
        done = specvlm("export", out, dest(tmp_path, kind), "--format", kind)
        assert done.code == 0, done.err
        assert done.err.count("\n") <= 2
    sidecar = [name for name in files(tmp_path / "dest-txt") if name.endswith(".txt")]
    assert len(sidecar) == len(HOSTILE_PATHS)
    assert os.fsencode(tmp_path / "dest-txt/v") not in HOSTILE_PATHS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out", *(dest(tmp_path, kind).name for kind in FORMATS)]
    )


def names_for(tmp_path: Path, paths: Iterable[bytes], **options: bool) -> Callable[[bytes, bytes], bytes]:
    run = view(make_run(tmp_path / "n", [[Video(str(n), path) for n, path in enumerate(paths)]], part_rows=0))
    index = Index(tmp_path / "index.db", lambda shard: LedgerView.open(run.ledger(shard)))
    index.add(0)
    return Names(index.db, **options).take


def test_readable_names_are_text_without_controls_and_not_hidden(tmp_path: Path) -> None:
    paths = [b"/v/\xff.mp4", b"/v/\xfe.mp4", b"/v/.h/new\nline.mp4", "/v/\u00fc.mp4".encode(), b"/v/b\\c.mp4"]
    take = names_for(tmp_path, paths, readable=True, keep_extension=True)
    found = [take(path, b"").decode() for path in paths]
    assert len(set(found)) == len(found)
    assert found[2:] == ["_h/new_line.mp4", "\u00fc.mp4", "b_c.mp4"]
    assert all(re.fullmatch(r"_(~[0-9a-f]{10})?\.mp4", name) for name in found[:2])


# Videofolder


@pytest.fixture
def shot(tmp_path: Path) -> Path:
    """A run over real files, in folders that a loader would take for splits."""
    root = tmp_path / "shot"
    made = []
    for number, name in enumerate(["test/a.mp4", "train/a.mp4", "b.webm", "gone.mp4"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        made.append(Video(str(number), bytes(path), (f"caption of {name}",)))
    (root / "gone.mp4").unlink()
    return make_run(tmp_path / "out", [made], kept={"topic": "string"})


@pytest.mark.parametrize("how", ["symlink", "hardlink", "copy"])
def test_videofolder_holds_videos_and_a_row_for_each(
    specvlm: Specvlm, shot: Path, tmp_path: Path, how: str
) -> None:
    target = tmp_path / "dest"
    flags = ("--format", "videofolder", "--videos", how, "--paths", "absolute", "--json")
    done = specvlm("export", shot, target, *flags)
    assert done.json["missing_videos"] == 1
    assert "gone.mp4" in done.json["notes"][0]
    rows = [json.loads(line) for line in (target / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["videos/b.webm", "videos/test/a.mp4", "videos/train/a.mp4"]
    for row in rows:
        video = target / row["file_name"]
        assert video.read_text() == str(row["path"]).partition("shot/")[2]
        assert video.is_symlink() == (how == "symlink")
        assert (os.stat(row["path"]).st_nlink == 2) == (how == "hardlink")
        assert row["caption"] == f"caption of {video.read_text()}"
    names = list(rows[0])
    assert (names[0], names[-1]) == ("file_name", "topic")
    head = yaml.safe_load((target / "README.md").read_text().split("---\n")[1])
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": ["metadata.jsonl", "videos/**"]}]
    assert specvlm("export", shot, target, "--format", "videofolder", "--overwrite").code == 0
    assert all(Path(row["path"]).read_text() for row in rows), "the videos themselves are untouched"


def test_hard_links_do_not_cross_file_systems(
    specvlm: Specvlm, shot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    done = specvlm("export", shot, tmp_path / "d", "--format", "videofolder", "--videos", "hardlink")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--videos symlink" in done.err
    assert not (tmp_path / "d").exists()


# All of it or nothing


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_there_is_kept_unless_it_is_an_earlier_export(
    specvlm: Specvlm, made: Path, tmp_path: Path, kind: str
) -> None:
    target = dest(tmp_path, kind)
    assert specvlm("export", made, target, "--format", kind).code == 0
    before = snapshot(tmp_path)
    done = specvlm("export", made, target, "--format", kind)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--overwrite" in done.err
    assert snapshot(tmp_path) == before
    fill(made / ".specvlm/state-00000.db", [Video("new", b"/v/new.mp4", ("new caption",))])
    assert specvlm("export", made, target, "--format", kind, "--overwrite", "--json").json["captions"] in (
        0,
        6,
    )
    assert digest(target) != digest(made)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["parquet", "txt", "videofolder"])
@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (
            lambda path: (path / "data").mkdir(exist_ok=True) or (path / "data/mine.txt").write_text("mine"),
            "data/mine.txt",
        ),
        (lambda path: (path / "link").symlink_to("/etc"), "link is not part"),
        (lambda path: (path / "_manifest.json").unlink(), "no manifest"),
        (lambda path: (path / "_manifest.json").write_text("{}"), "manifest is not readable"),
        (lambda path: (path / "_manifest.json").write_bytes(b"\xff" * 99), "manifest is not readable"),
        (
            lambda path: [(path / name).write_text("mine") for name in files(path) if name[0] not in "_v"],
            "changed since",
        ),
    ],
)
def test_nobodys_own_files_are_ever_removed(
    specvlm: Specvlm, made: Path, tmp_path: Path, kind: str, hurt: Callable[[Path], object], words: str
) -> None:
    target = tmp_path / "dest"
    specvlm("export", made, target, "--format", kind)
    hurt(target)
    before = snapshot(target)
    done = specvlm("export", made, target, "--format", kind, "--overwrite")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert words in done.err
    assert snapshot(target) == before


def test_a_card_that_was_edited_is_not_replaced(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    specvlm("export", made, tmp_path / "dest")
    path = tmp_path / "dest/README.md"
    path.write_text(path.read_text().replace("# Video captions", "# My own words!!"))
    done = specvlm("export", made, tmp_path / "dest", "--overwrite")
    assert (done.code, "README.md was changed" in done.err) == (2, True)
    assert "# My own words!!" in path.read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", b"name,age\r\nx,1\r\n"),
        ("d.jsonl", b'{"mine": 1}\n'),
        ("d.jsonl", b"not json\n"),
        ("d.parquet", b"PAR1"),
    ],
)
def test_a_file_that_is_no_export_is_not_replaced(
    specvlm: Specvlm, made: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    done = specvlm("export", made, tmp_path / name, "--overwrite")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert (tmp_path / name).read_bytes() == content


def test_somebody_elses_parquet_file_is_not_replaced(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "dest.parquet"
    pq.write_table(pa.table({"id": ["1"], "caption": ["mine"]}), target)
    assert specvlm("export", made, target, "--overwrite").code == 2
    target.unlink()
    for _ in range(2):
        assert specvlm("export", made, target, "--overwrite").code == 0
    assert pq.read_table(target).num_rows == 5


def test_links_and_other_kinds_are_not_replaced(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    specvlm("export", made, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    for name in ("link", "file", "folder.csv"):
        assert specvlm("export", made, tmp_path / name, "--overwrite").code == 2
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()


def test_a_file_that_comes_in_during_the_export_is_not_lost(
    specvlm: Specvlm, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "dest"
    specvlm("export", made, target)
    before = digest(target)
    original = staging._sync_all

    def late(data: Path) -> None:
        original(data)
        (target / "mine.txt").write_text("mine")

    monkeypatch.setattr(staging, "_sync_all", late)
    assert specvlm("export", made, target, "--overwrite").code == 2
    assert (target / "mine.txt").read_text() == "mine"
    (target / "mine.txt").unlink()
    assert digest(target) == before


@pytest.mark.parametrize("swaps", [True, False])
def test_replacing_works_with_and_without_the_systems_swap(
    specvlm: Specvlm, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(staging, "_swapped", lambda one, other: False)
    target = tmp_path / "dest"
    specvlm("export", made, target)
    fill(made / ".specvlm/state-00000.db", [Video("new", b"/v/new.mp4", ("new caption",))])
    assert specvlm("export", made, target, "--overwrite").code == 0
    assert pq.read_table(target / "data").num_rows == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest", "out"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_leaves_nothing_behind(
    specvlm: Specvlm, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(staging, "sync", full)
    done = specvlm("export", made, dest(tmp_path, kind), "--format", kind)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "No space left on device; nothing was exported" in done.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", FORMATS[:-1])
def test_a_disk_that_is_really_full(specvlm: Specvlm, out: Path, tmp_path: Path, kind: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        noise = random.Random(1)
        make_run(
            out,
            [[Video(f"i{n}", b"/v/%d.mp4" % n, (noise.randbytes(600).hex(),)) for n in range(600)]],
            part_rows=0,
        )
        done = specvlm("export", out, dest(disk, kind), "--format", kind)
        assert (done.code, done.err.count("\n")) == (1, 1), done.err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_export_that_was_killed_leaves_nothing_that_is_taken_for_one(
    specvlm: Specvlm, made: Path, tmp_path: Path
) -> None:
    target = tmp_path / "dest"
    program = f"""
import os, signal
from specvlm_cli.app import main
from specvlm_cli.export import staging
staging._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["export", {str(made)!r}, {str(target)!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not target.exists()
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".specvlm-export-")]
    assert len(left) == 1
    assert (left[0] / "data/README.md").exists()
    assert specvlm("export", made, target).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest", "out"]


def test_two_exports_to_one_place_exclude_each_other(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    with staging.staged(tmp_path / "dest", None) as held:
        done = specvlm("export", made, tmp_path / "dest")
        assert (done.code, done.err.count("\n")) == (75, 1)
        held.data.write_text("mine")
    assert (tmp_path / "dest").read_text() == "mine"


def test_an_export_while_the_run_goes_on(specvlm: Specvlm, out: Path, tmp_path: Path) -> None:
    import sqlite3

    make_run(out, [[*videos(2500), Video("r", b"/v/r.mp4", state="running")]], part_rows=0)
    writer = sqlite3.connect(out / ".specvlm/state-00000.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")  # a run about to store a caption
    writer.execute("UPDATE item SET attempts = 2 WHERE ordinal = 1")
    done = specvlm("export", out, tmp_path / "dest", "--json")
    writer.execute("COMMIT")
    writer.close()
    assert done.code == 0
    assert (done.json["captions"], done.json["videos"]["pending"]) == (2500, 1)


def test_json_is_a_contract(specvlm: Specvlm, made: Path, tmp_path: Path) -> None:
    found = specvlm("export", made, tmp_path / "dest", "--json", "-q")
    assert found.err == ""
    assert found.json.pop("size_bytes") > 0
    expected = {"schema": 1, "destination": str(tmp_path / "dest"), "format": "parquet", "captions": 5}
    expected |= {
        "failures": 1,
        "videos": {"captioned": 4, "failed": 1, "pending": 1},
        "doubles": 0,
        "files": 3,
    }
    expected |= {"missing_videos": 0, "notes": ["1 video still to do"]}
    assert {name: value for name, value in found.json.items() if name != "size_bytes"} == expected


def test_writer_settings_do_not_depend_on_the_moment(made: Path) -> None:
    assert parquet.ROW_GROUP == 4000, "changing it changes the bytes of every export"


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """200,000 captions, each format, in under 350 MB."""
    make_run(tmp_path / "out", [videos(100_000), videos(100_000, first=100_000)], part_rows=0)
    for kind in FORMATS[:-1]:
        program = f"""
from specvlm_cli.app import main
assert main(["export", {str(tmp_path / "out")!r}, {str(dest(tmp_path, kind))!r}, "--format", {kind!r}, "-q"]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < 350_000, (kind, done.stdout)


def test_commands_are_cheap_to_import() -> None:
    program = """
import sys
import specvlm_cli.commands.status, specvlm_cli.commands.export
import specvlm_cli.commands.presets, specvlm_cli.commands.doctor
print({"torch", "pyarrow", "transformers", "av", "huggingface_hub"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
