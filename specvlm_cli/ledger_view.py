"""A ledger as a bystander may see it: opened read-only, no file touched, while a run may be writing to it.

In rollback-journal mode a reader that stays holds up the writer's commit, so every query here is short, and what
is long is read in pages. Whatever only an opening for writing could tell (a journal that a crash left) is said,
never guessed at. It knows rows and states; it shows nothing and decides nothing.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from specvlm_cli.exits import FatalError
from specvlm_cli.migrations import APPLICATION_ID, STEPS
from specvlm_cli.text import clean

Row = dict[str, Any]

PAGE = 1000  # rows of one query
BUSY_TIMEOUT_S = 60.0
_STATES = ("pending", "running", "done", "failed")


class LedgerProblemError(FatalError):
    """A ledger that is there, but cannot be read as it is."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many videos are in which state."""

    pending: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        return self.pending + self.running + self.done + self.failed

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in _STATES))


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """Failures of one kind, with one of them as an example."""

    stage: str
    error_type: str
    count: int
    path: bytes  # of the first one in the ledger
    error: str


@dataclass(frozen=True, slots=True)
class ItemView:
    """One video as the ledger has it."""

    ordinal: int
    id: str
    path: bytes
    start_s: float | None
    end_s: float | None
    state: str
    attempts: int
    stage: str | None
    error_type: str | None
    error: str | None
    at: str | None
    prompts: int | None  # how many of its own it has; None: those of the run


@dataclass(frozen=True, slots=True)
class CaptionKey:
    """Where one caption stands, without its row."""

    ordinal: int
    prompt_index: int
    created_at: str
    config_hash: str  # of the settings that it was made with


@dataclass(frozen=True, slots=True)
class PartView:
    """A file of the run folder as the ledger has it."""

    name: str  # path inside the run folder
    sha256: str
    rows: int
    size_bytes: int
    outdated: bool  # its rows have changed since it was written


@dataclass(frozen=True, slots=True)
class Page:
    """Videos in a row with their captions, as they were at one moment."""

    items: tuple[ItemView, ...]
    captions: tuple[CaptionKey, ...]


