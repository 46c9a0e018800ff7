"""A CSV manifest, row by row. Everything in it is text; an empty cell is none."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import BinaryIO

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.columns import MOST_COLUMNS, find_columns, refuse_missing, unused_times
from specvlm_cli.inputs.lines import LongLineError, pieces
from specvlm_cli.inputs.options import InputOptions
from specvlm_cli.inputs.rows import NONE, Cells, ManifestRows
from specvlm_cli.inputs.values import MOST_CELL_BYTES, MOST_ROW_BYTES, Fault

_BATCH_ROWS = 4096
_BATCH_BYTES = 4 << 20
_MARK = "\ufeff"  # byte order mark, which spreadsheets write
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")


class CsvManifest:
    """Reads one file.

    Attributes:
        kept: Kept column -> its type.
        unused_times: Columns that seem to hold times, and are not read.
    """

    unit = "line"

    def __init__(self, path: bytes, shown: str, options: InputOptions) -> None:
        """Read and check the header.

        Raises:
            UsageError: There is none, or it lacks a column.
        """
        self._path = path
        self._shown = shown
        with self._opened() as records:
            self._header = next(records, [])
        self._check_header()
        refuse_missing(shown, self._header, options)
        self._columns = find_columns(self._header, options)
        self.kept: Mapping[str, str] = dict.fromkeys(self._columns.kept, "string")
        self.unused_times: Sequence[str] = unused_times(self._header, self._columns, options)

    def _check_header(self) -> None:
        if not self._header:
            raise UsageError(f"{self._shown}: no header in its first line; name the columns there")
        if len(self._header) > MOST_COLUMNS:
            raise UsageError(
                f"{self._shown}: {len(self._header)} columns, the most is {MOST_COLUMNS}; leave out what is "
                "not needed"
            )

    def rows(self) -> Iterator[ManifestRows]:
        """Yield all rows, some at a time.

        Raises:
            UsageError: From some line on the file is no CSV, or it has changed.
        """
        with self._opened() as records:
            if next(records, []) != self._header:
                raise UsageError(f"{self._shown} was changed while it was read; start again")
            yield from self._batches(records)

    @contextmanager
    def _opened(self) -> Iterator[_Records]:
        """Open the file; whatever goes wrong while it is read becomes one line."""
        with open(self._path, "rb", buffering=0) as file:
            if file.read(2) in _WIDE_MARKS:
                raise UsageError(f"{self._shown} is UTF-16; save it as UTF-8")
            file.seek(0)
            records = _Records(file)
            try:
                yield records
            except csv.Error as error:
                raise self._broken(records.line, str(error)) from error
            except LongLineError as error:
                raise self._broken(error.line, f"longer than {MOST_ROW_BYTES} bytes") from error

    def _broken(self, line: int, reason: str) -> UsageError:
        return UsageError(f"{self._shown} line {line}: {clean(reason)}; fix the quotes and line ends there")

    def _batches(self, records: _Records) -> Iterator[ManifestRows]:
        batch: list[list[str]] = []
        lines: list[int] = []
        line = records.line + 1
        for record in records:
            if record:
                batch.append(record)
                lines.append(line)
            line = records.line + 1
            if len(batch) == _BATCH_ROWS or records.held_bytes > _BATCH_BYTES:
                yield self._rows(batch, lines)
                batch, lines = [], []
                records.held_bytes = 0
        yield self._rows(batch, lines)

    def _rows(self, batch: list[list[str]], lines: Sequence[int]) -> ManifestRows:
        columns = self._columns
        faults = self._square(batch)
        paths = self._cells(batch, columns.path)
        return ManifestRows(
            lines,
            [faults.get(index, path) for index, path in enumerate(paths)] if faults else paths,
            self._cells(batch, columns.id),
            self._cells(batch, columns.start),
            self._cells(batch, columns.end),
            self._cells(batch, columns.prompt),
            zip(*(self._kept_cells(batch, name) for name in columns.kept), strict=True)
            if columns.kept
            else NONE,
        )

    def _square(self, batch: list[list[str]]) -> dict[int, Fault]:
        """Empty the rows that have not as many cells as the header, and say so: place in the batch -> why."""
        width = len(self._header)
        faults = {}
        for index, record in enumerate(batch):
            if len(record) != width:
                faults[index] = Fault(f"{len(record)} cells, the header has {width}; quote cells with commas")
                batch[index] = [""] * width
        return faults

    def _kept_cells(self, batch: list[list[str]], name: str) -> list[object]:
        return [cell or None for cell in self._cells(batch, name)]

    def _cells(self, batch: list[list[str]], name: str | None) -> Cells:
        if name is None:
            return NONE
        index = self._header.index(name)
        return [record[index] for record in batch]


class _Records:
    """The records of a CSV file, of which none takes more memory than a row may.

    Attributes:
        held_bytes: How much was read since this was last set to 0.
    """

    def __init__(self, file: BinaryIO) -> None:
        csv.field_size_limit(MOST_CELL_BYTES)
        self.held_bytes = 0
        self._reader = csv.reader(self._lines(file), strict=True)

    def __iter__(self) -> Iterator[list[str]]:
        return self._reader

    def __next__(self) -> list[str]:
        return next(self._reader)

    @property
    def line(self) -> int:
        """Lines read so far."""
        return self._reader.line_num

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        mark = _MARK
        for piece in pieces(file, MOST_ROW_BYTES):
            self.held_bytes += len(piece)
            if self.held_bytes > _BATCH_BYTES + MOST_ROW_BYTES + len(piece):
                raise LongLineError(self.line)
            text = piece.decode("utf-8", "surrogateescape").removeprefix(mark)
            yield from StringIO(text, newline="\n")
            mark = ""
