"""Manifests: Parquet, CSV and JSONL."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import InputOptions, Inputs, Item, item_id
from specvlm_cli.inputs import parquet_manifest as parquet
from specvlm_cli.inputs.pages import BATCH_BYTES
from tests.cli import manifest_cases
from tests.cli.conftest import Specvlm
from tests.faults import manifests as faults

FORMATS = ("parquet", "csv", "jsonl")

Rows = Sequence[dict[str, Any]]


def written(path: Path, rows: Rows) -> Path:
    """Write rows as the format that a path names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def items(path: Path, **options: Any) -> list[Item]:
    return list(Inputs([str(path)], InputOptions(**options)))


def problem(path: Path, **options: Any) -> str:
    """Return the problem of the one row of a manifest."""
    (item,) = items(path, **options)
    assert item.problem is not None
    manifest_cases.check(item, {})
    return item.problem


def refusal(path: Path, **options: Any) -> str:
    """Return why a manifest is refused before any row of it is read."""
    with pytest.raises(UsageError) as caught:
        Inputs([str(path)], InputOptions(**options))
    manifest_cases.check_line(str(caught.value))
    return str(caught.value)


@pytest.fixture(params=FORMATS)
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"clips.{request.param}"


# What rows mean


def test_every_format_says_the_same(tmp_path: Path) -> None:
    rows = [
        {"clip_id": "one", "video": "a.mp4", "start": 1.5, "end": 4.0, "prompt": 'What, "now"?\nSay.'},
        {"clip_id": None, "video": "more/b.mp4", "start": None, "end": None, "prompt": None},
    ]
    for suffix in FORMATS:
        one, two = items(written(tmp_path / f"clips.{suffix}", rows))
        assert one == Item(
            "one",
            os.fsencode(tmp_path / "a.mp4"),
            1.5,
            4.0,
            ('What, "now"?\nSay.',),
            own_id=True,
        )
        assert two == Item(item_id(b"more/b.mp4"), os.fsencode(tmp_path / "more" / "b.mp4"))


def test_paths_are_relative_to_the_manifest(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = manifest.parent
    paths = [
        "a.mp4",
        "./b//c.mp4",
        "b/../a.mp4",
        f"{folder}/a.mp4",
        "../x.mp4",
        "/elsewhere/./y.mp4",
        "//z.mp4",
    ]
    written(manifest, [{"path": path} for path in paths])
    monkeypatch.chdir("/")
    found = items(manifest)
    a, outside = os.fsencode(folder / "a.mp4"), os.fsencode(folder.parent / "x.mp4")
    assert [item.path for item in found] == [
        a,
        os.fsencode(folder / "b" / "c.mp4"),
        a,
        a,
        outside,
        b"/elsewhere/y.mp4",
        b"/z.mp4",
    ]
    roots = [b"a.mp4", b"b/c.mp4", b"a.mp4", b"a.mp4", outside[1:], b"elsewhere/y.mp4", b"z.mp4"]
    assert [item.id for item in found] == [item_id(root) for root in roots]


def test_a_manifest_and_its_folder_give_the_same_ids(manifest: Path) -> None:
    (manifest.parent / "more").mkdir()
    for name in ("a.mp4", "more/d.mkv"):
        (manifest.parent / name).write_text("video")
    written(manifest, [{"path": "a.mp4"}, {"path": str(manifest.parent / "more" / "d.mkv")}])
    assert items(manifest) == list(Inputs([str(manifest.parent)]))


def test_a_manifest_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    written(tmp_path / "real" / "clips.csv", [{"path": f"{tmp_path}/link/a.mp4"}, {"path": "a.mp4"}])
    real = items(tmp_path / "real" / "clips.csv")[1]
    assert items(tmp_path / "link" / "clips.csv") == [real, real]


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    for suffix in FORMATS:
        (item,) = items(written(tmp_path / f"x.{suffix}", [{"key": 9007199254740993, "path": "a.mp4"}]))
        assert (item.id, item.own_id) == ("9007199254740993", True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("12.5", 12.5),
        (" 7 ", 7.0),
        ("1e2", 100.0),
        ("01:02", 62.0),
        ("90:00.25", 5400.25),
        ("1:02:03.500", 3723.5),
        ("100:00:00", 360000.0),
    ],
)
def test_times(tmp_path: Path, text: str, seconds: float) -> None:
    for suffix in FORMATS:
        (item,) = items(written(tmp_path / f"x.{suffix}", [{"path": "a.mp4", "start": text, "end": None}]))
        assert (item.start_s, item.end_s) == (seconds, None)
        assert item.id == item_id(b"a.mp4", seconds)


