"""Where the time goes: a clock of named stages that never makes the device wait; figures of memory, and its end."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specvlm import host


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class StageClock:
    """Sums wall time per stage.

    On CUDA, stages inside a round are measured with events and read at the end, so that measuring adds no
    synchronisation; elsewhere with the host's monotonic clock.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: where the timed work runs."""
        self._cuda = device.type == "cuda"
        self._host_s: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._round_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a piece of device work, until `settle`."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._round_s[name] = time.perf_counter() - start
            return
        begin, end = _event(), _event()
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    @contextmanager
    def host_stage(self, name: str) -> Iterator[None]:
        """Time a piece of host work, or device work that ends in a synchronisation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._host_s[name] = self._host_s.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def awaited_stage(self, name: str) -> Iterator[None]:
        """Time a piece of device work to its very end, for which the host waits."""
        with self.host_stage(name):
            yield
            if self._cuda:
                torch.cuda.synchronize()

    def settle(self) -> dict[str, float]:
        """Add up the stages since the last call, and return them. Call it right after a synchronisation."""
        for name, begin, end in self._events:
            self._round_s[name] = begin.elapsed_time(end) / 1000.0
        settled, self._round_s, self._events = self._round_s, {}, []
        for name, seconds in settled.items():
            self._host_s[name] = self._host_s.get(name, 0.0) + seconds
        return settled

    def seconds(self, name: str) -> float:
        """Time of a stage so far."""
        return self._host_s.get(name, 0.0)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the device's allocator can; a process's own peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator since the last reset (CUDA), or of this process since its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on the device; of a CPU, what the system can give; None: it does not tell.

    A limit of the process's control group (a container's, a Slurm job's) counts too.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return host.free_memory_bytes()


def device_words(device: torch.device) -> str:
    """The device in words, e.g. `cpu` or `NVIDIA H200`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
