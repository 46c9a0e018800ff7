"""What makes a choice unsettled is measured, what is not settled is decided by plain steps, and it pays or stops."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specvlm.batch import CaptionBatch, FinishedCaption
from specvlm.captioner import Captioner
from specvlm.choosing import Batch, FixedTree
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.errors import ConfigError
from specvlm.model import TextModel, VideoLM
from specvlm.sampling import TokenRule, logits_rules
from specvlm.settling import (
    FEWEST_DECIDED,
    FIRST_SPELL,
    LONGEST_SPELL,
    SAFETY,
    STEPS,
    WINDOW,
    Settling,
    Worth,
)
from specvlm.tree import ROOT, TreeShape, make_shape
from tests.tiny import Size, caption_rows, random_frames, stock_ids, tiny_captioner

TOKENS = 40


def captioner_of(seed: int = 3, spread: float = 0.3) -> Captioner:
    captioner = tiny_captioner(
        "qwen", Size(seed=seed, spread=spread, vocabulary=300), Size(seed=seed, spread=spread, vocabulary=300)
    )
    captioner.generation_config.eos_token_id = [299]
    return captioner


def spoil(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Have passes over several tokens give other hidden states, the same ones for the same states."""
    real = TextModel.run_nodes

    def run(self: TextModel, embeds: torch.Tensor, *arguments: Any) -> torch.Tensor:
        hidden = real(self, embeds, *arguments)
        if hidden.shape[0] * hidden.shape[1] == 1:
            return hidden
        return hidden + size * torch.sin(1000.0 * hidden)

    monkeypatch.setattr(TextModel, "run_nodes", run)


# --- how much passes change ---


def test_the_bound_is_what_was_measured_and_a_margin_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    for size in (0.0, 0.01, 0.1):
        captioner = captioner_of()
        with monkeypatch.context() as patch:
            spoil(patch, size)
            captioner.caption(random_frames(1), "Describe.", tree="chain", max_new_tokens=2)
        assert captioner.settling is not None
        assert captioner.settling.bound is not None
        found.append(captioner.settling.bound)
    assert 0.0 < found[0] < 1e-3 < found[1] < found[2]


def test_a_larger_change_that_is_seen_later_counts() -> None:
    captioner = captioner_of()
    settling = captioner.settling
    assert settling is not None
    settling.hear(7.0)
    assert settling.bound is None  # not before it was measured
    captioner.caption(random_frames(1), "Describe.", tree="chain", max_new_tokens=2)
    settling.hear(7.0)
    settling.hear(1.0)
    assert settling.bound == 7.0


