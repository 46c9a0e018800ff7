"""Publish how far estimated plain decoding times are from measured ones, in runs made by `specvlm caption`.

    specvlm caption videos/ --preset demo --baseline-sample 1.0 -o out/
    python benchmarks/estimates.py out/

Reads run folders or Parquet files. A caption counts where its plain time was measured and estimated: columns
`baseline_token_s` and `estimated_token_s`, both at the batch size of the caption's steps. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from specvlm_cli.caption.outcome import estimate_over_measured

ENOUGH = 100  # captions
NAMES = ("target_model", "draft_model", "device", "specvlm_version")
COLUMNS = (
    *("speedup_source", "baseline_token_s", "estimated_token_s", "completion_tokens", "mean_batch_size"),
    *NAMES,
)


def files_of(path: Path) -> list[Path]:
    """Return the Parquet files of a run folder, of a folder of such files, or the file itself."""
    if path.is_file():
        return [path]
    folder = path / "captions" if (path / "captions").is_dir() else path
    return sorted(one for one in folder.glob("*.parquet") if not one.name.startswith("."))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that have both times; exit where there is no file, or one without these columns."""
    files = files_of(path)
    if not files:
        sys.exit(f"{path}: no Parquet files here; give the folder that `specvlm caption -o` wrote")
    for file in files:
        missing = set(COLUMNS) - set(pq.read_schema(file).names)
        if missing:
            sys.exit(f"{file}: has no column {min(missing)}; an earlier version wrote it, caption again")
        for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist():
            if estimate_over_measured(row) is not None:
                yield row


def figures(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return one line of the table."""
    ratios = np.array([estimate_over_measured(row) for row in rows], dtype=float)
    tokens = np.array([row["completion_tokens"] - 1 for row in rows])
    measured_s, estimated_s = (
        float(tokens @ np.array([row[column] for row in rows]))
        for column in ("baseline_token_s", "estimated_token_s")
    )
    batch_sizes = [row["mean_batch_size"] for row in rows if row["mean_batch_size"] is not None]
    batch_size = f"{np.mean(batch_sizes):.1f}" if batch_sizes else "not known"
    p10, half, p90 = np.quantile(ratios, (0.1, 0.5, 0.9))
    within = np.quantile(np.abs(ratios - 1.0), 0.9)
    return (
        f"| {name} | {len(rows)} | {batch_size} | {half:.2f} | {p10:.2f} | {p90:.2f} | {within:.1%} "
        f"| {estimated_s / measured_s - 1.0:+.1%} |"
    )


def report(runs: dict[str, list[dict[str, Any]]], least: int) -> str:
    """Return the table: a line for each run, and one for all; exit where there are too few captions."""
    every = [row for rows in runs.values() for row in rows]
    if len(every) < least:
        sys.exit(
            f"{len(every)} captions have a measured and an estimated plain time, {least} are needed; caption more "
            "videos with --baseline-sample 1.0, or give a smaller --least"
        )
    lines = ["Plain decoding time per token, estimated / measured:\n"]
    lines.append(
        "| run | captions | batch size | median | p10 | p90 | nine of ten within | error of the total |"
    )
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [figures(name, rows) for name, rows in runs.items() if rows]
    if len(runs) > 1:
        lines.append(figures("all", every))
    what = {name: sorted({row[name] for row in every if row[name] is not None}) for name in NAMES}
    lines += ["", *(f"{name}: {', '.join(values)}" for name, values in what.items() if values)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="run folder, or Parquet file")
    parser.add_argument(
        "--least", type=int, default=ENOUGH, help=f"fewest captions to report on ({ENOUGH})", metavar="N"
    )
    asked = parser.parse_args(arguments)
    print(report({str(path): list(rows_of(path)) for path in asked.runs}, max(asked.least, 1)))


if __name__ == "__main__":
    main()
