"""The plots of a bench as SVG, to stand inside a page. Knows records and matplotlib; no pages, no files.

What is black in a plot is drawn in `INK`, which becomes the page's own text colour, so that one plot suits light
and dark pages. Text stays text, and no formula: drafts' names come from outside, all other words from this package.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from specvlm.bench.records import STAGES, BenchReport, MethodName, Summary
from specvlm.bench.words import STAGE_NAMES, baseline_of, frames_of, has_several_frames, name_of

INK = "#010203"  # replaced by the page's text colour
# Told apart by colour-blind eyes, and clear on white as on near-black.
COLOURS = ("#2b83c6", "#e0762b", "#2a9d72", "#c2549c", "#a48a00", "#7a6bd6", "#cf4a45", "#2aa0ad")
MOST_SERIES = 2 * len(COLOURS)  # lines of one plot
_MOST_DEPTHS = 16
_WIDTH = 9.6  # inches
_LEAST_GAP = 0.18  # between ticks, of the axis; with less matplotlib chooses ticks
_MARKERS = "osD^vPX*"

# Before the first token in cool colours, rounds in warm ones, the rest in grey.
STAGE_COLOURS = {
    "read_s": "#7f8c8d",
    "preprocess_s": "#4f86a8",
    "vision_s": "#2b83c6",
    "target_prefill_s": "#5b6fd0",
    "draft_prefill_s": "#2aa0ad",
    "prefill_s": "#6f9fd8",
    "draft_s": "#e0a02b",
    "verify_s": "#e0662b",
    "commit_s": "#b8452f",
    "host_s": "#c2549c",
    "steps_s": "#e58f66",
    "rest_s": "#9aa0a6",
}

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


class Plot(NamedTuple):
    """One plot.

    Attributes:
        name: For links and tests: `throughput`, `speedup`, `batch`, `ratio`, `frames`, `stages` or `depth`.
        title: What it shows.
        note: What must be known to read it; may be empty.
        svg: An `<svg>` element.
    """

    name: str
    title: str
    note: str
    svg: str


class _Line(NamedTuple):
    """One line of a plot: a configuration, but for what the x axis says."""

    label: str
    points: list[tuple[float, Summary]]


def plots(report: BenchReport) -> list[Plot]:
    """Every plot that has something to show, in the page's order."""
    ran = [one for one in report.summaries if one.videos]
    base = baseline_of(report)
    with rc_context(_STYLE):
        found = [
            _throughput(ran),
            _speedups(ran, base) if base else None,
            _over_batch(ran, base),
            _over_ratio(ran, base),
            _over_frames(ran, base),
            _stages(ran),
            _depths(ran),
        ]
    return [one for one in found if one is not None]


# --- the plots ---


def _by_batch(ran: Sequence[Summary]) -> list[_Line]:
    """A line for each way to caption, over its batch sizes."""
    several = has_several_frames(ran)

    def line(one: Summary) -> str:
        alone = replace(one, configuration=replace(one.configuration, batch_size=1))
        return name_of(alone, several)

    lines = _lines(ran, line, lambda one: one.configuration.batch_size)
    return [one for one in lines if len(one.points) > 1]


