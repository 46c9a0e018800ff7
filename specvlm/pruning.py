"""Which video tokens the draft sees. Pure functions: scores in, a keep mask out; no model, no file.

SpecVLM, arXiv 2508.16201, section 3.2: stage I takes the tokens that the target attends to most, stage II spreads
the rest of the budget evenly over the video.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from specvlm.config import PrunerName, SpeculationSettings

# scores float32 [V], budget, settings -> indices of kept tokens, int64 [budget], in any order
Pruner = Callable[[torch.Tensor, int, SpeculationSettings], torch.Tensor]


def budget_for(video_tokens: int, prune_ratio: float) -> int:
    """Video tokens that the draft sees: round(V * (1 - prune_ratio)), at least 1."""
    return max(1, round(video_tokens * (1.0 - prune_ratio)))


def _evenly(count: int, wanted: int, device: torch.device) -> torch.Tensor:
    """`wanted` distinct indices spread evenly over 0..count-1, both ends included; a single one is the middle."""
    if wanted == 1:
        return torch.tensor([count // 2], device=device)
    return torch.linspace(0, count - 1, wanted, dtype=torch.float64, device=device).round().long()


def _two_stages(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> torch.Tensor:
    """Stage I by attention mass (top-p), stage II evenly over what is left, in (time, row, column) order."""
    order = scores.sort(descending=True, stable=True)
    mass = order.values.double().cumsum(0)
    reached = int((mass < settings.top_p * mass[-1]).sum()) + 1 if settings.top_p > 0 else 0
    first = order.indices[: min(reached, budget)]
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[first] = False
    left = rest.nonzero().squeeze(1)
    wanted = budget - first.numel()
    if wanted == 0:
        return first
    return torch.cat((first, left[_evenly(left.numel(), wanted, scores.device)]))


def _uniform(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> torch.Tensor:
    """Evenly over the video; needs no scores."""
    return _evenly(scores.numel(), budget, scores.device)


def _attention(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> torch.Tensor:
    """The most attended tokens alone."""
    return scores.sort(descending=True, stable=True).indices[:budget]


def _random(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> torch.Tensor:
    """A seeded random choice, the same on every device."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randperm(scores.numel(), generator=generator)[:budget].to(scores.device)


def _window(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> torch.Tensor:
    """The last tokens of the video, those nearest to the text."""
    return torch.arange(scores.numel() - budget, scores.numel(), device=scores.device)


def _none(scores: torch.Tensor, budget: int, settings: SpeculationSettings) -> torch.Tensor:
    """Every token, whatever the budget."""
    return torch.arange(scores.numel(), device=scores.device)


PRUNER_TABLE: dict[PrunerName, Pruner] = {
    "specvlm": _two_stages,
    "uniform": _uniform,
    "attention": _attention,
    "random": _random,
    "window": _window,
    "none": _none,
}


def prune(scores: torch.Tensor, settings: SpeculationSettings) -> torch.Tensor:
    """Scores [V] -> keep, bool [V] with `budget_for(V, prune_ratio)` True (all with the pruner `none`)."""
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    budget = budget_for(scores.numel(), settings.prune_ratio)
    keep[PRUNER_TABLE[settings.pruner](scores, budget, settings)] = True
    return keep