@pytest.mark.parametrize(
    "text", ["1:99", "1:60:00", "-1", "nan", "inf", "soon", "1:2:3:4", "1,5", "0x10", "1_0", "1e999", "٣"]
)
def test_what_is_no_time_is_a_problem(tmp_path: Path, text: str) -> None:
    for suffix in FORMATS:
        path = written(tmp_path / f"x.{suffix}", [{"path": "a.mp4", "start": text}])
        assert "is no time" in problem(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_numbers_that_are_no_times(tmp_path: Path, suffix: str, value: float) -> None:
    path = written(tmp_path / f"x.{suffix}", [{"path": "a.mp4", "end": value}])
    assert "is no time of a video" in problem(path)


def test_the_end_is_after_the_start(manifest: Path) -> None:
    rows = [
        {"path": "a.mp4", "start": 5.0, "end": 5.0},
        {"path": "a.mp4", "start": None, "end": 0.0},
        {"path": "a.mp4", "start": -0.0, "end": 0.5},
    ]
    equal, nothing, good = items(written(manifest, rows))
    assert "is not after start" in str(equal.problem)
    assert "is not after start" in str(nothing.problem)
    assert (good.start_s, good.end_s, good.id) == (0.0, 0.5, item_id(b"a.mp4", 0.0, 0.5))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "the path is empty|no path"),
        ("x" * 4097, "a path of 4097 bytes"),
        ("a\0b.mp4", r"'a\\x00b.mp4' holds a NUL"),
        ("HTTPS://example.org/v.mp4", "remote addresses are not read"),
        ("s3://bucket/v.mp4", "remote addresses are not read"),
    ],
)
def test_a_row_without_a_usable_path_is_an_item_with_a_problem(
    manifest: Path, path: str, reason: str
) -> None:
    found = items(
        written(
            manifest,
            [
                {"path": "good.mp4", "clip_id": ""},
                {"path": path, "clip_id": "own"},
                {"path": path, "clip_id": ""},
            ],
        )
    )
    good, own, bad = found
    assert good.problem is None
    assert (own.id, own.own_id, own.path) == ("own", True, b"")
    assert re.search(reason, str(own.problem))
    where = 3 if manifest.suffix == ".csv" else 2
    unit = "row" if manifest.suffix == ".parquet" else "line"
    assert str(own.problem).startswith(f"clips{manifest.suffix} {unit} {where}: ")
    assert bad.id == items(manifest)[2].id
    assert len({good.id, own.id, bad.id}) == 3


def test_the_id_of_a_row_without_path_is_made_of_its_place(tmp_path: Path) -> None:
    path = written(tmp_path / "clips.parquet", [{"path": "a.mp4"}, {"path": None}])
    assert items(path)[1].id == hashlib.sha1(b"row\0clips.parquet\x002").hexdigest()


def test_an_address_has_an_id_that_does_not_depend_on_its_place(manifest: Path) -> None:
    rows = [{"path": "http://x/v.mp4"}, {"path": "a.mp4"}]
    first = items(written(manifest, rows))[0]
    assert first.id == items(written(manifest, rows[::-1]))[1].id


@pytest.mark.parametrize("identity", ["a\nb", "\x1b[31m", "x" * 1025])
def test_ids_that_cannot_be_used(manifest: Path, identity: str) -> None:
    assert "id '" in problem(written(manifest, [{"path": "a.mp4", "id": identity}]))


def test_a_problem_keeps_what_is_usable(manifest: Path) -> None:
    (item,) = items(written(manifest, [{"path": "a.mp4", "start": 1.0, "end": 2.0, "prompt": "a\rb"}]))
    assert (item.path, item.start_s, item.end_s) == (os.fsencode(manifest.parent / "a.mp4"), 1.0, 2.0)
    assert item.id == item_id(b"a.mp4", 1.0, 2.0)
    assert "control character '\\r'" in str(item.problem)


