"""The plain baseline of a run: which videos get one, in which order, what both say together; its estimate elsewhere.

Both runs decode the same video in the same process, and share what comes before the first token; each counts it in
full, as if it were alone. So that neither profits from being second, every other video, by a hash of its id, is
decoded plainly first, the others with the draft first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from specvlm.records import Caption

Source = Literal["measured", "estimated"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One video, decoded with the draft and plainly, or the second estimated.

    Attributes:
        baseline_token_s: Plain time per token after the first; None for a caption of one token.
        baseline_decode_s: Plain time of everything after the first token.
        decode_speedup: Plain time per token / speculative time per token, both after the first token. With
            equal tokens, which `exact_match` says, this is baseline_decode_s / decode_s.
        e2e_speedup: Plain total_s / speculative total_s. Reading, preprocessing, vision and the target's prefill
            were done once and count fully in both; the draft's own prefill counts on the speculative side. Of a
            video's several prompts the first has what they share, in both.
        exact_match: The same token ids, the end-of-sequence token included; None where nothing was decoded plainly.
        speedup_source: `measured` where plain decoding ran, `estimated` where a few of its steps were timed.
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


def plain_first(item_id: str) -> bool:
    """Say whether this video is decoded plainly before it is decoded with the draft."""
    return hashlib.sha256(f"order {item_id}".encode()).digest()[0] % 2 == 1


def compare(caption: Caption, plain: Caption) -> Comparison:
    """Compare the two captions of one video and prompt."""
    ours, theirs = caption.stats.token_s, plain.stats.token_s
    return Comparison(
        baseline_token_s=theirs,
        baseline_decode_s=plain.stats.decode_s,
        decode_speedup=theirs / ours if ours and theirs else None,
        e2e_speedup=plain.stats.total_s / caption.stats.total_s,
        exact_match=caption.token_ids == plain.token_ids,
        speedup_source="measured",
    )


def estimate(caption: Caption) -> Comparison | None:
    """Compare a caption with what plain decoding would have taken, as far as its own plain steps tell."""
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
