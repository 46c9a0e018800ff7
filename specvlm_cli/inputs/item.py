"""What is to be captioned: one video, or one part of it, with a stable id. Knows no input and no ledger."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Item:
    """One video, or one part of it, that is to get a caption.

    Attributes:
        id: The manifest's own, or sha1 of (path relative to its input root, start, end), in hex.
        path: Absolute path, as bytes; empty where a manifest's row has none.
        start_s: Start of the part; None: the whole video.
        end_s: End of the part; None: to the end of the video.
        prompts: Its own prompts, from a manifest; None: those of the run.
        kept: Columns of the manifest that pass through to the caption's row, as a JSON object; None: none.
        problem: Why a manifest's row names no video that could be tried; None: it does.
        own_id: The id is the manifest's: two of them for one file are meant.
        input_path: The path as it was written in the manifest, or found below the folder as that was given; None: a
            manifest's row has none.
    """

    id: str
    path: bytes
    start_s: float | None = None
    end_s: float | None = None
    prompts: tuple[str, ...] | None = None
    kept: str | None = None
    problem: str | None = None
    own_id: bool = False
    input_path: bytes | None = field(default=None, compare=False)  # by another name it is the same video


def item_id(relative: bytes, start_s: float | None = None, end_s: float | None = None) -> str:
    """Return sha1 of (path relative to its input root, start, end), with NUL, which no path has, between."""
    parts = (relative, *(b"" if time is None else repr(float(time)).encode() for time in (start_s, end_s)))
    return hashlib.sha1(b"\0".join(parts), usedforsecurity=False).hexdigest()
