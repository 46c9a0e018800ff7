"""Python, packages, processors, memory, limits, and the job that we are part of. Changes nothing."""

from __future__ import annotations

import os
import platform
import resource
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from specvlm.host import usable_cores
from specvlm.words import amount
from specvlm_cli.doctor.checks import CheckVerdict, fail, ok, warn

_GB = 10**9
_DISTRIBUTION = "specvlm"
_SCHEDULERS = {
    "SLURM_JOB_ID": "Slurm",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "SKYPILOT_TASK_ID": "SkyPilot",
    "KUBERNETES_SERVICE_HOST": "Kubernetes",
    "RANK": "torchrun",
}


def python() -> CheckVerdict:
    """Look at the interpreter."""
    version = platform.python_version()
    detail = f"{version} on {platform.system()} {platform.machine()}, SQLite {sqlite3.sqlite_version}"
    try:
        wanted = str(metadata.metadata(_DISTRIBUTION).json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        return warn(f"{detail}; specvlm runs from its sources", "pip install -e . makes its versions known")
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return fail(detail, f"specvlm needs Python {wanted}")
    if sys.maxsize < 1 << 32:
        return fail(f"{detail}, 32 bit", "install a 64-bit Python")
    return ok(detail)


def packages() -> CheckVerdict:
    """Hold the installed packages against what specvlm declares."""
    try:
        declared = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return warn("specvlm is not installed, only its sources are here", "pip install -e .")
    needed = [one for one in map(Requirement, declared) if _applies(one)]
    wrong = list(_wrong(needed))
    if wrong:
        names = " ".join(
            f"'{one.name}{one.specifier}'" for one in needed if one.name in {name for name, _ in wrong}
        )
        return fail("; ".join(text for _, text in wrong), f"pip install {names}")
    shown = [
        one for one in ("torch", "transformers", "pyarrow", "av") if one in {need.name for need in needed}
    ]
    return ok(
        ", ".join(f"{name} {metadata.version(name)}" for name in shown)
        + f"; versions of all {len(needed)} fit"
    )


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _wrong(needed: list[Requirement]) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) of each package that is missing or out of its bounds."""
    for one in needed:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield one.name, f"{one.name} is not installed"
            continue
        if not one.specifier.contains(version, prereleases=True):
            yield one.name, f"{one.name} {version}, needed {one.specifier}"


def processors() -> CheckVerdict:
    """Count the processors that we may use."""
    usable = usable_cores()
    quota = _cpu_quota()
    detail = f"{usable} of {os.cpu_count()} usable"
    if quota is not None and quota < usable:
        return warn(
            f"{detail}, but this container may use {quota:.1f} at a time", "give it more, or fewer workers"
        )
    return (
        ok(detail)
        if usable > 1
        else warn(detail, "with one processor, reading is not hidden behind generation")
    )


def _cpu_quota() -> float | None:
    for folder in _cgroup_folders("cpu"):
        try:
            limit, period = (folder / "cpu.max").read_text().split()
            if limit != "max":
                return int(limit) / int(period)
        except (OSError, ValueError):
            continue
    return None


def memory() -> CheckVerdict:
    """Look at the memory of this machine, and at the limit of the container or job."""
    known = _meminfo()
    total, free = known.get("MemTotal", 0), known.get("MemAvailable", 0)
    limit = _memory_limit()
    detail = f"{amount(free)} of {amount(total)} free"
    if limit is not None and limit < total:
        detail += f", limited to {amount(limit)} by the container or job"
    least = min(free, limit or free)
    if not total:
        return ok("not known on this system")
    if least < 2 * _GB:
        return fail(detail, "the demo pair needs 2 GB; free some, or ask the scheduler for more")
    return (
        ok(detail)
        if least >= 8 * _GB
        else warn(detail, "a 7B model is loaded through memory; 16 GB are safe")
    )


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if value.strip().endswith("kB")}


def _memory_limit() -> int | None:
    """Return the least of the limits on this process's group and on those above it."""
    found = []
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < 1 << 60:
                found.append(int(text))
    return min(found, default=None)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of our control group and of those above it, for both versions of control groups."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        folder = base / group.lstrip("/")
        yield from (one for one in (folder, *folder.parents) if one == base or base in one.parents)


def shared_memory() -> CheckVerdict:
    """Look at /dev/shm, through which containers often starve PyTorch."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return ok("no /dev/shm on this system, none needed")
    total, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    detail = f"{amount(free)} of {amount(total)} free"
    if free < _GB:
        return warn(detail, "in Docker: --shm-size=2g, or --ipc=host")
    return ok(detail)


def limits() -> CheckVerdict:
    """Look at what this shell lets a process do."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if locked == resource.RLIM_INFINITY else amount(locked)
    detail = f"{files} open files (at most {most_files}), {shown} of locked memory"
    if 0 <= files < 1024:
        return warn(detail, f"ulimit -n {min(most_files, 4096)}")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        return warn(
            f"{detail}, {amount(space)} of address space",
            "ulimit -v unlimited: CUDA maps far more than it uses",
        )
    return ok(detail)


def job(environment: Mapping[str, str] = os.environ) -> CheckVerdict:
    """Say which scheduler's job we are in, and what --shard auto would make of it."""
    from specvlm_cli.exits import UsageError
    from specvlm_cli.run.shard import parse_shard

    names = [name for variable, name in _SCHEDULERS.items() if variable in environment]
    if not names:
        return ok("no job scheduler")
    detail = ", ".join(names)
    if identity := environment.get("SLURM_JOB_ID"):
        detail += f", job {identity}"
    try:
        shard = parse_shard("auto", environment)
    except UsageError as error:
        return warn(detail, str(error)) if "SLURM_ARRAY_TASK_ID" in environment else ok(f"{detail}, no array")
    return ok(f"{detail}, --shard auto is {shard.index}/{shard.count}")
