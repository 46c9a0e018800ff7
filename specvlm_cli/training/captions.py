"""The tokens that the target wrote, in one SQLite file; in another one why some samples are left out. Nothing else.

A caption is found by what it depends on: the frames as the target saw them, the prompt, and the settings. So a
further epoch, a restart, a file under another name, or another training need no generation. What is left out is a
matter of one training, and must not travel with captions. Rollback journal and synchronous=FULL, as
for the ledger: what was committed survives a power cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from specvlm.records import Frames
from specvlm_cli.caption.failure import Failure
from specvlm_cli.caption.settings import Plain
from specvlm_cli.console.safe_text import clean
from specvlm_cli.run.own_database import OwnDatabase

NAME = "captions.db"
LEFT_OUT_NAME = "left-out.db"
ALL_PROMPTS = -1
_CAPTIONS = "CREATE TABLE caption (key TEXT PRIMARY KEY, tokens TEXT NOT NULL) STRICT, WITHOUT ROWID;"
_LEFT_OUT = """
    CREATE TABLE left_out (video TEXT NOT NULL, prompt INTEGER NOT NULL, since INTEGER NOT NULL, name TEXT NOT NULL,
        stage TEXT NOT NULL, error_type TEXT NOT NULL, error TEXT NOT NULL, PRIMARY KEY (video, prompt)) STRICT;
"""


class Blame(Enum):
    """Whose fault it is that a sample cannot be used."""

    VIDEO = auto()  # it will fail again
    UNSURE = auto()  # the video's, if others can be used
    PASSING = auto()  # of where the video lies: not there, not readable now
    MACHINE = auto()  # nothing can be used


class LeftOut(NamedTuple):
    """A sample that cannot be used, or all of a video's."""

    video: str  # its id
    prompt: int  # or ALL_PROMPTS
    since: int  # the position, or step, from which on it is left out
    name: str  # for people
    failure: Failure
    blame: Blame = Blame.VIDEO


def caption_key(frames: Frames, prompt: str, settings: Plain) -> str:
    """Return what a caption is found by: a hash of frames, prompt, and all else that the text depends on."""
    digest = hashlib.sha256()
    digest.update(json.dumps([prompt, settings, frames.pixels.shape], sort_keys=True, default=str).encode())
    digest.update(np.ascontiguousarray(frames.times_s).data)
    digest.update(np.ascontiguousarray(frames.pixels).data)
    return digest.hexdigest()


class Captions(OwnDatabase):
    """The open file of captions."""

    application, tables = 0x53565443, _CAPTIONS  # "SVTC"
    holds, deleted = "captions", "the captions made again"

    def tokens(self, key: str) -> tuple[int, ...] | None:
        """Return a caption's tokens; None: it was not made yet."""
        with self._guarded():
            found = self._connection.execute("SELECT tokens FROM caption WHERE key = ?", (key,)).fetchone()
        return None if found is None else tuple(json.loads(found[0]))

    def add(self, key: str, tokens: Sequence[int]) -> None:
        """Keep a caption's tokens; they are on disk when this returns."""
        with self._guarded():
            self._connection.execute(
                "INSERT OR REPLACE INTO caption (key, tokens) VALUES (?, ?)", (key, json.dumps(list(tokens)))
            )

    def count(self) -> int:
        """Return how many captions there are."""
        with self._guarded():
            return int(self._connection.execute("SELECT count(*) FROM caption").fetchone()[0])


class LeftOuts(OwnDatabase):
    """The open file of what one training leaves out."""

    application, tables = 0x5356544C, _LEFT_OUT  # "SVTL"
    holds, deleted = "left-out samples", "all videos tried again"

    def leave_out(self, left: LeftOut) -> None:
        """Note that a sample cannot be used; what was noted first stays, or moves to an earlier place."""
        with self._guarded():
            self._connection.execute(
                """INSERT INTO left_out (video, prompt, since, name, stage, error_type, error)
                   VALUES (?, ?, ?, ?, ?, ?, ?)
                   ON CONFLICT DO UPDATE SET since = min(since, excluded.since)""",
                (
                    *left[:3],
                    clean(left.name),
                    left.failure.stage,
                    left.failure.error_type,
                    left.failure.error,
                ),
            )

    def left_out(self) -> list[LeftOut]:
        """Return what is left out, in the order in which it was noted."""
        with self._guarded():
            rows = self._connection.execute(
                "SELECT video, prompt, since, name, stage, error_type, error FROM left_out ORDER BY rowid"
            ).fetchall()
        return [
            LeftOut(video, prompt, since, name, Failure(*why)) for video, prompt, since, name, *why in rows
        ]
