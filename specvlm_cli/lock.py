"""A kernel lock on a file, which ends with the process, however the process ends. Knows no ledger."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from specvlm_cli.exits import BusyError
from specvlm_cli.text import clean


def take(path: Path, run_id: str) -> TextIO:
    """Take the lock and write into the file who holds it; closing the file gives the lock back.

    Raises:
        BusyError: Another process holds it; the message names that process.
        OSError: The file cannot be made or written.
    """
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        json.dump(_identity(run_id), file)
        file.flush()
    except BlockingIOError:
        file.close()
        folder = clean(str(path.parent.parent))
        raise BusyError(f"{folder} is in use by {_holder(path)}; wait for it to end") from None
    except BaseException:
        file.close()
        raise
    return file


def _identity(run_id: str) -> dict[str, str | int]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id, "since": now}


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return clean(f"process {who['pid']} on {who['host']} since {who['since']}")
    except (OSError, ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        return "another process"
