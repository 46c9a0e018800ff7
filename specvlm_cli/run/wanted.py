"""What one start is about: its videos, in a temporary SQLite file that the ledger can be joined with.

Ten million rows fit, because nothing is held in memory; nothing of it is in the run folder, so a start that
has nothing to do touches no file there. It lies where Python's `tempfile` puts things (TMPDIR).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from os import fsdecode
from pathlib import Path
from typing import Any, BinaryIO, Self

from specvlm_cli.console.safe_text import clean, short
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import MOST_PROMPTS, Item
from specvlm_cli.safe_files import UnsafeFileError, open_regular

_BATCH = 10_000
_PREFIX, _ALIVE = "specvlm-wanted-", "alive"
_YOUNG_S = 60.0  # a folder that was made just now may not be locked yet

# The row that is used for each id that comes several times: the first one that names a video.
_DOUBLED = """(SELECT id, coalesce(min(iif(problem IS NULL, place, NULL)), min(place)) AS place
               FROM video GROUP BY id HAVING count(*) > 1)"""


@dataclass(frozen=True, slots=True)
class WantedVideos:
    """The videos of one start, each once.

    Attributes:
        path: The SQLite file, with one table `video`.
        count: How many videos it holds.
        doubles: How many rows were merged with an earlier one of the same video.
    """

    path: Path
    count: int
    doubles: int
    _folder: tempfile.TemporaryDirectory[str]
    _alive: BinaryIO  # locked as long as we live

    @classmethod
    def gather(cls, items: Iterable[Item], *, overlapping: bool = True) -> Self:
        """Store the items, and put those of one id together.

        Args:
            items: The videos, in order.
            overlapping: One file may come twice under two ids, as from two inputs.

        Raises:
            UsageError: Two different videos have the same id.
        """
        _sweep(Path(tempfile.gettempdir()))
        folder = tempfile.TemporaryDirectory(prefix=_PREFIX)
        alive = Path(folder.name, _ALIVE).open("wb")  # noqa: SIM115  as long as the object lives
        try:
            fcntl.flock(alive, fcntl.LOCK_EX)
            path = Path(folder.name, "wanted.db")
            count, doubles = _fill(path, items, overlapping)
        except BaseException:
            alive.close()
            folder.cleanup()
            raise
        return cls(path, count, doubles, folder, alive)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._alive.close()
        self._folder.cleanup()


def _sweep(place: Path) -> None:
    """Remove what starts left behind that were killed: folders of ours that no process holds."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError, UnsafeFileError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            with open_regular(folder / _ALIVE) as alive:
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - found.st_mtime > _YOUNG_S:
                    shutil.rmtree(folder, ignore_errors=True)