def test_prompts_may_be_lists(tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "prompt": ["What?", "Who\tor\nwhere?"]}, {"path": "b.mp4", "prompt": []}]
    for suffix in ("parquet", "jsonl"):
        found = items(written(tmp_path / f"x.{suffix}", rows))
        assert [item.prompts for item in found] == [("What?", "Who\tor\nwhere?"), None]


@pytest.mark.parametrize(
    "prompts", [["a", ""], ["a", None], ["a", "b\x07"], ["a"] * 101, ["x" * (1 << 20) + "y"]]
)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_prompts_that_cannot_be_asked(tmp_path: Path, suffix: str, prompts: list[str]) -> None:
    assert "prompt" in problem(written(tmp_path / f"x.{suffix}", [{"path": "a.mp4", "prompt": prompts}]))


# Which columns


def test_usual_names_in_their_order(manifest: Path) -> None:
    row = {"url": "u.mp4", "path": "p.mp4", "video": "v.mp4", "key": "k", "video_id": "v", "clip_id": "c"}
    (item,) = items(written(manifest, [row]))
    assert (os.path.basename(item.path), item.id) == (b"v.mp4", "c")


def test_letters_count_before_case_does_not(manifest: Path) -> None:
    (item,) = items(written(manifest, [{"Video": "v.mp4", "path": "p.mp4", "ID": "x", "Prompt": "Hm?"}]))
    assert (os.path.basename(item.path), item.id, item.prompts) == (b"p.mp4", "x", ("Hm?",))


def test_times_are_taken_in_pairs(manifest: Path) -> None:
    row = {"path": "a.mp4", "end": "9", "start_time": "1", "end_time": "2"}
    (item,) = items(written(manifest, [row]))
    assert (item.start_s, item.end_s) == (1.0, 2.0)
    (item,) = items(written(manifest, [{"path": "a.mp4", "end": "9", "start_time": "1"}]))
    assert (item.start_s, item.end_s) == (1.0, 9.0)


def test_columns_as_asked_for(manifest: Path) -> None:
    row = {
        "path": "p.mp4",
        "id": "i",
        "file 2": "f.mp4",
        "who": "w",
        "from": "1",
        "to": "2",
        "ask": "Hm?",
        "prompt": "?",
    }
    asked = {"path_column": "file 2", "id_column": "who", "start_column": "from", "end_column": "to"}
    (item,) = items(written(manifest, [row]), **asked, prompt_column="ask")
    assert item == Item("w", os.fsencode(manifest.parent / "f.mp4"), 1.0, 2.0, ("Hm?",), own_id=True)


def test_an_empty_name_means_no_such_column(manifest: Path) -> None:
    written(manifest, [{"path": "a.mp4", "id": "x", "start": "soon", "prompt": "a\rb"}])
    assert items(manifest, id_column="", start_column="", prompt_column="") == [
        Item(item_id(b"a.mp4"), os.fsencode(manifest.parent / "a.mp4"))
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"path_column": "film"}, "has no column 'film'; give --path-column with one of clip, score"),
        ({}, "no column has a usual name for a path .*; give --path-column with one of clip, score"),
    ],
)
def test_a_missing_path_is_refused_with_what_there_is(manifest: Path, options: Any, reason: str) -> None:
    written(manifest, [{"clip": "a.mp4", "score": 1}])
    assert re.search(reason, refusal(manifest, **options))


@pytest.mark.parametrize(
    "option", ["id_column", "start_column", "end_column", "prompt_column", "keep_columns"]
)
def test_a_missing_column_is_refused_with_what_there_is(manifest: Path, option: str) -> None:
    written(manifest, [{"path": "a.mp4", "score": 1}])
    name = ("film",) if option == "keep_columns" else "film"
    flag = "--" + option.replace("_", "-")
    with pytest.raises(UsageError, match=f"no column 'film'; give {flag} with one of path, score"):
        items(manifest, **{option: name})


