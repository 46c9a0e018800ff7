"""One video, several prompts: captions as of separate runs and of stock `generate()`, and the work done once."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

import specvlm
from specvlm import decode, prefill
from specvlm.captioner import Captioner
from specvlm.config import TREES
from specvlm.records import CaptionStats
from specvlm.session import PromptSession
from tests.parity.test_stock import FAMILIES, captioner_for
from tests.tiny import FamilyName, Size, random_frames, stock_ids, tiny_captioner

FRAMES = random_frames(3, 6)
PROMPTS = (
    "Hi there.",
    "Look at <video> and tell.",
    "Name all that can be seen, one thing after the other. " * 12,
    "What moves?",
    "Before it all.<video>",
    "é, 漢字\nand 🙂",
)
NEW_TOKENS = 14
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"tree": tree} for tree in TREES),
    {"speculate": False},
    {"tree": "static", "temperature": 1.0, "seed": 5, "top_k": 0},
    {"speculate": False, "temperature": 1.0, "seed": 5, "top_k": 0},
    {"tree": "chain", "positions": "compact", "pruner": "attention", "prune_ratio": 0.5},
)


@cache
def alone(family: FamilyName, index: int, option: int) -> tuple[int, ...]:
    """The caption of a run of its own."""
    captioner = captioner_for(family, "noisy")
    return captioner.caption(
        FRAMES, PROMPTS[index], max_new_tokens=NEW_TOKENS, **OPTIONS[option]
    ).token_ids  # fmt: skip


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many videos a tower saw, and how many prompts the target read whole, or only the text after the video."""
    done: Counter[str] = Counter()
    see, read = prefill.VideoLM.see, decode.prefill_target

    def seeing(model: Any, videos: Any) -> Any:
        done["see"] += len(videos)
        return see(model, videos)

    def reading(model: Any, cache: Any, readings: Any, **options: Any) -> Any:
        for one in readings:
            done["text" if one.known else "whole"] += 1
        return read(model, cache, readings, **options)

    monkeypatch.setattr(prefill.VideoLM, "see", seeing)
    monkeypatch.setattr(decode, "prefill_target", reading)
    return done


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("system", [None, "Be a poet of the sea."])
def test_only_the_text_is_prepared_anew(family: FamilyName, prompt: str, system: str | None) -> None:
    captioner = captioner_for(family, "noisy")
    model, processor = captioner.target.family, captioner.processor
    first = model.prepare(processor, FRAMES, "Another prompt, with <video> inside.")
    again = model.prepare_again(processor, first, prompt, system)
    full = model.prepare(processor, FRAMES, prompt, system)
    assert again.tensors.keys() == full.tensors.keys()
    assert ("second_per_grid_ts" in again.tensors) == (family == "qwen")
    assert ("video_grid_thw" in again.tensors) == (family != "llava")
    for name, tensor in full.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(again.tensors[name], tensor), name
    assert torch.equal(again.token_ids, full.token_ids)
    assert torch.equal(again.video_at, full.video_at)
    assert again.tensors["pixel_values_videos"] is first.tensors["pixel_values_videos"]


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ways", [range(0, len(OPTIONS), 2), range(1, len(OPTIONS), 2)])
def test_captions_are_those_of_separate_runs(family: FamilyName, ways: range) -> None:
    """Every second way to decode, one after the other over one session, with the prompts there and back."""
    session = captioner_for(family, "noisy").session(FRAMES, PROMPTS)
    for number, option in enumerate(ways):
        options = OPTIONS[option]
        for index in sorted(range(len(PROMPTS)), reverse=bool(number % 2)):
            caption = session.caption(index, max_new_tokens=NEW_TOKENS, **options)
            assert caption.token_ids == alone(family, index, option), (index, options)
            assert caption.stats.completion_tokens == len(caption.token_ids)


