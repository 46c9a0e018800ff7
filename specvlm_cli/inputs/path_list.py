"""Lists of paths, on standard input or in a file: one a line, or with NULs between, as `find -print0` writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import Item
from specvlm_cli.inputs.lines import LongLineError, pieces
from specvlm_cli.inputs.options import InputReport
from specvlm_cli.inputs.rows import ItemMaker, ManifestRows, Root
from specvlm_cli.inputs.values import MOST_PATH_BYTES

_MOST_LINE_BYTES = 1 << 20
_MARK = b"\xef\xbb\xbf"  # the byte order mark with which Windows editors begin a file


class PathStream:
    """Reads paths from a stream, once; relative ones are relative to the current folder."""

    def __init__(self, stream: BinaryIO, name: str = "standard input", root: bytes = b".") -> None:
        """`name`: of the stream, in messages. `root`: the folder that relative paths are relative to."""
        self._stream = stream
        self._name = name
        self._maker = ItemMaker(os.fsencode(name), "line", Root(root))

    def items(self, report: InputReport) -> Iterator[Item]:
        """Yield a video for each line that is not empty.

        Raises:
            UsageError: A line is longer than any list of paths has, or the stream cannot be read.
        """
        try:
            for rows in self._rows():
                yield from self._maker.items(rows)
        except LongLineError as error:
            raise UsageError(
                f"{self._name} line {error.line} is longer than {_MOST_LINE_BYTES} bytes; give paths, one a line"
            ) from error
        except OSError as error:
            raise UsageError(f"{self._name}: {error.strerror}; give paths, one a line") from error

    def _rows(self) -> Iterator[ManifestRows]:
        begin = self._begin()
        separator = b"\0" if b"\0" in begin else b"\n"
        first = 1
        for piece in pieces(self._stream, _MOST_LINE_BYTES, separator, begin):
            lines = self._lines(piece, separator)
            full = [(number, line) for number, line in enumerate(lines, first) if line]
            yield ManifestRows([number for number, _ in full], [line for _, line in full])
            first += len(lines) - 1

    def _lines(self, piece: bytes, separator: bytes) -> list[bytes]:
        return piece.split(separator)

    def _begin(self) -> bytes:
        """Return the beginning, as long as a path may be: by then a NUL would have been seen."""
        begin = b""
        while len(begin) <= MOST_PATH_BYTES and (more := self._stream.read(MOST_PATH_BYTES + 1 - len(begin))):
            begin += more
        return begin


class PathList(PathStream):
    """Reads a text file of paths, once; relative ones are relative to its folder."""

    def __init__(self, path: bytes, name: str) -> None:
        """Open it.

        Raises:
            OSError: It cannot be read.
        """
        super().__init__(open(path, "rb"), name, os.path.dirname(path) or b".")  # noqa: SIM115  until it is read

    def items(self, report: InputReport) -> Iterator[Item]:
        with self._stream:
            yield from super().items(report)

    def _lines(self, piece: bytes, separator: bytes) -> list[bytes]:
        return [line.removesuffix(b"\r") for line in piece.split(separator)]

    def _begin(self) -> bytes:
        return super()._begin().removeprefix(_MARK)
