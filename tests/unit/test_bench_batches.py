"""The bench in batches: stock's left-padded generate(), whole sets by each method, their order and their figures."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specvlm.bench.batches import SetMeasurer, SetVideo, _shared
from specvlm.bench.clips import Clip
from specvlm.bench.grid import Grid
from specvlm.bench.measure import BenchRequest, Measured, MethodError, VideoFacts, facts_of
from specvlm.bench.records import BenchReport, Configuration, Spread, Stages, TimedCaption
from specvlm.bench.stock import batches, generate, left_padded, stackable, stock_attention
from specvlm.bench.suite import (
    BenchSetup,
    Budget,
    Measurements,
    SetSuite,
    StoppedError,
    bench,
    repeated,
    reported,
)
from specvlm.bench.summing import summarise
from specvlm.bench.words import clips_words, name_of, rate, stopped_words
from specvlm.captioner import Captioner
from specvlm.errors import ConfigError, GenerationError, NotAVideoError
from specvlm.families.base import ModelInputs
from tests.bench_reports import BATCHED, CONDITIONS, made
from tests.tiny import FamilyName, Size, processor_for, random_frames, stock_ids, tiny_captioner
from tests.unit.test_bench import Heard, sample

ASKED = BenchRequest("specvlm bench", "tiny", "tiny", "What is it?", 12, 2, "noise")
PROMPTS = ("What is it?", "Describe all that can be seen in this video.", "And?")
FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")
OURS = Configuration("specvlm", None, "specvlm", 0.9, "chain")


def inputs_of(captioner: Captioner, *frames: int) -> list[ModelInputs]:
    """Prompts of several lengths, about videos of so many frames."""
    return [
        captioner.prepare(random_frames(seed, count), prompt).inputs
        for seed, (count, prompt) in enumerate(zip(frames, PROMPTS, strict=True))
    ]


# Stock in a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_padded_as_the_processor_pads_it(family: FamilyName) -> None:
    captioner = tiny_captioner(family, Size(), None)
    frames, processor = [random_frames(seed, 4) for seed in range(3)], processor_for(family)
    kind = captioner.target.family
    ours = left_padded(inputs_of(captioner, 4, 4, 4), processor.tokenizer.pad_token_id)
    theirs = processor(
        text=[kind._render(processor, prompt, None) for prompt in PROMPTS],
        videos=[torch.from_numpy(one.pixels).permute(0, 3, 1, 2) for one in frames],
        video_metadata=[kind._metadata(one) for one in frames],
        do_sample_frames=False,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        **kind.processor_options(processor),
    )
    assert not ours["attention_mask"].all()
    for name, value in ours.items():
        assert torch.equal(value, torch.as_tensor(theirs[name])), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_row_of_a_batch_has_the_tokens_that_it_has_alone(family: FamilyName, seed: int) -> None:
    """Its end included, and nothing of what the batch fills it up with."""
    captioner = tiny_captioner(family, Size(seed=seed, spread=0.5), None)
    model = captioner.target.model
    inputs = inputs_of(captioner, 4, 4, 4)
    with stock_attention([model]), torch.inference_mode():
        model.generation_config.eos_token_id = None
        alone = [stock_ids(model, one.tensors, 24) for one in inputs]
        # Ends that come in the midst of some captions, so that rows of the batch end one after the other.
        ends = [alone[0][5], alone[1][9]]
        model.generation_config.eos_token_id = ends
        alone = [stock_ids(model, one.tensors, 24) for one in inputs]
        written = generate(model, torch.device("cpu"), inputs, 24)
    assert written.token_ids == alone
    assert min(map(len, alone)) < 24
    assert written.first_tokens == 1
    assert written.prefill_s > 0.0 < written.steps_s


def test_batches_are_sorted_by_the_length_of_the_prompts() -> None:
    assert batches([5, 1, 4, 2, 3], lambda one: one, 2) == [[1, 2], [3, 4], [5]]
    assert batches([1, 2], lambda one: one, 8) == [[1, 2]]


def test_videos_that_cannot_be_stacked_part_a_batch() -> None:
    """LLaVA-OneVision takes one number of frames; Qwen2.5-VL any."""
    llava = inputs_of(tiny_captioner("llava", Size(), None), 4, 4, 6)
    assert list(stackable(llava)) == [llava[:2], llava[2:]]
    qwen = inputs_of(tiny_captioner("qwen", Size(), None), 4, 4, 6)
    assert list(stackable(qwen)) == [qwen]


# A set of videos


def a_set(captioner: Captioner, *frames: int) -> list[SetVideo]:
    """Videos that are read already, each in a second."""
    found = []
    for seed, (count, prompt) in enumerate(zip(frames, itertools.cycle(PROMPTS), strict=False)):
        pixels = random_frames(seed, count)
        facts = facts_of(f"noise {seed}", captioner.prepare(pixels, prompt))
        found.append(SetVideo(facts._replace(preprocess_s=0.0, read_s=1.0), pixels, prompt))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_gives_every_video_its_tokens_in_every_batch(family: FamilyName) -> None:
    captioner = tiny_captioner(family, Size(), Size(layers=1, seed=1))
    videos, ticks = a_set(captioner, 4, 6, 4, 6, 4), itertools.count(0.0, 100.0).__next__
    measurer = SetMeasurer(captioner, 12, ticks)
    expected = [
        stock_ids(captioner.target.model, captioner.prepare(one.frames, one.prompt).inputs.tensors, 12)
        for one in videos
    ]
    grid = Grid(("stock", "plain", "sd", "specvlm"), trees=("chain",), batch_sizes=(1, 2, 8), chain_depth=3)
    for how in grid.configurations(None):
        began = ticks()
        samples = measurer.measure_set(how, videos, 1)
        ended = ticks()
        assert [one.token_ids for one in samples] == expected, how
        assert [one.video for one in samples] == [f"noise {seed}" for seed in range(5)]
        assert {one.stages.read_s for one in samples} == {1.0}
        assert all(sum(astuple(one.stages)) == pytest.approx(one.total_s) for one in samples)
        assert 0.0 < sum(one.total_s - 1.0 for one in samples) <= ended - began
        assert all(one.decode_tokens == len(one.token_ids) - 1 for one in samples)
        has_rounds = how.method in ("sd", "specvlm")
        assert all((one.num_drafts > 0) == has_rounds for one in samples)
        assert all(len(one.acceptance_histogram) == (4 if has_rounds else 0) for one in samples)
        assert all(one.mean_batch_size == 1.0 for one in samples) == (how.batch_size == 1)
    config = captioner.target.model.config
    assert config.text_config._attn_implementation == "specvlm", (
        "this library's attention is back in its place"
    )


def test_parts_of_a_set_sum_to_its_wall_time() -> None:
    def one(**stages: float) -> Measured:
        return Measured((1, 2), Stages(**stages), 1.0, 1, 0.0)

    found = [one(preprocess_s=1.0, verify_s=2.0), one(preprocess_s=1.0, verify_s=4.0)]
    first, second = _shared(found, 10.0)
    assert (first.wall_s, second.wall_s) == (4.0, 6.0), "each has half of the two seconds that no stage has"
    # A second of preprocessing passed while the model was at work: it took no time of anybody.
    first, second = _shared(found, 7.0)
    assert first.stages == Stages(preprocess_s=0.5, verify_s=2.0)
    assert (first.wall_s, second.wall_s) == (2.5, 4.5)


def test_a_caption_that_fails_is_the_methods_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = tiny_captioner("qwen", Size(), None)
    videos, measurer = a_set(captioner, 4), SetMeasurer(captioner, 4)
    plain = Configuration("plain", batch_size=2)

    def failing(*_: Any, **__: Any) -> Any:
        yield SimpleNamespace(index=0, caption=None, error=GenerationError("no\nwords"))

    monkeypatch.setattr(captioner, "caption_many", failing)
    with pytest.raises(MethodError, match=r"^no words$"):
        measurer.measure_set(plain, videos, 1)

    def refusing(*_: Any, **__: Any) -> Any:
        raise ConfigError("depth=0 is out of range")

    monkeypatch.setattr(captioner, "caption_many", refusing)
    with pytest.raises(ConfigError):
        measurer.measure_set(plain, videos, 1)
    monkeypatch.setattr(captioner.target.model, "generate", refusing)
    with pytest.raises(MethodError, match="depth=0"):
        measurer.measure_set(Configuration("stock", batch_size=2), videos, 1)


# What is compared, and in which order


def test_a_grid_has_everything_at_each_batch_size() -> None:
    grid = Grid(("stock", "specvlm"), (4, 8), trees=("chain", "auto"), batch_sizes=(1, 8), chain_depth=6)
    found = [(one.label, one.batch_size) for one in grid.configurations(4)]
    labels = ("stock", "specvlm 0.9 chain 6", "specvlm 0.9 auto")
    assert found == [(label, size) for size in (1, 8) for label in labels]
    assert len(grid.all()) == 12
    assert grid.is_batched
    assert not Grid().is_batched
    for wrong in (0, 1025):
        with pytest.raises(ConfigError, match=f"batch_size={wrong} is out of range; give 1 to 1024"):
            Grid(batch_sizes=(4, wrong))


class FakeSets:
    """Notes what it is asked for; stock takes two seconds a video, all else one, and less in larger batches."""

    def __init__(self, fails: int | None = None, stops: int | None = None) -> None:
        self.asked: list[tuple[int, int, str, int]] = []
        self._fails, self._stops = fails, stops

    def measure_set(self, how: Configuration, videos: Any, turn: int) -> list[TimedCaption]:
        if len(self.asked) == self._stops:
            raise KeyboardInterrupt
        self.asked.append((turn, how.batch_size, how.method, len(videos)))
        if how.batch_size == self._fails:
            raise MethodError("it cannot")
        seconds = (2.0 if how.method == "stock" else 1.0) / how.batch_size
        return [sample(how, one.facts.name, turn, seconds, seconds) for one in videos]


def suite_of(
    measurer: FakeSets, heard: Heard | None = None, repeat: int = 2, budget: Budget | None = None
) -> SetSuite:
    """Of three clips, one of which is none, at batch sizes of 1 and 4."""

    def read(clip: Clip, _: int | None) -> SetVideo:
        if clip.name == "bad":
            raise NotAVideoError(clip.name, "it is text")
        return SetVideo(VideoFacts(clip.name, 4, 8, 9, 0.0, 0.0), random_frames(1, 4), "What?")

    grid, clips = (
        Grid(("stock", "plain"), batch_sizes=(1, 4)),
        [Clip(name, b"") for name in ("a", "bad", "b")],
    )
    return SetSuite(grid, clips, repeat, read, measurer, heard or Heard(), budget or Budget(None))


def test_each_turn_takes_the_whole_set_with_every_method_at_every_size() -> None:
    measurer, heard = FakeSets(), Heard()
    found = suite_of(measurer, heard).run()
    assert measurer.asked == [
        *((0, 1, "stock", 2), (0, 1, "plain", 2), (0, 4, "stock", 4), (0, 4, "plain", 4)),
        *((1, 1, "plain", 4), (1, 1, "stock", 4), (1, 4, "plain", 4), (1, 4, "stock", 4)),
        *((2, 1, "stock", 4), (2, 1, "plain", 4), (2, 4, "stock", 4), (2, 4, "plain", 4)),
    ], "two batches warm up"
    assert {one.turn for one in found.samples} == {1, 2}, "the warm-up is not kept"
    assert list(dict.fromkeys(one.video for one in found.samples)) == ["a", "b", "a #2", "b #2"]
    assert [one.video for one in heard.left] == ["bad"]
    assert [step.done for step in heard.steps] == list(range(0, 48, 4))
    assert {step.total for step in heard.steps} == {48}
    assert heard.steps[-1].what == "turn 2 of 2, plain, batch 4"


def test_a_size_that_fails_is_left_out_and_the_others_go_on() -> None:
    heard = Heard()
    found = suite_of(FakeSets(fails=4), heard).run()
    assert [label for label, _ in heard.failures] == ["stock", "plain"]
    assert {one.batch_size for one in found.errors} == {4}
    assert {one.configuration.batch_size for one in found.samples} == {1}


def test_a_spent_budget_begins_no_further_turn_but_always_one() -> None:
    found = suite_of(FakeSets(), repeat=5, budget=Budget(-1.0)).run()
    assert {one.turn for one in found.samples} == {1}


def test_of_an_interrupted_bench_whole_turns_are_kept() -> None:
    grid = Grid(("stock", "plain"), batch_sizes=(1, 4))

    def report(found: Measurements) -> BenchReport:
        return BenchReport(
            CONDITIONS, summarise(grid.all(), found.samples, found.errors), tuple(found.samples)
        )

    with pytest.raises(StoppedError) as caught:
        reported(suite_of(FakeSets(stops=10), repeat=3), grid, report)
    found = caught.value.report
    assert {one.turn for one in found.samples} == {1}
    assert [one.videos for one in found.summaries] == [4] * 4
    assert stopped_words(found) == "stopped early: kept 1 whole turn of 4 videos"


def test_no_video_is_no_set() -> None:
    assert repeated([], 4) == []


# Summing up


def set_of(how: Configuration, turn: int, *totals: float, **more: Any) -> list[TimedCaption]:
    return [
        sample(how, f"clip {number}", turn, total / 2, total, **more) for number, total in enumerate(totals)
    ]


def test_in_a_batch_the_typical_turn_is_one_for_all_videos() -> None:
    """Of each video alone it would be 2 + 3."""
    how = replace(OURS, batch_size=4)
    samples = [*set_of(how, 1, 1.0, 5.0), *set_of(how, 2, 2.0, 2.0), *set_of(how, 3, 8.0, 3.0)]
    (one,) = summarise([how], samples)
    assert one.total_s == 6.0
    (alone,) = summarise([OURS], [replace(each, configuration=OURS) for each in samples])
    assert alone.total_s == 5.0
    assert one.videos_per_hour == 3600.0 * 2 / 6.0
    assert one.tokens_per_s == 22 / 6.0
    assert one.videos_per_hour_turns == Spread(
        pytest.approx(0.8 * 7200.0 / 11.0 + 0.2 * 1200.0), 1200.0, pytest.approx(0.2 * 1200.0 + 0.8 * 1800.0)
    )


def test_speedups_are_over_the_same_batch_size_and_their_spread_is_over_turns() -> None:
    hows = [replace(how, batch_size=size) for size in (1, 4) for how in (Configuration("stock"), OURS)]
    samples: list[TimedCaption] = []
    for turn, (stock_s, ours_s) in enumerate([(8.0, 2.0), (8.0, 4.0), (9.0, 3.0)], 1):
        for how in hows:
            seconds = (stock_s if how.method == "stock" else ours_s) / how.batch_size
            samples += set_of(how, turn, seconds, seconds)
    _, alone, stock, batch = summarise(hows, samples)
    for one in (alone, batch):
        found = one.speedup("stock")
        assert found is not None
        assert found.e2e == pytest.approx(8.0 / 3.0)
        assert found.e2e_turns == Spread(pytest.approx(2.2), 3.0, pytest.approx(3.8))
        assert found.decode_turns == found.e2e_turns
    assert (stock.speedups, stock.exact_match, stock.exact_match_against) == ((), 1.0, "stock")
    assert (batch.exact_match, batch.exact_match_against) == (1.0, "stock")
    (single,) = summarise([OURS], set_of(OURS, 1, 1.0))
    assert single.videos_per_hour_turns is None


def test_captions_that_a_batch_changes_are_counted_for_it_alone() -> None:
    stock, ours = Configuration("stock"), OURS
    wide = [replace(how, batch_size=4) for how in (stock, ours)]
    samples = [one for how in (stock, ours, wide[1]) for one in set_of(how, 1, 1.0, 1.0)]
    samples += set_of(wide[0], 1, 1.0, token_ids=(9, 9))
    samples += [sample(wide[0], "clip 1", 1, 0.5, 1.0)]
    shares = [one.exact_match for one in summarise([stock, ours, *wide], samples)]
    assert shares == [None, 1.0, 0.5, 0.5], "what stock's padding changed, and who differs from it there"


@pytest.mark.parametrize(
    ("value", "words"), [(12345.6, "12,346"), (99.96, "100"), (1.234, "1.23"), (None, "")]
)
def test_rates_have_three_digits(value: float | None, words: str) -> None:
    assert rate(value) == words


def test_names_have_their_batch() -> None:
    report = made(BATCHED)
    names = [name_of(one, False) for one in report.summaries]
    assert names[:2] == ["stock", "plain"]
    assert names[-1] == "specvlm 0.9 auto, batch 32"
    assert len(set(names)) == len(names)


# On tiny models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_bench_in_batches(family: FamilyName) -> None:
    captioner = tiny_captioner(family, Size(), Size(layers=1, seed=1))
    grid = Grid(("stock", "plain", "specvlm"), (2, 4), trees=("chain",), batch_sizes=(1, 4))
    clips = [Clip(f"noise {seed}", random_frames(seed, 4), prompt=PROMPTS[seed]) for seed in range(3)]
    heard = Heard()
    report = bench(captioner, BenchSetup(grid, clips, None, ASKED), heard)
    assert heard.failures == []
    assert report.is_batched
    assert report.conditions.videos == ("noise 0", "noise 1", "noise 2")
    assert report.conditions.repeated_to == 4
    assert clips_words(report) == "noise: 3 videos, repeated to 4 for the largest batch"
    assert [one.configuration for one in report.summaries] == grid.all()
    for one in report.summaries:
        assert (one.videos, one.turns) == (4, 2)
        first = (one.configuration.method, one.configuration.batch_size) == ("stock", 1)
        assert one.exact_match == (None if first else 1.0)
        assert one.videos_per_hour is not None
        assert one.videos_per_hour_turns is not None
        assert (one.mean_batch_size > 1.0) == (one.configuration.batch_size > 1)
        assert one.mean_batch_size <= one.configuration.batch_size
        assert sum(astuple(one.stages)) == pytest.approx(one.total_s)
        if one.configuration.method == "specvlm":
            assert [found.baseline for found in one.speedups] == ["stock", "plain"]
            assert all(found.e2e_turns and found.decode_turns for found in one.speedups)
    assert {(one.num_frames, one.configuration.frames_asked) for one in report.summaries} == {(2, 2), (4, 4)}
    enough = BenchSetup(replace(grid, batch_sizes=(2,), num_frames=(2,)), clips, None, ASKED)
    assert bench(captioner, enough, Heard()).conditions.repeated_to is None