class LedgerView:
    """One ledger, open for reading."""

    def __init__(self, connection: sqlite3.Connection, path: Path, version: int) -> None:
        self._db = connection
        self._path = path
        self._prompts = "json_array_length(prompts)" if version >= 3 else "NULL"
        self._outdated = "outdated" if version >= 2 else "0"

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a ledger, touching no file.

        Raises:
            FileNotFoundError: There is none.
            LedgerProblemError: It is there, but cannot be read as it is; the message says why.
        """
        path.stat()
        try:
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
            )
        except sqlite3.Error as error:
            raise _problem(path, error) from error
        try:
            connection.execute("PRAGMA query_only = ON")
            return cls(connection, path, _version(connection, path))
        except sqlite3.Error as error:
            connection.close()
            raise _problem(path, error) from error
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def moment(self) -> Iterator[None]:
        """Have the queries of a block see one state of the ledger, which costs one lock. For short blocks."""
        self._all("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:
                self._db.rollback()

    # Figures

    def counts(self) -> Counts:
        """Return how many videos are in each state."""
        found: dict[str, int] = dict(self._all("SELECT state, count(*) FROM item GROUP BY state"))
        return Counts(**{state: found.get(state, 0) for state in _STATES})

    def captions(self) -> int:
        """Return how many captions there are."""
        return int(self._one("SELECT count(*) FROM caption"))

    def is_registered(self) -> bool:
        """Say whether a start has gone through its inputs since this ledger was made, or made anew."""
        return bool(self._one("SELECT EXISTS (SELECT 1 FROM counter WHERE name = 'registered')"))

    def unwritten(self) -> int:
        """Return how many captions stand in no finished part yet."""
        return int(self._one("SELECT count(*) FROM caption WHERE part IS NULL"))

    def unreported(self) -> bool:
        """Say whether the failures file differs from the failures."""
        written = self._one("SELECT coalesce(sum(rows), 0) FROM part WHERE name LIKE 'failures/%'")
        sql = "SELECT count(*), coalesce(sum(reported), 0) FROM item WHERE state = 'failed'"
        ((failed, reported),) = self._all(sql)
        return not failed == reported == written

    def errors(self, most: int) -> list[ErrorKind]:
        """Return the commonest kinds of failure, the commonest first."""
        sql = """SELECT kind.stage, kind.error_type, number, path, item.error FROM (
                     SELECT stage, error_type, count(*) AS number, min(ordinal) AS first
                     FROM item WHERE state = 'failed' GROUP BY stage, error_type
                 ) AS kind JOIN item ON ordinal = first ORDER BY number DESC, 1, 2 LIMIT ?"""
        return [
            ErrorKind(stage or "", kind or "", number, bytes(path), error or "")
            for stage, kind, number, path, error in self._all(sql, (most,))
        ]

    def finishes(self, most: int) -> list[str]:
        """Return when the videos that came to an end last did so, the latest first; ISO 8601."""
        captioned = """SELECT DISTINCT item.ordinal, at FROM (
                           SELECT item AS ordinal FROM caption ORDER BY rowid DESC LIMIT ?
                       ) JOIN item USING (ordinal) WHERE state = 'done'"""
        failed = "SELECT ordinal, at FROM item WHERE state = 'failed' ORDER BY at DESC LIMIT ?"
        found = dict(self._all(captioned, (most,)))
        found |= dict(self._all(failed, (most,)))
        return sorted((at for at in found.values() if at), reverse=True)[:most]

    def last_caption(self) -> str | None:
        """Return when the latest caption was made; ISO 8601."""
        sql = "SELECT json_extract(row, '$.created_at') FROM caption ORDER BY rowid DESC LIMIT 1"
        found = self._all(sql)
        return found[0][0] if found else None

    def captioning(self) -> tuple[float, int, float] | None:
        """Return how long the latest start has captioned, its workers, and how long these waited for input.

        Both are seconds; None: no start has noted it.
        """
        sql = "SELECT name, value FROM counter WHERE name IN ('captioning_ms', 'workers', 'waited_ms')"
        found = dict(self._all(sql))
        if len(found) < 3:
            return None
        return found["captioning_ms"] / 1000, found["workers"], found["waited_ms"] / 1000

    def latest_rows(self, most: int) -> Iterator[Row]:
        """Yield the rows of the captions made last, the latest first."""
        before = (1 << 63) - 1
        while most > 0:
            sql = "SELECT rowid, row FROM caption WHERE rowid < ? ORDER BY rowid DESC LIMIT ?"
            found = self._all(sql, (before, min(PAGE, most)))
            yield from (json.loads(row) for _, row in found)
            if len(found) < PAGE:
                return
            before, most = found[-1][0], most - len(found)

    # Everything, in pages

    def pages(self) -> Iterator[Page]:
        """Yield all videos in the ledger's order, each page with the captions of its videos."""
        after = -1
        while (page := self._page(after)).items:
            yield page
            after = page.items[-1].ordinal

    def _page(self, after: int) -> Page:
        sql = f"""SELECT ordinal, id, path, start_s, end_s, state, attempts, stage, error_type, error, at,
                  {self._prompts} FROM item WHERE ordinal > ? ORDER BY ordinal LIMIT ?"""
        keys = """SELECT item, prompt_index, coalesce(json_extract(row, '$.created_at'), ''),
                  coalesce(json_extract(row, '$.config_hash'), '') FROM caption
                  WHERE item > ? AND item <= ? ORDER BY item, prompt_index"""
        with self.moment():
            found = self._all(sql, (after, PAGE))
            items = tuple(ItemView(ordinal, name, bytes(path), *rest) for ordinal, name, path, *rest in found)
            last = items[-1].ordinal if items else after
            captions = self._all(keys, (after, last))
        return Page(items, tuple(CaptionKey(*key) for key in captions))

    def rows(self, ordinals: Sequence[int]) -> dict[tuple[int, int], Row]:
        """Return the caption rows of some videos, by (ordinal, prompt index)."""
        marks = ",".join("?" * len(ordinals))
        sql = f"SELECT item, prompt_index, row FROM caption WHERE item IN ({marks})"
        found = self._all(sql, tuple(ordinals))
        return {(item, index): json.loads(row) for item, index, row in found}

    # Parts

    def parts(self) -> list[PartView]:
        """Return every finished file that the ledger knows."""
        sql = f"SELECT name, sha256, rows, bytes, {self._outdated} FROM part ORDER BY name"
        found = self._all(sql)
        return [PartView(name, digest, rows, size, bool(old)) for name, digest, rows, size, old in found]

    def part(self, name: str) -> PartView | None:
        """Return one finished file as the ledger has it now."""
        return next((part for part in self.parts() if part.name == name), None)

    def captions_of_part(self, name: str) -> dict[tuple[str, int], str]:
        """Return the text of the captions that belong in a part, by (id of the video, prompt index)."""
        sql = "SELECT id, prompt_index, row FROM caption JOIN item ON ordinal = caption.item WHERE part = ?"
        found = self._all(sql, (name,))
        return {(identity, index): json.loads(row)["caption"] for identity, index, row in found}

    def reported_ids(self) -> list[str]:
        """Return the ids of the failures that stand in the failures file."""
        sql = "SELECT id FROM item WHERE state = 'failed' AND reported ORDER BY id"
        return [identity for (identity,) in self._all(sql)]

    def unlisted_parts(self) -> list[tuple[str, int]]:
        """Return (name, captions) of the parts that captions are said to stand in and that are not listed."""
        sql = """SELECT part, count(*) FROM caption WHERE part IS NOT NULL AND part NOT IN
                 (SELECT name FROM part) GROUP BY part ORDER BY part"""
        return self._all(sql)

    def captions_without_video(self) -> int:
        """Return how many captions belong to no video of this ledger."""
        return int(self._one("SELECT count(*) FROM caption WHERE item NOT IN (SELECT ordinal FROM item)"))

    def damage(self, limit_s: float | None) -> list[str] | None:
        """Return what SQLite finds wrong with the file; None: the check was ended at its time limit."""
        end = None if limit_s is None else time.monotonic() + limit_s
        self._db.set_progress_handler(lambda: end is not None and time.monotonic() > end, 100_000)
        try:
            found = self._all("PRAGMA integrity_check(20)")
        except LedgerProblemError as error:
            if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                return None
            raise
        finally:
            self._db.set_progress_handler(None, 0)
        return [] if found == [("ok",)] else [" ".join(str(line).split()) for (line,) in found]

    def _one(self, sql: str) -> Any:
        return self._all(sql)[0][0]

    def _all(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _problem(self._path, error) from error


def _version(connection: sqlite3.Connection, path: Path) -> int:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    name = clean(str(path))
    if application != APPLICATION_ID:
        raise LedgerProblemError(f"{name}: not a specvlm ledger; delete it to have it rebuilt from captions/")
    if version > len(STEPS):
        known = f"schema {version} is newer than this specvlm knows ({len(STEPS)})"
        raise LedgerProblemError(f"{name}: {known}; upgrade specvlm")
    return version


def _problem(path: Path, error: sqlite3.Error) -> LedgerProblemError:
    code = getattr(error, "sqlite_errorcode", 0)
    name = clean(str(path))
    if code == sqlite3.SQLITE_READONLY_ROLLBACK:
        reason = "a crash left it in the middle of a write; the next start of specvlm caption repairs it"
    elif code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        reason = f"the ledger is damaged ({error}); delete it to have it rebuilt from captions/"
    elif code & 0xFF == sqlite3.SQLITE_BUSY:
        reason = "it has been locked by another program for a minute; try again"
    else:
        reason = f"cannot be read ({error})"
    return LedgerProblemError(f"{name}: {reason}")
