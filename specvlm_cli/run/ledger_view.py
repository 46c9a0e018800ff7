"""A ledger as a bystander may see it: opened read-only, no file touched, while a run may be writing to it.

In rollback-journal mode a reader that stays holds up the writer's commit, so every query here is short, and what
is long is read in pages. Whatever only an opening for writing could tell (a journal that a crash left) is said,
never guessed at. It knows rows and states; it shows nothing and decides nothing.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args, get_type_hints

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.run import database
from specvlm_cli.run.ledger import STATES
from specvlm_cli.run.migrations import APPLICATION_ID, STEPS, require_schema
from specvlm_cli.run.stored_rows import OddRowError, check_types, checks, read_row
from specvlm_cli.run.stored_rows import Row as Row

R = TypeVar("R")

PAGE = 1000  # rows of one query
BUSY_TIMEOUT_S = 60.0


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
        return Counts(*(getattr(self, name) + getattr(other, name) for name in STATES))


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
    size_bytes: int | None = None  # of the file that was captioned; None: not known
    mtime_ns: int | None = None  # when that was last changed; None: not known
    input_path: bytes | None = (
        None  # as it was written in the manifest or found below its folder; None: not known
    )
    kept: str | None = None  # columns that pass through, as JSON; None: none


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

    def __init__(
        self, connection: sqlite3.Connection, path: Path, version: int, kept: Mapping[str, str], prompts: int
    ) -> None:
        self._db = connection
        self._path = path
        self._asked = prompts
        self._checks = checks(kept)
        self._stamp = "size_bytes, mtime_ns" if version >= 3 else "NULL, NULL"
        self._prompts = "json_array_length(prompts)" if version >= 3 else "NULL"
        self._written = "input_path" if version >= 7 else "NULL"
        self._kept = "kept" if version >= 3 else "NULL"
        self._outdated = "outdated" if version >= 2 else "0"

    @classmethod
    def open(cls, path: Path, kept: Mapping[str, str] | None = None, prompts: int = 1) -> Self:
        """Open a ledger, touching no file.

        Args:
            path: The ledger.
            kept: Columns that a manifest brought along, and their kinds; None: there are none.
            prompts: How many a video has that brings none of its own.

        Raises:
            FileNotFoundError: There is none.
            LedgerProblemError: It is there, but cannot be read as it is; the message says why.
        """
        try:
            connection = database.connect(path, "ro", BUSY_TIMEOUT_S)
        except sqlite3.Error as error:
            raise _problem(path, error) from error
        except FatalError as error:
            raise LedgerProblemError(str(error)) from error
        except PermissionError as error:
            raise LedgerProblemError(f"{clean(str(path))}: cannot be read ({error.strerror})") from error
        try:
            connection.execute("PRAGMA query_only = ON")
            return cls(connection, path, _version(connection, path), kept or {}, prompts)
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
        """Return how many videos are in each state; one that lacks a caption for an added prompt is pending."""
        found: dict[str, int] = dict(self._all(f"SELECT {self._state()}, count(*) FROM item GROUP BY 1"))
        if odd := found.keys() - set(STATES):
            raise self._odd(f"a video whose state is {str(min(odd, key=str))[:60]!r}")
        return Counts(**{state: found.get(state, 0) for state in STATES})

    def _state(self) -> str:
        """Return the expression for a video's state; where each has one prompt, its index alone can answer."""
        if self._asked == 1 and not self._one("SELECT EXISTS (SELECT 1 FROM caption WHERE prompt_index > 0)"):
            return "state"
        asked = f"coalesce({self._prompts}, {self._asked:d})"
        made = f"(SELECT count(*) FROM caption WHERE caption.item = ordinal AND prompt_index < {asked})"
        return f"iif(state = 'done' AND {made} < {asked}, 'pending', state)"

    def captions(self) -> int:
        """Return how many captions there are."""
        return int(self._one("SELECT count(*) FROM caption"))

    def is_registered(self) -> bool:
        """Say whether a start has gone through its inputs since this ledger was made, or made again."""
        return bool(self._one("SELECT EXISTS (SELECT 1 FROM counter WHERE name = 'registered')"))

    def unwritten(self) -> int:
        """Return how many captions are in no finished part yet."""
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
            self._checked(ErrorKind(stage or "", kind or "", number, path, error or ""))
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
            yield from (self._row(row) for _, row in found)
            if len(found) < PAGE:
                return
            before, most = found[-1][0], most - len(found)

    # Everything, in pages

    def pages(self) -> Iterator[Page]:
        """Yield all videos in the ledger's order, each page with the captions of its videos."""
        after = -(1 << 63)
        while (page := self._page(after)).items:
            yield page
            after = page.items[-1].ordinal

    def _page(self, after: int) -> Page:
        sql = f"""SELECT ordinal, id, path, start_s, end_s, state, attempts, stage, error_type, error, at,
                  {self._prompts}, {self._stamp}, {self._written}, {self._kept}
                  FROM item WHERE ordinal > ? ORDER BY ordinal LIMIT ?"""
        keys = """SELECT item, prompt_index, coalesce(json_extract(row, '$.created_at'), ''),
                  coalesce(json_extract(row, '$.config_hash'), '') FROM caption
                  WHERE item > ? AND item <= ? ORDER BY item, prompt_index"""
        with self.moment():
            found = self._all(sql, (after, PAGE))
            items = tuple(self._checked(ItemView(*values)) for values in found)
            with self.reading():
                for item in items:
                    if item.at is not None:
                        datetime.fromisoformat(item.at)
            last = items[-1].ordinal if items else after
            captions = self._all(keys, (after, last))
        return Page(items, tuple(self._checked(CaptionKey(*key)) for key in captions))

    def rows(self, ordinals: Sequence[int]) -> dict[tuple[int, int], Row]:
        """Return the caption rows of some videos, by (ordinal, prompt index)."""
        marks = ",".join("?" * len(ordinals))
        sql = f"SELECT item, prompt_index, row FROM caption WHERE item IN ({marks})"
        found = self._all(sql, tuple(ordinals))
        return {(item, index): self._row(row) for item, index, row in found}

    # Parts

    def parts(self) -> list[PartView]:
        """Return every finished file that the ledger knows."""
        sql = f"SELECT name, sha256, rows, bytes, {self._outdated} FROM part ORDER BY name"
        found = self._all(sql)
        return [
            self._checked(PartView(name, sha256, rows, size, bool(old)))
            for name, sha256, rows, size, old in found
        ]

    def part(self, name: str) -> PartView | None:
        """Return one finished file as the ledger has it now."""
        return next((part for part in self.parts() if part.name == name), None)

    def captions_of_part(self, name: str) -> dict[tuple[str, int], str]:
        """Return the text of the captions that belong in a part, by (id of the video, prompt index)."""
        sql = "SELECT id, prompt_index, row FROM caption JOIN item ON ordinal = caption.item WHERE part = ?"
        found = self._all(sql, (name,))
        return {(identity, index): self._row(row)["caption"] for identity, index, row in found}

    def reported_ids(self) -> list[str]:
        """Return the ids of the failures that are in the failures file."""
        sql = "SELECT id FROM item WHERE state = 'failed' AND reported ORDER BY id"
        return [identity for (identity,) in self._all(sql)]

    def unlisted_parts(self) -> list[tuple[str, int]]:
        """Return (name, captions) of the parts that captions are recorded in and that are not listed."""
        sql = """SELECT part, count(*) FROM caption WHERE part IS NOT NULL AND part NOT IN
                 (SELECT name FROM part) GROUP BY part ORDER BY part"""
        return self._all(sql)

    def captions_without_video(self) -> int:
        """Return how many captions belong to no video of this ledger."""
        return int(self._one("SELECT count(*) FROM caption WHERE item NOT IN (SELECT ordinal FROM item)"))

    def require_videos(self) -> None:
        """Check that every caption belongs to a video.

        Raises:
            LedgerProblemError: One does not.
        """
        if orphans := self.captions_without_video():
            raise self._odd(f"{orphans} captions of no video")

    def damage(self, limit_s: float | None) -> list[str] | None:
        """Return what SQLite finds wrong with the file; None: the check was ended at its time limit."""
        end = None if limit_s is None else time.monotonic() + limit_s

        def is_over() -> bool:
            return end is not None and time.monotonic() > end

        self._db.set_progress_handler(is_over, 100_000)
        try:
            found = self._all("PRAGMA integrity_check(20)")
        except LedgerProblemError as error:
            if database.was_interrupted(error) and is_over():
                return None
            raise
        finally:
            database.interruptible(self._db)
        return [] if found == [("ok",)] else [" ".join(str(line).split()) for (line,) in found]

    def _row(self, text: object) -> Row:
        try:
            row = read_row(text)
            check_types(row, self._checks)
        except OddRowError as error:
            raise self._odd(str(error)) from error
        return row

    def kept(self, text: str) -> Row:
        """Return the columns of an item that pass through; `text`: as it has them."""
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise OddRowError("kept columns that are not a JSON object")
            check_types(found, self._checks)
        except (ValueError, RecursionError) as error:
            raise self._odd(str(error)[:200]) from error
        return found

    def _checked(self, record: R) -> R:
        """Return what was read as it is declared, where its values have the types that are declared."""
        for name, (kinds, least) in _declared(cast(type, record.__class__)).items():
            value = getattr(record, name)
            if type(value) not in kinds or (type(value) in (int, float) and not least <= value < math.inf):
                raise self._odd(f"a {name} that is {str(value)[:60]!r}")
        return record

    def _odd(self, what: str) -> LedgerProblemError:
        return LedgerProblemError(
            f"{clean(str(self._path))}: the ledger is damaged ({clean(what)}); delete it to have it rebuilt from "
            "captions/"
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Name the ledger where what a block works out from it is nothing that a run has written.

        Raises:
            LedgerProblemError: It is such.
        """
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._odd(f"{type(error).__name__}: {error}") from error

    def _one(self, sql: str) -> Any:
        return self._all(sql)[0][0]

    def _all(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _problem(self._path, error) from error


@cache
def _declared(kind: type) -> Mapping[str, tuple[tuple[type, ...], int]]:
    """Return (types, least number) of the fields of a record; only the time of a file may be before 1970."""
    return {
        name: (get_args(hint) or (hint,), -(1 << 63) if name == "mtime_ns" else 0)
        for name, hint in get_type_hints(kind).items()
    }


def _version(connection: sqlite3.Connection, path: Path) -> int:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    name = clean(str(path))
    if application != APPLICATION_ID:
        raise LedgerProblemError(f"{name}: not a specvlm ledger; delete it to have it rebuilt from captions/")
    if version <= len(STEPS):
        try:
            require_schema(connection, version)
        except FatalError as error:
            raise LedgerProblemError(f"{name}: {clean(str(error))}") from error
    else:
        known = f"schema {version} is newer than this specvlm knows ({len(STEPS)})"
        raise LedgerProblemError(f"{name}: {known}; upgrade specvlm")
    return version


def _problem(path: Path, error: sqlite3.Error) -> LedgerProblemError:
    code = getattr(error, "sqlite_errorcode", 0)
    name = clean(str(path))
    if code == sqlite3.SQLITE_READONLY_ROLLBACK:
        reason = "a crash left it in the middle of a write; the next start of specvlm caption repairs it"
    elif code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        reason = f"the ledger is damaged ({error}); delete it to have it rebuilt from captions/"
    elif code & 0xFF == sqlite3.SQLITE_BUSY:
        reason = "it has been locked by another program for a minute; try again"
    else:
        reason = f"cannot be read ({error})"
    return LedgerProblemError(f"{name}: {reason}")
