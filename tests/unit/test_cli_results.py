"""Figures of a run, and the plain baseline they come from."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specvlm.records import Caption
from specvlm_cli.caption import baseline
from specvlm_cli.caption.outcome import (
    MOST_KINDS,
    OTHER_KINDS,
    Captioning,
    CaptionSpread,
    Figures,
    Outcome,
    PlainSpeedup,
    Quantiles,
    Running,
    Tally,
)
from specvlm_cli.caption.settings import config_hash, differences
from specvlm_cli.exits import ExitCode
from tests.cli.fake import stats
from tests.cli.saying import compared, failure, row


def caption(*, plain: bool, tokens: int = 13, ids: tuple[int, ...] = (1, 2)) -> Caption:
    return Caption("text", ids, "stop", stats(plain=plain, tokens=tokens))


def test_nothing_counted_has_no_figures() -> None:
    assert Tally().figures() == Figures()


def test_acceptance_is_of_all_rounds_and_leaves_out_the_bonus() -> None:
    tally = Tally()
    tally.add(row(num_drafts=1, num_accepted_tokens=4))
    tally.add(row(num_drafts=3, num_accepted_tokens=4))
    figures = tally.figures()
    assert (figures.mean_accepted_tokens, figures.mean_acceptance_length) == (2.0, 3.0)
    assert figures.decode is None


def speedup(of_totals: float, *of_captions: float, batch_size: float | None = 4.0) -> PlainSpeedup:
    """Return what is expected of these speedups of single captions."""
    half, low, high = np.quantile(of_captions, [0.5, 0.1, 0.9])
    near = (pytest.approx(float(one)) for one in (half, low, high, of_totals))
    return PlainSpeedup(len(of_captions), *near, mean_batch_size=pytest.approx(batch_size))


def test_speedups_are_of_totals_and_of_single_captions() -> None:
    tally = Tally()
    for decode_s, ratio in [(1.0, 1.0), (1.0, 2.0), (8.0, 4.0)]:
        tally.add(compared(ratio, ratio / 2, decode_s=decode_s, total_s=2 * decode_s))
    figures = tally.figures()
    assert figures.decode == speedup(3.5, 1.0, 2.0, 4.0)
    assert figures.end_to_end == speedup(1.75, 0.5, 1.0, 2.0)
    assert (figures.compared, figures.identical) == (3, 3)
    assert tally.running() == Running(3.0, figures.decode, figures.end_to_end)


def test_an_estimate_is_a_range_that_holds_the_ratio_of_totals() -> None:
    assert PlainSpeedup(3, 2.0, 1.2, 3.6, of_totals=2.5).between == (1.2, 3.6)
    assert PlainSpeedup(3, 2.0, 1.2, 3.6, of_totals=3.9).between == (1.2, 3.9)
    assert PlainSpeedup(3, 2.0, 1.2, 3.6, of_totals=1.1).between == (1.1, 3.6)


def test_the_mean_batch_size_is_over_the_time_of_the_rounds() -> None:
    tally = Tally()
    for _ in range(4):  # four captions share steps of 8 s; one has 2 s alone
        tally.add(compared(decode_s=2.0, mean_batch_size=4.0))
    tally.add(row(decode_s=2.0, mean_batch_size=1.0))
    tally.add(row(decode_s=90.0, mean_batch_size=None))  # as a version that knew no batches wrote it
    old = row()
    del old["mean_batch_size"]
    tally.add(old)
    figures = tally.figures()
    assert figures.mean_batch_size == pytest.approx((8.0 * 4.0 + 2.0 * 1.0) / 10.0)
    assert figures.decode is not None
    assert figures.decode.mean_batch_size == 4.0


def test_what_was_not_measured_is_not_said() -> None:
    tally = Tally()
    tally.add(row())
    assert tally.running() == Running(accepted=3.0)
    tally.add(compared(decode_speedup=None, exact_match=False))
    figures = tally.figures()
    assert figures.decode is None
    assert figures.end_to_end is not None
    assert figures.estimate_over_measured is None
    assert (figures.compared, figures.identical) == (1, 0)


def test_estimated_speedups_stay_apart_from_measured_ones() -> None:
    tally = Tally()
    tally.add(compared(3.0, 2.5, speedup_source="estimated", exact_match=None))
    assert tally.running().estimated
    assert (tally.figures().decode, tally.figures().compared) == (None, 0)
    tally.add(compared(2.0, 1.5))
    assert tally.running() == Running(3.0, speedup(2.0, 2.0), speedup(1.5, 1.5))
    figures = tally.figures()
    assert (figures.decode, figures.compared) == (speedup(2.0, 2.0), 1)
    assert figures.decode_estimated == speedup(3.0, 3.0)
    assert figures.end_to_end_estimated == speedup(2.5, 2.5)


def test_estimates_are_held_against_what_was_measured() -> None:
    tally = Tally()
    for estimated_s in (0.8, 1.0, 1.2):
        tally.add(compared(baseline_token_s=1.0, estimated_token_s=estimated_s))
    tally.add(compared(baseline_token_s=1.0))
    tally.add(row(speedup_source="estimated", baseline_token_s=1.0, estimated_token_s=9.0))
    expected = (pytest.approx(one) for one in (1.0, 0.84, 1.16))
    assert tally.figures().estimate_over_measured == CaptionSpread(3, *expected)


def test_stages_are_summed_as_the_rows_say() -> None:
    tally = Tally()
    for index, read_s in enumerate((0.5, 0.0, 0.0)):  # what prompts share stands in the first one's row
        tally.add(row(prompt_index=index, video_decode_s=read_s))
    stages = tally.figures().stages_s
    assert (stages["video_decode_s"], stages["preprocess_s"], stages["decode_s"]) == (0.5, 0.75, 6.0)
    assert tally.figures().tokens_per_s == pytest.approx(3 * 10 / 6.0)


def test_models_and_devices_are_named_once() -> None:
    tally = Tally()
    for device, draft in [("gpu 0", "small"), ("gpu 1", None), ("gpu 0", "small")]:
        tally.add(row(device=device, draft_model=draft))
    figures = tally.figures()
    assert (figures.targets, figures.drafts, figures.devices) == (
        ("fake/target",),
        ("small",),
        ("gpu 0", "gpu 1"),
    )


def test_failures_are_counted_by_kind() -> None:
    tally = Tally()
    for kind in ("A", "B", "B"):
        tally.fail(failure(kind=kind))
    assert list(tally.figures().failures_by_kind.items()) == [("decode:B", 2), ("decode:A", 1)]


def test_kinds_of_failures_are_bounded() -> None:
    tally = Tally()
    for number in range(MOST_KINDS + 50):
        tally.fail(failure(kind=f"{number}" + "x" * 10_000))
    kinds = tally.figures().failures_by_kind
    assert (len(kinds), kinds[OTHER_KINDS]) == (MOST_KINDS + 1, 50)
    assert max(map(len, kinds)) <= 100


def quantiles(values: list[float]) -> CaptionSpread:
    half, low, high = np.quantile(values, [0.5, 0.1, 0.9])
    return CaptionSpread(len(values), half, low, high)


def spread(values: list[float]) -> CaptionSpread:
    found = Quantiles()
    for value in values:
        found.add(value)
    result = found.spread()
    assert result is not None
    return result


def test_nothing_has_no_spread() -> None:
    assert Quantiles().spread() is None


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=50))
def test_the_quantiles_of_few_are_exact(values: list[float]) -> None:
    assert asdict(spread(values)) == pytest.approx(asdict(quantiles(values)))


@pytest.mark.parametrize("count", [Quantiles.EXACT, Quantiles.EXACT + 1, 20_000])
def test_the_quantiles_of_many_are_within_a_thousandth(count: int) -> None:
    source = random.Random(count)
    values = [source.lognormvariate(0.7, 0.5) for _ in range(count)]
    assert asdict(spread(values)) == pytest.approx(asdict(quantiles(values)), rel=0.001)


def test_quantiles_take_no_more_memory_for_more_numbers() -> None:
    found = Quantiles()
    for exponent in range(-40_000, 40_000):
        found.add(2.0 ** (exponent / 40))
    found.add(0.0)
    assert sys.getsizeof(found._steps) < 1_000_000
    assert found._kept == []
    result = found.spread()
    assert result is not None
    assert result.median == pytest.approx(1.0, rel=0.02)


def test_decode_speedup_is_per_token() -> None:
    same = baseline.compare(caption(plain=False), caption(plain=True))
    assert (same.decode_speedup, same.exact_match) == (pytest.approx(3.0), True)
    longer = baseline.compare(caption(plain=False), caption(plain=True, tokens=25, ids=(1, 3)))
    assert (longer.decode_speedup, longer.exact_match) == (pytest.approx(1.5), False)
    single = baseline.compare(caption(plain=False, tokens=1), caption(plain=True, tokens=1))
    assert single.decode_speedup is single.baseline_token_s is None


def test_sample_grows_with_its_share() -> None:
    ids = [f"{number:040x}" for number in range(500)]
    small, large = ({one for one in ids if baseline.sampled(one, share)} for share in (0.1, 0.5))
    assert small < large
    assert 20 < len(small) < 90
    assert not any(baseline.sampled(one, 0.0) for one in ids)
    assert all(baseline.sampled(one, 1.0) for one in ids)


def test_differences_name_setting_and_values() -> None:
    found = differences({"a": 1, "b": "x"}, {"a": 1, "b": None, "c": 2})
    assert list(map(str, found)) == [
        'b was "x", is now null',
        "c was null, is now 2",
    ]
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


def outcome(**changes: Any) -> Outcome:
    return replace(Outcome(ExitCode.OK, "out", found=3, done=2, failed=1, pending=0), **changes)


def test_outcome_is_json() -> None:
    figures = Figures(captions=2, decode=PlainSpeedup(3, 2.1, 1.9, 2.3, of_totals=2.0, mean_batch_size=7.5))
    plain = json.loads(json.dumps(outcome(figures=figures).as_json()))
    assert (plain["schema"], plain["exit_code"]) == (1, 0)
    assert plain["figures"]["captions"] == 2
    assert plain["figures"]["decode"] == {
        "captions": 3,
        "median": 2.1,
        "p10": 1.9,
        "p90": 2.3,
        "of_totals": 2.0,
        "mean_batch_size": 7.5,
    }


def test_throughput_is_of_the_wall_time_of_captioning() -> None:
    tally = Tally()
    for index in (0, 1):  # two prompts of one video
        tally.add(row(prompt_index=index))
    tally.add(row())
    ended = outcome(figures=tally.figures(), captioning=Captioning(10.0, 4, 2.0), wall_s=99.0)
    assert (ended.videos_per_hour, ended.caption_tokens_per_s) == (720.0, pytest.approx(3.3))
    plain = ended.as_json()
    assert (plain["videos_per_hour"], plain["caption_tokens_per_s"]) == (720.0, pytest.approx(3.3))
    assert (plain["captioning_s"], plain["workers"], plain["waited_s"]) == (10.0, 4, 2.0)
    assert plain["waited_share"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "ended",
    [
        outcome(),
        outcome(captioning=Captioning()),
        outcome(figures=Figures(), captioning=Captioning()),
        outcome(figures=Figures(captions=1, videos=1, completion_tokens=9)),
    ],
)
def test_there_is_no_throughput_without_captions_or_without_time(ended: Outcome) -> None:
    plain = ended.as_json()
    assert (plain["videos_per_hour"], plain["caption_tokens_per_s"]) == (None, None)
    assert plain["waited_share"] is None


def test_no_more_than_all_of_the_time_was_waited() -> None:
    assert Captioning(10.0, 2, 25.0).waited_share == 1.0
