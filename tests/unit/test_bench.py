"""The bench: order of the methods, arithmetic of the summaries, and each method's times on tiny random models."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specvlm
from recipes.demo.examples import EXAMPLES
from specvlm.bench.clips import Clip, example_clips
from specvlm.bench.grid import Grid
from specvlm.bench.measure import BenchRequest, Measurer, MethodError
from specvlm.bench.records import BenchReport, Configuration, Left, MethodName, Stages, Summary, TimedCaption
from specvlm.bench.suite import (
    BenchSetup,
    BenchStep,
    Budget,
    Measurements,
    StoppedError,
    Suite,
    bench,
    reported,
    rotated,
    whole_turns,
)
from specvlm.bench.summing import acceptance_per_depth, limit, predicted_speedup, summarise
from specvlm.bench.words import depths, frames_note, frames_notes, frames_of, stopped_words
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.errors import ConfigError, NotAVideoError
from specvlm.words import percent
from tests.bench_reports import CONDITIONS
from tests.tiny import FamilyName, Size, random_frames, stock_ids, tiny_captioner

STOCK, PLAIN = Configuration("stock"), Configuration("plain")
OURS = Configuration("specvlm", None, "specvlm", 0.9, "static")
VIDEOS = Path(__file__).parents[2] / "examples" / "videos"
ASKED = BenchRequest("specvlm bench", "tiny", "tiny", "What is it?", 12, 2, "noise")
FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[BenchStep] = []
        self.left: list[Left] = []
        self.failures: list[tuple[str, str]] = []

    def step(self, step: BenchStep) -> None:
        self.steps.append(step)

    def left_out(self, left: Left) -> None:
        self.left.append(left)

    def failed(self, how: Configuration, error: str) -> None:
        self.failures.append((how.label, error))


def sample(
    how: Configuration, video: str, turn: int, decode_s: float, total_s: float = 0.0, **more: Any
) -> TimedCaption:
    """A caption of eleven tokens."""
    figures: dict[str, Any] = {
        "num_frames": 8,
        "video_tokens": 100,
        "video_tokens_kept": 10,
        "prompt_tokens": 120,
        "token_ids": tuple(range(11)),
        "stages": Stages(),
        "decode_tokens": 10,
        "num_drafts": 0,
        "num_draft_tokens": 0,
        "num_accepted_tokens": 0,
        "acceptance_histogram": (),
        "depth_tries": (),
        "peak_memory_bytes": 7,
    }
    return TimedCaption(
        how, video, turn, decode_s=decode_s, total_s=total_s or decode_s + 1.0, **(figures | more)
    )


# What is compared


def test_a_grid_is_every_method_and_every_combination_once() -> None:
    grid = Grid(("stock", "sd", "specvlm"), (16, 64), ("none", "uniform"), (0.0, 0.9), ("chain", "static"))
    found = [one.label for one in grid.configurations(16)]
    assert found == [
        *("stock", "sd chain", "sd static", "specvlm none chain", "specvlm none static"),
        *("specvlm uniform 0.9 chain", "specvlm uniform 0.9 static"),
    ], "a ratio of 0 is the same whatever the pruner"
    assert [one.frames_asked for one in grid.all()] == [16] * 7 + [64] * 7


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"methods": ("stock", "fast")}, "methods='fast' is unknown"),
        ({"prune_ratios": (0.5, 1.5)}, "prune_ratio=1.5 is out of range"),
        ({"trees": ("bush",)}, "tree='bush' is unknown"),
        ({"num_frames": (0,)}, "num_frames=0 is out of range"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_loaded(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Grid(**wrong)


# Summing up


def test_ratios_are_of_totals_of_medians_and_medians_are_of_videos() -> None:
    times = {
        (STOCK, "a"): (1.0, 9.0, 2.0),  # the slow turn is no median
        (STOCK, "b"): (4.0, 4.0, 4.0),
        (OURS, "a"): (0.5, 0.5, 7.0),
        (OURS, "b"): (4.0, 2.0, 1.0),
    }
    samples = [
        sample(how, video, turn, seconds)
        for (how, video), turns in times.items()
        for turn, seconds in enumerate(turns, 1)
    ]
    stock, ours = summarise([STOCK, OURS], samples)
    assert (stock.videos, stock.turns, stock.completion_tokens) == (2, 3, 22)
    assert (stock.decode_s, ours.decode_s) == (6.0, 2.5)
    assert (stock.token_s, ours.token_s) == (0.3, 0.125)
    found = ours.speedup("stock")
    assert found is not None
    assert found.decode == pytest.approx(6.0 / 2.5)
    assert found.decode_median == pytest.approx((4.0 + 2.0) / 2)
    assert found.e2e == pytest.approx((6.0 + 2.0) / (2.5 + 2.0))
    assert (stock.speedups, stock.exact_match, ours.speedup("plain")) == ((), None, None)


def test_all_figures_of_a_video_are_of_the_turn_whose_total_is_the_median() -> None:
    """Each stage's own median would be read 1, draft 2, verify 3: no turn, and 6 s in place of 7."""

    def turn(
        video: str, number: int, read_s: float, draft_s: float, verify_s: float, rounds: int
    ) -> TimedCaption:
        stages = Stages(read_s=read_s, draft_s=draft_s, verify_s=verify_s)
        decode_s = draft_s + verify_s
        more = {"token_ids": tuple(range(5 * rounds + 1)), "decode_tokens": 5 * rounds}
        return sample(
            OURS, video, number, decode_s, read_s + decode_s, stages=stages, num_drafts=rounds,
            num_draft_tokens=25 * rounds, num_accepted_tokens=4 * rounds, **more,
        )  # fmt: skip

    turns = [turn("a", 1, 1.0, 1.0, 4.0, 2), turn("a", 2, 4.0, 2.0, 1.0, 3), turn("a", 3, 1.0, 6.0, 3.0, 4)]
    (one,) = summarise([OURS], [*turns, turn("b", 1, 1.0, 1.0, 1.0, 1), turn("b", 2, 9.0, 9.0, 9.0, 9)])
    assert one.stages == Stages(read_s=4.0 + 1.0, draft_s=2.0 + 1.0, verify_s=1.0 + 1.0), "of two, the faster"
    assert sum(astuple(one.stages)) == one.total_s == 7.0 + 3.0
    assert one.decode_s == 3.0 + 2.0
    assert (one.num_drafts, one.num_draft_tokens, one.num_accepted_tokens) == (3 + 1, 75 + 25, 12 + 4)
    assert one.mean_accepted_tokens == one.num_accepted_tokens / one.num_drafts
    assert one.mean_nodes == 1 + one.num_draft_tokens / one.num_drafts
    assert one.decode_tokens == one.num_accepted_tokens + one.num_drafts, "a bonus for each round"
    assert one.completion_tokens == one.decode_tokens + one.videos
    assert one.token_s == one.decode_s / one.decode_tokens
    assert one.draft_round_s == one.stages.draft_s / one.num_drafts


