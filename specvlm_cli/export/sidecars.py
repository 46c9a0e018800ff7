"""Text next to videos: a .txt or .srt for each video and prompt, in the folders that the videos have.

A .txt of a whole video is its caption; where parts of a video were captioned it has a line for each part. A .srt
has one cue for each part, or one from the beginning to the end. Files of further prompts are called
NAME.prompt-1.txt and so on.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from specvlm_cli.console.safe_text import storable
from specvlm_cli.export.manifest import ExportedFile, ExportManifest
from specvlm_cli.export.merge import CaptionPlace
from specvlm_cli.export.names import Names
from specvlm_cli.export.request import SidecarName
from specvlm_cli.run.ledger_view import Row

_LONGEST_MS = 360_000_000 - 1  # where the end is not known: 99:59:59,999
_NOT_IN_CUES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Cue:
    """One caption of a video, with its place in time."""

    start_s: float | None
    end_s: float | None
    duration_s: float | None  # of the whole video
    caption: str


def write_sidecars(
    root: Path,
    kind: SidecarName,
    captions: Iterator[tuple[CaptionPlace, Row]],
    names: Names,
    manifest: ExportManifest,
) -> int:
    """Write a file for each video and prompt; return how many captions they hold."""
    written = 0
    content = _text if kind == "txt" else _subtitles
    for path, group in groupby(captions, key=lambda one: one[0].path):
        for index, pieces in sorted(_by_prompt(group).items()):
            tail = f".prompt-{index}.{kind}" if index else f".{kind}"
            manifest.add(_write(root, names.take(path, tail.encode()), content(pieces), len(pieces)))
            written += len(pieces)
    return written


def _by_prompt(captions: Iterator[tuple[CaptionPlace, Row]]) -> dict[int, list[Cue]]:
    found: dict[int, list[Cue]] = {}
    for place, row in captions:
        piece = Cue(place.start_s, place.end_s, row.get("duration_s"), storable(row.get("caption") or ""))
        found.setdefault(place.prompt_index, []).append(piece)
    return found


def _write(root: Path, name: bytes, content: str, rows: int) -> ExportedFile:
    encoded = content.encode()
    path = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(encoded)
    return ExportedFile(os.fsdecode(name), len(encoded), hashlib.sha256(encoded).hexdigest(), rows)


def _text(pieces: Sequence[Cue]) -> str:
    if len(pieces) == 1 and pieces[0].start_s is None and pieces[0].end_s is None:
        return pieces[0].caption + "\n"
    return "".join(f"{_span(one, '.', ' - ')}  {' '.join(one.caption.split())}\n" for one in pieces)


def _subtitles(pieces: Sequence[Cue]) -> str:
    return "\n".join(
        f"{number}\n{_span(one, ',', ' --> ')}\n{_cue(one.caption)}\n"
        for number, one in enumerate(pieces, start=1)
    )


def _span(piece: Cue, point: str, between: str) -> str:
    """Return start and end of a piece; an end that is not known is the video's, else the latest that fits."""
    start_ms = max(_milliseconds(piece.start_s or 0.0), 0)
    end_s = piece.duration_s if piece.end_s is None else piece.end_s
    end_ms = _LONGEST_MS if end_s is None else _milliseconds(end_s)
    return f"{_clock(start_ms, point)}{between}{_clock(max(end_ms, start_ms + 1), point)}"


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds) if math.isfinite(1000 * seconds) else _LONGEST_MS


def _clock(time_ms: int, point: str) -> str:
    seconds, thousandths = divmod(time_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}{point}{thousandths:03d}"


def _cue(caption: str) -> str:
    """Return a caption as lines that cannot end the cue or begin another."""
    text = _NOT_IN_CUES.sub(" ", caption.replace("\r\n", "\n").replace("\r", "\n")).replace("-->", "->")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line) or "..."
