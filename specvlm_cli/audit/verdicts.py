"""The verdicts of an audit, in one SQLite file of OUT/audit: what was compared is not compared again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any, get_args

from specvlm_cli.audit.comparing import Outcome, RowVerdict
from specvlm_cli.audit.made_with import MadeWith
from specvlm_cli.audit.sample import RowPlace
from specvlm_cli.run.own_database import OwnDatabase
from specvlm_cli.run.stored_rows import Row

_TABLE = """
    CREATE TABLE verdict (id TEXT NOT NULL, prompt_index INTEGER NOT NULL, digest TEXT NOT NULL, found TEXT NOT NULL,
        PRIMARY KEY (id, prompt_index)) STRICT, WITHOUT ROWID;
"""
_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def digest_of(row: Row, place: RowPlace, made_with: MadeWith) -> str:
    """Return a hash of all that a verdict depends on, the video's content excepted.

    A prompt that is added to the run changes no verdict on the others.
    """
    settings = {name: value for name, value in made_with.settings.items() if name != "prompt"}
    told = [row, place.stamp, settings, made_with.resolved]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


class Verdicts(OwnDatabase):
    """The open file of verdicts."""

    application, tables = 0x53565641, _TABLE  # "SVVA"
    holds, deleted = "verdicts", "all captions compared again"

    def forget(self) -> None:
        """Drop all verdicts."""
        with self._guarded():
            self._connection.execute("DELETE FROM verdict")

    def add(self, place: RowPlace, digest: str, verdict: RowVerdict) -> None:
        """Keep a verdict; it is on disk when this returns."""
        values = (place.id, place.prompt_index, digest, json.dumps(asdict(verdict)))
        with self._guarded():
            self._connection.execute("INSERT OR REPLACE INTO verdict VALUES (?, ?, ?, ?)", values)

    def get(self, place: RowPlace, digest: str | None = None) -> RowVerdict | None:
        """Return the verdict on a row; None: there is none, or none on this very row.

        Args:
            place: Where the row is.
            digest: What `digest_of` says of it; None: the verdict is known to be on it.

        Raises:
            FatalError: What is there was not written by an audit.
        """
        with self._guarded():
            found = self._connection.execute(
                "SELECT digest, found FROM verdict WHERE id = ? AND prompt_index = ?",
                (place.id, place.prompt_index),
            ).fetchone()
        return None if found is None or digest not in (None, found[0]) else self._read(found[1])

    def _read(self, text: str) -> RowVerdict:
        try:
            return _verdict(json.loads(text))
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise self.damaged(error) from error


def _verdict(found: dict[str, Any]) -> RowVerdict:
    """Return what `asdict` made of a verdict; TypeError, KeyError or ValueError where it is something else."""
    kinds: dict[str, tuple[type, ...]] = {
        "token_index": (int, type(None)),
        "margin": (float, type(None)),
        "stock_text": (str, type(None)),
        "error": (str, type(None)),
    }
    for name, kind in kinds.items():
        if type(found[name]) not in kind:
            raise TypeError(f"{name} is {str(found[name])[:60]!r}")
    if found["outcome"] not in _OUTCOMES:
        raise ValueError(f"outcome is {str(found['outcome'])[:60]!r}")
    differs = tuple(str(name) for name in found["differs"])
    return RowVerdict(found["outcome"], differs, *(found[name] for name in kinds))
