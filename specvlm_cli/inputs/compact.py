"""The compact Thrift encoding, as far as the headers of Parquet need it. Knows no Parquet.

Numbers are read, text is passed over, and what a reader would have to allocate is counted, so that headers
which ask for too much are found out before one that trusts them reads them.
"""

from __future__ import annotations

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_DEEPEST = 32
_MOST_BITS = 70

Struct = dict[int, Any]  # field number -> number, Struct, or how many elements a list has


class CompactError(ValueError):
    """These bytes are no Thrift structure."""


class CutError(CompactError):
    """The bytes end before the structure does."""


class CompactReader:
    """Reads one structure.

    Attributes:
        at: Position behind what was read.
        elements: How many list elements were seen, by how many lists and structures lie around them.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0
        self.elements: dict[int, int] = {}

    def struct(self, depth: int = 0) -> Struct:
        """Read a structure.

        Raises:
            CutError: It continues past the end of the data.
            CompactError: It is none.
        """
        if depth > _DEEPEST:
            raise CompactError("nested too deeply")
        fields: Struct = {}
        number = 0
        while (head := self._byte()) & 0x0F:
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 0x0F, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return int(kind == _TRUE)
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind in (_BYTE, _DOUBLE, _BINARY):
            return self._skip(1 if kind == _BYTE else 8 if kind == _DOUBLE else self._unsigned())
        raise CompactError(f"a field of type {kind}")

    def _list(self, depth: int) -> int:
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._unsigned()
        self.elements[depth] = self.elements.get(depth, 0) + count
        kind = head & 0x0F
        for _ in range(count):
            # In a list, a truth value takes a byte of its own.
            self._value(_BYTE if kind in (_TRUE, _FALSE) else kind, depth)
        return count

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self._data):
            raise CutError("it ends too early")

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > _MOST_BITS:
                raise CompactError("a number without end")
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
