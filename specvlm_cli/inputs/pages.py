"""How much memory a Parquet file asks for, found in its headers before anything of it is unpacked.

A file of a few hundred kilobytes can hold pages of gigabytes, a footer of a million columns, or a value of a
megabyte that thirty million rows refer to. It knows Parquet's headers; of the values it looks at the lengths
of those that rows share.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from specvlm_cli.inputs.compact import CompactError, CompactReader, CutError, Struct

MOST_FOOTER_BYTES = 32 << 20
MOST_FOOTER_MEMORY = 256 << 20
MOST_PAGE_BYTES = 128 << 20  # of all columns that are read at a time, unpacked
MOST_LIST_VALUES = 8 << 20  # of one column in one row group
BATCH_BYTES = 32 << 20
BATCH_ROWS = 8192

_MAGIC = b"PAR1"
_SMALL_FOOTER = 1 << 20  # which cannot take more memory than there may be
# What a reader allocates for a list element, by depth: row groups and columns' names, then column chunks.
_ELEMENT_BYTES = {1: 400, 3: 800}
_INNER_ELEMENT_BYTES = 64

_CODECS = {"LZ4": "lz4_raw"}  # what pyarrow calls otherwise than Parquet does
_LENGTH = struct.Struct("<I")  # before each text of a dictionary
_ENTRY_BYTES = 16  # of a dictionary, in addition to its text

_HEADER_SIZES = (1 << 10, 64 << 10, 4 << 20)  # how much is read for a page's header, until it is whole

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN_DICTIONARY, _DELTA_LENGTHS, _DELTA_TEXT, _RLE_DICTIONARY = 2, 6, 7, 8
_DELTAS = (_DELTA_LENGTHS, _DELTA_TEXT)  # whose lengths are unpacked for a whole page
_DELTA_ENTRY_BYTES = 8
# Kind of page -> which field has its details, and which of those is the encoding.
_DETAILS = {_DATA: (5, 2), _DICTIONARY: (7, 2), _DATA_V2: (8, 4)}
_FIXED_BYTES = 16  # most bytes of a value that is a number


class PagesError(ValueError):
    """The file asks for too much, or is damaged. The message says what, and how to fix it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one column of one row group asks for, by its pages' headers."""

    page_bytes: int = 0  # largest page, and its dictionary
    value_bytes: int = _FIXED_BYTES  # most that one value can take, or takes where each is stored
    values: int = 0  # also those inside of lists


@dataclass(frozen=True, slots=True)
class _Page:
    """What a page's header says."""

    kind: int
    size: int  # unpacked, in bytes
    packed: int  # in the file
    position: int  # in the file, behind the header
    values: int
    encoding: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """A column as Parquet stores it."""

    index: int  # its place in the file
    width: int  # bytes of a value of fixed width; 0: it has none
    text: bool  # its values are of any length
    listed: bool  # one row may hold many values


def check_footer(file: int) -> None:
    """Refuse a footer that no reader should be given.

    Raises:
        PagesError: It is missing, or would take too much memory.
    """
    size = os.fstat(file).st_size
    tail = os.pread(file, 8, max(size - 8, 0))
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != _MAGIC or not 0 < length <= size - 12:
        raise PagesError("no Parquet file, or one that is cut off; write it again")
    if length > MOST_FOOTER_BYTES or (
        length > _SMALL_FOOTER
        and _footer_memory(os.pread(file, length, size - 8 - length)) > MOST_FOOTER_MEMORY
    ):
        raise PagesError(f"its footer of {length} bytes is too large; write it with larger row groups")


def _footer_memory(footer: bytes) -> int:
    reader = CompactReader(footer)
    try:
        reader.struct()
    except CompactError as error:
        raise PagesError(f"its footer is damaged ({error}); write it again") from error
    return sum(
        count * _ELEMENT_BYTES.get(depth, _INNER_ELEMENT_BYTES) for depth, count in reader.elements.items()
    )


def batch_rows(file: int, groups: Iterable[Any], leaves: Iterable[Leaf]) -> int:
    """Return how many rows of some row groups may be read at a time.

    Args:
        file: Descriptor of the file.
        groups: The groups' metadata, as pyarrow gives them.
        leaves: The columns that are read.

    Raises:
        PagesError: Not even one row could be read in bounded memory.
    """
    leaves = list(leaves)
    return min((_group_rows(file, group, leaves) for group in groups), default=BATCH_ROWS)


