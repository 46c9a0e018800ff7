"""INPUT arguments to items: folders, files, globs, stdin and manifests in, one item for each video out.

What can be checked before the first item is checked at once. Items are made as they are asked for, and none
is held: the same video may come twice.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO, Protocol

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.inputs.columns import asked_columns, row_names
from specvlm_cli.inputs.csv_manifest import CsvManifest
from specvlm_cli.inputs.folders import Folder, matches, parts_in, shown, single, suffixes_of
from specvlm_cli.inputs.item import Item
from specvlm_cli.inputs.jsonl_manifest import JsonlManifest
from specvlm_cli.inputs.options import InputOptions, InputReport
from specvlm_cli.inputs.path_list import PathList, PathStream
from specvlm_cli.inputs.rows import ItemMaker, ManifestRows, Root, refused_address
from specvlm_cli.inputs.values import is_address

STDIN = "-"

_MANIFESTS = (b".parquet", b".csv", b".jsonl")
_LIST = b".txt"
_NO_MANIFESTS = (b".tsv", b".json", b".ndjson", b".arrow", b".feather", b".xlsx")
_PACKED = re.compile(rb"\.(parquet|csv|jsonl|json|tsv|ndjson)\.(gz|bz2|xz|zst|lz4|zip|Z)$", re.IGNORECASE)
_DEFAULT = InputOptions()


class InputSource(Protocol):
    """What one argument names."""

    def items(self, report: InputReport) -> Iterator[Item]:
        """Yield its videos, once."""


class RowReader(Protocol):
    """One kind of manifest. Making one checks what can be checked from the file's beginning."""

    unit: str  # what a row is called in messages
    kept: Mapping[str, str]  # kept column -> bool, int64, float64 or string
    unused_times: Sequence[str]  # columns that seem to hold times, and are not read

    def rows(self) -> Iterator[ManifestRows]:
        """Yield all rows, some at a time."""


class Manifest:
    """The videos that a manifest names; its folder is the root."""

    def __init__(self, path: bytes, options: InputOptions, names: Mapping[str, str]) -> None:
        """Open and check it; `names` are those that kept columns have in a caption's row.

        Raises:
            UsageError: It is not readable, or lacks a column that is needed.
        """
        self._reader = _reader(path, options)
        folder, name = os.path.split(path)
        self.kept = {names[column]: kind for column, kind in self._reader.kept.items()}
        self._maker = ItemMaker(name, self._reader.unit, Root(folder or b"."), tuple(self.kept))
        self.shown = shown(path)
        self.unused_times = self._reader.unused_times

    def items(self, report: InputReport) -> Iterator[Item]:
        try:
            for rows in self._reader.rows():
                report.rows += len(rows.numbers)
                yield from self._maker.items(rows)
        except OSError as error:
            raise _unreadable(self.shown, error) from error


def _reader(path: bytes, options: InputOptions) -> RowReader:
    name = shown(path)
    try:
        _require_file(path, name, "manifest")
        suffix = os.path.splitext(path)[1].lower()
        if suffix == b".csv":
            return CsvManifest(path, name, options)
        if suffix == b".jsonl":
            return JsonlManifest(path, name, options)
        from specvlm_cli.inputs.parquet_manifest import ParquetManifest  # brings pyarrow

        return ParquetManifest(path, name, options)
    except OSError as error:
        raise _unreadable(name, error) from error


def _path_list(path: bytes) -> PathList:
    name = shown(path)
    try:
        _require_file(path, name, "list")
        return PathList(path, name)
    except OSError as error:
        raise _unreadable(name, error) from error


