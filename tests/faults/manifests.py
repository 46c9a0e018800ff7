"""Manifests at full size: made-up ones, damaged ones, bombs, and one of a million rows.

    python -m tests.faults.manifests --cases 3000 --mutants 1200 --rows 1000000

Whatever a manifest holds, `specvlm caption MANIFEST -n` ends with 0, 2 or 3, an error is one line, and memory is
bounded. Prints a table, and ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, seed, settings

from specvlm_cli import app
from specvlm_cli.inputs import InputOptions
from tests.cli import manifest_cases
from tests.faults.read_manifest import peak_mb

MOST_RSS_MB = 500
MOST_SECONDS = 20.0  # for a million rows
_MILLION = 1_000_000


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    outcome: str
    seconds: float
    rss_mb: int
    violation: str = ""

    def __str__(self) -> str:
        mark = f"  VIOLATION: {self.violation}" if self.violation else ""
        return f"{self.what:<46} {self.seconds:8.2f} s {self.rss_mb:5d} MB  {self.outcome}{mark}"


# Through the command line, in this process


def run(path: Path, out: Path, options: InputOptions) -> tuple[int, str]:
    """Return exit code and stderr of a dry run, having checked both.

    Raises:
        AssertionError: The code is none of 0, 2 and 3, or an error is not one line.
    """
    arguments = [
        "caption",
        str(path),
        "-n",
        "-q",
        "--preset",
        "demo",
        "-o",
        str(out),
        *manifest_cases.flags(options),
    ]
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = int(app.main(arguments))
    said = stderr.getvalue()
    assert code in (0, 2, 3), (code, said)
    lines = said.splitlines(keepends=True)
    errors = [line for line in lines if not line.startswith("would fail: ")]
    assert len(errors) == (code == 2), said
    for line in lines:
        manifest_cases.check_line(line.removesuffix("\n"))
    assert not out.exists(), "a dry run writes nothing"
    return code, said


def made(cases: int, folder: Path) -> Line:
    """Run manifests that hypothesis makes up."""
    codes: Counter[int] = Counter()

    @seed(0)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(case=manifest_cases.cases())
    def check(case: manifest_cases.Case) -> None:
        path = case.write(folder)
        manifest_cases.read(path, case.options)
        codes[run(path, folder / "out", case.options)[0]] += 1

    return _timed(f"{cases} made-up manifests", check, codes)


def mutated(mutants: int, folder: Path) -> Line:
    """Run manifests that were good before a few bytes of them were changed."""
    codes: Counter[int] = Counter()

    def check() -> None:
        dice = random.Random(0)
        originals = list(_originals(folder))
        for number in range(mutants):
            original = originals[number % len(originals)]
            path = folder / f"mutant{original.suffix}"
            path.write_bytes(_damaged(original.read_bytes(), dice))
            codes[run(path, folder / "out", InputOptions(keep_columns=("score",)))[0]] += 1

    return _timed(f"{mutants} damaged manifests", check, codes)


def _timed(what: str, check: Callable[[], None], codes: Counter[int]) -> Line:
    began, before_mb = time.monotonic(), peak_mb()
    violation = ""
    try:
        check()
    except Exception as error:
        violation = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    rss = peak_mb()
    if rss - before_mb > MOST_RSS_MB:
        violation = violation or f"more than {MOST_RSS_MB} MB"
    outcome = ", ".join(f"exit {code}: {count}" for code, count in sorted(codes.items()))
    return Line(what, outcome, time.monotonic() - began, rss, violation)


def _originals(folder: Path) -> Iterator[Path]:
    table = _table(2000)
    for name, options in (
        ("plain", {"use_dictionary": False, "compression": "none"}),
        ("zstd", {"compression": "zstd", "row_group_size": 300}),
        ("checked", {"write_page_checksum": True, "data_page_version": "2.0"}),
    ):
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, **options)
        yield path
    for suffix in (".csv", ".jsonl"):
        yield _written(table, folder / f"good{suffix}")


def _damaged(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 10, 100))):
        place = (
            dice.randrange(len(data))
            if dice.random() < 0.7
            else len(data) - 1 - dice.randrange(2000) % len(data)
        )
        match dice.randrange(5):
            case 0:
                data[place] ^= 1 << dice.randrange(8)
            case 1:
                data[place] = dice.randrange(256)
            case 2:
                data[place : place + 64] = bytes(len(data[place : place + 64]))
            case 3:
                data[place:place] = dice.randbytes(dice.randrange(1, 64))
            case 4:
                del data[place : place + dice.randrange(1, 64)]
    return bytes(data[: dice.randrange(1, len(data))] if dice.random() < 0.05 else data)


# In a process of its own, whose memory is its own


def measure(
    what: str, path: Path, keep: str = "", *, start: bool = False, most_seconds: float | None = None
) -> Line:
    """Read a manifest to its end in a child process, or make a whole dry run of it there."""
    command = [sys.executable, "-m", "tests.faults.read_manifest", str(path), "--keep", keep]
    done = subprocess.run(command + ["--start"] * start, capture_output=True, text=True, check=False)
    if done.returncode:
        return Line(what, "died", 0.0, 0, f"exit {done.returncode}: {done.stderr[-300:]}")
    found = json.loads(done.stdout)
    name = f"{what}, {path.suffix} ({path.stat().st_size / 1e6:.2f} MB)"
    outcome = "a whole start" if start else f"{found['items']} items, {found['problems']} with a problem"
    violation = ""
    if found["rss_mb"] > MOST_RSS_MB:
        violation = f"more than {MOST_RSS_MB} MB"
    elif most_seconds is not None and (found["error"] or found["seconds"] > most_seconds):
        violation = f"not read within {most_seconds:.0f} s"
    outcome = found["error"].removeprefix(f"{path.parent}/")[:150] if found["error"] else outcome
    return Line(name, outcome, found["seconds"], found["rss_mb"], violation)


def large(rows: int, folder: Path) -> Iterator[Line]:
    """Read a manifest of many rows in every format."""
    table = _table(rows)
    paths = [_written(table, folder / f"large{suffix}") for suffix in (".parquet", ".csv", ".jsonl")]
    del table
    most_seconds = MOST_SECONDS * max(rows, 100_000) / _MILLION
    for path in paths:
        yield measure(f"{rows} rows", path, most_seconds=most_seconds)
        yield measure(f"{rows} rows", path, start=True, most_seconds=most_seconds)
        path.unlink()


def bombs(rows: int, folder: Path) -> Iterator[Line]:
    """Read small files that hold much."""
    path = folder / "bomb.parquet"
    equal_rows(path, 30 * rows, "x" * 100 + ".mp4")
    yield measure(f"{30 * rows} equal rows", path)
    _large_pages(path)
    yield measure("one page of 400 MB", path)
    for encoding in (None, "PLAIN", "DELTA_BYTE_ARRAY"):
        _large_cells(path, encoding)
        yield measure(f"cells of 1 MiB, {encoding or 'dictionary'}", path)
    _long_list(path, 7 * _MILLION)
    yield measure("a list of 7 million texts", path, keep="tags")
    pq.write_table(pa.table({f"c{number}": [1] for number in range(100_000)}), path)
    yield measure("100,000 columns", path)
    path.unlink()
    path = folder / "bomb.csv"
    path.write_bytes(b'path\n"' + b"x" * 300_000_000)
    yield measure("a cell of 300 MB", path)
    path.write_bytes(b"path\n" + b'"a\n",' * 60_000_000)
    yield measure("a row of 60 million cells", path)
    path.unlink()
    path = folder / "bomb.jsonl"
    path.write_bytes(b'{"path": "a.mp4", "x": [' + b"[]," * 1_300_000 + b"[]]}\n")
    yield measure("a line of 1.3 million lists", path, keep="x")
    path.write_bytes(b'{"path": "a.mp4", "x": "' + b"x" * 300_000_000)
    yield measure("a line of 300 MB", path)


def equal_rows(path: Path, rows: int, name: str, most: int = _MILLION) -> None:
    """Write equal rows, so many to a row group, each of which is a dictionary of one."""
    most = min(rows, most)
    equal = pa.table({"path": pa.array([name] * most)})
    with pq.ParquetWriter(path, equal.schema, compression="zstd", store_schema=False) as writer:
        for _ in range(rows // most):
            writer.write_table(equal, row_group_size=most)


def _large_pages(path: Path) -> None:
    pq.write_table(
        pa.table({"path": ["x" * 4000] * 100_000}),
        path,
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 30,
        max_rows_per_page=1 << 30,
    )


def _large_cells(path: Path, encoding: str | None) -> None:
    table = pa.table({"path": ["a.mp4"] * 300, "prompt": ["x" * (1 << 20)] * 300})
    with pq.ParquetWriter(
        path,
        table.schema,
        compression="zstd",
        use_dictionary=encoding is None,
        column_encoding={"path": "PLAIN", "prompt": encoding} if encoding else None,
        dictionary_pagesize_limit=1 << 30,
        write_batch_size=1,
    ) as writer:
        for _ in range(4):
            writer.write_table(table)


def _long_list(path: Path, values: int) -> None:
    tags = pa.ListArray.from_arrays(pa.array([0, values], pa.int32()), pa.array(["x"] * values))
    pq.write_table(pa.table({"path": ["a.mp4"], "tags": tags}), path)


def _table(rows: int) -> pa.Table:
    numbers = range(rows)
    return pa.table(
        {
            "clip_id": [f"clip-{number:09d}" for number in numbers],
            "path": [
                f"batch_{number // 1000:05d}/{number * 2654435761 % 2**32:08x}.mp4" for number in numbers
            ],
            "start": [float(number % 600) for number in numbers],
            "end": [float(number % 600 + 5) for number in numbers],
            "prompt": [("Describe the video.", "What happens?")[number % 2] for number in numbers],
            "score": [number / 7 for number in numbers],
        }
    )


def _written(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    else:
        with path.open("w") as file:
            for batch in table.to_batches(10_000):
                file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    return path


def main() -> int:
    """Do what the command line of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="made-up manifests")
    parser.add_argument("--mutants", type=int, default=1200, help="damaged manifests")
    parser.add_argument("--rows", type=int, default=_MILLION, help="rows of the large manifest")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="specvlm-manifests-") as name:
        folder = Path(name)
        broken = 0
        for line in _lines(asked, folder):
            print(line, flush=True)
            broken += bool(line.violation)
    return 1 if broken else 0


def _lines(asked: argparse.Namespace, folder: Path) -> Iterator[Line]:
    yield made(asked.cases, folder)
    yield mutated(asked.mutants, folder)
    yield from large(asked.rows, folder)
    yield from bombs(asked.rows, folder)


if __name__ == "__main__":
    sys.exit(main())
