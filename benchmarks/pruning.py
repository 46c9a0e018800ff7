"""Measure what pruning the draft's video tokens gains on long clips: speed, and the draft's share of time and memory.

    python benchmarks/pruning.py --json pruning.json
    python benchmarks/pruning.py --draft benchmarks/long_pair/draft-6-layers --trees chain

Held-out clips of four seconds, drawn with many frames (18 video tokens each), are captioned by plain decoding and with
the draft: each tree with each pruner and prune ratio, in batches of each size. Methods alternate, and every caption
must equal that of plain decoding. What is the same for all methods is done and timed once for each clip:
preprocessing, both vision towers, and the target's prefill up to the last video token. End-to-end times include it.
Stock `generate()` captions each clip once, at batch size 1. Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acceptance import conditions, drawn

import specvlm
from recipes.demo.clips import CLIP_SECONDS
from specvlm.batch import CaptionBatch
from specvlm.bench.stock import generate, stock_attention
from specvlm.captioner import Captioner, CaptionOptions, PreparedVideo
from specvlm.config import PRUNERS, TREES, FrameSettings
from specvlm.prefill import Begun, ToSee, embed

PAIR = Path(__file__).parent / "long_pair"
PLAIN, STOCK = "plain", "stock"


@dataclass(frozen=True)
class LongClip:
    """A clip with what all methods share, and how long that took."""

    video: PreparedVideo
    begun: Begun
    target_s: float
    draft_s: float
    plain: tuple[int, ...]


@dataclass
class Turn:
    """Totals of one method over one group of clips that were captioned together."""

    decode_s: float = 0.0
    e2e_s: float = 0.0
    draft_decode_s: float = 0.0
    draft_s: float = 0.0
    """Of `e2e_s`, the draft's vision tower and prefill included."""
    draft_bytes: int = 0
    kv_bytes: int = 0
    tokens: int = 0
    rounds: int = 0
    accepted: int = 0


def token_s(turn: Turn) -> float:
    """Time of decoding for each token after the first."""
    return turn.decode_s / turn.tokens


def e2e_s(turn: Turn) -> float:
    """From the drawn frames to the text."""
    return turn.e2e_s


SHARES: tuple[Callable[[Turn], float], ...] = (
    lambda turn: turn.draft_decode_s / turn.decode_s,
    lambda turn: turn.draft_s / turn.e2e_s,
    lambda turn: turn.draft_bytes / turn.kv_bytes,
)
"""What of decoding, of all time, and of the memory of keys and values is the draft's."""


@dataclass
class Row:
    """A method at one number of frames and one batch size, with its turns: the groups of a turn follow each other."""

    video_tokens: int
    batch_size: int
    label: str
    options: CaptionOptions
    turns: list[Turn] = field(default_factory=list)

    def median(self, figure: Callable[[Turn], float]) -> float:
        """Over turns."""
        return float(np.median([figure(turn) for turn in self.turns]))

    def over(self, base: Row, time_of: Callable[[Turn], float], spread: bool = True) -> str:
        """How much faster than another method: the median of ratios, with p10 to p90."""
        pairs = [(base.turns[i % len(base.turns)], turn) for i, turn in enumerate(self.turns)]
        low, middle, high = np.percentile([time_of(b) / time_of(own) for b, own in pairs], (10, 50, 90))
        return f"{middle:.2f} ({low:.2f} to {high:.2f})" if spread else f"{middle:.2f}"


def methods(asked: argparse.Namespace) -> dict[str, CaptionOptions]:
    """Plain decoding, and each tree with nothing pruned and with each pruner and ratio."""
    limit = asked.max_new_tokens
    found: dict[str, CaptionOptions] = {PLAIN: {"max_new_tokens": limit}}
    for tree in asked.trees:
        shape: CaptionOptions = {"tree": tree, "max_new_tokens": limit}
        name = tree
        if tree == "chain":
            shape["depth"], name = asked.depth, f"chain of {asked.depth}"
        found[f"none, {name}"] = {**shape, "pruner": "none", "prune_ratio": 0.0}
        for ratio, pruner in product(asked.ratios, asked.pruners):
            found[f"{pruner} {ratio:g}, {name}"] = {**shape, "pruner": pruner, "prune_ratio": ratio}
    return found


def read(captioner: Captioner, index: int, frames: int, plain: CaptionOptions) -> LongClip:
    """Draw a clip, and do what all methods share."""
    source = drawn(index, FrameSettings(fps=frames / CLIP_SECONDS), captioner.frame_multiple)
    draft: Any = captioner.draft
    video, begun = captioner.prepare(source), Begun()
    caption = captioner.caption_one(video, captioner.kind(False, plain), begun=begun)
    target_s = video.preprocess_s + caption.stats.vision_s + caption.stats.target_prefill_s
    start = time.perf_counter()
    with torch.inference_mode():
        embed(draft.model, [ToSee(video.inputs, begun.features)])
    return LongClip(video, begun, target_s, time.perf_counter() - start, caption.token_ids)