def _group_rows(file: int, group: Any, leaves: list[Leaf]) -> int:
    page_bytes = row_bytes = 0
    for leaf in leaves:
        chunk = _survey(file, group.column(leaf.index), leaf)
        per_row = 1
        if leaf.listed:
            _refuse_long_lists(group.column(leaf.index), chunk)
            per_row = -(-chunk.values // max(group.num_rows, 1))
        page_bytes += chunk.page_bytes
        row_bytes += chunk.value_bytes * per_row
    if page_bytes > MOST_PAGE_BYTES:
        raise PagesError(
            f"its pages take {page_bytes >> 20} MiB at a time when unpacked, the most is "
            f"{MOST_PAGE_BYTES >> 20}; write it with smaller pages, or keep fewer columns"
        )
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))


def _refuse_long_lists(column: Any, chunk: Chunk) -> None:
    if chunk.values > MOST_LIST_VALUES:
        raise PagesError(
            f"column {column.path_in_schema} holds {chunk.values} values in the lists of one row group, "
            f"the most is {MOST_LIST_VALUES}; write it with smaller row groups"
        )


def _survey(file: int, column: Any, leaf: Leaf) -> Chunk:
    """Walk over the pages of one column chunk, from header to header."""
    largest = dictionary = shared = value_bytes = values = 0
    for page in _pages(file, column):
        if page.kind == _DICTIONARY:
            dictionary = page.size + _ENTRY_BYTES * page.values
            shared = _longest(file, column, page) if leaf.text else 0
        else:
            values += page.values
            lengths = _DELTA_ENTRY_BYTES * page.values if page.encoding in _DELTAS else 0
            largest = max(largest, page.size + lengths)
            value_bytes = max(value_bytes, _value_bytes(page, shared))
    if not leaf.text:
        value_bytes = max(leaf.width, _FIXED_BYTES)
    return Chunk(largest + dictionary, value_bytes, values)


def _value_bytes(page: _Page, shared: int) -> int:
    """Return how much one value of a page takes: each stored, or any of them as large as what they share."""
    if page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
        return shared
    if page.encoding == _DELTA_TEXT:
        return page.size
    return -(-page.size // max(page.values, 1))


def _pages(file: int, column: Any) -> Iterator[_Page]:
    """Yield the dictionary and the pages of values of one column chunk."""
    position = column.data_page_offset
    if column.dictionary_page_offset and column.dictionary_page_offset < position:
        position = column.dictionary_page_offset
    end = position + column.total_compressed_size
    values = 0
    while values < column.num_values and position < end:
        header, length = _page_header(file, position)
        kind, size, packed = (header.get(number, -1) for number in (1, 2, 3))
        if not (_is_size(size) and _is_size(packed)):
            raise PagesError("a page has no size; the file is damaged, write it again")
        if _is_size(kind) and kind in _DETAILS:
            number, encoding = _DETAILS[kind]
            inner = header.get(number)
            page = _Page(kind, size, packed, position + length, _number(inner, 1), _number(inner, encoding))
            values += 0 if kind == _DICTIONARY else page.values
            yield page
        position += length + packed


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _longest(file: int, column: Any, page: _Page) -> int:
    """Return the length of the longest text in a dictionary, so that small ones need no small batches."""
    if max(page.size, page.packed) > MOST_PAGE_BYTES:
        return page.size
    data = os.pread(file, page.packed, page.position)
    if column.compression != "UNCOMPRESSED":
        try:
            codec = _CODECS.get(column.compression, column.compression.lower())
            data = pa.decompress(data, page.size, codec, asbytes=True)
        except (pa.ArrowException, OSError, ValueError):  # another LZ4, or damage that its reader will find
            return page.size
    longest = at = 0
    while at + 4 <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        longest = max(longest, length)
        at += 4 + length
    return min(longest, page.size)


def _number(struct: Any, field: int) -> int:
    value = struct.get(field) if isinstance(struct, dict) else None
    if not isinstance(value, int) or value < 0:
        raise PagesError("a page's header is damaged; write the file again")
    return value


def _page_header(file: int, position: int) -> tuple[Struct, int]:
    """Return the header at a position, and its length."""
    for size in _HEADER_SIZES:
        data = os.pread(file, size, position)
        reader = CompactReader(data)
        try:
            return reader.struct(), reader.at
        except CutError as error:
            if len(data) < size or size == _HEADER_SIZES[-1]:
                raise PagesError("a page's header is cut off; write the file again") from error
        except CompactError as error:
            raise PagesError(f"a page's header is damaged ({error}); write the file again") from error
    raise AssertionError("the last size ends the loop")