def test_captions_that_differ_are_counted_and_compared_by_the_token() -> None:
    other = sample(OURS, "b", 1, 1.0, token_ids=(9, 9, 9), decode_tokens=2)
    samples = [sample(STOCK, "a", 1, 2.0), sample(STOCK, "b", 1, 2.0), sample(OURS, "a", 1, 1.0), other]
    _, ours = summarise([STOCK, OURS], samples)
    assert (ours.exact_match, ours.exact_match_against) == (0.5, "stock")
    found = ours.speedup("stock")
    assert found is not None
    assert found.decode == pytest.approx((4.0 / 20) / (2.0 / 12))


def test_without_stock_plain_is_the_reference() -> None:
    samples = [sample(PLAIN, "a", 1, 2.0), sample(OURS, "a", 1, 1.0)]
    plain, ours = summarise([PLAIN, OURS], samples)
    assert (ours.exact_match, ours.exact_match_against) == (1.0, "plain")
    assert (plain.exact_match, plain.exact_match_against) == (None, None)


def test_only_equal_numbers_of_frames_are_compared() -> None:
    few, many = replace(PLAIN, frames_asked=16), replace(OURS, frames_asked=64)
    summaries = summarise([few, many], [sample(few, "a", 1, 2.0), sample(many, "a", 1, 1.0)])
    assert [one.speedups for one in summaries] == [(), ()]


