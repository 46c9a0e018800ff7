"""Measure what the batch tool costs beside the models: `specvlm caption` over clips drawn for it.

    python benchmarks/job_layer.py --clips 200 --preset demo --caption-flags "--batch-size 16"

One run of the real command in this process, with its real worker and reader processes. The workers measure their own
stages of every video (they stand in the rows); stages overlap, as the next videos are preprocessed while others are
decoded. What the job layer takes is processor time of the coordinator, and time in which workers wait. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import specvlm
from recipes.demo.clips import render, scene_for, seed_for
from recipes.demo.examples import frame_times, write_video
from specvlm_cli import app
from specvlm_cli.caption import coordinator

_STAGES = ("preprocess_s", "vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")


class _Watch:
    """Takes the wall and CPU time of the captioning itself, from loaded models to closed parts."""

    def __init__(self) -> None:
        self.workers_s = self.cpu_s = self.waited_s = 0.0
        self._run = coordinator.Coordinator.run
        coordinator.Coordinator.run = lambda *given: self._timed(*given)  # type: ignore[method-assign]

    def _timed(self, one: coordinator.Coordinator, *given: Any) -> None:
        began, used, workers = time.perf_counter(), _own_cpu_s(), len(one._crew)
        self._run(one, *given)
        self.workers_s = workers * (time.perf_counter() - began)
        self.cpu_s = _own_cpu_s() - used
        self.waited_s = one.waited_s


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write_clips(folder: Path, number: int) -> None:
    """Draw clips of four seconds that no model was trained on."""
    times = frame_times(False)
    for index in range(number):
        scene = scene_for(seed_for("held-out", index))
        write_video(folder / f"clip-{index:04d}.mp4", render(scene, times, 168, 224), times)


def main() -> None:
    """Draw, caption, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--caption-flags", default="", help="further flags of specvlm caption, in one word")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="specvlm-job-") as folder:
        videos, out = Path(folder, "videos"), Path(folder, "out")
        videos.mkdir()
        write_clips(videos, arguments.clips)
        watch = _Watch()
        flags = shlex.split(arguments.caption_flags)
        code = app.main(["caption", str(videos), "-o", str(out), "--preset", arguments.preset, "-q", *flags])
        assert code == 0, f"exit code {code}"
        rows = pq.read_table(out / "captions").to_pylist()
        assert len(rows) == arguments.clips
        settings = json.loads((out / ".specvlm" / "run.json").read_text())
    report(rows, watch, settings)


def report(rows: list[dict[str, Any]], watch: _Watch, settings: dict[str, Any]) -> None:
    """Print the shares, and where they come from."""
    stages_s = sum(row[stage] for row in rows for stage in _STAGES)
    own_s = sum(row["total_s"] - row["video_decode_s"] for row in rows)
    decode_s = sum(row["video_decode_s"] for row in rows)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, specvlm {specvlm.__version__}, numpy {np.__version__},"
    )
    print(f"{len(rows)} clips, target {settings['settings']['target']}, load {os.getloadavg()[0]:.1f}\n")
    print("| | seconds | share of captioning |\n|---|---:|---:|")
    for name, seconds in (
        ("captioning, wall time of all workers", watch.workers_s),
        ("the workers' own time for the videos", own_s),
        ("of that, the stages in the rows", stages_s),
        ("workers with free slots and nothing to fill them with", watch.waited_s),
        ("CPU time of the coordinator", watch.cpu_s),
        ("reading, in other processes meanwhile", decode_s),
    ):
        print(f"| {name} | {seconds:.2f} | {100 * seconds / watch.workers_s:.2f} % |")
    print(f"\nThe coordinator: {1000 * watch.cpu_s / len(rows):.1f} ms of processor time a video.")


if __name__ == "__main__":
    main()
