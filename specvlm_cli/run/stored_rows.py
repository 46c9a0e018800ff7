"""Rows of captions as a ledger stores them: JSON text, read back and checked. Knows no database and no file.

What somebody else wrote into a ledger may be any JSON. A row that a run did not write is refused, so that those
who use rows can rely on them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa

Row = dict[str, Any]
Check = Callable[[Any], bool]  # says whether a value, not null, fits a column

_NEVER_NULL = ("id", "path", "prompt_index", "caption", "created_at")
_SURROGATE = re.compile("[\\ud800-\\udfff]")  # UTF-8 holds none
_MOST_INTEGER = 1 << 63
_MOST_EXACT = 1 << 53  # whole numbers up to here are numbers of 64-bit floating point too


class OddRowError(ValueError):
    """The text is not a row that a run writes; the message says why."""


def read_row(text: object) -> Row:
    """Return a stored row; `check_types` says more of it.

    Raises:
        OddRowError: It is not JSON, not an object, or lacks what every row has.
    """
    try:
        row = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise OddRowError(f"a row that is not JSON ({str(error)[:60]})") from None
    if not isinstance(row, dict):
        raise OddRowError("a row that is not a JSON object")
    for name in _NEVER_NULL:
        if row.get(name) is None:
            raise OddRowError(f"a row without {name}")
    return row


def check_types(row: Row, checks: Mapping[str, Check]) -> None:
    """Check that the values of a row have the types of their columns, or are null; see `checks`.

    Raises:
        OddRowError: A value has another type.
    """
    for name, value in row.items():
        if value is not None and not checks.get(name, _is_scalar)(value):
            raise OddRowError(f"a row whose {name[:60]!r} is {repr(value)[:60]}")


def checks(kept: Mapping[str, str]) -> Mapping[str, Check]:
    """Return what says of each column of a caption whether a value fits; `kept`: see `caption_schema`."""
    from specvlm_cli.run.parts import caption_schema  # here, because it needs the ledger, and that needs us

    return checks_of(caption_schema(kept))


def checks_of(schema: pa.Schema) -> Mapping[str, Check]:
    """Return what says of each column of a schema whether a value fits."""
    return {field.name: _check_of(field.type) for field in schema}


def _check_of(kind: pa.DataType) -> Check:
    if pa.types.is_list(kind):
        fits = _check_of(kind.value_type)
        return lambda value: type(value) is list and all(map(fits, value))
    if pa.types.is_timestamp(kind):
        return _is_time
    return {pa.string(): _is_text, pa.bool_(): _is_flag, pa.float64(): _is_number, pa.int64(): _is_integer}[
        kind
    ]


def _is_text(value: Any) -> bool:
    return type(value) is str and not _SURROGATE.search(value)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_integer(value: Any) -> bool:
    return type(value) is int and -_MOST_INTEGER <= value < _MOST_INTEGER


def _is_number(value: Any) -> bool:
    return _is_finite(value) or (type(value) is int and abs(value) <= _MOST_EXACT)


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_scalar(value: Any) -> bool:
    return type(value) is bool or _is_text(value) or _is_finite(value) or _is_integer(value)
