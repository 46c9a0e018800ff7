"""Runs `specvlm` with a fake engine in a process of its own, to be killed there.

    python -m tests.cli.drive run ARGUMENTS...          one run, as the shell would do it
    python -m tests.cli.drive kill PLAN.json            many runs, each in a fork, killed where the plan says

A plan is a list of trials. Each trial names a run folder and the kills of its starts, one after another; then
comes a start that is not killed, unless "finish" is false. Kills are installed from here, by wrapping
functions: the product knows none of it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specvlm_cli.decoding import DecodingPool

import specvlm_cli.parts  # noqa: F401  imported before forking, so that a trial costs milliseconds
from specvlm_cli import app, engine, runner
from specvlm_cli.commands import caption
from specvlm_cli.runner import Policy
from tests.cli.conftest import READER
from tests.cli.fake import FakeFactory

POINTS = {
    "claim": "specvlm_cli.ledger:Ledger.claim",
    "finish": "specvlm_cli.ledger:Ledger.finish",
    "fail": "specvlm_cli.ledger:Ledger.fail",
    "store": "specvlm_cli.ledger:Ledger._store",
    "register": "specvlm_cli.ledger:Ledger.register",
    "number": "specvlm_cli.ledger:Ledger.take_part_number",
    "write": "pyarrow.parquet:write_table",
    "check": "specvlm_cli.parts:_check",
    "fsync": "os:fsync",
    "rename": "os:replace",
    "add_part": "specvlm_cli.ledger:Ledger.add_part",
    "insert_part": "specvlm_cli.ledger:Ledger._insert_part",
    "mark_failures": "specvlm_cli.ledger:Ledger.mark_failures",
    "adopt": "specvlm_cli.ledger:Ledger.adopt",
    "outdate": "specvlm_cli.ledger:Ledger._outdate",
    "repair": "specvlm_cli.parts:Parts.repair",
    "reopen": "specvlm_cli.ledger:Ledger.reopen",
    "renew_part": "specvlm_cli.ledger:Ledger.renew_part",
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install_kill(point: str, when: str, nth: int) -> None:
    """Die before or after the nth call of a function."""
    module_name, _, path = POINTS[point].partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module_name))
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            _die()
        result = original(*arguments, **options)
        if calls == nth and when == "after":
            _die()
        return result

    setattr(owner, name, dying)


def prepare(delay_s: float, part_rows: int) -> None:
    """Put the fake engine in place, and make parts small."""
    engine.Factory = lambda settings, *, quiet: FakeFactory(os.devnull, delay_s)  # type: ignore[assignment,misc]
    caption.Policy = functools.partial(Policy, part_rows=part_rows)  # type: ignore[misc,assignment]
    runner.DecodingPool = functools.partial(DecodingPool, reader=READER)  # type: ignore[misc,assignment]


def _start(arguments: list[str], kill: dict[str, Any] | None) -> int:
    """Make one start in a fork; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        if kill and "point" in kill:
            install_kill(kill["point"], kill["when"], kill["nth"])
        os._exit(app.main(arguments))
    if kill and "after_s" in kill:
        time.sleep(kill["after_s"])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str]) -> int:
    """Do what the command line of this file says."""
    prepare(float(os.environ.get("DRIVE_DELAY_S", "0")), int(os.environ.get("DRIVE_PART_ROWS", "3")))
    verb, *rest = arguments
    if verb == "run":
        return app.main(rest)
    trials = json.loads(Path(rest[0]).read_text())
    codes = []
    for trial in trials:
        kills = trial["kills"] + [None] * trial.get("finish", True)
        codes.append([_start(trial["arguments"], kill) for kill in kills])
    print(json.dumps(codes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
