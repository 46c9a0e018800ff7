"""A trained head as draft: captions are those of stock `generate()` and of plain decoding, and guesses are accepted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import TREES
from specvlm.drafts import head
from specvlm.drafts.head import HeadDraft
from tests.heads import (
    COMPRESSORS,
    FAMILIES,
    FITTED_TOKENS,
    head_captioner,
    target_captioner,
    videos_of,
    written,
)
from tests.parity.test_changing_trees import ByChance
from tests.tiny import FamilyName, caption_rows, random_frames, stock_ids

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.3, "seed": 4, "top_k": 4},
)


@cache
def captioner_for(family: FamilyName, name: str = "none") -> Captioner:
    """One captioner per family and compressor, shared by all tests."""
    return head_captioner(family, name)


@cache
def cases(family: FamilyName) -> list[tuple[PreparedVideo, tuple[int, ...]]]:
    """Prepared videos and what stock writes about them."""
    captioner = target_captioner(family)
    return [
        (video, stock_ids(captioner.target.model, video.inputs.tensors, FITTED_TOKENS))
        for video in videos_of(captioner)
    ]


def check(captioner: Captioner, family: FamilyName, tree: str, rows: Sequence[int] = (0, 1, 2)) -> float:
    """Stock's captions of videos; -> accepted guesses per round."""
    rounds = accepted = 0
    for row in rows:
        video, stock = cases(family)[row]
        caption = captioner.caption(video, tree=tree, max_new_tokens=FITTED_TOKENS)  # type: ignore[arg-type]
        assert caption.token_ids == stock, (tree, row)
        rounds += caption.stats.num_drafts
        accepted += caption.stats.num_accepted_tokens
    return accepted / max(rounds, 1)


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_and_tree_is_stock(family: FamilyName, name: str) -> None:
    """Greedy, and by a seed as plain decoding draws."""
    captioner = captioner_for(family, name)
    least = 0.9 if name == "none" else 0.15  # the others were fitted for a few steps alone
    assert check(captioner, family, "static") > least
    for row, tree in enumerate(("chain", "dynamic", "auto")):
        accepted = check(captioner, family, tree, [row])
        assert tree == "auto" or accepted > 0  # trees as the clock has it
    video, _ = cases(family)[1]
    for options, tree in zip(SAMPLINGS, ("static", "chain"), strict=True):
        caption = captioner.caption(video, tree=tree, max_new_tokens=16, **options)  # type: ignore[misc]
        assert caption.token_ids == drawn(family, options["seed"]), tree


