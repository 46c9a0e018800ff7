"""Measure what longer training of a head gains: accepted tokens and decode speedup after 1, 2, 4, 8 units.

    python benchmarks/head_scaling.py --work work/scaling --figures docs/images

A unit is a number of optimiser steps. Every seed has its own first weights and its own order of the same clips.
Afterwards all heads, the pair's small draft and stock `generate()` caption held-out clips in turns, in this one
process, and all captions must be equal. Given again, the command goes on where it was. Prints JSON; the table for
docs/benchmarks.md goes to WORK/scaling.md, the plot to FIGURES/head-scaling.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from acceptance import conditions
from head_study import (
    SQUARE_CLIPS,
    Method,
    Pool,
    Run,
    Trainee,
    World,
    accepted,
    add_common_arguments,
    asked,
    compressor_named,
    decode_speedup,
    learn,
    look,
    objective_of,
    study_of,
    training_of,
)

from specvlm.captioner import CaptionOptions
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadModel

TREES: dict[str, CaptionOptions] = {
    "dynamic": {"tree": "dynamic", "depth": 7, "nodes": 60, "width": 10},
    "chain": {"tree": "chain", "depth": 16},
    "auto": {"tree": "auto"},
}


class Point(NamedTuple):
    """One head after some units of training."""

    seed: int
    units: int

    @property
    def name(self) -> str:
        """Of its folder, and of its methods."""
        return f"seed {self.seed}, {self.units} units"


def train(world: World, options: argparse.Namespace) -> tuple[list[Point], dict[str, Any]]:
    """Train one head per seed; each is kept at every number of units."""
    pool = Pool(world, [SQUARE_CLIPS] * options.clips)
    config = world.head_config(compressor_named(options.compressor, options.ratio))
    target = world.captioner.target
    target.keep_features()
    captioning_s = pool.read_all()
    trainees = [
        Trainee(
            str(seed),
            HeadModel.fresh(target, config, seed),
            pool,
            training_of(options, seed),
            objective_of(options),
        )
        for seed in options.seeds
    ]
    unit = options.unit_steps
    losses: dict[str, dict[str, float]] = {}

    def keep(steps: int, told: Mapping[str, dict[str, float]]) -> None:
        units, rest = divmod(steps, unit)
        if rest == 0 and units in options.units:
            for one in trainees:
                point = Point(int(one.name), units)
                one.learner.head.save(world.work / "heads" / point.name)
                losses[point.name] = told[one.name]

    learn(world, pool, trainees, unit * max(options.units), study_of(options), keep)
    points = [Point(seed, units) for units in options.units for seed in options.seeds]
    return points, {
        "captioning_and_reading_s": captioning_s,
        "head_s_per_unit": statistics.mean(one.seconds for one in trainees) / max(options.units),
        "last_losses": losses,
    }


def methods(world: World, points: Sequence[Point]) -> list[Method]:
    """Stock, the small draft and every head, each with every tree."""
    target = world.captioner.target
    captioners = {"small draft": world.with_draft(world.captioner.draft)}
    for point in points:
        head = HeadModel.load(world.work / "heads" / point.name, target)
        captioners[point.name] = world.with_draft(HeadDraft(head, target))
    drafted = [
        Method(f"{name}, {tree}", captioner, how)
        for name, captioner in captioners.items()
        for tree, how in TREES.items()
    ]
    return [Method("stock"), *drafted]


class Row(NamedTuple):
    """Figures of one method by tree."""

    accepted: dict[str, float]
    speedup: dict[str, float]


def row(runs: Sequence[Run], name: str) -> Row:
    """Of one draft."""
    names = {tree: f"{name}, {tree}" for tree in TREES}
    return Row(
        {tree: accepted(runs, name) for tree, name in names.items()},
        {tree: decode_speedup(runs, name) for tree, name in names.items()},
    )


def table(found: Mapping[Point, Row], small: Row) -> str:
    """Markdown: means over seeds, with the least and the most in brackets where trees are fixed."""
    columns = [f"{figure}, {tree}" for figure in ("accepted", "decode x stock") for tree in TREES]
    lines = [f"| training | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for units in dict.fromkeys(point.units for point in found):
        rows = [row for point, row in found.items() if point.units == units]
        cells = [
            _spread([getattr(one, field)[tree] for one in rows]) for field in Row._fields for tree in TREES
        ]
        lines.append(f"| {units} unit{'s' * (units > 1)} | {' | '.join(cells)} |")
    cells = [f"{getattr(small, field)[tree]:.2f}" for field in Row._fields for tree in TREES]
    return "\n".join([*lines, f"| small draft | {' | '.join(cells)} |"])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def plot(found: Mapping[Point, Row], small: Row, path: Path) -> None:
    """Accepted tokens and decode speedup over units, seeds as points, their means as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.1), layout="constrained")
    units = sorted({point.units for point in found})
    titles = {"accepted": "accepted tokens a round", "speedup": "decode, times stock generate()"}
    for axes, field in zip(figure.subplots(1, 2), titles, strict=True):
        for tree, colour in zip(TREES, ("#2b83c6", "#e0762b", "#2a9d72"), strict=True):
            values = {point: getattr(one, field)[tree] for point, one in found.items()}
            means = [statistics.mean(v for point, v in values.items() if point.units == n) for n in units]
            axes.plot(units, means, color=colour, marker="o", label=f"head, {tree}")
            axes.plot([p.units for p in values], list(values.values()), ".", color=colour, alpha=0.5)
            axes.axhline(getattr(small, field)[tree], color=colour, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(units, [str(n) for n in units])
        axes.set(title=titles[field], xlabel="units of training", ylim=(0, None))
        axes.grid(alpha=0.2)
    axes.plot([], [], color="grey", linestyle=(0, (4, 3)), linewidth=1, label="small draft, same tree")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def report(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write table and plot."""
    points, training = train(world, options)
    some = methods(world, points)
    runs = look(world, SQUARE_CLIPS, options.held_out, some, options.turns)
    found, small = {point: row(runs, point.name) for point in points}, row(runs, "small draft")
    lead = (
        f"A unit is {options.unit_steps} steps of {options.accumulate} clips, of {options.clips:,} in all; learning "
        f"rate {options.learning_rate:g}, unroll {options.unroll}, compressor {options.compressor}, seeds "
        f"{', '.join(map(str, options.seeds))}. {options.held_out} held-out clips, {options.turns} turn(s), "
        f"{conditions()}. Means of the seeds, in brackets the least and the most."
    )
    (world.work / "scaling.md").write_text(f"{lead}\n\n{table(found, small)}\n")
    plot(found, small, options.figures / "head-scaling.png")
    means = {
        units: statistics.mean(
            row.accepted["dynamic"] for point, row in found.items() if point.units == units
        )
        for units in options.units
    }
    return {
        "settings": asked(options),
        "conditions": conditions(),
        "training": training,
        "heads": [point._asdict() | one._asdict() for point, one in found.items()],
        "small draft": small._asdict(),
        "captions equal to stock": True,  # look() refuses any other
        "accepted rises": list(means.values()) == sorted(means.values()),
    }


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--units", type=int, nargs="+", default=[1, 2, 4, 8], help="ascending")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--unit-steps", type=int, default=64, help="steps of a unit")
    parser.add_argument("--clips", type=int, default=1024, help="training clips")
    parser.add_argument("--held-out", type=int, default=30, help="clips to measure on, at most 299")
    parser.add_argument("--turns", type=int, default=1, help="captions of each clip by each method")
    parser.add_argument("--compressor", default="none", help="mode, or one operator")
    parser.add_argument("--ratio", type=float, default=5.0, help="of the compressor")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(report(World.load(options.preset, options.work), options), indent=1))


if __name__ == "__main__":
    main()
