"""What must hold of a run folder after anything at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from specvlm_cli.inputs import Inputs

HOT = bytes.fromhex(
    "d9d505f920a163d7"
)  # begins a journal that is to be rolled back; others are ignored by SQLite
Key = tuple[str, int]  # id and prompt index of a caption


class Known(NamedTuple):
    """What the ledgers of a run folder say."""

    states: dict[str, str]  # of each video, by its id
    captions: dict[Key, dict[str, Any]]  # each caption's row
    attempts: dict[str, int]
    crashes: dict[str, int]


def check(out: Path, videos: Path, *, failed: int = 0) -> None:
    """Every video is done once or failed once; rows, parts and ledgers agree; no file is left over."""
    wanted = {item.id for item in Inputs([str(videos)])}
    states: dict[str, str] = {}
    parts: dict[str, tuple[str, int, int]] = {}
    for ledger in _ledgers(out):
        with closing(sqlite3.connect(ledger)) as database:
            assert database.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            here = dict(database.execute("SELECT id, state FROM item"))
            assert not here.keys() & states.keys(), "a video is in one shard alone"
            states |= here
            parts |= {
                name: tuple(rest)
                for name, *rest in database.execute("SELECT name, sha256, rows, bytes FROM part")
            }
    assert set(states) == wanted
    assert sorted(states.values()) == ["done"] * (len(wanted) - failed) + ["failed"] * failed
    check_parts(out, parts)
    captioned = pq.read_table(out / "captions").column("id").to_pylist()
    assert sorted(captioned) == sorted(wanted - {key for key, state in states.items() if state == "failed"})
    if failed:
        assert pq.read_table(out / "failures").num_rows == failed
    left = [path.name for path in (out / ".specvlm").iterdir() if path.name.startswith(".")]
    left += [path.name for path in (out / ".specvlm").glob("*-journal") if path.read_bytes()[:8] == HOT]
    assert not left, f"left over: {left}"


def check_parts(out: Path, parts: dict[str, tuple[str, int, int]]) -> None:
    """Every file is listed; every listed file is there, is what was recorded, and can be read."""
    files = {f"{path.parent.name}/{path.name}": path for path in out.glob("[cf]*/*")}
    assert set(files) == set(parts), "every file is listed, and every listed file is there"
    for name, (digest, rows, size) in parts.items():
        content = files[name].read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (digest, size)
        assert pq.read_table(files[name], page_checksum_verification=True).num_rows == rows


def check_readers(out: Path) -> None:
    """What a reader of the parts finds at any moment, after a kill too: whole files, no caption twice."""
    keys: Counter[Key] = Counter()
    for path in sorted(out.glob("[cf]*/[!.]*.parquet")):
        table = pq.read_table(path, page_checksum_verification=True)
        if path.parent.name == "captions":
            keys.update(
                zip(*(table.column(name).to_pylist() for name in ("id", "prompt_index")), strict=True)
            )
    twice = [key for key, number in keys.items() if number > 1]
    assert not twice, f"a reader finds captions twice: {twice}"


def known(out: Path) -> Known:
    """Return what the ledgers say, as SQLite would find it after a crash; the run folder is not touched."""
    found = Known({}, {}, {}, {})
    with _copied_ledgers(out) as ledgers:
        for ledger in ledgers:
            with closing(sqlite3.connect(ledger)) as database:
                if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'caption'").fetchone():
                    continue
                for identity, state, attempts, crashes in database.execute(
                    "SELECT id, state, attempts, crashes FROM item"
                ):
                    found.states[identity] = state
                    found.attempts[identity] = attempts
                    found.crashes[identity] = crashes
                rows = database.execute("SELECT row FROM caption").fetchall()
                for row in (json.loads(text) for (text,) in rows):
                    found.captions[row["id"], row["prompt_index"]] = row
    return found


@contextmanager
def _copied_ledgers(out: Path) -> Iterator[list[Path]]:
    """Copies, with their journals: opening a ledger rolls back what a crash left, and that is not ours to do."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="copy-") as folder:
        state = out / ".specvlm"
        for path in [*state.glob("state-*.db"), *state.glob("state-*.db-journal")]:
            shutil.copy2(path, folder)
        yield _ledgers(Path(folder), ".")


def _ledgers(root: Path, folder: str = ".specvlm") -> list[Path]:
    return sorted((root / folder).glob("state-*.db"))


def check_ledger(out: Path, *, done: int, failed: int) -> None:
    """So many videos are done and failed, and no other state is left."""
    database = sqlite3.connect(out / ".specvlm" / "state-00000.db")
    states = [state for (state,) in database.execute("SELECT state FROM item")]
    database.close()
    assert sorted(states) == ["done"] * done + ["failed"] * failed
