"""Folders, files and globs: which videos they name. Knows names only, and opens no file.

Paths are bytes all the way, so that names which are not UTF-8 work.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import Item, item_id
from specvlm_cli.inputs.options import InputReport


def suffixes_of(extensions: Iterable[str]) -> tuple[bytes, ...]:
    """Return the ends of names that count as videos, in small letters."""
    return tuple(b"." + os.fsencode(extension.lower().lstrip(".")) for extension in extensions)


class Files:
    """Videos below one root that are known by name: a single file, or what a glob matched."""

    def __init__(self, folder: bytes, names: Iterable[bytes]) -> None:
        """`folder`: the root, as it was given; empty: the current folder."""
        self._given = folder
        self._root = os.path.realpath(folder or b".")
        self._names = names

    def items(self, report: InputReport) -> Iterator[Item]:
        return (_item(self._root, self._given, name) for name in self._names)


def single(path: bytes) -> Files:
    """Return one file given by name; its folder is the root, and it is tried whatever it is called."""
    folder, name = os.path.split(path)
    return Files(folder, [name])


def matches(pattern: bytes, suffixes: tuple[bytes, ...]) -> Files:
    """Return the videos that a glob matches; the root is the pattern's folder before its first wildcard.

    Raises:
        UsageError: There are none.
    """
    base = _fixed_folder(pattern)
    names = sorted(os.path.relpath(match, base or b".") for match in glob.glob(pattern, recursive=True))
    videos = [name for name in names if name.lower().endswith(suffixes)]
    if not videos:
        what = f"matches {len(names)} files, none with a video extension" if names else "matches nothing"
        raise UsageError(
            f"{shown(pattern)}: {what}; check the pattern, or give --extensions, or manifests by name"
        )
    return Files(base, videos)


def _item(root: bytes, given: bytes, name: bytes) -> Item:
    """Return a video below a root; `given`: the root as it was given."""
    return Item(item_id(name), os.path.join(root, name), input_path=os.path.join(given, name))


def _fixed_folder(pattern: bytes) -> bytes:
    head, _ = os.path.split(pattern)
    while glob.has_magic(head):
        head, _ = os.path.split(head)
    return head


class Folder:
    """The videos below a folder, in the order of their names, each folder's files before its folders."""

    def __init__(self, path: bytes, recursive: bool, suffixes: tuple[bytes, ...]) -> None:
        self._given = path
        self._root = os.path.realpath(path)
        self._recursive = recursive
        self._suffixes = suffixes

    def items(self, report: InputReport) -> Iterator[Item]:
        """Yield every video; hidden names are left out.

        Links to folders are followed; a folder that was seen already is not entered again, so a link cannot
        loop. What cannot even be looked at is a video that will fail where its name says so, else it is
        reported.
        """
        seen: set[tuple[int, int]] = set()
        folders = list(self._new(b"", [b""], seen, report.add_unreadable))
        while folders:
            folder = folders.pop()
            videos, inner = self._listed(folder, report.add_unreadable)
            for name in videos:
                yield _item(self._root, self._given, os.path.join(folder, name))
            if self._recursive:
                folders.extend(reversed(list(self._new(folder, inner, seen, report.add_unreadable))))

    def _listed(self, folder: bytes, unreadable: Callable[[str], None]) -> tuple[list[bytes], list[bytes]]:
        """Return the names of videos and of folders in one folder."""
        path = os.path.join(self._root, folder)
        videos: list[bytes] = []
        folders: list[bytes] = []
        doubtful: list[tuple[bytes, OSError]] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    try:
                        kind = folders if entry.is_dir() else videos
                    except OSError as error:
                        kind = videos
                        doubtful.append((entry.name, error))
                    if kind is folders or entry.name.lower().endswith(self._suffixes):
                        kind.append(entry.name)
        except OSError as error:
            unreadable(f"{shown(path)}: {error.strerror}")
            return [], []
        self._report(path, sorted(doubtful, key=lambda one: one[0]), unreadable)
        return sorted(videos), sorted(folders)

    def _report(
        self, path: bytes, doubtful: list[tuple[bytes, OSError]], unreadable: Callable[[str], None]
    ) -> None:
        for name, error in doubtful:
            if not name.lower().endswith(self._suffixes):
                unreadable(f"{shown(os.path.join(path, name))}: {error.strerror}")

    def _new(
        self, folder: bytes, inner: list[bytes], seen: set[tuple[int, int]], unreadable: Callable[[str], None]
    ) -> Iterator[bytes]:
        """Yield the folders that were not seen before, relative to the root."""
        for name in inner:
            relative = os.path.join(folder, name)
            path = os.path.join(self._root, relative)
            try:
                identity = _identity(path)
            except OSError as error:
                unreadable(f"{shown(path)}: {error.strerror}")
                continue
            if identity not in seen:
                seen.add(identity)
                yield relative


def parts_in(folder: bytes, suffixes: tuple[bytes, ...]) -> list[bytes]:
    """Return the Parquet files of a folder that are a manifest in parts: there is no video next to them."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(b"."))
    except OSError:  # whoever lists it for videos will say so
        return []
    if any(name.lower().endswith(suffixes) for name in names):
        return []
    return [os.path.join(folder, name) for name in names if name.lower().endswith(b".parquet")]


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def shown(path: bytes) -> str:
    """Return a path as a message may show it."""
    return clean(os.fsdecode(path))