def test_a_token_that_was_decided_tells_how_much_its_lead_had_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every one of them, and never by nothing, since a change was put into every round."""
    heard: list[float] = []
    monkeypatch.setattr(Settling, "hear", lambda self, change: heard.append(change))
    spoil(monkeypatch, 0.03)
    settled = 0
    for seed in range(4):
        captioner = captioner_of(seed, spread=0.15)
        caption = captioner.caption(random_frames(seed), "Describe.", tree="static", max_new_tokens=TOKENS)
        settled += caption.stats.settled_tokens
        assert captioner.settling is not None
        assert captioner.settling.bound is not None
        assert max(heard, default=0.0) < 2 * captioner.settling.bound
    assert len(heard) == settled > 0
    assert min(heard) > 0.0


def test_it_is_measured_once_and_not_where_nothing_is_unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner, steps = captioner_of(), list[int]()
    real = VideoLM.step

    def step(self: VideoLM, token: int, *more: Any) -> torch.Tensor:
        steps.append(token)
        return real(self, token, *more)

    monkeypatch.setattr(VideoLM, "step", step)
    video = captioner.prepare(random_frames(1), "Describe.")
    captioner.caption(video, speculate=False, max_new_tokens=9)
    captioner.caption(video, tree="chain", exact=False, max_new_tokens=9)
    assert steps == []
    for _ in range(2):
        captioner.caption(video, tree="chain", max_new_tokens=9)
    assert len(steps) == STEPS
    assert SAFETY > 1.0


def test_a_caption_that_has_ended_is_not_measured() -> None:
    captioner = captioner_of()
    captioner.caption(random_frames(1), "Describe.", tree="chain", max_new_tokens=1)
    assert captioner.settling is not None
    assert captioner.settling.bound is None


def test_no_more_is_measured_than_a_sliding_window_holds() -> None:
    captioner = captioner_of()
    video = captioner.prepare(random_frames(1), "Describe.")
    options: dict[str, Any] = {"tree": "chain", "depth": 3, "max_new_tokens": 8}
    expected = captioner_of().caption(video, **options)
    captioner.target._window = video.inputs.prompt_tokens + 12  # the caption, and the nodes of a round
    assert captioner.caption(video, **options).token_ids == expected.token_ids
    assert captioner.settling is not None
    assert captioner.settling.bound is not None


@pytest.mark.parametrize(("value", "number"), [(math.nan, 1), (math.inf, 1), (math.nan, 20)])
def test_only_what_comes_before_logits_that_are_not_finite_is_measured(
    value: float, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_of()
    video = captioner.prepare(random_frames(1), "Describe.")
    options: dict[str, Any] = {"tree": "chain", "max_new_tokens": 9}
    plain = captioner.caption(video, speculate=False, max_new_tokens=9)
    real = VideoLM.step
    steps: list[int] = []

    def step(self: VideoLM, token: int, *more: Any) -> torch.Tensor:
        hidden = real(self, token, *more)
        steps.append(token)
        return torch.full_like(hidden, value) if len(steps) == number else hidden

    monkeypatch.setattr(VideoLM, "step", step)
    assert captioner.caption(video, **options).token_ids == plain.token_ids
    assert captioner.settling is not None
    assert (captioner.settling.bound is None) == (number == 1)
    assert captioner.caption(video, **options).token_ids == plain.token_ids
    assert captioner.settling.bound is not None
    assert 0.0 < captioner.settling.bound < 1e-3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_without_memory_to_measure_nothing_is_settled(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_of()
    video = captioner.prepare(random_frames(1), "Describe.")
    stock = stock_ids(captioner.target.model, video.inputs.tensors, TOKENS)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Settling, "measure", fail)
        caption = captioner.caption(video, tree="chain", max_new_tokens=TOKENS)
    assert caption.token_ids == stock
    assert caption.stats.num_accepted_tokens == 0
    again = captioner.caption(video, tree="static", max_new_tokens=TOKENS)
    assert again.token_ids == stock
    assert again.stats.num_accepted_tokens > 0


# --- what is not settled ---


def test_changed_logits_flip_choices_and_exact_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with a change put in: as it comes some captions differ, with `exact` none does."""
    spoil(monkeypatch, 0.03)
    differ = settled = 0
    for seed in range(6):
        captioner = captioner_of(seed, spread=0.15)
        videos = [captioner.prepare(random_frames(seed + n), "Describe.") for n in range(3)]
        stock = [stock_ids(captioner.target.model, video.inputs.tensors, TOKENS) for video in videos]
        for how in ({"tree": "static"}, {"tree": "chain", "depth": 4}, {"speculate": False}):
            options: dict[str, Any] = {**how, "max_new_tokens": TOKENS}
            rows = caption_rows(captioner, videos, **options)
            assert [row.token_ids for row in rows] == stock
            alone = captioner.caption(videos[0], **options)
            assert alone.token_ids == stock[0]
            settled += sum(row.stats.settled_tokens for row in (*rows, alone))
            loose = caption_rows(captioner, videos, exact=False, **options)
            differ += sum(row.token_ids != expected for row, expected in zip(loose, stock, strict=True))
            assert {row.stats.settled_tokens for row in loose} == {0}
            assert {row.stats.smallest_margin for row in loose} == {None}
    assert differ > 5
    assert settled > differ


