"""From paths of videos to names of files that stay inside the destination, each name given once.

Folders below the input folder, or below the common root of several, are kept. Names depend on all videos that
the run knows, not only on those that have captions, so a later export of the same run gives the same names.
Whatever a path says ("..", an absolute path, a NUL, a name of a thousand bytes), the result is a relative path of
ordinary components.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterator
from itertools import takewhile

from specvlm_cli.inputs.item import item_id

_MOST_BYTES = 255  # of one component
_MOST_PATH_BYTES = 3000  # of a whole name; below it, whatever the destination is called
_LONG = b"_long"  # folder of what would have a longer name
_OURS = (b"_manifest.json", b"_failures.jsonl", _LONG)  # names at the top of an export
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\\\]")

_TABLES = """
CREATE TABLE used (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE stem (hash BLOB PRIMARY KEY, videos INTEGER NOT NULL) WITHOUT ROWID;
"""


class Names:
    """Names for the files of one export. `db` holds the table `video` of the merged ledgers.

    With `readable`, names are also UTF-8 without control characters, and none is hidden.
    """

    def __init__(
        self, db: sqlite3.Connection, *, readable: bool = False, keep_extension: bool = False
    ) -> None:
        self._db = db
        self._readable = readable
        self._keep_extension = keep_extension
        self._db.executescript(_TABLES)
        self._root = self._common_root()
        self._look_at_all()

    def _common_root(self) -> bytes:
        """Return the folder, with its slash, below which all videos are: that of the inputs where ids tell it."""
        sql = """SELECT path, id, start, "end" FROM video WHERE path != x'' ORDER BY path {} LIMIT 1"""
        ends = [self._db.execute(sql.format(order)).fetchone() for order in ("ASC", "DESC")]
        if None in ends:
            return b""
        begins = [begin for path, *rest in ends for begin in (bytes(path), _input_root(bytes(path), *rest))]
        levels = zip(*(begin.split(b"/")[:-1] for begin in begins), strict=False)
        shared = takewhile(lambda level: len(set(level)) == 1, levels)
        return b"".join(level[0] + b"/" for level in shared)

    def _look_at_all(self) -> None:
        """Take the folders' names, and count the videos that would share a name."""
        self._db.execute("BEGIN")
        before: list[bytes] = []
        for path in self._paths():
            *folders, _ = self._components(path)
            if folders != before:
                self._db.executemany(
                    "INSERT OR IGNORE INTO used VALUES (?)",
                    ((b"/".join(folders[: depth + 1]),) for depth in range(len(folders))),
                )
                before = folders
            sql = "INSERT INTO stem VALUES (?, 1) ON CONFLICT DO UPDATE SET videos = videos + 1"
            self._db.execute(sql, (_hash(self._stem(path)),))
        self._db.execute("COMMIT")

    def _paths(self) -> Iterator[bytes]:
        for (path,) in self._db.execute("SELECT DISTINCT path FROM video ORDER BY path"):
            yield bytes(path)

    def _components(self, path: bytes) -> list[bytes]:
        """Return the path below the common root as components that name nothing outside; never none."""
        below = path.removeprefix(self._root)
        found = [self._fit(part) for part in below.split(b"/") if part not in (b"", b".")] or [b"video"]
        if found[0] in _OURS:
            found[0] += b"~"
        return found if sum(map(len, found)) + len(found) <= _MOST_PATH_BYTES else [_LONG, _short_hash(path)]

    def _fit(self, part: bytes) -> bytes:
        if part == b"..":
            part = b"__"
        part = part.replace(b"\0", b"_")
        if self._readable:
            text = _UNFIT.sub("_", part.decode("utf-8", "surrogateescape"))
            part = re.sub(r"\A\.", "_", text).encode()
        return _cut(part, b"")

    def _stem(self, path: bytes) -> bytes:
        *folders, name = self._components(path)
        return b"/".join([*folders, _split(name)[0]])

    def take(self, path: bytes, tail: bytes) -> bytes:
        """Return a name for a file of a video that nothing else has; call it once for each file.

        b.mp4 -> b.txt; where b.webm is there too -> b.mp4.txt; where that is taken -> b.mp4~HASH.txt.
        """
        *folders, name = self._components(path)
        stem, extension = _split(name)
        (shared,) = self._db.execute("SELECT videos FROM stem WHERE hash = ?", (_hash(self._stem(path)),))
        hashed = b"~" + _short_hash(path)
        if self._keep_extension:
            candidates = [(stem, extension), (stem + hashed, extension)]
        else:
            candidates = [(stem, tail)] * (shared[0] == 1) + [(name, tail), (name + hashed, tail)]
        for begin, end in candidates:
            taken = b"/".join([*folders, _cut(begin, end)])
            if self._db.execute("INSERT OR IGNORE INTO used VALUES (?)", (taken,)).rowcount:
                return taken
        raise AssertionError(f"no name left for {path!r}")


def _input_root(path: bytes, identity: str, start_s: float | None, end_s: float | None) -> bytes:
    """Return the folder, with its slash, that a video was found below: its id is made of the rest of its path.

    Where the id is a manifest's own, that is not known, and it is the folder that the video is in.
    """
    slashes = [index + 1 for index, byte in enumerate(path) if byte == ord("/")]
    found = (path[:begin] for begin in slashes if item_id(path[begin:], start_s, end_s) == identity)
    return next(found, path[: path.rfind(b"/") + 1])


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Return (stem, extension with its dot); a dot in front is part of the stem."""
    stem, dot, extension = name.rpartition(b".")
    return (stem, dot + extension) if stem else (name, b"")


def _cut(begin: bytes, end: bytes) -> bytes:
    """Return begin + end where a file system takes that, else a shorter begin that is still unique."""
    if len(begin) + len(end) <= _MOST_BYTES:
        return begin + end
    tail = b"~" + _short_hash(begin) + end[-64:]
    kept = begin[: _MOST_BYTES - len(tail)]
    return kept.decode("utf-8", "ignore").encode() + tail


def _hash(text: bytes) -> bytes:
    return hashlib.sha1(text, usedforsecurity=False).digest()


def _short_hash(text: bytes) -> bytes:
    return _hash(text).hex()[:10].encode()