def test_semicolons_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id;path\n1;a.mp4\n")
    assert "separated by commas" in refusal(tmp_path / "x.csv")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,path,other,other\na.mp4,b.mp4,1,2\n")
    assert "2 columns are called path" in refusal(tmp_path / "x.csv")
    assert "2 columns are called other" in refusal(tmp_path / "x.csv", path_column="other")
    table = pa.Table.from_arrays([pa.array(["a.mp4"])] * 2, names=["path", "path"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "2 columns are called path" in refusal(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("path", [["a.mp4"]], "list<"),
        ("path", [{"bytes": b"", "path": "a.mp4"}], "struct<"),
        ("path", [1.5], "double"),
        ("path", [None], "null"),
        ("id", [1.5], "double"),
        ("id", [True], "bool"),
        ("start", [["1"]], "list<"),
        ("end", [datetime(2026, 1, 1, tzinfo=UTC)], "timestamp"),
        ("prompt", [1], "int64"),
        ("prompt", [[["a"]]], "list<"),
        ("prompt", [b"a"], "binary"),
    ],
)
def test_types_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, column: str, values: list[Any], kind: str
) -> None:
    columns = {"path": ["a.mp4"]} | {column: values}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    message = refusal(tmp_path / "x.parquet")
    assert f"column '{column}' holds {kind}" in message
    assert f"give another with --{column}-column, or convert it" in message


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(5),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [True, False])
def test_text_of_any_type_is_a_path_and_an_id(tmp_path: Path, kind: pa.DataType, stored: bool) -> None:
    values = pa.array(["a.mp4", None, "b.mp4"])
    if kind == pa.binary(5) or pa.types.is_dictionary(kind):
        values = (
            values.cast(pa.binary()).cast(kind)
            if kind == pa.binary(5)
            else values.cast(kind.value_type).dictionary_encode().cast(kind)
        )
    else:
        values = values.cast(kind)
    pq.write_table(pa.table({"path": values, "id": values}), tmp_path / "x.parquet", store_schema=stored)
    one, none, two = items(tmp_path / "x.parquet")
    assert [(item.id, os.path.basename(item.path)) for item in (one, two)] == [
        ("a.mp4", b"a.mp4"),
        ("b.mp4", b"b.mp4"),
    ]
    assert "no path" in str(none.problem)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2], pa.int8()),
        pa.array([1, 2], pa.uint64()),
        pa.array([1.0, 2.0], pa.float32()),
        pa.array([1.0, 2.0], pa.float64()).cast(pa.float16()),
        pa.array([Decimal("1.00"), Decimal("2.00")]),
        pa.array(["1", "0:02"]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_times_of_any_number_type(tmp_path: Path, values: pa.Array) -> None:
    pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "start": values}), tmp_path / "x.parquet")
    assert [item.start_s for item in items(tmp_path / "x.parquet")] == [1.0, 2.0]


def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"\xff\xe9.mp4"
    pq.write_table(pa.table({"path": [name]}), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_bytes(b"path\n" + name + b"\n")
    (tmp_path / "x.jsonl").write_bytes(b'{"path": "' + name + b'"}\n')
    (tmp_path / "y.jsonl").write_text(json.dumps({"path": os.fsdecode(name)}))
    for path in ("x.parquet", "x.csv", "x.jsonl", "y.jsonl"):
        (item,) = items(tmp_path / path)
        assert (item.path, item.id) == (os.fsencode(tmp_path) + b"/" + name, item_id(name))


# Columns that pass through


def kept(path: Path, *names: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    inputs = Inputs([str(path)], InputOptions(keep_columns=names))
    found = list(inputs)
    for item in found:
        manifest_cases.check(item, dict(inputs.kept))
    return dict(inputs.kept), [json.loads(str(item.kept)) for item in found]


def test_parquet_columns_keep_their_kind(tmp_path: Path) -> None:
    columns = {
        "yes": pa.array([True, None]),
        "count": pa.array([-3, 250], pa.int16()),
        "big": pa.array([2**64 - 1, 1], pa.uint64()),
        "score": pa.array([0.5, float("nan")], pa.float32()),
        "name": pa.array(["é\n", None]).dictionary_encode(),
        "raw": pa.array([b"ok", b"\xff"]),
        "day": pa.array([date(2026, 1, 2), None]),
        "at": pa.array([1, None], pa.timestamp("ns")),
        "price": pa.array([Decimal("1.50"), None]),
        "tags": pa.array([["a", None], []]),
        "about": pa.array([{"x": float("inf"), "b": b"\xff", "at": datetime(2026, 1, 1)}, None]),
        "none": pa.nulls(2),
    }
    pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], **columns}), tmp_path / "x.parquet")
    kinds, (one, two) = kept(tmp_path / "x.parquet", *columns)
    assert kinds == {
        "yes": "bool",
        "count": "int64",
        "big": "string",
        "score": "float64",
    } | dict.fromkeys(("name", "raw", "day", "at", "price", "tags", "about", "none"), "string")
    assert one == {
        "yes": True,
        "count": -3,
        "big": str(2**64 - 1),
        "score": 0.5,
        "name": "é\n",
        "raw": "ok",
        "day": "2026-01-02",
        "at": "1970-01-01 00:00:00.000000001",
        "price": "1.50",
        "tags": '["a",null]',
        "about": '{"x":null,"b":"\\\\xff","at":"2026-01-01 00:00:00"}',
        "none": None,
    }
    assert two == dict.fromkeys(columns) | {"count": 250, "big": "1", "raw": "\\xff", "tags": "[]"}


