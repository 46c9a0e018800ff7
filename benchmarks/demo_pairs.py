"""Measure the demo pairs: speed on real files against stock `generate()`, and acceptance over pruning.

    python benchmarks/demo_pairs.py speed --preset demo
    python benchmarks/demo_pairs.py acceptance --preset demo --clips 300

Everything compared runs in this one process, methods alternating after a warm-up; figures are medians per clip, and
ratios are of their totals. Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

import specvlm
from specvlm.config import PRUNERS, FrameSettings
from specvlm.demo.clips import render, scene_for, seed_for
from specvlm.preset import find_preset

PROMPT = "Describe the video."
EXAMPLES = Path(__file__).parent.parent / "examples" / "videos"
RATIOS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"speculate": False},
    "chain, depth 5": {"tree": "chain"},
    "static": {"tree": "static"},
    "dynamic, 26 nodes": {"tree": "dynamic"},
    "dynamic, 12 nodes": {"tree": "dynamic", "nodes": 12, "width": 2},
    "static, nothing pruned": {"tree": "static", "pruner": "none"},
    "static, uniform": {"tree": "static", "pruner": "uniform"},
}


class Timed(NamedTuple):
    """One caption and what it took."""

    tokens: tuple[int, ...]
    decode_s: float
    total_s: float
    accepted: float | None


class _FirstToken:
    """A streamer that notes when stock `generate()` has its first new token."""

    def __init__(self) -> None:
        self.calls, self.first_s = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """The first call is the prompt, the second the first new token."""
        self.calls += 1
        if self.calls == 2:
            self.first_s = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


def run_stock(model: Any, captioner: Any, video: Path, limit: int) -> Timed:
    """Stock `generate()`: KV cache on, sdpa, on the same frames; decoding counts from its first token."""
    start = time.perf_counter()
    inputs = captioner.prepare(video, PROMPT).inputs
    clock = _FirstToken()
    with torch.inference_mode():
        out = model.generate(**inputs.tensors, max_new_tokens=limit, do_sample=False, streamer=clock)
    end = time.perf_counter()
    return Timed(tuple(out[0, inputs.prompt_tokens :].tolist()), end - clock.first_s, end - start, None)


def run_ours(captioner: Any, video: Path, limit: int, options: dict[str, Any]) -> Timed:
    """One of our methods, file to text."""
    caption = captioner.caption(video, PROMPT, max_new_tokens=limit, **options)
    stats = caption.stats
    return Timed(caption.token_ids, stats.decode_s, stats.total_s, stats.mean_accepted_tokens)


def conditions() -> str:
    """Machine and versions, in one line."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def speed(preset: str, repeat: int, limit: int) -> None:
    """All methods on all example clips, alternating."""
    captioner = specvlm.load(preset)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(
        captioner.info.target, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    videos = sorted(p for p in EXAMPLES.iterdir() if p.suffix in (".mp4", ".webm"))
    runs: dict[str, dict[Path, list[Timed]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(repeat + 1):
        names = ["stock", *METHODS]
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for video in videos:
            for name in names:
                if name == "stock":
                    timed = run_stock(stock, captioner, video, limit)
                else:
                    timed = run_ours(captioner, video, limit, METHODS[name])
                if turn:  # the first turn warms up
                    runs[name][video].append(timed)
    report_speed(runs, preset, len(videos), repeat)


def report_speed(runs: dict[str, dict[Path, list[Timed]]], preset: str, videos: int, repeat: int) -> None:
    """Print the table."""

    def total(name: str, field: str) -> float:
        return sum(statistics.median(getattr(t, field) for t in timed) for timed in runs[name].values())

    print(f"Preset `{preset}`, {videos} clips of examples/videos, {repeat} timed turns, {conditions()}.\n")
    print(
        "| method | decode ms/token | decode: x plain | x stock | end to end: x plain | x stock | accepted | exact |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in ["stock", *METHODS]:
        same = [timed[0].tokens == runs["stock"][video][0].tokens for video, timed in runs[name].items()]
        steps = sum(len(timed[0].tokens) - 1 for timed in runs[name].values())
        accepted = [t.accepted for timed in runs[name].values() for t in timed if t.accepted is not None]
        ratios = [
            f"{total(base, field) / total(name, field):.2f}"
            for field in ("decode_s", "total_s")
            for base in ("plain", "stock")
        ]
        mean = f"{statistics.mean(accepted):.2f}" if accepted else ""
        per_token = total(name, "decode_s") / steps * 1e3
        print(f"| {name} | {per_token:.2f} | {' | '.join(ratios)} | {mean} | {sum(same)}/{len(same)} |")


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
    parser.add_argument("what", choices=["speed", "acceptance"])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--repeat", type=int, default=7)
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
    if options.what == "speed":
        speed(options.preset, options.repeat, options.max_new_tokens)
    else:
        acceptance(options.preset, options)


if __name__ == "__main__":
    main()
