"""The compressor alone: what each operator leaves, where it stands, and how the gate chooses and learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specvlm.config import SpeculationSettings
from specvlm.drafts.compressor import (
    MODES,
    OPERATORS,
    Compressed,
    Compressor,
    CompressorConfig,
    OperatorName,
    VideoPairs,
    _left,
    _middles,
)
from specvlm.errors import ConfigError
from specvlm.pruning import prune

HIDDEN = 16
RATIOS = (1.0, 3.0, 5.0, 7.5, 10.0, 20.0)
COUNTS = (1, 2, 7, 19, 100)


def pairs(count: int, seed: int = 0) -> VideoPairs:
    """A video whose positions name its tokens, differently in each row."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.arange(count) * step + 5 for step in (1, 3, 7)])
    return VideoPairs(
        torch.randn(1, count, HIDDEN, generator=generator),
        positions,
        torch.rand(count, generator=generator),
        torch.randn(HIDDEN, generator=generator),
        (count,),
    )


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(operator: OperatorName, ratio: float = 5.0, **options: Any) -> Compressor:
    torch.manual_seed(1)
    return Compressor(CompressorConfig("single", (operator,), ratio, **options), HIDDEN).eval()


def check_positions(video: VideoPairs, made: Compressed) -> None:
    """Each kept position is, in all rows at once, one of the video's, and they ascend."""
    there = {tuple(column) for column in video.positions.T.tolist()}
    kept = [tuple(column) for column in made.positions.T.tolist()]
    assert set(kept) <= there
    assert kept == sorted(kept)
    assert made.inputs.shape == (1, len(kept), HIDDEN)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_lengths_and_positions(operator: OperatorName, ratio: float) -> None:
    for count in COUNTS:
        video = pairs(count)
        made = single(operator, ratio)(video, lots())
        check_positions(video, made)
        stride = max(1, round(ratio))
        expected = {"resampler": 2, "text-only": 0, "conv": -(-count // stride)}
        left = max(1, round(count / ratio))
        assert made.inputs.shape[1] == expected.get(operator, left), count
        assert (made.operator, made.log_weight) == (operator, None)


def test_windows_cover_every_token_and_middles_lie_in_them() -> None:
    for count in range(1, 40):
        for left in range(1, count + 1):
            middles = _middles(count, left)
            for i, middle in enumerate(middles):
                assert i * count // left <= middle <= -(-(i + 1) * count // left) - 1
            assert middles == sorted(set(middles))
    assert _middles(9, 3) == [1, 4, 7]
    assert _middles(1, 2) == [0, 0]


def test_a_ratio_of_one_leaves_everything() -> None:
    video = pairs(11)
    for operator in ("prune", "prune-guided", "pool", "conv"):
        made = single(operator, 1.0)(video, lots())
        assert torch.allclose(made.inputs, video.inputs, atol=1e-6), operator
        assert torch.equal(made.positions, video.positions), operator


def test_mode_none_touches_nothing() -> None:
    video = pairs(11)
    made = Compressor(CompressorConfig("none", ()), HIDDEN)(video, lots())
    assert made.inputs is video.inputs
    assert made.positions is video.positions
    assert made.operator == "none"


def test_pool_is_the_mean_of_neighbours_and_conv_begins_there() -> None:
    video = pairs(15)
    pooled, convolved = (single(operator, 5.0)(video, lots()) for operator in ("pool", "conv"))
    means = video.inputs.view(1, 3, 5, HIDDEN).mean(dim=2)
    assert torch.allclose(pooled.inputs, means, atol=1e-6)
    assert torch.allclose(convolved.inputs, means, atol=1e-6)
    middles = video.positions[:, [2, 7, 12]]
    assert torch.equal(pooled.positions, middles)
    assert torch.equal(convolved.positions, middles)


def test_a_convolution_repeats_the_last_token_behind_the_end() -> None:
    video = pairs(7)
    made = single("conv", 5.0)(video, lots())
    rest = torch.cat((video.inputs[:, 5:], video.inputs[:, -1:].expand(-1, 3, -1)), dim=1)
    assert torch.allclose(made.inputs[:, 1:], rest.mean(dim=1, keepdim=True), atol=1e-6)
    assert torch.equal(made.positions, video.positions[:, [2, 6]])


def test_prune_draws_by_its_seed_alone() -> None:
    video, operator = pairs(100), single("prune", 10.0)
    first, again, other = (operator(video, lots(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.positions, again.positions)
    assert not torch.equal(first.positions, other.positions)
    torch.manual_seed(9)  # torch's own seed is another
    assert torch.equal(operator(video, lots(1)).positions, first.positions)
    kept = operator.kept(video.scores, "prune", lots(1))
    assert torch.equal(video.inputs[:, kept], first.inputs)
    where = torch.cat([single("prune", 10.0).kept(video.scores, "prune", lots(s)) for s in range(300)])  # type: ignore[misc]
    drawn = where.bincount(minlength=100)  # 30 times each, give or take 5
    assert drawn.min() > 8
    assert drawn.max() < 55


def test_guided_pruning_is_the_verifiers() -> None:
    for ratio in (3.0, 10.0, 20.0):
        video, operator = pairs(97), single("prune-guided", ratio)
        made = operator(video, lots(1))
        keep = prune(video.scores, SpeculationSettings(prune_ratio=1 - 1 / ratio))
        assert torch.equal(made.inputs, video.inputs[:, keep])
        assert torch.equal(made.positions, video.positions[:, keep])
        assert torch.equal(operator(video, lots(2)).inputs, made.inputs)


def test_only_what_prunes_keeps_tokens() -> None:
    compressor = Compressor(CompressorConfig("select", OPERATORS), HIDDEN)
    scores = pairs(50).scores
    found = {name: compressor.kept(scores, name, lots()) for name in (*OPERATORS, "none")}
    assert {name for name, kept in found.items() if kept is not None} == {"prune", "prune-guided"}


def test_the_resampler_reads_the_whole_video() -> None:
    for queries in (1, 2, 5):
        operator, video = single("resampler", queries=queries), pairs(30)
        video = video._replace(inputs=video.inputs.requires_grad_())
        made = operator(video, lots())
        assert made.inputs.shape == (1, queries, HIDDEN)
        check_positions(video, made)
        (gradient,) = torch.autograd.grad(made.inputs.square().sum(), video.inputs)
        assert (gradient.abs().sum(dim=-1) > 0).all()


def test_concat_puts_everything_side_by_side() -> None:
    torch.manual_seed(1)
    compressor = Compressor(CompressorConfig("concat", ("pool", "text-only", "resampler", "prune")), HIDDEN)
    video = pairs(23)
    made = compressor.eval()(video, lots(4))
    generator = lots(4)
    parts = [operator(video, generator) for operator in compressor.operators]
    assert torch.equal(made.inputs, torch.cat([part[0] for part in parts], dim=1))
    assert torch.equal(made.positions, torch.cat([part[1] for part in parts], dim=1))
    assert made.operator == "pool+text-only+resampler+prune"
    assert made.inputs.shape[1] == 5 + 0 + 2 + 5


def choosing(mode: Any = "select", bias: tuple[float, ...] = (0.3, 1.2, -0.4)) -> Compressor:
    """Three operators, of shares that do not depend on the question."""
    compressor = Compressor(CompressorConfig(mode, ("prune", "pool", "text-only")), HIDDEN)
    assert compressor.gate is not None
    with torch.no_grad():
        compressor.gate.weight.zero_()
        compressor.gate.bias.copy_(torch.tensor(bias))
    return compressor


def test_in_use_the_likeliest_operator_is_taken() -> None:
    for bias, name in (
        ((0.3, 1.2, -0.4), "pool"),
        ((0.1, 0.0, 3.0), "text-only"),
        ((0.2, 0.1, 0.1), "prune"),
    ):
        compressor = choosing(bias=bias).eval()
        made = [compressor(pairs(20, seed), lots(seed)) for seed in range(30)]
        assert {one.operator for one in made} == {name}
        assert made[0].log_weight is None


def test_the_gate_reads_the_question() -> None:
    compressor = choosing().eval()
    video = pairs(20)
    assert compressor.gate is not None
    with torch.no_grad():
        compressor.gate.weight[2] = video.question
        compressor.gate.weight[0] = -video.question
    assert compressor(video, lots()).operator == "text-only"
    assert compressor(video._replace(question=-video.question), lots()).operator == "prune"


def test_a_fresh_gate_has_hardly_a_preference() -> None:
    for hidden in (16, 256, 2048):
        compressor = Compressor(CompressorConfig("select", OPERATORS), hidden)
        shares = compressor._shares(pairs(3)._replace(question=40 * torch.randn(hidden)), lots(), draw=False)
        assert (shares - 1 / 6).abs().max() < 0.12, hidden


def test_in_training_draws_follow_the_gates_shares() -> None:
    compressor, video, generator = choosing().train(), pairs(20), lots(5)
    assert compressor.gate is not None
    shares = compressor.gate.bias.detach().softmax(0)
    draws = 3000
    names = [compressor(video, generator).operator for _ in range(draws)]
    counted = torch.tensor([names.count(name) for name in ("prune", "pool", "text-only")])
    chi_square = ((counted - draws * shares) ** 2 / (draws * shares)).sum()
    assert chi_square < 13.8  # two degrees of freedom: one in a thousand, and the seed is fixed
    first, again = ([compressor(video, lots(s)).operator for s in range(20)] for _ in range(2))
    assert first == again


def test_what_a_draw_weighs_is_nothing_but_a_gradient() -> None:
    """Its gradient is that of the drawn share: positive for the operator that was chosen, negative for the others."""
    compressor, video = choosing().train(), pairs(20)
    assert compressor.gate is not None
    seen = set()
    for seed in range(20):
        made = compressor(video, lots(seed))
        assert made.log_weight is not None
        assert made.log_weight.item() == 0.0
        (gradient,) = torch.autograd.grad(made.log_weight, compressor.gate.bias)
        chosen = ("prune", "pool", "text-only").index(made.operator)
        assert gradient[chosen] > 0
        assert (gradient[[i for i in range(3) if i != chosen]] < 0).all()
        assert abs(float(gradient.sum())) < 1e-6
        seen.add(made.operator)
    assert len(seen) == 3


def test_weighted_is_the_sum_and_every_share_gets_a_gradient() -> None:
    compressor, video = choosing("weighted").train(), pairs(20)
    assert compressor.gate is not None
    made, again = compressor(video, lots(3)), compressor.eval()(video, lots(3))
    assert torch.equal(made.inputs, again.inputs)  # nothing is drawn but what `prune` draws
    shares = compressor.gate.bias.softmax(0)
    generator = lots(3)
    pruned, pooled, _ = (operator(video, generator)[0] for operator in compressor.operators)
    assert torch.allclose(made.inputs, shares[0] * pruned + shares[1] * pooled, atol=1e-6)
    assert made.operator == "prune+pool+text-only"
    check_positions(video, made)
    aim = pooled.detach()

    def loss(bias: torch.Tensor) -> torch.Tensor:
        given = bias.softmax(0)
        return (given[0] * pruned.detach() + given[1] * aim - aim).square().sum()

    (gradient,) = torch.autograd.grad(
        (compressor(video, lots(3)).inputs - aim).square().sum(), compressor.gate.bias
    )
    (expected,) = torch.autograd.grad(loss(compressor.gate.bias), compressor.gate.bias)
    assert torch.allclose(gradient, expected, atol=1e-4)
    assert gradient[1] < 0  # more of the pool is nearer


def test_weighted_repeats_the_resamplers_tokens_evenly() -> None:
    torch.manual_seed(2)
    config = CompressorConfig("weighted", ("resampler", "text-only"), 5.0)
    compressor, video = Compressor(config, HIDDEN).eval(), pairs(30)
    made = compressor(video, lots())
    assert made.inputs.shape[1] == 6
    first, second = made.inputs[0, :3], made.inputs[0, 3:]
    assert torch.allclose(first, first[:1].expand(3, -1))
    assert torch.allclose(second, second[:1].expand(3, -1))
    assert not torch.allclose(first[0], second[0])


@pytest.mark.parametrize("mode", ["select", "weighted", "concat"])
@pytest.mark.parametrize("count", COUNTS)
def test_every_mode_takes_the_shortest_video(mode: Any, count: int) -> None:
    torch.manual_seed(3)
    compressor, video = Compressor(CompressorConfig(mode, OPERATORS, 20.0), HIDDEN), pairs(count)
    for training in (True, False):
        made = compressor.train(training)(video, lots())
        assert made.inputs.shape[1] == made.positions.shape[1]
        assert made.inputs.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "best"}, "compressor mode 'best' is unknown; choose one of none, single, select"),
        ({"operators": ("pool", "zip")}, "compressor operator 'zip' is unknown; choose from prune"),
        ({"operators": ("pool", "pool")}, "give each of them once"),
        ({"mode": "single"}, "takes 1 to 1 operators, not 5"),
        ({"mode": "single", "operators": ()}, "takes 1 to 1 operators, not 0"),
        ({"mode": "none"}, "takes 0 to 0 operators, not 5"),
        ({"mode": "select", "operators": ("pool",)}, "takes 2 to 6 operators, not 1"),
        ({"ratio": 0.5}, "compression_ratio=0.5 is out of range"),
        ({"ratio": float("nan")}, "compression_ratio=nan is out of range"),
        ({"ratio": 1001}, "compression_ratio=1001 is out of range"),
        ({"ratio": "5"}, "compression_ratio='5' is out of range"),
        ({"queries": 0}, "queries=0 is out of range"),
        ({"queries": 1.5}, "queries=1.5 is out of range"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompressorConfig(**options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names() -> None:
    assert CompressorConfig("single", ("text-only",)).name == "text-only"
    assert [CompressorConfig(mode).name for mode in MODES if mode not in ("none", "single")] == [
        "select",
        "weighted",
        "concat",
    ]
    assert CompressorConfig("none", ()).name == "none"


def test_at_least_one_token_is_left() -> None:
    assert [_left(count, 20.0) for count in (1, 5, 29, 31, 1000)] == [1, 1, 1, 2, 50]
