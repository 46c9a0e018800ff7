"""Rules of the generation config: honoured or refused by name; the noise; what a path has seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from specvlm.config import GenerationSettings
from specvlm.errors import ConfigError
from specvlm.sampling import TokenRule, gumbel_noise, logits_rules


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[1, 2]]),
        ("sequence_bias", [[[1], 2.0]]),
        ("guidance_scale", 1.5),
        ("exponential_decay_length_penalty", (5, 1.1)),
        ("num_beams", 4),
        ("remove_invalid_values", True),
        ("stop_strings", ["."]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, value: Any) -> None:
    config = GenerationConfig(eos_token_id=1)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        logits_rules(config, GenerationSettings())


@pytest.mark.parametrize(
    ("name", "value"), [("typical_p", 0.9), ("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1)]
)
def test_sampling_warpers_are_refused_only_when_sampling(name: str, value: float) -> None:
    config = GenerationConfig(eos_token_id=1)
    setattr(config, name, value)
    logits_rules(config, GenerationSettings())
    with pytest.raises(ConfigError, match=name):
        logits_rules(config, GenerationSettings(temperature=1.0))


def test_a_default_generation_config_is_fine() -> None:
    assert logits_rules(GenerationConfig(eos_token_id=[3, 4]), GenerationSettings()).eos == (3, 4)
    assert logits_rules(GenerationConfig(), GenerationSettings()).eos == ()


def test_noise_depends_on_seed_and_index_alone() -> None:
    index = torch.tensor([[0, 1], [5, 6]])
    noise = gumbel_noise(3, index, 100)
    assert noise.shape == (2, 2, 100)
    assert torch.equal(noise[1, 0], gumbel_noise(3, torch.tensor([5]), 100)[0])
    assert torch.equal(noise[..., :40], gumbel_noise(3, index, 40))
    others = [gumbel_noise(seed, torch.tensor([5]), 100)[0] for seed in (4, 3 + 2**32, 3 + 2**62)]
    for other in others:
        assert not torch.equal(noise[1, 0], other)


def test_noise_is_gumbel_and_uncorrelated() -> None:
    noise = gumbel_noise(1, torch.arange(200), 500).double()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(1.6449, abs=0.05)
    centred = noise - noise.mean()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert shifted.mean().abs() < 0.02


def rule_with(penalty: float, prompt: list[int], vocabulary: int = 8) -> TokenRule:
    config = GenerationConfig(eos_token_id=1, repetition_penalty=penalty)
    settings = GenerationSettings()
    rules = logits_rules(config, settings)
    rule = TokenRule(rules, settings, vocabulary, torch.device("cpu"))
    rule.add([torch.tensor(prompt)])
    return rule


def penalised(rule: TokenRule, path: list[list[int]], width: int = 8) -> list[list[int]]:
    """Which tokens each node's scores have lowered, from logits of 1."""
    count = len(path)
    rule.begin_round(torch.tensor([0]), count)
    scores = rule.scores(
        torch.ones(1, count, width), torch.arange(count)[None], torch.tensor([path]).reshape(1, count, -1)
    )
    return [row.lt(1).nonzero().flatten().tolist() for row in scores[0]]


def test_a_node_has_seen_the_prompt_and_its_own_path_only() -> None:
    rule = rule_with(1.5, [2, 3])
    assert penalised(rule, [[2, 2], [5, 5], [5, 6]]) == [[2, 3], [2, 3, 5], [2, 3, 5, 6]]
    rule.commit(torch.tensor([[4, 7, 6]]), torch.tensor([2]))
    assert penalised(rule, [[2], [5]]) == [[2, 3, 4, 7], [2, 3, 4, 5, 7]]


def test_repeats_are_penalised_once() -> None:
    rule = rule_with(2.0, [2])
    rule.begin_round(torch.tensor([0]), 0)
    scores = rule.scores(
        torch.ones(1, 1, 8), torch.zeros(1, 1, dtype=torch.long), torch.tensor([[[2, 2, 5, 5]]])
    )
    assert scores[0, 0].tolist() == [1, 1, 0.5, 1, 1, 0.5, 1, 1]


def test_a_shorter_vocabulary_is_cut_not_wrapped() -> None:
    assert penalised(rule_with(1.5, [2, 7]), [[6, 4]], width=6) == [[2, 4]]


def test_rows_that_come_and_go_keep_what_they_have_seen() -> None:
    """A row of a batch lowers what it would lower alone, wherever it stands; so does one that was added later."""
    rule = rule_with(1.5, [2])
    rule.add([torch.tensor([3, 4])])
    rule.commit(torch.tensor([[5, 6], [6, 7]]), torch.tensor([1, 2]))
    rule.add([torch.tensor([0])])
    rule.keep(torch.tensor([2, 1, 0]))
    rule.begin_round(torch.zeros(3, dtype=torch.long), 0)
    zeros = torch.zeros(3, 1, dtype=torch.long)
    scores = rule.scores(torch.ones(3, 1, 8), zeros, zeros.new_empty(3, 1, 0))
    assert [row.lt(1).nonzero().flatten().tolist() for row in scores[:, 0]] == [[0], [3, 4, 6, 7], [2, 5]]
    rule.keep(torch.tensor([1]))
    assert penalised(rule, [[1]]) == [[1, 3, 4, 6, 7]]


def test_the_least_length_of_each_row_counts_its_own_prompt() -> None:
    """`min_length` counts the prompt: a long one may end sooner."""
    config = GenerationConfig(eos_token_id=1, min_length=5)
    settings = GenerationSettings()
    rule = TokenRule(logits_rules(config, settings), settings, 8, torch.device("cpu"))
    rule.add([torch.arange(4), torch.arange(2)])
    rule.add([torch.arange(9)])
    rule.begin_round(torch.tensor([1, 1, 0]), 0)
    zeros = torch.zeros(3, 1, dtype=torch.long)
    ends = rule.scores(torch.ones(3, 1, 8), zeros, zeros.new_empty(3, 1, 0))[:, 0, 1].isfinite()
    assert ends.tolist() == [True, False, True]
