"""Runs `specvlm` with a fake engine in processes of their own, to be killed or hindered there.

    python -m tests.cli.drive run ARGUMENTS...    one run, as the shell would do it
    python -m tests.cli.drive serve               starts in forks, as orders on stdin say; see `Order`

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
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, Self

import typer.main

import specvlm_cli.decoding.nursery
import specvlm_cli.generating.child
import specvlm_cli.parts
import specvlm_cli.resharding  # noqa: F401  all imported before forking, so that a start costs milliseconds
from specvlm_cli import app, engine, ledger, runner
from specvlm_cli.commands import caption
from specvlm_cli.decoding import DecodingPool, keeper
from specvlm_cli.export import job as export_job  # noqa: F401
from specvlm_cli.generating import worker
from specvlm_cli.policy import Policy
from tests.cli import family
from tests.cli.fake import FakeFactory, with_demo
from tests.cli.fake_reader import READER

ROOT = Path(__file__).parents[2]
# A third of what a short start takes of the processor is making the commands of the functions, the same each time.
typer.main.get_command = functools.cache(typer.main.get_command)

Victim = Literal["parent", "group", "worker", "nursery", "reader"]

POINTS = {
    "lock": "specvlm_cli.lock:take",
    "share": "specvlm_cli.lock:share",
    "sign_off": "specvlm_cli.lock:Lock.sign_off",
    "register": "specvlm_cli.ledger:Ledger.register",
    "recover": "specvlm_cli.ledger:Ledger.recover",
    "pending": "specvlm_cli.ledger:Ledger.pending",
    "claim": "specvlm_cli.ledger:Ledger.claim",
    "finish": "specvlm_cli.ledger:Ledger.finish",
    "fail": "specvlm_cli.ledger:Ledger.fail",
    "store": "specvlm_cli.ledger:Ledger._store",
    "commit": "sqlite_utils:Database.commit",
    "reopen": "specvlm_cli.ledger:Ledger.reopen",
    "take_out": "specvlm_cli.ledger:Ledger._take_out",
    "outdate": "specvlm_cli.ledger:Ledger._outdate",
    "adopt": "specvlm_cli.ledger:Ledger.adopt",
    "adopt_failures": "specvlm_cli.ledger:Ledger.adopt_failures",
    "number": "specvlm_cli.ledger:Ledger.take_part_number",
    "add_part": "specvlm_cli.ledger:Ledger.add_part",
    "insert_part": "specvlm_cli.ledger:Ledger._insert_part",
    "renew_part": "specvlm_cli.ledger:Ledger.renew_part",
    "mark_failures": "specvlm_cli.ledger:Ledger.mark_failures",
    "repair": "specvlm_cli.parts:Parts.repair",
    "write": "pyarrow.parquet:write_table",
    "check": "specvlm_cli.parts:_check",
    "describe": "specvlm_cli.parts:_described",
    "fsync": "os:fsync",
    "rename": "os:replace",
    "sync": "specvlm.durable:sync",
    "run_file": "specvlm_cli.run_folder:RunFolder.write",
    "start_worker": "specvlm_cli.generating.worker:Worker.__init__",
    "prepare": "specvlm_cli.generating.worker:Worker.prepare",
    "give": "specvlm_cli.generating.worker:Worker.give",
    "hear": "specvlm_cli.generating.worker:Worker.hear",
    "submit": "specvlm_cli.decoding:DecodingPool.submit",
    "collect": "specvlm_cli.decoding:DecodingPool.collect",
    "divide": "specvlm_cli.resharding:_divide",
    "deal_out": "specvlm_cli.resharding:_deal_out",
    "complete": "pathlib:Path.rename",
    "take_over": "specvlm_cli.resharding:_take_over",
    "unlink": "pathlib:Path.unlink",
    "write_parts": "specvlm_cli.resharding:_write_parts",
    "rmtree": "shutil:rmtree",
    "export_table": "pyarrow.parquet:ParquetWriter.write_table",
    "export_rename": "os:rename",
    "export_write": "specvlm_cli.export.job:_Export.write",
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
class Order:
    """One start. It works in `folder`, where its stderr is added to a file."""

    arguments: tuple[str, ...]
    folder: str
    stderr: str = "stderr"
    environment: dict[str, str] = field(default_factory=dict)
    kill: Kill | None = None
    fault: Fault | None = None

    def line(self) -> str:
        """Return what `serve` reads."""
        return json.dumps({"start": asdict(self)})

    @classmethod
    def of(cls, said: dict[str, Any]) -> Order:
        """Undo `line`."""
        kill = said.pop("kill")
        fault = said.pop("fault")
        return cls(**said, kill=kill and Kill(**kill), fault=fault and Fault(**fault))


class Starter:
    """A process that makes starts as it is ordered: one JSON object a line in, one answer out."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
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

    def wait(self, process: int, most_s: float = 120.0) -> int | None:
        """Return the exit code of a start, or minus the signal that ended it; None: it still runs."""
        return self.ask(json.dumps({"wait": process, "most_s": most_s}))

    def ask(self, line: str) -> int | None:
        """Give an order; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer


class Forked(subprocess.Popen[bytes]):
    """A child as `subprocess.Popen` would start it, but for the interpreter: it runs the statement in a fork."""

    def __init__(
        self,
        command: list[str],
        *,
        stdin: int,
        stderr: Any,
        pass_fds: Sequence[int],
        stdout: int | None = None,
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self.stdin = self.stdout = self.stderr = None
        self.args, self._child_created = command, True
        self._waitpid_lock = threading.Lock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about other threads
            self.pid = os.fork()
        if self.pid:
            return
        try:
            for number in range(1, signal.NSIG):
                with suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            error = stderr if isinstance(stderr, int) else stderr.fileno()
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(error, 2)
            for stream in (0, 1) if stdout == subprocess.DEVNULL else (0,):
                os.dup2(nowhere, stream)
            kept = sorted(pass_fds)
            for low, high in zip([2, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
                os.closerange(low + 1, high)
            if start_new_session:
                os.setsid()
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            statement = command[-1].partition("; ")[2]
            family.name_me("nursery" if "nursery" in statement else "worker")
            exec(statement.partition("; ")[2], {})
        finally:
            os._exit(0)


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
    _put(runner, "DecodingPool", functools.partial(DecodingPool, reader=READER))
    if "DRIVE_FORK" in os.environ:
        fork_children(_put, worker, keeper)


def fork_children(
    put: Callable[[Any, str, object], None], *starters: ModuleType, by: type[subprocess.Popen[bytes]] = Forked
) -> None:
    """Have these modules fork their children instead of starting interpreters; `put` sets an attribute."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    for module in starters:
        put(module, "subprocess", SimpleNamespace(Popen=by, **names))


