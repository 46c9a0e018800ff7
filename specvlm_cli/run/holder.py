"""Who holds the lock of a shard, found out without touching it. The lock itself is made in `lock.py`.

Trying the lock would tell, but for that moment a start could find it taken. So the name in the file is read,
and the kernel's own list of locks, which knows the processes of this machine only.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from specvlm_cli.safe_files import UnsafeFileError, read_whole

_KERNEL_LIST = Path("/proc/locks")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who is named in a lock's file.

    Attributes:
        host: Machine of the process.
        pid: The process there.
        since: When it took the lock; None where it has not said, or has signed off already.
        alive: It holds the lock (True), it died without letting go of its name (False), or that cannot be
            checked from this machine (None).
    """

    host: str
    pid: int
    since: str | None
    alive: bool | None


def holder_of(lock: Path) -> Holder | None:
    """Return who holds a lock, or died holding it; None: it is free."""
    try:
        named = _named(read_whole(lock))
        locked_by = _locked_by(lock, 0 if named is None else named[1])
    except (OSError, UnsafeFileError):  # no lock of ours: a start says what is wrong with it
        return None
    here = socket.gethostname()
    if named is None:
        return None if locked_by is None else Holder(here, locked_by, None, True)
    host, pid, since = named
    return Holder(host, pid, since, _alive(here == host, pid, locked_by))


def _alive(ours: bool, named: int, locked_by: int | None) -> bool | None:
    if locked_by is not None:
        return True
    return False if ours and not _exists(named) else None


def _named(text: bytes) -> tuple[str, int, str] | None:
    try:
        found = json.loads(text)
        host, pid, since = str(found["host"]), int(found["pid"]), str(found["since"])
        datetime.fromisoformat(since)
        return host, pid, since
    except (ArithmeticError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _locked_by(lock: Path, named: int) -> int | None:
    """Return the process of this machine that holds a lock on a file; None: none that is known.

    Layered file systems give the kernel's list another device than they give us, so the process counts too.
    """
    try:
        lines = _KERNEL_LIST.read_text().splitlines()
    except OSError:
        return None
    status = lock.lstat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    found = (
        pid
        for pid, *where, inode in map(_held, lines)
        if inode == status.st_ino and (tuple(where) == device or pid == named)
    )
    return next(found, None)


def _held(line: str) -> tuple[int, int, int, int]:
    """Return (process, device's major, its minor, inode) of one line; inode -1: no lock that is held.

    A line that waits for a lock has an arrow in its second column.
    """
    words = line.split()
    try:
        major, minor, inode = words[5].split(":")
        return int(words[4]), int(major, 16), int(minor, 16), int(inode) if words[1] == "FLOCK" else -1
    except (IndexError, ValueError):
        return 0, 0, 0, -1


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
