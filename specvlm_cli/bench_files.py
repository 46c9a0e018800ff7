"""What a bench leaves in a folder: `bench.parquet`, a row for each timed caption, and `bench.html`, a page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specvlm.bench.page import PageSheet, write_page
from specvlm.bench.records import STAGES, BenchReport, rows_of
from specvlm.durable import publish
from specvlm_cli.console.safe_text import clean, storable
from specvlm_cli.exits import FatalError, Flag, UsageError
from specvlm_cli.safe_files import new_file

ROWS, PAGE = "bench.parquet", "bench.html"
_METADATA = "specvlm.bench"  # the file's own note of what its rows hold for, as JSON

SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("frames_asked", pa.int64()),
        ("pruner", pa.string()),
        ("prune_ratio", pa.float64()),
        ("tree", pa.string()),
        ("draft", pa.string()),
        ("batch_size", pa.int64()),
        ("depth", pa.int64()),
        ("exact", pa.bool_()),
        ("video", pa.string()),
        ("turn", pa.int64()),
        ("num_frames", pa.int64()),
        ("video_tokens", pa.int64()),
        ("video_tokens_kept", pa.int64()),
        ("compressor", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("token_ids", pa.list_(pa.int64())),
        *((name, pa.float64()) for name in STAGES),
        ("decode_s", pa.float64()),
        ("decode_tokens", pa.int64()),
        ("total_s", pa.float64()),
        ("num_drafts", pa.int64()),
        ("num_draft_tokens", pa.int64()),
        ("num_accepted_tokens", pa.int64()),
        ("acceptance_histogram", pa.list_(pa.int64())),
        ("depth_tries", pa.list_(pa.int64())),
        ("peak_memory_bytes", pa.int64()),
        ("mean_batch_size", pa.float64()),
        ("settled_tokens", pa.int64()),
    ]
)


def ready(folder: Path) -> Path:
    """Make the folder, before anything is measured for it.

    Raises:
        UsageError: It cannot be made, or takes no files.
    """
    shown = clean(str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            Flag("out", shown), f": {error.strerror}", fix="give a folder that can be made"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(Flag("out", shown), ": no files can be written there", fix="give another folder")
    return folder


def write(report: BenchReport, folder: Path, sheets: Sequence[PageSheet] = ()) -> None:
    """Write a report; files of an earlier bench are replaced.

    Args:
        report: What was measured.
        folder: It is there.
        sheets: Pictures for the page.

    Raises:
        FatalError: The folder does not take it.
    """
    try:
        _write_rows(report, folder / ROWS)
        _write_page(report, folder / PAGE, sheets)
    except OSError as error:
        raise FatalError(
            f"--out {clean(str(folder))}: cannot be written ({error.strerror}); give another folder"
        ) from error


def _write_rows(report: BenchReport, path: Path) -> None:
    rows = [row | _texts(row) for row in rows_of(report.samples)]
    note = json.dumps({"conditions": asdict(report.conditions)})
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({_METADATA: note}))
    with _whole(path) as temporary:
        pq.write_table(table, temporary.absolute(), compression="zstd")  # it takes `b:1` for an address


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """What comes from outside, as Parquet takes it."""
    return {name: storable(row[name]) for name in ("video", "draft") if row[name] is not None}


def _write_page(report: BenchReport, path: Path, sheets: Sequence[PageSheet]) -> None:
    with _whole(path) as temporary:
        write_page(report, temporary, sheets)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give the name under which to write a file, which gets its own once it is whole."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        new_file(temporary).close()
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
