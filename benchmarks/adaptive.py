"""Measure `--tree auto` against fixed trees and with a useless draft.

    python benchmarks/adaptive.py trees --clips 24
    python benchmarks/adaptive.py random --clips 100

Everything compared runs in this one process, methods alternating clip by clip after a warm-up; figures are of totals.
Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from acceptance import PROMPT, conditions, drawn

import specvlm
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.costs import CostStore
from specvlm.preset import find_preset

PLAIN: dict[str, Any] = {"speculate": False}
AUTO: dict[str, Any] = {"tree": "auto"}
FIXED: dict[str, dict[str, Any]] = {
    **{f"chain, depth {depth}": {"tree": "chain", "depth": depth} for depth in (1, 2, 3, 5, 7, 9, 12, 16)},
    "static": {"tree": "static"},
    "dynamic, 26 nodes": {"tree": "dynamic"},
    "dynamic, 12 nodes, width 2": {"tree": "dynamic", "nodes": 12, "width": 2},
    "dynamic, depth 9, 16 nodes, width 2": {"tree": "dynamic", "depth": 9, "nodes": 16, "width": 2},
}


class Timed(NamedTuple):
    """One caption."""

    decode_s: float
    total_s: float  # without reading and preprocessing, which were done once
    wall_s: float
    caption: specvlm.Caption


def videos_of(captioner: Captioner, preset: str, count: int) -> list[PreparedVideo]:
    """Held-out clips, prepared."""
    chosen = find_preset(preset)
    assert chosen is not None
    return [
        captioner.prepare(drawn(i, chosen.frames, captioner.frame_multiple), PROMPT) for i in range(count)
    ]


def run(captioner: Captioner, video: PreparedVideo, options: dict[str, Any]) -> Timed:
    """One caption, timed."""
    began = time.perf_counter()
    caption = captioner.caption(video, max_new_tokens=200, **options)
    wall_s = time.perf_counter() - began
    stats = caption.stats
    total_s = stats.total_s - video.video_decode_s - video.preprocess_s
    return Timed(stats.decode_s, total_s, wall_s, caption)


def alternate(
    captioner: Captioner, videos: list[PreparedVideo], methods: dict[str, dict[str, Any]], repeat: int
) -> dict[str, list[Timed]]:
    """All methods on each clip in turn, another one first every time; all must write the same."""
    runs: dict[str, list[Timed]] = defaultdict(list)
    names = list(methods)
    for turn in range(repeat):
        for index, video in enumerate(videos):
            shift = (index + turn) % len(names)
            for name in names[shift:] + names[:shift]:
                runs[name].append(run(captioner, video, methods[name]))
            if len({runs[name][-1].caption.token_ids for name in names}) > 1:
                raise SystemExit(f"clip {index}: captions differ")
    return runs


def total(timed: list[Timed], field: str) -> float:
    """Sum over clips."""
    return float(sum(getattr(one, field) for one in timed))


def trees(preset: str, clips: int, repeat: int) -> None:
    """`auto` and every fixed tree, as speedups over plain decoding."""
    captioner = specvlm.load(preset)
    videos = videos_of(captioner, preset, clips)
    methods = {"plain": PLAIN, "auto": AUTO} | FIXED
    alternate(captioner, videos[:3], methods, 1)
    runs = alternate(captioner, videos, methods, repeat)
    print(f"\nPreset `{preset}`, {clips} held-out clips, {repeat} turns, {conditions()}.\n")
    print("| tree | decode: x plain | without reading: x plain | accepted per round |")
    print("|---|---|---|---|")
    for name, timed in runs.items():
        rounds = sum(one.caption.stats.num_drafts for one in timed)
        accepted = sum(one.caption.stats.num_accepted_tokens for one in timed) / rounds if rounds else 0.0
        decode, whole = (
            total(runs["plain"], field) / total(timed, field) for field in ("decode_s", "total_s")
        )
        print(f"| {name} | {decode:.2f} | {whole:.2f} | {accepted:.2f} |")


def useless_draft(preset: str, clips: int) -> None:
    """A draft whose weights are noise, from the first caption of a machine that nothing is known of."""
    captioner = specvlm.load(preset)
    videos = videos_of(captioner, preset, clips)
    alternate(captioner, videos[:2], {"plain": PLAIN, "static": {"tree": "static"}}, 1)
    captioner.costs = CostStore()
    torch.manual_seed(0)
    draft: Any = captioner.draft
    for parameter in draft.model.model.model.language_model.parameters():
        parameter.copy_(0.02 * torch.randn_like(parameter))
    runs = alternate(captioner, videos, {"plain": PLAIN, "auto": AUTO, "static": {"tree": "static"}}, 1)
    print(f"\nPreset `{preset}` with a draft of random weights, {clips} clips, {conditions()}.\n")
    print("| tree | decode: x plain | without reading: x plain | rounds with guesses | accepted per round |")
    print("|---|---|---|---|---|")
    for name in ("auto", "static"):
        rounds = sum(one.caption.stats.num_drafts for one in runs[name])
        accepted = sum(one.caption.stats.num_accepted_tokens for one in runs[name]) / max(rounds, 1)
        decode, whole = (
            total(runs["plain"], field) / total(runs[name], field) for field in ("decode_s", "total_s")
        )
        print(f"| {name} | {decode:.3f} | {whole:.3f} | {rounds} | {accepted:.2f} |")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["trees", "random"])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads; torch's own choice if absent"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if options.what == "trees":
            trees(options.preset, options.clips, options.repeat)
        else:
            useless_draft(options.preset, options.clips)


if __name__ == "__main__":
    main()
