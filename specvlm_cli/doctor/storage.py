"""The model cache, and the file system of a run folder: type, space, locks, syncs, commits.

What is written for a test goes into a hidden folder that is removed at once; a folder that does not exist is not
made, the nearest one that does is looked at in its stead.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

from specvlm.words import amount
from specvlm_cli.console.safe_text import clean
from specvlm_cli.doctor.checks import CheckVerdict, fail, ok, warn

_GB = 10**9
_SYNCS, _COMMITS = 20, 20
_SLOW_SYNC_S, _SLOW_COMMIT_S = 0.05, 0.25
_NETWORK = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "panfs",
}
_PASSING = {
    "tmpfs": "it is memory and is gone at the next boot",
    "ramfs": "it is memory and is gone at the next boot",
}
_LAYER = "it is a container's own layer and is gone with the container"


def existing(path: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


# The model cache


def model_cache() -> CheckVerdict:
    """Look at the folder into which models are downloaded."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = existing(folder)
    free = shutil.disk_usage(there).free
    detail = f"{clean(str(folder))}, {amount(free)} free"
    if reason := _unwritable(there):
        return fail(f"{detail}, {reason}", "set HF_HOME to a folder that you may write to")
    if free < 20 * _GB:
        return warn(detail, "the smallest pair of real models takes 18 GB; set HF_HOME to a larger disk")
    return ok(detail)


def hub() -> CheckVerdict:
    """Say whether the hub may be asked, and as whom. The token itself is never shown."""
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "no token (public models need none)"
    if constants.HF_HUB_OFFLINE:
        return warn(
            f"offline mode, {token}", "unset HF_HUB_OFFLINE to download a model that is not on disk yet"
        )
    return ok(f"online mode, {token}")


# The run folder


def file_system(out: Path) -> CheckVerdict:
    """Look at the file system of a run folder: its type, space and free names."""
    folder = existing(out)
    kind = kind_of(folder)
    found = os.statvfs(folder)
    free, names = found.f_frsize * found.f_bavail, found.f_favail
    detail = f"{clean(str(folder))} is on {kind}, {amount(free)} and {names:,} names free"
    if free < _GB // 10 or (found.f_files and names < 100):
        return fail(detail, "free some space, or give another folder")
    if free < 5 * _GB or (found.f_files and names < 10_000):
        return warn(detail, "a million captions take about 3 GB; free some space")
    if kind in _PASSING or kind == "overlay":
        return warn(detail, f"{_PASSING.get(kind, _LAYER)}; give a folder that stays")
    if kind in _NETWORK or kind.startswith("fuse"):
        return warn(
            detail, "on a network: one shard to a process is safe, a power cut of the server may not be"
        )
    return ok(detail)


def kind_of(folder: Path) -> str:
    """Return the type of a folder's file system, as the system names it."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "a file system of unknown type"
    path = os.path.realpath(folder)
    best = max((mount for mount in map(_mount, lines) if _below(path, mount[0])), key=lambda one: len(one[0]))
    return best[1]


def _mount(line: str) -> tuple[str, str]:
    """Return (where, type) of one line of mountinfo, in which blanks are written in octal."""
    before, _, after = line.partition(" - ")
    where = before.split()[4]
    for written, meant in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        where = where.replace(written, meant)
    return where, after.split()[0]


def _below(path: str, where: str) -> bool:
    return where == "/" or path == where or path.startswith(f"{where}/")


def writing(out: Path) -> CheckVerdict:
    """See whether files can be written, synced and renamed, and how long a sync takes."""
    folder = existing(out)
    if reason := _unwritable(folder):
        return fail(f"{clean(str(folder))}: {reason}", "give a folder that you may write to")
    with _scratch(folder) as scratch:
        times = sorted(_synced_s(scratch / f"{number}") for number in range(_SYNCS))
        os.replace(scratch / "0", scratch / "1")
    detail = (
        f"a sync takes {median(times) * 1000:.1f} ms, the slowest of {_SYNCS} took {times[-1] * 1000:.1f} ms"
    )
    if median(times) > _SLOW_SYNC_S:
        return warn(detail, "each caption waits for about four of them; a local disk is faster")
    return ok(detail)


def _synced_s(path: Path) -> float:
    with path.open("wb") as file:
        file.write(bytes(4096))
        file.flush()
        began = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def locking(out: Path) -> CheckVerdict:
    """See whether a lock keeps a second process out."""
    with (
        _scratch(existing(out)) as scratch,
        (scratch / "lock").open("w") as one,
        (scratch / "lock").open("w") as two,
    ):
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ok("flock keeps a second run out")
    return fail(
        "flock does not keep a second run out", "mount it with locks (Lustre: -o flock; NFS: no nolock)"
    )


def committing(out: Path) -> CheckVerdict:
    """See whether SQLite commits as the ledger does, and how fast."""
    with _scratch(existing(out)) as scratch, closing(sqlite3.connect(scratch / "ledger.db")) as database:
        database.isolation_level = None
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE caption (row TEXT)")
        began = time.perf_counter()
        for _ in range(_COMMITS):
            database.execute("INSERT INTO caption VALUES (?)", ("x" * 2000,))
        each_s = (time.perf_counter() - began) / _COMMITS
        (rows,) = database.execute("SELECT count(*) FROM caption").fetchone()
    if rows != _COMMITS:
        return fail(f"{rows} of {_COMMITS} rows read back", "do not keep a ledger on this file system")
    detail = f"a commit of the ledger takes {each_s * 1000:.1f} ms"
    return (
        ok(detail)
        if each_s < _SLOW_COMMIT_S
        else warn(detail, "each video waits for two; a local disk is faster")
    )


def _unwritable(folder: Path) -> str | None:
    """Return why nothing can be written into a folder; None: it can."""
    try:
        with _scratch(folder) as scratch:
            (scratch / "test").write_bytes(b"test")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".specvlm-doctor-", dir=folder) as scratch:
        yield Path(scratch)
