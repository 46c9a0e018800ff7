"""Draw the chart of the README from the table of docs/benchmarks.md, so that both always agree.

    python benchmarks/chart.py

The table is that of `benchmarks/batches.py`: videos per hour by method and batch size. Writes docs/images/batches.svg.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
GREY = "#7a7f87"  # legible on light and dark pages
LINES = {
    "stock": ("transformers, generate() in batches", GREY, "o"),
    "specvlm 0.9 chain 6, qwen-draft": ("specvlm, chain of 6", "#d9822b", "s"),
    "specvlm 0.9 auto, qwen-draft": ("specvlm, auto", "#2f81d6", "D"),
}


class Measured(NamedTuple):
    """The table, by batch size."""

    sizes: list[int]
    rates: dict[str, list[float]]  # videos per hour, by method
    speedups: list[float]  # of the better of our methods over stock


def read(text: str) -> Measured:
    """Find the table in the text of docs/benchmarks.md."""
    heading = re.search(r"^\| \| \| ((?:\d+ \| )*\d+) \|$", text, re.MULTILINE)
    assert heading is not None

    def rows(what: str) -> dict[str, list[float]]:
        found = re.findall(rf"^\| ([^|]+?) \| {what} \| (.+) \|$", text[heading.end() :], re.MULTILINE)
        return {
            name: [float(cell.split()[0].replace(",", "")) for cell in cells.split(" | ")]
            for name, cells in found
        }

    ours = rows("x stock")
    speedups = [max(column) for column in zip(*(ours[name] for name in LINES if name in ours), strict=True)]
    return Measured([int(cell) for cell in heading[1].split(" | ")], rows("videos per hour"), speedups)


def draw(measured: Measured, path: Path) -> None:
    """A line for each method, and above each batch size the speedup."""
    sizes, rates, speedups = measured
    pyplot.rcParams.update({"svg.hashsalt": "specvlm", "font.size": 11, "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    for name, (label, colour, marker) in LINES.items():
        axes.plot(range(len(sizes)), rates[name], color=colour, marker=marker, label=label)
    best = [max(rates[name][at] for name in LINES if name != "stock") for at in range(len(sizes))]
    for at, speedup in enumerate(speedups):
        place = {"xy": (at, best[at]), "xytext": (0, 8), "textcoords": "offset points"}
        axes.annotate(f"{speedup:.1f}x", **place, ha="center", color=GREY)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set(
        xlabel="videos captioned together (batch size)", ylabel="videos per hour", ylim=(0, 1.15 * max(best))
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for side in axes.spines.values():
        side.set_visible(side in (axes.spines["left"], axes.spines["bottom"]))
        side.set_color(GREY)
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.legend(frameon=False, labelcolor=GREY, loc="lower right")
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw(read((ROOT / "docs/benchmarks.md").read_text()), ROOT / "docs/images/batches.svg")
