"""Redistributing a run folder: its ledgers become others, one for each new shard, with the same videos in all.

Every video goes to the shard of its id; captions, failures and attempts go with it. The new ledgers are made in
a folder next to the old ones, and one rename says that they are complete: a crash before it leaves the old
shards as they are, a crash after it is finished by the next start. Parts belong to a shard, so all of them are
rewritten from the new ledgers; while that is done, the captions are in the ledgers alone. It needs the
whole run folder for itself.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from os.path import lexists
from pathlib import Path

from specvlm.durable import publish, sync
from specvlm.files import remove
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.run.database import connect
from specvlm_cli.run.layout import RunFile, RunFolder
from specvlm_cli.run.ledger import BUSY_TIMEOUT_S, Ledger
from specvlm_cli.run.parts import listed
from specvlm_cli.run.shard import MOST_SHARDS, Shard, shard_of
from specvlm_cli.safe_files import new_file, read_whole, require_file, require_folder
from specvlm_cli.stopping import end_if_asked

_BUILDING, _COMPLETE = ".resharding", "resharded"
_NOTE = "shards"  # in that folder: their new number
_PART_ROWS = 1000
_PART = re.compile(r"\.?part-([0-9]{5})(?:-[0-9]{5,})?\.parquet")
_COLUMNS = (
    "id, path, start_s, end_s, state, attempts, crashes, stage, error_type, error, at, prompts, kept, size_bytes, "
    "mtime_ns, partly, input_path"
)


def is_unfinished(root: Path) -> bool:
    """Say whether a division of this run folder was cut short when it could only be finished."""
    return lexists(root / ".specvlm" / _COMPLETE)


def finish(root: Path) -> None:
    """Finish a division that was cut short, if there is one.

    Raises:
        BusyError: A start is at work in the folder.
    """
    if is_unfinished(root):
        with RunFolder(root).alone():
            if is_unfinished(root):
                _take_over(root, made_now=False)


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
        _take_over(root, made_now=True)
    return True


def _divide(root: Path, known: RunFile, count: int) -> None:
    """Write the new ledgers, and say in one step that they are complete."""
    state = root / ".specvlm"
    building = state / _BUILDING
    if lexists(building):
        remove(building)
    building.mkdir()
    for index in range(count):
        end_if_asked()
        Ledger.create(building / _name(index)).close()
    for index in range(known.shards):
        end_if_asked()
        folder = RunFolder(root, Shard(index, known.shards))
        if folder.ledger_path(index).exists() or folder.parts.exist():
            folder.parts.kept = known.kept
            with folder.open() as ledger:  # rolls back what a crash left, or rebuilds it from its parts
                ledger.recover(crashed=False)
                folder.parts.repair(
                    ledger
                )  # refuses parts that are none of ours, which would be deleted below
            _deal_out(folder.ledger_path(index), building, count)
    with new_file(building / _NOTE) as note:
        note.write(str(count).encode())
    for path in (*building.iterdir(), building):
        sync(path)
    building.rename(state / _COMPLETE)
    sync(state)


def _name(index: int) -> str:
    return f"state-{index:05d}.db"


@contextmanager
def _beside(new: Path, old: Path, count: int) -> Iterator[sqlite3.Connection]:
    """Open a new ledger with an old one attached as `old`; both were checked. SQL can ask `shard_of(id)`."""
    require_file(old)
    with closing(connect(new, "rw", BUSY_TIMEOUT_S)) as database:
        database.create_function(
            "shard_of", 1, lambda identity: shard_of(str(identity), count), deterministic=True
        )
        database.execute("ATTACH DATABASE ? AS old", (str(old),))
        yield database


def _deal_out(old: Path, building: Path, count: int) -> None:
    """Give each video of an old ledger, with its captions, to the new ledger of its id."""
    for index in range(count):
        with _beside(building / _name(index), old, count) as database:
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


def _take_over(root: Path, *, made_now: bool) -> None:
    """Put the new ledgers in the place of the old ones and write their parts; it may be cut short and begun again."""
    complete = root / ".specvlm" / _COMPLETE
    known = RunFolder(root).read()
    if known is None:
        raise FatalError(
            f"{clean(str(root))}: its run.json is gone while it was divided; put it back from a copy"
        )
    require_folder(complete)
    count = _count(complete, known)
    if not made_now:
        _require_complete(complete, known.shards, count)
    for path in _parts(root, max(known.shards, count)):
        path.unlink()
    for index in range(count):
        if (complete / _name(index)).exists():
            publish(complete / _name(index), complete.with_name(_name(index)))
    for index in range(count, max(known.shards, count)):
        complete.with_name(_name(index)).unlink(missing_ok=True)
    RunFolder(root).write(replace(known, shards=count))
    for index in range(count):
        _write_parts(RunFolder(root, Shard(index, count)), known)
    remove(complete)
    sync(complete.parent)


def _count(complete: Path, known: RunFile) -> int:
    """Return the new number of shards, which is in a file as long as anything is left to do."""
    try:
        count = int(read_whole(complete / _NOTE)[:20])
        if 1 <= count <= MOST_SHARDS:
            return count
    except FileNotFoundError:
        if not any(complete.iterdir()):
            return known.shards
    except ValueError:
        pass
    raise _planted(complete, f"{_NOTE} is not a number of shards")


def _require_complete(complete: Path, before: int, count: int) -> None:
    """Check, before anything is removed, that the new ledgers are ours and hold every caption of the old ones.

    Raises:
        FatalError: They do not.
    """
    names = [_name(index) for index in range(count)]
    if odd := sorted({path.name for path in complete.iterdir()} - {_NOTE, *names}):
        raise _planted(complete, f"{odd[0]!r} does not belong there")
    news = [one if lexists(one) else complete.with_name(one.name) for one in map(complete.joinpath, names)]
    for new in news:
        try:
            Ledger.open(
                new
            ).close()  # one that has its place already may have been left in the middle of a write
        except (FatalError, FileNotFoundError) as error:
            raise _planted(complete, f"{new.name} is not there, or not a ledger") from error
    for old in filter(lexists, (complete.with_name(_name(index)) for index in range(before))):
        Ledger.open(old).close()  # refuses what is not a ledger
        for index, new in enumerate(news):
            if new != old and (lost := _captions_lost(old, new, index, count)):
                raise _planted(complete, f"{new.name} lacks {lost} captions of {old.name}")


def _captions_lost(old: Path, new: Path, index: int, count: int) -> int:
    """Return how many captions of videos of a new shard are in an old ledger and not in the new one."""
    with _beside(new, old, count) as database:
        sql = """SELECT count(*) FROM old.caption AS theirs JOIN old.item AS held ON held.ordinal = theirs.item
                 LEFT JOIN main.item AS ours ON ours.id = held.id
                 LEFT JOIN main.caption AS kept
                   ON kept.item = ours.ordinal AND kept.prompt_index = theirs.prompt_index
                 WHERE shard_of(held.id) = ? AND kept.item IS NULL"""
        return int(database.execute(sql, (index,)).fetchone()[0])


def _planted(complete: Path, what: str) -> FatalError:
    return FatalError(
        f"{clean(str(complete))}: {clean(what)}, so specvlm did not make this folder; move it away, then start again"
    )


def _parts(root: Path, shards: int) -> Iterator[Path]:
    """Yield the parts and failures files, finished or not, of so many shards."""
    for folder in ("captions", "failures"):
        for path in listed(root / folder):
            found = _PART.fullmatch(path.name)
            if found and int(found.group(1)) < shards:
                yield path


def _write_parts(folder: RunFolder, known: RunFile) -> None:
    folder.parts.kept = known.kept
    with folder.open() as ledger:
        folder.parts.repair(ledger)
        folder.parts.close_part(ledger, _PART_ROWS)
        folder.parts.write_failures(ledger)
