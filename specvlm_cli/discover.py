"""INPUT arguments to videos: a folder, a file or a glob in, items with stable ids out.

Nothing is opened here: whether a file really is a video is for the reader to say, and then the video gets its
row. Paths are bytes all the way, so that names which are not UTF-8 work.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import Item, item_id
from specvlm_cli.text import clean

EXTENSIONS = (
    "mp4",
    "m4v",
    "mov",
    "mkv",
    "webm",
    "avi",
    "flv",
    "wmv",
    "mpg",
    "mpeg",
    "ts",
    "mts",
    "m2ts",
    "3gp",
    "ogv",
)

_MANIFESTS = (b".parquet", b".csv", b".jsonl")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(slots=True)
class Found:
    """What the INPUT arguments name."""

    items: list[Item] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # folders that could not be listed, with the reason


def discover(
    inputs: Sequence[str], *, recursive: bool = True, extensions: Iterable[str] = EXTENSIONS
) -> Found:
    """Return the videos that `inputs` name, each once, in the order of the arguments and then by path.

    Raises:
        UsageError: An input is not there, or two different videos would get the same id.
    """
    found = Found()
    suffixes = tuple(b"." + os.fsencode(extension.lower().lstrip(".")) for extension in extensions)
    by_id: dict[str, Item] = {}
    by_path: set[bytes] = set()
    for given in inputs:
        for root, relative in _expand(given, recursive, suffixes, found.unreadable.append):
            item = Item(item_id(relative), os.path.join(root, relative))
            if item.path in by_path:
                continue
            _refuse_same_id(by_id.setdefault(item.id, item), item)
            by_path.add(item.path)
            found.items.append(item)
    return found


def _refuse_same_id(first: Item, second: Item) -> None:
    if first.path != second.path:
        raise UsageError(
            f"{_shown(first.path)} and {_shown(second.path)} have one path below their inputs, so one id; "
            "give the folder above both, or caption them into separate -o folders"
        )


def _expand(
    given: str, recursive: bool, suffixes: tuple[bytes, ...], unreadable: Callable[[str], None]
) -> Iterator[tuple[bytes, bytes]]:
    """Yield (root, path relative to it) of every video that one argument names."""
    path = os.fsencode(given)
    if os.path.isdir(path):
        root = os.path.realpath(path)
        names = _walk(root, recursive, suffixes, unreadable)
        return ((root, name) for name in names if name.lower().endswith(suffixes))
    if os.path.lexists(path):
        return iter([_single(path)])
    if glob.has_magic(path) and not _ADDRESS.match(given):
        return _matches(path, suffixes)
    raise UsageError(_why_missing(given))


def _why_missing(given: str) -> str:
    if _ADDRESS.match(given):
        return f"{clean(given)}: remote addresses are not read; download the video and give its path"
    return f"{clean(given) or repr(given)}: no such file or folder; give a video, a folder or a quoted glob"


def _single(path: bytes) -> tuple[bytes, bytes]:
    if path.lower().endswith(_MANIFESTS):
        raise UsageError(
            f"{_shown(path)}: manifests are not read by this version; give the videos or their folder"
        )
    folder, name = os.path.split(path)
    return os.path.realpath(folder or b"."), name


def _matches(pattern: bytes, suffixes: tuple[bytes, ...]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the videos that a glob matches; the root is the pattern's folder before its first wildcard."""
    base = _fixed_folder(pattern)
    root = os.path.realpath(base or b".")
    names = sorted(os.path.relpath(match, base or b".") for match in glob.glob(pattern, recursive=True))
    videos = [name for name in names if name.lower().endswith(suffixes)]
    if not videos:
        what = f"matches {len(names)} files, none with a video extension" if names else "matches nothing"
        raise UsageError(f"{_shown(pattern)}: {what}; check the pattern, or give --extensions")
    return ((root, name) for name in videos)


def _fixed_folder(pattern: bytes) -> bytes:
    head, _ = os.path.split(pattern)
    while glob.has_magic(head):
        head, _ = os.path.split(head)
    return head


def _walk(
    root: bytes, recursive: bool, suffixes: tuple[bytes, ...], unreadable: Callable[[str], None]
) -> Iterator[bytes]:
    """Yield every file below `root`, relative to it, by name; hidden names are left out.

    Links to folders are followed; a folder that was seen already is not entered again, so a link cannot loop.
    What cannot even be looked at is a video that will fail where its name says so, else it is left out.
    """
    seen = {_identity(root)}
    folders = [b""]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            unreadable(f"{_shown(os.path.join(root, folder))}: {error.strerror}")
            continue
        inner = []
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            name = os.path.join(folder, entry.name)
            try:
                identity = _identity(entry.path) if entry.is_dir() else None
            except OSError as error:
                if name.lower().endswith(suffixes):
                    yield name
                else:
                    unreadable(f"{_shown(entry.path)}: {error.strerror}")
                continue
            if identity is None:
                yield name
            elif recursive and identity not in seen:
                seen.add(identity)
                inner.append(name)
        folders.extend(reversed(inner))


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _shown(path: bytes) -> str:
    return clean(os.fsdecode(path))
