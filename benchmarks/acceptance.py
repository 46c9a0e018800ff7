"""Measure how many guesses of a demo pair's draft are accepted, by pruner, prune ratio, positions and tree.

    python benchmarks/acceptance.py --preset demo --clips 300

Every caption is compared with plain decoding. Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import numpy as np
import torch
import transformers

import specvlm
from recipes.demo.clips import render, scene_for, seed_for
from specvlm.config import PRUNERS, FrameSettings
from specvlm.preset import find_preset

PROMPT = "Describe the video."
RATIOS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)


def conditions() -> str:
    """Machine and versions, in one line."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def acceptance(preset: str, options: argparse.Namespace) -> None:
    """Mean accepted tokens per round over held-out clips, by pruner, prune ratio and positions."""
    clips, limit, ratios = options.clips, options.max_new_tokens, options.ratios
    chosen = find_preset(preset)
    assert chosen is not None
    captioner = specvlm.load(preset)
    multiple = captioner.target.family.frame_multiple(captioner.processor)
    videos = [captioner.prepare(drawn(i, chosen.frames, multiple), PROMPT) for i in range(clips)]
    plain = [captioner.caption(v, speculate=False, max_new_tokens=limit).token_ids for v in videos]
    print(f"\nPreset `{preset}`, {clips} held-out clips, {conditions()}. Mean accepted tokens per round.\n")
    print(f"| tree | positions | pruner | {' | '.join(str(r) for r in ratios)} |")
    print(f"|---|---|---|{'---|' * len(ratios)}")
    for tree in options.trees:
        for positions in options.positions:
            for pruner in options.pruners:
                chosen_now = {"tree": tree, "positions": positions, "pruner": pruner, "max_new_tokens": limit}
                cells = [accepted(captioner, videos, plain, chosen_now | {"prune_ratio": r}) for r in ratios]
                print(f"| {tree} | {positions} | {pruner} | {' | '.join(cells)} |", flush=True)


def drawn(index: int, frames: FrameSettings, multiple: int) -> specvlm.Frames:
    """A held-out clip as the reader would give it: 4 s at the preset's frame rate."""
    count = int(4 * (frames.fps or 2.0)) // multiple * multiple
    times = [i * 4.0 / count for i in range(count)]
    return specvlm.Frames(
        render(scene_for(seed_for("held-out", index)), np.array(times), 96, 96), np.array(times)
    )


def accepted(captioner: Any, videos: list[Any], plain: list[tuple[int, ...]], options: dict[str, Any]) -> str:
    """Total accepted tokens over total rounds; a caption that differs from plain decoding is an error."""
    tokens = rounds = 0
    for video, expected in zip(videos, plain, strict=True):
        caption = captioner.caption(video, **options)
        if caption.token_ids != expected:
            raise SystemExit(f"caption differs from plain decoding under {options}")
        tokens += caption.stats.num_accepted_tokens
        rounds += caption.stats.num_drafts
    return f"{tokens / rounds:.2f}"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--trees", nargs="+", default=["static"])
    parser.add_argument("--positions", nargs="+", default=["keep", "compact"])
    parser.add_argument("--pruners", nargs="+", default=[name for name in PRUNERS if name != "none"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads; torch's own choice if absent"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    acceptance(options.preset, options)


if __name__ == "__main__":
    main()