class Guesses(FixedTree):
    """A chain for some rounds, in which all choices are settled; then plain steps, in which none is."""

    def __init__(self, settling: Settling, rounds: int) -> None:
        super().__init__(make_shape(SpeculationSettings(tree="chain", depth=3), 300, torch.device("cpu")))
        self._settling, self._left = settling, rounds

    def choose(self, batch: Batch) -> TreeShape:
        self._left -= 1
        self._settling.bound = 0.0 if self._left >= 0 else 1e9
        return self._shape if self._left >= 0 else ROOT


def test_a_plain_step_after_rounds_is_not_one_of_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads keys and values that rounds have written, so its choice may not be stock's."""
    for rounds, settled in ((0, 0), (1, 1), (3, 1)):
        captioner = captioner_of()
        assert captioner.settling is not None
        chooser = Guesses(captioner.settling, rounds)
        monkeypatch.setattr(captioner, "chooser", lambda *_, chooser=chooser: chooser)
        found = captioner.caption(random_frames(1), "Describe.", max_new_tokens=TOKENS).stats
        assert found.num_drafts == rounds
        assert found.settled_tokens == settled


def test_the_last_caption_of_a_batch_is_not_taken_for_one_alone() -> None:
    captioner = captioner_of()
    videos = [captioner.prepare(random_frames(n), "Describe.") for n in range(2)]
    alone = [captioner.caption(video, speculate=False, max_new_tokens=TOKENS).token_ids for video in videos]
    end = next(token for token in alone[0][4:] if token not in alone[1])
    captioner.generation_config.eos_token_id = [299, end]
    settling = captioner.settling
    assert settling is not None
    settling.bound = 0.0
    batch = CaptionBatch(captioner, 2)
    for key, video in enumerate(videos):
        batch.add(key, video, captioner.kind(False, {"max_new_tokens": TOKENS}))
    found: list[FinishedCaption] = []
    while len(batch):
        found += batch.step()
        settling.bound = 1e9 if found else 0.0
    assert [one.caption.stats.settled_tokens for one in found if one.caption] == [0, 1]
    assert found[1].caption is not None
    assert found[1].caption.token_ids == alone[1]


def test_the_smallest_margin_is_that_of_a_token_of_the_caption() -> None:
    """Not of what a round would have written after the end; with top-k too, where plain steps settle everything."""
    for seed in range(4):
        captioner = captioner_of(seed)
        video = captioner.prepare(random_frames(seed), "Describe.")
        for sampling in ({}, {"temperature": 1.0, "top_k": 3}):
            options: dict[str, Any] = {"max_new_tokens": 12, **sampling}
            captioner.generation_config.eos_token_id = [299]
            free = captioner.caption(video, speculate=False, **options).token_ids
            captioner.generation_config.eos_token_id = [299, free[6]]
            plain = captioner.caption(video, speculate=False, **options).stats
            assert plain.smallest_margin is not None
            assert plain.smallest_margin > 0.0
            found = captioner.caption(video, tree="chain", depth=8, **options).stats
            assert found.smallest_margin == pytest.approx(plain.smallest_margin, abs=1e-4)


def test_figures_of_settled_captions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 0.05)
    captioner = captioner_of(1, spread=0.1)
    caption = captioner.caption(random_frames(2), "Describe.", tree="chain", depth=4, max_new_tokens=TOKENS)
    stats = caption.stats
    assert stats.settled_tokens > 0
    assert stats.completion_tokens == TOKENS
    assert stats.smallest_margin is not None
    assert stats.smallest_margin >= 0.0
    assert sum(k * count for k, count in enumerate(stats.acceptance_histogram)) == stats.num_accepted_tokens
    assert stats.num_accepted_tokens + stats.num_drafts <= stats.completion_tokens


