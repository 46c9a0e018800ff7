"""The spine: speculative == plain == stock `generate()`, token for token in fp32 on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import POSITIONS, PRUNERS, TREES
from tests.tiny import FamilyName, Size, caption_rows, random_frames, stock_ids, tiny_captioner

FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")
TARGET = Size(layers=3, seed=1, vocabulary=320)
NEW_TOKENS = 24
# A draft that knows nothing, in another padded vocabulary; one that errs at times; the target itself.
DRAFTS = {
    "random": Size(layers=2, seed=2, width=16, heads=2, kv_heads=1, vocabulary=290, tied=True),
    "noisy": Size(layers=3, seed=1, vocabulary=320),
    "same": Size(layers=3, seed=1, vocabulary=320),
}


@cache
def captioner_for(family: FamilyName, draft: str) -> Captioner:
    """One captioner per family and draft, shared by all tests."""
    captioner = tiny_captioner(family, TARGET, DRAFTS[draft])
    if draft == "noisy":
        torch.manual_seed(5)
        for parameter in captioner.draft.model.model.parameters():  # type: ignore[union-attr]
            parameter += 0.02 * parameter.std(correction=0) * torch.randn_like(parameter)
    return captioner


@cache
def case(family: FamilyName, prompt: str, frames: int = 4) -> tuple[PreparedVideo, tuple[int, ...]]:
    """A prepared video and what stock writes about it."""
    captioner = captioner_for(family, "same")
    prepared = captioner.prepare(random_frames(3, frames), prompt)
    return prepared, stock_ids(captioner.target.model, prepared.inputs.tensors, NEW_TOKENS)


def ids(captioner: Captioner, prepared: PreparedVideo, **options: Any) -> tuple[int, ...]:
    """Token ids of a caption."""
    return captioner.caption(prepared, **({"max_new_tokens": NEW_TOKENS} | options)).token_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["Hi there.", "Look at <video> and tell.", "Before it all.<video>"])
@pytest.mark.parametrize("frames", [1, 4])
def test_plain_is_stock(family: FamilyName, prompt: str, frames: int) -> None:
    prepared, stock = case(family, prompt, frames)
    assert ids(captioner_for(family, "same"), prepared, speculate=False) == stock


@pytest.mark.covering
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("prune_ratio", [0.0, 0.5, 0.9, 1.0])
def test_speculative_is_stock(
    family: FamilyName, draft: str, tree: str, positions: str, prune_ratio: float
) -> None:
    prepared, stock = case(family, "Hi there.")
    options = {"tree": tree, "positions": positions, "prune_ratio": prune_ratio}
    assert ids(captioner_for(family, draft), prepared, **options) == stock


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("prune_ratio", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("prompt", ["Look at <video> and tell.", "Before it all.<video>"])
@pytest.mark.parametrize("tree", TREES)
def test_every_pruner_is_stock(
    family: FamilyName, pruner: str, prune_ratio: float, prompt: str, tree: str
) -> None:
    prepared, stock = case(family, prompt)
    got = ids(captioner_for(family, "noisy"), prepared, pruner=pruner, prune_ratio=prune_ratio, tree=tree)
    assert got == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_equal_to_its_target_is_always_right(family: FamilyName) -> None:
    """Every guess is accepted to the end: the draft's cache, positions and rewinds are exact."""
    prepared, _ = case(family, "Hi there.")
    for tree, depth in (("chain", 3), ("static", 5), ("chain", 7)):
        options = {} if tree == "static" else {"depth": depth}
        stats = captioner_for(family, "same").caption(
            prepared, tree=tree, **options, prune_ratio=0.0, max_new_tokens=NEW_TOKENS
        ).stats  # fmt: skip
        full, rest = divmod(NEW_TOKENS - 1, depth + 1)
        expected = [0] * (depth + 1)
        expected[depth] = full
        if rest:
            expected[min(rest, depth)] += 1
        assert list(stats.acceptance_histogram) == expected


