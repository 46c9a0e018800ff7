"""Which video tokens the draft sees. Pure functions: scores in, a keep mask out; no model, no file.

SpecVLM, arXiv 2508.16201, section 3.2: stage I takes the tokens that the target attends to most, stage II spreads
the rest of the budget evenly over the video.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from specvlm.config import PrunerName, SpeculationSettings


class Kept(NamedTuple):
    """Which video tokens are kept, and by what. No token is in both; together they are the budget.

    Attributes:
        first: Indices of those kept for the attention they get, int64, the most attended first: stage I.
        second: Indices of those kept whatever their attention, int64: stage II, or another pruner's choice.
    """

    first: torch.Tensor  # int64 [kept in stage I]
    second: torch.Tensor  # int64 [kept in stage II]


class Pruner(NamedTuple):
    """How a pruner chooses, and what `specvlm inspect` calls its stages; None: it has no such stage."""

    choose: Callable[[torch.Tensor, int, SpeculationSettings], Kept]  # scores float32 [V], budget, settings
    first: str | None
    second: str | None


def budget_for(video_tokens: int, prune_ratio: float) -> int:
    """Video tokens that the draft sees: round(V * (1 - prune_ratio)), at least 1."""
    return max(1, round(video_tokens * (1.0 - prune_ratio)))


def _evenly(count: int, wanted: int, device: torch.device) -> torch.Tensor:
    """`wanted` distinct indices spread evenly over 0..count-1, both ends included; a single one is the middle."""
    if wanted == 1:
        return torch.tensor([count // 2], device=device)
    return torch.linspace(0, count - 1, wanted, dtype=torch.float64, device=device).round().long()


def _without_attention(kept: torch.Tensor) -> Kept:
    return Kept(kept[:0], kept)


def _two_stages(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> Kept:
    """Stage I by attention mass (top-p), stage II evenly over what is left, in (time, row, column) order."""
    order = scores.sort(descending=True, stable=True)
    mass = order.values.double().cumsum(0)
    reached = int((mass < settings.top_p * mass[-1]).sum()) + 1 if settings.top_p > 0 else 0
    first = order.indices[: min(reached, budget)]
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[first] = False
    left = rest.nonzero().squeeze(1)
    wanted = budget - first.numel()
    spread = _evenly(left.numel(), wanted, scores.device) if wanted else left.new_empty(0)
    return Kept(first, left[spread])


def _uniform(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> Kept:
    """Evenly over the video; needs no scores."""
    return _without_attention(_evenly(scores.numel(), budget, scores.device))


def _attention(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> Kept:
    """The most attended tokens alone."""
    order = scores.sort(descending=True, stable=True).indices
    return Kept(order[:budget], order[:0])


def _random(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> Kept:
    """A seeded random choice, the same on every device."""
    generator = torch.Generator().manual_seed(settings.seed)
    kept = torch.randperm(scores.numel(), generator=generator)[:budget]
    return _without_attention(kept.to(scores.device))


def _window(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> Kept:
    """The last tokens of the video, those nearest to the text."""
    return _without_attention(torch.arange(scores.numel() - budget, scores.numel(), device=scores.device))


def _none(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> Kept:
    """Every token, whatever the budget."""
    return _without_attention(torch.arange(scores.numel(), device=scores.device))


PRUNER_TABLE: dict[PrunerName, Pruner] = {  # one for each name in config.py
    "specvlm": Pruner(_two_stages, "stage I, most attention", "stage II, evenly over the rest"),
    "uniform": Pruner(_uniform, None, "evenly over the video"),
    "attention": Pruner(_attention, "most attention", None),
    "random": Pruner(_random, None, "at random"),
    "window": Pruner(_window, None, "the end of the video"),
    "none": Pruner(_none, None, "all of them"),
}


def kept_by_stage(scores: torch.Tensor, settings: SpeculationSettings) -> Kept:
    """Scores [V] -> the kept tokens by stage, `budget_for(V, prune_ratio)` together (all with the pruner `none`)."""
    budget = budget_for(scores.numel(), settings.prune_ratio)
    return PRUNER_TABLE[settings.pruner].choose(scores, budget, settings)


def prune(scores: torch.Tensor, settings: SpeculationSettings) -> torch.Tensor:
    """Scores [V] -> keep, bool [V] with `budget_for(V, prune_ratio)` True (all with the pruner `none`)."""
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    for kept in kept_by_stage(scores, settings):
        keep[kept] = True
    return keep
