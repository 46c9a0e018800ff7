"""Which video tokens are kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from specvlm.config import PRUNERS, SpeculationSettings
from specvlm.pruning import PRUNER_TABLE, budget_for, kept_by_stage, prune


def test_every_name_has_its_pruner() -> None:
    assert tuple(PRUNER_TABLE) == PRUNERS, (
        "PRUNER_TABLE in specvlm/pruning.py needs one entry for each PrunerName in specvlm/config.py, in its order"
    )


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 144, 1001])
def test_exactly_the_budget(pruner: str, ratio: float, tokens: int) -> None:
    scores = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    keep = prune(scores, SpeculationSettings(pruner=pruner, prune_ratio=ratio))  # type: ignore[arg-type]
    expected = tokens if pruner == "none" else max(1, round(tokens * (1 - ratio)))
    assert int(keep.sum()) == expected
    assert keep.dtype == torch.bool


def test_budget() -> None:
    assert budget_for(144, 0.9) == 14
    assert budget_for(20, 1.0) == 1
    assert budget_for(20, 0.0) == 20


def test_attention_takes_the_most_attended() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.0, 0.3])
    keep = prune(scores, SpeculationSettings(pruner="attention", prune_ratio=0.5))
    assert keep.nonzero().flatten().tolist() == [1, 3, 5]


def test_stage_one_stops_at_top_p_and_stage_two_spreads_the_rest() -> None:
    scores = torch.full((100,), 0.005)
    scores[[40, 41]] = 0.3  # 0.6 of 1.09 in all
    settings = SpeculationSettings(prune_ratio=0.9, top_p=0.4)
    kept = prune(scores, settings).nonzero().flatten().tolist()
    assert {40, 41} < set(kept)
    rest = [k for k in kept if k not in (40, 41)]
    assert len(rest) == 8
    assert rest[0] == 0
    assert rest[-1] == 99
    gaps = [b - a for a, b in itertools.pairwise(rest)]
    assert max(gaps) - min(gaps) <= 3


def test_stage_one_never_exceeds_the_budget() -> None:
    keep = prune(torch.ones(100), SpeculationSettings(prune_ratio=0.9, top_p=1.0))
    assert keep.nonzero().flatten().tolist() == list(range(10))


def test_top_p_zero_is_uniform() -> None:
    scores = torch.rand(90)
    specvlm = prune(scores, SpeculationSettings(prune_ratio=0.8, top_p=0.0))
    uniform = prune(scores, SpeculationSettings(pruner="uniform", prune_ratio=0.8))
    assert torch.equal(specvlm, uniform)


def test_window_is_the_end_of_the_video() -> None:
    keep = prune(torch.rand(10), SpeculationSettings(pruner="window", prune_ratio=0.7))
    assert keep.nonzero().flatten().tolist() == [7, 8, 9]


def test_random_is_seeded() -> None:
    masks = [prune(torch.ones(200), SpeculationSettings(pruner="random", seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
def test_stages_are_disjoint_and_together_what_is_kept(pruner: str, ratio: float) -> None:
    scores = torch.rand(144, generator=torch.Generator().manual_seed(1)) ** 60
    settings = SpeculationSettings(pruner=pruner, prune_ratio=ratio)  # type: ignore[arg-type]
    kept = kept_by_stage(scores, settings)
    both = torch.cat(tuple(kept))
    assert sorted(both.tolist()) == prune(scores, settings).nonzero().flatten().tolist()
    assert bool(kept.first.numel()) == (pruner in ("specvlm", "attention"))
    assert bool(kept.second.numel()) == (pruner != "attention" and (pruner, ratio) != ("specvlm", 1.0))


def test_stage_one_is_the_smallest_set_that_holds_top_p() -> None:
    scores = torch.rand(500, generator=torch.Generator().manual_seed(2)) ** 6
    first = kept_by_stage(scores, SpeculationSettings(prune_ratio=0.5, top_p=0.4)).first
    assert scores[first].sum() >= 0.4 * scores.sum() > scores[first[:-1]].sum()
    assert scores[first].min() >= scores.sort(descending=True).values[first.numel()]
