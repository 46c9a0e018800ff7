"""Draw the charts of README and docs/benchmarks.md from the tables of docs/benchmarks.md, so that they always agree.

    python benchmarks/chart.py

Writes docs/images/batches.svg (the table of `benchmarks/batches.py`: videos per hour by method and batch size) and
docs/images/head-compressors.svg (the tables of `benchmarks/head_compressors.py`: accepted tokens by compressor).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

pyplot.rcParams.update({"svg.hashsalt": "specvlm", "font.size": 11, "svg.fonttype": "none"})
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


def _quiet(axes: Any, grid: str) -> None:
    """Grey axes without a box, legible on light and dark pages."""
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis=grid, color=GREY, alpha=0.25)


def draw(measured: Measured, path: Path) -> None:
    """A line for each method, and above each batch size the speedup."""
    sizes, rates, speedups = measured
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
    _quiet(axes, grid="y")
    axes.legend(frameon=False, labelcolor=GREY, loc="lower right")
    figure.savefig(path, transparent=True, metadata={"Date": None})


COMPRESSORS = {
    "none": "#a48a00",
    "prune": "#2f81d6",
    "prune-guided": "#d9822b",
    "pool": "#2a9d72",
    "conv": "#c2549c",
}
_OTHERS = GREY


class Compared(NamedTuple):
    """One table: compressors at one number of video tokens."""

    video_tokens: str
    accepted: dict[str, float]  # by compressor, the chain's


def read_compressors(text: str) -> list[Compared]:
    """Find the tables in the text of docs/benchmarks.md."""
    found = []
    for heading in re.finditer(r"^([\d,]+) video tokens, \d+ held-out clips", text, re.MULTILINE):
        table = text[heading.end() :].split("\n\n")[1]
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        found.append(
            Compared(heading[1], {name.partition(" (")[0]: float(chain) for name, _, _, chain, *_ in cells})
        )
    return found


def draw_compressors(tables: list[Compared], path: Path) -> None:
    """A panel for each number of video tokens, a line for each compressor, a dot at its accepted tokens."""
    figure, panels = pyplot.subplots(1, len(tables), figsize=(9.6, 5.4), layout="constrained", sharey=True)
    for axes, one in zip(panels, tables, strict=True):
        names = list(one.accepted)
        colours = [COMPRESSORS.get(name.split()[0], _OTHERS) for name in names]
        axes.hlines(
            range(len(names)), 0, list(one.accepted.values()), color=colours, alpha=0.4, linewidth=1.5
        )
        axes.scatter(list(one.accepted.values()), range(len(names)), color=colours, s=28, zorder=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 1.08 * max(one.accepted.values()))
        axes.set_title(f"{one.video_tokens} video tokens", color=GREY, fontsize=11)
        _quiet(axes, grid="x")
    panels[0].invert_yaxis()
    panels[1].set_xlabel("accepted tokens per round, chain of 16", color=GREY)
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    benchmarks = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    draw(read(benchmarks), ROOT / "docs/images/batches.svg")
    draw_compressors(read_compressors(benchmarks), ROOT / "docs/images/head-compressors.svg")
