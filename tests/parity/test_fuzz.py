"""Randomised parity: everything at once, from a seed that names the case."""

from __future__ import annotations

import random
from typing import Any

import pytest

from specvlm.config import POSITIONS, PRUNERS, TREES
from specvlm.drafts.compressor import MODES, OPERATORS, CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadModel
from specvlm.model import VideoLM
from specvlm.training.objective import ObjectiveSettings
from tests.heads import config_of, examples_of, fit
from tests.tiny import FamilyName, Size, random_frames, stock_ids, tiny_captioner

CI_CASES, MORE_CASES = 12, 48
PROMPTS = (
    "Describe.",
    "<video>",
    "What happens in <video> at its end?",
    "Long words stand here, before the video. <video>",
    "One\ntwo\n\nthree: é, 漢字 and 🙂.",
)


def random_size(dice: random.Random, vocabulary: int) -> Size:
    """A text model of 2 to 4 layers with grouped heads."""
    heads = dice.choice([2, 4, 6])
    kv_heads = dice.choice([k for k in (1, 2, 3, 6) if heads % k == 0])
    return Size(
        layers=dice.randint(2, 4),
        width=heads * dice.choice([8, 16]),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=vocabulary,
        tied=dice.random() < 0.5,
        seed=dice.randrange(2**31),
        spread=dice.choice([0.1, 0.2, 0.4]),
    )


def random_options(dice: random.Random) -> dict[str, Any]:
    """Speculation settings, any of them."""
    tree = dice.choice(TREES)
    depth, nodes = dice.randint(1, 8), dice.randint(2, 40)
    return {
        "tree": tree,
        "pruner": dice.choice(PRUNERS),
        "positions": dice.choice(POSITIONS),
        "prune_ratio": dice.choice([0.0, 0.3, 0.5, 0.9, 0.97, 1.0]),
        "top_p": dice.choice([0.0, 0.2, 0.4, 1.0]),
        "depth": None if tree == "static" else depth,
        "nodes": nodes if tree in ("auto", "dynamic") else None,
        "width": dice.randint(1, 6),
        "max_new_tokens": dice.choice([1, 2, 3, 7, 16, 33]),
    }


def random_head(dice: random.Random, target: VideoLM) -> HeadModel:
    """An untrained head of a target."""
    mode = dice.choice(MODES)
    count = {"none": 0, "single": 1}.get(mode, dice.randint(2, len(OPERATORS)))
    compressor = CompressorConfig(
        mode, tuple(dice.sample(OPERATORS, count)), dice.choice([1.0, 3.0, 7.5, 20.0])
    )
    return HeadModel.fresh(target, config_of(target, compressor), dice.randrange(99))


def check_case(seed: int, family: FamilyName | None = None) -> None:
    """Speculative == plain == stock for one random pair, video, prompt and set of options."""
    dice = random.Random(seed)
    drawn: FamilyName = dice.choice(["qwen", "llava"])
    family = family or drawn
    target = random_size(dice, dice.choice([280, 320]))
    same = dice.random() < 0.4
    draft = target if same else random_size(dice, dice.choice([270, 300, 340]))
    captioner = tiny_captioner(family, target, draft)
    others = random.Random(~seed)  # so that a seed names the same case as before there were heads
    head = random_head(others, captioner.target) if others.random() < 0.4 else None
    frames = random_frames(
        seed, dice.choice([1, 2, 3, 4, 7]), 16 * dice.randint(1, 4), 16 * dice.randint(1, 4)
    )
    prepared = captioner.prepare(frames, dice.choice(PROMPTS))
    config, tensors = captioner.generation_config, prepared.inputs.tensors
    if dice.random() < 0.4:
        config.repetition_penalty = dice.choice([0.9, 1.05, 1.2, 1.5])
    options = random_options(dice)
    limit = options["max_new_tokens"]
    stock = stock_ids(captioner.target.model, tensors, limit)
    if dice.random() < 0.5:
        config.eos_token_id = [dice.choice(stock), dice.randrange(260)]
        stock = stock_ids(captioner.target.model, tensors, limit)
    if head is not None:
        told = [(prepared, stock)] if len(stock) > 1 else []
        fit(head, captioner.target, examples_of(captioner.target, told), 8, ObjectiveSettings(unroll=1))
        ids = sorted(others.sample(range(260), 40)) if others.random() < 0.3 else None
        captioner.draft = HeadDraft(head.requires_grad_(False), captioner.target, ids)
    said = f"case {seed}: {family} {target} {draft if head is None else head.config} {options}"
    assert captioner.caption(prepared, speculate=False, max_new_tokens=limit).token_ids == stock, said
    assert captioner.caption(prepared, **options).token_ids == stock, said
    sampling = {"temperature": dice.choice([0.5, 1.5]), "top_k": dice.choice([0, 4]), "seed": seed}
    plain = captioner.caption(prepared, speculate=False, max_new_tokens=limit, **sampling).token_ids
    assert captioner.caption(prepared, **(options | sampling)).token_ids == plain, said


@pytest.mark.parametrize("seed", range(CI_CASES))
def test_random_cases(seed: int) -> None:
    check_case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CI_CASES, CI_CASES + MORE_CASES))
def test_more_random_cases(seed: int) -> None:
    check_case(seed)


@pytest.mark.fuzz
def test_many_random_cases(request: pytest.FixtureRequest) -> None:
    first, cases = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-cases")
    named = request.config.getoption("--fuzz-family") or None
    for seed in range(first, first + cases):
        check_case(seed, named)
