"""The ledger's schema, as numbered steps. Knows no rows.

`PRAGMA user_version` counts the steps that a file has seen; each step is committed together with its number.
A file from a newer version is refused, never guessed at.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from functools import cache

from sqlite_utils import Database

from specvlm_cli.exits import FatalError
from specvlm_cli.run.database import schema_of

APPLICATION_ID = 0x5350564C  # "SPVL", so that `file` and we can tell a ledger from any other SQLite file

_FIRST = (
    # One row for each video, or part of a video. `reported` is 1 once the failure is in the failures
    # file.
    """
    CREATE TABLE item (
        ordinal INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        path BLOB NOT NULL,
        start_s REAL,
        end_s REAL,
        state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done', 'failed')),
        attempts INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        stage TEXT,
        error_type TEXT,
        error TEXT,
        at TEXT,
        reported INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    "CREATE INDEX item_state ON item (state)",
    # One row for each finished file of the run folder, by its path inside that folder.
    """
    CREATE TABLE part (
        name TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        rows INTEGER NOT NULL,
        bytes INTEGER NOT NULL
    ) STRICT
    """,
    # The captions themselves, as JSON of the Parquet row; `part` is null until the row is in a finished
    # part.
    """
    CREATE TABLE caption (
        item INTEGER NOT NULL REFERENCES item (ordinal),
        prompt_index INTEGER NOT NULL,
        row TEXT NOT NULL,
        part TEXT REFERENCES part (name),
        PRIMARY KEY (item, prompt_index)
    ) STRICT
    """,
    "CREATE INDEX caption_part ON caption (part)",
    # Part numbers are never used twice, so a stale copy of a part cannot be taken for a new one.
    "CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT",
    "INSERT INTO counter (name, value) VALUES ('next_part', 0)",
)

_SECOND = (
    # 1 from the moment the rows of a part change until its file is rewritten, under the same name.
    "ALTER TABLE part ADD COLUMN outdated INTEGER NOT NULL DEFAULT 0",
)

_THIRD = (
    # What a manifest's row brings along, as JSON: its own prompts (a list), the columns that pass through (an
    # object).
    "ALTER TABLE item ADD COLUMN prompts TEXT",
    "ALTER TABLE item ADD COLUMN kept TEXT",
    # The file that was captioned, to tell later whether it is still the same.
    "ALTER TABLE item ADD COLUMN size_bytes INTEGER",
    "ALTER TABLE item ADD COLUMN mtime_ns INTEGER",
)

_FOURTH = (
    # A caption's row has more columns (of a trained head): all parts are rewritten, to have one schema.
    "UPDATE part SET outdated = 1 WHERE name LIKE 'captions/%'",
)

_FIFTH = (
    # More columns again (of batches): all parts are rewritten, to have one schema.
    "UPDATE part SET outdated = 1 WHERE name LIKE 'captions/%'",
)

_SIXTH = (
    # 1 where captions are there that are kept, and only prompts without one are still to be asked.
    "ALTER TABLE item ADD COLUMN partly INTEGER NOT NULL DEFAULT 0",
)

_SEVENTH = (
    # The path as the manifest or the listing wrote it. Captions and failures have it as a column, and failures have the
    # columns that pass through: all files are rewritten, to have one schema.
    "ALTER TABLE item ADD COLUMN input_path BLOB",
    "UPDATE part SET outdated = 1 WHERE name LIKE 'captions/%'",
    "UPDATE item SET reported = 0",
)

_EIGHTH = (
    # More columns again (of settled tokens): all parts are rewritten, to have one schema.
    "UPDATE part SET outdated = 1 WHERE name LIKE 'captions/%'",
)

# Steps are added, never edited: ledgers that exist are compared with what the steps make.
STEPS: tuple[tuple[str, ...], ...] = (_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH, _SIXTH, _SEVENTH, _EIGHTH)
READABLE = 3  # steps that made the tables what they are; a ledger that has seen so many is read as it is


def schema_version(database: Database) -> int:
    """Return how many steps this file has seen.

    Raises:
        FatalError: It is not a ledger, or one of a newer version.
    """
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if application != APPLICATION_ID:
        raise FatalError("not a specvlm ledger; delete it to have it rebuilt from captions/")
    if version > len(STEPS):
        raise FatalError(f"schema {version} is newer than this specvlm knows ({len(STEPS)}); upgrade specvlm")
    return version


def require_schema(connection: sqlite3.Connection, version: int) -> None:
    """Check that a ledger that has seen so many steps has their tables and indexes, and nothing else.

    Raises:
        FatalError: It has others, as only another program can have made them.
    """
    encoding = connection.execute("PRAGMA encoding").fetchone()[0]
    if encoding != "UTF-8":
        raise FatalError(f"its texts are in {encoding}; delete the ledger to have it rebuilt from captions/")
    wanted, found = _schema(version), schema_of(connection)
    if odd := wanted.items() ^ found.items():
        kind, name = min((one for one, _ in odd), key=lambda one: (one[0] == "index", one))
        raise FatalError(
            f"its {kind} {name[:60]!r} is not as specvlm makes it; delete the ledger to have it rebuilt from "
            "captions/"
        )


@cache
def _schema(version: int) -> Mapping[tuple[str, str], tuple[str, str]]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for step in STEPS[:version]:
            for statement in step:
                connection.execute(statement)
        return schema_of(connection)


def sign(database: Database) -> None:
    """Declare an empty file a ledger."""
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def migrate(database: Database) -> None:
    """Bring a ledger to the newest schema."""
    for number in range(schema_version(database), len(STEPS)):
        with database.atomic():
            for statement in STEPS[number]:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number + 1}")
