"""A real Slurm on this one host: munged, slurmctld and slurmd in a folder of their own, and nothing elsewhere.

It knows how to start, how to ask and how to go away; it knows nothing of what the jobs do. Four tasks run at
the same time whatever the machine has, because the node declares its processors instead of counting them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd")
NODE_CPUS = 8
START_S = 30.0  # for the daemons to answer
_SBIN = ("/usr/sbin", "/usr/local/sbin")

_CONFIG = """\
ClusterName=specvlm-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
CommunicationParameters=EnableIPv6
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
JobRequeue=1
KillWait=30
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmctldTimeout=30
SlurmdTimeout=30
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 Gres=gpu:{cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=60 State=UP
"""


@dataclass(frozen=True, slots=True)
class Task:
    """How one task of an array stands."""

    index: int
    state: str  # Slurm's word, e.g. RUNNING
    exit_code: int
    restarts: int


class Cluster:
    """A Slurm that answers."""

    def __init__(self, root: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def call(self, *command: str, given: str | bytes = "", check: bool = True) -> str:
        """Run one of Slurm's commands and return what it said."""
        done = subprocess.run(
            command,
            input=given if isinstance(given, bytes) else given.encode(),
            env=self.environment,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, (command, done.stderr.decode())
        return done.stdout.decode(errors="surrogateescape")

    def submit(self, script: str | bytes) -> int:
        """Submit a batch script and return the job's number."""
        return int(self.call("sbatch", "--parsable", given=script).strip())

    def tasks(self, job: int) -> dict[int, Task]:
        """Return the tasks of an array that have been started at least once, by their place in it."""
        said = self.call("scontrol", "--oneliner", "show", "job", str(job), check=False)
        found = (_task(line) for line in said.splitlines() if re.search(r"ArrayTaskId=[0-9]+(?!\S)", line))
        return {task.index: task for task in found}

    def wait_for_end(self, job: int, timeout_s: float) -> dict[int, Task]:
        """Wait until no task of a job is pending, running or being cleared away."""
        deadline = time.monotonic() + timeout_s
        while self.call("squeue", "--noheader", "--jobs", str(job), "--format=%T", check=False).strip():
            assert time.monotonic() < deadline, self.call("scontrol", "show", "job", str(job), check=False)
            time.sleep(0.2)
        return self.tasks(job)


def why_not() -> str | None:
    """Say why no cluster can be started here; None: one can."""
    missing = [name for name in (*DAEMONS, "sbatch", "scontrol") if not _program(name)]
    if missing:
        return f"{', '.join(missing)}: not installed; apt-get install slurm-wlm"
    if os.geteuid() != 0:
        return "a Slurm that starts jobs has to be started by root"
    return None


@contextmanager
def running(root: Path) -> Iterator[Cluster]:
    """Start a Slurm whose files are all below `root`, and leave no process behind."""
    _write_files(root)
    daemons: list[subprocess.Popen[bytes]] = []
    cluster = Cluster(root)
    try:
        daemons.extend(_start(command, root, cluster.environment) for command in _commands(root))
        _wait_until_idle(cluster, daemons, root)
        yield cluster
    finally:
        _kill(root, daemons)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))


def _write_files(root: Path) -> None:
    for folder in ("state", "spool"):
        (root / folder).mkdir(parents=True)
    root.chmod(0o755)
    controller_port, node_port = free_ports(2)
    config = _CONFIG.format(
        host=socket.gethostname().partition(".")[0],
        controller_port=controller_port,
        node_port=node_port,
        root=root,
        cpus=NODE_CPUS,
    )
    (root / "slurm.conf").write_text(config)
    for number in range(NODE_CPUS):  # files that stand for devices, so that a job may ask for GPUs
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={root}/gpu[0-{NODE_CPUS - 1}]\n")
    (root / "cgroup.conf").write_text("")
    key = root / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _commands(root: Path) -> list[list[str]]:
    """Return the daemons' command lines, each to stay in the foreground."""
    munge_files = [
        f"--{option}={root}/munge.{suffix}"
        for option, suffix in (
            ("socket", "socket"),
            ("key-file", "key"),
            ("pid-file", "pid"),
            ("seed-file", "seed"),
        )
    ]
    config = ["-D", "-f", str(root / "slurm.conf")]
    arguments = (["--foreground", "--force", *munge_files], ["-c", *config], ["-c", *config])
    return [[str(_program(name)), *more] for name, more in zip(DAEMONS, arguments, strict=True)]


def _start(command: list[str], root: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (root / f"{Path(command[0]).name}.out").open("ab") as said:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, cwd=root
        )


def _wait_until_idle(cluster: Cluster, daemons: list[subprocess.Popen[bytes]], root: Path) -> None:
    deadline = time.monotonic() + START_S
    while "idle" not in cluster.call("sinfo", "--noheader", "--format=%t", check=False).split():
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in _logs(root))
            raise AssertionError(f"Slurm did not come up; ended: {ended}\n{logs}")
        time.sleep(0.1)


def _logs(root: Path) -> list[Path]:
    return sorted([*root.glob("*.out"), *root.glob("*.log")])


def processes(root: Path) -> list[int]:
    """Return what still runs of a cluster, its jobs included, known by the configuration that it was started with."""
    mark = f"SLURM_CONF={root}/slurm.conf".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _kill(root: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End the daemons, slurmd first, then its helpers and jobs. Nothing of theirs is needed any more."""
    for daemon in reversed(daemons):
        daemon.kill()
        daemon.wait()
    deadline = time.monotonic() + 10
    while (left := processes(root)) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _task(line: str) -> Task:
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return Task(
        index=int(fields["ArrayTaskId"]),
        state=fields["JobState"],
        exit_code=int(fields["ExitCode"].partition(":")[0]),
        restarts=int(fields["Restarts"]),
    )
