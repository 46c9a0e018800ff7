"""Parquet as the Hugging Face hub lays it out: data/train-00000-of-000NN.parquet. Same rows, same bytes.

Writer settings are fixed here and nothing of the moment is written, so equal rows give equal files (with one
version of pyarrow, which writes its own name into each file).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.export.columns import TableColumns
from specvlm_cli.export.manifest import ExportManifest, described
from specvlm_cli.run.ledger_view import Row

ROW_GROUP = 4000  # rows that are in memory at once


def write_file(path: Path, columns: TableColumns, rows: Iterator[Row], most: int | None = None) -> int:
    """Write one file of at most `most` rows; return how many there were."""
    written = 0
    with pq.ParquetWriter(
        path.absolute(),  # pyarrow takes `run-12:30` for an address
        columns.schema,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        write_page_checksum=True,
    ) as writer:
        for group in _groups(rows if most is None else islice(rows, most)):
            writer.write_table(columns.table(group), row_group_size=ROW_GROUP)
            written += len(group)
    with pq.ParquetFile(path.absolute()) as file:
        if file.metadata.num_rows != written:
            raise FatalError(f"{clean(str(path))}: what was written does not read back; check the disk")
    return written


def write_split(
    root: Path,
    folder: str,
    columns: TableColumns,
    rows: Iterator[Row],
    files: int,
    most: int,
    manifest: ExportManifest,
) -> int:
    """Write `files` files of a split into a folder of the export, `most` rows in each; return all rows."""
    (root / folder).mkdir()
    written = 0
    for number in range(files):
        name = f"{folder}/train-{number:05d}-of-{files:05d}.parquet"
        count = write_file(root / name, columns, rows, most)
        manifest.add(described(root, name, count))
        written += count
    return written


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while group := list(islice(remaining, ROW_GROUP)):
        yield group
