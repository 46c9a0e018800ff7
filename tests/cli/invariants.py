"""What must hold of a run folder after anything at all."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pyarrow.parquet as pq

from specvlm_cli.inputs import Inputs


def check(out: Path, videos: Path, *, failed: int = 0) -> None:
    """Every video is done once or failed once; rows, parts and ledger agree; no file is left over."""
    wanted = {item.id for item in Inputs([str(videos)])}
    database = sqlite3.connect(out / ".specvlm" / "state-00000.db")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    states = dict(database.execute("SELECT id, state FROM item"))
    assert set(states) == wanted
    assert sorted(states.values()) == ["done"] * (len(wanted) - failed) + ["failed"] * failed

    parts = {name: rest for name, *rest in database.execute("SELECT name, sha256, rows, bytes FROM part")}
    database.close()
    files = {f"{path.parent.name}/{path.name}": path for path in out.glob("[cf]*/*")}
    assert set(files) == set(parts), "every file is listed, and every listed file is there"
    for name, (digest, rows, size) in parts.items():
        content = files[name].read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (digest, size)
        assert pq.read_table(files[name], page_checksum_verification=True).num_rows == rows

    captioned = pq.read_table(out / "captions").column("id").to_pylist()
    assert sorted(captioned) == sorted(wanted - {key for key, state in states.items() if state == "failed"})
    if failed:
        assert pq.read_table(out / "failures").num_rows == failed


def check_ledger(out: Path, *, done: int, failed: int) -> None:
    """So many videos are done and failed, and no other state is left."""
    database = sqlite3.connect(out / ".specvlm" / "state-00000.db")
    states = [state for (state,) in database.execute("SELECT state FROM item")]
    database.close()
    assert sorted(states) == ["done"] * done + ["failed"] * failed