def test_columns_of_text_formats_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"path,score,name\na.mp4,1.5,\nb.mp4,,\xff\n")
    kinds, rows = kept(tmp_path / "x.csv", "score", "name")
    assert kinds == {"score": "string", "name": "string"}
    assert rows == [{"score": "1.5", "name": None}, {"score": None, "name": "\\xff"}], "an empty cell is null"
    (tmp_path / "x.jsonl").write_text(
        '{"path": "a.mp4", "score": 1.5, "name": "\\ud800"}\n{"path": "b.mp4", "name": {"x": [NaN, 1e999]}}\n'
    )
    kinds, rows = kept(tmp_path / "x.jsonl", "score", "name")
    assert kinds == {"score": "string", "name": "string"}
    assert rows == [{"score": "1.5", "name": "\\ud800"}, {"score": None, "name": '{"x":[null,null]}'}]


def test_kept_columns_agree_between_manifests(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "score": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"path": ["b.mp4"], "score": [1.5]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"path": ["c.mp4"], "score": pa.array([1], pa.int8())}), tmp_path / "c.parquet")
    options = InputOptions(keep_columns=("score",))
    names = [str(tmp_path / f"{name}.parquet") for name in "abc"]
    with pytest.raises(UsageError, match=r"score is float64 in .*b.parquet and int64 in another"):
        Inputs(names[:2], options)
    both = Inputs([names[0], names[2]], options)
    assert [item.kept for item in both] == ['{"score":1}'] * 2


@pytest.mark.parametrize("name", ["caption", "path", "id", "device"])
def test_a_column_that_captions_have_is_kept_under_another_name(manifest: Path, name: str) -> None:
    written(manifest, [{"path": "a.mp4", name: "x"}])
    new = "input_input_path" if name == "path" else f"input_{name}"
    assert kept(manifest, name, name) == ({new: "string"}, [{new: "x"}])


def test_a_column_that_is_asked_for_twice_is_kept_once(manifest: Path) -> None:
    assert kept(written(manifest, [{"path": "a.mp4", "x": "y"}]), "x", "x") == ({"x": "string"}, [{"x": "y"}])


def test_kept_columns_have_a_size(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "x": ["é" * 600_000]}), tmp_path / "x.parquet")
    assert "hold more than 1048576 bytes" in problem(tmp_path / "x.parquet", keep_columns=("x",))


# Files that are not as they should be


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(
        b'\xef\xbb\xbfpath,prompt\r\n"a, b.mp4","Say ""so""\nnow"\r\n\r\nb.mp4,\r\n'
    )
    one, two = items(tmp_path / "x.csv")
    assert (os.path.basename(one.path), one.prompts) == (b"a, b.mp4", ('Say "so"\nnow',))
    assert (os.path.basename(two.path), two.prompts) == (b"b.mp4", None)


