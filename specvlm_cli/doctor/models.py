"""Devices, a checkpoint and a tiny generation, asked of a process of its own (`probe.py`), which may hang or crash."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specvlm.preset import find_preset
from specvlm.words import amount, counted
from specvlm_cli.checkpoints import on_disk
from specvlm_cli.console.safe_text import clean
from specvlm_cli.doctor.checks import CheckVerdict, fail, ok, warn

_NVIDIA, _AMD = Path("/proc/driver/nvidia/version"), Path("/dev/kfd")
DEVICES_S, CHECKPOINT_S, GENERATION_S, _FAREWELL_S = 120.0, 1200.0, 600.0, 2.0
_REPORT = "run it with the same arguments in a fresh environment; report it if it is the same there"


class Probe:
    """The process that imports torch. Ended with the context, whatever it is doing."""

    def __init__(self, preset: str, target: str | None = None, draft: str | None = None) -> None:
        self._preset, self._target = preset, target
        checkpoints = [name for name in (target, draft) if name is not None]
        self._command = [sys.executable, "-m", "specvlm_cli.doctor.probe", preset, *checkpoints]
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._words: list[str] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, and dies when that lets it
                self._process.wait(_FAREWELL_S)
        for thread in self._threads:
            thread.join(_FAREWELL_S)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Return its next answer; it is started by the first call.

        Raises:
            RuntimeError: It died, hung, or could not do what was asked; the message says why.
        """
        process = self._process or self._start()
        try:
            found = self._answers.get(timeout=limit_s)
        except queue.Empty:
            process.kill()
            raise RuntimeError(f"no answer within {limit_s:g} s; a driver or a device hangs") from None
        if found is None:
            self._answers.put(None)
            raise RuntimeError(self._death(process))
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for target in (self._hear, self._overhear):
            thread = threading.Thread(target=target, args=(self._process,), daemon=True, name="probe")
            thread.start()
            self._threads.append(thread)
        return self._process

    def _hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._answers.put(json.loads(line))
        process.wait()
        self._answers.put(None)

    def _overhear(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self._words = [*self._words[-4:], line.strip()]

    def _death(self, process: subprocess.Popen[str]) -> str:
        code = process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = clean(next((line for line in reversed(self._words) if line), ""))[:200]
        return f"its process ended with {how}" + (f": {last}" if last else "")

    # The checks

    def devices(self) -> CheckVerdict:
        """Tell which devices torch can use."""
        found = self.answer(DEVICES_S)
        built = f"torch {found['torch']}" + "".join(
            f" for {name} {found[key]}" for key, name in (("cuda", "CUDA"), ("rocm", "ROCm")) if found[key]
        )
        broken = [f"{one['name']}: {one['error']}" for one in found["devices"] if "error" in one]
        if broken:
            return fail(f"{built}; {'; '.join(broken)}", "install the torch that fits this GPU and driver")
        if found["devices"]:
            return _usable(built, found["devices"])
        return _none(built, found)

    def checkpoint(self) -> CheckVerdict:
        """Tell whether a target's family, weights, tokenizer and template are in order, and whether the draft fits."""
        try:
            found = self.answer(CHECKPOINT_S)
        except RuntimeError as error:
            problem, _, fix = str(error).partition(": ")[2].rpartition("; ")
            return fail(problem or str(error), fix)
        words = f"{self._target}: {found['family']}, {_counted(found['parameters'])} parameters"
        words += f", {found['context']:,} tokens of context" if found["context"] else ""
        words += f"; {found['frames']} drawn frames are {found['video']} video tokens of {found['prompt']}"
        words += f"; the draft {found['draft']} fits" if found["draft"] else ""
        if found["warnings"]:
            return warn(words, found["warnings"][0])
        return ok(words)

    def generation(self) -> CheckVerdict:
        """Tell whether both ways of decoding give the same tokens."""
        if missing := _missing(self._preset):
            fix = f"specvlm caption --preset {self._preset} downloads it; specvlm presets shows its size"
            return fail(f"not on disk: {missing}", fix)
        try:
            found = self.answer(GENERATION_S)
        except RuntimeError as error:
            return fail(f"{self._preset}: {error}", _REPORT)
        words = f"{self._preset} on {found['device']}, {found['tokens']} tokens"
        times = f"{found['plain_s']:.2f} s plainly, {found['ours_s']:.2f} s with the draft"
        if found["same"]:
            return ok(f"{words}, the same both ways: {times}")
        text = f"{words} differ between plain and speculative decoding ({times})"
        fix = "in bf16 a tie may fall either way; in float32 it is a fault, please report it"
        return warn(text, fix) if "cuda" in found["device"].lower() else fail(text, fix)


def _counted(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 10**9 else f"{parameters / 1e6:.1f} million"


def _missing(preset: str) -> str:
    """Return the models of a preset that are not, or not wholly, on disk; nothing: they are."""
    pair = find_preset(preset)
    assert pair is not None
    return ", ".join(model for model in (pair.target, pair.draft) if on_disk(model) != "yes")


def _usable(built: str, devices: list[dict[str, Any]]) -> CheckVerdict:
    shown = "; ".join(map(_device, devices))
    if any(not one["bf16"] for one in devices):
        return warn(f"{built}; {shown}", "no bf16 here: use --dtype float16")
    if any(one.get("free", 1) < 0.2 * one.get("total", 1) for one in devices):
        return warn(f"{built}; {shown}", "something else holds most of its memory; nvidia-smi shows what")
    return ok(f"{built}; {shown}")


def _device(device: dict[str, Any]) -> str:
    if "total" not in device:
        return str(device["name"])
    return f"{device['name']}, {amount(device['free'])} of {amount(device['total'])} free"


def _none(built: str, found: dict[str, Any]) -> CheckVerdict:
    """Tell why there is no device: none is there, torch is not built for it, or the driver does not fit."""
    said = f"; torch says: {found['said'][0]}" if found["said"] else ""
    if _NVIDIA.exists() and not found["cuda"]:
        text = f"{built} is not built for CUDA, but this machine has an NVIDIA driver"
        return fail(text, "install torch for CUDA, see pytorch.org")
    if _NVIDIA.exists():
        text = f"{built} finds no device, driver {_driver()}{said}"
        return fail(text, "update the driver or install torch for an older CUDA; unset CUDA_VISIBLE_DEVICES")
    if _AMD.exists() and not found["rocm"]:
        text = f"{built} is not built for ROCm, but this machine has an AMD GPU driver"
        return fail(text, "install torch for ROCm, see pytorch.org")
    text = f"{built}; no GPU, {counted(found['threads'], 'thread')}{said}"
    return warn(text, "a CPU is enough for the demo pairs only; real models need a GPU")


def _driver() -> str:
    words = _NVIDIA.read_text().split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")