def _put(module: ModuleType, name: str, value: object) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name} any more"
    setattr(module, name, value)


def _start(order: Order) -> int:
    """Make one start in a fork with a session of its own; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(order.folder)
        _redirect(Path(order.stderr))
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(order.environment)
        prepare()
        if order.kill is not None:
            install_kill(order.kill)
        if order.fault is not None:
            _arm(order.fault)
        code = app.main(list(order.arguments))
        if order.fault is not None:
            Path(order.fault.report).write_text(str(ctypes.CDLL(None).iofault_count()))
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


def _arm(fault: Fault) -> None:
    """Tell the shim, which was loaded with this interpreter, what to let fail from now on."""
    kinds = sum(KINDS[kind] for kind in fault.kinds)
    ctypes.CDLL(None).iofault_arm(
        os.fsencode(fault.below), kinds, ctypes.c_long(fault.nth), fault.errno, int(fault.for_ever)
    )


def _wait(process: int, most_s: float) -> int | None:
    """Return the exit code of a start, or minus the signal that ended it; None: it still runs."""
    end_s = time.monotonic() + most_s
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end_s:
            return None
        time.sleep(0.004)


def _serve() -> None:
    typer.main.get_command(app.app)
    gc.collect()
    gc.freeze()  # so that collections in a fork neither look through all this nor copy it
    for line in sys.stdin:
        said = json.loads(line)
        if "start" in said:
            answer: int | None = _start(Order.of(said["start"]))
        else:
            answer = _wait(said["wait"], said["most_s"])
        print(json.dumps(answer), flush=True)


def main(arguments: list[str]) -> int:
    """Do what the command line of this file says."""
    verb, *rest = arguments
    if verb == "run":
        prepare()
        return app.main(rest)
    _serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
