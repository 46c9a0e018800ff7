"""Captions state every fact, can be read back, and have the promised length."""

import pytest
from transformers import Qwen2Tokenizer

from recipes.demo.captions import FACT_KINDS, PROMPTS, caption_for, compare, facts_in, facts_of
from recipes.demo.clips import scene_for
from recipes.demo.tokenizer import Family, train_tokenizer

SEEDS = range(1500)


@pytest.fixture(scope="module", params=["qwen", "llava", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> Qwen2Tokenizer:
    family: Family = request.param
    return train_tokenizer(family)


def test_facts_survive_the_way_through_a_caption() -> None:
    for seed in SEEDS:
        scene = scene_for(seed)
        assert facts_in(caption_for(scene)) == facts_of(scene), seed


def test_captions_have_60_to_150_tokens_with_the_end(tokenizer: Qwen2Tokenizer) -> None:
    lengths = [len(tokenizer(caption_for(scene_for(seed))).input_ids) + 1 for seed in SEEDS]
    assert min(lengths) >= 60
    assert max(lengths) <= 150


def test_the_tokenizer_gives_back_every_caption_and_any_other_text(tokenizer: Qwen2Tokenizer) -> None:
    texts = [caption_for(scene_for(seed)) for seed in range(50)] + [*PROMPTS, "Größe 42, 日本 and <b>\n"]
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in texts] == texts


def test_special_tokens_are_one_token_each(tokenizer: Qwen2Tokenizer) -> None:
    for token in tokenizer.extra_special_tokens:
        assert len(tokenizer(token).input_ids) == 1


def test_a_timestamp_takes_six_tokens(tokenizer: Qwen2Tokenizer) -> None:
    for second in ("0.2", "3.8"):
        told = tokenizer.tokenize(f"<{second} seconds>")
        assert told == ["<", second[0], ".", second[2], "Ġseconds", ">"]


def test_wrong_and_broken_captions_are_counted() -> None:
    scene = next(s for s in map(scene_for, SEEDS) if len(s.things) == 2)
    true = facts_of(scene)
    right = compare(true, true)
    assert set(right) <= set(FACT_KINDS)
    assert all(hits == total for hits, total in right.values())
    assert compare(facts_in(""), true)["colour"] == (0, 2)
    assert compare(facts_in(caption_for(scene)[:60]), true)["motion"] == (0, 2)
