"""Seeded sampling: the same text as plain sampling with that seed, and the target's own distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from specvlm.config import TREES, GenerationSettings
from specvlm.sampling import LogitsRules, TokenRule, logits_rules
from tests.parity.test_stock import FAMILIES, captioner_for, case, ids
from tests.tiny import FamilyName


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_speculative_sampling_is_plain_sampling(family: FamilyName, top_k: int, temperature: float) -> None:
    prepared, _ = case(family, "Hi there.")
    for seed in (0, 7, 2**40 + 3):
        options = {"temperature": temperature, "top_k": top_k, "seed": seed}
        plain = ids(captioner_for(family, "noisy"), prepared, speculate=False, **options)
        for tree in TREES:
            assert ids(captioner_for(family, "noisy"), prepared, tree=tree, **options) == plain, (seed, tree)
        again = ids(captioner_for(family, "random"), prepared, prune_ratio=0.5, **options)
        assert again == plain


def test_the_draft_shares_the_noise() -> None:
    """A draft equal to its target is right under sampling too; without shared noise it would rarely be."""
    prepared, _ = case("qwen", "Hi there.")
    stats = captioner_for("qwen", "same").caption(
        prepared, prune_ratio=0.0, temperature=1.0, seed=3, tree="chain", depth=4, max_new_tokens=21
    ).stats  # fmt: skip
    assert stats.acceptance_histogram[4] == 4


def chi_square(counts: Counter[int], probabilities: torch.Tensor, draws: int) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells below 5 expected are pooled."""
    expected = probabilities * draws
    common = [i for i in range(len(expected)) if expected[i] >= 5]
    rest = draws - sum(counts[i] for i in common)
    pooled = float(draws - sum(float(expected[i]) for i in common))
    statistic = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in common)
    if pooled > 1:
        return statistic + (rest - pooled) ** 2 / pooled, len(common)
    assert rest <= 20 * max(pooled, 0.5)
    return statistic, len(common) - 1


def upper_bound(freedom: int) -> float:
    """Chi-square quantile at 1 - 1e-4 (Wilson and Hilferty's approximation)."""
    spread = 2.0 / (9.0 * freedom)
    return float(freedom * (1 - spread + 3.719 * spread**0.5) ** 3)


def sample(rule_of: LogitsRules, logits: torch.Tensor, seed: int, index: int) -> int:
    """One draw by the rule."""
    settings = GenerationSettings(temperature=rule_of.temperature, seed=seed)
    rule = TokenRule(rule_of, settings, logits.numel(), torch.device("cpu"))
    rule.add([torch.tensor([0])])
    rule.begin_round(torch.tensor([index]), 0)
    path = torch.empty(1, 1, 0, dtype=torch.long)
    return int(rule.scores(logits[None, None], torch.zeros(1, 1, dtype=torch.long), path).argmax())


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("vary", ["seed", "index"])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1)]
)
def test_distribution_of_one_token(vary: str, top_k: int, top_p: float, min_p: float) -> None:
    """Over seeds, and over output indices of one seed."""
    torch.manual_seed(1)
    logits = torch.randn(40) * 2
    rules = LogitsRules(1.0, (), (), 0, 0, (), (), 0.9, top_k, top_p, min_p)
    probabilities = stock_warped(logits / 0.9, top_k, top_p, min_p)
    draws = 4000
    pairs = [(draw, 5) if vary == "seed" else (11, draw) for draw in range(draws)]
    counts = Counter(sample(rules, logits, seed, index) for seed, index in pairs)
    assert all(probabilities[token] > 0 for token in counts)
    statistic, freedom = chi_square(counts, probabilities, draws)
    assert statistic < upper_bound(freedom)


def stock_warped(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities [C] by stock's own warpers."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores, none = logits[None], torch.zeros(1, 0, dtype=torch.long)
    if top_k:
        scores = TopKLogitsWarper(top_k)(none, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(none, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(none, scores)
    return scores.softmax(-1)[0]


def test_distribution_of_a_speculated_token() -> None:
    """End to end: the second token, which comes out of a verified tree, given the first."""
    prepared, _ = case("llava", "Hi there.")
    captioner = captioner_for("llava", "noisy")
    options = {"temperature": 1.0, "top_k": 3, "max_new_tokens": 2, "prune_ratio": 0.5}
    pairs = [ids(captioner, prepared, seed=seed, **options) for seed in range(300)]
    first, count = Counter(pair[0] for pair in pairs).most_common(1)[0]
    followers = Counter(pair[1] for pair in pairs if pair[0] == first and len(pair) > 1)
    out = captioner.target.model.generate(
        **prepared.inputs.tensors,
        do_sample=False,
        suppress_tokens=[token for token in range(320) if token != first],
        max_new_tokens=1,
    )
    tensors = dict(prepared.inputs.tensors)
    tensors["input_ids"] = out
    tensors["attention_mask"] = torch.ones_like(out)
    if "mm_token_type_ids" in tensors:
        tensors["mm_token_type_ids"] = torch.nn.functional.pad(tensors["mm_token_type_ids"], (0, 1))
    logits = captioner.target.model(**tensors).logits[0, -1]
    statistic, freedom = chi_square(followers, stock_warped(logits, 3, 1.0, 0.0), sum(followers.values()))
    assert count > 50
    assert statistic < upper_bound(max(freedom, 1))


def test_settings_of_the_checkpoint_are_taken_when_sampling() -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(top_k=9, top_p=0.7, min_p=0.05, eos_token_id=1)
    rules = logits_rules(config, GenerationSettings(temperature=0.5))
    assert (rules.top_k, rules.top_p, rules.min_p) == (9, 0.7, 0.05)
    assert logits_rules(config, GenerationSettings(temperature=0.5, top_k=0)).top_k == 0
    greedy = logits_rules(config, GenerationSettings())
    assert (greedy.top_k, greedy.top_p, greedy.min_p) == (0, 1.0, 0.0)