def test_what_failed_has_no_figures_and_is_no_baseline() -> None:
    samples = [sample(STOCK, "a", 1, 2.0), sample(OURS, "a", 1, 1.0)]
    stock, ours = summarise([STOCK, OURS], samples, {STOCK: "out of memory"})
    assert (stock.error, stock.videos, ours.error) == ("out of memory", 0, None)
    assert (ours.speedups, ours.exact_match) == ((), None)


def rounds(plain_token_s: float = 0.1, **more: Any) -> tuple[Summary, ...]:
    """Two rounds of 5 guesses in all: 10 tokens, 8 of them accepted, 0.02 s of drafting and 0.04 s of verifying."""
    figures: dict[str, Any] = {
        "stages": Stages(draft_s=0.02, verify_s=0.04, commit_s=0.002, host_s=0.008),
        "num_drafts": 2,
        "num_draft_tokens": 10,
        "num_accepted_tokens": 8,
        "acceptance_histogram": (0, 0, 0, 1, 0, 1),
    }
    ours = sample(OURS, "a", 1, 0.07, **(figures | more))
    return summarise([PLAIN, OURS], [sample(PLAIN, "a", 1, 10 * plain_token_s), ours])


def test_the_formula_predicts_from_measured_terms() -> None:
    _, ours = rounds()
    assert (ours.mean_accepted_tokens, ours.mean_nodes, ours.plain_steps) == (4.0, 6.0, 0)
    assert (ours.draft_round_s, ours.verify_round_s) == (0.01, 0.02)
    assert ours.predicted_decode_speedup == pytest.approx(5.0 * 0.1 / 0.03)
    assert ours.measured_over_predicted == pytest.approx((1.0 / 0.07) / (5.0 * 0.1 / 0.03))
    assert ours.host_share == pytest.approx(0.008 / 0.07)


def test_steps_without_guesses_count_as_plain_ones() -> None:
    """Ten tokens of which one round gave five: the others were plain, at T_plain each."""
    plain_s = 0.1
    _, ours = rounds(
        plain_s,
        num_drafts=1,
        num_draft_tokens=5,
        num_accepted_tokens=4,
        acceptance_histogram=(0, 0, 0, 0, 1, 0),
        stages=Stages(draft_s=0.01, verify_s=0.02 + 5 * plain_s),
    )
    assert ours.plain_steps == 5
    assert ours.verify_round_s == pytest.approx(0.02)
    assert ours.predicted_decode_speedup == pytest.approx(10 * plain_s / (0.03 + 5 * plain_s))


def test_without_plain_nothing_is_predicted_and_the_share_is_named() -> None:
    _, ours = rounds()
    alone = replace(ours, plain_token_s=None, speedups=())
    assert predicted_speedup(alone) is None
    assert limit(alone) == "verifying takes 57 % of a round"


