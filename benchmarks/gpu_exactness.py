"""Captions in bfloat16 and float16 against stock `generate()`, with and without `exact`: one part of benchmarks/gpu.py.

Random weights are the worst case: near-ties of the best two logits are as common as they get.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from specvlm.attention import RoundAttention
from specvlm.bench.stock import generate, stock_attention
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.decode import Decoder
from specvlm.drafts.base import Draft
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.published import Shape
from specvlm.settling import Settling

PLAIN: dict[str, Any] = {"speculate": False}
CHAIN: dict[str, Any] = {"tree": "chain", "depth": 5}
STATIC: dict[str, Any] = {"tree": "static"}
DYNAMIC: dict[str, Any] = {"tree": "dynamic"}
WAYS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("plain", 1, PLAIN),
    ("chain", 1, CHAIN),
    ("static", 1, STATIC),
    ("dynamic", 1, DYNAMIC),
    ("head", 1, CHAIN),
    ("plain", 4, PLAIN),
    ("chain", 4, CHAIN),
    ("static", 8, STATIC),
)
PREFILL = "prefill"  # made the token, not a pass over so many rows


@dataclass(frozen=True)
class Exactness:
    """What is asked of captions in half precision."""

    dtypes: tuple[torch.dtype, ...]
    pairs: tuple[tuple[Shape, Shape], ...]  # the targets are used, as their own drafts
    attentions: tuple[RoundAttention, ...]
    new_tokens: int
    seeds: int  # of each random model
    videos: int
    budget_s: float


def exactness_rows(
    captioner: Captioner,
    head: Draft,
    videos: Sequence[PreparedVideo],
    asked: Exactness,
    attention: RoundAttention,
) -> Iterator[dict[str, Any]]:
    """Each way to decode, with and without `exact`, against what stock writes about each video alone.

    Args:
        captioner: With a small draft.
        head: Guesses in the way "head".
        videos: With their prompts; used again where a batch has more rows.
        asked: How much.
        attention: Of rounds.
    """
    small = captioner.draft
    assert isinstance(small, SmallModelDraft)
    captioner.target.round_attention = small.model.round_attention = attention
    stock = _stock(captioner, videos, asked.new_tokens)
    # Measured anew, for this attention.
    captioner.settling = Settling()
    for way, size, options in WAYS:
        captioner.draft = head if way == "head" else small
        for exact in (True, False):
            many = [number % len(videos) for number in range(max(size, len(videos)))]
            yield {"way": way, "batch_size": size, "exact": exact} | _compare(
                captioner,
                [videos[number] for number in many],
                [stock[number] for number in many],
                options | {"batch_size": size, "exact": exact, "max_new_tokens": asked.new_tokens},
            )
    captioner.draft = small


def _stock(captioner: Captioner, videos: Sequence[PreparedVideo], limit: int) -> list[tuple[int, ...]]:
    model, device = captioner.target.model, captioner.target.device
    with stock_attention([model]), torch.inference_mode():
        return [generate(model, device, [one.inputs], limit).token_ids[0] for one in videos]


def _compare(
    captioner: Captioner,
    videos: Sequence[PreparedVideo],
    stock: Sequence[tuple[int, ...]],
    options: dict[str, Any],
) -> dict[str, Any]:
    equal, settled, tokens, margins = 0, 0, 0, list[float]()
    differing = list[tuple[tuple[int, ...], int]]()  # a caption, and the first index where it leaves stock's
    with recorded_rows() as recorded:
        for done in captioner.caption_many(videos, on_error="raise", **options):
            assert done.caption is not None
            ours, theirs, stats = done.caption.token_ids, stock[done.index], done.caption.stats
            settled, tokens = settled + stats.settled_tokens, tokens + stats.completion_tokens
            margins += [] if stats.smallest_margin is None else [stats.smallest_margin]
            equal += ours == theirs
            if ours != theirs:
                differing.append((ours, first_difference(ours, theirs)))
    first = Counter(_made_by(recorded, caption, index) for caption, index in differing)
    settling = captioner.settling
    return {
        "captions": len(videos),
        "equal": equal,
        "tokens": tokens,
        "settled": settled,
        "settled_share": settled / tokens,
        "bound": None if settling is None else settling.bound,
        "smallest_margin": min(margins, default=None),
        "first_differences": dict(first),
    }


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The first index at which two captions differ, or the length of the shorter one."""
    shortest = min(len(ours), len(theirs))
    return next((i for i in range(shortest) if ours[i] != theirs[i]), shortest)


def _made_by(
    recorded: Sequence[tuple[Sequence[int], Sequence[int]]], caption: Sequence[int], index: int
) -> str:
    """Rows verified in the pass that made a token of a caption."""
    rows = next((rows for tokens, rows in recorded if tuple(tokens) == tuple(caption)), ())
    if index >= len(rows):
        return "end"
    return str(rows[index]) if rows[index] else PREFILL


@contextmanager
def recorded_rows() -> Iterator[list[tuple[list[int], list[int]]]]:
    """Record the tokens of every caption, and of each token how many rows its pass verified; 0: the prefill made it."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    recorded: list[tuple[list[int], list[int]]] = []
    hear, decide = Decoder._hear, Decoder._decide

    def note(decoder: Decoder, rows: int) -> None:
        for row in decoder._rows:
            if row.sequence is None:
                continue
            tokens = row.sequence.text.tokens
            if id(tokens) not in found:
                found[id(tokens)] = tokens, []
                recorded.append(found[id(tokens)])
            of_each = found[id(tokens)][1]
            of_each += [rows] * (len(tokens) - len(of_each))

    def heard(self: Decoder, shape: Any, *more: Any) -> Any:
        note(self, 0)
        verified = len(self._rows) * shape.nodes
        undecided = hear(self, shape, *more)
        note(self, verified)
        return undecided

    def decided(self: Decoder, *more: Any) -> None:
        note(self, 0)
        decide(self, *more)
        note(self, 1)

    Decoder._hear, Decoder._decide = heard, decided  # type: ignore[method-assign]
    try:
        yield recorded
    finally:
        Decoder._hear, Decoder._decide = hear, decide  # type: ignore[method-assign]
