"""A kernel lock on a file, which ends with the process, however the process ends. Knows no ledger."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from specvlm_cli.exits import BusyError
from specvlm_cli.text import clean


@contextmanager
def held(path: Path, run_id: str) -> Iterator[None]:
    """Hold the lock for as long as the block runs; the file says who holds it.

    Raises:
        BusyError: Another process holds it; the message names that process.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{clean(str(path.parent.parent))} is in use by {_holder(path)}; wait for it"
            ) from None
        file.truncate(0)
        json.dump(_identity(run_id), file)
        file.flush()
        yield


def _identity(run_id: str) -> dict[str, str | int]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id, "since": now}


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return clean(f"process {who['pid']} on {who['host']} since {who['since']}")
    except (OSError, ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        return "another process"
