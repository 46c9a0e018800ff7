"""benchmarks/shapes.py and modelled.py: random models of published shapes, assumed acceptance, the bench of a pair."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specvlm import decode
from specvlm.bench.grid import Grid
from specvlm.bench.measure import BenchRequest
from specvlm.bench.records import BenchReport, Configuration
from specvlm.bench.suite import BenchStep
from specvlm.config import TREES, SpeculationSettings, TreeName
from specvlm.errors import ConfigError
from specvlm.families import family_of
from specvlm.published import LLAVA, QWEN25, SHAPES, Shape, TextShape, VisionShape, video_tokens
from specvlm.tree import Guesses, make_shape
from specvlm.verify import accept
from tests.emulated_graphs import emulate
from tests.tiny import processor_for, random_frames

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
CPU = torch.device("cpu")
SIZE = (56, 84)
SIZES = {QWEN25: SIZE, LLAVA: (384, 384)}
BILLIONS = {  # of parameters, by the hub
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-4b": 4.44,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-32b": 33.4,
    "qwen3-vl-30b-a3b": 31.1,
    "qwen3-vl-235b-a22b": 236.0,
    "qwen2-vl-2b": 2.21,
    "qwen2-vl-7b": 8.29,
    "qwen2-vl-72b": 73.4,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.45,
    "qwen2.5-vl-72b": 73.4,
    "llava-onevision-0.5b": 0.89,
    "llava-onevision-7b": 8.03,
    "llava-onevision-72b": 73.2,
}


def script(name: str) -> Any:
    """A script as a module."""
    sys.path.insert(0, BENCHMARKS)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(BENCHMARKS)


modelled, shapes = script("modelled"), script("shapes")


def tiny_shape(family: str, layers: int = 2, vocabulary: int = 320) -> Shape:
    """A shape of a family in small: the same proportions of a head, the same patches."""
    text = TextShape(64, 128, layers, 4, 2, vocabulary, tied=False)
    return Shape(f"tiny-{family}", "", family, text, VisionShape(2, 32, 64, 2), 0, 290)


def tiny_pair(family: str, accepted: float = 3.9) -> Any:
    """A captioner of a tiny pair."""
    target, draft = tiny_shape(family, layers=3), tiny_shape(family, layers=1, vocabulary=300)
    pair = modelled.make_pair(target, draft, accepted)
    return modelled.build_pair(pair, CPU, torch.float32, SIZES[family])


def guesses_of(tree: Any, rows: int = 1, seed: int = 0, **settings: Any) -> Guesses:
    """A tree of random guesses, of 97 tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = make_shape(SpeculationSettings(tree=tree, **settings), 97, CPU)

    def expand(frontier: Any) -> torch.Tensor:
        return 8.0 * torch.randn(*frontier.tokens.shape, 97, generator=generator)

    return shape.grow(torch.zeros(rows, dtype=torch.long), expand)


# --- models ---


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_parameters_are_as_published(shape: Shape) -> None:
    count = modelled.parameter_count(shape)
    assert count == shape.parameters
    assert count == pytest.approx(BILLIONS[shape.name] * 1e9, rel=0.01)


@pytest.mark.parametrize("family", [QWEN25, LLAVA])
def test_a_built_model_has_the_buffers_of_an_ordinary_one(family: str, tmp_path: Any) -> None:
    """Rotary frequencies above all, in their own dtype; every parameter is real and finite."""
    ours = modelled.build(tiny_shape(family), CPU, torch.bfloat16).model
    ours.save_pretrained(tmp_path)
    expected = dict(type(ours).from_pretrained(tmp_path, dtype=torch.bfloat16).named_buffers())
    assert expected
    assert {name: buffer.dtype for name, buffer in ours.named_buffers()} == {
        name: buffer.dtype for name, buffer in expected.items()
    }
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert parameter.isfinite().all(), name
        assert parameter.ndim == 1 or 0 < float(parameter.float().std()) < 2, name


def test_tied_weights_stay_one_and_layers_differ() -> None:
    shape = tiny_shape(QWEN25)
    model = modelled.build(replace(shape, text=replace(shape.text, tied=True)), CPU, torch.float32).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.language_model.layers)
    assert not torch.equal(first, second)


