"""What GPUs this machine has, found out without importing torch, which takes seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from specvlm_cli.process import python_command

# NVIDIA, NVIDIA in WSL, AMD, Intel and others
_DRIVERS = tuple(map(Path, ("/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd", "/dev/dri")))
_NVIDIA = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # MiB, a line for each
_TORCH = (
    "import torch; "
    "print(*(torch.cuda.get_device_properties(n).total_memory >> 20 for n in range(torch.cuda.device_count())))"
)
_LONGEST_S = 60.0


def may_have_gpu() -> bool:
    """Say whether there may be a GPU: whether there is a driver of one, or this is no Linux."""
    return sys.platform != "linux" or any(driver.exists() for driver in _DRIVERS)


def smallest_memory_bytes() -> int | None:
    """Return the memory of the GPU that has least; None: there is no CUDA device."""
    if not may_have_gpu() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    sizes = [int(size) for size in _said(_NVIDIA) or _said(python_command(_TORCH)) if int(size)]
    return min(sizes) << 20 if sizes else None


def _said(command: list[str]) -> list[str]:
    """Return the numbers that a program prints; none where it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LONGEST_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"\d+", done.stdout) if done.returncode == 0 else []
