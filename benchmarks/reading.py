"""Measure the processor time of the two video readers on drawn files, alternating.

    python benchmarks/reading.py

Draws a minute of 640 x 360 as h264 in mp4 and vp9 in webm, and reads frames of it with PyAV and, of the mp4, with
decord in turn; prints Markdown.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.demo.clips import render, scene_for, seed_for
from recipes.demo.examples import write_video
from specvlm.config import BackendName, FrameSettings
from specvlm.video import read_video

SECONDS, RATE, TURNS = 60, 12, 7
_FILES: dict[str, tuple[BackendName, ...]] = {"minute.mp4": ("decord", "pyav"), "minute.webm": ("pyav",)}


def draw(path: Path) -> None:
    """Write the file."""
    times = (np.arange(SECONDS * RATE) / RATE).astype(np.float32)
    scene = scene_for(seed_for("examples", 0))
    write_video(path, render(scene, times % 4.0, 360, 640), times)


def main() -> None:
    """Draw, read, report."""
    print("| file | frames of 720 | decord s | PyAV s | decord / PyAV |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, backends in _FILES.items():
            draw(Path(folder) / name)
            for frames in (8, 32, 120):
                taken = measure(Path(folder) / name, frames, backends)
                medians = {backend: f"{statistics.median(times):.3f}" for backend, times in taken.items()}
                pairs = zip(taken.get("decord", []), taken["pyav"], strict=False)
                ratios = [f"{statistics.median(a / b for a, b in pairs):.2f}"] if "decord" in taken else []
                cells = [name, frames, medians.get("decord", ""), medians["pyav"], *(ratios or [""])]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def measure(path: Path, frames: int, backends: Sequence[BackendName]) -> dict[BackendName, list[float]]:
    """Processor seconds of each read by each reader; the first turn warms up."""
    taken: dict[BackendName, list[float]] = {backend: [] for backend in backends}
    for turn in range(TURNS + 1):
        for backend in backends:
            start = time.process_time()
            read_video(path, FrameSettings(num_frames=frames, backend=backend))
            if turn:
                taken[backend].append(time.process_time() - start)
    return taken


if __name__ == "__main__":
    main()