def test_shrinking_keeps_width_and_proportion() -> None:
    target, draft = modelled.find_shape("qwen2.5-vl-32b"), modelled.find_shape("qwen2.5-vl-7b")
    pair = modelled.make_pair(target, draft, 3.9, layers=8)
    assert pair.target.text == replace(target.text, layers=8)
    assert pair.target.vision.depth == 4
    assert pair.draft.text.layers == 4  # 28 * 8 / 64, rounded
    assert modelled.make_pair(target, draft, 3.9, layers=1).draft == modelled.shrunk(draft, 1, 64)
    assert "8 layers" in pair.label
    assert modelled.shrunk(target, 64, 64) == target


def test_pairs_that_cannot_be_are_refused() -> None:
    target = modelled.find_shape("qwen2.5-vl-32b")
    for layers in (0, 65, -1):
        with pytest.raises(ConfigError, match="1 to 64"):
            modelled.make_pair(target, None, 3.9, layers)
    with pytest.raises(ConfigError, match="family"):
        modelled.make_pair(target, modelled.find_shape("llava-onevision-0.5b"), 3.9)
    with pytest.raises(ConfigError, match=r"qwen2\.5-vl-33b.*unknown.*qwen2\.5-vl-32b"):
        modelled.find_shape("qwen2.5-vl-33b")


def test_bytes_of_a_pass_are_those_of_the_decoder() -> None:
    shape = modelled.find_shape("qwen2.5-vl-7b")
    small = replace(shape, text=replace(shape.text, layers=1))
    model = modelled.empty_model(small, torch.bfloat16)
    decoder = sum(p.numel() for p in model.model.language_model.layers.parameters())
    rest = model.model.language_model.norm.weight.numel() + model.get_output_embeddings().weight.numel()
    assert modelled.pass_bytes(small.text, 0, 2) == 2 * (decoder + rest)
    behind = modelled.pass_bytes(small.text, 10, 2) - modelled.pass_bytes(small.text, 0, 2)
    assert behind == 10 * 2 * 2 * 4 * 128  # tokens, bytes, K and V, heads, width


# --- prompts ---


@pytest.mark.parametrize(("family", "name"), [(QWEN25, "qwen"), (LLAVA, "llava")])
def test_a_prompt_is_like_the_processors(family: str, name: Any) -> None:
    """Same names, dtypes and ranks as the real processors give; as many video tokens as features."""
    shape = tiny_shape(family)
    inputs = modelled.random_inputs(shape, 4, SIZES[family], CPU)
    lm = modelled.build(shape, CPU, torch.float32)
    real = family_of(lm.model.config, "").prepare(processor_for(name), random_frames(1), "Hi.")
    assert {key: (value.dtype, value.ndim) for key, value in inputs.tensors.items()} == {
        key: (value.dtype, value.ndim) for key, value in real.tensors.items()
    }
    with torch.inference_mode():
        assert len(lm.family.see(lm.model, [inputs])[0].embeds) == inputs.video_tokens
    assert lm.positions(inputs).shape[1] == inputs.prompt_tokens
    assert torch.equal((inputs.token_ids[0] == shape.video_token).nonzero().squeeze(1), inputs.video_at)


def test_video_tokens_are_those_of_the_processors() -> None:
    """Of Qwen 360 x 640 becomes 364 x 644: 13 x 23 tokens for two frames. LLaVA has 196 a frame, and a newline."""
    assert [video_tokens(modelled.find_shape("qwen2.5-vl-7b"), n, (360, 640)) for n in (16, 128)] == [
        2392,
        19136,
    ]
    assert video_tokens(modelled.find_shape("llava-onevision-7b"), 32, (1, 1)) == 32 * 196 + 1


@pytest.mark.parametrize(
    ("family", "frames", "size"),
    [(QWEN25, 3, SIZE), (QWEN25, 0, SIZE), (QWEN25, 4, (20, 84)), (LLAVA, 2, (360, 640))],
)
def test_frames_that_do_not_fit_are_refused(family: str, frames: int, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"; (give|leave it out)"):
        modelled.random_inputs(tiny_shape(family), frames, size, CPU)


# --- assumed acceptance ---


