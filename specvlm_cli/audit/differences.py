"""OUT/audit/differences-SSSSS-of-NNNNN.parquet: every row of the sample that is not equal, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from specvlm.durable import publish
from specvlm_cli.audit.comparing import RowVerdict
from specvlm_cli.run.stored_rows import Row
from specvlm_cli.safe_files import new_file

_ROWS = 1000  # of one row group

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        ("start", pa.float64()),
        ("end", pa.float64()),
        pa.field("prompt_index", pa.int64(), nullable=False),
        ("prompt", pa.string()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("differs", pa.list_(pa.string()), nullable=False),
        ("token_index", pa.int64()),
        ("margin", pa.float64()),
        pa.field("run_text", pa.string(), nullable=False),
        ("stock_text", pa.string()),
        ("error", pa.string()),
    ]
)


class Difference(NamedTuple):
    """A row of the run that is not equal, and its verdict."""

    row: Row
    verdict: RowVerdict

    def plain(self) -> Row:
        """Return it as a row of the file."""
        row, verdict = self.row, self.verdict
        return {
            **{name: row.get(name) for name in ("id", "path", "start", "end", "prompt_index", "prompt")},
            "outcome": verdict.outcome,
            "differs": list(verdict.differs),
            "token_index": verdict.token_index,
            "margin": verdict.margin,
            "run_text": row["caption"],
            "stock_text": verdict.stock_text,
            "error": verdict.error,
        }


def write(path: Path, found: Iterable[Difference]) -> None:
    """Write the file, whole or not at all; with no difference it has no row.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    with new_file(temporary) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for group in _groups(iter(found)):
            writer.write_table(pa.Table.from_pylist([one.plain() for one in group], schema=SCHEMA))
    publish(temporary, path)


def _groups(found: Iterator[Difference]) -> Iterator[list[Difference]]:
    while group := list(islice(found, _ROWS)):
        yield group
