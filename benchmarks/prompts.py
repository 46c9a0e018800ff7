"""Time three prompts on one video against three captions of their own, end to end, alternating in one process.

    python benchmarks/prompts.py --preset demo
    python benchmarks/prompts.py --preset demo-llava --max-new-tokens 200

Draws a minute of h264 and captions it with three prompts, from opening the file to the text: one after the other
alone, and in one session, which reads, preprocesses, sees and prefills the video once. Many frames and short captions
are where prefill dominates. Prints Markdown; figures are medians over turns, the ratio is the median of the turns' own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

import specvlm
from recipes.demo.captions import PROMPTS
from recipes.demo.clips import render, scene_for, seed_for
from recipes.demo.examples import write_video

SECONDS, RATE = 60, 12
ASKED = PROMPTS[:3]
STAGES = ("video_decode_s", "preprocess_s", "vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")


class Timed(NamedTuple):
    """All prompts captioned once."""

    wall_s: float
    captions: Sequence[specvlm.Caption]

    def share(self, stage: str) -> float:
        """A stage's share of the time."""
        return sum(getattr(caption.stats, stage) for caption in self.captions) / self.wall_s


class Turn(NamedTuple):
    """Both ways, right after each other."""

    alone: Timed
    together: Timed


def draw(path: Path, side: int) -> None:
    """Write the file."""
    times = (np.arange(SECONDS * RATE) / RATE).astype(np.float32)
    scene = scene_for(seed_for("examples", 0))
    write_video(path, render(scene, times % 4.0, side, side), times)


def timed(make: Callable[[], Sequence[specvlm.Caption]]) -> Timed:
    """Run one of the two ways."""
    start = time.perf_counter()
    captions = make()
    return Timed(time.perf_counter() - start, captions)


def turns(captioner: Any, video: Path, frames: int, options: argparse.Namespace) -> list[Turn]:
    """Both ways, the order alternating; the first turn warms up and is left out."""
    chosen: dict[str, Any] = {
        "frames": specvlm.FrameSettings(num_frames=frames),
        "max_new_tokens": options.max_new_tokens,
        "tree": options.tree,
        "speculate": not options.plain,
    }
    ways: tuple[Callable[[], Sequence[specvlm.Caption]], ...] = (
        lambda: [captioner.caption(video, prompt, **chosen) for prompt in ASKED],
        lambda: captioner.caption_prompts(video, ASKED, **chosen),
    )
    taken = []
    for number in range(options.repeat + 1):
        order = (0, 1) if number % 2 else (1, 0)
        made = {way: timed(ways[way]) for way in order}
        taken.append(Turn(made[0], made[1]))
    return taken[1:]


def report(frames: int, taken: list[Turn]) -> None:
    """Print a row."""
    first = taken[0]
    same = sum(
        a.token_ids == b.token_ids for a, b in zip(first.alone.captions, first.together.captions, strict=True)
    )
    alone, together = (statistics.median(turn[way].wall_s for turn in taken) for way in (0, 1))
    ratio = statistics.median(turn.alone.wall_s / turn.together.wall_s for turn in taken)
    tokens = sum(len(caption.token_ids) for caption in first.alone.captions)
    shares = [statistics.median(turn.alone.share(stage) for turn in taken) for stage in STAGES]
    cells = [
        str(frames),
        str(first.alone.captions[0].stats.video_tokens),
        str(tokens),
        *(f"{100 * share:.0f} %" for share in shares),
        f"{alone:.2f}",
        f"{together:.2f}",
        f"{ratio:.2f}",
        f"{same}/{len(ASKED)}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Draw, caption, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--tree", default="static")
    parser.add_argument("--plain", action="store_true", help="without the draft")
    parser.add_argument("--side", type=int, default=192, help="height and width of the drawn video")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    captioner = specvlm.load(options.preset)
    print(
        f"Preset `{options.preset}`, {len(ASKED)} prompts of at most {options.max_new_tokens} tokens each on one video "
        f"of {SECONDS} s, {options.repeat} turns, {platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__} with {torch.get_num_threads()} threads, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}. Shares are of the three separate captions.\n"
    )
    names = [stage.removesuffix("_s").replace("_", " ") for stage in STAGES]
    print(
        f"| frames | video tokens | tokens written | {' | '.join(names)} | separately s | together s | ratio | same |"
    )
    print("|---|---|---|" + "---|" * (len(names) + 4))
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "minute.mp4"
        draw(video, options.side)
        for frames in options.frames:
            report(frames, turns(captioner, video, frames, options))


if __name__ == "__main__":
    main()