@pytest.mark.parametrize("mean", [0.0, 0.4, 2.5, 3.9, 4.95, 5.0])
def test_accepted_guesses_have_the_mean_that_was_asked_for(mean: float) -> None:
    """Of a caption and of many; in a deeper tree the same chance of one more guess gives more."""
    for depth, expected in ((5, mean), (9, sum(modelled.survival(mean, 5) ** k for k in range(1, 10)))):
        forced, guesses = modelled.ForcedAcceptance(mean, 5, CPU), guesses_of("chain", depth=depth)
        choices = torch.full((1, depth + 1), 96)
        got = [int(forced(guesses, choices, depth).guessed) for _ in range(2000)]
        assert sum(got) / 2000 == pytest.approx(expected, rel=0.02, abs=0.02)
        assert sum(got[:60]) / 60 == pytest.approx(expected, rel=0.08, abs=0.02)
        forced.restart()
        assert [int(forced(guesses, choices, depth).guessed) for _ in range(60)] == got[:60]


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_accepted_is_a_path_of_the_tree(tree: str, rows: int) -> None:
    """From the root down, guesses as drafted, and then the target's own choice, even where a child equals it."""
    forced = modelled.ForcedAcceptance(2.5, 5, CPU)
    for seed in range(20):
        guesses = guesses_of(tree, rows=rows, seed=seed)
        choices = torch.randint(0, 97, guesses.tokens.shape, generator=torch.Generator().manual_seed(seed))
        if seed % 2:  # the target agrees with every first child: the real `accept` would accept all of them
            choices.scatter_(1, guesses.parents.flip(1), guesses.tokens.flip(1))
        got = forced(guesses, choices, 5)
        for row in range(rows):
            count = int(got.guessed[row])
            path = got.path[row, : count + 1].tolist()
            assert path[0] == 0
            assert [int(guesses.parents[row, node]) for node in path[1:]] == path[:-1]
            assert got.tokens[row, :count].tolist() == [int(guesses.tokens[row, node]) for node in path[1:]]
            assert int(got.tokens[row, count]) == int(choices[row, path[-1]])
        assert int(got.tokens.min()) >= 0


def test_in_static_trees_and_chains_the_first_choices_are_accepted() -> None:
    for tree in ("static", "chain"):
        forced, guesses = modelled.ForcedAcceptance(5.0, 5, CPU), guesses_of(tree)
        path = forced(guesses, torch.full(guesses.tokens.shape, 96), 5).path[0].tolist()
        firsts = [0]
        for _ in range(5):
            firsts.append(next(i for i in range(1, 26) if int(guesses.parents[0, i]) == firsts[-1]))
        assert path == firsts


def test_a_round_without_guesses_is_the_real_one() -> None:
    forced, choices = modelled.ForcedAcceptance(3.9, 5, CPU), torch.tensor([[7]])
    root = guesses_of("chain")
    alone = root._replace(tokens=root.tokens[:, :1])
    assert all(map(torch.equal, forced(alone, choices, 0), accept(alone, choices, 0)))


@pytest.mark.parametrize("mean", [6.0, -0.1, float("nan")])
def test_a_mean_that_no_tree_of_the_depth_gives_is_refused(mean: float) -> None:
    with pytest.raises(ConfigError, match=r"assume_accepted=.*depth 5.*0 to 5"):
        modelled.ForcedAcceptance(mean, 5, CPU)


def test_acceptance_is_assumed_in_a_replayed_round_too_and_nowhere_else() -> None:
    """Rounds as graphs ask nothing of the host and write what eager rounds write, caption after caption."""
    captioner = tiny_pair(QWEN25)
    video = captioner.video(2)

    def caption() -> tuple[tuple[int, ...], tuple[int, ...]]:
        made = captioner.caption(video, tree="static", max_new_tokens=40)
        assert decode.accept is accept
        return made.token_ids, made.stats.acceptance_histogram

    eager = caption()
    emulator = emulate(captioner)
    assert [caption() for _ in range(3)] == [eager] * 3
    assert emulator.replayed > 20
    assert sum(eager[1]) > eager[1][-1]  # rounds differ


# --- the bench ---