def caption_together(captioner: Captioner, clips: Sequence[LongClip], row: Row) -> Turn:
    """Caption a group of clips at once."""
    kind, turn = captioner.kind(row.label != PLAIN, row.options), Turn()
    spare = kind.generation.max_new_tokens + captioner.nodes(kind)
    draft: Any = captioner.draft
    batch = CaptionBatch(captioner, len(clips))
    for number, clip in enumerate(clips):
        batch.add(number, clip.video, kind, begun=clip.begun)
    while len(batch):
        for ended in batch.step():
            assert ended.caption is not None, ended.error
            assert isinstance(ended.key, int)
            clip, stats = clips[ended.key], ended.caption.stats
            if ended.caption.token_ids != clip.plain:
                raise SystemExit(f"a caption differs from plain decoding's: {row}")
            kept, slots = stats.video_tokens_kept, stats.prompt_tokens + spare
            draft_prefill_s = stats.draft_prefill_s
            if kept:  # `auto` may have left the draft out
                draft_prefill_s += clip.draft_s
                turn.draft_bytes += draft.slot_bytes * (slots - stats.video_tokens + kept)
            turn.kv_bytes += captioner.target.slot_bytes * slots
            turn.decode_s += stats.decode_s
            turn.e2e_s += clip.target_s + draft_prefill_s + stats.decode_s
            turn.draft_decode_s += stats.draft_s
            turn.draft_s += draft_prefill_s + stats.draft_s
            turn.tokens += len(clip.plain) - 1
            turn.rounds += stats.num_drafts
            turn.accepted += stats.num_accepted_tokens
    turn.kv_bytes += turn.draft_bytes
    return turn


def caption_by_stock(captioner: Captioner, clip: LongClip, limit: int) -> tuple[Turn, bool]:
    """Caption a clip by `generate()`; -> also whether its caption is the same."""
    target = captioner.target
    with stock_attention([target.model]), torch.inference_mode():
        made = generate(target.model, target.embedding_device, [clip.video.inputs], limit)
    e2e_s = clip.video.preprocess_s + made.prefill_s + made.steps_s
    return Turn(made.steps_s, e2e_s, tokens=len(made.token_ids[0]) - 1), made.token_ids[0] == clip.plain


def measure(captioner: Captioner, frames: int, asked: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure all methods at one number of frames, one batch size after the other; one clip warms up."""
    every, clips, by_stock = methods(asked), list[LongClip](), list[tuple[Turn, bool]]()
    say(f"{frames} frames: reading clips")
    for index in (0, *range(max(asked.clips, *asked.batch_sizes))):
        clips.append(read(captioner, index, frames, every[PLAIN]))
        if len(clips) <= asked.clips + 1:
            by_stock.append(caption_by_stock(captioner, clips[-1], asked.max_new_tokens))
    del clips[0], by_stock[0]  # warm-up
    print(
        f"\n{frames} frames: {sum(same for _, same in by_stock)} of {len(by_stock)} captions equal stock's."
    )
    tokens = clips[0].video.inputs.video_tokens
    for size in asked.batch_sizes:
        rows = [Row(tokens, size, label, options) for label, options in every.items()]
        groups = [clips[at : at + size] for at in range(0, max(size, asked.clips - size + 1), size)]
        for turn in range(asked.repeat + 1):
            for group in groups if turn else [clips[:1]]:
                for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
                    say(f"{frames} frames, batch size {size}, turn {turn} of {asked.repeat}: {row.label}")
                    row.turns += [caption_together(captioner, group, row)][: turn and 1]
        if size == 1:
            rows.append(Row(tokens, size, STOCK, every[PLAIN], [turn for turn, _ in by_stock]))
        yield rows


def table(rows: list[Row]) -> None:
    """Print a row for each method, those of stock and plain decoding left out."""
    by_label = {row.label: row for row in rows}
    plain, stock = by_label.pop(PLAIN), by_label.pop(STOCK, None)
    heads = ["", "accepted", "decode x plain", "end to end x plain"]
    heads += ["decode x stock", "end to end x stock"] if stock else []
    heads += ["draft's share of decoding", "of end to end", "of keys and values"]
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for row in by_label.values():
        cells = [row.label, f"{row.median(lambda turn: turn.accepted / max(turn.rounds, 1)):.2f}"]
        cells += [row.over(plain, token_s), row.over(plain, e2e_s)]
        cells += [row.over(stock, token_s, False), row.over(stock, e2e_s, False)] if stock else []
        cells += [f"{100 * row.median(share):.1f} %" for share in SHARES]
        print(f"| {' | '.join(cells)} |")
    if stock:
        ratios = f"{plain.over(stock, token_s)} in decoding, {plain.over(stock, e2e_s)} end to end"
        print(f"\nPlain decoding is {ratios} x stock.")


def say(text: str) -> None:
    """Print progress on stderr, each line over the last one."""
    print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, default=PAIR / "target")
    parser.add_argument("--draft", type=Path, default=PAIR / "draft")
    parser.add_argument("--frames", type=int, nargs="+", default=[112, 448], help="of a clip")
    parser.add_argument(
        "--clips", type=int, default=4, help="fewest clips; a larger batch takes as many as it has"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=["specvlm", "uniform"])
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95], help="besides nothing pruned"
    )
    parser.add_argument("--trees", nargs="+", choices=TREES, default=["chain", "auto"])
    parser.add_argument("--depth", type=int, default=6, help="of chains")
    parser.add_argument("--repeat", type=int, default=3, help="timed turns")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="write every turn to this file")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    captioner = specvlm.load(str(asked.target), draft=str(asked.draft))
    print(f"\n{asked.repeat} turns, at most {asked.max_new_tokens} tokens a caption, {conditions()}.")
    found: list[Row] = []
    for frames in asked.frames:
        for rows in measure(captioner, frames, asked):
            print(f"\n{rows[0].video_tokens:,} video tokens, batch size {rows[0].batch_size}:\n")
            table(rows)
            found += rows
    if asked.json:
        asked.json.write_text(
            json.dumps({"conditions": conditions(), "rows": [asdict(row) for row in found]})
        )


if __name__ == "__main__":
    main()
