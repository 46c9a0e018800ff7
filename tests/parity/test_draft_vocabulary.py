"""A draft that guesses from some tokens alone, as few as one: the caption is stock's, whatever it leaves out."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from specvlm.captioner import Captioner
from specvlm.config import TREES
from specvlm.drafts.small_model import SmallModelDraft
from tests.emulated_graphs import emulate
from tests.parity.test_stock import DRAFTS, FAMILIES, NEW_TOKENS, TARGET, captioner_for, case, ids
from tests.tiny import FamilyName, caption_rows, random_frames, stock_ids, tiny_captioner

PROMPT = "Hi there."
SHARED = {name: min(TARGET.vocabulary, size.vocabulary) for name, size in DRAFTS.items()}


def kept_tokens(family: FamilyName, draft: str, count: int) -> list[int]:
    """Ends of sequence, then tokens of the caption by turns with others."""
    _, stock = case(family, PROMPT)
    dice = random.Random(count)
    used, others = list(dict.fromkeys(stock)), list(range(SHARED[draft]))
    dice.shuffle(others)
    mixed = [token for pair in zip(used, others, strict=False) for token in pair] + others
    ends = captioner_for(family, draft).generation_config.eos_token_id
    return [token for token in dict.fromkeys((*ends, *mixed)) if token < SHARED[draft]][:count]


@cache
def trimmed(family: FamilyName, draft: str, count: int) -> Captioner:
    """A captioner over the models of `captioner_for` whose draft guesses from `count` tokens."""
    whole = captioner_for(family, draft)
    assert isinstance(whole.draft, SmallModelDraft)
    guess = SmallModelDraft(whole.draft.model, SHARED[draft], kept_tokens(family, draft, count))
    assert guess.vocabulary == count
    out = Captioner(whole.target, whole.processor, guess, whole.info, whole.frames)
    out.generation_config = whole.generation_config
    return out


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("count", [1, 3, 145, 289])
def test_speculative_is_stock(family: FamilyName, draft: str, tree: str, count: int) -> None:
    prepared, stock = case(family, PROMPT)
    captioner = trimmed(family, draft, count)
    assert ids(captioner, prepared, tree=tree, prune_ratio=0.5) == stock


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3, 145])
def test_sampling_is_plain_sampling(family: FamilyName, count: int) -> None:
    prepared, _ = case(family, PROMPT)
    for seed, top_k in ((0, 0), (2**40 + 3, 5)):
        sampled = {"temperature": 1.3, "seed": seed, "top_k": top_k}
        plain = ids(captioner_for(family, "noisy"), prepared, speculate=False, **sampled)
        for tree in TREES:
            assert ids(trimmed(family, "noisy", count), prepared, tree=tree, **sampled) == plain, (seed, tree)


@pytest.mark.covering(strength=1)
@pytest.mark.filterwarnings("ignore:Both `min_new_tokens`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [3, 145])
@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 0.8},
        {"suppress_tokens": [40, 41, 42, 252, 189], "begin_suppress_tokens": list(range(100))},
        {"min_new_tokens": 9, "forced_eos_token_id": 7},
    ],
    ids=str,
)
def test_logits_processors_of_the_checkpoint(
    family: FamilyName, count: int, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, (prepared, plain) = trimmed(family, "noisy", count), case(family, PROMPT)
    for name, value in rules.items():
        monkeypatch.setattr(captioner.generation_config, name, value)
    monkeypatch.setattr(captioner.generation_config, "eos_token_id", [plain[3], 7])
    stock = stock_ids(captioner.target.model, prepared.inputs.tensors, NEW_TOKENS)
    for tree in TREES:
        assert ids(captioner, prepared, tree=tree, prune_ratio=0.5) == stock, tree


@pytest.mark.parametrize("family", FAMILIES)
def test_several_rows_are_each_as_alone(family: FamilyName) -> None:
    captioner = trimmed(family, "noisy", 145)
    videos = [
        captioner.prepare(random_frames(seed, frames), prompt)
        for seed, frames, prompt in ((3, 4, PROMPT), (4, 2, "Look at <video> and tell."))
    ]
    alone = [stock_ids(captioner.target.model, video.inputs.tensors, NEW_TOKENS) for video in videos]
    for tree in TREES:
        together = caption_rows(captioner, videos, tree=tree, max_new_tokens=NEW_TOKENS)
        assert [caption.token_ids for caption in together] == alone, tree


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_its_target_is_right_wherever_it_may_guess(
    family: FamilyName, temperature: float
) -> None:
    """With every token of the caption kept, each guess is accepted, under the noise of the very tokens too."""
    captioner = tiny_captioner(family, TARGET, DRAFTS["same"])
    prepared, _ = case(family, PROMPT)
    options = {"temperature": temperature, "top_k": 0, "seed": 3, "max_new_tokens": 21}
    written = captioner.caption(prepared, speculate=False, **options).token_ids
    captioner.draft = SmallModelDraft(captioner.draft.model, 320, [*written, 0, 5, 319])  # type: ignore[union-attr]
    stats = captioner.caption(prepared, prune_ratio=0.0, tree="chain", depth=4, **options).stats
    full, rest = divmod(len(written) - 1, 5)
    expected = [0] * 5
    expected[4] = full
    if rest:
        expected[min(rest, 4)] += 1
    assert list(stats.acceptance_histogram) == expected


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rounds_as_graphs(tree: str, temperature: float) -> None:
    """Recorded rounds of the whole vocabulary are not replayed for the trimmed one."""
    whole = tiny_captioner("qwen", TARGET, DRAFTS["same"])
    prepared = whole.prepare(random_frames(3), PROMPT)
    options: dict[str, Any] = {
        "tree": tree,
        "temperature": temperature,
        "prune_ratio": 0.0,
        "max_new_tokens": 40,
    }
    drafts = [whole.draft, SmallModelDraft(whole.draft.model, 320, kept_tokens("qwen", "same", 20))]  # type: ignore[union-attr]
    eager = []
    for draft in drafts:
        whole.draft = draft
        eager.append(whole.caption(prepared, **options))
    emulator = emulate(whole)
    for _ in range(2):
        for draft, expected in zip(drafts, eager, strict=True):
            whole.draft = draft
            got = whole.caption(prepared, **options)
            assert got.token_ids == expected.token_ids
            assert got.stats.acceptance_histogram == expected.stats.acceptance_histogram
    assert emulator.replayed > 6
    assert eager[0].stats.acceptance_histogram != eager[1].stats.acceptance_histogram
