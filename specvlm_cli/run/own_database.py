"""A small SQLite file of our own, in a folder that somebody else may write into. Knows nothing of what it holds.

Rollback journal and synchronous=FULL, as for the ledger: what was committed survives a power cut. A file of another
kind, of another version, or a damaged one is refused in one line.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from os.path import lexists
from pathlib import Path
from typing import ClassVar, Self

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.run.database import connect, never_interrupt, schema_of
from specvlm_cli.safe_files import new_file

_VERSION = 1
_BUSY_S = 60.0


class OwnDatabase:
    """An open file of one kind; a subclass says which.

    Attributes:
        application: SQLite's application id of this kind.
        tables: The statements that make its tables.
        holds: What it holds, for people.
        deleted: What follows from deleting it, for people.
    """

    application: ClassVar[int]
    tables: ClassVar[str]
    holds: ClassVar[str]
    deleted: ClassVar[str]

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path, self._connection = path, connection

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file, made where there is none; a journal that a crash left is rolled back by SQLite.

        Raises:
            FatalError: It is damaged, or another file.
        """
        if not lexists(path):
            new_file(path).close()
        connection = connect(path, "rw", _BUSY_S)
        file = cls(path, connection)
        try:
            with file._guarded():
                connection.execute("PRAGMA journal_mode = DELETE")
                connection.execute("PRAGMA synchronous = FULL")
                file._set_up()
            never_interrupt(connection)
        except BaseException:
            connection.close()
            raise
        return file

    def _set_up(self) -> None:
        known = self._number("application_id"), self._number("user_version")
        if (
            known == (0, 0)
            and not self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        ):
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {self.tables} PRAGMA application_id = {self.application};"
                f"PRAGMA user_version = {_VERSION}; COMMIT;"
            )
        elif known != (self.application, _VERSION) or not self._has_own_tables():
            raise FatalError(
                f"{clean(str(self._path))} is no file of this version's {self.holds}; move it away"
            )
        elif (verdict := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _has_own_tables(self) -> bool:
        with closing(sqlite3.connect(":memory:")) as made:
            made.executescript(self.tables)
            return schema_of(made) == schema_of(self._connection)

    def _number(self, pragma: str) -> int:
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn damage into one line that says what to do."""
        try:
            yield
        except sqlite3.OperationalError:
            raise  # a full disk, a file that is held: its own words
        except sqlite3.DatabaseError as error:
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> FatalError:
        """Return the error to raise where this one shows that the file is not as we write it."""
        reason = clean(" ".join(str(error).split()))
        return FatalError(f"{clean(str(self._path))} is damaged ({reason}); delete it to have {self.deleted}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
