"""A JSONL manifest, line by line: an object in each, whose keys need not be the same in all.

A line that is no object is a row that cannot be used; where the first one is none, it is no manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.columns import (
    MOST_COLUMNS,
    ManifestColumns,
    asked_columns,
    find_columns,
    missing,
    refuse_pathless,
    unused_times,
)
from specvlm_cli.inputs.lines import LongLineError, pieces
from specvlm_cli.inputs.options import InputOptions
from specvlm_cli.inputs.rows import NONE, ManifestRows
from specvlm_cli.inputs.values import MOST_ROW_BYTES, CellError, Fault, json_text

_HEAD_ROWS = 100  # in which some row must have a path
_MOST_FORMS = 64  # sets of keys that are remembered
_MARK = b"\xef\xbb\xbf"
_BLANKS = " \t\r\n"
_decode = json.JSONDecoder().raw_decode  # json.loads looks for blanks at each end, which takes as long again
_NOTHING = ManifestColumns(None, None, None, None, None, ())

Row = dict[Any, Any]


class JsonlManifest:
    """Reads one file.

    Attributes:
        kept: Kept column -> its type.
        unused_times: Columns of the first rows that seem to hold times, and are not read.
    """

    unit = "line"

    def __init__(self, path: bytes, shown: str, options: InputOptions) -> None:
        """Read the first rows, and check that they are rows and have a path.

        Raises:
            UsageError: They are none, or have none.
        """
        self._path = path
        self._shown = shown
        self._options = options
        self._forms: dict[tuple[str, ...], ManifestColumns] = {}
        self._unseen = asked_columns(options)
        self._names: dict[str, None] = {}  # keys that were seen, the first of them
        self.kept: Mapping[str, str] = dict.fromkeys(options.keep_columns, "string")
        self.unused_times: Sequence[str] = self._checked_head()

    def _checked_head(self) -> list[str]:
        with self._opened() as file:
            numbers, lines = next(_numbered(file), ([], []))
        rows = [_parsed(line) for line in lines[:_HEAD_ROWS]]
        if rows and isinstance(rows[0], Fault):
            raise UsageError(f"{self._shown} line {numbers[0]}: {rows[0]}")
        names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
        if rows:
            refuse_pathless(self._shown, list(names), self._options)
        return unused_times(list(names), find_columns(list(names), self._options), self._options)

    def rows(self) -> Iterator[ManifestRows]:
        """Yield all rows, some at a time.

        Raises:
            UsageError: A line is too long, or no row has a column that was asked for.
        """
        with self._opened() as file:
            for numbers, lines in _numbered(file):
                yield self._rows(numbers, [_parsed(line) for line in lines])
        if self._names:
            for name, flag in self._unseen.items():
                raise UsageError(missing(self._shown, flag, name, list(self._names)))

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with open(self._path, "rb") as file:
            try:
                yield file
            except LongLineError as error:
                raise UsageError(
                    f"{self._shown} line {error.line}: longer than {MOST_ROW_BYTES} bytes; write one object a line"
                ) from error

    def _rows(self, numbers: list[int], rows: list[Row | Fault]) -> ManifestRows:
        forms = [_NOTHING if isinstance(row, Fault) else self._form(row) for row in rows]
        objects: list[Row] = [{} if isinstance(row, Fault) else row for row in rows]
        return ManifestRows(
            numbers,
            [
                row if isinstance(row, Fault) else row.get(form.path)
                for row, form in zip(rows, forms, strict=True)
            ],
            [row.get(form.id) for row, form in zip(objects, forms, strict=True)],
            [row.get(form.start) for row, form in zip(objects, forms, strict=True)],
            [row.get(form.end) for row, form in zip(objects, forms, strict=True)],
            [row.get(form.prompt) for row, form in zip(objects, forms, strict=True)],
            (tuple(_kept(row.get(name)) for name in self.kept) for row in objects) if self.kept else NONE,
        )

    def _form(self, row: Row) -> ManifestColumns:
        """Return which keys of a row mean what; rows with the same keys are looked at once."""
        keys = tuple(row)
        known = self._forms.get(keys)
        if known is not None:
            return known
        for name in keys:
            self._unseen.pop(name, None)
            if len(self._names) < MOST_COLUMNS:
                self._names[name] = None
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        self._forms[keys] = find_columns(keys, self._options)
        return self._forms[keys]


def _numbered(file: BinaryIO) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yield (line numbers, lines) of what is not blank, some at a time."""
    first, mark = 1, _MARK
    for piece in pieces(file, MOST_ROW_BYTES):
        lines = piece.removeprefix(mark).split(b"\n")
        full = [(number, line) for number, line in enumerate(lines, first) if line and not line.isspace()]
        for number, line in full:
            if len(line) > MOST_ROW_BYTES:
                raise LongLineError(number)
        if full:
            yield [number for number, _ in full], [line for _, line in full]
        first, mark = first + len(lines) - 1, b""


def _parsed(line: bytes) -> Row | Fault:
    text = line.decode("utf-8", "surrogateescape").strip(_BLANKS)
    try:
        row, end = _decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        return Fault(f"no JSON object ({error.msg} at character {error.pos + 1}); write one object a line")
    except (ValueError, RecursionError):
        return Fault("a number or a nesting is too long; correct the line")
    if not isinstance(row, dict):
        return Fault("no JSON object; write one object a line")
    if len(row) > MOST_COLUMNS:
        return Fault(f"{len(row)} keys, the most is {MOST_COLUMNS}; leave out what is not needed")
    return row


def _kept(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    try:
        return json_text(value)
    except CellError as error:
        return Fault(str(error))
