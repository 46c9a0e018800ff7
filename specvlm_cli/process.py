"""Starting our own child processes, and having them end when we end. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
import getpass
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def python_command(statement: str) -> list[str]:
    """Return the command line that runs a statement in a fresh interpreter with our module search path."""
    path = f"import sys; sys.path[:] = {sys.path!r}"
    return [sys.executable, "-c", f"{path}; {statement}"]


def keep_torch_out_of_foreign_folders() -> None:
    """Have torch keep compiled code in the user's cache folder where another user has its place in the temp folder.

    Torch makes a folder of a known name there as it is loaded: another file of that name would end the start, and
    what lies in the folder of another user could be run.
    """
    with suppress(KeyError, OSError, RuntimeError):  # a user without a name or a home: torch does what it can
        usual = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        found = usual.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/torch/inductor"))


def die_with_parent(parent: int) -> None:
    """Have this process killed when the process `parent`, which started it, ends in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        watch_parent(parent)
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(1)


def watch_parent(parent: int) -> None:
    """Have this process end within a second or so of the process `parent`, also where a thread of it started us.

    The kernel's own way, in `die_with_parent`, would have us killed when that thread ends.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