@pytest.mark.parametrize(("family", "penalty"), [("qwen", 1.3), ("llava", None)])
def test_captions_are_stock(
    family: FamilyName, penalty: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_for(family, "noisy")
    if penalty is not None:
        monkeypatch.setattr(captioner.generation_config, "repetition_penalty", penalty)
    stock = [
        stock_ids(captioner.target.model, captioner.prepare(FRAMES, prompt).inputs.tensors, NEW_TOKENS)
        for prompt in PROMPTS
    ]
    made = captioner.caption_prompts(FRAMES, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [caption.token_ids for caption in made] == stock
    assert [caption.text for caption in made] == [captioner.detokenize(ids) for ids in stock]
    plain = captioner.caption_prompts(FRAMES, PROMPTS, speculate=False, max_new_tokens=NEW_TOKENS)
    assert [caption.token_ids for caption in plain] == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_gives_the_same_numbers(family: FamilyName) -> None:
    """Read in two parts, the first of which another prompt has read: logits, scores, keys and values."""
    captioner = captioner_for(family, "noisy")
    model, session = captioner.target, captioner.session(FRAMES, PROMPTS)
    kind = captioner.kind(False, {})
    begun = prefill.Begun()
    with torch.inference_mode():
        for index in (0, 2, 3, 1, 3, 3):
            video = session._sequence(index, kind)[0]
            (prompt,) = prefill.embed(model, [prefill.ToSee(video.inputs, begun.features)])
            caches = [model.new_cache(prompt.length) for _ in range(2)]
            known = begun.give(prompt, caches[0], 0)
            assert known == (0 if index in (0, 1) else prompt.boundary), index
            shared, own = (
                prefill.prefill_target(model, cache, [prefill.PrefillRow(prompt, 0, first)])[0]
                for cache, first in zip(caches, (known, 0), strict=True)
            )
            begun.keep(prompt, caches[0], 0)
            assert torch.allclose(shared.logits, own.logits, atol=1e-4), index
            assert torch.allclose(shared.scores, own.scores, atol=1e-6), index
            for mine, theirs in zip(*(cache.copy_out(0, prompt.length) for cache in caches), strict=True):
                assert torch.allclose(mine, theirs, atol=1e-4), index
    assert list(begun.features.of) == [model]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_video_is_seen_and_prefilled_once(family: FamilyName, work: Counter[str]) -> None:
    session = captioner_for(family, "noisy").session(FRAMES, [PROMPTS[i] for i in (0, 2, 3, 1)])
    for index in (1, 0, 2):
        for speculate in (index == 0, index != 0):  # either way first
            session.caption(index, speculate=speculate, tree="static", max_new_tokens=NEW_TOKENS)
    # Plainly, the target sees and reads; with the draft, both see, and the target reads again.
    assert work == {"see": 3, "whole": 2, "text": 4}
    session.caption(3, max_new_tokens=3)  # other text before the video
    assert work == {"see": 3, "whole": 3, "text": 4}
    session.caption(0, max_new_tokens=3)
    assert work == {"see": 3, "whole": 3, "text": 5}, "what was kept first is kept"


def test_captions_of_any_length_and_tree_share_a_prefill(work: Counter[str]) -> None:
    """What is kept of a video does not depend on how long captions are, or how large trees."""
    session = captioner_for("qwen", "noisy").session(FRAMES, PROMPTS)
    session.caption(0, tree="static", max_new_tokens=10)
    session.caption(2, tree="chain", max_new_tokens=3)
    assert session.caption(3, tree="chain", max_new_tokens=60).stats.completion_tokens > 10
    assert work["whole"] == 1
    large = {"tree": "dynamic", "nodes": 80, "depth": 8, "width": 12}
    got = session.caption(3, max_new_tokens=60, **large).token_ids  # type: ignore[arg-type]
    assert work["whole"] == 1
    expected = captioner_for("qwen", "noisy").caption(FRAMES, PROMPTS[3], max_new_tokens=60, **large)  # type: ignore[arg-type]
    assert got == expected.token_ids


def test_an_error_in_one_prompt_leaves_the_others_alone() -> None:
    captioner = captioner_for("qwen", "noisy")
    session = captioner.session(FRAMES, ["<video> and <video>", "Hi there.", "say <|im_end|>", "What moves?"])
    for index, reason in ((0, "more than once"), (2, "special token"), (0, "more than once")):
        with pytest.raises(specvlm.PromptError, match=reason):
            session.caption(index)
        with pytest.raises(specvlm.GenerationTimeoutError, match="not done after 0 s"):
            session.caption(1, max_new_tokens=NEW_TOKENS, time_limit_s=0.0)
        assert session.caption(1, max_new_tokens=NEW_TOKENS).token_ids == alone("qwen", 0, 1)
        assert session.caption(3, max_new_tokens=NEW_TOKENS).token_ids == alone("qwen", 3, 1)
    only = captioner.session(FRAMES, ["<video> and <video>"])
    with pytest.raises(specvlm.PromptError):
        only.caption(0)


@pytest.mark.parametrize("broken", ["see", "whole", "text"])
def test_what_fails_half_way_is_done_again(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower, or a prefill that has written into the cache: the session goes on, from what it has."""
    captioner = captioner_for("llava", "noisy")
    session = captioner.session(FRAMES, PROMPTS)
    if broken == "text":
        session.caption(0, max_new_tokens=3)
    real: Any = prefill.VideoLM.see if broken == "see" else decode.prefill_target

    def fail(model: Any, *args: Any, **options: Any) -> None:
        real(model, *args, **options)
        if broken != "see":
            for one in args[1]:
                args[0].copy_in(one.row, [part.fill_(7.0) for part in args[0].copy_out(one.row, 5)])
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(*((prefill.VideoLM, "see") if broken == "see" else (decode, "prefill_target")), fail)
        for index in (3, 0):
            with pytest.raises(MemoryError):
                session.caption(index, max_new_tokens=NEW_TOKENS)
    for index in (1, 0, 3):
        assert session.caption(index, max_new_tokens=NEW_TOKENS).token_ids == alone("llava", index, 1)


TIMES = ("video_decode_s", "preprocess_s", "vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")
FEW: dict[str, Any] = {"max_new_tokens": 3, "tree": "static"}
SOURCE = specvlm.VideoSource(2.0, 25.0, 64, 48, "elsewhere", decode_s=64.0)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still, but for these works."""
    import time

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def ticking(function: Any, seconds_of: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            now[0] += seconds_of(*args)
            return function(*args, **options)

        return wrapped

    def reading_s(model: Any, cache: Any, readings: Any) -> float:
        return sum(0.5 if one.known else 8.5 for one in readings)

    family = type(captioner_for("qwen", "noisy").target.family)
    for home, name, seconds_of in (
        (family, "prepare", lambda *_: 32.0),
        (family, "prepare_again", lambda *_: 0.25),
        (prefill.VideoLM, "see", lambda model, videos: 16.0 * len(videos)),
        (decode, "prefill_target", reading_s),
    ):
        monkeypatch.setattr(home, name, ticking(getattr(home, name), seconds_of))


def times_of(stats: CaptionStats) -> tuple[float, ...]:
    """All times before decoding, which are all the time that passes."""
    times = tuple(getattr(stats, name) for name in TIMES)
    assert sum(times) == stats.total_s
    assert times[-1] == 0.0
    return times[:-1]


@pytest.mark.parametrize("plain_first", [False, True])
def test_shared_time_counts_once_for_each_way_to_decode(ticks: None, plain_first: bool) -> None:
    session = captioner_for("qwen", "noisy").session(FRAMES._replace(source=SOURCE), PROMPTS)
    took = {
        (index, speculate): times_of(session.caption(index, speculate=speculate, **FEW).stats)
        for index in (3, 0, 1)
        for speculate in (not plain_first, plain_first)
    }
    assert took == {
        (3, False): (64.0, 32.25, 16.0, 8.5, 0.0),
        (3, True): (64.0, 32.25, 16.0, 8.5, 16.0),
        (0, False): (0.0, 0.0, 0.0, 0.5, 0.0),  # the first prompt was prepared together with the pixels
        (0, True): (0.0, 0.0, 0.0, 0.5, 0.0),
        (1, False): (0.0, 0.25, 0.0, 8.5, 0.0),  # other text before the video
        (1, True): (0.0, 0.25, 0.0, 8.5, 0.0),
    }
    again = session.caption(1, speculate=plain_first, **FEW).stats
    assert times_of(again) == (0.0, 0.0, 0.0, 8.5, 0.0)  # only what precedes the text after a video is kept


def test_time_of_a_caption_that_failed_is_lost_with_it(ticks: None) -> None:
    """Nothing is read or seen again for the next one, which counts what is its own."""
    session = captioner_for("qwen", "noisy").session(FRAMES._replace(source=SOURCE), PROMPTS)
    with pytest.raises(specvlm.GenerationTimeoutError):
        session.caption(0, tree="static", max_new_tokens=NEW_TOKENS, time_limit_s=0.0)
    stats = session.caption(3, **FEW).stats
    assert times_of(stats) == (0.0, 0.25, 0.0, 0.5, 0.0)


def test_a_caption_alone_takes_what_it_takes_in_a_session(ticks: None) -> None:
    frames = FRAMES._replace(source=SOURCE)
    captioner = captioner_for("qwen", "noisy")
    alone = captioner.caption(frames, PROMPTS[0], **FEW).stats
    assert times_of(alone) == (64.0, 32.0, 16.0, 8.5, 16.0)
    shared = captioner.caption_prompts(frames, PROMPTS[:1], **FEW)[0].stats
    assert times_of(shared) == times_of(alone)


def test_without_a_draft_both_ways_are_one() -> None:
    captioner = tiny_captioner("llava", Size(seed=1), None)
    session = captioner.session(FRAMES, PROMPTS[:2])
    first = session.caption(0, speculate=True, max_new_tokens=3).stats
    again = session.caption(0, speculate=False, max_new_tokens=3).stats
    assert first.method == again.method == "plain"
    assert first.preprocess_s > again.preprocess_s == 0.0


def test_memory_goes_with_the_session() -> None:
    captioner = captioner_for("qwen", "noisy")
    session = captioner.session(FRAMES, PROMPTS)
    gc.disable()
    try:
        session.caption(0, **FEW)
        begun = session._begun[True]
        assert begun is not None
        seen = (one.embeds for one in begun.features.of.values())
        held = [weakref.ref(one) for one in (*begun._kept, *seen)]
        assert len(held) == 3
        del begun
        session.caption(3, max_new_tokens=3)
        assert all(one() is not None for one in held)
        del session
        assert [one() for one in held] == [None] * 3, "at once, without a collection"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("prompts", "said"),
    [("Hi there.", "not a list of prompts"), ([], "not a list of prompts"), ((), "not a list")],
)
def test_prompts_that_are_no_list(prompts: Any, said: str) -> None:
    with pytest.raises(specvlm.ConfigError, match=said):
        captioner_for("qwen", "noisy").session("/no/such/video.mp4", prompts)


def test_a_prompt_that_is_not_there() -> None:
    session: PromptSession = captioner_for("qwen", "noisy").session(FRAMES, PROMPTS[:2])
    for index in (2, -1):
        with pytest.raises(specvlm.ConfigError, match=f"prompt {index} of a session with 2"):
            session.caption(index)


def test_wrong_options_are_refused_before_the_video_is_read() -> None:
    captioner: Captioner = captioner_for("qwen", "noisy")
    with pytest.raises(specvlm.ConfigError, match="prune_ratio"):
        captioner.caption_prompts("/no/such/video.mp4", PROMPTS, prune_ratio=2.0)
    with pytest.raises(specvlm.VideoNotFoundError):
        captioner.caption_prompts("/no/such/video.mp4", PROMPTS)
