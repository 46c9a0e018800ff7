"""Measure captioning in batches, in one process: stock `generate()` against plain decoding and speculation.

    python benchmarks/batches.py
    python benchmarks/batches.py --preset demo-llava --batch-sizes 1,32 --repeat 9

The example clips, read beforehand and repeated up to `--clips`, go from frames to text by each method at each batch
size, preprocessing included: `transformers`' left-padded `generate()` on prompts sorted by length, plain decoding, and
speculation with the preset's draft (`--tree auto`, and chains of 6) and with one of random weights (`auto`), which must
cost next to nothing. Methods alternate; a figure is the median over turns of each turn's ratio, with p10 to p90. The
measuring is that of `specvlm bench --batch-size`. Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from acceptance import conditions

import specvlm
from specvlm.bench.clips import Clip, example_clips
from specvlm.bench.grid import Grid, GridDraft
from specvlm.bench.measure import BenchRequest
from specvlm.bench.records import BenchReport, Configuration, Left, MethodName, Spread, Summary
from specvlm.bench.suite import BenchSetup, BenchStep, bench
from specvlm.captioner import Captioner
from specvlm.config import ModelSettings
from specvlm.costs import CostStore
from specvlm.loading import with_draft
from specvlm.preset import Preset, find_preset
from specvlm.video import read_video

RANDOM = "random weights"
CHAIN = 6


class Methods(Grid):
    """What is compared: a draft of random weights need not be tried twice."""

    def configurations(self, num_frames: int | None) -> list[Configuration]:
        """All but chains of random guesses."""
        every = super().configurations(num_frames)
        return [one for one in every if (one.draft, one.tree) != (RANDOM, "chain")]


class Progress:
    """Tells on stderr what is being measured."""

    def step(self, step: BenchStep) -> None:
        """Say it on one line, over the last one."""
        print(f"\r{step.done} of {step.total}: {step.what}\x1b[K", end="", file=sys.stderr, flush=True)

    def left_out(self, left: Left) -> None:
        """A clip cannot be used: then there is nothing to say of the others."""
        raise SystemExit(f"{left.video}: {left.reason}")

    def failed(self, how: Configuration, error: str) -> None:
        """Likewise."""
        raise SystemExit(f"{how.label}, batch {how.batch_size}: {error}")


def with_random_draft(captioner: Captioner, preset: Preset) -> Captioner:
    """The same target with the preset's draft, its decoder's weights drawn at random; nothing is known of its costs."""
    other = with_draft(captioner, ModelSettings(preset.target, preset.draft))
    draft: Any = other.draft
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for parameter in draft.model.model.model.language_model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    other.costs = CostStore()
    return other


def clips_of(captioner: Captioner, count: int) -> list[Clip]:
    """The example clips as frames, over and over, each under a name of its own."""
    clips = example_clips()
    frames = [
        read_video(one.video, captioner.frames, frame_multiple=captioner.frame_multiple)._replace(source=None)
        for one in clips
        if isinstance(one.video, str)
    ]
    return [
        Clip(f"{clips[number % len(clips)].name} {number}", frames[number % len(clips)])
        for number in range(count)
    ]


def cell(found: Spread | None) -> str:
    """A ratio's median over turns, and its spread."""
    return "" if found is None else f"{found.median:.2f} ({found.p10:.2f} to {found.p90:.2f})"


def rows() -> list[tuple[str, Callable[[Summary], str]]]:
    """What stands in each row of the table, below each batch size."""

    def over(base: MethodName) -> Callable[[Summary], str]:
        def shown(one: Summary) -> str:
            found = one.speedup(base)
            return "" if found is None or one.configuration.method == "stock" else cell(found.e2e_turns)

        return shown

    def rate(one: Summary) -> str:
        return f"{one.videos_per_hour:,.0f}"

    return [("videos per hour", rate), ("x stock", over("stock")), ("x plain", over("plain"))]


def table(report: BenchReport) -> None:
    """A row for each method and figure, a column for each batch size."""
    sizes = list(dict.fromkeys(one.configuration.batch_size for one in report.summaries))
    labels = list(dict.fromkeys(one.configuration.label for one in report.summaries))
    print(f"| | | {' | '.join(map(str, sizes))} |\n|---|---|{'---:|' * len(sizes)}")
    for label in labels:
        ran = [one for one in report.summaries if one.configuration.label == label]
        for name, shown in rows():
            cells = [shown(one) for one in ran]
            if any(cells):
                print(f"| {label} | {name} | {' | '.join(cells)} |")
    differ = [
        f"{one.configuration.label}, batch {one.configuration.batch_size}: {100 * one.exact_match:.1f} % the same"
        for one in report.summaries
        if one.exact_match not in (None, 1.0)
    ]
    print("\n" + ("; ".join(differ) if differ else "All captions are the same, token for token."))


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--batch-sizes", default="1,4,8,16,32")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = find_preset(options.preset)
    if preset is None:
        raise SystemExit(f"--preset {options.preset} is unknown")
    captioner = specvlm.load(options.preset)
    grid = Methods(
        methods=("stock", "plain", "specvlm"),
        trees=("auto", "chain"),
        drafts=(GridDraft(preset.draft), GridDraft(RANDOM)),
        batch_sizes=tuple(map(int, options.batch_sizes.split(","))),
        chain_depth=CHAIN,
    )
    asked = BenchRequest(
        command=f"python benchmarks/batches.py --preset {options.preset}",
        target=preset.target,
        draft=preset.draft,
        prompt=preset.prompt,
        max_new_tokens=options.max_new_tokens,
        repeat=options.repeat,
        clips="the example clips",
    )
    clips = clips_of(captioner, options.clips)
    setup = BenchSetup(grid, clips, None, asked)
    report = bench(captioner, setup, Progress(), {RANDOM: with_random_draft(captioner, preset)})
    print("\r\x1b[K", end="", file=sys.stderr)
    print(
        f"\nPreset `{options.preset}`, {len(clips)} example clips from frames to text, {options.repeat} turns, "
        f"{conditions()}. Medians over turns, with p10 to p90.\n"
    )
    table(report)


if __name__ == "__main__":
    main()
