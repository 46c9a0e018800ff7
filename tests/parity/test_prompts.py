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
from specvlm import prefill
from specvlm.captioner import Captioner
from specvlm.config import TREES
from specvlm.records import CaptionStats
from specvlm.session import PromptSession
from specvlm.stats import StageClock
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
    """How often a tower ran, and each part of the target's prefill."""
    done: Counter[str] = Counter()
    for home, name in ((prefill.VideoLM, "see"), (prefill, "prefill_video"), (prefill, "prefill_text")):
        monkeypatch.setattr(home, name, counted(getattr(home, name), name, done))
    return done


def counted(function: Any, name: str, done: Counter[str]) -> Any:
    def wrapped(*args: Any) -> Any:
        done[name] += 1
        return function(*args)

    return wrapped


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
    for name, tensor in full.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(again.tensors[name], tensor), name
    assert torch.equal(again.token_ids, full.token_ids)
    assert torch.equal(again.is_video, full.is_video)
    assert again.tensors["pixel_values_videos"] is first.tensors["pixel_values_videos"]


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_those_of_separate_runs(family: FamilyName) -> None:
    """Every way to decode, one after the other over one session, with the prompts there and back."""
    session = captioner_for(family, "noisy").session(FRAMES, PROMPTS)
    for option, options in enumerate(OPTIONS):
        for index in sorted(range(len(PROMPTS)), reverse=bool(option % 2)):
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
def test_a_shared_prefix_gives_the_very_same_bits(family: FamilyName) -> None:
    model = captioner_for(family, "noisy").target
    session = captioner_for(family, "noisy").session(FRAMES, PROMPTS)
    features, clock = prefill.Features(), StageClock(model.device)
    reader = prefill.TargetReader(model)
    with torch.inference_mode():
        reader.make_room(1, 1000)
        for index in (0, 2, 3, 1, 3, 3):
            prompt = prefill.embed(model, session._input(index), features)
            shared = reader.read(prompt, 0, clock)
            fresh = prefill.embed(model, session._input(index))
            own = prefill.prefill_target(model, fresh, model.new_cache(1, fresh.length), 0)
            assert torch.equal(shared.logits, own.logits), index
            assert torch.equal(shared.scores, own.scores), index


@pytest.mark.parametrize("family", FAMILIES)
def test_the_video_is_seen_and_prefilled_once(family: FamilyName, work: Counter[str]) -> None:
    session = captioner_for(family, "noisy").session(FRAMES, [PROMPTS[i] for i in (0, 2, 3, 1)])
    for index in (1, 0, 2):
        for speculate in (index == 0, index != 0):  # either way first
            session.caption(index, speculate=speculate, tree="static", max_new_tokens=NEW_TOKENS)
    assert work == {"see": 2, "prefill_video": 1, "prefill_text": 3}, (
        "two towers; plainly and not from one prefill"
    )
    session.caption(3, max_new_tokens=3)  # other text before the video
    assert work == {"see": 2, "prefill_video": 2, "prefill_text": 4}
    session.caption(0, max_new_tokens=3)
    assert work == {"see": 2, "prefill_video": 3, "prefill_text": 5}


def test_more_room_is_made_when_it_is_needed(work: Counter[str]) -> None:
    session = captioner_for("qwen", "noisy").session(FRAMES, PROMPTS)
    session.caption(0, speculate=False, tree="static", max_new_tokens=10)
    session.caption(2, tree="static", max_new_tokens=10)
    session.caption(0, tree="chain", max_new_tokens=3)
    assert work["prefill_video"] == 1, "there is room for the longest prompt, and for trees"
    assert session.caption(3, tree="chain", max_new_tokens=60).stats.completion_tokens > 10
    assert work["prefill_video"] == 2
    large = {"tree": "dynamic", "nodes": 80, "depth": 8, "width": 12}
    expected = captioner_for("qwen", "noisy").caption(FRAMES, PROMPTS[3], max_new_tokens=60, **large)  # type: ignore[arg-type]
    work.clear()
    assert session.caption(3, max_new_tokens=60, **large).token_ids == expected.token_ids  # type: ignore[arg-type]
    assert work["prefill_video"] == 1


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


@pytest.mark.parametrize("broken", ["see", "prefill_video", "prefill_text"])
def test_what_fails_half_way_is_done_again(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = captioner_for("llava", "noisy")
    session = captioner.session(FRAMES, PROMPTS)
    session.caption(1, max_new_tokens=3)
    home = prefill.VideoLM if broken == "see" else prefill
    if broken == "see":
        session._seen.features._of.clear()
    with monkeypatch.context() as patch:
        patch.setattr(home, broken, half(getattr(home, broken), session))
        for index in (0, 1):
            with pytest.raises(MemoryError):
                session.caption(index, max_new_tokens=NEW_TOKENS)
    for index in (1, 0):
        assert session.caption(index, max_new_tokens=NEW_TOKENS).token_ids == alone("llava", index, 1)


def half(function: Any, session: PromptSession) -> Any:
    """Do it, spoil the cache, and fail."""

    def fail(*args: Any) -> None:
        function(*args)
        cache = session._seen.reader._cache
        assert cache is not None
        for layer in cache.layers:
            assert layer.keys is not None
            layer.keys.fill_(7.0)
        raise MemoryError

    return fail


TIMES = ("video_decode_s", "preprocess_s", "vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")
FEW: dict[str, Any] = {"max_new_tokens": 3, "tree": "static"}
SOURCE = specvlm.VideoSource(2.0, 25.0, 64, 48, "elsewhere", decode_s=64.0)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still, but for these works."""
    import time

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def ticking(function: Any, seconds: float) -> Any:
        def wrapped(*args: Any) -> Any:
            now[0] += seconds
            return function(*args)

        return wrapped

    family = type(captioner_for("qwen", "noisy").target.family)
    for home, name, seconds in (
        (family, "prepare", 32.0),
        (family, "prepare_again", 0.25),
        (prefill.VideoLM, "see", 16.0),
        (prefill, "prefill_video", 8.0),
        (prefill, "prefill_text", 0.5),
    ):
        monkeypatch.setattr(home, name, ticking(getattr(home, name), seconds))


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
    assert times_of(again) == (0.0, 0.0, 0.0, 0.0, 0.0)


def test_time_of_a_caption_that_failed_counts_in_the_next(ticks: None) -> None:
    session = captioner_for("qwen", "noisy").session(FRAMES._replace(source=SOURCE), PROMPTS)
    with pytest.raises(specvlm.GenerationTimeoutError):
        session.caption(0, tree="static", max_new_tokens=NEW_TOKENS, time_limit_s=0.0)
    stats = session.caption(3, **FEW).stats
    assert times_of(stats) == (64.0, 32.25, 16.0, 8.5, 16.0)


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
    inputs = session._input(0)
    gc.disable()
    try:
        session.caption(0, max_new_tokens=3)
        cache, features = session._seen.reader._cache, session._seen.features
        assert cache is not None
        held = [weakref.ref(one) for one in (cache, features.of(captioner.target, inputs))]
        del cache, features
        session.caption(3, max_new_tokens=3)
        assert all(one() is not None for one in held)
        del session
        assert [one() for one in held] == [None, None], "at once, without a collection"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("prompts", "said"), [("Hi there.", "no list of prompts"), ([], "no list of prompts"), ((), "no list")]
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