def test_the_pieces_of_a_stream_are_the_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 0.03)
    captioner = captioner_of(2, spread=0.15)
    video = captioner.prepare(random_frames(2), "Describe.")
    options: dict[str, Any] = {"tree": "chain", "depth": 4, "max_new_tokens": TOKENS}
    assert "".join(captioner.stream(video, **options)) == captioner.caption(video, **options).text


def test_penalties_of_a_settled_token_count_on(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 0.02)
    settled = 0
    for seed in range(4):
        captioner = captioner_of(seed, spread=0.15)
        captioner.generation_config.repetition_penalty = 1.4
        video = captioner.prepare(random_frames(seed), "Describe.")
        stock = stock_ids(captioner.target.model, video.inputs.tensors, TOKENS)
        caption = captioner.caption(video, tree="static", max_new_tokens=TOKENS)
        assert caption.token_ids == stock
        settled += caption.stats.settled_tokens
    assert settled


@pytest.mark.parametrize("options", [{}, {"top_k": 5}], ids=["all", "top-k"])
def test_sampling_is_settled_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settled = 0
    for seed in range(4):
        captioner = captioner_of(seed, spread=0.15)
        captioner.generation_config.top_p, captioner.generation_config.min_p = 0.95, 0.001
        video = captioner.prepare(random_frames(seed), "Describe.")
        sampling: dict[str, Any] = {"temperature": 0.8, "seed": seed, "max_new_tokens": TOKENS, **options}
        plain = captioner.caption(video, speculate=False, **sampling).token_ids
        with monkeypatch.context() as patch:
            spoil(patch, 0.02)
            caption = captioner.caption(video, tree="chain", depth=4, **sampling)
        assert caption.token_ids == plain
        settled += caption.stats.settled_tokens
    assert settled


def test_logits_that_are_not_finite_are_an_error_in_a_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from specvlm.errors import NonFiniteLogitsError

    captioner = captioner_of(2, spread=0.15)
    video = captioner.prepare(random_frames(2), "Describe.")
    captioner.caption(video, tree="chain", max_new_tokens=2)  # measures
    assert captioner.settling is not None
    captioner.settling.hear(1e9)
    monkeypatch.setattr(VideoLM, "step", lambda self, *_: torch.full((1, 1, self.hidden_size), torch.nan))
    with pytest.raises(NonFiniteLogitsError):
        captioner.caption(video, tree="chain", max_new_tokens=9)


# --- when it does not pay ---


