"""Figures of a run, and the plain baseline they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from specvlm.records import Caption
from specvlm_cli import baseline
from specvlm_cli.exits import ExitCode
from specvlm_cli.results import Figures, Outcome, Tally
from specvlm_cli.settings import config_hash, differences
from specvlm_cli.talk import Meter, counted, duration, ending
from tests.cli.fake import stats


def caption(*, plain: bool, tokens: int = 13, ids: tuple[int, ...] = (1, 2)) -> Caption:
    return Caption("text", ids, "stop", stats(plain=plain, tokens=tokens))


def row(**changes: Any) -> dict[str, Any]:
    base = {"completion_tokens": 10, "num_drafts": 2, "num_accepted_tokens": 6, "speedup_source": None}
    return base | changes


def measured(decode_s: float, speedup: float) -> dict[str, Any]:
    return row(
        speedup_source="measured",
        exact_match=True,
        decode_s=decode_s,
        decode_speedup=speedup,
        total_s=2 * decode_s,
        e2e_speedup=speedup / 2,
    )


def test_nothing_counted_has_no_figures() -> None:
    assert Tally().figures() == Figures()


def test_acceptance_is_of_all_rounds_and_leaves_out_the_bonus() -> None:
    tally = Tally()
    tally.add(row(num_drafts=1, num_accepted_tokens=4))
    tally.add(row(num_drafts=3, num_accepted_tokens=4))
    figures = tally.figures()
    assert (figures.mean_accepted_tokens, figures.mean_acceptance_length) == (2.0, 3.0)
    assert figures.decode is None


def test_speedups_are_of_totals_and_median() -> None:
    tally = Tally()
    for decode_s, speedup in [(1.0, 1.0), (1.0, 2.0), (8.0, 4.0)]:
        tally.add(measured(decode_s, speedup))
    decode = tally.figures().decode
    assert decode is not None
    assert (decode.of_totals, decode.median) == (pytest.approx(3.5), 2.0)
    assert tally.figures().compared == tally.figures().identical == 3


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
    assert differences({"a": 1, "b": "x"}, {"a": 1, "b": None, "c": 2}) == [
        'b was "x", is now null',
        "c was null, is now 2",
    ]
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})


def outcome(**changes: Any) -> Outcome:
    return replace(Outcome(ExitCode.OK, "out", found=3, done=2, failed=1, pending=0), **changes)


def test_outcome_is_json() -> None:
    plain = json.loads(json.dumps(outcome(figures=Figures(captions=2)).as_json()))
    assert plain["schema"] == 1
    assert plain["figures"]["captions"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "nothing to do: 2 done, 1 failed, 0 to do in out; --retry-failed tries"),
        ({"found": 0}, "no videos found"),
        ({"figures": Figures(), "wall_s": 61.0}, "in out, 1 min 01 s"),
        ({"figures": Figures(), "stopped": "SIGTERM"}, "stopped by SIGTERM: 2 done"),
    ],
)
def test_one_line_says_how_it_ended(changes: dict[str, Any], words: str) -> None:
    assert words in ending(outcome(**changes))


def test_progress_line_counts_and_measures() -> None:
    meter = Meter(10)
    assert meter.line() == "0/10 · 0 failed"
    meter.tally.add(measured(1.0, 2.0))
    meter.failed = 1
    assert meter.line().startswith("2/10 · 1 failed · ")
    assert meter.line().endswith("left · decode 2.00x")


def test_times_and_counts_read_well() -> None:
    assert [duration(one) for one in (3.4, 75, 3700)] == ["3 s", "1 min 15 s", "1 h 01 min"]
    assert (counted(1, "video"), counted(2, "video")) == ("1 video", "2 videos")
