"""Opening a SQLite file that somebody else may have written: defensively, and only where its files are safe.

SQLite trusts a file more than we do. A journal may name a file anywhere that a rollback then deletes; a view or
a trigger runs whatever it says; a damaged tree may take for ever to walk. So files are looked at first, the
schema is compared with the one we would have made, and a signal ends a long query.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specvlm_cli import stopping
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.safe_files import open_regular, require_file

_SIDE_FILES = ("-journal", "-wal", "-shm")
_JOURNAL_END = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names another file
_STEPS_BETWEEN_LOOKS = 200_000  # of SQLite's machine, some milliseconds
_DEFENSIVE = getattr(sqlite3, "SQLITE_DBCONFIG_DEFENSIVE", None)  # Python 3.12


def connect(path: Path, mode: str, timeout_s: float) -> sqlite3.Connection:
    """Open a SQLite file, with autocommit.

    Args:
        path: The file.
        mode: `ro` or `rw`. The file must exist.
        timeout_s: How long to wait for a lock that another process holds.

    Raises:
        FileNotFoundError: There is no such file.
        FatalError: The file or its journal is a link or not a regular file, or the journal names another file.
        sqlite3.Error: It cannot be opened.
    """
    require_file(path, to_write=mode != "ro")
    for ending in _SIDE_FILES:
        with suppress(FileNotFoundError):
            require_file(path.with_name(path.name + ending), to_write=mode != "ro")
    _refuse_journal_with_names(path.with_name(f"{path.name}-journal"))
    address = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=timeout_s, isolation_level=None)
    protect(connection)
    return connection


def protect(connection: sqlite3.Connection) -> None:
    """Have SQLite trust nothing that a file says, and end a query once a signal has asked to stop."""
    if _DEFENSIVE is not None:
        connection.setconfig(_DEFENSIVE, True)  # type: ignore[attr-defined,unused-ignore]
    interruptible(connection)
    for setting in ("trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {setting}")


def interruptible(connection: sqlite3.Connection) -> None:
    """Have a signal that asks to stop end a query, with SQLITE_INTERRUPT."""
    connection.set_progress_handler(stopping.is_asked, _STEPS_BETWEEN_LOOKS)


def never_interrupt(connection: sqlite3.Connection) -> None:
    """Have queries run to their end from now on, also after a signal: what was begun is to be stored."""
    connection.set_progress_handler(None, 0)


@contextmanager
def undefended(connection: sqlite3.Connection) -> Iterator[None]:
    """Allow `journal_mode = OFF`, which the defensive mode does not, for a file of our own."""
    if _DEFENSIVE is not None:
        connection.setconfig(_DEFENSIVE, False)  # type: ignore[attr-defined,unused-ignore]
    yield
    if _DEFENSIVE is not None:
        connection.setconfig(_DEFENSIVE, True)  # type: ignore[attr-defined,unused-ignore]


def was_interrupted(error: BaseException | None) -> bool:
    """Say whether an error, or what led to it, is a query that a signal ended."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error may be its own cause
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def schema_of(connection: sqlite3.Connection) -> dict[tuple[str, str], tuple[str, str]]:
    """Return what a database is made of: (type, name) -> (table, SQL in one line)."""
    found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
    return {(kind, name): (table, " ".join((sql or "").split())) for kind, name, table, sql in found}


def _refuse_journal_with_names(journal: Path) -> None:
    """SQLite would delete the file that a journal names; one database alone never writes such a journal."""
    with suppress(FileNotFoundError), open_regular(journal) as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(_JOURNAL_END), 0))
        if file.read(len(_JOURNAL_END)) == _JOURNAL_END:
            ledger = journal.name.removesuffix("-journal")
            raise FatalError(
                f"{clean(str(journal))}: names another file, which a journal of specvlm never does; delete it and "
                f"{clean(ledger)} to have that rebuilt from captions/"
            )
