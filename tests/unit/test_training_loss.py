"""What a head is trained on: the very terms, who gets a gradient, and what each pair may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from specvlm.captioner import Captioner
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head_model import HeadModel
from specvlm.errors import ConfigError, GenerationError
from specvlm.training import objective
from specvlm.training.example import Example, read_example
from specvlm.training.objective import Losses, ObjectiveSettings, distillation_loss
from tests.heads import (
    COMPRESSORS,
    FAMILIES,
    FITTED_TOKENS,
    NONE,
    config_of,
    examples_of,
    fit,
    target_captioner,
    videos_of,
    written,
)
from tests.tiny import FamilyName

_CASES: dict[FamilyName, tuple[Captioner, HeadModel, list[Example], list[tuple[int, ...]]]] = {}


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(family: FamilyName) -> tuple[Captioner, HeadModel, list[Example], list[tuple[int, ...]]]:
    """A target, an untrained head without a compressor, examples, and their captions."""
    if family not in _CASES:
        captioner = target_captioner(family)
        head = HeadModel.fresh(captioner.target, config_of(captioner.target), seed=2)
        videos = videos_of(captioner)[:2]
        captions = [written(captioner, video, max_new_tokens=12) for video in videos]
        told = list(zip(videos, captions, strict=True))
        _CASES[family] = captioner, head, examples_of(captioner.target, told), captions
    return _CASES[family]


def headed(captioner: Captioner, name: str, *, seed: int = 2) -> HeadModel:
    return HeadModel.fresh(captioner.target, config_of(captioner.target, COMPRESSORS[name]), seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_is_what_stock_sees(family: FamilyName) -> None:
    """Last hidden states as stock's forward over prompt and caption gives them, and its logits."""
    captioner, head, examples, captions = case(family)
    target = captioner.target
    for video, example, caption in zip(videos_of(captioner), examples, captions, strict=False):
        tensors = dict(video.inputs.tensors)
        ids = torch.cat((tensors["input_ids"], torch.tensor([caption[:-1]])), dim=1)
        tensors["input_ids"], tensors["attention_mask"] = ids, torch.ones_like(ids)
        for name in [name for name in tensors if name.endswith("token_type_ids")]:
            kinds = tensors[name]
            tensors[name] = torch.cat((kinds, kinds.new_zeros(1, len(caption) - 1)), dim=1)
        with torch.no_grad():
            out = target.model(**tensors, output_hidden_states=True)
        assert example.embeds.shape[1] == ids.shape[1] == example.positions.shape[1]
        assert torch.allclose(example.features, out.hidden_states[-1], atol=1e-4)
        aims = objective._aims(head, target, example)
        logits = out.logits[:, example.prompt_tokens :]
        assert torch.allclose(aims.probabilities, logits.softmax(-1), atol=1e-5)
        assert aims.best[0].tolist() == list(caption[1 : aims.best.shape[1] + 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unroll", [0, 1, 3])
def test_the_terms_are_those_of_the_paper(family: FamilyName, unroll: int) -> None:
    """Against one pair at a time, each with all that it may read before it, in plain loops."""
    captioner, head, examples, captions = case(family)
    target, example, count = captioner.target, examples[0], len(captions[0]) - 1
    settings = ObjectiveSettings(cross_entropy=0.3, smooth_l1=2.0, unroll=unroll)
    with torch.no_grad():
        got = distillation_loss(head.train(), target, example, settings, lots())
        embeds, feature = example.embeds[:, 1:], example.features
        start, positions = example.prompt_tokens - 1, example.positions
        read = head.pairs(feature[:, :-1], embeds)  # with the target's features

        def run(last: int, own: list[torch.Tensor]) -> torch.Tensor:
            """Read pairs up to `last` with the target's features, further ones with these; -> the last's."""
            own_pairs = [head.pairs(one, embeds[:, last + 1 + i, None]) for i, one in enumerate(own)]
            told = torch.cat([read[:, : last + 1], *own_pairs], dim=1)
            length = told.shape[1]
            mask = torch.zeros(length, length).masked_fill(
                ~torch.ones(length, length).bool().tril(), -torch.inf
            )
            return objective._forward(head, told, positions[:, :length], mask, DynamicCache())[:, -1:]

        entropies: list[list[torch.Tensor]] = [[] for _ in range(unroll + 1)]
        distances: list[list[torch.Tensor]] = [[] for _ in range(unroll + 1)]
        for root in range(count):
            own: list[torch.Tensor] = []
            for step in range(min(unroll, count - 1 - root) + 1):
                hidden = run(start + root, own)
                own.append(hidden)
                aim = feature[:, start + root + step + 1, None]
                chances = target.logits(aim).softmax(-1)
                entropies[step].append(-(chances * target.logits(hidden).log_softmax(-1)).sum())
                distances[step].append(functional.smooth_l1_loss(hidden, aim))
    entropy = torch.stack([torch.stack(one).mean() for one in entropies]).mean()
    distance = torch.stack([torch.stack(one).mean() for one in distances]).mean()
    assert torch.allclose(got.cross_entropy, entropy, rtol=1e-4)
    assert torch.allclose(got.smooth_l1, distance, rtol=1e-4)
    assert torch.allclose(got.total, 0.3 * entropy + 2.0 * distance, rtol=1e-4)


def test_the_share_that_is_right_is_counted_on_the_first_pass() -> None:
    captioner, head, examples, _ = case("qwen")
    head.eval()
    with torch.no_grad():
        for unroll in (0, 2):
            found = distillation_loss(
                head, captioner.target, examples[0], ObjectiveSettings(unroll=unroll), lots()
            )
            aims = objective._aims(head, captioner.target, examples[0])
            sequence = objective._sequence(head, examples[0], lots())
            hidden = objective._first_pass(head, sequence, DynamicCache())[:, -aims.best.shape[1] :]
            right = (captioner.target.logits(hidden).argmax(-1) == aims.best).float().mean()
            assert torch.equal(found.right, right)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_gradients_reach_every_weight_of_the_head_and_none_of_the_target(
    family: FamilyName, name: str
) -> None:
    captioner, _, examples, _ = case(family)
    head = headed(captioner, name).train()
    before = {key: value.clone() for key, value in captioner.target.model.state_dict().items()}
    generator, reached = lots(), set()
    for _ in range(40 if name == "select" else 1):  # until each operator was drawn
        loss = distillation_loss(head, captioner.target, examples[0], ObjectiveSettings(unroll=1), generator)
        assert loss.total.isfinite()
        loss.total.backward()  # type: ignore[no-untyped-call]
        reached |= {
            key for key, weight in head.named_parameters() if weight.grad is not None and weight.grad.any()
        }
        if len(reached) == len(list(head.parameters())):
            break
    assert {key for key, _ in head.named_parameters()} - reached == set()
    assert all(weight.grad is None for weight in captioner.target.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in captioner.target.model.state_dict().items())


def test_a_draw_teaches_the_gate_about_what_it_chose() -> None:
    """Away from one operator is towards all others; where nothing is kept, there is nothing to weigh."""
    captioner, _, examples, _ = case("llava")
    head = headed(captioner, "select").train()
    operators = COMPRESSORS["select"].operators
    gate = head.compressor.gate
    assert gate is not None
    generator, drawn = lots(3), set()
    for _ in range(25):
        loss = distillation_loss(head, captioner.target, examples[0], ObjectiveSettings(), generator)
        drawn.add(loss.operator)
        (part,) = torch.autograd.grad(loss.total, gate.bias, allow_unused=True)
        assert (part is None) == (loss.operator == "text-only")
        if part is not None:
            chosen = operators.index(loss.operator)  # type: ignore[arg-type]
            others = torch.cat((part[:chosen], part[chosen + 1 :]))
            assert part[chosen] != 0
            assert (others * part[chosen] < 0).all()
    assert drawn == set(operators)


def test_the_gates_gradient_is_that_of_the_attention_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences: the kept pairs' attention logits, all moved a little, by the share's own slope."""
    captioner, _, examples, _ = case("llava")
    head = headed(captioner, "select").double().train()
    compressor, gate = head.compressor, head.compressor.gate
    real, shares = compressor.forward, []
    draw = compressor._shares
    monkeypatch.setattr(compressor, "_shares", lambda *a, **b: shares.append(draw(*a, **b)) or shares[-1])

    def loss(move: float | None) -> Losses:
        def moved(*args: Any) -> Any:
            made = real(*args)
            return made if move is None else made._replace(log_weight=made.log_weight.detach() + move)

        monkeypatch.setattr(compressor, "forward", moved)
        return distillation_loss(head, captioner.target, examples[0], ObjectiveSettings(unroll=1), lots(8))

    base = loss(None)
    assert base.operator != "text-only"
    share = shares[0].max().item()
    (gradient,) = torch.autograd.grad(base.total, gate.bias)
    slope = (loss(1e-2).total.item() - loss(-1e-2).total.item()) / 2e-2
    chosen = COMPRESSORS["select"].operators.index(base.operator)  # type: ignore[arg-type]
    assert abs(slope) > 1e-5
    assert gradient[chosen].item() == pytest.approx(slope * share * (1 - share), rel=0.03)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unroll", [0, 1, 2, 3])
def test_what_must_not_be_seen_changes_nothing(family: FamilyName, unroll: int) -> None:
    """Another feature or embedding at place i: no pass of a pair before it, nor of one that must not read it, moves."""
    _, head, examples, captions = case(family)
    example, count = examples[1], len(captions[1]) - 1
    head.eval()

    def passes(given: Example) -> list[torch.Tensor]:
        cache = DynamicCache()
        sequence = objective._sequence(head, given, lots())
        hidden = objective._first_pass(head, sequence, cache)[:, -count:]
        found = [hidden[0]]
        for step in range(1, unroll + 1):
            hidden = objective._own_pass(head, given, sequence, cache, hidden[:, :-1], step)
            found.append(hidden[0])
        return found

    with torch.no_grad():
        base = passes(example)
        start = example.prompt_tokens - 1
        for changed in range(count):
            features, embeds = example.features.clone(), example.embeds.clone()
            features[:, start + changed] += 1.0  # what pair `changed` reads of the target
            told = passes(replace(example, features=features))
            for step, (one, other) in enumerate(zip(base, told, strict=True)):
                for c in range(step, count):
                    same = torch.equal(one[c - step], other[c - step])
                    # Pair c of pass `step` has its root at c - step, the last to read the target's features.
                    assert same == (c - step < changed), (changed, step, c)
            embeds[:, start + 1 + changed] += 1.0  # the token of pair `changed`
            told = passes(replace(example, embeds=embeds))
            for step, (one, other) in enumerate(zip(base, told, strict=True)):
                for c in range(step, count):
                    assert torch.equal(one[c - step], other[c - step]) == (c < changed), (changed, step, c)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_bring_the_loss_down(family: FamilyName) -> None:
    captioner, _, examples, _ = case(family)
    for name in ("none", "select"):
        head = headed(captioner, name)
        losses = fit(head, captioner.target, examples, 15, ObjectiveSettings(unroll=1))
        assert sum(losses[-3:]) < 0.6 * sum(losses[:3]), name


def test_training_is_repeatable_to_the_bit() -> None:
    captioner, _, examples, _ = case("qwen")
    heads = [headed(captioner, "select") for _ in range(2)]
    losses = [fit(head, captioner.target, examples, 4, ObjectiveSettings(unroll=1)) for head in heads]
    assert losses[0] == losses[1]
    for key, value in heads[0].state_dict().items():
        assert torch.equal(value, heads[1].state_dict()[key]), key


def test_weights_of_zero_leave_a_term_out() -> None:
    captioner, head, examples, _ = case("qwen")
    for settings, wanted in (
        (ObjectiveSettings(cross_entropy=0.0, smooth_l1=3.0), "smooth_l1"),
        (ObjectiveSettings(cross_entropy=3.0, smooth_l1=0.0), "cross_entropy"),
    ):
        found = distillation_loss(head, captioner.target, examples[0], settings, lots())
        assert torch.allclose(found.total, 3.0 * getattr(found, wanted))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [2, 3])
def test_the_shortest_captions_teach_what_they_can(family: FamilyName, length: int) -> None:
    """A caption of two tokens has one pair, whatever number of passes was asked for."""
    captioner, head, _, captions = case(family)
    video = videos_of(captioner)[0]
    example = read_example(captioner.target, video.inputs, captions[0][:length])
    found = distillation_loss(head, captioner.target, example, ObjectiveSettings(unroll=3), lots())
    assert found.total.isfinite()
    for tokens in ((), captions[0][:1]):
        with pytest.raises(GenerationError, match=f"caption of {len(tokens)} tokens teaches nothing"):
            read_example(captioner.target, video.inputs, tokens)


def test_a_bfloat16_target_and_head() -> None:
    captioner, _, _, captions = case("qwen")
    again = target_captioner("qwen")
    again.target.model.to(torch.bfloat16)
    target = type(again.target)(again.target.model, again.target.family)
    head = HeadModel.fresh(target, config_of(target, CompressorConfig(ratio=3.0)), 1)
    (example,) = examples_of(target, [(videos_of(captioner)[0], captions[0])])
    for dtype in (torch.bfloat16, torch.float32):
        head = head.to(dtype).train()
        found = distillation_loss(head, target, example, ObjectiveSettings(unroll=2), lots(1))
        found.total.backward()  # type: ignore[no-untyped-call]
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in head.parameters())
        assert head.join.weight.grad is not None
        head.zero_grad()


@pytest.mark.parametrize(
    "options",
    [
        {"cross_entropy": -0.1},
        {"smooth_l1": float("nan")},
        {"smooth_l1": float("inf")},
        {"unroll": -1},
        {"unroll": 65},
        {"unroll": 1.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ObjectiveSettings(**options)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_the_papers() -> None:
    settings = ObjectiveSettings()
    assert (settings.cross_entropy, settings.smooth_l1) == (0.1, 1.0)
    assert FITTED_TOKENS > 12
    assert NONE.name == "none"
