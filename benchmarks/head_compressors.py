"""Compare the visual compressors of a head at equal training: each operator, each ratio, three modes, none, text alone.

    python benchmarks/head_compressors.py --work work/compressors

All heads learn from the same clips in the same order, in the same number of steps, from the same passes of the
target. Then all of them caption held-out clips with 128, 256 and 1,024 video tokens in turns, in this one process, and
all captions must be equal to plain decoding. The demo target learned from clips of about 140 video tokens; with 1,024
its captions ramble, so there only their first 64 tokens count, and the tables say how many facts are right. Run
again, the command resumes. Prints JSON; the tables for docs/benchmarks.md go to WORK/compressors.md, and
`benchmarks/chart.py` draws them from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from acceptance import conditions
from head_study import (
    LIMIT,
    LONG,
    MIDDLE,
    SHORT,
    Kind,
    Method,
    Pool,
    Run,
    Trainee,
    World,
    accepted,
    add_common_arguments,
    asked,
    captions_of,
    compressor_named,
    head_draft,
    learn,
    look,
    objective_of,
    study_of,
    training_of,
)

from recipes.demo.captions import compare, facts_in, facts_of
from recipes.demo.clips import scene_for, seed_for
from specvlm.captioner import CaptionOptions
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head_model import HeadModel

BY_RATIO = ("prune", "prune-guided", "pool", "conv")
MODES = ("select", "weighted", "concat")
TREES: dict[str, CaptionOptions] = {
    "dynamic": {"tree": "dynamic", "depth": 7, "nodes": 60, "width": 10},
    "chain": {"tree": "chain", "depth": 16},
}


def compressors(ratios: Sequence[float], mode_ratio: float) -> dict[str, CompressorConfig]:
    """All that are compared, by name."""
    found = {name: compressor_named(name, mode_ratio) for name in ("none", "text-only", "resampler")}
    found |= {f"{name} {ratio:g}x": compressor_named(name, ratio) for name in BY_RATIO for ratio in ratios}
    return found | {f"{name} {mode_ratio:g}x": compressor_named(name, mode_ratio) for name in MODES}


def training_kinds(clips: int, share: float) -> list[Kind]:
    """`share` of the clips are of 256 video tokens, as many of 1,024, spread evenly; all others have 128."""
    kinds = [SHORT] * clips
    longer = round(clips * share)
    for number in range(longer):
        kinds[number * clips // longer] = MIDDLE
        kinds[(2 * number + 1) * clips // (2 * longer)] = LONG
    return kinds


def train(world: World, options: argparse.Namespace) -> tuple[list[Trainee], dict[str, Any]]:
    """Train all heads side by side."""
    pool = Pool(world, training_kinds(options.clips, options.longer_share))
    target = world.captioner.target
    target.keep_features()
    reading_s = pool.read_all()
    trainees = [
        Trainee(
            name,
            HeadModel.fresh(target, world.head_config(config), options.seed),
            pool,
            training_of(options, options.seed),
            objective_of(options),
        )
        for name, config in compressors(options.ratios, options.mode_ratio).items()
    ]
    last: dict[str, dict[str, float]] = {}

    def note(_steps: int, told: Mapping[str, dict[str, float]]) -> None:
        last.update(told)

    learn(world, pool, trainees, options.epochs * trainees[0].steps_per_epoch, study_of(options), note)
    samples = options.epochs * options.clips
    return trainees, {
        "samples": samples,
        "samples_of_each_longer_kind": options.epochs * round(options.clips * options.longer_share),
        "captioning_and_reading_s": reading_s,
        "ms_per_sample": {one.name: 1e3 * one.seconds / samples for one in trainees},
        "last_losses": last,
    }


class Row(NamedTuple):
    """Figures of one head on one kind of clips; medians over captions where nothing else is said."""

    compressor: str
    kept: float  # video tokens that the head sees
    dynamic: float  # accepted a round, all over all
    chain: float
    prefill_ms: float
    kv_bytes: int  # of the prompt
    operators: dict[str, int]  # captions by what compressed them


def kv_bytes(world: World, head: HeadModel, slots: int) -> int:
    """Keys and values of a head's one layer, for this many pairs."""
    return head.text_model(world.captioner.target.family.position_rows).slot_bytes * slots


def row(world: World, runs: Sequence[Run], trainee: Trainee) -> Row:
    """Of one head."""
    stats = [one.stats for tree in TREES for one in captions_of(runs, f"{trainee.name}, {tree}")]
    slots = [one.prompt_tokens - one.video_tokens + one.video_tokens_kept for one in stats]
    return Row(
        trainee.name,
        statistics.median(one.video_tokens_kept for one in stats),
        accepted(runs, f"{trainee.name}, dynamic"),
        accepted(runs, f"{trainee.name}, chain"),
        1e3 * statistics.median(one.draft_prefill_s for one in stats),
        kv_bytes(world, trainee.learner.head, round(statistics.median(slots))),
        dict(Counter(one.compressor or "" for one in stats)),
    )


