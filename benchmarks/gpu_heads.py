"""What a trained head costs beside a target of published shapes: one part of benchmarks/gpu.py.

The head's weights are fresh, which changes no time. How many of its guesses are right is assumed, so its speedups are
modelled; its prefill, its levels, the pass over what was accepted and the target's check are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from gpu_held import Held, Times
from modelled import ModelledCaptioner, RandomCaptioner

from specvlm.captioner import PreparedVideo
from specvlm.config import TreeName
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.tree import ROOT

# What the demo head that ships reaches in these trees: docs/benchmarks.md, a trained head beside the small draft.
HEAD_ACCEPTED: dict[TreeName, float] = {"dynamic": 6.74, "chain": 4.69}
COMPRESSORS = (CompressorConfig("none", ()), CompressorConfig("single", ("pool",), 5.0))

Timed = Callable[[Callable[[], object]], float]  # seconds of some work on the device


@dataclass(frozen=True)
class Heads:
    """What is asked of a target's heads."""

    frames: int
    rounds: int  # timed in a row
    tokens: int  # that a trimmed vocabulary keeps


def time_heads(captioner: ModelledCaptioner, asked: Heads, timed: Timed) -> list[dict[str, Any]]:
    """Heads with and without compressor and trimmed vocabulary, by tree; a plain step stands beside each."""
    video = captioner.video(asked.frames)
    rows = []
    for compressor in COMPRESSORS:
        head = fresh_head(captioner, compressor)
        for ids in (None, range(asked.tokens)):
            with _drafting(captioner, HeadDraft(head, captioner.target, ids)):
                for tree in HEAD_ACCEPTED:
                    row = _time(captioner, video, tree, asked, timed)
                    rows.append(_named(captioner, asked, compressor, ids) | row)
    return rows


def fresh_head(captioner: RandomCaptioner, compressor: CompressorConfig) -> HeadModel:
    """An untrained head of the target, in its dtype and on its device."""
    target = captioner.target
    config = HeadConfig("modelled", None, target.family.name, target.hidden_size, compressor=compressor)
    head = HeadModel.fresh(target, config, seed=0)
    return head.to(target.device, target.dtype).eval().requires_grad_(False)


@contextmanager
def _drafting(captioner: ModelledCaptioner, draft: HeadDraft) -> Iterator[None]:
    before = captioner.draft
    captioner.draft = draft
    try:
        yield
    finally:
        captioner.draft = before


def _named(
    captioner: ModelledCaptioner, asked: Heads, compressor: CompressorConfig, ids: Sequence[int] | None
) -> dict[str, Any]:
    return {
        "target": captioner.pair.target.name,
        "frames": asked.frames,
        "compressor": compressor.name,
        "vocabulary": captioner.target.vocabulary if ids is None else len(ids),
        "modelled": True,
    }


def _time(
    captioner: ModelledCaptioner, video: PreparedVideo, tree: TreeName, asked: Heads, timed: Timed
) -> dict[str, Any]:
    held = Held(captioner, [video], tree, asked.rounds)
    times, plain = held.time(held.tree, asked.rounds), held.time(ROOT, asked.rounds)
    prefill_s = timed(held.begin)
    accepted = HEAD_ACCEPTED[tree]
    return {
        "tree": tree,
        "nodes": held.tree.nodes,
        "depth": held.tree.depth,
        "prefill_s": prefill_s,
        **asdict(times),
        "step_s": _step_s(times, held.tree.depth),
        "plain_s": plain.round_s,
        "accepted": accepted,
        "decode_speedup": (accepted + 1.0) * plain.round_s / times.round_s,
    }


def _step_s(times: Times, depth: int) -> float:
    """One of the D passes that a round of depth D takes: D - 1 of them draw the tree, one reads what was accepted."""
    return (times.draft_s + times.commit_s) / depth
