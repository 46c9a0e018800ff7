"""Run folders that an earlier version wrote, with fewer columns: they go on, are exported and are verified."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specvlm_cli.run.migrations import STEPS
from specvlm_cli.run.parts import CAPTION_SCHEMA, FAILURE_SCHEMA, caption_schema
from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows, snapshot
from tests.cli.made import Video, make_run

ADDED: dict[
    int, dict[str, pa.DataType]
] = {  # step of the ledger's schema -> columns of captions that came with it
    4: {"compressor": pa.string(), "compression_ratio": pa.float64()},
    5: {"estimated_token_s": pa.float64(), "mean_batch_size": pa.float64()},
    7: {"input_path": pa.string()},
    8: {"settled_tokens": pa.int64(), "smallest_margin": pa.float64()},
}
ADDED_TO_ITEM = {6: "partly", 7: "input_path"}  # step -> column of the ledger's table
NEW = {name: kind for columns in ADDED.values() for name, kind in columns.items()}
COLUMNS_OF_THIRD_STEP = 52
OLD_SCHEMA = pa.schema(
    [field for field in CAPTION_SCHEMA if field.name not in NEW], metadata=CAPTION_SCHEMA.metadata
)


def age(out: Path, steps: int = 3) -> None:
    """Turn a run folder into what a version of so many steps would have left: no newer columns, in no file."""
    new = [name for step, columns in ADDED.items() if step > steps for name in columns]
    for path in sorted(out.glob("[cf]*/part-*.parquet")):
        table = pq.read_table(path)
        pq.write_table(
            table.drop_columns([name for name in new if name in table.column_names]), path, compression="zstd"
        )
    for ledger in sorted((out / ".specvlm").glob("state-*.db")):
        with closing(sqlite3.connect(ledger, isolation_level=None)) as database:
            database.executemany(
                "UPDATE caption SET row = json_remove(row, ?)", [(f"$.{name}",) for name in new]
            )
            for column in (name for step, name in ADDED_TO_ITEM.items() if step > steps):
                database.execute(f"ALTER TABLE item DROP COLUMN {column}")
            for (name,) in database.execute("SELECT name FROM part").fetchall():
                content = (out / name).read_bytes()
                values = (hashlib.sha256(content).hexdigest(), len(content), name)
                database.execute("UPDATE part SET sha256 = ?, bytes = ? WHERE name = ?", values)
            database.execute(f"PRAGMA user_version = {steps}")


@pytest.fixture
def old(specvlm: Specvlm, videos: Path, out: Path) -> Path:
    """Half of the videos captioned by the version before, in one part; one of them has failed."""
    (videos / "a.mp4").write_text("text")
    assert specvlm("caption", videos, "-o", out, "--limit", 3).code == 3
    (videos / "a.mp4").write_text("video a")
    age(out)
    assert pq.read_schema(out / "captions/part-00000-00000.parquet").names == OLD_SCHEMA.names
    return out


def verified(specvlm: Specvlm, out: Path) -> bool:
    return specvlm("status", out, "--verify").code == 0


def schemas(out: Path) -> list[pa.Schema]:
    return [pq.read_schema(path) for path in sorted((out / "captions").glob("part-*"))]


def test_every_new_column_came_with_a_step_of_the_ledger() -> None:
    assert len(OLD_SCHEMA) == COLUMNS_OF_THIRD_STEP, (
        "columns of captions changed: add a step to specvlm_cli/run/migrations.py that marks all parts outdated, and "
        "list the new columns in ADDED above under its number"
    )
    for step, columns in ADDED.items():
        marks = any(one.startswith("UPDATE part SET outdated = 1") for one in STEPS[step - 1])
        assert marks, (
            f"step {step} of specvlm_cli/run/migrations.py must mark all parts outdated: {list(columns)}"
        )


def test_looking_at_it_changes_nothing(specvlm: Specvlm, old: Path, videos: Path) -> None:
    before = snapshot(old)
    found = specvlm("status", old, "--json").json
    assert (found["counts"]["done"], found["captions"]) == (2, 2)
    assert verified(specvlm, old)
    shown = specvlm("caption", videos, "-o", old, "-n")
    assert (shown.code, shown.out.count("\n")) == (0, 1)
    assert snapshot(old) == before


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_export_has_the_new_columns_without_a_value(
    specvlm: Specvlm, old: Path, tmp_path: Path, kind: str
) -> None:
    dest = tmp_path / ("dest" if kind == "parquet" else f"dest.{kind}")
    assert specvlm("export", old, dest, "--format", kind, "--columns", f"id,{','.join(NEW)}").code == 0
    if kind == "parquet":
        table = pq.read_table(dest / "data")
        assert table.schema.types == [pa.string(), *NEW.values()]
        assert [row[name] for row in table.to_pylist() for name in NEW] == [None] * 2 * len(NEW)
    elif kind == "jsonl":
        lines = [json.loads(line) for line in dest.read_text().splitlines()]
        assert [row[name] for row in lines for name in NEW] == [None] * 2 * len(NEW)
    else:
        assert [line.split(",")[1:] for line in dest.read_text().splitlines()[1:]] == [[""] * len(NEW)] * 2


def test_it_goes_on_and_all_its_parts_have_one_schema(specvlm: Specvlm, old: Path, videos: Path) -> None:
    before = {row["id"]: row for row in rows(old)}
    assert specvlm("caption", videos, "-o", old, "--retry-failed").code == 0
    assert [one.equals(CAPTION_SCHEMA, check_metadata=True) for one in schemas(old)] == [True, True]
    after = {row["id"]: row for row in rows(old)}
    assert {name: after[name] for name in before} == {
        name: row | dict.fromkeys(NEW) for name, row in before.items()
    }
    assert pq.read_schema(old / "captions/part-00000-00001.parquet").equals(CAPTION_SCHEMA)
    invariants.check(old, videos)
    assert verified(specvlm, old)


@pytest.mark.parametrize("steps", [step - 1 for step in ADDED])
def test_a_finished_one_is_brought_up_to_date_once(
    specvlm: Specvlm, videos: Path, out: Path, steps: int
) -> None:
    specvlm("caption", videos, "-o", out)
    age(out, steps)
    assert "nothing to do: 4 done" in specvlm("caption", videos, "-o", out).err
    assert [one.equals(CAPTION_SCHEMA) for one in schemas(out)] == [True]
    invariants.check(out, videos)
    before = snapshot(out)
    assert "nothing to do: 4 done" in specvlm("caption", videos, "-o", out).err
    assert snapshot(out) == before
    assert len(specvlm.loads) == 1


def test_without_its_ledger_it_is_rebuilt_and_brought_up_to_date(
    specvlm: Specvlm, old: Path, videos: Path
) -> None:
    before = rows(old)
    (old / ".specvlm/state-00000.db").unlink()
    assert specvlm("caption", videos, "-o", old, "--retry-failed").code == 0
    assert [one.equals(CAPTION_SCHEMA) for one in schemas(old)] == [True, True]
    assert [row for row in rows(old) if row["id"] in {one["id"] for one in before}] == [
        row | dict.fromkeys(NEW) for row in before
    ]
    assert verified(specvlm, old)


def test_a_crash_while_it_is_brought_up_to_date_is_mended(
    specvlm: Specvlm, old: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("specvlm_cli.run.parts.publish", full)
        assert specvlm("caption", videos, "-o", old).code == 1
    assert schemas(old)[0].names == OLD_SCHEMA.names
    assert specvlm("caption", videos, "-o", old, "--retry-failed").code == 0
    assert [one.equals(CAPTION_SCHEMA) for one in schemas(old)] == [True, True]
    invariants.check(old, videos)


def test_it_is_divided_anew(specvlm: Specvlm, old: Path, videos: Path) -> None:
    for shard in ("0/2", "1/2"):
        assert (
            specvlm("caption", videos, "-o", old, "--shard", shard, "--reshard", "--retry-failed").code == 0
        )
    assert all(one.equals(CAPTION_SCHEMA) for one in schemas(old))
    invariants.check(old, videos)


def test_a_kept_column_of_a_newer_name_stays_the_manifests(
    specvlm: Specvlm, tmp_path: Path, videos: Path, out: Path
) -> None:
    kept = {"compressor": "int64"}
    clips = [Video(f"id{number}", b"/v/a.mp4", row={"compressor": number}) for number in range(3)]
    make_run(out, [clips], kept=kept)
    assert caption_schema(kept).field("compressor").type == pa.int64()
    assert caption_schema(kept).names == CAPTION_SCHEMA.names
    assert verified(specvlm, out)
    assert specvlm("export", out, tmp_path / "dest.jsonl", "--format", "jsonl").code == 0
    lines = (tmp_path / "dest.jsonl").read_text().splitlines()
    assert [json.loads(line)["compressor"] for line in lines] == [0, 1, 2]
    refused = specvlm("caption", videos, "-o", out, "--preset", "demo", "--on-config-change", "reuse")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--keep-columns compressor, which a row has of its own by now" in refused.err


def test_failures_get_the_new_column_too(specvlm: Specvlm, old: Path, videos: Path) -> None:
    before = rows(old, "failures")
    assert "input_path" not in before[0]
    assert specvlm("caption", videos, "-o", old).code == 3
    (failed,) = rows(old, "failures")
    assert failed == before[0] | {"input_path": str(videos / "a.mp4")}
    assert pq.read_schema(old / "failures/part-00000.parquet").equals(FAILURE_SCHEMA)
    assert {row["input_path"] for row in rows(old)} == {None, str(videos / "more/d.mkv")}
    assert verified(specvlm, old)