class Found(NamedTuple):
    """All heads on one kind of clips."""

    video_tokens: int
    clips: int
    facts_right: float  # of the target's captions
    small_dynamic: float
    small_chain: float
    rows: list[Row]


def compare_heads(world: World, trainees: Sequence[Trainee], kind: Kind, count: int) -> Found:
    """Measure all heads on held-out clips of one kind."""
    captioners = {one.name: world.with_draft(head_draft(world, one.learner)) for one in trainees}
    captioners["small draft"] = world.with_draft(world.captioner.draft)
    methods = [
        Method(f"{name}, {tree}", captioner, how)
        for name, captioner in captioners.items()
        for tree, how in TREES.items()
    ]
    plain = Method("plain", world.with_draft(None))
    runs = look(world, kind, count, [plain, *methods])
    dynamic, chain = (accepted(runs, f"small draft, {tree}") for tree in TREES)
    tokens = captions_of(runs, "plain")[0].stats.video_tokens
    right = facts_right(world, kind, count)
    rows = [row(world, runs, one) for one in trainees]
    return Found(tokens, count, right, dynamic, chain, rows)


def facts_right(world: World, kind: Kind, count: int) -> float:
    """Share of the facts of held-out clips that the target's captions get right."""
    scores = []
    for number in range(count):
        caption = world.captioner.caption(
            world.clip("held-out", kind, number), max_new_tokens=LIMIT, tree="chain"
        )
        scene = scene_for(seed_for("held-out", number))
        scores.append(compare(facts_in(caption.text), facts_of(scene)).values())
    flat = [pair for score in scores for pair in score]
    return sum(hits for hits, _ in flat) / sum(of for _, of in flat)


def table(found: Found) -> str:
    """Markdown."""
    lead = (
        f"{found.video_tokens:,} video tokens, {found.clips} held-out clips, {found.facts_right:.0%} of whose facts "
        "the target's captions get right:"
    )
    columns = (
        "compressor",
        "seen by the head",
        "accepted, dynamic",
        "accepted, chain",
        "head prefill ms",
        "head KV kB",
    )
    lines = [lead, "", f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for one in found.rows:
        used = _used(one.operators) if len(one.operators) > 1 or one.compressor.startswith("select") else ""
        cells = f"{one.kept:g} | {one.dynamic:.2f} | {one.chain:.2f} | {one.prefill_ms:.2f} | {one.kv_bytes / 1e3:.1f}"
        lines.append(f"| {one.compressor}{used} | {cells} |")
    return "\n".join(
        [*lines, f"| small draft, 0.9 pruned | | {found.small_dynamic:.2f} | {found.small_chain:.2f} | | |"]
    )


def _used(operators: Mapping[str, int]) -> str:
    total = sum(operators.values())
    return f" ({', '.join(f'{name} {count / total:.0%}' for name, count in sorted(operators.items()))})"


def report(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write tables."""
    trainees, training = train(world, options)
    kinds = [
        compare_heads(world, trainees, kind, count)
        for kind, count in zip((SHORT, MIDDLE, LONG), options.held_out, strict=True)
        if count
    ]
    lead = (
        f"Every head learned from the same {training['samples']:,} samples ({options.clips:,} clips, {options.epochs} "
        f"times; {training['samples_of_each_longer_kind']:,} samples of 256 video tokens, as many of 1,024, the others "
        f"of 128), learning rate {options.learning_rate:g}, {options.accumulate} a step, unroll {options.unroll}, seed "
        f"{options.seed}. {conditions()}."
    )
    (world.work / "compressors.md").write_text("\n\n".join([lead, *map(table, kinds)]) + "\n")
    return {
        "settings": asked(options),
        "conditions": conditions(),
        "training": training,
        "kinds": [found._asdict() | {"rows": [one._asdict() for one in found.rows]} for found in kinds],
        "captions equal to plain decoding": True,  # look() refuses any other
    }


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--ratios", type=float, nargs="+", default=[3.0, 5.0, 10.0, 20.0])
    parser.add_argument("--mode-ratio", type=float, default=5.0, help="of the operators of the three modes")
    parser.add_argument("--clips", type=int, default=1000, help="training clips")
    parser.add_argument("--epochs", type=int, default=4, help="how often each is learned from")
    parser.add_argument(
        "--longer-share",
        type=float,
        default=0.1,
        help="share of clips with 256, and of those with 1,024 video tokens",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        nargs=3,
        default=[24, 12, 8],
        help="clips of 128, 256 and 1,024 video tokens to measure on",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(report(World.load(options.preset, options.work), options), indent=1))


if __name__ == "__main__":
    main()