def test_where_auto_guessed_nothing_that_is_said() -> None:
    plain, ours = rounds()
    auto = replace(ours.configuration, tree="auto")
    silent = replace(ours, configuration=auto, num_drafts=0)
    assert limit(silent).endswith(
        "nothing was guessed: by what rounds cost here and now, plain decoding promised more"
    )
    assert "guessed" not in limit(replace(ours, configuration=auto))
    assert "guessed" not in limit(plain)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (
            {"draft_s": 0.002, "verify_s": 0.2, "accepted": 10},
            "no term stands out: a round costs 1.0 plain steps and gives 6.0 tokens",
        ),
        (
            {"draft_s": 0.2, "verify_s": 0.2},
            "drafting costs 1.0 plain steps a round; if it were free, decoding would be 2.0 x",
        ),
        ({"draft_s": 0.02, "verify_s": 0.6}, "verifying 6 nodes costs 3.0 plain steps"),
        ({"draft_s": 0.02, "verify_s": 0.2, "host_s": 0.5}, "all but drafting and verifying costs 2.5"),
        ({"draft_s": 0.01, "verify_s": 0.2}, "4.0 of 5 guesses in a row are accepted"),
        (
            {"draft_s": 0.02, "verify_s": 0.6, "read_s": 1.0, "vision_s": 5.0},
            "91 % of the time passes before the first token, most of it in vision; then verifying",
        ),
    ],
)
def test_the_term_whose_ideal_gains_most_is_the_limit(terms: dict[str, float], words: str) -> None:
    accepted = int(terms.pop("accepted", 8))
    stages = Stages(**terms)
    decode_s = stages.draft_s + stages.verify_s + stages.host_s
    before_s = stages.read_s + stages.vision_s
    _, ours = rounds(
        stages=stages, total_s=before_s + decode_s if before_s else 9.0, num_accepted_tokens=accepted
    )
    assert ours.limit.startswith(words)


def test_acceptance_per_depth_is_conditional() -> None:
    # Ten rounds: two accept nothing, four stop at one, three at two, one goes to the end of the deeper tree.
    found = acceptance_per_depth([(2, 4, 2), (0, 0, 1, 1)], [(8, 6), (2, 2, 2)])
    assert found == (pytest.approx(8 / 10), pytest.approx(4 / 8), pytest.approx(1 / 2))
    assert acceptance_per_depth([(3, 0, 0)], [(3,)]) == (0.0, None)
    assert acceptance_per_depth([(), ()], [(), ()]) == ()


def test_what_was_not_measured_is_null() -> None:
    samples = (sample(STOCK, "a", 1, 2.0), sample(OURS, "a", 1, 1.0))
    stock, ours = (one.as_json() for one in summarise([STOCK, OURS], samples))
    inside = ["vision_s", "target_prefill_s", "draft_prefill_s", "draft_s", "verify_s", "commit_s", "host_s"]
    assert [name for name, value in stock["stages"].items() if value is None] == inside
    assert [name for name, value in ours["stages"].items() if value is None] == ["prefill_s", "steps_s"]
    row = samples[0].as_row()
    assert [name for name in row if name in stock["stages"] and row[name] is None] == inside
    _, failed = (one.as_json() for one in summarise([STOCK, OURS], samples, {OURS: "out of memory"}))
    assert set(failed["stages"].values()) == {None}
    told = {name: value for name, value in failed.items() if value not in (None, 0, "", [])}
    assert " ".join(told) == "label method pruner prune_ratio tree batch_size exact error stages"


def test_methods_with_a_draft_run_both_ways_where_both_are_asked_for() -> None:
    grid = Grid(methods=("stock", "plain", "sd", "specvlm"), trees=("chain",), batch_sizes=(1, 4))
    both = replace(grid, exact=(True, False)).all()
    assert [one.label for one in both[:6]] == [
        "stock",
        "plain",
        "sd chain",
        "sd chain no-exact",
        "specvlm 0.9 chain",
        "specvlm 0.9 chain no-exact",
    ]
    assert [one for one in both if one.exact] == grid.all()
    without = replace(grid, exact=(False,)).all()
    assert [one.method for one in without if one.exact] == ["stock", "stock"]
    assert len(without) == len(grid.all())


