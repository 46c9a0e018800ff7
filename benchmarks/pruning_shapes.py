"""Work out, by published shapes alone, how much a round of decoding reads with and without pruning of the draft.

    python benchmarks/pruning_shapes.py
    python benchmarks/pruning_shapes.py --pair qwen2.5-vl-72b qwen2.5-vl-7b --video-tokens 16000

Decoding a small batch is limited by memory: each pass reads all weights once, and the keys and values of every caption.
A round is one pass of the target and one of the draft for each level of the tree. Pruning makes the draft's keys and
values smaller. Nothing is run or loaded; prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import NamedTuple

from modelled import find_shape, pass_bytes

from specvlm.pruning import budget_for
from specvlm.published import Shape

BYTES = 2  # of a number, bfloat16
PAIRS = (("qwen2.5-vl-7b", "qwen2.5-vl-3b"), ("llava-onevision-7b", "llava-onevision-0.5b"))


class Round(NamedTuple):
    """What a round of a batch reads, in bytes; and the keys and values that each model keeps."""

    target: int
    draft: int
    target_kv: int
    draft_kv: int

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.target + self.draft

    @property
    def draft_share(self) -> float:
        """The draft's share of what is read."""
        return self.draft / self.total

    @property
    def kv_share(self) -> float:
        """The draft's share of the memory of keys and values."""
        return self.draft_kv / (self.draft_kv + self.target_kv)


def round_of(
    target: Shape, draft: Shape, video_tokens: int, kept: int, text_tokens: int, batch: int, depth: int
) -> Round:
    """A round whose draft sees `kept` of the video tokens."""
    target_kv = batch * (video_tokens + text_tokens) * target.text.slot_bytes(BYTES)
    draft_kv = batch * (kept + text_tokens) * draft.text.slot_bytes(BYTES)
    target_weights, draft_weights = (pass_bytes(one.text, 0, BYTES) for one in (target, draft))
    return Round(target_weights + target_kv, depth * (draft_weights + draft_kv), target_kv, draft_kv)


def table(target: Shape, draft: Shape, asked: argparse.Namespace) -> None:
    """Print a row for each number of video tokens, batch size and prune ratio."""
    print(f"\n{target.name} with {draft.name}, a chain of {asked.depth}:\n")
    heads = ["video tokens", "batch", "pruned", "a round reads, GB", "draft's share", "of keys and values"]
    print(f"| {' | '.join([*heads, 'gain at equal acceptance'])} |\n|{'---:|' * 7}")
    for video_tokens, batch in product(asked.video_tokens, asked.batch_sizes):
        rest = (asked.text_tokens, batch, asked.depth)
        unpruned = round_of(target, draft, video_tokens, video_tokens, *rest)
        for ratio in asked.ratios:
            found = round_of(target, draft, video_tokens, budget_for(video_tokens, ratio), *rest)
            print(
                f"| {video_tokens:,} | {batch} | {ratio:g} | {found.total / 1e9:.1f} | {100 * found.draft_share:.0f} % "
                f"| {100 * found.kv_share:.0f} % | {unpruned.total / found.total:.2f} |"
            )


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", nargs=2, action="append", metavar=("TARGET", "DRAFT"), help="published shapes"
    )
    parser.add_argument("--video-tokens", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--text-tokens", type=int, default=128, help="prompt and half of the caption")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.9])
    parser.add_argument("--depth", type=int, default=6, help="of the chain")
    asked = parser.parse_args()
    for target, draft in asked.pair or PAIRS:
        table(find_shape(target), find_shape(draft), asked)


if __name__ == "__main__":
    main()