def _require_file(path: bytes, name: str, what: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{name} is no file; give a {what} that is one, or paths on standard input")


def _unreadable(name: str, error: OSError) -> UsageError:
    return UsageError(f"{name}: {clean(error.strerror or str(error))}; give a manifest that can be read")


class Inputs:
    """The videos that INPUT arguments name.

    Attributes:
        kept: Column that passes through from manifests, by its name in a caption's row -> `bool`, `int64`, `float64`
            or `string`.
        renamed: Column of a manifest -> its name in a caption's row, where that is another.
        report: What was seen besides the videos; filled while they are read.
    """

    def __init__(
        self, given: Sequence[str], options: InputOptions = _DEFAULT, stdin: BinaryIO | None = None
    ) -> None:
        """Check what can be checked before the first video.

        Args:
            given: The arguments.
            options: How they are read.
            stdin: What `-` reads; None: standard input.

        Raises:
            UsageError: An argument names nothing, or a manifest cannot be used.
        """
        self._options = options
        self._suffixes = suffixes_of(options.extensions)
        self._stdin = stdin
        self.report = InputReport()
        self._names = row_names(options)
        self.renamed = {column: name for column, name in self._names.items() if name != column}
        if given.count(STDIN) > 1:
            raise UsageError(f"{STDIN} was given {given.count(STDIN)} times; standard input is read once")
        sources = [(one, self._sources_of(one)) for one in given]
        self._sources: list[tuple[str, Sequence[InputSource]]] | None = sources
        manifests = [source for _, some in sources for source in some if isinstance(source, Manifest)]
        _refuse_without_manifest(options, manifests)
        self.kept: Mapping[str, str] = _one_type(manifests)
        self.report.unused_times = {
            manifest.shown: manifest.unused_times for manifest in manifests if manifest.unused_times
        }

    def _sources_of(self, given: str) -> Sequence[InputSource]:
        path = os.fsencode(given)
        if given == STDIN:
            return [PathStream(self._stdin or _standard_input())]
        if os.path.isdir(path):
            if parts := parts_in(path, self._suffixes):
                return [Manifest(part, self._options, self._names) for part in parts]
            return [Folder(path, self._options.recursive, self._suffixes)]
        if os.path.lexists(path):
            return [self._file(path)]
        if is_address(path):
            raise UsageError(refused_address(given))
        if glob.has_magic(path):
            if path.lower().endswith(b".parquet") and (found := sorted(glob.glob(path, recursive=True))):
                return [Manifest(one, self._options, self._names) for one in found]
            return [matches(path, self._suffixes)]
        raise UsageError(
            f"{clean(given) or repr(given)}: no such file or folder; give a video, a folder, a manifest or a "
            "quoted glob"
        )

    def _file(self, path: bytes) -> InputSource:
        if path.lower().endswith(_MANIFESTS):
            return Manifest(path, self._options, self._names)
        if path.lower().endswith(_LIST):
            return _path_list(path)
        if _PACKED.search(path):
            raise UsageError(
                f"{shown(path)}: packed manifests are not read; unpack it, or write it as .parquet"
            )
        if path.lower().endswith(_NO_MANIFESTS):
            raise UsageError(f"{shown(path)}: no manifest that is read; give it as .parquet, .csv or .jsonl")
        return single(path)

    def __iter__(self) -> Iterator[Item]:
        """Yield every video, in the order of the arguments; once.

        Raises:
            UsageError: A manifest turns out to be damaged further on.
        """
        assert self._sources is not None, "inputs are read once"
        sources, self._sources = self._sources, None
        items: Iterator[Item] = chain.from_iterable(self._items(*one) for one in sources)
        if self._options.shard.count > 1:
            items = self._of_shard(items)
        return self._old_enough(items) if self._options.min_age_s > 0 else items

    def _items(self, given: str, sources: Sequence[InputSource]) -> Iterator[Item]:
        """Yield the videos of one argument; note it where it has none. What a pipe brings may well be nothing."""
        item, unreadable = None, len(self.report.unreadable)
        for source in sources:
            for item in source.items(self.report):
                yield item
        if item is None and given != STDIN and len(self.report.unreadable) == unreadable:
            self.report.empty.append(clean(given))

    def _of_shard(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if self._options.shard.holds(item.id):
                yield item
            else:
                self.report.other_shards += 1

    def _old_enough(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if item.problem is None and self._is_young(item.path):
                self.report.too_young += 1
            else:
                yield item

    def _is_young(self, path: bytes) -> bool:
        try:
            age_s = time.time() - os.stat(path).st_mtime
            return (
                abs(age_s) < self._options.min_age_s
            )  # another machine's clock may be ahead, but not for ever
        except (OSError, ValueError):
            return False  # whoever opens it will say what is wrong


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise UsageError(f"{STDIN}: standard input is closed; give paths there, or other inputs")
    return sys.stdin.buffer


def _refuse_without_manifest(options: InputOptions, manifests: Sequence[Manifest]) -> None:
    asked = asked_columns(options)
    if asked and not manifests:
        name, flag = next(iter(asked.items()))
        raise UsageError(
            Flag(flag.removeprefix("--"), name), "has no manifest to go with", fix="give one, or leave it out"
        )


def _one_type(manifests: Sequence[Manifest]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for manifest in manifests:
        for name, kind in manifest.kept.items():
            if kinds.setdefault(name, kind) != kind:
                raise UsageError(
                    Flag("keep_columns", name),
                    f"is {kind} in {manifest.shown} and {kinds[name]} in another manifest",
                    fix="give them one type, or caption them into separate -o folders",
                )
    return kinds