def test_the_share_of_settled_tokens_is_over_all_tokens() -> None:
    samples = [
        sample(STOCK, "a", 1, 2.0),
        replace(sample(OURS, "a", 1, 1.0), settled_tokens=1),
        replace(sample(OURS, "b", 1, 1.0), settled_tokens=0),
    ]
    stock, ours = summarise([STOCK, OURS], samples)
    assert stock.settled_share is None
    assert ours.settled_share == pytest.approx(1 / ours.completion_tokens)


def test_everything_becomes_plain_json() -> None:
    samples = (sample(STOCK, "a", 1, 2.0), sample(OURS, "a", 1, 1.0))
    captioner = tiny_captioner("qwen", Size(), None)
    from specvlm.bench.measure import conditions

    report = BenchReport(conditions(captioner, ASKED, ("a",)), summarise([STOCK, OURS], samples), samples)
    told = json.loads(json.dumps(report.as_json(samples=True), allow_nan=False))
    assert told["schema"] == 1
    assert told["summaries"][1]["label"] == "specvlm 0.9 static"
    assert told["summaries"][1]["speedups"][0]["baseline"] == "stock"
    assert told["samples"][0]["method"] == "stock"
    assert told["conditions"]["peak_memory_of"] == "process"
    assert told["process_peak_bytes"] == 7
    assert [one["peak_memory_bytes"] for one in told["summaries"]] == [None, None], "a process has one peak"
    on_device = replace(report, conditions=replace(report.conditions, peak_memory_of="device")).as_json()
    assert on_device["process_peak_bytes"] is None
    assert [one["peak_memory_bytes"] for one in on_device["summaries"]] == [7, 7]


# The order


class FakeMeasurer:
    """Notes what it is asked for; `stock` takes two seconds, all else one. `stops`: after so many captions."""

    def __init__(self, fails: MethodName | None = None, at: int = 0, stops: int | None = None) -> None:
        self.asked: list[tuple[str, int, MethodName]] = []
        self._fails, self._at, self._stops = fails, at, stops

    def measure(self, how: Configuration, video: Any, name: str, turn: int) -> TimedCaption:
        if len(self.asked) == self._stops:
            raise KeyboardInterrupt
        self.asked.append((name, turn, how.method))
        if how.method == self._fails and turn == self._at:
            raise MethodError("it cannot")
        return sample(how, name, turn, 2.0 if how.method == "stock" else 1.0)


def run(
    measurer: FakeMeasurer,
    clips: tuple[str, ...] = ("a", "b"),
    bad: tuple[str, ...] = (),
    budget: Budget | None = None,
    repeat: int = 2,
) -> tuple[Any, Heard]:
    """Run a suite of three methods."""
    heard = Heard()
    return suite_of(measurer, clips, bad, budget, repeat, heard).run(), heard


def suite_of(
    measurer: FakeMeasurer,
    clips: tuple[str, ...],
    bad: tuple[str, ...] = (),
    budget: Budget | None = None,
    repeat: int = 2,
    heard: Heard | None = None,
) -> Suite:
    def prepare(clip: Clip, num_frames: int | None) -> Any:
        if clip.name in bad:
            raise NotAVideoError(clip.name, "it is text")
        return None

    return Suite(
        Grid(("stock", "plain", "specvlm")),
        [Clip(name, name) for name in clips],
        repeat,
        prepare,
        measurer,
        heard or Heard(),
        budget or Budget(None),
    )


def test_methods_alternate_and_each_turn_begins_with_another_one() -> None:
    measurer = FakeMeasurer()
    found, heard = run(measurer)
    of_a = [(turn, method) for name, turn, method in measurer.asked if name == "a"]
    assert of_a == [
        *((0, "stock"), (0, "plain"), (0, "specvlm")),
        *((1, "plain"), (1, "specvlm"), (1, "stock")),
        *((2, "specvlm"), (2, "stock"), (2, "plain")),
    ]
    assert [name for name, _, _ in measurer.asked] == ["a"] * 9 + ["b"] * 9, "one video in memory at a time"
    assert {one.turn for one in found.samples} == {1, 2}, "the warm-up is not kept"
    assert len(found.samples) == 12
    assert [step.done for step in heard.steps] == list(range(18))
    assert {step.total for step in heard.steps} == {18}


