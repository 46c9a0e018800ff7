"""What this process may use of its machine: cores and memory. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_bytes() -> int | None:
    """What the system can still give; None: it does not tell.

    A limit of the process's control group (a container's, a Slurm job's) counts too.
    """
    free = [_available_bytes(), _group_bytes()]
    return min((one for one in free if one is not None), default=None)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    free = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next((kibibytes << 10 for kibibytes in free), None)


def _group_bytes() -> int | None:
    """What the control group has left (cgroup v2)."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        most, taken = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(most) - int(taken))
    except (OSError, ValueError):  # no such system, no limit
        return None
