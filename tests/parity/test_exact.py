"""bfloat16 and float16: plain decoding has stock's bits, and `exact` makes everything else write what stock writes.

Random weights are the worst case: near-ties are as common as they get. The table over many cases:
`pytest -m fuzz -s tests/parity/test_exact.py --fuzz-family qwen --fuzz-cases 400`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from specvlm.bench.stock import stock_attention
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadModel
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.model import VideoLM
from specvlm.records import Caption
from tests.heads import config_of
from tests.parity.test_fuzz import PROMPTS, random_size
from tests.tiny import FamilyName, random_frames, stock_ids, tiny_captioner, tiny_lm

FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava", "qwen2", "qwen3", "qwen3-moe")
DTYPES = (torch.bfloat16, torch.float16)
TOKENS = 60
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"speculate": False},
    "chain": {"tree": "chain", "depth": 5},
    "static": {"tree": "static"},
    "dynamic": {"tree": "dynamic"},
    "head": {"tree": "chain", "depth": 5},
}
BATCHES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain, 4": (4, {"speculate": False}),
    "chain, 4": (4, {"tree": "chain", "depth": 5}),
    "static, 8": (8, {"tree": "static"}),
}


def in_dtype(model: VideoLM, dtype: torch.dtype) -> VideoLM:
    """The same model with weights of another dtype."""
    return VideoLM(model.model.to(dtype), model.family)


class Case(NamedTuple):
    """A random pair, a head, videos with their prompts, and what stock writes about each alone."""

    captioner: Captioner
    small: SmallModelDraft
    head: HeadDraft
    videos: list[PreparedVideo]
    stock: list[tuple[int, ...]]

    def ways(self, exact: bool) -> Iterator[tuple[str, list[tuple[Caption, tuple[int, ...]]]]]:
        """Every way to decode, with its captions, each with stock's."""
        options = {"max_new_tokens": TOKENS, "exact": exact}
        for name, how in WAYS.items():
            self.captioner.draft = self.head if name == "head" else self.small
            yield name, [(self.captioner.caption(self.videos[0], **how, **options), self.stock[0])]
        self.captioner.draft = self.small
        for name, (size, how) in BATCHES.items():
            videos = [self.videos[index % len(self.videos)] for index in range(size)]
            many = self.captioner.caption_many(videos, batch_size=size, on_error="raise", **how, **options)
            found = [(done.caption, self.stock[done.index % len(self.stock)]) for done in many]
            yield name, [(caption, stock) for caption, stock in found if caption is not None]


def stock_of(captioner: Captioner, video: PreparedVideo, tokens: int = TOKENS) -> tuple[int, ...]:
    """What stock writes with stock attention."""
    with stock_attention([captioner.target.model]):
        return stock_ids(captioner.target.model, video.inputs.tensors, tokens)


def case_of(seed: int, family: FamilyName, dtype: torch.dtype) -> Case:
    """A random case; every second draft is the target itself, so that whole paths are accepted."""
    dice = random.Random(seed)
    sizes = [random_size(dice, 300), random_size(dice, 300)]
    models = [in_dtype(tiny_lm(family, size), dtype) for size in (sizes[0], sizes[seed % 2])]
    captioner = tiny_captioner(family, sizes[0], None)
    captioner.target = models[0]
    captioner.generation_config = models[0].model.generation_config
    captioner.generation_config.eos_token_id = [299]
    if dice.random() < 0.3:
        captioner.generation_config.repetition_penalty = dice.choice([1.05, 1.2])
    small = SmallModelDraft(models[1], min(model.vocabulary for model in models))
    head = HeadModel.fresh(models[0], config_of(models[0]), seed).to(dtype).requires_grad_(False)
    videos = [
        captioner.prepare(
            random_frames(seed + 1000 * index, dice.choice([1, 2, 3, 4, 7]), 16 * dice.randint(1, 4), 48),
            dice.choice(PROMPTS),
        )
        for index in range(4)
    ]
    stock = [stock_of(captioner, video) for video in videos]
    return Case(captioner, small, HeadDraft(head, models[0], None), videos, stock)


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_writes_what_stock_writes(family: FamilyName, dtype: torch.dtype) -> None:
    """Of a mixture of experts, near-ties of the router are not settled (docs/lossless.md): most captions are equal."""
    differ = of = 0
    for name, captions in case_of(1, family, dtype).ways(exact=True):
        wrong = sum(caption.token_ids != stock for caption, stock in captions)
        assert not wrong or (family == "qwen3-moe" and name != "plain"), name
        differ, of = differ + wrong, of + len(captions)
        if name == "plain":
            assert all(caption.stats.settled_tokens == 0 for caption, _ in captions)
    assert differ <= 0.15 * of


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_many_cases(request: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    first, cases = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-cases")
    families = (
        [request.config.getoption("--fuzz-family")] if request.config.getoption("--fuzz-family") else FAMILIES
    )
    for family in families:
        equal, of, settled, written = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        for seed in range(first, first + cases):
            case = case_of(seed, family, dtype)
            for exact in (True, False):
                for name, captions in case.ways(exact):
                    way = f"{name}, {'exact' if exact else 'as it comes'}"
                    of[way] += len(captions)
                    equal[way] += sum(caption.token_ids == stock for caption, stock in captions)
                    settled[way] += sum(caption.stats.settled_tokens for caption, _ in captions)
                    written[way] += sum(caption.stats.completion_tokens for caption, _ in captions)
        print(f"\n{family}, {str(dtype).removeprefix('torch.')}, {cases} cases of {TOKENS} tokens")
        for way in sorted(of):
            share, decided = equal[way] / of[way], settled[way] / written[way]
            print(f"| {way} | {equal[way]} of {of[way]} | {share:.4f} | {decided:.4f} |")
        assert equal["plain, exact"] == of["plain, exact"]
        assert all(equal[way] >= 0.99 * of[way] for way in of if way.endswith("exact"))
