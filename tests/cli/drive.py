"""Runs `specvlm` with a fake engine in processes of their own, to be killed or hindered there.

    python -m tests.cli.drive run ARGUMENTS...    one run, as the shell would do it
    python -m tests.cli.drive serve               starts in forks, as orders on stdin say; see `Start`

Kills and input/output faults are installed from here, by wrapping functions and by a shim (`iofault.c`): the
product knows none of it. The environment says how the fakes behave: DRIVE_DELAY_S for each step, DRIVE_STEPS at
most for a caption, DRIVE_LOAD_S to load, DRIVE_PART_ROWS in a part, DRIVE_JOURNAL for what the engines note,
DRIVE_WORDS to make captions long, DRIVE_BUSY_S for how long a ledger that others hold is waited for. With DRIVE_FORK
the coordinator's children are forked from it instead of started as interpreters of their own, which saves most of
what a start costs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import typer.main

from specvlm_cli import app
from specvlm_cli.caption import coordinator, engine
from specvlm_cli.caption.policy import Policy
from specvlm_cli.commands import caption
from specvlm_cli.readers import DecodingPool, read_client
from specvlm_cli.run import ledger
from specvlm_cli.workers import worker
from tests.cli import family, fork_server, forks
from tests.cli.fake import FakeFactory, with_demo
from tests.cli.fake_reader import READER
from tests.cli.forks import Forked, Order

# A third of what a short start takes of the processor is making the commands of the functions, the same each time.
typer.main.get_command = functools.cache(typer.main.get_command)

Victim = Literal["parent", "group", "worker", "server", "reader"]

POINTS = {
    "lock": "specvlm_cli.run.lock:take",
    "share": "specvlm_cli.run.lock:share",
    "sign_off": "specvlm_cli.run.lock:Lock.sign_off",
    "register": "specvlm_cli.run.ledger:Ledger.register",
    "recover": "specvlm_cli.run.ledger:Ledger.recover",
    "pending": "specvlm_cli.run.ledger:Ledger.pending",
    "claim": "specvlm_cli.run.ledger:Ledger.claim",
    "finish": "specvlm_cli.run.ledger:Ledger.finish",
    "fail": "specvlm_cli.run.ledger:Ledger.fail",
    "store": "specvlm_cli.run.ledger:Ledger._store",
    "commit": "sqlite_utils:Database.commit",
    "reopen": "specvlm_cli.run.ledger:Ledger.reopen",
    "take_out": "specvlm_cli.run.ledger:Ledger._take_out",
    "outdate": "specvlm_cli.run.ledger:Ledger._outdate",
    "adopt": "specvlm_cli.run.ledger:Ledger.adopt",
    "adopt_failures": "specvlm_cli.run.ledger:Ledger.adopt_failures",
    "number": "specvlm_cli.run.ledger:Ledger.take_part_number",
    "add_part": "specvlm_cli.run.ledger:Ledger.add_part",
    "insert_part": "specvlm_cli.run.ledger:Ledger._insert_part",
    "renew_part": "specvlm_cli.run.ledger:Ledger.renew_part",
    "mark_failures": "specvlm_cli.run.ledger:Ledger.mark_failures",
    "repair": "specvlm_cli.run.parts:PartFiles.repair",
    "write": "pyarrow.parquet:write_table",
    "check": "specvlm_cli.run.parts:_check",
    "describe": "specvlm_cli.run.parts:_described",
    "fsync": "os:fsync",
    "rename": "os:replace",
    "sync": "specvlm.durable:sync",
    "run_file": "specvlm_cli.run.layout:RunFolder.write",
    "start_worker": "specvlm_cli.workers.worker:Worker.__init__",
    "prepare": "specvlm_cli.workers.worker:Worker.prepare",
    "give": "specvlm_cli.workers.worker:Worker.give",
    "hear": "specvlm_cli.workers.worker:Worker.hear",
    "submit": "specvlm_cli.readers:DecodingPool.submit",
    "collect": "specvlm_cli.readers:DecodingPool.collect",
    "divide": "specvlm_cli.run.resharding:_divide",
    "deal_out": "specvlm_cli.run.resharding:_deal_out",
    "complete": "pathlib:Path.rename",
    "take_over": "specvlm_cli.run.resharding:_take_over",
    "unlink": "pathlib:Path.unlink",
    "write_parts": "specvlm_cli.run.resharding:_write_parts",
    "rmtree": "shutil:rmtree",
    "export_table": "pyarrow.parquet:ParquetWriter.write_table",
    "export_rename": "os:rename",
    "export_write": "specvlm_cli.export.write:_Export.write",
    "export_sync": "specvlm_cli.export.staging:_sync_all",
    "export_publish": "specvlm_cli.export.staging:_publish",
}
KINDS = {"write": 1, "sync": 2, "rename": 4, "create": 8, "truncate": 16, "unlink": 32}  # as in iofault.c


@dataclass(frozen=True)
class Kill:
    """Who dies, and when: before or after the nth call of a point."""

    point: str
    when: Literal["before", "after"]
    nth: int
    victim: Victim = "parent"


@dataclass(frozen=True)
class Fault:
    """What fails below a folder, in the coordinator alone: the nth operation of some kinds, or all from there."""

    below: str
    kinds: tuple[str, ...]
    errno: int
    nth: int
    for_ever: bool = False
    report: str = os.devnull  # gets how many such operations there were


@dataclass(frozen=True)
class Start:
    """One start. It works in `folder`, where its stderr is added to a file."""

    arguments: tuple[str, ...]
    folder: str
    stderr: str = "stderr"
    environment: dict[str, str] = field(default_factory=dict)
    kill: Kill | None = None
    fault: Fault | None = None

    @classmethod
    def of(cls, said: dict[str, Any]) -> Start:
        """Undo `asdict`."""
        kill = said.pop("kill")
        fault = said.pop("fault")
        return cls(**said, kill=kill and Kill(**kill), fault=fault and Fault(**fault))


class ForkedHere(Forked):
    """A fork of this process."""

    def _fork(self, order: Order, descriptors: list[int]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about other threads
            child = os.fork()
        if child == 0:
            for number in range(1, signal.NSIG):
                with suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            forks.be_child(order, descriptors)
        return child


def _strike(victim: Victim) -> None:
    if victim == "parent":
        os.kill(os.getpid(), signal.SIGKILL)
    elif victim == "group":
        os.killpg(0, signal.SIGKILL)
    else:
        for process in family.members(os.getpid(), victim):
            os.kill(process, signal.SIGKILL)


def install_kill(kill: Kill) -> None:
    """Wrap the function of a point, so that its nth call kills. What it raises passes, and counts as a call."""
    module_name, _, path = POINTS[kill.point].partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module_name))
    original: Callable[..., Any] = getattr(owner, name)
    calls, ours = 0, os.getpid()

    @functools.wraps(original)
    def killing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if os.getpid() != ours:  # in a child that was forked
            return original(*arguments, **options)
        calls += 1
        number = calls
        if number == kill.nth and kill.when == "before":
            _strike(kill.victim)
        result = original(*arguments, **options)
        if number == kill.nth and kill.when == "after":
            _strike(kill.victim)
        return result

    setattr(owner, name, killing)
    if kill.point in ("lock", "share", "sync"):  # imported by name elsewhere
        _replace_everywhere(original, killing)


def _replace_everywhere(original: object, other: object) -> None:
    for module in [module for name, module in sys.modules.items() if name.startswith("specvlm_cli")]:
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, other)


def prepare() -> None:
    """Put the fake engine in place, and make parts small, as the environment says."""
    factory = FakeFactory(
        os.environ.get("DRIVE_JOURNAL", os.devnull),
        float(os.environ.get("DRIVE_DELAY_S", "0")),
        load_s=float(os.environ.get("DRIVE_LOAD_S", "0")),
        words=int(os.environ.get("DRIVE_WORDS", "0")),
        steps=int(os.environ.get("DRIVE_STEPS", "1")),
    )
    rows = int(os.environ.get("DRIVE_PART_ROWS", "3"))
    ledger.BUSY_TIMEOUT_S = float(os.environ.get("DRIVE_BUSY_S", "60"))
    _put(engine, "Factory", lambda settings, *, batch_size, **_: replace(factory, batch_size=batch_size))
    _put(caption, "_with_preset", with_demo)
    _put(caption, "Policy", functools.partial(Policy, part_rows=rows))
    _put(coordinator, "DecodingPool", functools.partial(DecodingPool, reader=READER))
    if "DRIVE_FORK" in os.environ:
        fork_children(_put, worker, read_client)


def fork_children(
    put: Callable[[Any, str, object], None], *starters: ModuleType, by: type[Forked] = ForkedHere
) -> None:
    """Have these modules fork their children instead of starting interpreters; `put` sets an attribute."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    for module in starters:
        put(module, "subprocess", SimpleNamespace(Popen=by, **names))


def _put(module: ModuleType, name: str, value: object) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


def _start(order: Start) -> int:
    """Make one start in a fork; return its process id."""
    return fork_server.fork(functools.partial(_run, order), Path(order.folder, order.stderr))


def _run(order: Start) -> int:
    os.chdir(order.folder)
    os.environ.update(order.environment)
    prepare()
    if order.kill is not None:
        install_kill(order.kill)
    if order.fault is not None:
        _arm(order.fault)
    code = app.main(list(order.arguments))
    if order.fault is not None:
        Path(order.fault.report).write_text(str(ctypes.CDLL(None).iofault_count()))
    return code


def _arm(fault: Fault) -> None:
    """Tell the shim, which was loaded with this interpreter, what to let fail from now on."""
    kinds = sum(KINDS[kind] for kind in fault.kinds)
    ctypes.CDLL(None).iofault_arm(
        os.fsencode(fault.below), kinds, ctypes.c_long(fault.nth), fault.errno, int(fault.for_ever)
    )


def main(arguments: list[str]) -> int:
    """Do what the command line of this file says."""
    verb, *rest = arguments
    if verb == "run":
        prepare()
        return app.main(rest)
    typer.main.get_command(app.app)
    fork_server.serve(lambda order: _start(Start.of(order)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
