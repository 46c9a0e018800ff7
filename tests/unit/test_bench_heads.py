"""Several drafts in one bench, trained heads among them: which methods they have, what rows and tables say of them."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from specvlm.bench.clips import Clip
from specvlm.bench.grid import Grid, GridDraft
from specvlm.bench.measure import BenchRequest, Measurer, MethodError, conditions
from specvlm.bench.page import page
from specvlm.bench.plots import plots
from specvlm.bench.records import BenchReport, Configuration, Stages, Summary, TimedCaption
from specvlm.bench.suite import BenchSetup, BenchStep, bench
from specvlm.bench.summing import limit, summarise
from specvlm.captioner import Captioner
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.errors import ConfigError
from tests.bench_reports import made
from tests.tiny import FamilyName, Size, random_frames, stock_ids, tiny_captioner
from tests.unit import test_bench

SMALL, OTHER = GridDraft("models/small"), GridDraft("hub/other")
HEAD = GridDraft("/work/my-head", is_head=True)
ASKED = BenchRequest("specvlm bench", "tiny", "tiny, my-head", "What is it?", 12, 1, "noise")
METHODS = ("stock", "assisted", "plain", "sd", "specvlm", "head")
PLAIN, OF_HEAD = Configuration("plain"), Configuration("head", tree="auto", draft="my-head")
POOL = CompressorConfig("single", ("pool",), ratio=4.0)


class Silent:
    """A listener that keeps failures."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def step(self, step: BenchStep) -> None:
        """Not kept."""

    def left_out(self, left: object) -> None:
        """Not kept."""

    def failed(self, how: Configuration, error: str) -> None:
        self.failures.append(f"{how.label}: {error}")


def headed(captioner: Captioner, compressor: CompressorConfig = POOL) -> Captioner:
    """The same target with an untrained head."""
    target = captioner.target
    config = HeadConfig("tiny", None, target.family.name, target.hidden_size, compressor=compressor)
    model = HeadModel.fresh(target, config, 0).eval().requires_grad_(False)
    return Captioner(target, captioner.processor, HeadDraft(model, target), captioner.info, captioner.frames)


# What is compared


def labels(*drafts: GridDraft, **more: Any) -> list[str]:
    return [one.label for one in Grid(METHODS, drafts=drafts, **more).configurations(None)]  # type: ignore[arg-type]


def test_a_head_has_a_method_for_each_tree_and_nothing_of_pruning() -> None:
    trees = {"trees": ("auto", "dynamic"), "prune_ratios": (0.5, 0.9), "pruners": ("specvlm", "uniform")}
    assert labels(HEAD, **trees) == ["stock", "plain", "head auto", "head dynamic"]
    assert labels(SMALL, HEAD, trees=("static",)) == [
        *("stock", "assisted", "plain", "sd static", "specvlm 0.9 static", "head static")
    ], "each is the only one of its kind"


def test_drafts_of_one_kind_are_told_apart_by_name() -> None:
    found = labels(SMALL, OTHER, trees=("static",))
    assert found == [
        *("stock", "assisted, small", "assisted, other", "plain", "sd static, small", "sd static, other"),
        *("specvlm 0.9 static, small", "specvlm 0.9 static, other"),
    ]
    alike = replace_name(HEAD, "/elsewhere/my-head")
    assert labels(HEAD, alike, trees=("chain",))[2:] == [
        *("head chain, /work/my-head", "head chain, /elsewhere/my-head"),
    ]
    drafts = {one.label: one.draft for one in Grid(METHODS, drafts=(SMALL, OTHER, HEAD)).all()}
    assert drafts["stock"] is drafts["plain"] is None
    assert (drafts["assisted, small"], drafts["head auto"]) == ("models/small", "/work/my-head")


def replace_name(draft: GridDraft, name: str) -> GridDraft:
    return draft._replace(name=name)


def test_a_method_needs_a_draft_of_its_kind_and_a_draft_may_be_used_by_none() -> None:
    assert Grid(METHODS, drafts=(SMALL,)).needs_draft == "head"
    assert Grid(METHODS, drafts=(HEAD,)).needs_draft == "assisted"
    assert Grid(METHODS, drafts=(HEAD, SMALL)).needs_draft is None
    assert Grid(("plain", "head"), drafts=(SMALL, HEAD)).used() == (HEAD,)
    assert Grid(("plain",), drafts=(SMALL, HEAD)).used() == ()
    assert Grid().needs_draft is None


