"""All of it or nothing: an export is written next to its destination and gets its name when it is on disk.

What was there before is replaced only where the caller says so and it is an earlier export; it is looked at again
after it was put aside, so that a file that came into it meanwhile is never lost. A process that dies leaves a
hidden folder, which the next export to the same destination removes. It knows files, and no format.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from specvlm.durable import sync
from specvlm.files import remove
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import BusyError, UsageError
from specvlm_cli.safe_files import UnsafeFileError, require_folder

_MOST_SYNCED = 200  # files that are synced one by one; more are left to one sync of everything
_EXCHANGE = 2  # RENAME_EXCHANGE
_AT_FDCWD = -100

Refusal = Callable[[Path], str | None]  # why what is at a path may not be replaced; None: it may


@dataclass(frozen=True, slots=True)
class Staging:
    """Where an export is made.

    Attributes:
        work: Folder for scratch files; removed at the end.
        data: The file or folder that gets the destination's name; not there yet.
    """

    work: Path
    data: Path


@contextmanager
def staged(destination: Path, refusal: Refusal | None) -> Iterator[Staging]:
    """Have a block make `data`, and give it the destination's name once the block is done.

    Args:
        destination: Where the export goes.
        refusal: Judges what is there already; None: nothing may be there.

    Raises:
        UsageError: Something is there that may not be replaced.
        BusyError: Another process is exporting to the same place.
        OSError: The disk is full, or cannot be written.
    """
    _check(destination, refusal)
    destination.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:16]
    folder = destination.parent / f".specvlm-export-{name}"
    with _held(folder):
        try:
            staging = Staging(folder / "work", folder / "data")
            staging.work.mkdir()
            yield staging
            _sync_all(staging.data)
            _publish(staging.data, destination, refusal)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check(destination: Path, refusal: Refusal | None) -> None:
    if not os.path.lexists(destination):
        return
    name = clean(str(destination))
    if refusal is None:
        raise UsageError(
            f"{name}: already exists; choose another DEST, or replace an export with --overwrite"
        )
    if reason := refusal(destination):
        raise UsageError(
            f"{name}: --overwrite replaces an earlier export alone, but {clean(reason)}; give another DEST"
        )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the hidden folder, empty; what a process that died left in it is removed."""
    require_folder(folder)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise UnsafeFileError(f"{clean(str(folder))}: of another user; have that user remove it")
        _lock(descriptor, folder)
        for name in os.listdir(descriptor):
            remove(folder / name)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():  # else the export that held it has just removed it, at its end
            return
    except BlockingIOError:
        pass
    where = clean(str(folder.parent))
    raise BusyError(f"another export to the same place in {where} is at work; wait for it to end")


def _publish(data: Path, destination: Path, refusal: Refusal | None) -> None:
    if refusal is not None and destination.is_dir() and data.is_dir():
        _replace_folder(data, destination, refusal)
    else:
        _check(destination, refusal)
        os.replace(data, destination)
    sync(destination.parent)


def _replace_folder(data: Path, destination: Path, refusal: Refusal) -> None:
    """Put an export in the place of an earlier one, in one step where the system can do that."""
    aside = data.with_name("before")
    _exchange(data, destination, aside)
    try:
        _check(aside, refusal)
    except UsageError:
        _exchange(aside, destination, data)
        raise


def _exchange(new: Path, destination: Path, aside: Path) -> None:
    """Give `new` the destination's name, and what had it the name `aside`."""
    if _swapped(new, destination):
        os.rename(new, aside)
        return
    os.rename(destination, aside)
    os.rename(new, destination)


def _swapped(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the system or the file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    paths = (ctypes.c_char_p(os.fsencode(one)), ctypes.c_char_p(os.fsencode(other)))
    return bool(function(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_EXCHANGE)) == 0)


def _sync_all(data: Path) -> None:
    """Wait until everything is on disk, names included."""
    if not data.is_dir():
        sync(data)
        return
    if len(list(islice(_files(data), _MOST_SYNCED + 1))) > _MOST_SYNCED:
        os.sync()
        return
    for path in _files(data):
        if not path.is_symlink():
            sync(path)
    for root, _, _ in os.walk(data, topdown=False):
        sync(Path(root))


def _files(folder: Path) -> Iterator[Path]:
    return (Path(root, name) for root, _, names in os.walk(folder) for name in names)
