"""Captions in flight: who is read when, what one failure does to the others, and whose time is whose."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specvlm import decode, stats
from specvlm.attention import AttentionPlan
from specvlm.batch import CaptionBatch, FinishedCaption
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import TreeName
from specvlm.decode import CaptionSequence, Decoder
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.errors import ConfigError, GenerationError, NonFiniteLogitsError, PromptError, VideoNotFoundError
from specvlm.families.base import VideoFeatures
from specvlm.model import TextModel, VideoLM
from tests.tiny import Size, random_frames, tiny_captioner

# The draft is another random model: now and then it is right.
TARGET, DRAFT = Size(layers=2, seed=1, vocabulary=320), Size(layers=1, seed=1, vocabulary=320)
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "tree": "chain", "depth": 2}
COUNT = 8
Ids = tuple[int, ...]


@cache
def models() -> Captioner:
    captioner = tiny_captioner("qwen", TARGET, DRAFT)
    captioner.generation_config.eos_token_id = []
    return captioner


@cache
def videos() -> list[PreparedVideo]:
    prompts = ("Hi there.", "Look at <video> and tell.", "What? " * 20)
    return [
        models().prepare(random_frames(seed, 2 + 2 * (seed % 2)), prompts[seed % 3]) for seed in range(COUNT)
    ]


@cache
def alone() -> list[Ids]:
    """What each of them is captioned alone; ends of sequence give them different lengths."""
    captioner = models()
    first = [captioner.caption(video, speculate=False, max_new_tokens=12).token_ids for video in videos()]
    captioner.generation_config.eos_token_id = [first[1][2], first[4][7], first[6][4]]
    found = [captioner.caption(video, speculate=False, max_new_tokens=12).token_ids for video in videos()]
    assert len(set(map(len, found))) > 2
    return found


@pytest.fixture
def captioner() -> Iterator[Captioner]:
    alone()
    captioner = models()
    captioner._decoders.clear()
    yield captioner
    captioner._decoders.clear()


def many(captioner: Captioner, what: Any, batch_size: int | None = 3, **options: Any) -> Iterator[Any]:
    return captioner.caption_many(what, batch_size=batch_size, **(OPTIONS | options))


def filled(captioner: Captioner, batch_size: int) -> CaptionBatch:
    """A batch of all videos, by number."""
    batch, kind = CaptionBatch(captioner, batch_size), captioner.kind(True, OPTIONS)  # type: ignore[arg-type]
    for number, video in enumerate(videos()):
        batch.add(number, video, kind)
    return batch


def run(batch: CaptionBatch) -> dict[Any, FinishedCaption]:
    """Steps until nothing is left; nobody ends twice."""
    found: dict[Any, FinishedCaption] = {}
    for _ in range(2000):
        if not len(batch):
            return found
        for one in batch.step():
            assert one.key not in found
            found[one.key] = one
    raise AssertionError("it never ends")


def check(found: dict[Any, FinishedCaption], failed: Sequence[int] = ()) -> None:
    """Everyone but those that failed has its caption."""
    assert sorted(found) == list(range(COUNT))
    assert [number for number in sorted(found) if found[number].error is not None] == list(failed)
    for number, one in found.items():
        assert (one.caption is None) == (number in failed)
        assert one.caption is None or one.caption.token_ids == alone()[number]


def usable(captioner: Captioner) -> None:
    """It captions as ever, and nothing of before is in flight."""
    assert all(len(decoder) == 0 for decoder in captioner._decoders.values())
    check(
        {
            done.index: FinishedCaption(done.index, done.caption, done.error)
            for done in many(captioner, videos())
        }
    )


# --- reading and results ---


def test_each_caption_is_the_one_it_gets_alone(captioner: Captioner) -> None:
    for size in (1, 2, 5, COUNT, None):
        got = {done.index: done.caption.token_ids for done in many(captioner, videos(), size)}
        assert [got[number] for number in range(COUNT)] == alone()


def test_videos_are_read_only_as_far_ahead_as_the_batch_needs(captioner: Captioner) -> None:
    read: list[int] = []

    def reading() -> Iterator[PreparedVideo]:
        for number, video in enumerate(videos()):
            read.append(number)
            yield video

    results = many(captioner, reading(), 3)
    assert read == []
    for done, _ in enumerate(results, start=1):
        assert len(read) <= done - 1 + 3
    assert len(read) == COUNT


def test_a_free_place_is_filled_before_the_next_step(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, ran, ended = Decoder.step, list[int](), [0]

    def step(self: Decoder) -> list[CaptionSequence]:
        ran.append(len(self))
        assert len(self) == min(3, COUNT - ended[0])
        done = sound(self)
        ended[0] += len(done)
        return done

    monkeypatch.setattr(Decoder, "step", step)
    assert len(list(many(captioner, videos(), 3))) == COUNT
    assert max(ran) == 3


def test_results_come_in_the_step_in_which_they_end(captioner: Captioner) -> None:
    short = min(range(COUNT), key=lambda number: len(alone()[number]))
    long = max(range(COUNT), key=lambda number: len(alone()[number]))
    order = [done.index for done in many(captioner, [videos()[long], videos()[short]], 2)]
    assert order == [1, 0]


def test_one_video_that_cannot_be_read_leaves_the_others(captioner: Captioner) -> None:
    frames = random_frames(1, 2)
    wanted = ["nowhere.mp4", (frames, "<video> or <video>?"), *videos(), b"nor here"]
    got = {done.index: done for done in many(captioner, wanted)}
    assert sorted(got) == list(range(COUNT + 3))
    assert isinstance(got[0].error, VideoNotFoundError)
    assert isinstance(got[1].error, PromptError)
    assert isinstance(got[COUNT + 2].error, VideoNotFoundError)
    for number, tokens in enumerate(alone(), start=2):
        assert got[number].caption.token_ids == tokens


def test_the_first_error_is_raised_where_that_is_asked(captioner: Captioner) -> None:
    results = many(captioner, [*videos()[:4], "nowhere.mp4"], on_error="raise")
    got: list[int] = []
    with pytest.raises(VideoNotFoundError):
        got.extend(done.index for done in results)
    assert set(got) < set(range(4))
    usable(captioner)


def test_a_video_that_comes_with_a_wrong_pair_is_the_callers_mistake(captioner: Captioner) -> None:
    with pytest.raises(ConfigError, match=r"videos\[1\]"):
        list(many(captioner, [videos()[0], (random_frames(1), 7)]))
    usable(captioner)


def test_an_iterable_that_fails_is_heard(captioner: Captioner) -> None:
    def reading() -> Iterator[PreparedVideo]:
        yield from videos()[:4]
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(many(captioner, reading(), 2))
    usable(captioner)


@pytest.mark.parametrize("size", [0, -1, 1025, 1.5, "3", True])
def test_a_batch_size_out_of_range_is_refused_at_once(captioner: Captioner, size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        many(captioner, videos(), size)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_error": "ignore"}, "on_error"),
        ({"depht": 3}, "depht"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_wrong_options_are_refused_before_a_video_is_read(
    captioner: Captioner, options: dict[str, Any], words: str
) -> None:
    def reading() -> Iterator[PreparedVideo]:
        raise AssertionError
        yield

    with pytest.raises(ConfigError, match=words):
        many(captioner, reading(), **options)


def test_one_video_is_not_a_list(captioner: Captioner) -> None:
    with pytest.raises(ConfigError, match=r"caption\(\)"):
        many(captioner, "video.mp4")


def test_no_videos_no_results(captioner: Captioner) -> None:
    assert list(many(captioner, [])) == []


@pytest.mark.parametrize("results", [0, 1, 4])
def test_who_stops_listening_leaves_nothing_in_flight(captioner: Captioner, results: int) -> None:
    mine, seen = [], []
    for video in videos():
        pixels = video.inputs.tensors["pixel_values_videos"].clone()
        seen.append(weakref.ref(pixels))
        tensors = {**video.inputs.tensors, "pixel_values_videos": pixels}
        mine.append(replace(video, inputs=replace(video.inputs, tensors=tensors)))
    del pixels, tensors
    generator = many(captioner, iter(mine), 3)
    for _ in range(results):
        next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert all(len(decoder) == 0 == decoder.size_bytes for decoder in captioner._decoders.values())
    del generator, mine
    gc.collect()
    assert [one() for one in seen] == [None] * COUNT
    usable(captioner)


def test_captions_in_between_disturb_nothing(captioner: Captioner) -> None:
    """Two batches, a stream and a caption, one step of each in turn."""
    one = many(captioner, videos(), 3)
    other = captioner.caption_many(videos(), batch_size=2, max_new_tokens=12, tree="static")
    plain = many(captioner, videos(), 2, speculate=False)
    got: defaultdict[str, dict[int, Ids]] = defaultdict(dict)
    stream, text = captioner.stream(videos()[0], **OPTIONS), ""
    while len(got) < 3 or any(len(found) < COUNT for found in got.values()):
        for name, results in (("one", one), ("other", other), ("plain", plain)):
            if (done := next(results, None)) is not None:
                got[name][done.index] = done.caption.token_ids
        text += next(stream, "")
        number = len(got["one"]) % COUNT
        assert captioner.caption(videos()[number], **OPTIONS).token_ids == alone()[number]
    text += "".join(stream)
    assert text == captioner.caption(videos()[0], **OPTIONS).text
    for found in got.values():
        assert [found[number] for number in range(COUNT)] == alone()


def test_whoever_is_aborted_is_gone_and_the_others_go_on(captioner: Captioner) -> None:
    for gone in range(COUNT):
        batch = filled(captioner, 3)
        found: dict[Any, FinishedCaption] = {one.key: one for one in batch.step()}
        batch.abort(gone)
        batch.abort(gone)
        found |= run(batch)
        assert sorted(found) in ([n for n in range(COUNT) if n != gone], list(range(COUNT)))
        for number, one in found.items():
            assert one.caption is not None
            assert one.caption.token_ids == alone()[number]


# --- faults ---

Fault = Callable[[str, int], BaseException | None]  # "prefill" or "round", sequences in it -> what to raise


def inject(captioner: Captioner, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Have the target's forward fail now and then, after it has written half of what it writes."""
    target = captioner.target
    sound = target.forward

    def forward(
        embeds: torch.Tensor, positions: torch.Tensor, cache: Any, plan: AttentionPlan, *more: Any
    ) -> torch.Tensor:
        out = sound(embeds, positions, cache, plan, *more)
        what, count = ("prefill", len(plan.segments)) if plan.segments else ("round", len(embeds))
        if (error := fault(what, count)) is not None:
            raise error
        return out

    monkeypatch.setattr(target, "forward", forward)


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (3, 4, 5))]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, "DefaultCPUAllocator: no memory"])
def test_memory_that_runs_out_costs_places_but_no_caption(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, seed: int, error: Any
) -> None:
    draw, batch, raised = random.Random(seed), filled(captioner, 6), 0

    def fault(what: str, count: int) -> BaseException | None:
        nonlocal raised
        if batch.running < 2 or draw.random() > (0.4 if what == "prefill" else 0.15):
            return None
        raised += 1
        return RuntimeError(error) if isinstance(error, str) else error("no memory")

    inject(captioner, monkeypatch, fault)
    check(run(batch))
    assert raised
    assert batch.batch_size < 6
    monkeypatch.undo()
    usable(captioner)


