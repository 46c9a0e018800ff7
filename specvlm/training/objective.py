"""Online-logit distillation: how far a head is from what the frozen target thinks and feels of a caption.

SpecVLM (arXiv 2509.11815, section 3.3): cross-entropy to the target's logits and smooth L1 to its features, both made
on the fly. With `unroll`, the head also reads its own features for a few passes, as it does when it drafts (EAGLE-3's
training-time test, arXiv 2503.01840, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import DynamicCache

from specvlm.config import whole, within
from specvlm.drafts.head_model import HeadModel, Shown
from specvlm.model import VideoLM, cache_keyword
from specvlm.training.example import Example


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """What is minimised.

    Attributes:
        cross_entropy: Weight of the cross-entropy to the target's logits.
        smooth_l1: Weight of the smooth L1 distance to the target's last features.
        unroll: Passes in which the head reads its own features, behind the one in which it reads the target's.
    """

    cross_entropy: float = 0.1
    smooth_l1: float = 1.0
    unroll: int = 0

    def __post_init__(self) -> None:
        within("cross_entropy", self.cross_entropy, 0.0, 1e6, "give a weight, 0 or more")
        within("smooth_l1", self.smooth_l1, 0.0, 1e6, "give a weight, 0 or more")
        whole("unroll", self.unroll)
        within("unroll", self.unroll, 0, 64, "give 0 to 64 passes")


class Losses(NamedTuple):
    """Of one example, means over its caption."""

    total: torch.Tensor  # weighted, with gradients
    cross_entropy: torch.Tensor
    smooth_l1: torch.Tensor
    right: (
        torch.Tensor
    )  # share of tokens whose most likely guess, from the target's features, is the target's
    operator: str  # what compressed the video


class _Sequence(NamedTuple):
    """An example as the head reads it: compressed pairs, those of the caption last."""

    pairs: torch.Tensor  # [1, m, hidden]
    positions: torch.Tensor  # int64 [P, m]
    bias: torch.Tensor  # float32 [m], added to the attention logits of each pair
    operator: str


class _Aims(NamedTuple):
    """What the head should say of the caption's T - 1 pairs."""

    features: torch.Tensor  # [1, T - 1, hidden]
    probabilities: torch.Tensor  # float32 [1, T - 1, C]
    best: torch.Tensor  # int64 [1, T - 1]


def distillation_loss(
    head: HeadModel,
    target: VideoLM,
    example: Example,
    settings: ObjectiveSettings,
    generator: torch.Generator,
) -> Losses:
    """The loss of a head on one example.

    Args:
        head: In training mode, its gate draws.
        target: The frozen target, for its LM head.
        example: On the head's device.
        settings: What is minimised.
        generator: On the CPU; for operators and gates that draw lots.
    """
    aims = _aims(head, target, example)
    count = aims.best.shape[1]
    sequence = _sequence(head, example, generator)
    cache = DynamicCache()
    hidden = _first_pass(head, sequence, cache)[:, -count:]
    terms = [_terms(hidden, target, aims, 0)]
    with torch.no_grad():
        right = target.logits(hidden.to(target.dtype).to(target.device)).argmax(-1) == aims.best.to(
            target.device
        )
    for step in range(1, min(settings.unroll, count - 1) + 1):
        hidden = _own_pass(head, example, sequence, cache, hidden[:, :-1], step)
        terms.append(_terms(hidden, target, aims, step))
    cross_entropy = torch.stack([one[0] for one in terms]).mean()
    smooth_l1 = torch.stack([one[1] for one in terms]).mean()
    total = settings.cross_entropy * cross_entropy + settings.smooth_l1 * smooth_l1
    return Losses(total, cross_entropy.detach(), smooth_l1.detach(), right.float().mean(), sequence.operator)


def _aims(head: HeadModel, target: VideoLM, example: Example) -> _Aims:
    """The pair at i, the last but one of the prompt or later, is to give the target's feature of token i + 1."""
    with torch.no_grad():
        features = example.features[:, example.prompt_tokens :]
        logits = target.logits(features.to(target.device)).to(head.device)
        return _Aims(features.to(head.dtype), logits.softmax(dim=-1), logits.argmax(dim=-1))


def _sequence(head: HeadModel, example: Example, generator: torch.Generator) -> _Sequence:
    shown = Shown(
        example.features[:, :-1].to(head.dtype),
        example.embeds[:, 1:].to(head.dtype),
        example.positions[:, :-1],
        example.video,
        example.prompt_tokens,
        example.scores,
    )
    read = head.sequence(shown, generator)
    length, kept = read.pairs.shape[1], read.video.inputs.shape[1]
    bias = read.pairs.new_zeros(length, dtype=torch.float32)
    if read.video.log_weight is not None and kept:
        bias = bias.index_copy(0, read.video_at.to(bias.device), read.video.log_weight.expand(kept).to(bias))
    return _Sequence(read.pairs, read.positions, bias, read.video.operator)


def _forward(
    head: HeadModel, pairs: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """One pass of the head's layer; `mask` is additive, [m, keys so far and these]."""
    at = positions[:, None] if positions.shape[0] > 1 else positions
    out = head.text(
        inputs_embeds=pairs,
        position_ids=at,
        attention_mask=mask.to(pairs.dtype)[None, None],
        use_cache=True,
        **{cache_keyword(head.text): cache},
    )
    return out.last_hidden_state  # type: ignore[no-any-return]


def _first_pass(head: HeadModel, sequence: _Sequence, cache: DynamicCache) -> torch.Tensor:
    """All pairs, with the target's features; -> [1, m, hidden]."""
    length = sequence.pairs.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=sequence.pairs.device).tril()
    mask = sequence.bias[None].expand(length, -1).masked_fill(~causal, float("-inf"))
    return _forward(head, sequence.pairs, sequence.positions, mask, cache)


def _own_pass(
    head: HeadModel,
    example: Example,
    sequence: _Sequence,
    cache: DynamicCache,
    own: torch.Tensor,
    step: int,
) -> torch.Tensor:
    """The caption's pairs from index `step` on, with the features that the pass before gave.

    Pair c reads, as in a round whose root is pair c - step: the target's features up to there, then of each pass
    before, and of this one, one pair.
    """
    count = example.embeds.shape[1] - example.prompt_tokens  # pairs of the caption
    length = sequence.pairs.shape[1]
    before = length - count
    pairs = head.pairs(own, example.embeds[:, -own.shape[1] :].to(own.dtype))
    device = own.device
    query = torch.arange(step, count, device=device)[:, None]
    seen = [torch.arange(-before, count, device=device)[None] <= query - step]
    seen += [
        torch.arange(passed, count, device=device)[None] == query - step + passed
        for passed in range(1, step + 1)
    ]
    visible = torch.cat(seen, dim=1)
    bias = functional.pad(sequence.bias, (0, visible.shape[1] - length))
    mask = bias[None].expand(visible.shape[0], -1).masked_fill(~visible, float("-inf"))
    return _forward(head, pairs, sequence.positions[:, length - count + step :], mask, cache)


def _terms(
    hidden: torch.Tensor, target: VideoLM, aims: _Aims, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and smooth L1 of the pairs from index `step` on."""
    logits = target.logits(hidden.to(target.device, target.dtype)).to(hidden.device)
    cross_entropy = -(aims.probabilities[:, step:] * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    return cross_entropy, functional.smooth_l1_loss(hidden.float(), aims.features[:, step:].float())
