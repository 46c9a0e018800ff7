"""A kernel lock on a file, which ends with the process, however the process ends. Knows no ledger."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO, TypeVar

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import BusyError, FatalError
from specvlm_cli.safe_files import open_lock, read_whole
from specvlm_cli.stopping import Stop, end_if_asked

LockedPolicy = Literal["fail", "skip", "wait"]

T = TypeVar("T")

_LOOK_EVERY_S = 0.02
_TRY_EVERY_S = 1.0  # to get a folder that another process is using


class Lock:
    """A lock that is held. The holder's name is in the file until the holder ends in order.

    Attributes:
        after_crash: The holder before left its name, so it died.
    """

    def __init__(self, file: TextIO, *, after_crash: bool) -> None:
        self.after_crash = after_crash
        self._file = file

    def sign_off(self) -> None:
        """Erase the name: whatever ends the process from here on is no crash. Works on a full disk too."""
        with suppress(OSError):
            self._file.truncate(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._file:
            self.sign_off()


def take(path: Path, run_id: str) -> Lock:
    """Take the lock and write into the file who holds it; leaving it as a context gives it back.

    Raises:
        BusyError: Another process holds it; the message names that process.
        OSError: The file cannot be made or written.
        UnsafeFileError: It is a link or not a regular file of its own.
    """
    file = open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        after_crash = os.fstat(file.fileno()).st_size > 0
        file.truncate(0)
        json.dump(_identity(run_id), file)
        file.flush()
    except BlockingIOError:
        file.close()
        folder = clean(str(path.parent.parent))
        raise BusyError(
            f"{folder} is in use by {_holder(path)}; wait for it to end, or give --if-locked wait or skip"
        ) from None
    except BaseException:
        file.close()
        raise
    return Lock(file, after_crash=after_crash)


def when_free(
    policy: LockedPolicy, stop: Stop, note: Callable[[str], None], enter: Callable[[], T]
) -> T | None:
    """Call `enter`, which takes a lock, and follow `--if-locked` while another process holds it.

    Args:
        policy: Fail, skip, or wait until the lock is free.
        stop: Ends the waiting.
        note: Prints a message.
        enter: Raises BusyError while another process holds the lock.

    Returns:
        What `enter` returns; None: the policy is to skip, or `stop` has a reason.

    Raises:
        BusyError: Another process holds the lock, and the policy is to fail.
    """
    noted = False
    while stop.reason is None:
        try:
            return enter()
        except BusyError as error:
            if policy == "fail":
                raise
            if not noted:
                note(str(error) if policy == "skip" else f"waiting: {error}")
            if policy == "skip":
                break
            noted = True
            time.sleep(_TRY_EVERY_S)
    return None


def share(path: Path, *, alone: bool = False, patient: bool = False) -> TextIO:
    """Take a lock that several processes may hold together, or that one holds alone; closing gives it back.

    Raises:
        BusyError: Others hold it in a way that excludes ours, and we are not patient.
        NotBegunError: We are patient, and a signal has asked to stop.
        OSError: The file cannot be made or written.
        UnsafeFileError: It is a link or not a regular file of its own.
    """
    file = open_lock(path)
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        while not _is_locked(file, kind, patient):
            time.sleep(_LOOK_EVERY_S)
            end_if_asked()  # waiting in the kernel would continue after a signal
    except BlockingIOError:
        file.close()
        what = "a start of it is at work" if alone else "its shard count is being changed"
        raise BusyError(f"{clean(str(path.parent.parent))}: {what}; wait for that to end") from None
    except BaseException:
        file.close()
        raise
    return file


def _is_locked(file: TextIO, kind: int, patient: bool) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if not patient:
            raise
        return False
    return True


def _identity(run_id: str) -> dict[str, str | int]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id, "since": now}


def _holder(path: Path) -> str:
    try:
        who = json.loads(read_whole(path))
        return clean(f"process {who['pid']} on {who['host']} since {who['since']}")
    except (
        OSError,
        FatalError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
    ):  # it holds the lock, but has not written its name yet
        return "another process"
