"""Large manifests through the real command: how soon it is ready to work, and how soon it sees there is nothing to do.

    python -m tests.faults.scale --rows 1000000 --finished 100000

The first start is watched up to the moment in which it would load the models. For the second figure a run is made
in which every row is done, with the product's own ledger and parts and made-up captions, and the command is started
again on it, in a process of its own. Exits 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specvlm_cli import app
from specvlm_cli.caption.coordinator import Coordinator
from specvlm_cli.caption.engine import Models
from specvlm_cli.run.ledger import Claim
from specvlm_cli.run.parts import CAPTION_SCHEMA
from specvlm_cli.run.rows import Provenance
from specvlm_cli.stopping import Stop
from tests.cli.conftest import snapshot

READY_S, READY_MB, FINISHED_S = 20.0, 500, 2.0
_WATCHED = """
import resource, sys, time
began = time.time()
from specvlm_cli import app
from specvlm_cli.caption import coordinator
def ready(self, stop):
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(time.time() - began, peak_mb)
    stop.ask("measured")
coordinator.Coordinator.load = ready
sys.exit(app.main(sys.argv[1:]))
"""


def write_manifest(path: Path, rows: int) -> None:
    """Write a manifest with parts of videos."""
    table = {
        "video": [f"clips/{number % 1000:03d}/video-{number:07d}.mp4" for number in range(rows)],
        "start": [float(number % 60) for number in range(rows)],
        "end": [float(number % 60 + 5) for number in range(rows)],
    }
    pq.write_table(pa.table(table), path)


def measure_ready(manifest: Path, out: Path) -> tuple[float, int]:
    """Return the seconds until a first start is ready to work, and its peak memory in MB."""
    command = [
        sys.executable,
        "-c",
        _WATCHED,
        "caption",
        str(manifest),
        "-o",
        str(out),
        "-q",
        "--preset",
        "demo",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 75, done.returncode
    seconds, peak_mb = done.stdout.split()
    return float(seconds), int(peak_mb)


def finish(manifest: Path, out: Path) -> None:
    """Run the command with workers that caption everything in no time, with made-up captions."""

    def load(self: Coordinator, stop: Stop) -> Models:
        return Models("made up", None, None, "none")

    def run(self: Coordinator, stop: Stop, provenance: Provenance) -> None:
        with self._ledger.writing():
            for claim in self._ledger.pending(-1, 1 << 30):
                self._ledger.finish(claim, [made_up_row(claim, provenance.config_hash)])
        self.close_parts()

    before = Coordinator.load, Coordinator.run
    Coordinator.load, Coordinator.run = load, run  # type: ignore[method-assign]
    try:
        assert app.main(["caption", str(manifest), "-o", str(out), "-q", "--preset", "demo"]) == 0
    finally:
        Coordinator.load, Coordinator.run = before  # type: ignore[method-assign]


def made_up_row(claim: Claim, config_hash: str) -> dict[str, Any]:
    """Return a row with something in every column that the job layer itself reads."""
    item = claim.item
    row: dict[str, Any] = dict.fromkeys(CAPTION_SCHEMA.names)
    return row | {
        "id": item.id,
        "path": item.path.decode(),
        "start": item.start_s,
        "end": item.end_s,
        "prompt_index": 0,
        "caption": "a caption of some length, " * 8,
        "created_at": "2026-01-01T00:00:00.000000+00:00",
        "config_hash": config_hash,
        "attempts": 1,
    }


def measure_finished(manifest: Path, out: Path, times: int) -> list[float]:
    """Return the seconds that a start on a finished run takes, each in a process of its own."""
    before = snapshot(out)
    command = [
        sys.executable,
        "-m",
        "specvlm_cli",
        "caption",
        str(manifest),
        "-o",
        str(out),
        "--preset",
        "demo",
    ]
    taken_s = []
    for _ in range(times):
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        taken_s.append(time.perf_counter() - began)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "nothing to do" in done.stderr
    assert snapshot(out) == before, "a start that had nothing to do touched a file"
    return taken_s


def main(arguments: list[str] | None = None) -> int:
    """Measure both, print them, say whether they are within bounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--finished", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="specvlm-scale-") as name:
        folder = Path(name)
        write_manifest(folder / "large.parquet", given.rows)
        ready = [measure_ready(folder / "large.parquet", folder / f"out-{turn}") for turn in range(2)]
        again = measure_ready(folder / "large.parquet", folder / "out-0")
        write_manifest(folder / "done.parquet", given.finished)
        finish(folder / "done.parquet", folder / "done")
        finished_s = measure_finished(folder / "done.parquet", folder / "done", given.times)
    ready_s, peak_mb = max(seconds for seconds, _ in ready), max(peak for _, peak in ready)
    print(f"first start, {given.rows} rows: ready after {ready_s:.1f} s, peak {peak_mb} MB of memory")
    print(f"second start, {given.rows} rows pending: ready after {again[0]:.1f} s, peak {again[1]} MB")
    print(
        f"finished run, {given.finished} rows: {statistics.median(finished_s):.2f} s median of {given.times}, "
        f"longest {max(finished_s):.2f} s"
    )
    return int(ready_s >= READY_S or peak_mb >= READY_MB or statistics.median(finished_s) >= FINISHED_S)


if __name__ == "__main__":
    sys.exit(main())
