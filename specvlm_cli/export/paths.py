"""By which path an export names a video: below its input folder, as it was given, or where it is on this machine.

Unless absolute paths are asked for, nothing in a row names a folder of this machine: not the path, not the error of a
failure, and not a model that was loaded from a folder.
"""

from __future__ import annotations

import os
import sqlite3
from collections import deque
from itertools import chain, takewhile
from typing import Any

from specvlm_cli.console.safe_text import path_bytes, path_text
from specvlm_cli.export.request import PathsName
from specvlm_cli.inputs.item import item_id
from specvlm_cli.run.ledger_view import Row

_MODELS = ("target_model", "draft_model")
_ID_DIGITS = 40  # of an id that is made of a path; others are a manifest's own


class Paths:
    """Names the videos of one export. `db` holds the table `video` of the merged ledgers."""

    def __init__(self, db: sqlite3.Connection, how: PathsName) -> None:
        self._how = how
        self._root = b""  # of the video before, which the next one shares most often
        self._shared = b"" if how == "absolute" else self._common_root(db)

    def row(self, row: Row, path: bytes, times: tuple[float | None, float | None]) -> Row:
        """Return a row of a caption or a failure, with the paths that the export has.

        Args:
            row: As the run has it.
            path: Where the video is.
            times: Start and end of the part that it is of.
        """
        if self._how == "absolute":
            return row
        written = row.get("input_path")
        below = path_text(self._below(path, row["id"], *times, written))
        shown = written if self._how == "input" and written is not None else below
        row = row | {"path": shown} | {name: _name(row[name]) for name in _MODELS if row.get(name)}
        if self._how == "relative" and written is not None and not _is_relative(path_bytes(written)):
            row["input_path"] = below
        if row.get("error") and path:
            row["error"] = row["error"].replace(path_text(path), shown)
        return row

    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return a run's settings as the card of an export may show them."""
        target = settings.get("target")
        return settings | {"target": _name(target)} if target and self._how != "absolute" else settings

    def _below(
        self, path: bytes, identity: str, start_s: float | None, end_s: float | None, written: str | None
    ) -> bytes:
        """Return a path below its input folder; where that is not known, below a folder that such videos share."""
        below = self._below_root(path, identity, start_s, end_s)
        if below is not None:
            return below
        if written is not None and path and _is_relative(path_bytes(written)):
            return os.path.normpath(path_bytes(written))
        return path[len(self._shared) :] if len(self._shared) > 1 else path.rpartition(b"/")[2]

    def _below_root(
        self, path: bytes, identity: str, start_s: float | None, end_s: float | None
    ) -> bytes | None:
        """Return the part of a path that its id is made of; None: the id is the manifest's, or of the whole path."""
        if len(identity) != _ID_DIGITS:
            return None
        roots = (path[: index + 1] for index, byte in enumerate(path) if byte == ord("/") and index)
        for root in chain((self._root,), roots):
            if root and path.startswith(root) and item_id(path[len(root) :], start_s, end_s) == identity:
                self._root = root
                return path[len(root) :]
        return None

    def _common_root(self, db: sqlite3.Connection) -> bytes:
        """Return the folder, with its slash, that all videos share of which the input folder is not known."""
        sql = """SELECT path, id, start, "end" FROM video WHERE path != x'' ORDER BY path"""
        paths = (
            bytes(path) for path, *rest in db.execute(sql) if self._below_root(bytes(path), *rest) is None
        )
        first = next(paths, b"")
        last = next(iter(deque(paths, maxlen=1)), first)
        levels = zip(*(path.split(b"/")[:-1] for path in (first, last)), strict=False)
        return b"".join(level[0] + b"/" for level in takewhile(lambda level: level[0] == level[1], levels))


def _is_relative(path: bytes) -> bool:
    return not path.startswith(b"/") and b".." not in path.split(b"/")


def _name(model: str) -> str:
    """Return a model's name; that of a folder is its last part."""
    return os.path.basename(model.rstrip("/")) if model.startswith("/") else model