@cache
def stock_that_ends(family: FamilyName, prompt: str, token: int) -> tuple[int, ...]:
    """What stock writes where a token ends the sequence; `case` without one."""
    captioner = captioner_for(family, "noisy")
    assert captioner.generation_config.eos_token_id == [token]
    return stock_ids(captioner.target.model, case(family, prompt)[0].inputs.tensors, NEW_TOKENS)


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", TREES)
def test_end_of_sequence_at_every_index(
    family: FamilyName, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "Look at <video> and tell." if family == "qwen" else "Hi there."
    prepared, stock = case(family, prompt)
    captioner = captioner_for(family, "noisy")
    config = captioner.generation_config
    for index, token in enumerate(stock):
        monkeypatch.setattr(config, "eos_token_id", [token])
        first = stock.index(token)
        assert stock_that_ends(family, prompt, token) == stock[: first + 1]
        caption = captioner.caption(prepared, tree=tree, prune_ratio=0.5, max_new_tokens=NEW_TOKENS)
        assert caption.token_ids == stock[: first + 1], index
        assert caption.finish_reason == "stop"


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("draft", ["noisy", "same"])
def test_exactly_max_new_tokens(family: FamilyName, tree: str, draft: str) -> None:
    """1, 2, and every edge of a round."""
    prepared, stock = case(family, "Hi there.")
    for limit in range(1, 15):
        caption = captioner_for(family, draft).caption(prepared, tree=tree, max_new_tokens=limit)
        assert caption.token_ids == stock[:limit]
        assert caption.finish_reason == (
            "stop" if len(stock) <= limit and len(stock) < NEW_TOKENS else "length"
        )


@pytest.mark.filterwarnings("ignore:Both `min_new_tokens`")
@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.05},
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 0.8},
        {"suppress_tokens": [40, 41, 42, 252, 189]},
        {"begin_suppress_tokens": list(range(100))},
        {"min_new_tokens": 9},
        {"min_length": 9},
        {"forced_eos_token_id": 7},
        {"repetition_penalty": 1.3, "min_new_tokens": 6, "suppress_tokens": [44]},
        {"min_length": 15, "min_new_tokens": 5},  # the second goes before the first
        {"min_length": 15, "min_new_tokens": 0},
        {"suppress_tokens": [-200, 40, 5000], "begin_suppress_tokens": [-1]},  # ids that are none
    ],
    ids=str,
)
def test_logits_processors_of_the_checkpoint(
    family: FamilyName, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_for(family, "noisy")
    prepared, plain = case(family, "Hi there.")
    for name, value in rules.items():
        if name == "min_length":  # counts the prompt
            value += prepared.inputs.prompt_tokens
        monkeypatch.setattr(captioner.generation_config, name, value)
    # An end of sequence that would come early, for the rules that forbid it.
    monkeypatch.setattr(captioner.generation_config, "eos_token_id", [plain[3], 7])
    stock = stock_ids(captioner.target.model, prepared.inputs.tensors, NEW_TOKENS)
    assert ids(captioner, prepared, speculate=False) == stock
    for tree in TREES:
        assert ids(captioner, prepared, tree=tree, prune_ratio=0.5) == stock, tree


@cache
def spoilt(family: FamilyName, draft: str) -> tuple[Captioner, list[PreparedVideo], list[tuple[int, ...]]]:
    """A captioner whose logits are NaN after tokens that its target never writes, videos, and stock captions."""
    captioner = tiny_captioner(family, TARGET, DRAFTS[draft])
    videos = [
        captioner.prepare(random_frames(seed), prompt) for seed, prompt in ((3, "Hi there."), (4, "What?"))
    ]
    stocks = [stock_ids(captioner.target.model, v.inputs.tensors, NEW_TOKENS) for v in videos]
    used = {token for v in videos for token in v.inputs.token_ids[0].tolist()} | {
        t for s in stocks for t in s
    }
    weights = captioner.target.model.get_input_embeddings().weight
    weights[[token for token in range(weights.shape[0]) if token not in used]] = float("nan")
    return captioner, videos, stocks


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft", ["random", "same"])
@pytest.mark.parametrize("tree", TREES)
def test_a_wrong_guess_that_spoils_the_logits_costs_a_round_and_no_caption(
    family: FamilyName, draft: str, tree: str
) -> None:
    """Guesses may name such tokens, the caption never does."""
    captioner, videos, stocks = spoilt(family, draft)
    assert [ids(captioner, video, tree=tree) for video in videos] == stocks
    rows = caption_rows(captioner, videos, tree=tree, max_new_tokens=NEW_TOKENS)
    assert [caption.token_ids for caption in rows] == stocks


@pytest.mark.parametrize("family", FAMILIES)
def test_several_rows_are_each_as_alone(family: FamilyName) -> None:
    """Rows of other lengths, prompts and ends share one loop and do not touch each other."""
    captioner = captioner_for(family, "noisy")
    videos = [
        captioner.prepare(random_frames(seed, frames), prompt)
        for seed, frames, prompt in (
            (3, 4, "Hi there."),
            (4, 2, "Look at <video> and tell."),
            (5, 6, "What?"),
        )
    ]
    alone = [stock_ids(captioner.target.model, video.inputs.tensors, NEW_TOKENS) for video in videos]
    for tree in TREES:
        together = caption_rows(captioner, videos, tree=tree, max_new_tokens=NEW_TOKENS)
        assert [caption.token_ids for caption in together] == alone, tree
    plain = caption_rows(captioner, videos, speculate=False, max_new_tokens=NEW_TOKENS)
    assert [caption.token_ids for caption in plain] == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_where_they_would_alone(family: FamilyName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends inside an accepted path, and a minimum length that counts each row's own prompt."""
    captioner = captioner_for(family, "same")
    videos = [
        captioner.prepare(random_frames(3, 4), "Hi there."),
        captioner.prepare(random_frames(4, 6), "A longer prompt."),
    ]
    model, config = captioner.target.model, captioner.generation_config
    free = [stock_ids(model, video.inputs.tensors, NEW_TOKENS) for video in videos]
    for index in (1, 2, 3, 5):
        monkeypatch.setattr(config, "eos_token_id", [free[0][index], free[1][-2]])
        for least in (0, videos[0].inputs.prompt_tokens + 12):
            monkeypatch.setattr(config, "min_length", least)
            alone = [stock_ids(model, video.inputs.tensors, NEW_TOKENS) for video in videos]
            for tree in TREES:
                rows = caption_rows(captioner, videos, tree=tree, prune_ratio=0.0, max_new_tokens=NEW_TOKENS)
                assert [caption.token_ids for caption in rows] == alone, (tree, index, least)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_video_whose_times_run_ahead_of_the_text(family: FamilyName) -> None:
    """The time row of M-RoPE passes the text positions; new tokens still count on from the text."""
    captioner = captioner_for(family, "noisy")
    frames = random_frames(8, 120, 16, 16)
    prepared = captioner.prepare(frames._replace(times_s=frames.times_s * 4), "Hi there.")
    if family == "qwen":
        positions = captioner.target.positions(prepared.inputs)
        assert positions.max() > positions[0, -1]
    stock = stock_ids(captioner.target.model, prepared.inputs.tensors, NEW_TOKENS)
    assert ids(captioner, prepared) == stock
    assert ids(captioner, prepared, speculate=False) == stock
