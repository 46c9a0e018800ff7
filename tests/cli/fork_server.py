"""A process that has everything imported and forks one start after the other, and its client.

Each line on its stdin is an order in JSON. `{"start": ORDER}` answers with the process id of the start, which is its
process group too; `{"wait": PID, "most_s": S}` with its exit code, minus the signal that ended it, or null where it
still runs. Importing takes most of a start's time; here it is done once.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
LONGEST_START_S = 120.0


class ForkServer:
    """The client: `module` is run as a program that calls `serve`."""

    def __init__(self, module: str, *arguments: object, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.defpath, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def fork(self, order: object) -> int:
        """Make a start; return its process id."""
        process = self._ask({"start": order})
        assert process is not None
        return process

    def wait(self, process: int, most_s: float = LONGEST_START_S) -> int | None:
        """Return the exit code of a start, or minus the signal that ended it; None: it still runs."""
        return self._ask({"wait": process, "most_s": most_s})

    def _ask(self, order: dict[str, object]) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer


def serve(start: Callable[[Any], int]) -> None:
    """Answer orders until stdin is closed; `start` makes a start and returns its process id."""
    gc.collect()
    gc.freeze()  # so that collections in a fork neither look through all this nor copy it
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            answer: int | None = start(order["start"])
        else:
            answer = _wait(order["wait"], order["most_s"])
        print(json.dumps(answer), flush=True)


def fork(work: Callable[[], int], stderr: Path) -> int:
    """Run `work` in a fork with a session of its own, whose exit code it returns; return the process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        _redirect(stderr)
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _redirect(stderr: Path) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 2)
    os.close(nowhere)
    os.close(file)


def _wait(process: int, most_s: float) -> int | None:
    end_s = time.monotonic() + most_s
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end_s:
            return None
        time.sleep(0.004)