def test_the_order_is_a_rotation() -> None:
    configurations = [STOCK, PLAIN, OURS]
    orders = [rotated(configurations, turn) for turn in range(4)]
    assert orders[0] == orders[3] == configurations
    assert orders[1] == [PLAIN, OURS, STOCK]
    assert rotated([], 3) == []


def test_a_method_that_fails_is_left_out_from_there_on_and_told_once() -> None:
    measurer = FakeMeasurer(fails="plain", at=1)
    found, heard = run(measurer)
    assert heard.failures == [("plain", "it cannot")]
    assert [turn for _, turn, method in measurer.asked if method == "plain"] == [0, 1]
    assert sum(one.configuration.method == "stock" for one in found.samples) == 4
    assert found.errors == {Configuration("plain"): "it cannot"}
    dones, totals = [step.done for step in heard.steps], [step.total for step in heard.steps]
    assert dones == [*range(4), *range(3, 13)], "what is not made is neither announced nor counted"
    assert totals == [18] * 4 + [13] * 10, "nor waited for"


def test_a_video_that_cannot_be_read_is_left_out_with_its_reason() -> None:
    measurer = FakeMeasurer()
    found, heard = run(measurer, ("bad", "good"), bad=("bad",))
    assert {name for name, _, _ in measurer.asked} == {"good"}
    assert [one.video for one in heard.left] == ["bad"]
    assert "it is text" in heard.left[0].reason
    assert list(found.left_out) == ["bad"]
    assert heard.steps[0].done == 9, "its captions count as done"


@pytest.mark.parametrize(("stops", "kept"), [(5, []), (6, [1]), (8, [1]), (9, [1, 2])])
def test_of_an_interrupted_bench_whole_turns_are_kept(stops: int, kept: list[int]) -> None:
    grid = Grid(("stock", "plain", "specvlm"))
    suite = suite_of(FakeMeasurer(stops=stops), ("a", "b"))

    def report(found: Measurements) -> BenchReport:
        return BenchReport(
            CONDITIONS, summarise(grid.all(), found.samples, found.errors), tuple(found.samples)
        )

    with pytest.raises(StoppedError) as caught:
        reported(suite, grid, report)
    found = caught.value.report
    assert found.stopped
    assert [one.turn for one in found.samples if one.configuration.method == "stock"] == kept
    assert len(found.samples) == 3 * len(kept)
    assert [one.error is None for one in found.summaries] == 3 * [bool(kept)]
    if kept:
        turns = "1 whole turn" if len(kept) == 1 else "2 whole turns"
        assert stopped_words(found) == f"stopped early: kept {turns} of 1 video"


def test_frames_that_no_turn_had_are_not_measured() -> None:
    grid = Grid(("stock", "plain"), (4, 8))
    few, many = grid.configurations(4), grid.configurations(8)
    samples = [sample(how, "a", 1, 1.0) for how in (*few, many[0])]
    found = whole_turns(Measurements(samples, {}, {}), grid.all())
    assert [one.configuration for one in found.samples] == few
    assert found.errors == dict.fromkeys(many, "not measured, it was stopped before")


@pytest.mark.parametrize(
    ("asked", "read", "multiple", "words"),
    [
        (7, 6.0, 2, "7 frames asked, 6 read: this model takes multiples of 2"),
        (7, 5.5, 2, "7 frames asked, 5.5 read: videos have no more"),
        (64, 12.5, 1, "64 frames asked, 12.5 read: videos have no more"),
        (1, 2.0, 2, "1 frame asked, 2 read: this model takes multiples of 2"),
        (6, 6.0, 2, ""),
    ],
)
def test_other_frames_than_asked_for_are_told(asked: int, read: float, multiple: int, words: str) -> None:
    assert frames_note(asked, read, multiple) == words


