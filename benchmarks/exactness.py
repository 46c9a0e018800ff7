"""How many captions of a demo pair in bfloat16 equal stock's, with and without `exact`, and what that costs.

    OMP_NUM_THREADS=1 python benchmarks/exactness.py --preset demo --clips 300

Held-out clips are captioned by each method in batches of each size, with `exact` and without, one after the other;
the order is turned around from turn to turn. Every caption is compared with what stock `generate()` writes about its
clip alone. Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from acceptance import PROMPT, conditions, drawn

import specvlm
from specvlm.bench.stock import generate, stock_attention
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.loading import DTYPES
from specvlm.preset import find_preset

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"speculate": False},
    "chain of 6": {"tree": "chain", "depth": 6},
    "static": {"tree": "static"},
    "auto": {"tree": "auto"},
}


@dataclass
class Found:
    """What became of the clips, with `exact` or without."""

    equal: int = 0
    settled: int = 0
    tokens: int = 0
    decode_s: list[float] = field(default_factory=list)  # of all clips, one for each timed turn


def stock_tokens(captioner: Captioner, videos: Sequence[PreparedVideo], limit: int) -> list[tuple[int, ...]]:
    """What stock writes about each clip alone."""
    model, device = captioner.target.model, captioner.target.device
    with stock_attention([model]), torch.inference_mode():
        return [generate(model, device, [one.inputs], limit).token_ids[0] for one in videos]


def caption_all(
    captioner: Captioner, videos: Sequence[PreparedVideo], stock: Sequence[tuple[int, ...]], **options: Any
) -> tuple[Found, float]:
    """Caption all clips once; -> what became of them, and the decode time."""
    found, seconds = Found(), 0.0
    for done in captioner.caption_many(videos, on_error="raise", **options):
        assert done.caption is not None
        stats = done.caption.stats
        found.equal += done.caption.token_ids == stock[done.index]
        found.settled += stats.settled_tokens
        found.tokens += stats.completion_tokens
        seconds += stats.decode_s
    return found, seconds


def compare(
    captioner: Captioner,
    videos: Sequence[PreparedVideo],
    stock: Sequence[tuple[int, ...]],
    turns: int,
    **options: Any,
) -> dict[bool, Found]:
    """One method, with `exact` and without, in turns; the first turn warms up."""
    found: dict[bool, Found] = {}
    for turn in range(turns + 1):
        for exact in (True, False) if turn % 2 else (False, True):
            some = videos if turn else videos[: max(1, len(videos) // 8)]
            this, seconds = caption_all(captioner, some, stock, exact=exact, **options)
            if turn:
                this.decode_s = [*found.get(exact, Found()).decode_s, seconds]
                found[exact] = this
    return found


def row(name: str, size: int, clips: int, found: dict[bool, Found]) -> str:
    """A line of the table; the ratio is that of the turns' times, as median and range."""
    exact, loose = found[True], found[False]
    ratios = [b / a for a, b in zip(exact.decode_s, loose.decode_s, strict=True)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    share = 100 * exact.settled / exact.tokens
    return f"| {name} | {size} | {exact.equal} of {clips} | {loose.equal} of {clips} | {share:.3f} % | {spread} |"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=2, help="timed turns, after one that warms up")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    chosen = find_preset(asked.preset)
    assert chosen is not None
    captioner = specvlm.load(asked.preset, dtype=asked.dtype)
    clips = [drawn(i, chosen.frames, captioner.frame_multiple) for i in range(asked.clips)]
    videos = [captioner.prepare(clip, PROMPT) for clip in clips]
    stock = stock_tokens(captioner, videos, asked.max_new_tokens)
    print(f"\nPreset `{asked.preset}`, {asked.dtype}, {asked.clips} held-out clips, {conditions()}.\n")
    print(
        "| method | batch size | equal to stock | without exact | settled tokens | decode speed with / without |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name in asked.methods:
        for size in asked.batch_sizes:
            options = METHODS[name] | {"batch_size": size, "max_new_tokens": asked.max_new_tokens}
            found = compare(captioner, videos, stock, asked.turns, **options)
            print(row(name, size, len(videos), found), flush=True)
    assert captioner.settling is not None
    print(f"\nBound: {captioner.settling.bound:.4f}.")


if __name__ == "__main__":
    main()