def _throughput(ran: Sequence[Summary]) -> Plot | None:
    lines = _by_batch(ran)
    if not lines:
        return None
    shown = lines[:MOST_SERIES]
    figure = Figure(figsize=(_WIDTH, 4.4 + 0.25 * -(-len(shown) // 2)), layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(shown):
        sizes = [size for size, _ in line.points]
        rates = [one.videos_per_hour or 0.0 for _, one in line.points]
        spreads = [one.videos_per_hour_turns for _, one in line.points]
        below = [
            max(0.0, rate - (rate if at is None else at.p10)) for rate, at in zip(rates, spreads, strict=True)
        ]
        above = [
            max(0.0, (rate if at is None else at.p90) - rate) for rate, at in zip(rates, spreads, strict=True)
        ]
        axes.errorbar(sizes, rates, (below, above), label=line.label, capsize=3, **_look(number))
    _batch_axis(axes, shown)
    axes.set(ylabel="videos an hour", ylim=(0, 1.05 * axes.dataLim.y1))
    figure.legend(loc="outside lower left", ncols=2)
    note = "All videos from the file to the text, in wall time; whiskers reach from p10 to p90 of the turns."
    return Plot(
        "throughput",
        "Videos an hour over the batch size",
        note + _more(len(lines)),
        _svg(figure, "throughput"),
    )


def _batch_axis(axes: Axes, lines: Sequence[_Line]) -> None:
    """Each batch size once, each doubling as far as the one before."""
    sizes = sorted({size for line in lines for size, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("batch size")


def _over_batch(ran: Sequence[Summary], base: MethodName | None) -> Plot | None:
    lines = [one for one in _by_batch(ran) if one.points[0][1].configuration.method != base]
    note = "" if base is None else f"Against {base} at the same batch size."
    return _panels("batch", "Speedups over the batch size", note, lines, base, "batch size")


def _speedups(ran: Sequence[Summary], base: MethodName) -> Plot | None:
    shown = [(one, found) for one in ran if (found := one.speedup(base)) is not None]
    if not shown:
        return None
    names = [name_of(one, has_several_frames(ran)) for one, _ in shown]
    figure, axes = _bars(names, 0.56)
    rows = range(len(shown))
    bars = (
        ("decode", [found.decode or 0.0 for _, found in shown], -0.2, COLOURS[0]),
        ("end to end", [found.e2e for _, found in shown], 0.2, COLOURS[1]),
    )
    for label, values, shift, colour in bars:
        drawn = axes.barh([row + shift for row in rows], values, 0.36, color=colour, label=label)
        axes.bar_label(drawn, [f"{value:.2f}" if value else "" for value in values], padding=4, color=INK)
    axes.axvline(1.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.12 * max(1.0, *(max(found.decode or 0.0, found.e2e) for _, found in shown)))
    axes.set_xlabel(f"times as fast as {base}")
    _legend(figure, axes, 2)
    return Plot("speedup", f"Speedup against {base}", _ONE, _svg(figure, "speedup"))


_ONE = "Above the dashed line at 1 is faster than the baseline, below it slower."


def _over_ratio(ran: Sequence[Summary], base: MethodName | None) -> Plot | None:
    def line(one: Summary) -> str | None:
        how = one.configuration
        if how.method != "specvlm" or not how.prune_ratio:
            return None
        frames = f", {frames_of(one)} frames" if several else ""
        draft = f", {how.draft_label}" if how.draft_label else ""
        return f"pruner {how.pruner}, tree {how.tree}{draft}{frames}{_batch(one)}"

    several = has_several_frames(ran)
    lines = [_with_unpruned(one, ran) for one in _lines(ran, line, lambda one: one.configuration.prune_ratio)]
    note = "At a prune ratio of 0 the draft sees all video tokens."
    return _panels("ratio", "Over the prune ratio", note, lines, base, "prune ratio")


def _with_unpruned(line: _Line, ran: Sequence[Summary]) -> _Line:
    """The line with its point at a ratio of 0, which one configuration has for all pruners."""
    _, one = line.points[0]
    unpruned = replace(one.configuration, pruner=None, prune_ratio=None)
    at_zero = [
        (0.0, other)
        for other in ran
        if not other.configuration.prune_ratio
        and replace(other.configuration, pruner=None, prune_ratio=None) == unpruned
    ]
    return _Line(line.label, at_zero + line.points)


def _over_frames(ran: Sequence[Summary], base: MethodName | None) -> Plot | None:
    def line(one: Summary) -> str | None:
        return None if one.configuration.method == base else one.configuration.label + _batch(one)

    lines = _lines(ran, line, lambda one: one.num_frames)
    return _panels("frames", "Over the frames of a video", "", lines, base, "frames of a video, mean")


def _panels(
    name: str, title: str, note: str, lines: list[_Line], base: MethodName | None, x_label: str
) -> Plot | None:
    """Side by side, as far as there are any: decoding and end to end, if there is a baseline; accepted tokens."""
    lines = [line for line in lines if len({x for x, _ in line.points}) > 1]
    if not lines:
        return None
    shown = lines[:MOST_SERIES]
    panels: list[tuple[str, Callable[[Summary], float | None]]] = [("accepted tokens a round", _accepted)]
    if base is not None:
        panels = [
            (f"decode, times {base}", lambda one: _speedup(one, base)[0]),
            (f"end to end, times {base}", lambda one: _speedup(one, base)[1]),
            *panels,
        ]
    panels = [
        panel
        for panel in panels
        if any(panel[1](one) is not None for line in shown for _, one in line.points)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(_WIDTH, 3.4 + 0.25 * -(-len(shown) // 2)), layout="constrained")
    handles: dict[str, Line2D] = {}
    for axes, (heading, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, line in enumerate(shown):
            points = [(x, value) for x, one in line.points if (value := y(one)) is not None]
            if points:
                (handles[line.label],) = axes.plot(*zip(*points, strict=True), **_look(number))
        if y is not _accepted:
            axes.axhline(1.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        places = sorted({x for line in shown for x, _ in line.points})
        axes.set(xlabel=x_label, title=heading, ylim=(0, 1.08 * axes.dataLim.y1))
        if x_label == "batch size":
            _batch_axis(axes, shown)
        elif _are_apart(places):
            axes.set_xticks(places, [f"{place:g}" for place in places])
    figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=2)
    return Plot(name, title, (note + _more(len(lines))).strip(), _svg(figure, name))


def _are_apart(places: Sequence[float]) -> bool:
    """Whether each place can have a tick of its own."""
    gaps = [after - before for before, after in pairwise(places)]
    return min(gaps) >= _LEAST_GAP * (places[-1] - places[0])


def _batch(one: Summary) -> str:
    size = one.configuration.batch_size
    return f", batch {size}" if size > 1 else ""


def _accepted(one: Summary) -> float | None:
    return one.mean_accepted_tokens


def _look(number: int) -> dict[str, Any]:
    """Colour, marker and stroke of a line; the second half of the lines is dashed."""
    place = number % len(COLOURS)
    dashed = number >= len(COLOURS)
    return {
        "color": COLOURS[place],
        "marker": _MARKERS[place],
        "linestyle": (0, (4, 2)) if dashed else "-",
        "markerfacecolor": "none" if dashed else COLOURS[place],
    }


def _more(lines: int) -> str:
    return (
        "" if lines <= MOST_SERIES else f" Shown are the first {MOST_SERIES} of {lines}; the table has all."
    )


def _stages(ran: Sequence[Summary]) -> Plot | None:
    if not ran:
        return None
    names = [name_of(one, has_several_frames(ran)) for one in ran]
    figure, axes = _bars(names, 0.42)
    left = [0.0] * len(ran)
    used = [name for name in STAGES if any(_per_video(one, name) > 0 for one in ran)]
    for name in used:
        values = [max(0.0, 1e3 * _per_video(one, name)) for one in ran]
        axes.barh(range(len(ran)), values, 0.7, left=left, color=STAGE_COLOURS[name], label=STAGE_NAMES[name])
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.set_xlim(0, 1.1 * max(left))
    for row, whole in enumerate(left):
        axes.annotate(f"{whole:.0f}" if whole >= 10 else f"{whole:.1f}", (whole, row), (5, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.set_xlabel("milliseconds a video")
    _legend(figure, axes, 4)
    note = "Of each video the turn with the median total time; totals over the videos, divided by the videos."
    return Plot("stages", "Where the time goes", note, _svg(figure, "stages"))


def _depths(ran: Sequence[Summary]) -> Plot | None:
    with_rounds = [one for one in ran if any(share is not None for share in one.acceptance_per_depth)]
    if not with_rounds:
        return None
    shown = with_rounds[:MOST_SERIES]
    figure = Figure(figsize=(_WIDTH, 3.5 + 0.25 * -(-len(shown) // 2)), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(shown):
        shares = enumerate(one.acceptance_per_depth[:_MOST_DEPTHS], 1)
        points = [(depth, share) for depth, share in shares if share is not None]
        label = name_of(one, has_several_frames(ran))
        axes.plot(*zip(*points, strict=True), label=label, **_look(number))
    axes.set(xlabel="depth in the tree", ylabel="share accepted", ylim=(0, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower left", ncols=2)
    note = "The share of rounds that accepted a guess at this depth, of those that accepted one at the depth before."
    return Plot("depth", "Acceptance by depth", note + _more(len(with_rounds)), _svg(figure, "depth"))


# --- helpers ---


def _lines(
    ran: Sequence[Summary], line: Callable[[Summary], str | None], x: Callable[[Summary], float | None]
) -> list[_Line]:
    """Group summaries into lines, by the label that `line` gives; None leaves one out."""
    found: dict[str, _Line] = {}
    for one in ran:
        label, place = line(one), x(one)
        if label is not None and place is not None:
            found.setdefault(label, _Line(label, [])).points.append((place, one))
    return [_Line(one.label, sorted(one.points, key=lambda point: point[0])) for one in found.values()]


def _speedup(one: Summary, base: MethodName) -> tuple[float | None, float | None]:
    found = one.speedup(base)
    return (None, None) if found is None else (found.decode, found.e2e)


def _per_video(one: Summary, stage: str) -> float:
    seconds: float = getattr(one.stages, stage)
    return seconds / one.videos


def _bars(names: Sequence[str], height: float) -> tuple[Figure, Axes]:
    """A figure for one horizontal bar, or a pair of them, for each name, the first on top."""
    figure = Figure(figsize=(_WIDTH, 1.3 + height * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _svg(figure: Figure, name: str) -> str:
    """The figure as one element that takes the width it is given; its ids are not those of another plot."""
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": f"specvlm-{name}"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and other plots have the same
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    return re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
