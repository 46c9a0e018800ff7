"""JSON Lines and CSV: one row a line.

JSON Lines hold text as it is. In CSV a text cell that a spreadsheet would execute gets an apostrophe in front:
captions and file names are made by others, and opening a table must not run what they say. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specvlm_cli.console.safe_text import storable
from specvlm_cli.run.ledger_view import Row

# What else a reader may take for the end of a line, or a terminal for a command.
_NOT_IN_LINES = re.compile("[\x7f-\x9f\u2028\u2029]")
# A cell is a formula by its first character; quotes, white space and invisible characters before it may be
# dropped on the way in, and East Asian spreadsheets take the wide forms too.
_FORMULA = re.compile("[\\s\"'\x00-\x20\u200b-\u200f\u2060\ufeff]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def write_jsonl(path: Path, names: Sequence[str], rows: Iterable[Row]) -> int:
    """Write one JSON object a line, all with the same names; return how many."""
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_line({name: row.get(name) for name in names}))
            written += 1
    return written


def json_line(row: Row) -> str:
    """Return a row as one line; NaN and infinities, which JSON does not have, become null."""
    plain = {name: _plain(value) for name, value in row.items()}
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _NOT_IN_LINES.sub(lambda found: f"\\u{ord(found.group()):04x}", text) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return storable(value)
    return [_plain(one) for one in value] if isinstance(value, list) else value


def write_csv(path: Path, names: Sequence[str], rows: Iterable[Row]) -> int:
    """Write a header and one row a record, as RFC 4180 says; return how many rows."""
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow([cell(name) for name in names])
        for row in rows:
            writer.writerow([cell(row.get(name)) for name in names])
            written += 1
    return written


def cell(value: Any) -> str:
    """Return a value as the text of a CSV cell: null is empty, lists are JSON, text is never a formula."""
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return repr(value) if isinstance(value, (int, float)) else _defused(value.replace("\0", "\\x00"))


def _defused(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text