def test_csv_rows_of_another_length_are_problems(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('path,id\na.mp4,1\nb.mp4\n"c\n.mp4",3\nd.mp4,4,5\n')
    one, short, three, long = items(tmp_path / "x.csv")
    assert (one.problem, three.problem) == (None, None)
    assert short.problem == "x.csv line 3: 1 cells, the header has 2; quote cells with commas"
    assert long.problem == "x.csv line 6: 3 cells, the header has 2; quote cells with commas"
    assert len({one.id, short.id, three.id, long.id}) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no header in its first line"),
        (b"\n\n", "no header in its first line"),
        (b"\xff\xfep\0a\0t\0h\0", "is UTF-16; save it as UTF-8"),
        (b"path\ra.mp4\rb.mp4", "line 1: new-line character seen in unquoted field"),
        (b"path," + b"x" * 1_100_000, r"line 1: field larger than field limit \(1048576\)"),
        (b",".join(b"c%d" % number for number in range(10_001)), "10001 columns, the most is 10000"),
        (b'"path', "line 1: unexpected end of data"),
    ],
)
def test_csv_that_is_none_is_refused_at_once(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    assert re.search(reason, refusal(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'a.mp4\n"b.mp4" \nc.mp4\n', "line 3: ',' expected after '\"'"),
        (b'a.mp4\n"b.mp4\n' + b"c.mp4\n" * 10, "line 13: unexpected end of data"),
        (b'a.mp4\n"' + b"c.mp4\n" * 200_000, "field larger than field limit"),
        (b"a.mp4\n" + b"x" * 5_000_000, "field larger than field limit|longer than"),
        (b"a.mp4\n" + b'"a\n",' * 2_000_000, "longer than 4194304 bytes"),
    ],
)
def test_csv_that_breaks_off_is_refused_with_the_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.csv").write_bytes(b"path\n" + content)
    with pytest.raises(UsageError, match=reason) as caught:
        items(tmp_path / "x.csv")
    manifest_cases.check_line(str(caught.value))


def test_jsonl_rows_need_not_be_alike(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '\n{"path": "a.mp4"}\n  \n{"Path": "b.mp4", "start": 1, "prompt": ["x"]}\n{"id": 7}\n{"video": "c.mp4"}'
    )
    a, b, none, c = items(tmp_path / "x.jsonl")
    assert [os.path.basename(item.path) for item in (a, b, c)] == [b"a.mp4", b"b.mp4", b"c.mp4"]
    assert (b.start_s, b.prompts) == (1.0, ("x",))
    assert (none.id, none.problem) == ("7", "x.jsonl line 5: no path; give one, or remove the row")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "no JSON object; write"),
        ("{", "no JSON object (Expecting property name"),
        ('{"path": "a.mp4"} {}', "no JSON object (Extra data at character 18)"),
        ("[" * 100_000, "too long"),
        ('{"x": ' + "1" * 5000 + "}", "too long"),
        ('{"path": 7}', "path 7 is no text"),
        ('{"path": ["a.mp4"]}', 'path ["a.mp4"] is no text'),
        ('{"path": "\\ud800.mp4"}', "path '\\ud800.mp4' is no text"),
        ('{"path": "a.mp4", "id": 1.5}', "id 1.5 is neither text nor a whole number"),
        ('{"path": "a.mp4", "id": true}', "id true is neither"),
        ('{"path": "a.mp4", "start": true}', "start true is no time"),
        ('{"path": "a.mp4", "start": {}}', "start {} is no time"),
        ('{"path": "a.mp4", "start": 1' + "0" * 400 + "}", "is no time of a video"),
        ('{"path": "a.mp4", "prompt": {"x": 1}}', 'prompt {"x": 1} is neither text nor a list'),
        ('{"path": "a.mp4", "prompt": "\\ud800"}', "control character"),
    ],
)
def test_a_wrong_line_of_jsonl_is_a_problem_and_the_others_go_on(
    tmp_path: Path, line: str, reason: str
) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"path": "a.mp4"}}\n{line}\n{{"path": "b.mp4"}}\n')
    before, bad, after = items(tmp_path / "x.jsonl")
    assert (before.problem, after.problem) == (None, None)
    assert str(bad.problem).startswith("x.jsonl line 2: ")
    assert reason in str(bad.problem)
    manifest_cases.check(bad, {})


@pytest.mark.parametrize("content", [b"[\n", b"path\na.mp4\n", b"\x1f\x8b\x08\x00", b"PAR1"])
def test_what_does_not_begin_as_jsonl_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    assert "line 1: no JSON object" in refusal(tmp_path / "x.jsonl")


