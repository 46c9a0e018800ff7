"""Which columns an export has, with which types, and how rows become typed columns. Knows no file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from specvlm_cli.console.safe_text import clean, storable
from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.run.ledger_view import Row
from specvlm_cli.run.parts import caption_schema, failure_schema

MARK = b"specvlm.export"  # in the metadata of every Parquet file of an export
_FEATURES = b"huggingface"


@dataclass(frozen=True, slots=True)
class TableColumns:
    """The columns of one table."""

    schema: pa.Schema

    @property
    def names(self) -> list[str]:
        return list(self.schema.names)

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Return rows as typed columns; what a row lacks is null."""
        columns = [_column([row.get(field.name) for row in rows], field.type) for field in self.schema]
        return pa.Table.from_arrays(columns, schema=self.schema)


def caption_columns(kept: Mapping[str, str], wanted: Sequence[str] | None) -> TableColumns:
    """Return the columns of captions: all, or those that are wanted, in that order.

    Raises:
        UsageError: There is no such column, or it is wanted twice.
    """
    schema = caption_schema(kept)
    for name in wanted or ():
        if name not in schema.names:
            near = get_close_matches(name, schema.names, 1)
            meant = f"did you mean {near[0]}" if near else "docs/columns.md lists them"
            raise UsageError(Flag("columns"), f": there is no column {clean(name)!r}", fix=meant)
    if wanted is not None and len(set(wanted)) < len(wanted):
        raise UsageError(Flag("columns", ",".join(wanted)), ": a column is named twice", fix="name each once")
    return TableColumns(_marked(schema, wanted or schema.names))


def failure_columns(kept: Mapping[str, str]) -> TableColumns:
    """Return the columns of failures."""
    schema = failure_schema(kept)
    return TableColumns(_marked(schema, schema.names))


def _marked(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Return some columns of a schema, with their Hugging Face features and our mark."""
    features = json.loads(schema.metadata[_FEATURES])["info"]["features"]
    kept = {"info": {"features": {name: features[name] for name in names}}}
    fields = [schema.field(name) for name in names]
    return pa.schema(fields, metadata={_FEATURES: json.dumps(kept), MARK: b"1"})


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(kind):
        values = [value and datetime.fromisoformat(value) for value in values]
    elif pa.types.is_string(kind):
        values = [value if value is None else _text(value) for value in values]
    return pa.array(values, kind)


def _text(value: Any) -> str:
    text = str(value)
    return text if text.isascii() else storable(text)