# On tiny models


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_two_drafts_over_one_target_give_its_very_tokens(family: FamilyName) -> None:
    captioner = tiny_captioner(family, Size(), Size(layers=1, seed=1))
    others = {"my-head": headed(captioner)}
    grid = Grid(METHODS, trees=("chain", "dynamic"), drafts=(SMALL, GridDraft("my-head", is_head=True)))  # type: ignore[arg-type]
    report = bench(
        captioner, BenchSetup(grid, [Clip("noise", random_frames(3, 4))], None, ASKED), Silent(), others
    )
    video = captioner.prepare(random_frames(3, 4), "What is it?")
    expected = stock_ids(captioner.target.model, video.inputs.tensors, 12)
    assert {one.token_ids for one in report.samples} == {expected}
    assert {one.exact_match for one in report.summaries} == {None, 1.0}
    tokens = video.inputs.video_tokens
    for one in report.samples:
        assert sum(astuple(one.stages)) == pytest.approx(one.total_s)
        if one.configuration.method == "head":
            assert (one.configuration.draft, one.compressor) == ("my-head", "pool")
            assert one.video_tokens_kept == round(tokens / 4)
            assert one.num_drafts > 0
        else:
            assert one.compressor is None
            alone = one.configuration.method in ("stock", "plain")
            assert one.configuration.draft == (None if alone else "models/small")
    told = {one.configuration.label: one for one in report.summaries}
    assert told["head dynamic"].compressors == ("pool",)
    assert told["sd chain"].compressors == ()
    assert told["head chain"].limit


def test_a_head_captions_with_the_adaptive_tree_in_turn_with_a_small_model() -> None:
    captioner = tiny_captioner("qwen", Size(), Size(layers=1, seed=1))
    others = {"my-head": headed(captioner)}
    grid = Grid(
        ("plain", "specvlm", "head"), trees=("auto",), drafts=(SMALL, GridDraft("my-head", is_head=True))
    )
    asked = ASKED._replace(max_new_tokens=40, repeat=2)
    report = bench(
        captioner, BenchSetup(grid, [Clip("noise", random_frames(3, 4))], None, asked), Silent(), others
    )
    assert {one.exact_match for one in report.summaries} == {None, 1.0}
    head = report.summaries[-1]
    assert head.configuration.label == "head auto"
    assert head.error is None
    assert head.limit, "it may find that guessing does not pay here, and that is said too"
    assert {one.compressor for one in report.samples if one.configuration.method == "head"} <= {None, "pool"}


@pytest.mark.parametrize(
    ("compressor", "named", "kept"),
    [
        (CompressorConfig("none", ()), "none", 1.0),
        (CompressorConfig("single", ("text-only",)), "text-only", 0.0),
        (CompressorConfig("concat", ("prune", "resampler"), ratio=4.0), "prune+resampler", None),
    ],
)
def test_what_a_head_sees_is_in_the_sample(
    compressor: CompressorConfig, named: str, kept: float | None
) -> None:
    captioner = headed(tiny_captioner("qwen", Size(), None), compressor)
    video = captioner.prepare(random_frames(3, 4), "What is it?")
    one = Measurer(captioner, 8).measure(Configuration("head", tree="chain"), video, "noise", 1)
    assert one.compressor == named
    expected = round(one.video_tokens / 4) + 2 if kept is None else kept * one.video_tokens
    assert one.video_tokens_kept == expected


def test_a_draft_of_the_other_kind_is_refused() -> None:
    captioner = tiny_captioner("qwen", Size(), Size(layers=1, seed=1))
    clips = [Clip("noise", random_frames(1, 4))]
    with pytest.raises(ConfigError, match="'head' needs a draft that is a trained head"):
        bench(captioner, BenchSetup(Grid(("head",), drafts=(HEAD,)), clips, None, ASKED), Silent())
    with pytest.raises(ConfigError, match="'assisted' needs a draft that is a small model"):
        bench(headed(captioner), BenchSetup(Grid(), clips, None, ASKED), Silent())


def test_transformers_cannot_be_assisted_by_a_head() -> None:
    captioner = headed(tiny_captioner("qwen", Size(), None))
    video = captioner.prepare(random_frames(3, 4), "What is it?")
    with pytest.raises(MethodError, match="no draft that transformers could take"):
        Measurer(captioner, 6).measure(Configuration("assisted"), video, "noise", 1)


# Summing up


def sample(how: Configuration, decode_s: float, **more: Any) -> TimedCaption:
    """A caption of eleven tokens."""
    given: dict[str, Any] = {"video": "a", "turn": 1, "total_s": decode_s + 0.1, "video_tokens_kept": 20}
    return test_bench.sample(how, decode_s=decode_s, **(given | more))


