"""The curve of a training as a PNG: accepted tokens on held-out videos over steps, what it learned below.

It knows no files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
}
_PANELS = (
    ("mean_accepted_tokens", "Accepted tokens per round, held-out videos", "#2b83c6"),
    ("right", "Share of tokens guessed right, training", "#e0762b"),
    ("loss", "Loss, training", "#2a9d72"),
)


def curve(log: Sequence[dict[str, Any]]) -> bytes:
    """Draw the log of a training.

    Args:
        log: Entries with `step`, and figures or None.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 8.4), layout="constrained", dpi=110)
        for axes, (name, title, colour) in zip(figure.subplots(3, 1, sharex=True), _PANELS, strict=True):
            _panel(axes, log, name, colour)
            axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _panel(axes: Axes, log: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    points = [(entry["step"], entry[name]) for entry in log if entry[name] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", color=colour)
    axes.set_ylim(bottom=0.0, top=None if points and max(y for _, y in points) > 0 else 1.0)