def test_frames_are_those_that_were_read() -> None:
    hows = [replace(how, frames_asked=7) for how in (STOCK, PLAIN)]
    samples = [sample(hows[0], "a", 1, 2.0, num_frames=6)]
    summaries = summarise(hows, samples, {hows[1]: "out of memory"})
    assert [frames_of(one) for one in summaries] == ["6", "6"], "of what failed, those of the others"
    report = BenchReport(replace(CONDITIONS, frame_multiple=2), summaries, tuple(samples))
    assert frames_notes(report) == ["7 frames asked, 6 read: this model takes multiples of 2"]
    assert frames_notes(BenchReport(CONDITIONS, (), ())) == []


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"), (0.0000806, "<0.1 %"), (0.00466, "0.5 %"), (0.87, "87.0 %"), (0.9999, ">99.9 %"),
        (1.0, "100 %"), (None, ""),
    ],
)  # fmt: skip
def test_shares_have_one_decimal(share: float | None, words: str) -> None:
    assert percent(share) == words


def test_depths_stand_below_each_other_and_say_when_they_are_cut() -> None:
    few = Summary(OURS, acceptance_per_depth=(1.0, None, 0.5))
    many = Summary(OURS, acceptance_per_depth=(0.25,) * 9)
    assert depths(few) == "1.00    - 0.50"
    assert depths(many) == " ".join(["0.25"] * 8) + " …"
    assert depths(Summary(OURS, acceptance_per_depth=(0.25,) * 8)) == " ".join(["0.25"] * 8)


def test_a_spent_budget_begins_no_further_video_but_always_one() -> None:
    clock = itertools.count(0.0, 10.0).__next__
    measurer = FakeMeasurer()
    found, _ = run(measurer, ("a", "b", "c"), budget=Budget(15.0, clock))
    assert {one.video for one in found.samples} == {"a", "b"}
    found, _ = run(FakeMeasurer(), ("a", "b"), budget=Budget(-1.0))
    assert {one.video for one in found.samples} == {"a"}


# Each method, on tiny random models


def ticking() -> Callable[[], float]:
    """A clock that moves on by a second whenever it is asked."""
    return itertools.count(0.0, 1.0).__next__


def prepared(captioner: Captioner) -> PreparedVideo:
    return captioner.prepare(random_frames(3, 4), "What is it?")


def attentions(captioner: Captioner) -> list[str]:
    config = captioner.target.model.config
    return [config._attn_implementation, config.text_config._attn_implementation]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_give_stock_tokens_and_their_stages_add_up(family: FamilyName) -> None:
    captioner = tiny_captioner(family, Size(), Size(layers=1, seed=1))
    video, measurer = prepared(captioner), Measurer(captioner, 12)
    expected = stock_ids(captioner.target.model, video.inputs.tensors, 12)
    for how in Grid(trees=("chain",)).configurations(None):
        one = measurer.measure(how, video, "noise", 1)
        assert one.token_ids == expected, how.label
        assert sum(astuple(one.stages)) == pytest.approx(one.total_s)
        assert 0.0 < one.decode_s < one.total_s
        has_rounds = how.method in ("sd", "specvlm")
        assert (one.num_drafts > 0) == has_rounds == bool(one.acceptance_histogram)
        assert (one.stages.steps_s > 0.0) == (how.method in ("stock", "assisted"))
        assert one.decode_tokens == 11 or how.method == "assisted"
    assert attentions(captioner) == ["sdpa", "specvlm"], "this library's attention is back in its place"


def test_stock_runs_on_sdpa_and_its_clock_starts_at_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = tiny_captioner("qwen", Size(), None)
    model, seen = captioner.target.model, []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: seen.append(attentions(captioner)) or generate(**given)
    )
    one = Measurer(captioner, 6, ticking()).measure(STOCK, prepared(captioner), "noise", 1)
    assert seen == [["sdpa", "sdpa"]]
    # Asked at the begin, as generate() begins, at the first token, as generate() ends and at the end of the text.
    assert (one.stages.prefill_s, one.stages.steps_s, one.stages.rest_s) == (1.0, 1.0, 2.0)
    assert one.decode_s == 1.0
    assert one.decode_tokens == len(one.token_ids) - 1