def summed(how: Configuration, **stages: float) -> Summary:
    """Two rounds of 5 guesses in all, 8 tokens accepted, beside plain decoding at 0.1 s a token."""
    ours = sample(
        how, sum(stages.values()), stages=Stages(**stages), num_drafts=2, num_draft_tokens=10,
        num_accepted_tokens=8, acceptance_histogram=(0, 0, 0, 1, 0, 1),
    )  # fmt: skip
    return summarise([PLAIN, how], [sample(PLAIN, 1.0), ours])[1]


def test_reading_what_was_accepted_is_drafting_of_a_head_and_committing_of_a_small_model() -> None:
    times = {"draft_s": 0.02, "verify_s": 0.2, "commit_s": 0.6, "host_s": 0.02}
    head, small = summed(OF_HEAD, **times), summed(Configuration("sd", tree="auto"), **times)
    assert (head.draft_round_s, small.draft_round_s) == (pytest.approx(0.31), pytest.approx(0.01))
    assert head.predicted_decode_speedup == pytest.approx(5.0 * 0.1 / (0.31 + 0.1))
    assert head.limit.startswith("drafting costs 3.1 plain steps a round; if it were free, ")
    assert small.limit.startswith("all but drafting and verifying costs 3.1 plain steps a round")
    alone = [replace(one, plain_token_s=None, speedups=()) for one in (head, small)]
    assert [limit(one) for one in alone] == [
        "drafting takes 74 % of a round",
        "all but drafting and verifying takes 74 % of a round",
    ]


def test_the_commonest_compressor_comes_first() -> None:
    chosen = {"a": "pool", "b": "prune", "c": "prune"}
    samples = [sample(OF_HEAD, 1.0, video=video, compressor=name) for video, name in chosen.items()]
    (one,) = summarise([OF_HEAD], samples)
    assert one.compressors == ("prune", "pool")
    assert (samples[0].as_row()["compressor"], samples[0].as_row()["draft"]) == ("pool", "my-head")
    told = one.as_json()
    assert (told["label"], told["draft"], told["compressors"]) == ("head auto", "my-head", ["prune", "pool"])
    assert "draft_label" not in told
    assert "draft_label" not in samples[0].as_row()


# What is shown


def test_the_page_and_the_plots_name_drafts() -> None:
    grid = Grid(METHODS, prune_ratios=(0.0, 0.5, 0.9), trees=("static",), drafts=(SMALL, OTHER, HEAD))  # type: ignore[arg-type]
    report = made(grid)
    report = replace(
        report,
        summaries=tuple(
            replace(one, compressors=("pool",)) if one.configuration.method == "head" else one
            for one in report.summaries
        ),
    )
    shown = page(report)
    for label in ("head static", "specvlm 0.9 static, small", "specvlm 0.9 static, other", "assisted, small"):
        assert f'<th scope="row">{label}</th>' in shown
    assert "compressor</th>" in shown
    assert "<td>pool</td>" in shown
    (ratio,) = [one for one in plots(report) if one.name == "ratio"]
    assert {f"pruner specvlm, tree static, {name}" in ratio.svg for name in ("small", "other")} == {True}


def test_names_from_outside_cannot_do_harm() -> None:
    """Control characters, markup, formulas that are none, and a name that no terminal or file takes."""
    names = ("/work/a\x1b[31m<b>\u202e", "/work/costs $5 & $x_{", "/work/\ud800")
    grid = Grid(
        ("stock", "head"), trees=("auto",), drafts=tuple(GridDraft(name, is_head=True) for name in names)
    )
    found = [one.label for one in grid.all()]
    assert found == [
        "stock",
        "head auto, a\ufffd[31m<b>\ufffd",
        "head auto, costs $5 & $x_{",
        "head auto, \ufffd",
    ]
    report = made(grid)
    shown = page(report)
    shown.encode()
    assert "head auto, a\ufffd[31m&lt;b&gt;\ufffd" in shown
    (speedups,) = [one for one in plots(report) if one.name == "speedup"]
    assert "head auto, costs $5 &amp; $x_{" in speedups.svg


def test_conditions_name_all_drafts(tmp_path: Path) -> None:
    captioner = tiny_captioner("qwen", Size(), None)
    report = BenchReport(conditions(captioner, ASKED, ("a",)), summarise([PLAIN], [sample(PLAIN, 1.0)]), ())
    assert json.loads(json.dumps(report.as_json()))["conditions"]["draft"] == "tiny, my-head"