class Nobody:
    """Listens to nothing."""

    def step(self, step: BenchStep) -> None: ...

    def left_out(self, left: Any) -> None: ...

    def failed(self, how: Configuration, error: str) -> None:
        raise AssertionError(f"{how.label}: {error}")


def benched(family: str, **grid: Any) -> BenchReport:
    """The report of a tiny pair."""
    asked = BenchRequest("command", "t", "d", "", 40, 1, "random")
    report: BenchReport = shapes.bench_pair(tiny_pair(family), Grid(num_frames=(2,), **grid), asked, Nobody())
    return report


@pytest.mark.parametrize("family", [QWEN25, LLAVA])
def test_the_bench_of_a_pair(family: str) -> None:
    """The real loop, vision, prefill and pruning, with assumed acceptance; nothing is read or preprocessed."""
    report = benched(family, methods=("stock", "plain", "sd", "specvlm"), trees=TREES)
    for summary in report.summaries:
        how = summary.configuration
        assert summary.error is None, how
        assert summary.completion_tokens == 40  # no end of sequence
        assert summary.exact_match is None
        assert (summary.stages.read_s, summary.stages.preprocess_s) == (0.0, 0.0)
        if how.method in ("sd", "specvlm") and how.tree != "auto":
            # eight rounds, and the last is cut
            assert summary.mean_accepted_tokens == pytest.approx(3.9, abs=0.8)
            speedup = summary.speedup("plain")
            assert speedup is not None
            assert speedup.decode is not None
        if how.method == "specvlm" and how.tree != "auto":
            assert 0 < summary.video_tokens_kept <= 0.1 * summary.video_tokens + 1


def test_batches_of_a_pair_have_the_same_caption_length() -> None:
    trees: tuple[TreeName, ...] = ("chain",)
    report = benched(QWEN25, methods=("stock", "plain", "specvlm"), trees=trees, batch_sizes=(1, 3))
    assert report.is_batched
    assert report.conditions.videos == ("random video",)
    assert report.conditions.repeated_to == 3
    for one in report.summaries:
        assert one.error is None
        assert (one.videos, one.completion_tokens, one.exact_match) == (3, 3 * 40, None)
        assert one.stages.preprocess_s < 0.01 * one.total_s
    accepted = [one.mean_accepted_tokens for one in report.summaries if one.num_drafts]
    assert accepted == [pytest.approx(3.9, abs=0.8)] * 2


def test_a_step_reads_weights_once_and_the_keys_and_values_of_every_caption() -> None:
    target, draft = modelled.find_shape("llava-onevision-7b"), modelled.find_shape("llava-onevision-0.5b")
    pair, size = modelled.make_pair(target, draft, 3.0), (384, 384)
    grid = Grid(("plain", "sd", "specvlm"), (32,), trees=("chain",), batch_sizes=(1, 8))
    found = {(one.model, one.batch_size): one for one in shapes.step_bytes(pair, grid, size, 200, 2)}
    assert set(found) == {(name, size) for name in ("target", "draft", "draft 0.9") for size in (1, 8)}
    alone, batch = found["target", 1], found["target", 8]
    slots = 15 + 32 * 196 + 1 + 12 + 100
    assert alone.weight_bytes == batch.weight_bytes
    assert alone.kv_bytes == slots * 2 * 28 * 4 * 128 * 2
    assert batch.kv_bytes == 8 * alone.kv_bytes
    assert batch.kv_share == batch.kv_bytes / (batch.kv_bytes + batch.weight_bytes)
    assert alone.weight_bytes + alone.kv_bytes == modelled.pass_bytes(target.text, slots, 2)
    pruned, whole = found["draft 0.9", 8], found["draft", 8]
    assert pruned.weight_bytes == whole.weight_bytes < alone.weight_bytes
    assert pruned.kv_bytes / whole.kv_bytes == pytest.approx(0.1, abs=0.02)
    without = shapes.step_bytes(replace(pair, draft=None), grid, size, 200, 2)
    assert [one.model for one in without] == ["target"] * 2
    load, bfloat16 = shapes.Load(32, size, 200), torch.bfloat16
    more = shapes.memory_needed(pair, replace(load, batch_size=8), bfloat16)
    more -= shapes.memory_needed(pair, load, bfloat16)
    assert more > 7 * (alone.kv_bytes + found["draft", 1].kv_bytes)


