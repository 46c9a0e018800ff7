"""Read a run folder back with pyarrow, and show its captions.

    python examples/read_captions.py demo-out

A run folder is an ordinary Parquet dataset: pyarrow, pandas, polars, duckdb and `datasets` read it as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = (
    *("path", "caption", "mean_accepted_tokens", "decode_speedup", "e2e_speedup", "speedup_source"),
    "exact_match",
)


def speedup(value: float | None, source: str | None) -> str:
    """Return a speedup over plain decoding: two decimals where it was measured, one where it is estimated."""
    if value is None:
        return "-"
    return f"{value:.2f}x" if source == "measured" else f"~{value:.1f}x"


def printable(text: str) -> str:
    """Return text from outside without anything that a terminal would act on."""
    return "".join(character if character.isprintable() else " " for character in text)


def main(folder: Path) -> None:
    """Print one row for each caption."""
    if not any((folder / "captions").glob("*.parquet")):
        sys.exit(f"{folder}: no captions here; give the folder that `specvlm caption -o` wrote")
    rows = pq.read_table(folder / "captions", columns=list(COLUMNS)).sort_by("path").to_pylist()
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, expand=True)
    table.add_column("file and caption", overflow="fold", ratio=1)
    for title in ("accepted\nper round", "decode\nspeedup", "end to end\nspeedup", "same\ntokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        text = Text(printable(Path(row["path"]).name), style="bold").append("\n")
        table.add_row(
            text.append(printable(row["caption"]), style="not bold"),
            "-" if row["mean_accepted_tokens"] is None else f"{row['mean_accepted_tokens']:.2f}",
            speedup(row["decode_speedup"], row["speedup_source"]),
            speedup(row["e2e_speedup"], row["speedup_source"]),
            {True: "yes", False: "NO", None: "-"}[row["exact_match"]],
        )
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
