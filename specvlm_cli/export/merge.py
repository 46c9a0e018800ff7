"""All shards of a run as one list: each caption once, in one order, whatever the history of the ledgers was.

The order is (path, start, end, id, prompt index). Of captions with the same id and prompt index the first by
`created_at` is taken; a video that has all its captions anywhere has not failed. An index of the ledgers is kept in a
SQLite file of our own, so that a million rows take little memory, and rows are fetched from the ledgers in
batches. It knows ledgers and rows, and no format.
"""

from __future__ import annotations

import json
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from specvlm_cli.console.safe_text import path_text
from specvlm_cli.run.ledger import FileStamp
from specvlm_cli.run.ledger_view import ItemView, LedgerView, Page, Row

_BATCH = 1000  # captions fetched at once
_MOST_OPEN = 128  # ledgers

_TABLES = """
CREATE TABLE video (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, path BLOB NOT NULL, start REAL, "end" REAL,
    rank INTEGER NOT NULL, stage TEXT, error_type TEXT, error TEXT, attempts INTEGER, at TEXT, size_bytes INTEGER,
    mtime_ns INTEGER, input_path BLOB, kept TEXT, shard INTEGER
);
CREATE INDEX in_order ON video (path, start, "end", id);
CREATE TABLE caption (
    video INTEGER NOT NULL, prompt_index INTEGER NOT NULL, created_at TEXT NOT NULL, shard INTEGER NOT NULL,
    ordinal INTEGER NOT NULL, PRIMARY KEY (video, prompt_index)
) WITHOUT ROWID;
"""
_CAPTIONED, _FAILED, _PENDING = range(3)  # rank: what is said of a video that several shards have


@dataclass(frozen=True, slots=True)
class CaptionPlace:
    """Which caption, and of which video."""

    path: bytes
    start_s: float | None
    end_s: float | None
    id: str
    prompt_index: int
    shard: int
    ordinal: int  # of the video, in that shard's ledger
    file: FileStamp  # of the video when it was captioned
    ended_at: str | None  # when that was; ISO 8601

    @property
    def times(self) -> tuple[float | None, float | None]:
        """Start and end of the part."""
        return self.start_s, self.end_s


@dataclass(frozen=True, slots=True)
class Merged:
    """What all shards hold together.

    Attributes:
        captioned: Videos with all their captions.
        failed: Videos without all of them that have failed.
        pending: Videos that are still to do.
        captions: Captions, one for each video and prompt.
        doubles: Captions left out because another one of the same video and prompt was made earlier.
        segments: Some captions are of a part of a video.
    """

    captioned: int
    failed: int
    pending: int
    captions: int
    doubles: int
    segments: bool