@cache
def drawn(family: FamilyName, seed: int) -> tuple[int, ...]:
    """What plain decoding draws of the second video."""
    (options,) = (options for options in SAMPLINGS if options["seed"] == seed)
    return written(target_captioner(family), cases(family)[1][0], max_new_tokens=16, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_vocabulary(family: FamilyName) -> None:
    """Some tokens that captions use, some that they do not; then none that they use."""
    used = sorted({token for _, stock in cases(family) for token in stock})
    some = sorted({*used[::2], *range(0, 320, 17)})
    none = sorted(set(range(320)) - set(used))[:9]
    halved, blind = (head_captioner(family, "prune-guided", ids=ids) for ids in (some, none))
    for tree in TREES:
        accepted = check(halved, family, tree)
        assert tree == "auto" or accepted > 0.1
        assert check(blind, family, tree, [0]) == 0.0


@pytest.mark.parametrize(("family", "penalty"), [("qwen", 0.8), ("llava", 1.3)])
def test_a_repetition_penalty(family: FamilyName, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = captioner_for(family)
    monkeypatch.setattr(captioner.generation_config, "repetition_penalty", penalty)
    videos = [video for video, _ in cases(family)][:2]
    stocks = [stock_ids(captioner.target.model, v.inputs.tensors, 16) for v in videos]
    for options in ({}, SAMPLINGS[0]):
        plain = [written(captioner, video, max_new_tokens=16, **options) for video in videos]
        assert options or plain == stocks
        for tree in TREES:
            rows = caption_rows(captioner, videos, tree=tree, max_new_tokens=16, **options)  # type: ignore[misc]
            assert [row.token_ids for row in rows] == plain, (tree, options)


@pytest.mark.parametrize(("family", "tree"), [("qwen", "static"), ("llava", "chain")])
def test_end_of_sequence_at_every_index(
    family: FamilyName, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_for(family)
    video, stock = cases(family)[0]
    for index, token in enumerate(dict.fromkeys(stock)):
        monkeypatch.setattr(captioner.generation_config, "eos_token_id", [token])
        caption = captioner.caption(video, tree=tree, max_new_tokens=FITTED_TOKENS)
        assert caption.token_ids == stock[: stock.index(token) + 1], index
        assert caption.finish_reason == "stop"


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_max_new_tokens(family: FamilyName) -> None:
    """1, 2, and every edge of a round."""
    video, stock = cases(family)[0]
    for limit in range(1, 13):
        for tree in TREES if limit < 3 else (TREES[limit % len(TREES)],):
            caption = captioner_for(family).caption(video, tree=tree, max_new_tokens=limit)
            assert (caption.token_ids, caption.finish_reason) == (stock[:limit], "length"), (tree, limit)


@pytest.mark.parametrize(("family", "name"), [("qwen", "prune"), ("qwen", "select"), ("llava", "conv")])
def test_several_rows_are_each_as_alone(
    family: FamilyName, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other lengths, ends inside accepted paths; and each row guesses as it does alone."""
    captioner = captioner_for(family, name)
    videos = [video for video, _ in cases(family)]
    stocks = [stock for _, stock in cases(family)]
    for tree in ("chain", "dynamic"):
        alone = [captioner.caption(v, tree=tree, max_new_tokens=FITTED_TOKENS) for v in videos]  # type: ignore[arg-type]
        rows = caption_rows(captioner, videos, tree=tree, max_new_tokens=FITTED_TOKENS)  # type: ignore[arg-type]
        assert [row.token_ids for row in rows] == stocks, tree
        for row, one in zip(rows, alone, strict=True):
            assert row.stats.acceptance_histogram == one.stats.acceptance_histogram, tree
            assert (row.stats.compressor, row.stats.compression_ratio, row.stats.video_tokens_kept) == (
                one.stats.compressor,
                one.stats.compression_ratio,
                one.stats.video_tokens_kept,
            )
    for index, tree in ((2, "auto"), (9, "static")):
        monkeypatch.setattr(captioner.generation_config, "eos_token_id", [stocks[0][index]])
        rows = caption_rows(captioner, videos, tree=tree, max_new_tokens=FITTED_TOKENS)  # type: ignore[arg-type]
        for row, stock in zip(rows, stocks, strict=True):
            end = stock.index(stocks[0][index]) + 1 if stocks[0][index] in stock else len(stock)
            assert row.token_ids == stock[:end]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_prompts_of_one_video(family: FamilyName) -> None:
    """A session's cache keeps features too; in any order, plain in between, a longer prompt after a short one."""
    captioner = captioner_for(family, "select")
    frames = random_frames(3)
    prompts = ["Hi there.", "Look at <video> and tell.", "Say more. " * 20, "Hi there."]
    alone = [captioner.caption(frames, prompt, tree="static", max_new_tokens=16) for prompt in prompts]
    session = captioner.session(frames, prompts)
    for index in (0, 0, 2, 1, 3):
        session.caption(index, speculate=False, max_new_tokens=8)
        told = session.caption(index, tree="static", max_new_tokens=16)
        assert told.token_ids == alone[index].token_ids
        assert told.stats.acceptance_histogram == alone[index].stats.acceptance_histogram


@pytest.mark.parametrize(
    ("family", "options", "seed", "catch_up"),
    [
        ("qwen", {}, 0, 2),
        ("qwen", SAMPLINGS[0], 1, 2),
        ("llava", SAMPLINGS[0], 2, 64),
        pytest.param("llava", {}, 1, 2, marks=pytest.mark.slow),
        pytest.param("qwen", {}, 2, 64, marks=pytest.mark.slow),
        pytest.param("llava", SAMPLINGS[0], 0, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_changing_trees_with_plain_rounds_between(
    family: FamilyName, options: dict[str, Any], seed: int, catch_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CATCH_UP", catch_up)
    captioner = head_captioner(family, "prune")
    captioner.generation_config.repetition_penalty = 1.1
    captioner.generation_config.eos_token_id = [] if seed % 2 else [cases(family)[0][1][15]]
    videos = [video for video, _ in cases(family)]
    plain = [written(captioner, video, max_new_tokens=40, **options) for video in videos]
    chooser = ByChance(seed, plain_first=(0, 2, 11)[seed])
    captioner.chooser = lambda *_: chooser  # type: ignore[method-assign]
    got = [captioner.caption(v, max_new_tokens=40, **options).token_ids for v in videos]
    assert got == plain
    rows = caption_rows(captioner, videos, max_new_tokens=40, **options)
    assert [row.token_ids for row in rows] == plain
    assert {0} < set(chooser.chosen)


@pytest.mark.parametrize(("family", "trees"), [("qwen", ("static", "auto")), ("llava", ("chain", "dynamic"))])
def test_a_wrong_guess_that_spoils_the_logits_costs_a_round_and_no_caption(
    family: FamilyName, trees: tuple[Any, ...]
) -> None:
    """Tokens that the target never writes make its logits and features NaN; guesses may name them."""
    captioner = head_captioner(family)
    videos = [video for video, _ in cases(family)][:2]
    stocks = [stock for _, stock in cases(family)][:2]
    used = {t for v in videos for t in v.inputs.token_ids[0].tolist()} | {t for s in stocks for t in s}
    weights = captioner.target.model.get_input_embeddings().weight
    spoilt = [token for token in range(weights.shape[0]) if token not in used]
    for tree in trees:
        for share in (1, 9):  # every round is spoilt; some of them
            weights[spoilt[::share]] = float("nan")
            alone = [captioner.caption(v, tree=tree, max_new_tokens=FITTED_TOKENS) for v in videos]
            assert [one.token_ids for one in alone] == stocks, tree
            rows = caption_rows(captioner, videos, tree=tree, max_new_tokens=FITTED_TOKENS)
            assert [one.token_ids for one in rows] == stocks, tree
            weights[spoilt] = 0.3
        if tree in ("static", "chain"):
            assert sum(one.stats.num_accepted_tokens for one in alone) > 0
            assert sum(one.stats.num_accepted_tokens for one in rows) > 0


@pytest.mark.parametrize(
    ("family", "where"), [("qwen", "join.weight"), ("llava", "text.layers.0.mlp.down_proj.weight")]
)
def test_a_head_of_nan_changes_no_caption(family: FamilyName, where: str) -> None:
    captioner = head_captioner(family)
    assert isinstance(captioner.draft, HeadDraft)
    captioner.draft.head.get_parameter(where)[0] = float("nan")
    for tree in TREES:
        check(captioner, family, tree, [1])


@pytest.mark.parametrize("family", FAMILIES)
def test_long_video_whose_times_run_ahead_of_the_text(family: FamilyName) -> None:
    """The time row of M-RoPE passes the text positions; new tokens still count on from the text."""
    for name in ("none", "resampler"):
        captioner = captioner_for(family, name)
        frames = random_frames(8, 40, 16, 16)
        video = captioner.prepare(frames._replace(times_s=frames.times_s * 6), "Hi there.")
        stock = stock_ids(captioner.target.model, video.inputs.tensors, 16)
        for tree in ("chain", "dynamic"):
            assert captioner.caption(video, tree=tree, max_new_tokens=16).token_ids == stock  # type: ignore[arg-type]
