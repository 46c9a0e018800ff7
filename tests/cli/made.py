"""Run folders made without a run: as large, as odd or as hostile as a test wants them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specvlm_cli.console.safe_text import path_text, storable
from specvlm_cli.run.ledger import Ledger
from specvlm_cli.run.parts import CAPTION_SCHEMA, PartFiles

SETTINGS = {"target": "fake/target", "prompt": "Describe it.", "fps": 2.0}


@dataclass(frozen=True)
class Video:
    """One video of a made-up run."""

    id: str
    path: bytes
    captions: Sequence[str] = ("a caption",)  # one for each prompt; none: see `state`
    state: str = "done"
    start_s: float | None = None
    end_s: float | None = None
    created_at: str = "2026-01-01T00:00:00.000000+00:00"
    row: Mapping[str, Any] = field(default_factory=dict)  # what is different in its rows


def caption_row(video: Video, index: int) -> dict[str, Any]:
    """Return a row as a run writes it."""
    row: dict[str, Any] = dict.fromkeys(CAPTION_SCHEMA.names)
    row |= dict.fromkeys(("num_drafts", "num_draft_tokens", "num_accepted_tokens"), 0)
    row |= {name: 0.5 for name in CAPTION_SCHEMA.names if name.endswith("_s") and name != "frame_times_s"}
    row |= {"baseline_token_s": None, "baseline_decode_s": None, "tokens_per_s": 20.0}
    row |= {"id": video.id, "path": path_text(video.path), "start": video.start_s, "end": video.end_s}
    row |= {"prompt_index": index, "caption": storable(video.captions[index]), "finish_reason": "stop"}
    row |= {"target_model": "fake/target", "draft_model": "fake/draft", "method": "specvlm/specvlm/static"}
    row |= {"prompt": "Describe it.", "prompt_sha256": "0" * 64, "config_hash": "c" * 16}
    row |= {"specvlm_version": "0.1.0", "run_id": "r", "created_at": video.created_at, "duration_s": 12.5}
    row |= {"fps": 25.0, "width": 64, "height": 48, "num_frames": 8, "completion_tokens": 13}
    row |= {"acceptance_histogram": [0, 1, 2], "attempts": 1, "device": "fake"}
    return row | dict(video.row)


def make_run(
    out: Path,
    shards: Sequence[Iterable[Video]],
    *,
    kept: Mapping[str, str] | None = None,
    part_rows: int = 1000,
    count: int | None = None,
) -> Path:
    """Make a run folder with these shards; `part_rows=0` leaves the captions without parts."""
    state = out / ".specvlm"
    state.mkdir(parents=True)
    run = {"settings": SETTINGS, "config_hash": "c" * 16, "resolved": {}, "format": 1}
    run |= {"shards": count or len(shards), "kept": dict(kept or {})}
    (state / "run.json").write_text(json.dumps(run))
    for number, videos in enumerate(shards):
        make_shard(out, number, videos, kept=kept or {}, part_rows=part_rows)
    return out


def make_shard(
    out: Path, number: int, videos: Iterable[Video], *, kept: Mapping[str, str], part_rows: int
) -> None:
    """Make the ledger of one shard, and its parts."""
    path = out / ".specvlm" / f"state-{number:05d}.db"
    Ledger.create(path).close()
    fill(path, videos)
    register(path)
    if part_rows:
        parts = PartFiles(out, number)
        parts.kept = kept
        with Ledger.open(path) as ledger:
            parts.close_part(ledger, part_rows)
            parts.write_failures(ledger)


def register(path: Path) -> None:
    """Say that a start has gone through its inputs."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("INSERT INTO counter (name, value) VALUES ('registered', 1)")
    database.close()


def fill(path: Path, videos: Iterable[Video]) -> None:
    """Put videos, with their captions, into a ledger."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN")
    for video in videos:
        failed = video.state == "failed"
        why = ("decode", "VideoDecodeError", "no frame can be decoded") if failed else (None,) * 3
        values = (video.id, video.path, video.start_s, video.end_s, video.state, *why)
        ended = video.created_at if video.state in ("done", "failed") else None
        sql = """INSERT INTO item (id, path, start_s, end_s, state, stage, error_type, error, at, attempts)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)"""
        ordinal = database.execute(sql, (*values, ended)).lastrowid
        if video.state == "done":
            database.executemany(
                "INSERT INTO caption VALUES (?, ?, ?, NULL)",
                (
                    (ordinal, index, json.dumps(caption_row(video, index)))
                    for index in range(len(video.captions))
                ),
            )
    database.execute("COMMIT")
    database.close()


def videos(number: int, root: str = "/v", first: int = 0) -> Iterable[Video]:
    """Yield ordinary videos, in folders of a hundred."""
    for index in range(first, first + number):
        yield Video(f"id{index:07d}", f"{root}/{index // 100:05d}/{index:07d}.mp4".encode())