class Index:
    """Where each caption stands."""

    def __init__(self, file: Path, open_ledger: Callable[[int], LedgerView], prompts: int = 1) -> None:
        """Make an empty one in a file of its own.

        Args:
            file: A new file.
            open_ledger: Gives the ledger of a shard, for reading.
            prompts: How many a video has that brings none of its own.
        """
        self.db = _private(file)
        self._prompts = prompts
        self._open_ledger = open_ledger
        self._ledgers: OrderedDict[int, LedgerView] = OrderedDict()
        self._seen = 0
        self.db.executescript(_TABLES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for ledger in self._ledgers.values():
            ledger.close()
        self.db.close()

    def add(self, shard: int) -> None:
        """Take in one shard."""
        self._ledger(shard).require_videos()
        for page in self._ledger(shard).pages():
            self.db.execute("BEGIN")
            self._add_videos(shard, page)
            self._add_captions(shard, page)
            self.db.execute("COMMIT")

    def _add_videos(self, shard: int, page: Page) -> None:
        made: dict[int, set[int]] = {}
        for caption in page.captions:
            made.setdefault(caption.ordinal, set()).add(caption.prompt_index)
        for one in page.items:
            if one.state == "failed" and one.kept is not None:
                self._ledger(shard).kept(one.kept)  # refuses what no run has written
        captioned = {
            one.ordinal
            for one in page.items
            if made.get(one.ordinal, set()).issuperset(range(one.prompts or self._prompts))
        }
        self.db.executemany(
            """INSERT INTO video VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
               ON CONFLICT (id) DO UPDATE SET
                   path = excluded.path, start = excluded.start, "end" = excluded."end",
                   rank = excluded.rank, stage = excluded.stage, error_type = excluded.error_type,
                   error = excluded.error, attempts = excluded.attempts, at = excluded.at,
                   size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns,
                   input_path = excluded.input_path, kept = excluded.kept, shard = excluded.shard
               WHERE (excluded.rank, coalesce(excluded.at, ''), excluded.shard)
                   < (rank, coalesce(at, ''), shard)""",
            ((*_video(one, one.ordinal in captioned), shard) for one in page.items),
        )

    def _add_captions(self, shard: int, page: Page) -> None:
        ids = {item.ordinal: item.id for item in page.items}
        found = [caption for caption in page.captions if caption.ordinal in ids]
        self._seen += len(found)
        self.db.executemany(
            """INSERT INTO caption SELECT number, ?, ?, ?, ? FROM video WHERE id = ?
               ON CONFLICT DO UPDATE SET
                   created_at = excluded.created_at, shard = excluded.shard, ordinal = excluded.ordinal
               WHERE (excluded.created_at, excluded.shard) < (created_at, shard)""",
            ((one.prompt_index, one.created_at, shard, one.ordinal, ids[one.ordinal]) for one in found),
        )

    def merged(self) -> Merged:
        """Return what all shards hold together."""
        ranks = dict(self.db.execute("SELECT rank, count(*) FROM video GROUP BY rank"))
        captions = int(self.db.execute("SELECT count(*) FROM caption").fetchone()[0])
        parts = """SELECT EXISTS (SELECT 1 FROM video JOIN caption ON caption.video = video.number
                   WHERE start IS NOT NULL OR "end" IS NOT NULL)"""
        return Merged(
            captioned=ranks.get(_CAPTIONED, 0),
            failed=ranks.get(_FAILED, 0),
            pending=ranks.get(_PENDING, 0),
            captions=captions,
            doubles=self._seen - captions,
            segments=bool(self.db.execute(parts).fetchone()[0]),
        )

    def captions(self) -> Iterator[tuple[CaptionPlace, Row]]:
        """Yield every caption with its row, in order. One that has gone from its ledger since is left out."""
        cursor = self.db.execute(
            """SELECT path, start, "end", id, prompt_index, caption.shard, ordinal, size_bytes, mtime_ns, at
               FROM video JOIN caption ON caption.video = video.number
               ORDER BY path, start, "end", id, prompt_index"""
        )
        while found := cursor.fetchmany(_BATCH):
            places = [_place(values) for values in found]
            rows = self._rows(places)
            for place in places:
                row = rows.get((place.shard, place.ordinal, place.prompt_index))
                if row is not None:
                    yield place, row

    def _rows(self, places: Sequence[CaptionPlace]) -> dict[tuple[int, int, int], Row]:
        found: dict[tuple[int, int, int], Row] = {}
        ordered = sorted(places, key=lambda place: (place.shard, place.ordinal))
        for shard, group in groupby(ordered, key=lambda place: place.shard):
            ordinals = list(dict.fromkeys(place.ordinal for place in group))
            for (ordinal, index), row in self._ledger(shard).rows(ordinals).items():
                found[shard, ordinal, index] = row
        return found

    def failures(self) -> Iterator[Row]:
        """Yield every video that has failed and lacks a caption, in order, as a row of the failures file.

        Its columns that pass through are in `kept`.
        """
        cursor = self.db.execute(
            """SELECT id, path, input_path, start, "end", stage, error_type, error, attempts, at, kept
               FROM video WHERE rank = ? ORDER BY path, start, "end", id""",
            (_FAILED,),
        )
        names = [column[0] for column in cursor.description]
        for values in cursor:
            row: dict[str, Any] = dict(zip(names, values, strict=True))
            written, kept = row["input_path"], row["kept"]
            texts = {
                "path": path_text(bytes(row["path"])),
                "input_path": written and path_text(bytes(written)),
            }
            yield row | texts | {"kept": json.loads(kept) if kept else {}}

    def _ledger(self, shard: int) -> LedgerView:
        """Return a ledger, open; of very many shards the one used longest ago is closed."""
        if shard not in self._ledgers:
            self._ledgers[shard] = self._open_ledger(shard)
        self._ledgers.move_to_end(shard)
        if len(self._ledgers) > _MOST_OPEN:
            self._ledgers.popitem(last=False)[1].close()
        return self._ledgers[shard]


def _video(item: ItemView, captioned: bool) -> tuple[Any, ...]:
    rank = _CAPTIONED if captioned else _FAILED if item.state == "failed" else _PENDING
    why = (item.stage, item.error_type, item.error, item.attempts, item.at)
    rest = (item.size_bytes, item.mtime_ns, item.input_path, item.kept if rank == _FAILED else None)
    return item.id, item.path, item.start_s, item.end_s, rank, *why, *rest


def _place(values: tuple[Any, ...]) -> CaptionPlace:
    path, start_s, end_s, identity, index, shard, ordinal, size_bytes, mtime_ns, at = values
    file = FileStamp(size_bytes, mtime_ns)
    return CaptionPlace(bytes(path), start_s, end_s, identity, index, shard, ordinal, file, at)


def _private(file: Path) -> sqlite3.Connection:
    """Return a new database that no other process opens and that no crash needs to survive."""
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)
    for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536", "page_size = 8192"):
        connection.execute(f"PRAGMA {setting}")
    return connection
