"""The plain baseline of a run: which videos get one, what both ways of decoding say together; its estimate elsewhere.

Sampled videos are decoded in sets, a batch of their own, with the draft and plainly: same process, same batch size.
What comes before the first token is shared, and counts in full on both sides, as if either were alone. So that
neither way profits from being second, every other set is decoded plainly first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from specvlm.records import Caption

Source = Literal["measured", "estimated"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One caption, decoded with the draft and plainly, or the second estimated. Times are shares of steps.

    Attributes:
        baseline_token_s: Plain time per token after the first; None for a caption of one token.
        baseline_decode_s: Plain time of everything after the first token.
        decode_speedup: Plain time per token / speculative time per token, both after the first token. With
            equal tokens, which `exact_match` says, this is baseline_decode_s / decode_s.
        e2e_speedup: Plain total_s / speculative total_s. Reading, preprocessing, vision and the target's prefill
            were done once and count fully in both; the draft's own prefill counts on the speculative side. Of a
            video's several prompts the first has what they share, in both.
        exact_match: The same token ids, the end-of-sequence token included, plainly and, where that was tried, in a
            batch of one; None where nothing was decoded plainly.
        speedup_source: `measured` where plain decoding ran, `estimated` where its time at this batch size was.
    """

    baseline_token_s: float | None
    baseline_decode_s: float
    decode_speedup: float | None
    e2e_speedup: float
    exact_match: bool | None
    speedup_source: Source


def sampled(item_id: str, share: float) -> bool:
    """Say whether this video gets a baseline: the same ones at every start, and more for a larger share."""
    digest = hashlib.sha256(f"baseline {item_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def compare(caption: Caption, plain: Caption, alone: Caption | None = None) -> Comparison:
    """Compare the captions of one video and prompt; `alone`: the one of a batch of one."""
    ours, theirs = caption.stats.token_s, plain.stats.token_s
    return Comparison(
        baseline_token_s=theirs,
        baseline_decode_s=plain.stats.decode_s,
        decode_speedup=theirs / ours if ours and theirs else None,
        e2e_speedup=plain.stats.total_s / caption.stats.total_s,
        exact_match=caption.token_ids == plain.token_ids and alone_agrees(caption, alone),
        speedup_source="measured",
    )


def alone_agrees(caption: Caption, alone: Caption | None) -> bool:
    """Say whether a caption has the tokens of the one made in a batch of one, if there is one."""
    return alone is None or caption.token_ids == alone.token_ids


def estimate(caption: Caption) -> Comparison | None:
    """Compare a caption with what plain decoding would have taken at its batch size, where that is known."""
    stats = caption.stats
    if stats.plain_token_s is None:
        return None
    plain_s = stats.plain_token_s * (stats.completion_tokens - 1)
    return Comparison(
        baseline_token_s=stats.plain_token_s,
        baseline_decode_s=plain_s,
        decode_speedup=plain_s / stats.decode_s if stats.decode_s > 0 else None,
        e2e_speedup=(stats.total_s - stats.draft_prefill_s - stats.decode_s + plain_s) / stats.total_s,
        exact_match=None,
        speedup_source="estimated",
    )
