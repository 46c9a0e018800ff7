"""Time the two video readers on one drawn file, alternating.

    python benchmarks/reading.py

Draws a minute of 640 x 360 h264 and reads frames of it with decord and with PyAV in turn; prints Markdown.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from specvlm.config import FrameSettings
from specvlm.demo.clips import render, scene_for, seed_for
from specvlm.demo.examples import write_video
from specvlm.video import read_video

SECONDS, RATE, TURNS = 60, 12, 7


def draw(path: Path) -> None:
    """Write the file."""
    times = (np.arange(SECONDS * RATE) / RATE).astype(np.float32)
    scene = scene_for(seed_for("examples", 0))
    write_video(path, render(scene, times % 4.0, 360, 640), times)


def main() -> None:
    """Draw, read, report."""
    print("| frames of 720 | decord s | PyAV s | decord / PyAV |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minute.mp4"
        draw(path)
        for frames in (8, 32, 120):
            taken: dict[str, list[float]] = {"decord": [], "pyav": []}
            for turn in range(TURNS + 1):
                for backend in ("decord", "pyav"):
                    start = time.perf_counter()
                    read_video(path, FrameSettings(num_frames=frames, backend=backend))  # type: ignore[arg-type]
                    if turn:
                        taken[backend].append(time.perf_counter() - start)
            ratio = statistics.median(a / b for a, b in zip(taken["decord"], taken["pyav"], strict=True))
            decord, pyav = (statistics.median(taken[name]) for name in ("decord", "pyav"))
            print(f"| {frames} | {decord:.3f} | {pyav:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