@pytest.mark.parametrize("rows", [1, 3])
def test_a_target_without_preferences_is_soon_decoded_plainly(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = captioner_of()
    captioner.target.model.lm_head.weight.zero_()
    videos = [captioner.prepare(random_frames(n), "Describe.") for n in range(rows)]
    stock = [stock_ids(captioner.target.model, video.inputs.tensors, 60) for video in videos]
    passes: list[int] = []
    real = TextModel.forward

    def forward(self: TextModel, embeds: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        if self is captioner.target:
            passes.append(embeds.shape[1])
        return real(self, embeds, *more, **options)

    caption_rows(captioner, videos, tree="chain", max_new_tokens=1)
    captioner.caption(videos[0], tree="chain", max_new_tokens=2)  # measures
    monkeypatch.setattr(TextModel, "forward", forward)
    found = caption_rows(captioner, videos, tree="chain", depth=5, max_new_tokens=60)
    assert [one.token_ids for one in found] == stock
    # A plain step for each token after the first, the prefill, and the rounds until it was seen.
    assert len(passes) <= rows * 59 + rows + FEWEST_DECIDED + 1


def test_plain_spells_grow_and_end() -> None:
    worth, spells = Worth(), list[int]()
    for _ in range(9):
        rounds = 0
        while not worth.plain:
            worth.hear(rows=1, tokens=1, decided=1, replayed=1)
            rounds += 1
        assert rounds == FEWEST_DECIDED
        spell = 0
        while worth.plain:
            worth.hear_plain()
            spell += 1
        spells.append(spell)
    assert spells[:3] == [FIRST_SPELL, 2 * FIRST_SPELL, 4 * FIRST_SPELL]
    assert spells[-1] == LONGEST_SPELL
    for _ in range(WINDOW):
        worth.hear(rows=1, tokens=5, decided=0, replayed=0)
    while not worth.plain:
        worth.hear(rows=1, tokens=1, decided=1, replayed=1)
    assert worth._left == FIRST_SPELL


def test_rare_replays_do_not_stop_rounds() -> None:
    worth = Worth()
    for number in range(1000):
        often = number % 25 == 24
        worth.hear(rows=1, tokens=4, decided=int(often), replayed=20 * often)
        assert not worth.plain
    for _ in range(1000):  # of a batch, more may be run again
        worth.hear(rows=8, tokens=10, decided=2, replayed=7)
        assert not worth.plain


# --- margins ---


def rule_of(**config: Any) -> TokenRule:
    settings = GenerationSettings(temperature=config.pop("temperature", 0.0))
    plain = {"eos_token_id": [9], "repetition_penalty": None} | config
    rule = TokenRule(logits_rules(SimpleNamespace(**plain), settings), settings, 6, torch.device("cpu"))
    rule.add([torch.tensor([0])])
    rule.begin_round(torch.zeros(1, dtype=torch.long), 0)
    return rule


def margin(rule: TokenRule, logits: list[float], bound: float) -> float:
    zero = torch.zeros(1, 1, dtype=torch.long)
    chosen = rule.choose(torch.tensor([[logits]]), zero, zero.new_empty(1, 1, 0), torch.tensor([bound]))
    assert chosen.margins is not None
    return float(chosen.margins)


def test_a_margin_is_the_lead_of_the_score() -> None:
    logits = [1.0, 3.0, 2.5, -1.0, 0.0, 0.0]
    assert margin(rule_of(), logits, 0.1) == 0.5
    assert margin(rule_of(suppress_tokens=[1]), logits, 0.1) == 1.5
    assert margin(rule_of(forced_eos_token_id=2), logits, 0.1) == 0.5
    assert margin(rule_of(), [2.0, 2.0, 0.0, 0.0, 0.0, 0.0], 0.1) == 0.0


@pytest.mark.parametrize(
    ("config", "logits", "near"),
    [
        # The winner is the last that top-k leaves, or another one nearly came in.
        ({"top_k": 1}, [5.0, 4.9, 0.0, 0.0, 0.0, 0.0], True),
        ({"top_k": 1}, [5.0, 1.0, 0.0, 0.0, 0.0, 0.0], False),
        ({"min_p": 0.5}, [5.0, 5.0 - 0.75, 0.0, 0.0, 0.0, 0.0], True),
        ({"top_p": 0.6}, [5.0, 5.0 + 0.4055, -99.0, -99.0, -99.0, -99.0], True),
        ({"top_p": 0.3}, [5.0, 9.0, -99.0, -99.0, -99.0, -99.0], False),
    ],
)
def test_what_nearly_came_in_may_have_won(
    config: dict[str, Any], logits: list[float], near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that favours what the rule leaves out: the margin is 0 only where it might have been left in."""
    rule = rule_of(temperature=1.0, **config)
    scores = rule._warp(torch.tensor([[logits]]))
    out = torch.tensor(logits).masked_fill(scores[0, 0].isfinite(), -99.0).argmax()
    assert rule._round.noise is not None
    rule._round.noise.zero_()
    rule._round.noise[0, 0, out] = 50.0
    assert (margin(rule, logits, 0.2) == 0.0) == near


def test_scores_are_sharper_than_logits() -> None:
    assert rule_of().sharpness == 1.0
    assert rule_of(repetition_penalty=1.25).sharpness == 1.25
    assert rule_of(repetition_penalty=0.8).sharpness == 1.25
    assert rule_of(temperature=0.5).sharpness == 2.0


def test_exact_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match=r"exact=1 is of type int; give True or False"):
        GenerationSettings(exact=1)  # type: ignore[arg-type]