def test_as_many_run_as_there_is_memory_for(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(
        captioner,
        monkeypatch,
        lambda what, count: torch.OutOfMemoryError() if count > 2 and what == "round" else None,
    )
    batch = filled(captioner, 6)
    check(run(batch))
    assert batch.batch_size in (1, 2)


@pytest.mark.parametrize("when", ["prefill", "round"])
def test_one_that_is_too_large_even_alone_fails_alone(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    batch, large = filled(captioner, 3), 4

    def fault(what: str, count: int) -> BaseException | None:
        here = what == when and large in batch._scheduler.running
        return torch.OutOfMemoryError("too large") if here else None

    inject(captioner, monkeypatch, fault)
    found = run(batch)
    check(found, [large])
    assert isinstance(found[large].error, torch.OutOfMemoryError)


@pytest.mark.filterwarnings("ignore:a step of")
@pytest.mark.parametrize("when", ["prefill", "round"])
@pytest.mark.parametrize("bad", [[0], [4], [2, 5], [COUNT - 1]])
def test_what_one_sequence_does_to_a_step_is_found_by_running_alone(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, when: str, bad: list[int]
) -> None:
    batch = filled(captioner, 3)

    def fault(what: str, count: int) -> BaseException | None:
        here = what == when and set(bad) & set(batch._scheduler.running)
        return IndexError("odd data") if here else None

    inject(captioner, monkeypatch, fault)
    found = run(batch)
    check(found, bad)
    assert all(isinstance(found[number].error, IndexError) for number in bad)
    assert batch.batch_size == 3  # memory is not the reason
    monkeypatch.undo()
    usable(captioner)


@pytest.mark.filterwarnings("ignore:a step of")
def test_caption_many_tells_such_a_fault_as_its_own(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = videos()[2].inputs
    sound = VideoLM.embed_prompt

    def embed_prompt(self: VideoLM, inputs: Any, features: torch.Tensor) -> torch.Tensor:
        if inputs is odd:
            raise IndexError("odd\ndata")
        return sound(self, inputs, features)

    monkeypatch.setattr(VideoLM, "embed_prompt", embed_prompt)
    got = {done.index: done for done in many(captioner, videos())}
    assert isinstance(got[2].error, GenerationError)
    assert str(got[2].error) == "IndexError: odd data"
    assert isinstance(got[2].error.__cause__, IndexError)
    assert [n for n in range(COUNT) if got[n].caption is not None] == [n for n in range(COUNT) if n != 2]


@pytest.mark.filterwarnings("ignore:a step of")
def test_a_fault_that_comes_once_costs_nobody_a_caption(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def fault(what: str, count: int) -> BaseException | None:
        calls[0] += 1
        return ValueError("once") if calls[0] == 7 else None

    inject(captioner, monkeypatch, fault)
    check(run(filled(captioner, 3)))


def test_a_device_that_is_lost_ends_it_all(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = filled(captioner, 3)
    inject(
        captioner,
        monkeypatch,
        lambda what, _: RuntimeError("CUDA error: an illegal access") if what == "round" else None,
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(batch)
    assert len(batch) == batch.running == 0
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(many(captioner, videos()))


@pytest.mark.parametrize("call", [1, 3, 9])
def test_who_is_interrupted_can_go_on(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls = [0]

    def fault(what: str, count: int) -> BaseException | None:
        calls[0] += 1
        return KeyboardInterrupt() if calls[0] == call else None

    inject(captioner, monkeypatch, fault)
    with pytest.raises(KeyboardInterrupt):
        list(many(captioner, videos()))
    usable(captioner)


def test_a_caption_that_cannot_be_told_ends_with_its_error(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = captioner.detokenize

    def detokenize(tokens: Sequence[int]) -> str:
        if tuple(tokens) == alone()[3]:
            raise UnicodeError("no such character")
        return sound(tokens)

    monkeypatch.setattr(captioner, "detokenize", detokenize)
    found = run(filled(captioner, 3))
    check(found, [number for number in range(COUNT) if alone()[number] == alone()[3]])
    assert isinstance(found[3].error, UnicodeError)


# --- numbers that are not finite ---


def spoilt(video: PreparedVideo) -> PreparedVideo:
    """The video, with pixels that are NaN."""
    inputs = video.inputs
    tensors = {
        name: torch.full_like(value, torch.nan) if name == "pixel_values_videos" else value
        for name, value in inputs.tensors.items()
    }
    return replace(video, inputs=replace(inputs, tensors=tensors))


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_a_video_of_nans_fails_alone_and_leaves_its_row_clean(
    captioner: Captioner, size: int, speculate: bool
) -> None:
    mixed = [one for video in videos() for one in (spoilt(video), video)]
    got = {done.index: done for done in many(captioner, mixed, size, speculate=speculate)}
    assert sorted(got) == list(range(2 * COUNT))
    for number in range(COUNT):
        assert isinstance(got[2 * number].error, NonFiniteLogitsError)
        assert got[2 * number + 1].caption.token_ids == alone()[number]


@pytest.mark.parametrize("after", [1, 3])
def test_logits_that_spoil_late_fail_their_sequence_alone(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    batch, bad = filled(captioner, 3), 3
    sound = captioner.target.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out, decoder = sound(hidden), batch._decoder
        assert decoder is not None
        for number, row in enumerate(decoder._rows if hidden.shape[0] == len(decoder._rows) else ()):
            if row.sequence is not None and row.sequence.key == bad and len(row.text.tokens) >= after:
                out[number] = torch.nan
        return out

    monkeypatch.setattr(captioner.target, "logits", logits)
    assert len(alone()[bad]) > after
    found = run(batch)
    check(found, [bad])
    assert isinstance(found[bad].error, NonFiniteLogitsError)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("tree", ["chain", "static", "dynamic", "auto"])
def test_a_draft_that_gives_nans_changes_no_caption(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, tree: TreeName, share: float
) -> None:
    assert isinstance(captioner.draft, SmallModelDraft)
    draw, model = torch.Generator().manual_seed(3), captioner.draft.model
    sound = model.forward

    def forward(*about: Any) -> torch.Tensor:
        hidden = sound(*about)
        spoils = torch.rand(hidden.shape[:2], generator=draw) < share
        return hidden.masked_fill(spoils[..., None], torch.nan)

    monkeypatch.setattr(model, "forward", forward)
    results = captioner.caption_many(videos(), batch_size=3, max_new_tokens=12, tree=tree)
    check({done.index: FinishedCaption(done.index, done.caption, done.error) for done in results})


def test_keys_of_the_draft_that_are_nan_change_no_caption(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One video that the draft alone cannot see: its cache is full of NaN, and its rows are used again."""
    assert isinstance(captioner.draft, SmallModelDraft)
    model, odd = captioner.draft.model, [video.inputs for video in videos()[::2]]
    sound = model.embed_prompt

    def embed_prompt(inputs: Any, features: VideoFeatures) -> torch.Tensor:
        if any(inputs is one for one in odd):
            features = VideoFeatures(torch.full_like(features.embeds, torch.nan))
        return sound(inputs, features)

    monkeypatch.setattr(model, "embed_prompt", embed_prompt)
    check(
        {
            done.index: FinishedCaption(done.index, done.caption, done.error)
            for done in many(captioner, videos())
        }
    )


# --- whose time is whose ---


class Clock:
    """Time passes only where a model works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def costing(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return run


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("size", [1, 3, COUNT])
def test_the_times_of_all_captions_add_up_to_the_time_that_passed(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, size: int, speculate: bool
) -> None:
    clock, draft = Clock(), captioner.draft
    assert isinstance(draft, SmallModelDraft)
    for home in (decode, stats):
        monkeypatch.setattr(home, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    for model, seconds in ((captioner.target, 4.0), (draft.model, 1.0)):
        monkeypatch.setattr(model, "forward", clock.costing(seconds, partial(TextModel.forward, model)))
        monkeypatch.setattr(model, "see", clock.costing(2 * seconds, partial(VideoLM.see, model)))
    found = [done.caption.stats for done in many(captioner, videos(), size, speculate=speculate)]
    stages = ("vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")
    sums = {
        name: sum(getattr(one, name) for one in found)
        for name in (*stages, "draft_s", "verify_s", "commit_s")
    }
    assert sum(sums[name] for name in stages) == pytest.approx(clock.now)
    assert sums["draft_s"] + sums["verify_s"] + sums["commit_s"] == pytest.approx(sums["decode_s"])
    assert (sums["draft_s"] > 0) == (sums["draft_prefill_s"] > 0) == speculate
    for one in found:
        own = one.video_decode_s + one.preprocess_s
        assert one.total_s - own == pytest.approx(sum(getattr(one, name) for name in stages))


def test_the_mean_batch_size_is_that_of_a_captions_own_steps(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, steps, sound = Counter[Any](), Counter[Any](), Decoder.step

    def step(self: Decoder) -> list[CaptionSequence]:
        here = [row.sequence.key for row in self._rows if row.sequence is not None]
        shared.update({key: len(here) for key in here})
        steps.update(here)
        return sound(self)

    monkeypatch.setattr(Decoder, "step", step)
    found = run(filled(captioner, 3))
    for key, one in found.items():
        assert one.caption is not None
        assert one.caption.stats.mean_batch_size == pytest.approx(shared[key] / steps[key])
    assert max(shared[key] / steps[key] for key in found) > 2


def test_a_caption_that_needs_no_step_ran_in_a_batch_of_one(captioner: Captioner) -> None:
    for done in many(captioner, videos(), 3, max_new_tokens=1):
        assert len(done.caption.token_ids) == 1
        assert done.caption.stats.mean_batch_size == 1.0
        assert done.caption.stats.decode_s == 0.0
