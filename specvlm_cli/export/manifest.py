"""`_manifest.json`: what an export wrote, one file a line, and how an earlier export is recognised by it.

A folder counts as an earlier export only where it holds nothing but what its manifest lists, so that no foreign
files are ever taken for ours.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specvlm_cli.safe_files import UnsafeFileError, open_regular

NAME = "_manifest.json"
CARD = "README.md"
_SCHEMA = 1
_MARK, _FILES, _END = '"made_by": "specvlm export",\n', '"files": [\n', "],\n"
_HEAD = f'{{\n{_MARK}"schema": {_SCHEMA},\n"specvlm_version": %s,\n"format": %s,\n{_FILES}'


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of an export."""

    name: str  # relative to the manifest; bytes that are not UTF-8 as surrogate escapes
    size_bytes: int
    sha256: str | None = None  # None for a video
    rows: int | None = None
    link: str | None = None  # what a symbolic link points to, empty if unknown; None: it is none

    def as_json(self) -> dict[str, Any]:
        plain = {"name": self.name, "bytes": self.size_bytes, "sha256": self.sha256}
        plain |= {"rows": self.rows, "link": self.link}
        return {name: value for name, value in plain.items() if value is not None}


def described(root: Path, name: str, rows: int | None = None) -> ExportedFile:
    """Return the entry of a file that is finished."""
    with open_regular(root / name) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ExportedFile(name, file.tell(), digest, rows)


class ExportManifest:
    """Writes the manifest as files come to be; as a context it is closed with the counts at the end."""

    def __init__(self, root: Path, kind: str) -> None:
        from specvlm import __version__

        self.files = 0
        self.size_bytes = 0
        self.counts: dict[str, int] = {}
        self._file = (root / NAME).open("w", encoding="ascii", newline="\n")
        self._file.write(_HEAD % (json.dumps(__version__), json.dumps(kind)))

    def add(self, entry: ExportedFile) -> None:
        """List one more file."""
        self._file.write(",\n" * (self.files > 0) + json.dumps(entry.as_json()))
        self.files += 1
        self.size_bytes += entry.size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.write("\n" * (self.files > 0) + _END)
                self._file.write(f'"counts": {json.dumps(self.counts)}\n}}\n')


def _entries(folder: Path) -> Iterator[ExportedFile]:
    """Yield what the manifest of a folder lists.

    Raises:
        ValueError: There is no manifest of ours.
    """
    with open_regular(folder / NAME) as opened, TextIOWrapper(opened, encoding="ascii") as file:
        head = [file.readline() for _ in range(_HEAD.count("\n"))]
        if head[1] != _MARK or head[-1] != _FILES:
            raise ValueError("it was not written by specvlm export")
        for line in iter(file.readline, _END):
            if not line:
                raise ValueError("it is cut short")
            found = json.loads(line.rstrip(",\n"))
            yield ExportedFile(found["name"], found["bytes"], found.get("sha256"), link=found.get("link"))


def foreign(folder: Path) -> str | None:
    """Return why a folder is no earlier export that may be replaced; None: it is one.

    Raises:
        OSError: The folder cannot be read.
    """
    if not any(folder.iterdir()):
        return None
    listed = 1  # the manifest itself
    try:
        for entry in _entries(folder):
            state = _state(folder, entry)
            if state == "changed":
                return f"{entry.name} was changed since"
            listed += state == "same"
    except (FileNotFoundError, NotADirectoryError):
        return "it has no manifest of an export"
    except (ValueError, KeyError, TypeError, RecursionError, UnsafeFileError) as error:
        return f"its manifest is not readable ({error})"
    present = sum(len(files) + _links(Path(root), folders) for root, folders, files in os.walk(folder))
    return None if present == listed else f"{_first_unlisted(folder)} is not part of the export"


def _links(root: Path, folders: Sequence[str]) -> int:
    return sum((root / name).is_symlink() for name in folders)


def _state(folder: Path, entry: ExportedFile) -> str:
    """Say whether a listed file is the same, changed, or gone."""
    path = folder / entry.name
    if os.path.isabs(entry.name) or ".." in entry.name.split("/"):
        raise ValueError("it lists a file outside")
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "gone"
    if entry.link is not None:
        return "same" if path.is_symlink() else "changed"
    changed = path.is_symlink() or not path.is_file() or status.st_size != entry.size_bytes
    edited = entry.name == CARD and not changed and described(folder, CARD).sha256 != entry.sha256
    return "changed" if changed or edited else "same"


def _first_unlisted(folder: Path) -> str:
    listed = {NAME, *(entry.name for entry in _entries(folder))}
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files) + [one for one in folders if (Path(root) / one).is_symlink()]:
            relative = os.path.relpath(os.path.join(root, name), folder)
            if relative not in listed:
                return relative
    return "a file"


def foreign_file(path: Path, kind: str, known: Sequence[str]) -> str | None:
    """Return why a file is no earlier export that may be replaced; None: it is one, or it is empty."""
    if not path.is_file() or path.is_symlink():
        return "it is no plain file"
    if path.stat().st_size == 0:
        return None
    columns: list[str] = []
    with suppress(ValueError, OSError, RecursionError, UnsafeFileError, csv.Error):
        columns = _columns(path, kind)
    return None if columns and set(columns) <= set(known) else "it is not what specvlm export writes"


def _columns(path: Path, kind: str) -> list[str]:
    """Return the columns of a file, where it may be one of ours."""
    if kind == "parquet":
        return _parquet_columns(path)
    with open_regular(path) as opened, TextIOWrapper(opened, encoding="utf-8", newline="") as file:
        if kind == "csv":
            header = next(csv.reader([file.readline(100_000)]), [])
            return [name.removeprefix("'") for name in header]
        found = json.loads(file.readline(100_000_000))
        return list(found) if isinstance(found, dict) else []


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from specvlm_cli.export.columns import MARK

    try:
        schema = pq.read_schema(path.absolute())
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    return list(schema.names) if MARK in (schema.metadata or {}) else []