def test_an_empty_jsonl_is_a_list_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n")
    assert items(tmp_path / "x.jsonl", keep_columns=("x",)) == []


def test_a_line_of_jsonl_has_a_size(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"path": "a.mp4"}\n' * 20_000 + b'{"path": "' + b"x" * 4_194_304)
    with pytest.raises(UsageError, match="line 20001: longer than 4194304 bytes"):
        items(tmp_path / "x.jsonl")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 5, b"x" * 100, b"PAR1\0\0\0\0\0\0\0\x7fPAR1"])
def test_what_is_no_parquet_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    assert "no Parquet file, or one that is cut off" in refusal(tmp_path / "x.parquet")


def test_damage_further_on_is_refused_when_it_is_met(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"path": pa.array(range(200_000)).cast(pa.string())})
    pq.write_table(table, path, row_group_size=132_000, write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[-30_000] ^= 1
    path.write_bytes(content)
    inputs = iter(Inputs([str(path)]))
    assert next(inputs).path.endswith(b"/0")
    with pytest.raises(UsageError, match="not readable as Parquet"):
        list(inputs)


def test_a_manifest_that_changes_is_refused(manifest: Path) -> None:
    if manifest.suffix == ".jsonl":
        pytest.skip("has no header that could change")
    written(manifest, [{"path": "a.mp4"}])
    inputs = Inputs([str(manifest)])
    written(manifest, [{"id": "1", "path": "a.mp4"}])
    with pytest.raises(UsageError, match="was changed while it was read"):
        list(inputs)


def test_a_manifest_that_goes_away_is_refused(manifest: Path) -> None:
    written(manifest, [{"path": "a.mp4"}])
    inputs = Inputs([str(manifest)])
    manifest.unlink()
    with pytest.raises(UsageError, match="No such file or directory; give a manifest"):
        list(inputs)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_manifest_that_may_not_be_read(manifest: Path) -> None:
    written(manifest, [{"path": "a.mp4"}]).chmod(0)
    assert "Permission denied" in refusal(manifest)


def test_the_name_of_a_manifest_may_be_any_bytes(manifest: Path) -> None:
    written(manifest, [{"path": ""}])
    name = manifest.parent / os.fsdecode(b"\xff\n" + os.fsencode(manifest.name))
    manifest.rename(name)
    assert problem(name).startswith(f"\\xff\\x0aclips{manifest.suffix} ")


# Memory


def batches(path: Path, **options: Any) -> list[int]:
    reader = parquet.ParquetManifest(os.fsencode(path), "x", InputOptions(**options))
    return [len(rows.numbers) for rows in reader.rows()]


def test_usual_files_are_read_in_large_batches(tmp_path: Path) -> None:
    table = pa.table({"path": [f"{number}.mp4" for number in range(30_000)], "prompt": ["Hm?"] * 30_000})
    for compression in ("none", "snappy", "gzip", "brotli", "lz4", "zstd"):
        pq.write_table(table, tmp_path / "x.parquet", compression=compression)
        assert batches(tmp_path / "x.parquet") == [8192, 8192, 8192, 5424]


@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_large_values_are_read_few_at_a_time(tmp_path: Path, encoding: str | None, version: str) -> None:
    table = pa.table({"path": ["a.mp4"] * 80, "prompt": ["x" * (1 << 20)] * 80})
    pq.write_table(
        table,
        tmp_path / "x.parquet",
        compression="zstd",
        use_dictionary=encoding is None,
        column_encoding={"prompt": encoding, "path": "PLAIN"} if encoding else None,
        dictionary_pagesize_limit=1 << 30,
        write_batch_size=1,
        data_page_version=version,
    )
    assert (tmp_path / "x.parquet").stat().st_size < 200_000
    assert max(batches(tmp_path / "x.parquet")) << 20 <= BATCH_BYTES


def test_pages_that_are_too_large_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"path": ["x" * 4000] * 40_000}),
        tmp_path / "x.parquet",
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 30,
        max_rows_per_page=1 << 30,
    )
    with pytest.raises(UsageError, match=r"its pages take \d+ MiB at a time when unpacked, the most is 128"):
        items(tmp_path / "x.parquet")


