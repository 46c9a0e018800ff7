"""Run folders and temp folders that somebody else wrote into: no harm outside, no hang, one line that says why."""

from __future__ import annotations

import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specvlm_cli.console.messages import Talk
from specvlm_cli.console.safe_text import escaped
from specvlm_cli.inputs.item import item_id
from specvlm_cli.run import lock, parts
from specvlm_cli.run.ledger import Ledger
from specvlm_cli.stopping import NotBegunError
from tests.cli.conftest import Result, Specvlm, rows
from tests.cli.made import Video, fill, make_run

DEEP = '{"a":' + 400 * "[" + 400 * "]" + "}"
REUSE = ("--on-config-change", "reuse")


class Ground:
    """A finished run of three videos, made without models, and a folder outside that nothing may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.out, self.videos, self.outside = (
            root,
            root / "out",
            root / "videos",
            root / "outside",
        )
        self.videos.mkdir()
        self.outside.mkdir()
        self.victim = self.outside / "diary.txt"
        self.victim.write_text("dear diary")
        clips = [self.videos / f"{name}.mp4" for name in "pqr"]
        for clip in clips:
            clip.write_text(f"video {clip.name}")
        make_run(self.out, [[Video(item_id(clip.name.encode()), bytes(clip)) for clip in clips]])
        self.state = self.out / ".specvlm"
        self.ledger = self.state / "state-00000.db"
        self.part = self.out / "captions/part-00000-00000.parquet"
        self.before = self.content()

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.outside.iterdir()}

    def sql(self, script: str) -> None:
        with closing(sqlite3.connect(self.ledger, isolation_level=None)) as database:
            database.executescript(script)

    def put(self, name: str, make: Callable[[Path], None]) -> None:
        """Have something else of that name in `.specvlm`."""
        path = self.state / name
        path.unlink(missing_ok=True)
        make(path)

    def link(self, path: Path) -> None:
        path.symlink_to(self.victim)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def start(specvlm: Specvlm, ground: Ground, *more: object) -> Result:
    """Start again, with a video more, so that the start has to write."""
    (ground.videos / "s.mp4").write_text("video s")
    return specvlm("caption", ground.videos, "-o", ground.out, *REUSE, *more)


def refused(found: Result, path: Path) -> bool:
    """Say whether a command ended with one line that names the file."""
    *_, last = found.err.splitlines()
    return found.code == 1 and last.startswith("specvlm: error:") and str(path) in last and "-v" not in last


@pytest.mark.parametrize("kind", ["link", "hard link", "FIFO"])
@pytest.mark.parametrize("name", ["run.lock", "run.json.lock", "state-00000.lock"])
def test_locks(specvlm: Specvlm, ground: Ground, name: str, kind: str) -> None:
    make = {"link": ground.link, "hard link": lambda path: os.link(ground.victim, path), "FIFO": os.mkfifo}
    ground.put(name, make[kind])
    assert refused(start(specvlm, ground), ground.state / name)
    assert ground.content() == ground.before
    assert specvlm("status", ground.out).code == 0


@pytest.mark.parametrize(
    "name", ["run.json", "state-00000.db", "state-00000.db-journal", "state-00000.db-wal"]
)
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_settings_and_ledgers(specvlm: Specvlm, ground: Ground, name: str, kind: str) -> None:
    ground.put(name, ground.link if kind == "link" else os.mkfifo)
    assert refused(start(specvlm, ground), ground.state / name)
    shown = specvlm("status", ground.out, "--verify")
    assert (shown.code, str(ground.state / name) in shown.out) == (1, True)
    assert ground.content() == ground.before


@pytest.mark.parametrize("name", [".specvlm", "captions", "failures"])
def test_folders_that_are_links(specvlm: Specvlm, ground: Ground, name: str) -> None:
    folder = ground.out / name
    if folder.exists():
        folder.rename(ground.outside / name)
        folder.symlink_to(ground.outside / name)
    else:
        folder.symlink_to(ground.outside)
    before = sorted(ground.outside.rglob("*"))
    assert refused(start(specvlm, ground), folder)
    assert sorted(ground.outside.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "captions/../../outside/diary.txt",
        "captions/part-00000-\u0660\u0660\u0660\u0660\u0660.parquet",
        "captions/part-00003-00000.parquet",
        "failures/part-00000-00000.parquet",
        ".specvlm/run.json",
        "/{outside}/diary.txt",
    ],
)
@pytest.mark.parametrize("outdated", [0, 1])
def test_names_of_parts(specvlm: Specvlm, ground: Ground, name: str, outdated: int) -> None:
    name = name.format(outside=ground.outside)
    ground.sql(
        f"INSERT INTO part VALUES ('{name}', 'x', 1, 1, {outdated}); UPDATE caption SET part = '{name}'"
    )
    assert refused(start(specvlm, ground), ground.ledger)
    shown = specvlm("status", ground.out, "--verify")
    assert (shown.code, "is not the name of a part" in shown.out) == (1, True)
    assert ground.content() == ground.before
    assert ground.part.exists()
    assert (ground.state / "run.json").exists()


def test_captions_in_a_part_that_is_not_listed_get_another(specvlm: Specvlm, ground: Ground) -> None:
    ground.sql("PRAGMA foreign_keys = OFF; UPDATE caption SET part = 'captions/part-00000-00042.parquet'")
    assert start(specvlm, ground).code == 0
    assert len(rows(ground.out)) == 4
    assert specvlm("status", ground.out, "--verify").code == 0


@pytest.mark.parametrize("name", [".part-00000-00001.parquet", "part-00000-00007.parquet"])
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_lies_where_parts_are_written(specvlm: Specvlm, ground: Ground, name: str, kind: str) -> None:
    make = ground.link if kind == "link" else os.mkfifo
    make(ground.part.with_name(name))
    assert start(specvlm, ground).code == 0
    assert ground.content() == ground.before
    assert len(rows(ground.out)) == 4


def _journal(ground: Ground) -> None:
    """A journal that names a file, which SQLite deletes when it rolls the journal back."""
    name = bytes(ground.victim)
    magic = bytes.fromhex("d9d505f920a163d7")
    head = (magic + struct.pack(">IIIII", 0, 7, 4, 512, 4096)).ljust(512, b"\0")
    tail = struct.pack(">I", 262145) + name + struct.pack(">II", len(name), sum(name)) + magic
    ground.ledger.with_name("state-00000.db-journal").write_bytes(head + tail)


def test_a_journal_that_names_a_file(specvlm: Specvlm, ground: Ground) -> None:
    _journal(ground)
    assert refused(start(specvlm, ground), ground.state / "state-00000.db-journal")
    assert specvlm("export", ground.out, ground.root / "x.csv").code == 1
    assert ground.content() == ground.before


@pytest.mark.parametrize(
    "script",
    [
        "CREATE VIEW more AS SELECT * FROM item",
        "ALTER TABLE counter RENAME TO c; CREATE VIEW counter AS SELECT * FROM c",
        "CREATE TRIGGER gone AFTER INSERT ON item BEGIN DELETE FROM caption; END",
        "CREATE TABLE notes (text)",
        "CREATE INDEX slow ON caption (length(hex(row)))",
        "ALTER TABLE part ADD COLUMN more TEXT AS (upper(name))",
        "DROP INDEX item_state",
    ],
)
def test_a_ledger_of_other_tables(specvlm: Specvlm, ground: Ground, script: str) -> None:
    ground.sql(script)
    assert refused(start(specvlm, ground), ground.ledger)
    assert refused(specvlm("export", ground.out, ground.root / "x.jsonl"), ground.ledger)
    assert "is not as specvlm makes it" in specvlm("status", ground.out, "--verify").out


@pytest.mark.parametrize(
    "value",
    [
        "'[]'",
        "'nul'",
        "'\"text\"'",
        "'{\"id\": 1}'",
        "json_set(row, '$.id', json('null'))",
        "json_set(row, '$.caption', json('[\"x\"]'))",
        "json_set(row, '$.created_at', 'noon')",
        "json_set(row, '$.completion_tokens', json('1e3'))",
        "json_set(row, '$.width', json('99999999999999999999'))",
        "json_set(row, '$.flags', json('[null]'))",
        "json_set(row, '$.mine', json('{}'))",
    ],
)
def test_rows_of_other_types(specvlm: Specvlm, ground: Ground, value: str) -> None:
    ground.sql(f"UPDATE caption SET row = {value} WHERE item = 2")
    for name in ("x.parquet", "x.jsonl", "x.csv"):
        assert refused(specvlm("export", ground.out, ground.root / name), ground.ledger)
        assert not (ground.root / name).exists()
    shown = specvlm("status", ground.out)
    assert (shown.code, str(ground.ledger) in shown.out) == (0, True)


@pytest.mark.parametrize(
    "script",
    [
        "PRAGMA foreign_keys = OFF; DELETE FROM item WHERE ordinal = 3",
        "UPDATE caption SET item = -item; UPDATE item SET ordinal = -ordinal",
        "UPDATE item SET at = 'noon'",
        "UPDATE item SET end_s = 9e999",
        "UPDATE caption SET prompt_index = -1",
        "UPDATE item SET attempts = -1",
    ],
)
def test_values_that_no_run_writes(specvlm: Specvlm, ground: Ground, script: str) -> None:
    ground.sql(script)
    assert refused(specvlm("export", ground.out, ground.root / "x.jsonl"), ground.ledger)


@pytest.mark.parametrize(
    "script",
    [
        "UPDATE item SET attempts = 9223372036854775807, state = 'pending'",
        "UPDATE counter SET value = 9223372036854775807; UPDATE caption SET part = NULL; DELETE FROM part",
        "DELETE FROM counter; UPDATE caption SET part = NULL; DELETE FROM part",
    ],
)
def test_absurd_numbers(specvlm: Specvlm, ground: Ground, script: str) -> None:
    ground.sql(script)
    assert refused(start(specvlm, ground), ground.ledger)


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 100_000, "7", b"\xff\xfe".decode("latin-1"), '{"shards": 5}'],
    ids=["deep", "number", "bytes", "short"],
)
def test_settings_that_are_none(specvlm: Specvlm, ground: Ground, text: str) -> None:
    (ground.state / "run.json").write_text(text, encoding="latin-1")
    assert refused(start(specvlm, ground), ground.state / "run.json")
    done = specvlm("export", ground.out, ground.root / "x.jsonl")
    assert (done.code, "run.json" in done.err) == (0, True)  # the columns of a manifest are named there


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('"shards": 1', '"shards": 9999999'),
        ('"kept": {}', '"kept": {"a": []}'),
        ('"resolved": {}', f'"resolved": {DEEP}'),
    ],
)
def test_absurd_settings(specvlm: Specvlm, ground: Ground, was: str, now: str) -> None:
    path = ground.state / "run.json"
    path.write_text(path.read_text().replace(was, now))
    assert refused(start(specvlm, ground), path)


@pytest.mark.parametrize("text", ["0", "100001", "two", "2" * 5000, None])
@pytest.mark.parametrize("ledgers", [0, 1])
def test_a_planted_division_into_shards(
    specvlm: Specvlm, ground: Ground, text: str | None, ledgers: int
) -> None:
    planted = ground.state / "resharded"
    planted.mkdir()
    if text is not None:
        (planted / "shards").write_text(text)
    for number in range(ledgers):
        Ledger.create(planted / f"state-{number:05d}.db").close()
    if text is None and not ledgers:  # a crash left the folder, and nothing in it
        assert start(specvlm, ground, "-n").code == 2
        return
    assert refused(start(specvlm, ground), planted)
    assert ground.ledger.exists()
    assert ground.part.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_a_planted_division_that_lacks_captions(specvlm: Specvlm, ground: Ground, count: int) -> None:
    planted = ground.state / "resharded"
    planted.mkdir()
    (planted / "shards").write_text(str(count))
    for number in range(count):
        path = planted / f"state-{number:05d}.db"
        Ledger.create(path).close()
        fill(path, [Video(item_id(b"p.mp4"), bytes(ground.videos / "p.mp4"))])
    found = start(specvlm, ground)
    assert refused(found, planted)
    assert "lacks" in found.err
    assert ground.part.exists()


@pytest.mark.parametrize("name", ["resharded", ".resharding"])
def test_a_division_that_is_a_link(specvlm: Specvlm, ground: Ground, name: str) -> None:
    (ground.state / name).symlink_to(ground.outside)
    found = start(specvlm, ground, "--shard", "1/3", "--reshard")
    assert refused(found, ground.state / name) if name == "resharded" else found.code in (0, 3)
    assert ground.content() == ground.before


@pytest.mark.parametrize("how", ["copy", "hardlink"])
@pytest.mark.parametrize("swap", ["link", "same size and time", "other file", "older link"])
def test_videos_that_are_something_else_now(specvlm: Specvlm, ground: Ground, how: str, swap: str) -> None:
    clip, other = ground.videos / "q.mp4", ground.root / "moved.mp4"
    found = clip.stat()
    ground.sql(
        f"UPDATE item SET size_bytes = {found.st_size}, mtime_ns = {found.st_mtime_ns} WHERE ordinal = 2"
    )
    if swap == "older link":
        ground.sql("UPDATE item SET at = '2999-01-01T00:00:00+00:00' WHERE ordinal = 2")
    clip.rename(other)
    if swap == "other file":
        clip.write_text("secret")
    elif swap == "same size and time":
        ground.victim.write_text("x" * found.st_size)
        os.utime(ground.victim, ns=(found.st_mtime_ns, found.st_mtime_ns))
        clip.symlink_to(ground.victim)
    else:
        clip.symlink_to(ground.victim if swap == "link" else other)
    done = specvlm("export", ground.out, ground.root / "set", "--format", "videofolder", "--videos", how)
    kept = swap == "older link"
    assert ("3 captions" if kept else "2 captions") in done.err
    assert ("left out" in done.err) != kept
    names = {path.name: path.read_text() for path in (ground.root / "set/videos").rglob("*.mp4")}
    assert names.get("q.mp4") == ("video q.mp4" if kept else None)


def test_a_link_where_an_export_is_made(specvlm: Specvlm, ground: Ground) -> None:
    assert specvlm("export", ground.out, ground.root / "set").code == 0
    (ground.root / "set2").symlink_to(ground.outside)
    assert specvlm("export", ground.out, ground.root / "set2", "--overwrite").code == 2
    from specvlm_cli.export import staging

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            staging.hashlib, "sha256", lambda _: type("", (), {"hexdigest": lambda self: "0" * 16})()
        )
        (ground.root / f".specvlm-export-{'0' * 16}").symlink_to(ground.outside)
        done = specvlm("export", ground.out, ground.root / "set3.csv")
    assert refused(done, ground.root / f".specvlm-export-{'0' * 16}")
    assert ground.content() == ground.before


def test_a_fifo_in_the_temp_folder(
    specvlm: Specvlm, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    (temporary / "specvlm-wanted-y").mkdir(parents=True)
    os.mkfifo(temporary / "specvlm-wanted-y" / "alive")
    (temporary / "specvlm-wanted-z").symlink_to(ground.outside)
    (ground.outside / "alive").touch()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("specvlm_cli.run.wanted._YOUNG_S", -1.0)
    assert specvlm("caption", ground.videos, "-o", ground.out, *REUSE).code == 0
    assert (ground.outside / "alive").exists()


def _endless(ledger: Path) -> None:
    """Make a small file whose tables take ages to walk: each page names the next one many times."""
    with closing(sqlite3.connect(ledger, isolation_level=None)) as database:
        ((size,),) = database.execute("PRAGMA page_size").fetchall()
        roots = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name IN ('item', 'caption')"
        ).fetchall()
    content = bytearray(ledger.read_bytes())

    def page(child: int, number: int = 60) -> bytes:
        start = size - 5 * number
        cells = b"".join(struct.pack(">IB", child, one + 1) for one in range(number))
        places = b"".join(struct.pack(">H", start + 5 * one) for one in range(number))
        head = struct.pack(">BHHHBI", 5, 0, number, start, 0, child)
        return (head + places).ljust(start, b"\0") + cells

    for (root,) in roots:
        table = slice((root - 1) * size, root * size)
        content += content[table]
        for _ in range(14):
            content += page(len(content) // size)
        content[table] = page(len(content) // size)
    content[28:32] = struct.pack(">I", len(content) // size)
    ledger.write_bytes(content)


@pytest.mark.parametrize("flag", [(), ("-n",)])
def test_sigterm_ends_a_query_without_end(ground: Ground, flag: tuple[str, ...]) -> None:
    _endless(ground.ledger)
    (ground.videos / "s.mp4").write_text("video s")
    command = [sys.executable, "-m", "tests.cli.drive", "run", "caption", ground.videos, "-o", ground.out]
    with subprocess.Popen(
        [*map(str, command), *REUSE, *flag], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not Path(f"/proc/{process.pid}/fd").is_dir() or not any(
            os.readlink(one) == str(ground.ledger)
            for one in Path(f"/proc/{process.pid}/fd").iterdir()
            if one.is_symlink()
        ):
            time.sleep(0.05)
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
        assert process.stderr is not None
        assert "stopped by a signal" in process.stderr.read()


def test_what_libraries_print_is_escaped(
    specvlm: Specvlm, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "loading \x1b]0;title\x07\x9b2J\u202e50%\rloading 60%\n"
    shown = escaped(f"\x1b[31m{hostile}\x1b[A")
    assert shown == "loading \\x1b]0;title\\x07\\x9b2J\\u202e50%\rloading 60%\n"
    written: list[str] = []
    monkeypatch.setattr("specvlm_cli.console.messages.STDERR.write", written.append)
    talk = Talk()
    monkeypatch.setattr(talk._console, "_force_terminal", True)
    talk._overhear(hostile)
    assert "".join(written) == escaped(hostile)

    def prints(*_: object) -> None:
        print(hostile, file=sys.stderr)

    monkeypatch.setattr("specvlm_cli.run.view.view", prints)
    found = specvlm("status", ground.out)
    assert "\x1b]" not in found.err
    assert "\\x1b]0;title" in found.err


def test_a_finished_run_is_still_finished(specvlm: Specvlm, ground: Ground) -> None:
    assert specvlm("caption", ground.videos, "-o", ground.out, *REUSE).code == 0
    assert not specvlm.loads


def test_a_lock_that_somebody_never_gives_back(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock.share(ground.state / "run.json.lock", alone=True):
        monkeypatch.setattr("specvlm_cli.stopping._asked", ["SIGTERM"])
        with pytest.raises(NotBegunError):
            lock.share(ground.state / "run.json.lock", alone=True, patient=True)


def test_a_part_that_would_unpack_to_too_much(
    specvlm: Specvlm, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parts._MOST_ROWS, "captions", 2)
    stray = ground.part.with_name("part-00000-00004.parquet")
    stray.write_bytes(ground.part.read_bytes())
    assert refused(start(specvlm, ground), stray)
    assert stray.exists()
    assert "more than a run writes" in specvlm("status", ground.out, "--verify").out


def test_a_ledger_that_somebody_holds(
    specvlm: Specvlm, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specvlm_cli.run.ledger.BUSY_TIMEOUT_S", 0.1)
    with closing(sqlite3.connect(ground.ledger, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        found = start(specvlm, ground)
    assert (found.code, "in use by another program" in found.err) == (75, True)


def test_a_division_that_a_crash_left_in_the_middle_of_a_write_is_finished(
    specvlm: Specvlm, ground: Ground
) -> None:
    journal = ground.state / "state-00000.db-journal"
    with closing(sqlite3.connect(ground.ledger, isolation_level=None)) as database:
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE caption SET part = NULL, row = row || hex(zeroblob(9000))")
        left = {path: path.read_bytes() for path in (ground.ledger, journal)}
        database.execute("ROLLBACK")
    for path, content in left.items():
        path.write_bytes(content)
    (ground.state / "resharded").mkdir()
    (ground.state / "resharded/shards").write_text("1")
    assert specvlm("caption", ground.videos, "-o", ground.out, *REUSE).code == 0
    assert not (ground.state / "resharded").exists()
    assert len(rows(ground.out)) == 3


def _part(ground: Ground, name: str, values: pa.Array) -> None:
    """Have another column of that name in the part, and no ledger."""
    table = pq.read_table(ground.part)
    at = table.schema.get_field_index(name)
    changed = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
    pq.write_table(changed, ground.part)
    ground.ledger.unlink()


def _not_utf8() -> pa.Array:
    _, offsets, content = pa.array([b"\xc3", b"q", b"r"]).buffers()
    return pa.Array.from_buffers(pa.string(), 3, [None, offsets, content])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("created_at", pa.array([1 << 60] * 3).cast(pa.timestamp("us", tz="UTC"))),
        ("id", _not_utf8()),
        ("caption", _not_utf8()),
        ("prompt_index", pa.array([0, -7, 0])),
        ("attempts", pa.array([1, 1, -3])),
        ("start", pa.array([None, float("nan"), None], pa.float64())),
        ("end", pa.array([float("inf")] * 3)),
        ("flags", pa.array([[None], [], []], pa.list_(pa.string()))),
        ("mine", pa.array([{"a": 2}] * 3)),
        ("score", pa.array([float("-inf")] * 3)),
    ],
)
def test_parts_that_a_ledger_cannot_be_made_of(
    specvlm: Specvlm, ground: Ground, name: str, values: pa.Array
) -> None:
    _part(ground, name, values)
    for target in ("x.jsonl", "x"):
        assert refused(specvlm("export", ground.out, ground.root / target), ground.part)
    assert refused(start(specvlm, ground), ground.part)
    assert not ground.ledger.exists()
    assert ground.part.exists()


def test_failures_that_a_ledger_cannot_be_made_of(specvlm: Specvlm, ground: Ground) -> None:
    failures = ground.out / "failures/part-00000.parquet"
    failures.parent.mkdir(exist_ok=True)
    row = dict.fromkeys(parts.FAILURE_SCHEMA.names, "x") | {
        "start": None,
        "end": None,
        "at": None,
        "attempts": -2,
    }
    pq.write_table(pa.Table.from_pylist([row], schema=parts.FAILURE_SCHEMA), failures)
    ground.ledger.unlink()
    assert refused(specvlm("export", ground.out, ground.root / "x.csv"), failures)


def test_a_part_of_any_size_is_not_hashed(specvlm: Specvlm, ground: Ground) -> None:
    os.truncate(ground.part, 1 << 42)
    assert "size differs from the ledger's" in specvlm("status", ground.out, "--verify").out


def test_a_fifo_where_shards_are_divided(specvlm: Specvlm, ground: Ground) -> None:
    os.mkfifo(ground.state / ".resharding")
    assert start(specvlm, ground, "--shard", "0/2", "--reshard").code == 0
    assert not (ground.state / ".resharding").exists()


def test_a_ledger_in_another_encoding(specvlm: Specvlm, ground: Ground) -> None:
    with closing(sqlite3.connect(ground.ledger)) as database:
        lines = ["PRAGMA encoding = 'UTF-16be'", *database.iterdump()]
        lines += [
            f"PRAGMA {name} = {database.execute(f'PRAGMA {name}').fetchone()[0]}"
            for name in ("application_id", "user_version")
        ]
    ground.ledger.unlink()
    ground.sql(";\n".join(lines))
    assert refused(start(specvlm, ground), ground.ledger)
    assert refused(specvlm("export", ground.out, ground.root / "x.csv"), ground.ledger)


def test_a_film_that_is_longer_than_any_clock(specvlm: Specvlm, ground: Ground) -> None:
    ground.sql("UPDATE caption SET row = json_set(row, '$.duration_s', 1.5e308)")
    assert specvlm("export", ground.out, ground.root / "x", "--format", "srt").code == 0
    assert "--> 99:59:59,999" in (ground.root / "x/q.srt").read_text()
