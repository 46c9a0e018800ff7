"""A draft that guesses from some tokens alone: its logits, its scores, its trees."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.drafts.vocabulary import DraftVocabulary
from specvlm.errors import ConfigError
from specvlm.sampling import TokenRule, logits_rules
from specvlm.tree import STATIC_PATHS, Frontier, StaticShape, make_shape
from specvlm.verify import accept, ranks_of

CPU = torch.device("cpu")
VOCABULARY = 60
KEPT = [3, 4, 9, 17, 18, 30, 31, 44, 58]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_kept_columns(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    head, hidden = nn.Linear(16, 64, bias=bias, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    trimmed = DraftVocabulary(head, VOCABULARY, reversed(KEPT))
    full = DraftVocabulary(head, VOCABULARY)
    assert (trimmed.size, full.size, full.ids) == (len(KEPT), VOCABULARY, None)
    assert trimmed.ids is not None
    assert trimmed.ids.tolist() == KEPT
    assert trimmed.logits(hidden).dtype == torch.float32
    assert torch.equal(full.logits(hidden), head(hidden)[..., :VOCABULARY].float())
    torch.testing.assert_close(trimmed.logits(hidden), full.logits(hidden)[..., KEPT], rtol=1e-5, atol=1e-5)


def test_the_rows_are_copied_once_and_are_contiguous() -> None:
    """A later change of the head does not show; nor does the copy hold the whole head."""
    head = nn.Linear(8, 64, bias=False)
    trimmed, hidden = DraftVocabulary(head, VOCABULARY, KEPT), torch.randn(1, 1, 8)
    before = trimmed.logits(hidden)
    head.weight.detach().zero_()
    assert torch.equal(trimmed.logits(hidden), before)
    assert trimmed._weight is not None
    assert trimmed._weight.is_contiguous()
    assert trimmed._weight.untyped_storage().nbytes() == len(KEPT) * 8 * 4


def test_all_tokens_are_no_trimming() -> None:
    head = nn.Linear(8, 64)
    assert DraftVocabulary(head, VOCABULARY, range(VOCABULARY)).ids is None


@pytest.mark.parametrize(
    ("ids", "told"), [([], "no token"), ([1, 60], "token 60"), ([-1, 2], "token -1")], ids=str
)
def test_tokens_that_cannot_be_kept_are_refused(ids: list[int], told: str) -> None:
    with pytest.raises(ConfigError, match=f"{told}, the draft has tokens 0 to 59"):
        DraftVocabulary(nn.Linear(8, 64), VOCABULARY, ids)


def test_a_quantised_head_is_refused() -> None:
    head = nn.Linear(8, 64)
    head.weight = nn.Parameter(torch.zeros(64, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        DraftVocabulary(head, VOCABULARY, KEPT)


RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "suppressed": {"suppress_tokens": [4, 5, 31]},
    "not first": {"begin_suppress_tokens": [3, 9, 10, 44]},
    "not yet": {"min_new_tokens": 3},
    "forced": {"forced_eos_token_id": 17},
    "all": {
        "repetition_penalty": 1.3,
        "suppress_tokens": [4],
        "begin_suppress_tokens": [30],
        "min_new_tokens": 4,
        "forced_eos_token_id": 18,
    },
}


def rule_of(rules: dict[str, Any], temperature: float) -> TokenRule:
    config = SimpleNamespace(**({"eos_token_id": [9, 58]} | rules))
    settings = GenerationSettings(max_new_tokens=6, temperature=temperature, top_k=0, seed=2**40 + 7)
    prompts = [torch.tensor([0, 3, 17, 50]), torch.tensor([1, 44])]
    rule = TokenRule(logits_rules(config, settings), settings, VOCABULARY + 4, CPU)
    rule.add(prompts)
    rule.commit(torch.tensor([[30, 2], [58, 31]]), torch.tensor([1, 2]))
    return rule


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_of_kept_tokens_are_those_columns_of_all_scores(rules: str, temperature: float) -> None:
    """At every index of a caption, along paths that hold kept tokens, others, and padding of the target."""
    torch.manual_seed(3)
    rule, ids = rule_of(RULES[rules], temperature), torch.tensor(KEPT)
    logits = torch.randn(2, 5, VOCABULARY) * 3
    path = torch.randint(0, VOCABULARY + 4, (2, 5, 4))
    path[:, :, 0] = torch.tensor([58, 3, 61, 0, 18])
    depths = torch.arange(5).expand(2, 5)
    for first, width in product(range(3), (0, 2, 4)):
        rule.begin_round(torch.tensor([first, first + 1]), 5)
        full = rule.scores(logits, depths, path[..., :width])
        kept = rule.scores(logits[..., KEPT], depths, path[..., :width], ids)
        assert torch.equal(kept, full[..., KEPT])


@pytest.mark.parametrize("warper", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_warpers_choose_among_the_kept_tokens(warper: dict[str, Any]) -> None:
    """As they would among a vocabulary that has no others; the noise stays that of the tokens."""
    settings = GenerationSettings(temperature=0.9, top_k=warper.get("top_k", 0), seed=5)
    config = SimpleNamespace(**({"eos_token_id": [9]} | warper))
    rules = logits_rules(config, settings)
    small, large = (TokenRule(rules, settings, n, CPU) for n in (len(KEPT), VOCABULARY))
    logits, depths, path = torch.randn(1, 2, len(KEPT)) * 2, torch.tensor([[0, 1]]), torch.zeros(1, 2, 0)
    for rule in (small, large):
        rule.add([torch.tensor([0])])
        rule.begin_round(torch.tensor([4]), 1)
    alone = small.scores(logits, depths, path.long()).isfinite()
    scores = large.scores(logits, depths, path.long(), torch.tensor(KEPT))
    assert torch.equal(scores.isfinite(), alone)
    assert 0 < int(alone.sum()) < alone.numel()
    noise = large._round.noise
    assert noise is not None
    expected = (logits / 0.9 + noise[..., KEPT])[alone]
    assert torch.equal(scores[alone], expected)


def made_up(frontier: Frontier, columns: int) -> torch.Tensor:
    """Scores by path alone."""
    out = torch.empty(*frontier.tokens.shape, columns)
    for row, paths in enumerate(frontier.path.tolist()):
        for node, path in enumerate(paths):
            seed = hash((row, *path)) % 2**31
            out[row, node] = torch.randn(columns, generator=torch.Generator().manual_seed(seed))
    return out


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
def test_trees_hold_tokens_not_columns(tree: str) -> None:
    """The tree over kept tokens is the one over all of them where the others are impossible."""
    depth = None if tree == "static" else 4
    shape = make_shape(SpeculationSettings(tree=tree, depth=depth), len(KEPT), CPU)  # type: ignore[arg-type]
    root, ids = torch.tensor([7, 8]), torch.tensor(KEPT)

    def over_all(frontier: Frontier) -> torch.Tensor:
        out = torch.full((*frontier.tokens.shape, VOCABULARY), float("-inf"))
        out[..., KEPT] = made_up(frontier, len(KEPT))
        return out

    few = shape.grow(root, lambda frontier: made_up(frontier, len(KEPT)), ids)
    all_of_them = shape.grow(root, over_all)
    for name in ("tokens", "parents", "depths", "ancestors", "slots"):
        assert torch.equal(getattr(few, name), getattr(all_of_them, name)), name
    assert set(few.tokens[:, 1:].flatten().tolist()) <= set(KEPT)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tree_wider_than_the_vocabulary_guesses_some_tokens_twice(count: int) -> None:
    """Ranks are still told: of the kept tokens, and one that is none of them."""
    ids, root = torch.tensor(KEPT[:count]), torch.tensor([7, 8])
    shape = StaticShape(STATIC_PATHS, CPU, ranks=4)
    guesses = shape.grow(root, lambda frontier: made_up(frontier, count), ids)
    assert guesses.tokens.shape == (2, 26)
    assert guesses.likeliest is not None
    assert guesses.likeliest.shape[-1] == 4
    wanted = guesses.tokens.gather(1, torch.ones(2, 1, dtype=torch.long))  # the first guess
    for choice, rank in ((wanted, 0), (torch.full_like(wanted, 50), 4)):
        accepted = accept(guesses, choice.expand(2, 26), shape.depth)
        assert ranks_of(guesses, accepted)[:, 0].tolist() == [rank, rank]
        assert bool((accepted.guessed > 0).all()) == (rank == 0)
