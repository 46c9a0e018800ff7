"""A Parquet manifest: only the columns that are needed, a few thousand rows at a time.

What a file asks for is looked up in its headers first (see pages.py), so that no file, however small, takes
more memory than a run has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from specvlm_cli.console.safe_text import short
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.columns import MOST_COLUMNS, find_columns, refuse_missing, unused_times
from specvlm_cli.inputs.options import InputOptions
from specvlm_cli.inputs.pages import Leaf, PagesError, batch_rows, check_footer
from specvlm_cli.inputs.rows import NONE, Cells, ManifestRows
from specvlm_cli.inputs.values import CellError, Fault, json_text, plain_number

_BUFFER_BYTES = 1 << 20
_GROUP_ROWS = 1 << 17  # row groups are taken together until they have as many
_SLICE_BYTES = 16 << 20  # of cells that become Python objects at a time

# What pyarrow raises for a file that is damaged, or uses what it cannot read.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError)
_is = pa.types


class ParquetManifest:
    """Reads one file.

    Attributes:
        kept: Kept column -> its type.
        unused_times: Columns that seem to hold times, and are not read.
    """

    unit = "row"

    def __init__(self, path: bytes, shown: str, options: InputOptions) -> None:
        """Read and check the schema.

        Raises:
            UsageError: The file is no Parquet, asks for too much, or lacks a column of a usable type.
        """
        self._path = path
        self._shown = shown
        with self._opened() as (file, _):
            self._schema = file.schema_arrow
        refuse_missing(shown, self._schema.names, options)
        self._columns = find_columns(self._schema.names, options)
        self._check_types()
        self.kept: Mapping[str, str] = {name: _kind(self._type(name)) for name in self._columns.kept}
        self.unused_times: Sequence[str] = unused_times(self._schema.names, self._columns, options)

    def _type(self, name: str) -> pa.DataType:
        return self._schema.field(name).type

    def _check_types(self) -> None:
        columns = self._columns
        for flag, name, fits, wanted in (
            ("--path-column", columns.path, _is_bytes, "text"),
            ("--id-column", columns.id, _is_id, "text or whole numbers"),
            ("--start-column", columns.start, _is_time, "seconds, or text like 0:01:02.5"),
            ("--end-column", columns.end, _is_time, "seconds, or text like 0:01:02.5"),
            ("--prompt-column", columns.prompt, _is_prompt, "text or lists of text"),
        ):
            if name is not None and not fits(_plain(self._type(name))):
                raise UsageError(
                    f"{self._shown}: column {short(name, 60)!r} holds {short(str(self._type(name)), 60)}, not "
                    f"{wanted}; give another with {flag}, or convert it"
                )

    @contextmanager
    def _opened(self) -> Iterator[tuple[pq.ParquetFile, BinaryIO]]:
        """Open the file; whatever goes wrong while it is read becomes one line."""
        with open(self._path, "rb") as headers:
            try:
                check_footer(headers.fileno())
                with pa.OSFile(self._path) as source, _parquet(source) as file:
                    yield file, headers
            except PagesError as error:
                raise UsageError(f"{self._shown}: {error}") from error
            except _DAMAGE as error:
                reason = short(" ".join(str(error).split()) or type(error).__name__, 200)
                raise UsageError(
                    f"{self._shown}: not readable as Parquet ({reason}); write it again"
                ) from error

    def rows(self) -> Iterator[ManifestRows]:
        """Yield all rows, some at a time.

        Raises:
            UsageError: The file is damaged, asks for too much, or has changed.
        """
        first = 1
        with self._opened() as (file, headers):
            if not file.schema_arrow.equals(self._schema):
                raise UsageError(f"{self._shown} was changed while it was read; start again")
            for batch in self._batches(file, headers.fileno()):
                yield self._rows(batch, range(first, first + batch.num_rows))
                first += batch.num_rows

    def _batches(self, file: pq.ParquetFile, headers: int) -> Iterator[pa.RecordBatch]:
        names = self._columns.used()
        leaves = list(_leaves(file, names))
        for groups in _windows(file.metadata):
            rows = batch_rows(headers, [file.metadata.row_group(group) for group in groups], leaves)
            for batch in file.iter_batches(rows, row_groups=groups, columns=names):
                yield from _slices(batch)

    def _rows(self, batch: pa.RecordBatch, numbers: Sequence[int]) -> ManifestRows:
        columns = self._columns

        def cells(name: str | None, values: Callable[[pa.Array], Cells]) -> Cells:
            return NONE if name is None else values(batch.column(batch.schema.get_field_index(name)))

        return ManifestRows(
            numbers,
            cells(columns.path, _bytes),
            cells(columns.id, _texts),
            cells(columns.start, _texts),
            cells(columns.end, _texts),
            cells(columns.prompt, _texts),
            zip(*(cells(name, _kept) for name in columns.kept), strict=True) if columns.kept else NONE,
        )


def _parquet(source: pa.NativeFile) -> pq.ParquetFile:
    file = pq.ParquetFile(
        source, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
    )
    if file.metadata.num_columns > MOST_COLUMNS:
        raise PagesError(
            f"{file.metadata.num_columns} columns, the most is {MOST_COLUMNS}; leave out what is not needed"
        )
    return file


def _windows(metadata: Any) -> Iterator[list[int]]:
    """Yield neighbouring row groups, together where they are small."""
    groups: list[int] = []
    rows = 0
    for index in range(metadata.num_row_groups):
        groups.append(index)
        rows += metadata.row_group(index).num_rows
        if rows >= _GROUP_ROWS:
            yield groups
            groups, rows = [], 0
    if groups:
        yield groups


def _leaves(file: pq.ParquetFile, names: Sequence[str]) -> Iterator[Leaf]:
    """Yield the stored columns that make up some named ones."""
    inside = tuple(f"{name}." for name in names)
    for index in range(file.metadata.num_columns):
        column = file.schema.column(index)
        if column.path in names or column.path.startswith(inside):
            text = column.physical_type == "BYTE_ARRAY"
            yield Leaf(index, 0 if text else column.length, text, column.max_repetition_level > 0)


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield a batch in pieces that are small enough to become Python objects."""
    rows = max(1, min(batch.num_rows, batch.num_rows * _SLICE_BYTES // max(batch.nbytes, 1)))
    for first in range(0, batch.num_rows, rows):
        piece = batch.slice(first, rows)
        if rows == 1 and piece.nbytes > 2 * _SLICE_BYTES:
            raise PagesError(
                f"one row holds {piece.nbytes} bytes, the most is {2 * _SLICE_BYTES}; shorten it"
            )
        yield piece


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values themselves, if they are in a dictionary."""
    return kind.value_type if _is.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(_is.is_string(kind) or _is.is_large_string(kind) or _is.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(
        _is.is_binary(kind)
        or _is.is_large_binary(kind)
        or _is.is_binary_view(kind)
        or _is.is_fixed_size_binary(kind)
    )


def _is_id(kind: pa.DataType) -> bool:
    return _is_bytes(kind) or bool(_is.is_integer(kind) or _is.is_null(kind))


def _is_time(kind: pa.DataType) -> bool:
    number = _is.is_integer(kind) or _is.is_floating(kind) or _is.is_decimal(kind)
    return _is_text(kind) or bool(number or _is.is_null(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        _is.is_list(kind)
        or _is.is_large_list(kind)
        or _is.is_fixed_size_list(kind)
        or _is.is_list_view(kind)
        or _is.is_large_list_view(kind)
    )


def _is_prompt(kind: pa.DataType) -> bool:
    return _is_text(_plain(kind.value_type) if _is_list(kind) else kind) or bool(_is.is_null(kind))


def _kind(kind: pa.DataType) -> str:
    """Return the type that a kept column has in a caption's row."""
    kind = _plain(kind)
    if _is.is_boolean(kind):
        return "bool"
    if _is.is_integer(kind) and not _is.is_uint64(kind):
        return "int64"
    return "float64" if _is.is_floating(kind) else "string"


def _bytes(array: pa.Array) -> list[bytes | None]:
    return array.cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]


def _texts(array: pa.Array) -> list[object]:
    """Return cells as they are; bytes in text that are not UTF-8 as lone surrogates."""
    if _is_bytes(_plain(array.type)):
        return [
            None if value is None else value.decode("utf-8", "surrogateescape") for value in _bytes(array)
        ]
    values = array.to_pylist()
    if _is.is_float16(_plain(array.type)):
        return [None if value is None else float(value) for value in values]
    return values  # type: ignore[no-any-return]


def _kept(array: pa.Array) -> list[object]:
    """Return cells as values that JSON has."""
    kind = _plain(array.type)
    name = _kind(kind)
    if name in ("bool", "int64"):
        return array.to_pylist()  # type: ignore[no-any-return]
    if name == "float64":
        return [plain_number(value) for value in array.to_pylist()]
    if _is_bytes(kind):
        return _texts(array)
    if _is.is_nested(kind):
        return [None if value is None else _as_json(value) for value in array.to_pylist()]
    return [None if value is None else str(value) for value in _spelled(array)]


def _as_json(value: object) -> str:
    try:
        return json_text(value)
    except CellError as error:
        return Fault(str(error))


def _spelled(array: pa.Array) -> list[object]:
    """Return dates, times and the like as Arrow spells them, where it does."""
    try:
        return array.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    except pa.ArrowNotImplementedError:
        return array.to_pylist()  # type: ignore[no-any-return]
