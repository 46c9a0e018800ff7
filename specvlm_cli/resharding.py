"""Dividing a run folder anew: its ledgers become others, one for each new shard, with the same videos in all.

Every video goes to the shard of its id; captions, failures and attempts go with it. The new ledgers are made in
a folder beside the old ones, and one rename says that they are complete: a crash before it leaves the old
shards as they are, a crash after it is finished by the next start. Parts belong to a shard, so all of them are
written anew from the new ledgers; while that is done, the captions stand in the ledgers alone. It needs the
whole run folder for itself.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from specvlm.durable import publish, sync
from specvlm_cli.exits import FatalError
from specvlm_cli.ledger import Ledger
from specvlm_cli.run_folder import RunFile, RunFolder
from specvlm_cli.shard import Shard, shard_of
from specvlm_cli.text import clean

_BUILDING, _COMPLETE = ".resharding", "resharded"
_NOTE = "shards"  # in that folder: their new number
_PART_ROWS = 1000
_PART = re.compile(r"\.?part-(\d{5})(?:-\d{5,})?\.parquet")
_COLUMNS = (
    "id, path, start_s, end_s, state, attempts, crashes, stage, error_type, error, at, prompts, kept, size_bytes, "
    "mtime_ns"
)


def is_unfinished(root: Path) -> bool:
    """Say whether a division of this run folder was cut short when it could only be finished."""
    return (root / ".specvlm" / _COMPLETE).is_dir()


def finish(root: Path) -> None:
    """Finish a division that was cut short, if there is one.

    Raises:
        BusyError: A start is at work in the folder.
    """
    if is_unfinished(root):
        with RunFolder(root).alone():
            if is_unfinished(root):
                _take_over(root)


def reshard(root: Path, count: int) -> bool:
    """Divide a run folder into `count` shards; False: it has that number, or there is no run yet.

    Raises:
        BusyError: A start is at work in it.
        FatalError: A ledger is damaged, or a part is none of its own.
    """
    if not (root / ".specvlm").is_dir():
        return False
    with RunFolder(root).alone():
        known = RunFolder(root).read()
        if known is None or known.shards == count:
            return False
        _divide(root, known, count)
        _take_over(root)
    return True


def _divide(root: Path, known: RunFile, count: int) -> None:
    """Write the new ledgers, and say in one step that they are complete."""
    state = root / ".specvlm"
    building = state / _BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for index in range(count):
        Ledger.create(building / _name(index)).close()
    for index in range(known.shards):
        folder = RunFolder(root, Shard(index, known.shards))
        if folder.ledger_path(index).exists() or folder.parts.exist():
            folder.parts.kept = known.kept
            with folder.open() as ledger:  # rolls back what a crash left, or rebuilds it from its parts
                ledger.recover(crashed=False)
                folder.parts.repair(
                    ledger
                )  # refuses parts that are none of ours, which would be deleted below
            _deal_out(folder.ledger_path(index), building, count)
    (building / _NOTE).write_text(str(count))
    for path in (*building.iterdir(), building):
        sync(path)
    building.rename(state / _COMPLETE)
    sync(state)


def _name(index: int) -> str:
    return f"state-{index:05d}.db"


def _deal_out(old: Path, building: Path, count: int) -> None:
    """Give each video of an old ledger, with its captions, to the new ledger of its id."""
    for index in range(count):
        with closing(sqlite3.connect(building / _name(index), isolation_level=None)) as database:
            database.create_function(
                "shard_of", 1, lambda identity: shard_of(identity, count), deterministic=True
            )
            database.execute("ATTACH DATABASE ? AS old", (str(old),))
            database.execute("BEGIN")
            database.execute(
                f"""INSERT INTO main.item ({_COLUMNS})
                    SELECT {_COLUMNS} FROM old.item WHERE shard_of(id) = ? ORDER BY ordinal""",
                (index,),
            )
            database.execute(
                """INSERT INTO main.caption (item, prompt_index, row)
                   SELECT ours.ordinal, prompt_index, row FROM old.caption AS theirs
                   JOIN old.item AS held ON held.ordinal = theirs.item
                   JOIN main.item AS ours ON ours.id = held.id ORDER BY 1, 2"""
            )
            database.execute("COMMIT")


def _take_over(root: Path) -> None:
    """Put the new ledgers in the place of the old ones and write their parts; it may be cut short and begun again."""
    complete = root / ".specvlm" / _COMPLETE
    known = RunFolder(root).read()
    if known is None:
        raise FatalError(
            f"{clean(str(root))}: its run.json is gone while it was divided; put it back from a copy"
        )
    count = _count(complete, known)
    for path in _parts(root, max(known.shards, count)):
        path.unlink()
    for path in sorted(complete.glob("state-*.db")):
        publish(path, complete.with_name(path.name))
    for index in range(count, max(known.shards, count)):
        complete.with_name(_name(index)).unlink(missing_ok=True)
    RunFolder(root).write(replace(known, shards=count))
    for index in range(count):
        _write_parts(RunFolder(root, Shard(index, count)), known)
    shutil.rmtree(complete)
    sync(complete.parent)


def _count(complete: Path, known: RunFile) -> int:
    """Return the new number of shards, which stands in a file as long as anything is left to do."""
    note = complete / _NOTE
    return int(note.read_text()) if note.exists() else known.shards


def _parts(root: Path, shards: int) -> Iterator[Path]:
    """Yield the parts and failures files, finished or not, of so many shards."""
    for folder in ("captions", "failures"):
        for path in (root / folder).glob("*.parquet"):
            found = _PART.fullmatch(path.name)
            if found and int(found.group(1)) < shards:
                yield path


def _write_parts(folder: RunFolder, known: RunFile) -> None:
    folder.parts.kept = known.kept
    with folder.open() as ledger:
        folder.parts.repair(ledger)
        folder.parts.close_part(ledger, _PART_ROWS)
        folder.parts.write_failures(ledger)