def test_what_cannot_be_modelled_is_refused() -> None:
    pair = modelled.make_pair(tiny_shape(QWEN25), tiny_shape(QWEN25), 1.0)
    for changes, grid, words in (
        ({"accepted": 5.5}, Grid(("plain", "specvlm"), (2,), trees=("static",)), "depth 5"),
        ({}, Grid(num_frames=(2,)), "assisted"),
        ({}, Grid(("plain", "head"), (2,)), "head"),
        ({}, Grid(("plain",)), "num_frames"),
        ({"draft": None}, Grid(("plain", "specvlm"), (2,)), "draft"),
        ({}, Grid(("plain",), (2, 3)), "num_frames=3"),  # before minutes pass in making the models
    ):
        with pytest.raises(ConfigError, match=words):
            shapes.check_setup(replace(pair, **changes), grid, SIZE)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = modelled.make_pair(
        modelled.find_shape("qwen2.5-vl-32b"), modelled.find_shape("qwen2.5-vl-7b"), 3.9
    )
    load = shapes.Load(128, (360, 640), 256)
    needed = shapes.memory_needed(pair, load, torch.bfloat16)
    assert 85e9 < needed < 110e9  # 83.5 GB of weights, 5.2 GB and 1.1 GB of keys and values, the prefill
    monkeypatch.setattr(shapes, "free_memory_bytes", lambda device: 80 << 30)
    with pytest.raises(ConfigError, match=r"32b with qwen2\.5-vl-7b in bfloat16.*GiB.*80 GiB free.*--layers"):
        shapes.refuse_without_memory(pair, load, torch.bfloat16, CPU)
    monkeypatch.setattr(shapes, "free_memory_bytes", lambda device: None)
    shapes.refuse_without_memory(pair, load, torch.bfloat16, CPU)  # unknown: try


# --- the command ---


@pytest.fixture
def tiny_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny shapes by name."""
    monkeypatch.setattr(
        shapes, "find_shape", {"big": tiny_shape(QWEN25, 3), "small": tiny_shape(QWEN25, 1)}.get
    )


PAIR = ("--shape", "big", "--draft-shape", "small", "--assume-accepted", "3.9", "--device", "cpu")
QUICK = ("--frame-size", "56x84", "--num-frames", "2", "--max-new-tokens", "20", "--repeat", "1")


@pytest.mark.usefixtures("tiny_table")
def test_the_script_prints_tables_that_say_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--methods", "plain,specvlm", "--tree", "chain", "--batch-size", "1,2")
    assert shapes.main([*PAIR, *QUICK, *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith("modelled: published shapes with random weights, 3.9 accepted tokens assumed\n")
    assert "Throughput, in wall time" in said
    reads = said.splitlines()[said.splitlines().index("What a step reads") + 2 :]
    assert [line.split()[:3] for line in reads[:3]] == [
        ["target", "2", "1"],
        ["draft", "0.9", "2"],
        ["target", "2", "2"],
    ]
    assert "rounds, so the mean of accepted guesses is not yet the assumed one" in said


@pytest.mark.usefixtures("tiny_table")
def test_the_script_prints_json_without_a_draft(capsys: pytest.CaptureFixture[str]) -> None:
    assert shapes.main(["--shape", "big", "--layers", "1", *QUICK, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["modelled"]
        == "modelled: a published shape with random weights, shrunk to 1 layer of the target"
    )
    assert [one["method"] for one in found["summaries"]] == ["stock", "plain"]
    assert found["conditions"]["command"].startswith("python benchmarks/shapes.py --shape big --layers 1")
    assert found["reads"] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "nope"], "'nope' is unknown"),
        (["--shape", "qwen2.5-vl-7b", "--draft-shape", "qwen2.5-vl-3b"], "--assume-accepted belong together"),
        (["--shape", "qwen2.5-vl-7b", "--methods", "head"], "'head' cannot be modelled"),
        (["--shape", "qwen2.5-vl-7b", "--num-frames", "3"], "num_frames=3 does not suit"),
        (["--shape", "qwen2.5-vl-7b", "--max-new-tokens", "0"], "max_new_tokens=0 is out of range"),
    ],
)
def test_the_script_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert shapes.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