def test_assisted_that_fails_says_its_own_error_and_puts_the_attention_back() -> None:
    captioner = tiny_captioner("qwen", Size(vocabulary=300), Size(layers=1, vocabulary=290, seed=1))
    with pytest.raises(MethodError, match="different tokenizers"):
        Measurer(captioner, 6).measure(Configuration("assisted"), prepared(captioner), "noise", 1)
    assert attentions(captioner) == ["sdpa", "specvlm"]


def test_a_caption_that_fails_is_the_methods_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = tiny_captioner("qwen", Size(), None)
    monkeypatch.setattr(captioner, "caption", raising(torch.OutOfMemoryError("no\nmemory")))
    with pytest.raises(MethodError, match=r"^no memory$"):
        Measurer(captioner, 6).measure(PLAIN, prepared(captioner), "noise", 1)


def raising(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


def test_a_whole_bench_on_frames() -> None:
    captioner = tiny_captioner("qwen", Size(), Size(layers=1, vocabulary=290, seed=1))
    grid = Grid(num_frames=(2, 4), prune_ratios=(0.0, 0.9), trees=("chain",))
    clips = [Clip(f"noise {seed}", random_frames(seed, 4)) for seed in range(2)]
    heard = Heard()
    report = bench(captioner, BenchSetup(grid, clips, None, ASKED), heard)
    assert [one.error is None for one in report.summaries] == [True, False, True, True, True, True] * 2
    assert [label for label, _ in heard.failures] == ["assisted", "assisted"], (
        "once for each number of frames"
    )
    ran = [one for one in report.summaries if one.error is None]
    assert {(one.videos, one.turns) for one in ran} == {(2, 2)}
    assert {one.num_frames for one in ran} == {2.0, 4.0}
    assert {one.exact_match for one in ran} == {None, 1.0}
    assert all(one.speedup("stock") is not None for one in ran if one.configuration.method != "stock")
    assert all(one.limit for one in ran)
    assert report.conditions.videos == ("noise 0", "noise 1")
    assert heard.steps[0].what == "noise 0, 2 frames, stock"
    assert heard.steps[-1].what.startswith("noise 1, 4 frames, ")
    pruned = [one for one in ran if one.configuration.prune_ratio == 0.9]
    assert all(one.video_tokens_kept < one.video_tokens / 2 for one in pruned)


def test_a_bench_without_a_draft_needs_methods_without_one() -> None:
    captioner = tiny_captioner("qwen", Size(), None)
    clips = [Clip("noise", random_frames(1, 4))]
    with pytest.raises(ConfigError, match="'assisted' needs a draft that is a small model"):
        bench(captioner, BenchSetup(Grid(), clips, None, ASKED), Heard())
    report = bench(captioner, BenchSetup(Grid(("stock", "plain")), clips, None, ASKED), Heard())
    assert [one.exact_match for one in report.summaries] == [None, 1.0]


def test_example_clips_are_the_files_of_the_checkout_or_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = example_clips()
    assert [clip.name for clip in here] == [example.name for example in EXAMPLES]
    assert {str(Path(str(clip.video)).parent) for clip in here} == {str(VIDEOS)}
    installed = tmp_path / "specvlm"
    (installed / "demo").mkdir(parents=True)
    shutil.copytree(VIDEOS, installed / "demo" / "videos")
    monkeypatch.setattr(specvlm, "__file__", str(installed / "__init__.py"))
    assert [clip.name for clip in example_clips()] == [clip.name for clip in here]
    assert all(Path(str(clip.video)).is_relative_to(installed) for clip in example_clips())