def test_lists_that_are_too_long_are_refused(tmp_path: Path) -> None:
    values = pa.nulls(9_000_000, pa.string())
    table = pa.table({"path": ["a.mp4"], "prompt": pa.ListArray.from_arrays([0, len(values)], values)})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="holds 9000000 values in the lists of one row group"):
        items(tmp_path / "x.parquet")


def test_columns_that_are_too_many_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"c{number}": [1] for number in range(10_001)}), tmp_path / "x.parquet")
    assert "10001 columns, the most is 10000" in refusal(tmp_path / "x.parquet")


def test_a_footer_that_asks_for_too_much_is_refused_unread(tmp_path: Path) -> None:
    chunk, columns, groups = b"\x26\x00\x00", 1000, 400
    group = b"\x19\xfc" + _varint(columns) + chunk * columns + b"\x16\x00\x16\x00\x00"
    leaf = b"\x15\x0c\x25\x00\x18\x01a\x00"
    schema = (
        b"\x19\xfc" + _varint(columns + 1) + b"\x48\x01r\x15" + _varint(2 * columns) + b"\0" + leaf * columns
    )
    footer = b"\x15\x02" + schema + b"\x16\x00" + b"\x19\xfc" + _varint(groups) + group * groups + b"\x00"
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert f"its footer of {len(footer)} bytes is too large" in refusal(tmp_path / "x.parquet")


def _varint(number: int) -> bytes:
    return (bytes([number & 127 | 128]) + _varint(number >> 7)) if number > 127 else bytes([number])


def test_nothing_of_pyarrow_is_needed_for_other_inputs(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path\na.mp4\n")
    program = (
        "import sys; from specvlm_cli.inputs import Inputs; print(len(list(Inputs(sys.argv[1:]))));"
        "sys.exit('pyarrow' in sys.modules)"
    )
    given = [str(tmp_path), str(tmp_path / "x.csv")]
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


# Anything at all


@given(case=manifest_cases.cases())
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_manifest_gives_items_or_one_line(
    case: manifest_cases.Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = case.write(tmp_path_factory.getbasetemp())
    manifest_cases.read(path, case.options)


def test_any_manifest_ends_the_command_with_a_code_and_one_line(tmp_path: Path) -> None:
    assert faults.made(40, tmp_path).violation == ""
    assert faults.mutated(40, tmp_path).violation == ""


def test_small_files_that_hold_many_rows_take_little_memory(tmp_path: Path) -> None:
    faults.equal_rows(tmp_path / "x.parquet", 100_000, "x" * 3000 + ".mp4", most=10_000)
    line = faults.measure("equal rows", tmp_path / "x.parquet", most_seconds=60.0)
    assert line.violation == ""
    assert line.rss_mb < 300


UNUSED = [
    ("csv", "path,Scene_Timestamps\na.mp4,\"[['0', '1']]\"\n", ["Scene_Timestamps"]),
    ("csv", "path,start,moments\na.mp4,1,x\n", []),
    ("csv", "path,Start_Timestamp,End_Timestamp\na.mp4,0:01,0:02\n", []),
    ("csv", "path,sometimes,legend,friend\na.mp4,1,2,3\n", []),
    ("jsonl", '{"video": "a.mp4", "segments": [[0, 1]], "clip": {"span": [1, 2]}}\n', ["segments", "clip"]),
    ("jsonl", '{"clip_path": "a.mp4", "clip_id": 7}\n', []),
    ("csv", "path,start_sec,end_s\na.mp4,1,2\n", ["start_sec", "end_s"]),
]


@pytest.mark.parametrize(("kind", "text", "unused"), UNUSED)
def test_columns_of_times_that_are_not_read_are_told(
    specvlm: Specvlm, tmp_path: Path, kind: str, text: str, unused: list[str]
) -> None:
    manifest = tmp_path / f"list.{kind}"
    manifest.write_text(text)
    result = specvlm("caption", manifest, "-n", "-q", "-o", tmp_path / "out")
    said = f"{manifest}: whole videos are captioned, without the times in {', '.join(unused)}; "
    assert (said in result.err) == bool(unused)
    assert bool(result.err) == bool(unused)
    quiet = specvlm(
        "caption", manifest, "-n", "-q", "-o", tmp_path / "out", "--start-column", "", "--end-column", ""
    )
    assert quiet.err == ""
