"""Reckon whether sequences of a batch should guess unequally: one depth for all, or a budget of nodes shared by chance.

    python benchmarks/node_budget.py --preset demo --clips 64

Captions of drawn clips are made with long chains, which tells for each token whether the draft would have guessed it,
and with `--tree auto`, which tells what rounds cost on this machine. From both, batches are replayed on paper, each
step with the depths that promise the most tokens per second: the same for all sequences, as `auto` does it; one for
each, from how often its own guesses were right of late; and one for each by an oracle that knows how many will be
right, which bounds what any budget can gain. Verification is reckoned as if unequal depths needed no padding. Prints
Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from acceptance import PROMPT, conditions, drawn

import specvlm
from specvlm.captioner import Captioner
from specvlm.costs import Prices
from specvlm.decode import CaptionText
from specvlm.preset import find_preset

DEPTH = 16
PRIOR, PRIOR_WEIGHT = 0.8, 4.0  # of a guess being right, before a caption has shown its own share
MEMORY = 0.97  # of one judged guess


@dataclass
class Caption:
    """One caption on paper.

    Attributes:
        right: For each token after the first, whether the draft guesses it.
        at: Tokens written.
        seen: Weighted guesses that were judged.
        hits: Of them, those that were right.
    """

    right: list[bool]
    at: int = 0
    seen: float = PRIOR_WEIGHT
    hits: float = PRIOR_WEIGHT * PRIOR

    def run(self) -> int:
        """How many guesses in a row are right from here."""
        count = 0
        while self.at + count < len(self.right) and self.right[self.at + count] and count < DEPTH:
            count += 1
        return count

    def write(self, depth: int) -> int:
        """One round with so many guesses; -> tokens written."""
        run = min(self.run(), depth)
        for hit in [True] * run + [False] * (run < depth):
            self.seen, self.hits = MEMORY * self.seen + 1.0, MEMORY * self.hits + hit
        written = min(run + 1, len(self.right) - self.at)
        self.at += written
        return written


Rule = Callable[[Sequence[Caption], Prices], list[int]]


def seconds(prices: Prices, depths: Sequence[int]) -> float:
    """A step in which each sequence guesses so many tokens."""
    rows, deepest = len(depths), max(depths)
    if not deepest:
        return prices.plain_s
    nodes = sum(depths) / rows + 1.0
    below = int(nodes)
    verify_s = prices.verify_s[below] + (nodes - below) * (
        prices.verify_s[below + 1] - prices.verify_s[below]
    )
    draft_s = float(prices.draft.at([(float(deepest), float(sum(depths)), float(sum(depths)))])[0])
    return verify_s + draft_s + prices.rest_s


def equal(captions: Sequence[Caption], prices: Prices) -> list[int]:
    """The one depth that promises most by the share of all."""
    share = sum(one.hits for one in captions) / sum(one.seen for one in captions)
    tokens = [sum(share**i for i in range(depth + 1)) for depth in range(DEPTH + 1)]
    best = max(range(DEPTH + 1), key=lambda d: tokens[d] / seconds(prices, [d] * len(captions)))
    return [best] * len(captions)


def by_share(captions: Sequence[Caption], prices: Prices) -> list[int]:
    """Guess by guess to the sequence whose next one is likeliest right, as long as that pays."""
    shares = [one.hits / one.seen for one in captions]
    return _spent(prices, [[share ** (i + 1) for i in range(DEPTH)] for share in shares])


def oracle(captions: Sequence[Caption], prices: Prices) -> list[int]:
    """The same by what will be right."""
    runs = [one.run() for one in captions]
    return _spent(prices, [[1.0] * run + [0.0] * (DEPTH - run) for run in runs])


def _spent(prices: Prices, chances: Sequence[Sequence[float]]) -> list[int]:
    depths, tokens = [0] * len(chances), float(len(chances))
    best, rate = list(depths), tokens / seconds(prices, depths)
    order = sorted(
        ((chance, -depth, row) for row, of_row in enumerate(chances) for depth, chance in enumerate(of_row)),
        reverse=True,
    )
    for chance, _, row in order:
        depths[row] += 1
        tokens += chance
        if tokens / seconds(prices, depths) > rate:
            best, rate = list(depths), tokens / seconds(prices, depths)
    return best


def replay(right: Sequence[list[bool]], size: int, prices: Callable[[int], Prices], rule: Rule) -> float:
    """Tokens per second of decoding all captions, `size` at a time."""
    waiting = [Caption(list(one)) for one in right if one]
    running: list[Caption] = []
    tokens, spent_s = 0, 0.0
    while waiting or running:
        while waiting and len(running) < size:
            running.append(waiting.pop(0))
        depths = rule(running, prices(len(running)))
        spent_s += seconds(prices(len(running)), depths)
        tokens += sum(one.write(depth) for one, depth in zip(running, depths, strict=True))
        running = [one for one in running if one.at < len(one.right)]
    return tokens / spent_s


def learned(captioner: Captioner, videos: Sequence[Any], sizes: Sequence[int]) -> list[list[bool]]:
    """Which tokens the draft guesses; and, left in the captioner, what rounds cost."""
    rounds: dict[int, list[int]] = {}
    texts: list[CaptionText] = []  # kept, so that no two have one id
    count = CaptionText.count

    def noting(self: CaptionText, shape: Any, accepted: int) -> None:
        texts.append(self)
        rounds.setdefault(id(self), []).append(accepted)
        count(self, shape, accepted)

    CaptionText.count = noting  # type: ignore[method-assign]
    try:
        list(captioner.caption_many(videos, batch_size=8, on_error="raise", tree="chain", depth=DEPTH))
    finally:
        CaptionText.count = count  # type: ignore[method-assign]
    for size in sizes:
        for _ in range(2):
            list(captioner.caption_many(videos, batch_size=size, on_error="raise", tree="auto"))
    # What follows DEPTH right guesses was not judged; it counts as right.
    return [[hit for one in of_text for hit in [True] * one + [one == DEPTH]] for of_text in rounds.values()]


def main() -> None:
    """Learn, replay, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch-sizes", default="1,4,8,16,32")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = find_preset(options.preset)
    if chosen is None:
        raise SystemExit(f"--preset {options.preset} is unknown")
    captioner = specvlm.load(options.preset)
    videos = [
        captioner.prepare(drawn(i, chosen.frames, captioner.frame_multiple), PROMPT)
        for i in range(options.clips)
    ]
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    right = learned(captioner, videos, sizes)
    costs = captioner.costs.costs(videos[0].inputs.prompt_tokens)
    known: dict[int, Prices] = {}

    def prices(rows: int) -> Prices:
        if rows not in known:
            found = costs.prices(rows, DEPTH + 2)
            assert found is not None
            known[rows] = found
        return known[rows]

    share = sum(map(sum, right)) / sum(map(len, right))
    print(
        f"Preset `{options.preset}`, {len(right)} captions, {100 * share:.0f} % of their tokens guessed, chains up to "
        f"{DEPTH}, {conditions()}.\n"
    )
    print(
        "| sequences | one depth, tokens/s | a depth each, by its own share | by an oracle |\n|---:|---:|---:|---:|"
    )
    for size in sizes:
        base, own, most = (replay(right, size, prices, rule) for rule in (equal, by_share, oracle))
        print(f"| {size} | {base:,.0f} | x {own / base:.3f} | x {most / base:.3f} |")


if __name__ == "__main__":
    main()
