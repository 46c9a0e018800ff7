"""The ledger: what is to be done, what is done, and the captions, in one SQLite file with one writer.

A caption is stored in the same transaction that marks its video done, so a crash can lose neither without the
other. Rollback journal and synchronous=FULL: a committed caption survives a power cut, and no version of
SQLite can corrupt the file the way write-ahead logs could before 3.51.3. Every write takes its lock at once
(BEGIN IMMEDIATE).

It knows rows as plain dicts and parts as names; it reads no video and writes no Parquet.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from sqlite_utils import Database

from specvlm_cli.caption.failure import BAD_INPUT
from specvlm_cli.caption.failure import Failure as Failure
from specvlm_cli.console.safe_text import clean, path_bytes, path_text
from specvlm_cli.exits import FatalError
from specvlm_cli.inputs.item import Item
from specvlm_cli.run import database as sqlite_file
from specvlm_cli.run.migrations import READABLE, STEPS, migrate, require_schema, schema_version, sign
from specvlm_cli.run.stored_rows import OddRowError, read_row
from specvlm_cli.run.stored_rows import Row as Row
from specvlm_cli.run.wanted import WantedVideos
from specvlm_cli.safe_files import new_file

STATES = ("pending", "running", "done", "failed")
MOST_PARTS = 10**15  # a part number has at most fifteen digits
_MOST_ATTEMPTS = 1 << 31
MOST_CRASHES = 3  # a video that was running at so many crashes, alone at the last, is not tried again
SUSPECT_CRASHES = MOST_CRASHES - 1  # one that was running at so many runs with nothing else
BUSY_TIMEOUT_S = 60.0
UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)  # SQLite's message may quote damaged bytes
_REBUILD = "delete it to have it rebuilt from captions/"


@dataclass(frozen=True, slots=True)
class Claim:
    """One video to caption."""

    ordinal: int  # its place in the ledger
    item: Item
    attempts: int  # this one included
    only: tuple[int, ...] | None = None  # indexes of the prompts to ask, those without a caption; None: all


class FileStamp(NamedTuple):
    """What shows later whether a file is still the one that was captioned."""

    size_bytes: int | None
    mtime_ns: int | None


NO_FILE = FileStamp(None, None)


class Planned(NamedTuple):
    """A video, or a part of it, that a start would work on."""

    path: bytes
    start_s: float | None
    end_s: float | None


class Moved(NamedTuple):
    """A wanted video that the ledger knows by its id, at another path."""

    identity: str
    own_id: bool  # the id is the manifest's
    then: bytes
    now: bytes


@dataclass(frozen=True, slots=True)
class Part:
    """A finished file of the run folder."""

    name: str  # path inside the run folder
    sha256: str
    rows: int
    size_bytes: int


class Ledger:
    """One open ledger. Only the holder of the run folder's lock may open it for writing."""

    def __init__(self, connection: sqlite3.Connection, path: Path = Path(":memory:")) -> None:
        self._db = Database(connection, execute_plugins=False)
        self._path = path
        self._all_wanted = False  # what is wanted is all there is, which makes counting cheap
        self._prompts = 1  # of a video that brings none of its own
        self._some_lack = False  # some wanted videos were done before prompts were added
        self._partly = "partly" if schema_version(self._db) >= 6 else "0"

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing ledger for writing; a journal that a crash left is rolled back by SQLite.

        Raises:
            FatalError: The file is damaged, is no ledger, is one of a newer version, or has other tables than a
                ledger.
        """
        connection = _connect(path, "rw")
        try:
            require_schema(connection, schema_version(Database(connection, execute_plugins=False)))
            _set_up(connection)
            _check(connection)
            migrate(Database(connection, execute_plugins=False))
            sqlite_file.never_interrupt(connection)
        except (FatalError, *UNREADABLE) as error:
            connection.close()
            raise refused(path, error) from error
        return cls(connection, path)

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make an empty ledger in a new file."""
        new_file(path).close()
        connection = _connect(path, "rw")
        _set_up(connection)
        sqlite_file.never_interrupt(connection)
        return cls._new(connection, path)

    @classmethod
    def in_memory(cls) -> Self:
        """Make an empty ledger that is gone when it is closed."""
        return cls._new(sqlite3.connect(":memory:", isolation_level=None), Path(":memory:"))

    @classmethod
    def _new(cls, connection: sqlite3.Connection, path: Path) -> Self:
        database = Database(connection, execute_plugins=False)
        sign(database)
        migrate(database)
        return cls(connection, path)

    @classmethod
    def peek(cls, path: Path) -> Self | None:
        """Open for reading, touching no file; None where only an opening for writing can tell the state."""
        try:
            connection = _connect(path, "ro")
            try:
                version = schema_version(Database(connection, execute_plugins=False))
                require_schema(connection, version)
                if version >= READABLE:
                    return cls(connection, path)
            except (FatalError, *UNREADABLE):
                pass
            connection.close()
        except (FatalError, OSError, sqlite3.OperationalError):
            pass
        return None

    @property
    def is_current(self) -> bool:
        """Say whether this ledger, and the parts made of it, are as this version writes them."""
        return schema_version(self._db) == len(STEPS)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction whose write lock is taken first, so that it cannot fail half way for want of it.

        Inside another one it is part of that: all of it is committed, or nothing.
        """
        if self._db.conn.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.commit()
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself, e.g. when the disk is full
                self._db.rollback()
            raise

    def _one(self, sql: str, *values: object) -> Any:
        return self._db.execute(sql, values).fetchone()[0]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the file where the block reads something that no run writes.

        Raises:
            FatalError: It does.
        """
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError, OddRowError) as error:
            known = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if known == sqlite3.SQLITE_ERROR or is_damage(error):  # e.g. malformed JSON
                raise refused(self._path, error) from error
            raise

    # What is wanted by this run

    def want(self, wanted: WantedVideos, prompts: int = 1) -> None:
        """Say which videos this run is about, and how many prompts each has. It changes nothing in this file.

        A video that is known already keeps the id it has: given through another folder, its path below
        the input root, and so its id, would be another one, and it would be captioned twice.

        Args:
            wanted: The videos.
            prompts: How many a video has that brings none of its own.
        """
        self._prompts = prompts
        self._db.execute("ATTACH DATABASE ? AS wanted", (str(wanted.path),))
        with sqlite_file.undefended(self._db.conn):
            for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536"):
                self._db.execute(f"PRAGMA wanted.{setting}")
        new = self._count_new()
        if new and self._keep_known_ids():
            new = self._count_new()
        self._all_wanted = not new and wanted.count == self._one("SELECT count(*) FROM item")
        self._find_lacking()
        self._db.execute("DROP TABLE IF EXISTS wanted.differing")
        self._db.execute(
            """CREATE TABLE wanted.differing AS
               SELECT ordinal, place FROM wanted.video AS video JOIN item USING (id)
               WHERE (item.path, item.prompts, item.kept, item.start_s, item.end_s)
                 IS NOT (video.path, video.prompts, video.kept, video.start_s, video.end_s)
               AND video.problem IS NULL"""
        )

    def _count_new(self) -> int:
        if not self._one("SELECT EXISTS (SELECT 1 FROM item)"):
            return int(self._one("SELECT count(*) FROM wanted.video"))
        return int(self._one("SELECT count(*) FROM wanted.video WHERE id NOT IN (SELECT id FROM item)"))

    def _keep_known_ids(self) -> int:
        """Give wanted videos that are known by another id that one; return how many."""
        if not self._one("SELECT EXISTS (SELECT 1 FROM item)"):
            return 0
        known = self._db.execute(
            """UPDATE wanted.video AS video SET id = item.id FROM item
               WHERE NOT video.own_id AND video.problem IS NULL
               AND video.id NOT IN (SELECT id FROM item)
               AND item.path = video.path AND item.start_s IS video.start_s AND item.end_s IS video.end_s
               AND item.id NOT IN (SELECT id FROM wanted.video)"""
        )
        return int(known.rowcount)

    def moved(self) -> Iterator[Moved]:
        """Yield the wanted videos that the ledger knows by their id at another path."""
        sql = """SELECT video.id, video.own_id, item.path, video.path FROM wanted.differing
                 JOIN item USING (ordinal) JOIN wanted.video AS video USING (place)
                 WHERE item.path != video.path AND video.problem IS NULL"""
        with self._reading():
            for identity, own, then, now in self._db.execute(sql):
                yield Moved(str(identity), bool(own), _path(then), _path(now))

    @property
    def _incomplete(self) -> str:
        """The condition that one of a wanted video's prompts has no caption; for a join of `video` and `item`."""
        asked = f"coalesce(json_array_length(video.prompts), {self._prompts:d})"
        return f"""((SELECT count(*) FROM caption WHERE caption.item = item.ordinal AND prompt_index < {asked})
                    < {asked})"""

    @property
    def _lacks(self) -> str:
        """The condition that a wanted video is done but for prompts that were added since."""
        known = "item.state = 'done' AND item.ordinal IN (SELECT ordinal FROM wanted.lacking)"
        return f"({known} AND {self._incomplete})" if self._some_lack else "0"

    def _find_lacking(self) -> None:
        """List the wanted videos that are done and lack a caption for a prompt; there are none where each has one."""
        self._db.execute("DROP TABLE IF EXISTS wanted.lacking")
        self._db.execute("CREATE TABLE wanted.lacking (ordinal INTEGER PRIMARY KEY)")
        own = "SELECT EXISTS (SELECT 1 FROM wanted.video WHERE json_array_length(prompts) > 1)"
        if self._prompts > 1 or self._one(own):
            self._db.execute(
                f"""INSERT INTO wanted.lacking SELECT item.ordinal FROM wanted.video AS video JOIN item USING (id)
                    WHERE item.state = 'done' AND {self._incomplete}"""
            )
        self._some_lack = bool(self._one("SELECT EXISTS (SELECT 1 FROM wanted.lacking)"))

    def asked_elsewhere(self, prompts: Sequence[str]) -> tuple[bytes, str] | None:
        """Return (path, prompt) of a video that has a caption for a prompt, but under another index than is wanted.

        `prompts`: those of a video that brings none of its own.
        """
        sql = f"""SELECT item.path, asked.value FROM wanted.video AS video JOIN item USING (id)
                  JOIN json_each(coalesce(video.prompts, ?)) AS asked
                  WHERE item.ordinal IN (
                      SELECT ordinal FROM wanted.lacking UNION ALL
                      SELECT ordinal FROM item WHERE state IN ('pending', 'running', 'failed') AND {self._partly})
                  AND NOT EXISTS (
                      SELECT 1 FROM caption WHERE caption.item = item.ordinal AND prompt_index = asked.key)
                  AND EXISTS (SELECT 1 FROM caption WHERE caption.item = item.ordinal
                              AND json_extract(row, '$.prompt') = asked.value) LIMIT 1"""
        with self._reading():
            found = self._db.execute(sql, (json.dumps(list(prompts)),)).fetchone()
        return None if found is None else (_path(found[0]), str(found[1]))

    def asked_differently(self) -> bytes | None:
        """Return the path of a video whose captions are for other prompts of its own than it has now.

        What the captions say counts: a ledger that was rebuilt from its parts knows no other prompts.
        """
        sql = f"""SELECT item.path, video.prompts,
                   (SELECT json_group_array(prompt) FROM (
                      SELECT json_extract(row, '$.prompt') AS prompt FROM caption
                      WHERE caption.item = ordinal ORDER BY prompt_index))
                 FROM wanted.differing JOIN item USING (ordinal) JOIN wanted.video AS video USING (place)
                 WHERE item.prompts IS NOT video.prompts AND (item.state = 'done' OR {self._partly})"""
        with self._reading():
            for path, now, then in self._db.execute(sql):
                if now is None or json.loads(now) != json.loads(then):
                    return _path(path)
        return None

    def cut_differently(self) -> str | None:
        """Return the id of a video that has a caption for another part than is wanted now."""
        sql = """SELECT item.id FROM wanted.differing
                 JOIN item USING (ordinal) JOIN wanted.video AS video USING (place)
                 WHERE (item.start_s, item.end_s) IS NOT (video.start_s, video.end_s) AND item.state = 'done'
                 LIMIT 1"""
        found = self._db.execute(sql).fetchone()
        return None if found is None else str(found[0])

    def some_ids(self) -> list[str]:
        """Return a hundred ids, or all."""
        return [str(identity) for (identity,) in self._db.execute("SELECT id FROM item LIMIT 100")]

    def counts(self) -> dict[str, int]:
        """Return how many wanted videos are pending (new ones included), running, done, failed.

        One that lacks a caption for a prompt that was added is pending.
        """
        if self._all_wanted and not self._some_lack:
            sql = "SELECT state, count(*) FROM item GROUP BY 1"
        else:
            state = "coalesce(item.state, iif(video.problem IS NULL, 'pending', 'failed'))"
            sql = f"""SELECT iif({self._lacks}, 'pending', {state}), count(*)
                      FROM wanted.video AS video LEFT JOIN item USING (id) GROUP BY 1"""
        counts = dict.fromkeys(STATES, 0)
        with self._reading():
            for state, number in self._db.execute(sql):
                if state not in counts:
                    raise OddRowError(f"a video whose state is {str(state)[:60]!r}")
                counts[state] = number
        return counts

    def to_do(self, overwrite: bool, retry_failed: bool, limit: int | None) -> Iterator[Planned]:
        """Yield the wanted videos that a start would work on, in order."""
        sql, values = self._to_do("path, video.start_s, video.end_s", overwrite, retry_failed, limit)
        with self._reading():
            for path, start_s, end_s in self._db.execute(sql, values):
                yield Planned(_path(path), start_s, end_s)

    def count_to_do(self, overwrite: bool, retry_failed: bool, limit: int | None) -> int:
        """Return how many wanted videos a start would work on."""
        if self._all_wanted and not (overwrite or retry_failed or self._some_lack):
            unlimited = int(self._one("SELECT count(*) FROM item WHERE state IN ('pending', 'running')"))
            return unlimited if limit is None else min(limit, unlimited)
        sql, values = self._to_do("id", overwrite, retry_failed, limit)
        return int(self._db.execute(f"SELECT count(*) FROM ({sql})", values).fetchone()[0])

    def _to_do(
        self, column: str, overwrite: bool, retry_failed: bool, limit: int | None
    ) -> tuple[str, dict[str, Any]]:
        """Return a query, and its values, for columns of the wanted videos that a start would work on."""
        states = "pending running" + " failed" * (retry_failed or overwrite) + " done" * overwrite
        sql = f"""SELECT video.{column} FROM wanted.video AS video LEFT JOIN item USING (id)
                  WHERE video.problem IS NULL
                  AND (instr(:states, coalesce(item.state, 'pending')) OR {self._lacks})
                  ORDER BY item.ordinal IS NULL, item.ordinal, video.place LIMIT :limit"""
        return sql, {"states": states, "limit": -1 if limit is None else limit}

    def has_news(self) -> bool:
        """Say whether a wanted row that names no video has not failed for that yet, or one that did names one now."""
        sql = """SELECT EXISTS (SELECT 1 FROM wanted.video WHERE problem IS NOT NULL AND id NOT IN (
                                  SELECT id FROM item WHERE state NOT IN ('pending', 'running')))
                     OR EXISTS (SELECT 1 FROM item WHERE state = 'failed' AND error_type = ?
                                AND id IN (SELECT id FROM wanted.video WHERE problem IS NULL))"""
        return bool(self._one(sql, BAD_INPUT))

    def register(self, *, reuse: bool = False) -> int:
        """Add the wanted videos that are new, and follow those that moved or bring along something else.

        What is done keeps the prompts that it was captioned with, but where that is to be so (`reuse`).

        A row that names no video has failed at once; it is pending again once it names one. Returns how many
        failed like that just now.
        """
        with self.writing():
            self._db.execute("INSERT OR REPLACE INTO counter (name, value) VALUES ('registered', 1)")
            self._follow(reuse)
            self._settle_complete()
            if not self._all_wanted:
                self._add_new()
            return self._refuse_bad_rows()

    def _follow(self, reuse: bool) -> None:
        self._db.execute(
            """UPDATE item SET path = video.path, kept = video.kept,
                   prompts = iif(state != 'done' OR ?1, video.prompts, item.prompts),
                   start_s = iif(state != 'done' OR ?1, video.start_s, item.start_s),
                   end_s = iif(state != 'done' OR ?1, video.end_s, item.end_s)
               FROM wanted.differing JOIN wanted.video AS video USING (place)
               WHERE item.ordinal = differing.ordinal""",
            (reuse,),
        )
        self._db.execute(
            """UPDATE item SET input_path = video.input_path FROM wanted.video AS video
               WHERE video.id = item.id AND item.input_path IS NOT video.input_path"""
        )

    def _settle_complete(self) -> None:
        """Mark what was only to be asked further prompts done, where those are not wanted any more."""
        self._db.execute(
            f"""UPDATE item SET state = 'done', crashes = 0, stage = NULL, error_type = NULL, error = NULL, partly = 0
                WHERE partly AND state IN ('pending', 'failed') AND EXISTS (
                    SELECT 1 FROM wanted.video AS video WHERE video.id = item.id AND NOT {self._incomplete})"""
        )

    def _add_new(self) -> None:
        unknown = "WHERE video.id NOT IN (SELECT id FROM item)"
        if not self._one("SELECT EXISTS (SELECT 1 FROM item)"):
            self._all_wanted, unknown = True, ""
        self._db.execute(
            f"""INSERT INTO item (id, path, start_s, end_s, prompts, kept, input_path)
                SELECT id, path, start_s, end_s, prompts, kept, input_path FROM wanted.video AS video {unknown}
                ORDER BY place"""
        )

    def _refuse_bad_rows(self) -> int:
        """Fail the rows that name no video, and have those tried that name one by now."""
        bad = "FROM wanted.video AS video WHERE video.id = item.id AND video.problem IS NOT NULL"
        if self._one("SELECT EXISTS (SELECT 1 FROM item WHERE error_type = ?)", BAD_INPUT):
            self._db.execute(
                """UPDATE item SET state = 'pending' WHERE state = 'failed' AND error_type = ?
                   AND id IN (SELECT id FROM wanted.video WHERE problem IS NULL)""",
                (BAD_INPUT,),
            )
        if not self._one("SELECT EXISTS (SELECT 1 FROM wanted.video WHERE problem IS NOT NULL)"):
            return 0
        refused = self._db.execute(
            f"""UPDATE item SET state = 'failed', stage = 'open', error_type = ?, at = ?, reported = 0,
                    error = (SELECT video.problem {bad})
                WHERE id IN (SELECT id FROM wanted.video WHERE problem IS NOT NULL)
                AND (state IN ('pending', 'running')
                     OR state = 'failed' AND error IS NOT (SELECT video.problem {bad}))""",
            (BAD_INPUT, _now()),
        )
        return int(refused.rowcount)

    def bad_rows(self, limit: int) -> list[tuple[Claim, Failure]]:
        """Return rows of a manifest that failed because they name no video, and are in no failures file yet."""
        sql = """SELECT ordinal, id, path, start_s, end_s, prompts, kept, attempts, input_path,
                 stage, error_type, error FROM item
                 WHERE error_type = ? AND state = 'failed' AND NOT reported ORDER BY ordinal LIMIT ?"""
        with self._reading():
            found = self._db.execute(sql, (BAD_INPUT, limit)).fetchall()
            return [(_claim(*row[:9]), Failure(*row[9:])) for row in found]

    def problems(self, limit: int) -> tuple[int, list[str]]:
        """Return how many wanted rows name no video, and what is wrong with the first of them."""
        number = int(self._one("SELECT count(*) FROM wanted.video WHERE problem IS NOT NULL"))
        sql = "SELECT problem FROM wanted.video WHERE problem IS NOT NULL ORDER BY place LIMIT ?"
        return number, [problem for (problem,) in self._db.execute(sql, (limit,))]

    def captions_kept(self, overwrite: bool, limit: int | None) -> int:
        """Return how many captions are there, leaving out those that an overwriting run makes again."""
        if not overwrite:
            return int(self._one("SELECT count(*) FROM caption"))
        anew, values = self._to_do("id", True, False, limit)
        sql = f"""SELECT count(*) FROM caption JOIN item ON item.ordinal = caption.item
                  WHERE item.id NOT IN ({anew})"""
        return int(self._db.execute(sql, values).fetchone()[0])

    def config_hashes(self) -> set[str]:
        """Return the settings, by their hash, with which the captions were made."""
        sql = "SELECT DISTINCT json_extract(row, '$.config_hash') FROM caption"
        with self._reading():
            return {digest for (digest,) in self._db.execute(sql)}

    # What videos are claimed, and what becomes of them

    def pending(self, after: int, limit: int) -> list[Claim]:
        """Return the next pending wanted videos after `after`, an ordinal, but for `suspects`; nothing is written."""
        return self._pending("ordinal > ? AND crashes < ?", after, SUSPECT_CRASHES, limit)

    def suspects(self, limit: int | None) -> list[Claim]:
        """Return the pending wanted videos that were running at several crashes in a row; nothing is written."""
        return self._pending("crashes >= ?", SUSPECT_CRASHES, -1 if limit is None else limit)

    def _pending(self, condition: str, *values: int) -> list[Claim]:
        indexes = "(SELECT json_group_array(prompt_index) FROM caption WHERE caption.item = item.ordinal)"
        sql = f"""SELECT ordinal, item.id, item.path, item.start_s, item.end_s, item.prompts, item.kept, attempts,
                  item.input_path, iif(partly, {indexes}, NULL) FROM item JOIN wanted.video AS video USING (id)
                  WHERE state = 'pending' AND {condition} ORDER BY ordinal LIMIT ?"""
        with self._reading():
            found = self._db.execute(sql, values).fetchall()
            return [self._without(_claim(*row), made) for *row, made in found]

    def _without(self, claim: Claim, made: str | None) -> Claim:
        """Return a claim for the prompts that have no caption; `made`: indexes of those that have one."""
        if made is None:
            return claim
        missing = set(range(len(claim.item.prompts or ()) or self._prompts)).difference(json.loads(made))
        return replace(claim, only=tuple(sorted(missing)))

    def claim(self, claim: Claim) -> None:
        """Mark a pending video as running: whatever kills this process now may be its doing."""
        with self.writing():
            self._db.execute(
                "UPDATE item SET state = 'running', attempts = ? WHERE ordinal = ?",
                (claim.attempts, claim.ordinal),
            )

    def release(self, claim: Claim) -> None:
        """Put a video back that was claimed and has no outcome; that is no crash."""
        with self.writing():
            self._db.execute(
                "UPDATE item SET state = 'pending' WHERE ordinal = ? AND state = 'running'", (claim.ordinal,)
            )

    def finish(self, claim: Claim, rows: Sequence[Row], file: FileStamp = NO_FILE) -> None:
        """Store the captions of one video, one row for each prompt, and mark it done: both or neither.

        Captions that it had before are replaced, in the part where they stand; where only further prompts were
        asked, they are kept.
        """
        with self.writing():
            part = self._take_out(claim.ordinal) if claim.only is None else None
            self._store(claim.ordinal, rows, part)
            self._db.execute(
                """UPDATE item
                   SET state = 'done', crashes = 0, stage = NULL, error_type = NULL, error = NULL, at = ?,
                       attempts = ?, size_bytes = ?, mtime_ns = ?, partly = 0
                   WHERE ordinal = ?""",
                (_now(), claim.attempts, *file, claim.ordinal),
            )

    def _take_out(self, ordinal: int) -> str | None:
        """Delete the captions of one video; return the part that held them, which is now out of date."""
        held = "SELECT DISTINCT part FROM caption WHERE item = ? AND part IS NOT NULL ORDER BY part"
        names = [name for (name,) in self._db.execute(held, (ordinal,)).fetchall()]
        for name in names:
            self._outdate(name)
        self._db.execute("DELETE FROM caption WHERE item = ?", (ordinal,))
        return names[0] if names else None

    def _store(self, ordinal: int, rows: Sequence[Row], part: str | None, *, twice: str = "ABORT") -> int:
        """Insert caption rows and return how many went in; `twice` says what becomes of one that is there."""
        sql = f"INSERT OR {twice} INTO caption (item, prompt_index, row, part) VALUES (?, ?, ?, ?)"
        values = [(ordinal, row["prompt_index"], json.dumps(row), part) for row in rows]
        return sum(self._db.execute(sql, value).rowcount for value in values)

    def fail(self, claim: Claim, failure: Failure) -> None:
        """Store why a video has no new caption, and mark it failed; one that it had before is kept."""
        with self.writing():
            self._db.execute(
                """UPDATE item
                   SET state = 'failed', stage = ?, error_type = ?, error = ?, at = ?, attempts = ?, reported = 0
                   WHERE ordinal = ?""",
                (failure.stage, failure.error_type, failure.error, _now(), claim.attempts, claim.ordinal),
            )

    def reopen_failed(self, claims: Sequence[Claim]) -> None:
        """Make videos pending again that failed, for a reason that was not theirs."""
        with self.writing():
            for claim in claims:
                self._db.execute(
                    "UPDATE item SET state = 'pending' WHERE ordinal = ? AND state = 'failed'",
                    (claim.ordinal,),
                )

    def note_captioning(self, seconds: float, workers: int, waited_s: float) -> None:
        """Store how long this start has captioned, and how long its workers waited for input, for `status`."""
        values = ("captioning_ms", 1000 * seconds), ("workers", workers), ("waited_ms", 1000 * waited_s)
        with self.writing():
            for name, value in values:
                self._db.execute("INSERT OR REPLACE INTO counter VALUES (?, ?)", (name, round(value)))

    # Starting again

    def recover(self, *, crashed: bool) -> None:
        """Put back what was left running; a video that was there at three crashes, alone at the last, fails.

        Where several were running, none of them is charged with more than makes it run alone next: one may have
        killed the process, and the others were only there.

        `crashed` is false where the run before ended in order and only could not put its videos back.
        """
        with self.writing():
            alone = int(self._one("SELECT count(*) FROM item WHERE state = 'running'")) == 1
            self._db.execute(
                """UPDATE item SET crashes = iif(?, min(crashes + 1, ?), crashes), state = 'pending'
                   WHERE state = 'running'""",
                (crashed, MOST_CRASHES if alone else SUSPECT_CRASHES),
            )
            self._db.execute(
                """UPDATE item
                   SET state = 'failed', stage = 'generate', error_type = 'crash_suspect',
                       at = ?, reported = 0,
                       error = 'the process died ' || crashes || ' times while it worked on this video'
                   WHERE state = 'pending' AND crashes >= ?""",
                (_now(), MOST_CRASHES),
            )

    def reopen(self, overwrite: bool, retry_failed: bool, limit: int | None) -> None:
        """Make pending what `to_do` names; captions stay until others take their place, if any do."""
        anew, values = self._to_do("id", overwrite, retry_failed, limit)
        with self.writing():
            if overwrite:
                self._db.execute(f"UPDATE item SET partly = 0 WHERE partly AND id IN ({anew})", values)
            self._db.execute(
                f"""UPDATE item SET state = 'pending', crashes = 0, attempts = iif(:overwrite, 0, attempts),
                        partly = NOT :overwrite AND (partly OR state = 'done')
                    WHERE state IN ('done', 'failed') AND id IN ({anew})""",
                values | {"overwrite": overwrite},
            )
            self._db.execute(
                """UPDATE item SET prompts = video.prompts, start_s = video.start_s, end_s = video.end_s
                   FROM wanted.differing JOIN wanted.video AS video USING (place)
                   WHERE item.ordinal = differing.ordinal AND state = 'pending'"""
            )

    # Parts: files that are derived from the rows

    def parts(self) -> list[Part]:
        """Return every finished file that the ledger knows."""
        sql = "SELECT name, sha256, rows, bytes FROM part ORDER BY name"
        return [Part(*row) for row in self._db.execute(sql).fetchall()]

    def outdated_parts(self) -> list[str]:
        """Return the parts whose rows have changed, or whose file is damaged."""
        found = self._db.execute("SELECT name FROM part WHERE outdated ORDER BY name")
        return [name for (name,) in found.fetchall()]

    def rows_of_part(self, name: str) -> list[Row]:
        """Return the captions that belong in a part, in order."""
        sql = "SELECT row FROM caption WHERE part = ? ORDER BY item, prompt_index"
        with self._reading():
            return [read_row(row) for (row,) in self._db.execute(sql, (name,)).fetchall()]

    def holds(self, row: Row) -> bool:
        """Say whether a row read from a part is one of these captions."""
        sql = """SELECT count(*) FROM caption JOIN item ON item.ordinal = caption.item
                 WHERE id = ? AND prompt_index = ? AND json_extract(row, '$.created_at') = ?"""
        with self._reading():
            return bool(self._one(sql, row["id"], row["prompt_index"], row["created_at"]))

    def rows_without_part(self, limit: int) -> list[tuple[int, int, Row]]:
        """Return (item, prompt index, row) of the oldest captions that are in no part yet.

        About `limit` of them: the captions of one video stay together.
        """
        last = """SELECT item FROM caption WHERE part IS NULL ORDER BY item, prompt_index LIMIT 1 OFFSET ?"""
        sql = f"""SELECT item, prompt_index, row FROM caption
                  WHERE part IS NULL AND item <= coalesce(({last}), item) ORDER BY item, prompt_index"""
        with self._reading():
            found = self._db.execute(sql, (limit - 1,)).fetchall()
            return [(item, index, read_row(row)) for item, index, row in found]

    def count_without_part(self) -> int:
        return int(self._one("SELECT count(*) FROM caption WHERE part IS NULL"))

    def take_part_number(self) -> int:
        """Return a part number that was never given out before."""
        with self._reading(), self.writing():
            number = int(
                self._one("SELECT coalesce((SELECT value FROM counter WHERE name = 'next_part'), -1)")
            )
            if not 0 <= number < MOST_PARTS:
                raise OddRowError(f"{number} as the number of the next part")
            self._db.execute("UPDATE counter SET value = ? WHERE name = 'next_part'", (number + 1,))
        return number

    def add_part(self, part: Part, members: Iterable[tuple[int, int]]) -> None:
        """Record a finished part and the (item, prompt index) of the captions in it."""
        with self.writing():
            self._insert_part(part)
            self._db.conn.executemany(
                "UPDATE caption SET part = ? WHERE item = ? AND prompt_index = ?",
                ((part.name, item, index) for item, index in members),
            )

    def _insert_part(self, part: Part) -> None:
        self._db.execute(
            "INSERT INTO part (name, sha256, rows, bytes) VALUES (?, ?, ?, ?)",
            (part.name, part.sha256, part.rows, part.size_bytes),
        )

    def outdate(self, name: str) -> None:
        """Have a part rewritten that is gone or damaged; its captions are still here."""
        with self.writing():
            self._outdate(name)

    def _outdate(self, name: str) -> None:
        self._db.execute("UPDATE part SET outdated = 1 WHERE name = ?", (name,))

    def match_parts(self) -> None:
        """Have captions of unlisted parts written into another one, and parts of other captions written again."""
        with self.writing():
            self._db.execute("UPDATE caption SET part = NULL WHERE part NOT IN (SELECT name FROM part)")
            self._db.execute(
                """UPDATE part SET outdated = 1 WHERE name LIKE 'captions/%' AND NOT outdated
                   AND rows != (SELECT count(*) FROM caption WHERE part = name)"""
            )

    def renew_part(self, part: Part) -> None:
        """Record that a part was rewritten under its old name."""
        with self.writing():
            self._db.execute(
                "UPDATE part SET sha256 = ?, rows = ?, bytes = ?, outdated = 0 WHERE name = ?",
                (part.sha256, part.rows, part.size_bytes, part.name),
            )

    def drop_part(self, name: str) -> None:
        """Forget a file that no caption belongs in."""
        with self.writing():
            self._db.execute("DELETE FROM part WHERE name = ?", (name,))

    def failures(self) -> list[Row]:
        """Return every failed video, in order, with its columns that pass through."""
        sql = """SELECT id, path, input_path, start_s AS start, end_s AS "end", stage, error_type, error, attempts, at,
                 kept FROM item WHERE state = 'failed' ORDER BY ordinal"""
        with self._reading():
            return [_failure_row(row) for row in self._db.query(sql)]

    def failures_stale(self, name: str) -> bool:
        """Say whether the failures file `name` differs from the failures in the ledger."""
        written = self._one("SELECT coalesce((SELECT rows FROM part WHERE name = ?), 0)", name)
        failed, reported = self._db.execute(
            "SELECT count(*), coalesce(sum(reported), 0) FROM item WHERE state = 'failed'"
        ).fetchone()
        return not failed == reported == written

    def mark_failures(self, name: str, part: Part | None) -> None:
        """Record the failures file just written; None: there are no failures, and no file."""
        with self.writing():
            self._db.execute("DELETE FROM part WHERE name = ?", (name,))
            if part is not None:
                self._insert_part(part)
            self._db.execute("UPDATE item SET reported = state = 'failed'")

    # Rebuilding from the parts

    def adopt(self, part: Part, number: int, rows: Iterable[Row], path_of: Iterable[bytes]) -> None:
        """Take the captions of an existing part as done.

        A caption that is there already wins over a second one; the part that held the second is out of date.
        """
        with self.writing():
            self._insert_part(part)
            self._db.execute(
                "UPDATE counter SET value = max(value, ?) WHERE name = 'next_part'", (number + 1,)
            )
            stored = 0
            for row, path in zip(rows, path_of, strict=True):
                ordinal = self._adopt_item(row, path, "done", row["created_at"])
                stored += self._store(ordinal, [row], part.name, twice="IGNORE")
            if stored < part.rows:
                self._outdate(part.name)

    def adopt_failures(self, rows: Iterable[Row], path_of: Iterable[bytes]) -> None:
        """Take the failures of an existing failures file; a video that has a caption has not failed."""
        with self.writing():
            for row, path in zip(rows, path_of, strict=True):
                if not self._one("SELECT count(*) FROM item WHERE id = ?", row["id"]):
                    ordinal = self._adopt_item(row, path, "failed", row["at"])
                    self._db.execute(
                        "UPDATE item SET stage = ?, error_type = ?, error = ?, kept = ? WHERE ordinal = ?",
                        (row["stage"], row["error_type"], row["error"], row["kept"], ordinal),
                    )

    def _adopt_item(self, row: Row, path: bytes, state: str, at: str) -> int:
        self._db.execute(
            """INSERT OR IGNORE INTO item (id, path, start_s, end_s, state, attempts, at, input_path)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                row["id"],
                path,
                row["start"],
                row["end"],
                state,
                row["attempts"],
                at,
                _written(row["input_path"]),
            ),
        )
        return int(self._one("SELECT ordinal FROM item WHERE id = ?", row["id"]))


def _claim(
    ordinal: int,
    identity: str,
    path: bytes,
    start_s: float | None,
    end_s: float | None,
    prompts: str | None,
    kept: str | None,
    attempts: int,
    input_path: bytes | None,
) -> Claim:
    own = None if prompts is None else _json(prompts, list)
    if own is not None and not (own and all(isinstance(one, str) for one in own)):
        raise OddRowError(f"a video whose prompts are {str(prompts)[:60]}")
    if kept is not None:
        _json(kept, dict)
    if type(attempts) is not int or not 0 <= attempts < _MOST_ATTEMPTS:
        raise OddRowError(f"a video with {str(attempts)[:60]} attempts")
    item = Item(
        str(identity),
        _path(path),
        start_s,
        end_s,
        None if own is None else tuple(own),
        kept,
        input_path=None if input_path is None else _path(input_path),
    )
    return Claim(ordinal, item, attempts + 1)


def _failure_row(row: Row) -> Row:
    """Return a failed item as a row of the failures file."""
    kept, written = row.pop("kept"), row["input_path"]
    texts = {"path": path_text(_path(row["path"])), "input_path": written and path_text(_path(written))}
    return row | texts | {"kept": {} if kept is None else _json(kept, dict)}


def _written(text: str | None) -> bytes | None:
    return None if text is None else path_bytes(text)


def _path(value: object) -> bytes:
    """Return a stored path; another program may have stored something else."""
    if type(value) is not bytes:
        raise OddRowError(f"a video whose path is {str(value)[:60]!r}")
    return value


def _json(text: str, kind: type) -> Any:
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        found = None
    if type(found) is not kind:
        raise OddRowError(f"a video with {str(text)[:60]!r} where JSON belongs")
    return found


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite_file.connect(path, mode, BUSY_TIMEOUT_S)


def _set_up(connection: sqlite3.Connection) -> None:
    for setting in (
        "journal_mode = DELETE",
        "synchronous = FULL",
        "foreign_keys = ON",
        "cache_size = -65536",
    ):
        connection.execute(f"PRAGMA {setting}")


def _check(connection: sqlite3.Connection) -> None:
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise FatalError(f"the ledger is damaged ({' '.join(str(verdict).split())}); {_REBUILD}")


def is_damage(error: Exception) -> bool:
    """Say whether an error means that the file is damaged."""
    if isinstance(error, UnicodeDecodeError):
        return True
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of the code says where
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def refused(path: Path, error: Exception) -> Exception:
    """Return the error to raise for a ledger that cannot be used."""
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        return error
    name = clean(str(path))
    if isinstance(error, FatalError):
        return FatalError(f"{name}: {error}")
    return FatalError(f"{name}: the ledger is damaged ({error}); {_REBUILD}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
