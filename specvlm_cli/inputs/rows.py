"""Rows of a manifest, or lines of stdin, to items: one for every row, usable or not. Knows no file format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TypeVar

from specvlm_cli.console.safe_text import clean, short, storable
from specvlm_cli.inputs.item import Item, item_id
from specvlm_cli.inputs.values import (
    MOST_CELL_BYTES,
    MOST_PATH_BYTES,
    CellError,
    Fault,
    is_address,
    json_text,
    own_id,
    path_of,
    prompts_of,
    segment,
)

T = TypeVar("T")

Cells = Iterable[object]
NONE: Cells = repeat(None)  # a column that a manifest does not have


@dataclass(frozen=True, slots=True)
class ManifestRows:
    """Some rows, column by column."""

    numbers: Sequence[int]  # of rows or lines, from 1, as messages name them
    paths: Cells  # text, bytes, None, or why the row cannot be read (Fault)
    ids: Cells = NONE
    starts: Cells = NONE
    ends: Cells = NONE
    prompts: Cells = NONE
    kept: Cells = NONE  # each a tuple: values that JSON has, or Faults


class Root:
    """A folder that paths are relative to."""

    def __init__(self, folder: bytes) -> None:
        self._folder = os.path.realpath(folder)
        self._inside = _with_slash(self._folder)
        self._given = _with_slash(os.path.abspath(folder))

    def place(self, path: bytes) -> tuple[bytes, bytes]:
        """Return what a path's id is made of, and the absolute path.

        The first is the path below the folder; of a path that leads out of it, the absolute path without its
        first slash.
        """
        if not (path.startswith((b"/", b".")) or b"/." in path or b"//" in path or path.endswith(b"/")):
            return path, self._inside + path
        absolute = b"/" + os.path.normpath(os.path.join(self._folder, path)).lstrip(b"/")
        if absolute.startswith(self._given):  # the folder's own name may lead through links
            absolute = self._inside + absolute[len(self._given) :]
        if absolute.startswith(self._inside):
            return absolute[len(self._inside) :], absolute
        return absolute[1:], absolute


def _with_slash(folder: bytes) -> bytes:
    return folder if folder.endswith(b"/") else folder + b"/"


class ItemMaker:
    """Makes items of the rows of one manifest."""

    def __init__(self, name: bytes, unit: str, root: Root, kept: Sequence[str] = ()) -> None:
        """Take the manifest's name, what its rows are called in messages, and the columns that are kept."""
        self._name = name
        self._unit = unit
        self._root = root
        self._kept = tuple(kept)

    def items(self, rows: ManifestRows) -> Iterator[Item]:
        """Yield one item for every row."""
        columns = zip(
            rows.numbers, rows.paths, rows.ids, rows.starts, rows.ends, rows.prompts, rows.kept, strict=False
        )
        for number, path, own, start, end, prompt, kept in columns:
            try:
                yield self._item(path, own, start, end, prompt, kept)
            except CellError as error:
                yield self._problem(number, path, own, start, end, kept, str(error))

    def _item(
        self, path: object, own: object, start: object, end: object, prompt: object, kept: object
    ) -> Item:
        written = _local(path_of(path))
        relative, absolute = self._root.place(written)
        start_s, end_s = (None, None) if start is None and end is None else segment(start, end)
        identity = None if own is None else own_id(own)
        return Item(
            identity or item_id(relative, start_s, end_s),
            absolute,
            start_s,
            end_s,
            None if prompt is None else prompts_of(prompt),
            None if kept is None else self._kept_text(kept),
            None,
            identity is not None,
            written,
        )

    def _kept_text(self, values: object) -> str:
        assert isinstance(values, tuple)
        for value in values:
            if isinstance(value, Fault):
                raise CellError(value)
        text = json_text(dict(zip(self._kept, values, strict=True)))
        if len(text) > MOST_CELL_BYTES // 4 and len(text.encode()) > MOST_CELL_BYTES:
            raise CellError(f"its kept columns hold more than {MOST_CELL_BYTES} bytes; keep fewer")
        return text

    def _problem(
        self, number: int, path: object, own: object, start: object, end: object, kept: object, reason: str
    ) -> Item:
        """Return the item of a row that cannot be used, with what of it is usable."""
        given = _usable(path_of, path)
        local = given if given is not None and not is_address(given) else None
        relative, absolute = (given, b"") if local is None else self._root.place(local)
        times = _usable(segment, start, end)
        identity = _usable(own_id, own)
        stable = identity
        if stable is None and relative is not None and times is not None and own in (None, ""):
            stable = item_id(relative, *times)
        return Item(
            stable or self._row_id(number),
            absolute,
            *(times or (None, None)),
            kept=None if kept is None else _usable(self._kept_text, kept),
            problem=f"{clean(os.fsdecode(self._name))} {self._unit} {number}: {reason}",
            own_id=identity is not None,
            input_path=given if given is not None else _as_written(path),
        )

    def _row_id(self, number: int) -> str:
        """Return an id for a row that has nothing to make one of but its place."""
        return hashlib.sha1(b"row\0%b\0%d" % (self._name, number), usedforsecurity=False).hexdigest()


def _local(path: bytes) -> bytes:
    if b"://" in path and is_address(path):
        raise CellError(refused_address(os.fsdecode(path)))
    return path


def refused_address(address: str) -> str:
    """Return the line that says why an address is not read."""
    return f"{short(address, 300)}: remote addresses are not read; download the video and give its path"


def _as_written(path: object) -> bytes | None:
    """Return what stands where a path should, as far as it is text; None: nothing does."""
    if path is None or isinstance(path, Fault):
        return None
    if isinstance(path, bytes):
        return path[:MOST_PATH_BYTES]
    return storable(str(path)[:MOST_PATH_BYTES]).encode()


def _usable(meaning: Callable[..., T], *cells: object) -> T | None:
    try:
        return meaning(*cells)
    except CellError:
        return None