def _fill(path: Path, items: Iterable[Item], overlapping: bool) -> tuple[int, int]:
    database = sqlite3.connect(path, isolation_level=None)
    try:
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536"):
            database.execute(f"PRAGMA {setting}")
        database.execute(
            """CREATE TABLE video (place INTEGER PRIMARY KEY, id TEXT NOT NULL, path BLOB NOT NULL, start_s REAL,
               end_s REAL, prompts TEXT, kept TEXT, problem TEXT, own_id INTEGER NOT NULL,
               input_path BLOB) STRICT"""
        )
        stored = 0
        for rows in _batches(map(_row, items)):
            database.execute("BEGIN")
            database.executemany(
                """INSERT INTO video (id, path, start_s, end_s, prompts, kept, problem, own_id, input_path)
                   VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                rows,
            )
            database.execute("COMMIT")
            stored += len(rows)
        database.execute("CREATE INDEX video_id ON video (id)")
        _merge(database)
        if overlapping:
            _drop_seen_files(database)
        count = int(database.execute("SELECT count(*) FROM video").fetchone()[0])
        return count, stored - count
    finally:
        database.close()


def _row(item: Item) -> tuple[Any, ...]:
    prompts = None if item.prompts is None else json.dumps(item.prompts)
    return (
        item.id,
        item.path,
        item.start_s,
        item.end_s,
        prompts,
        item.kept,
        item.problem,
        int(item.own_id),
        item.input_path,
    )


def _batches(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _merge(database: sqlite3.Connection) -> None:
    """Keep the first row of each id; rows that ask something else about the same video add their prompts."""
    if not database.execute(f"SELECT EXISTS {_DOUBLED}").fetchone()[0]:
        return
    _refuse_same_id(database)
    for place, prompts in list(_asked_together(database)):
        database.execute("UPDATE video SET prompts = ? WHERE place = ?", (prompts, place))
    database.execute(
        f"DELETE FROM video WHERE place IN (SELECT video.place FROM video JOIN {_DOUBLED} AS first USING (id)"
        " WHERE video.place != first.place)"
    )


def _drop_seen_files(database: sqlite3.Connection) -> None:
    """Keep one file only once: through two inputs it has two ids. Ids that a manifest gave are meant."""
    database.execute(
        "CREATE INDEX video_path ON video (path, start_s, end_s, place) WHERE NOT own_id AND problem IS NULL"
    )
    database.execute(
        """DELETE FROM video WHERE NOT own_id AND problem IS NULL AND EXISTS (
             SELECT 1 FROM video AS earlier INDEXED BY video_path
             WHERE earlier.path = video.path AND earlier.start_s IS video.start_s
             AND earlier.end_s IS video.end_s AND earlier.place < video.place
             AND NOT earlier.own_id AND earlier.problem IS NULL)"""
    )
    database.execute("DROP INDEX video_path")


def _refuse_same_id(database: sqlite3.Connection) -> None:
    """Two videos with one id would be taken for one."""
    found = database.execute(
        f"""SELECT first.path, video.path, video.id, video.own_id FROM video
            JOIN {_DOUBLED} AS doubled USING (id) JOIN video AS first ON first.place = doubled.place
            WHERE video.problem IS NULL AND (video.path != first.path
            OR video.start_s IS NOT first.start_s OR video.end_s IS NOT first.end_s) LIMIT 1"""
    ).fetchone()
    if found is not None:
        raise UsageError(_same_id(*found))


def _same_id(first: bytes, second: bytes, identity: str, own_id: bool) -> str:
    one, other, shown = clean(fsdecode(first)), clean(fsdecode(second)), repr(short(identity, 60))
    if not own_id:
        fix = "give the folder above both, or caption them into separate -o folders"
        return f"{one} and {other} have one path below their inputs, so one id; {fix}"
    made = '--id-column "" makes ids of paths and times'
    if one == other:
        return f"several parts of {one} have the id {shown} in the manifest; give each its own, or {made}"
    return f"{one} and {other} have the same id {shown} in the manifest; give each video its own, or {made}"


def _asked_together(database: sqlite3.Connection) -> Iterator[tuple[int, str]]:
    """Yield (place of the first row, all prompts) of videos that several rows ask different things about."""
    differing = database.execute(
        f"""SELECT DISTINCT doubled.place, doubled.id FROM video JOIN {_DOUBLED} AS doubled USING (id)
            JOIN video AS first ON first.place = doubled.place
            WHERE video.prompts IS NOT first.prompts AND video.problem IS NULL"""
    ).fetchall()
    for place, identity in differing:
        prompts: dict[str, None] = {}
        for path, text in database.execute(
            "SELECT path, prompts FROM video WHERE id = ? AND problem IS NULL ORDER BY place", (identity,)
        ):
            if text is None:
                raise UsageError(
                    f"{clean(fsdecode(path))} is in the manifest with a prompt and without; give both or none"
                )
            prompts |= dict.fromkeys(json.loads(text))
            if len(prompts) > MOST_PROMPTS:
                raise UsageError(f"{clean(fsdecode(path))} has more than {MOST_PROMPTS} prompts; give fewer")
        yield place, json.dumps(list(prompts))
