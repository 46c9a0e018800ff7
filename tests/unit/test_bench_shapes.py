"""Models of published shapes: sizes, buffers, prompts; acceptance that is told; and the bench of the two."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from specvlm.bench.grid import Grid
from specvlm.bench.measure import Asked
from specvlm.bench.modelled import (
    ForcedAcceptance,
    Load,
    ModelledCaptioner,
    ModelledSetup,
    bench_modelled,
    build_pair,
    check_setup,
    make_pair,
    memory_needed,
    modelled_video,
    refuse_without_memory,
    step_bytes,
    survival,
)
from specvlm.bench.records import Configuration, Report
from specvlm.bench.shapes import build, empty_model, frame_size_of, parameter_count, random_inputs, shrunk
from specvlm.bench.suite import Step
from specvlm.config import TREES, SpeculationSettings, TreeName
from specvlm.errors import ConfigError
from specvlm.families import family_of
from specvlm.published import (
    LLAVA,
    QWEN25,
    SHAPES,
    Shape,
    TextShape,
    VisionShape,
    find_shape,
    video_tokens,
)
from specvlm.tree import Guesses, make_shape
from specvlm.verify import accept
from tests.emulated_graphs import emulate
from tests.tiny import processor_for, random_frames

CPU = torch.device("cpu")
SIZE = (56, 84)
SIZES = {QWEN25: SIZE, LLAVA: (384, 384)}
BILLIONS = {  # as the hub tells of the weights
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


def tiny_shape(family: str, layers: int = 2, width: int = 64, vocabulary: int = 320) -> Shape:
    """A shape of a family in small: the same proportions of a head, the same patches."""
    text = TextShape(width, 2 * width, layers, width // 16, 2, vocabulary, tied=False)
    return Shape(f"tiny-{family}", "", family, text, VisionShape(2, 32, 64, 2), 0, 290)


def tiny_pair(family: str, accepted: float = 3.9) -> ModelledCaptioner:
    pair = make_pair(tiny_shape(family, layers=3), tiny_shape(family, layers=1, vocabulary=300), accepted)
    return build_pair(pair, CPU, torch.float32)


def guesses_of(tree: Any, vocabulary: int = 97, rows: int = 1, seed: int = 0) -> Guesses:
    """A tree of random guesses."""
    generator = torch.Generator().manual_seed(seed)
    shape = make_shape(SpeculationSettings(tree=tree), vocabulary, CPU)

    def expand(frontier: Any) -> torch.Tensor:
        return 8.0 * torch.randn(*frontier.tokens.shape, vocabulary, generator=generator)

    return shape.grow(torch.zeros(rows, dtype=torch.long), expand)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_parameters_are_as_published(shape: Shape) -> None:
    count = parameter_count(shape)
    assert count == shape.parameters
    assert count == pytest.approx(BILLIONS[shape.name] * 1e9, rel=0.01)


def test_counting_takes_no_memory() -> None:
    """72 billion parameters pass through no host memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameter_count(find_shape("qwen2.5-vl-72b"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


def test_an_unknown_shape_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"qwen2\.5-vl-33b.*unknown.*qwen2\.5-vl-32b"):
        find_shape("qwen2.5-vl-33b")


@pytest.mark.parametrize("family", [QWEN25, LLAVA])
def test_a_built_model_has_the_buffers_of_an_ordinary_one(family: str, tmp_path: Any) -> None:
    """Rotary frequencies above all, in their own dtype; every parameter is real and finite."""
    ours = build(tiny_shape(family), CPU, torch.bfloat16).model
    ours.save_pretrained(tmp_path)
    theirs = type(ours).from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dict(theirs.named_buffers())
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


def test_tied_weights_stay_one() -> None:
    shape = tiny_shape(QWEN25)
    model = build(replace(shape, text=replace(shape.text, tied=True)), CPU, torch.float32).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_of_two_layers_differ() -> None:
    layers = build(tiny_shape(QWEN25), CPU, torch.float32).model.model.language_model.layers
    first, second = (layer.self_attn.q_proj.weight for layer in layers)
    assert not torch.equal(first, second)
    assert not torch.equal(first[:32], layers[0].self_attn.k_proj.weight)


def test_shrinking_keeps_width_and_proportion() -> None:
    target, draft = find_shape("qwen2.5-vl-32b"), find_shape("qwen2.5-vl-7b")
    pair = make_pair(target, draft, 3.9, layers=8)
    assert pair.target.text == replace(target.text, layers=8)
    assert pair.target.vision.depth == 4
    assert pair.draft is not None
    assert pair.draft.text.layers == 4  # 28 * 8 / 64, rounded
    assert make_pair(target, draft, 3.9, layers=1).draft == shrunk(draft, 1, 64)
    assert "8 layers" in pair.label
    assert shrunk(target, 64, 64) == target


@pytest.mark.parametrize("layers", [0, 65, -1])
def test_layers_that_a_target_cannot_have_are_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match="1 to 64"):
        make_pair(find_shape("qwen2.5-vl-32b"), None, 3.9, layers)


def test_a_draft_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="family"):
        make_pair(find_shape("qwen2.5-vl-7b"), find_shape("llava-onevision-0.5b"), 3.9)


# --- prompts ---


def test_a_prompt_is_like_the_processors() -> None:
    """Same names, dtypes and ranks as the real processors give; video tokens in one run, as many as features."""
    for family, name in ((QWEN25, "qwen"), (LLAVA, "llava")):
        shape = tiny_shape(family)
        inputs = random_inputs(shape, 4, SIZES[family], CPU)
        lm = build(shape, CPU, torch.float32)
        real = family_of(lm.model.config, "").prepare(processor_for(name), random_frames(1), "Hi.")  # type: ignore[arg-type]
        assert {key: (value.dtype, value.ndim) for key, value in inputs.tensors.items()} == {
            key: (value.dtype, value.ndim) for key, value in real.tensors.items()
        }
        with torch.inference_mode():
            assert len(lm.family.see(lm.model, [inputs])[0].embeds) == inputs.video_tokens
        assert lm.positions(inputs).shape[1] == inputs.prompt_tokens
        assert torch.equal((inputs.token_ids[0] == shape.video_token).nonzero().squeeze(1), inputs.video_at)


@pytest.mark.parametrize(("frames", "tokens"), [(16, 2392), (128, 19136)])
def test_qwen_counts_video_tokens_as_its_processor(frames: int, tokens: int) -> None:
    """360 x 640 becomes 364 x 644: 13 x 23 tokens for two frames."""
    assert video_tokens(find_shape("qwen2.5-vl-7b"), frames, (360, 640)) == tokens


def test_llava_has_196_tokens_a_frame_and_a_newline() -> None:
    assert video_tokens(find_shape("llava-onevision-7b"), 32, (1, 1)) == 32 * 196 + 1


@pytest.mark.parametrize(("frames", "size"), [(3, SIZE), (0, SIZE), (4, (20, 84))])
def test_frames_that_do_not_fit_are_refused(frames: int, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="give"):
        random_inputs(tiny_shape(QWEN25), frames, size, CPU)


def test_llavas_frames_have_one_size() -> None:
    with pytest.raises(ConfigError, match=r"360x640.*384x384; leave it out"):
        random_inputs(tiny_shape(LLAVA), 2, (360, 640), CPU)
    assert frame_size_of(find_shape("llava-onevision-7b")) == (384, 384)
    assert frame_size_of(find_shape("qwen2.5-vl-7b")) == (360, 640)


# --- acceptance ---


@pytest.mark.parametrize("mean", [0.0, 0.4, 2.5, 3.9, 4.95, 5.0])
@pytest.mark.parametrize("rounds", [60, 2000])
def test_accepted_guesses_have_the_mean_that_was_asked_for(mean: float, rounds: int) -> None:
    forced = ForcedAcceptance(mean, 5, CPU)
    guesses, choices = guesses_of("static"), torch.full((1, 26), 96)
    got = [int(forced(guesses, choices, 5).guessed) for _ in range(rounds)]
    assert sum(got) / rounds == pytest.approx(mean, rel=0.02 if rounds == 2000 else 0.06, abs=0.02)
    assert max(got) <= 5


def test_the_number_of_accepted_guesses_is_geometric() -> None:
    chance = survival(3.9, 5)
    forced = ForcedAcceptance(3.9, 5, CPU)
    guesses, choices = guesses_of("chain"), torch.full((1, 6), 96)
    got = torch.tensor([int(forced(guesses, choices, 5).guessed) for _ in range(2000)])
    for least in range(1, 6):
        assert float((got >= least).float().mean()) == pytest.approx(chance**least, abs=0.01)


def test_a_deeper_tree_accepts_more_with_the_same_draft() -> None:
    """One q for all depths: what a chooser of trees would see of one draft."""
    forced = ForcedAcceptance(3.9, 5, CPU)
    shape = make_shape(SpeculationSettings(tree="chain", depth=9), 97, CPU)
    deep = shape.grow(torch.zeros(1, dtype=torch.long), lambda f: torch.randn(*f.tokens.shape, 97))
    got = [int(forced(deep, torch.full((1, 10), 96), 9).guessed) for _ in range(2000)]
    expected = sum(survival(3.9, 5) ** k for k in range(1, 10))
    assert sum(got) / len(got) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_accepted_is_a_path_of_the_tree(tree: str, rows: int) -> None:
    """From the root down, guesses as drafted, and then the target's own choice, even where a child equals it."""
    forced = ForcedAcceptance(2.5, 5, CPU)
    for seed in range(20):
        guesses = guesses_of(tree, rows=rows, seed=seed)
        choices = torch.randint(0, 97, guesses.tokens.shape, generator=torch.Generator().manual_seed(seed))
        if seed % 2:  # the target agrees with every first child: without being told, all would be accepted
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
        forced, guesses = ForcedAcceptance(5.0, 5, CPU), guesses_of(tree)
        path = forced(guesses, torch.full(guesses.tokens.shape, 96), 5).path[0].tolist()
        firsts = [0]
        for _ in range(5):
            firsts.append(next(i for i in range(1, 26) if int(guesses.parents[0, i]) == firsts[-1]))
        assert path == firsts


def test_rounds_move_on_without_the_host_and_begin_anew() -> None:
    forced = ForcedAcceptance(2.5, 5, CPU)
    guesses, choices = guesses_of("static"), torch.full((1, 26), 96)
    first = [int(forced(guesses, choices, 5).guessed) for _ in range(12)]
    assert len(set(first)) > 2
    forced.restart()
    assert [int(forced(guesses, choices, 5).guessed) for _ in range(12)] == first


def test_a_round_without_guesses_is_the_real_one() -> None:
    forced, choices = ForcedAcceptance(3.9, 5, CPU), torch.tensor([[7]])
    root = guesses_of("chain")
    alone = root._replace(tokens=root.tokens[:, :1])
    assert all(map(torch.equal, forced(alone, choices, 0), accept(alone, choices, 0)))


@pytest.mark.parametrize("mean", [6.0, -0.1, float("nan")])
def test_a_mean_that_no_tree_of_the_depth_gives_is_refused(mean: float) -> None:
    with pytest.raises(ConfigError, match=r"assume_accepted=.*depth 5.*0 to 5"):
        ForcedAcceptance(mean, 5, CPU)


# --- the bench ---


class Nobody:
    """Listens to nothing."""

    def step(self, step: Step) -> None: ...

    def left_out(self, left: Any) -> None: ...

    def failed(self, how: Configuration, error: str) -> None:
        raise AssertionError(f"{how.label}: {error}")


def modelled(family: str, **grid: Any) -> Report:
    captioner = tiny_pair(family)
    setup = ModelledSetup(Grid(**grid), SIZES[family], Asked("command", "t", "d", "", 40, 1, "random"))
    return bench_modelled(captioner, setup, Nobody())


@pytest.mark.parametrize("family", [QWEN25, LLAVA])
def test_the_bench_of_a_pair(family: str) -> None:
    """The real loop, vision, prefill and pruning; acceptance as told; labelled in every form."""
    fixed = tuple(tree for tree in TREES if tree != "auto")
    report = modelled(family, methods=("stock", "plain", "sd", "specvlm"), num_frames=(2,), trees=fixed)
    assert report.modelled
    assert report.as_json()["modelled"] is True
    assert "modelled" in report.label
    assert "3.9" in report.label
    for summary in report.summaries:
        assert summary.error is None, summary.configuration
        assert summary.completion_tokens == 40  # no end of sequence
        assert summary.exact_match is None
        if summary.configuration.method in ("sd", "specvlm"):
            assert summary.mean_accepted_tokens == pytest.approx(
                3.9, abs=0.8
            )  # eight rounds, and the last is cut
            speedup = summary.speedup("plain")
            assert speedup is not None
            assert speedup.decode is not None
        if summary.configuration.method == "specvlm":
            assert 0 < summary.video_tokens_kept <= 0.1 * summary.video_tokens + 1
    json.dumps(report.as_json(samples=True), allow_nan=False)


def test_batches_of_a_pair_have_the_same_caption_length_and_their_bytes() -> None:
    trees: tuple[TreeName, ...] = ("chain",)
    report = modelled(
        QWEN25, methods=("stock", "plain", "specvlm"), num_frames=(2,), trees=trees, batch_sizes=(1, 3)
    )
    assert report.is_batched
    assert report.conditions.videos == ("random video",)
    assert report.conditions.repeated_to == 3
    for one in report.summaries:
        assert one.error is None
        assert (one.videos, one.completion_tokens, one.exact_match) == (3, 3 * 40, None)
        assert one.videos_per_hour is not None
    accepted = [one.mean_accepted_tokens for one in report.summaries if one.num_drafts]
    assert accepted == [pytest.approx(3.9, abs=0.8)] * 2
    assert [(one.model, one.batch_size) for one in report.reads] == [
        *(("target", 1), ("draft 0.9", 1), ("target", 3), ("draft 0.9", 3))
    ]
    assert report.as_json()["reads"][0]["frames_asked"] == 2


def test_a_step_reads_weights_once_and_the_keys_and_values_of_every_caption() -> None:
    pair = make_pair(find_shape("llava-onevision-7b"), find_shape("llava-onevision-0.5b"), 3.0)
    grid = Grid(("plain", "sd", "specvlm"), (32,), trees=("chain",), batch_sizes=(1, 8))
    found = {(one.model, one.batch_size): one for one in step_bytes(pair, grid, (384, 384), 200, 2)}
    assert set(found) == {(name, size) for name in ("target", "draft", "draft 0.9") for size in (1, 8)}
    alone, batch = found["target", 1], found["target", 8]
    seen = 32 * 196 + 1
    assert alone.weight_bytes == batch.weight_bytes == pair.target.text.pass_bytes(0, 2)
    assert alone.kv_bytes == (15 + seen + 12 + 100) * 2 * 28 * 4 * 128 * 2
    assert batch.kv_bytes == 8 * alone.kv_bytes
    assert batch.kv_share == batch.kv_bytes / (batch.kv_bytes + batch.weight_bytes)
    assert alone.weight_bytes + alone.kv_bytes == pair.target.text.pass_bytes(15 + seen + 12 + 100, 2)
    pruned, whole = found["draft 0.9", 8], found["draft", 8]
    assert pruned.weight_bytes == whole.weight_bytes < alone.weight_bytes
    assert pruned.kv_bytes / whole.kv_bytes == pytest.approx(0.1, abs=0.02)
    assert [one.model for one in step_bytes(replace(pair, draft=None), grid, (384, 384), 200, 2)] == [
        "target"
    ] * 2
    load = Load(32, (384, 384), 200)
    more = memory_needed(pair, replace(load, batch_size=8), torch.bfloat16) - memory_needed(
        pair, load, torch.bfloat16
    )
    assert more > 7 * (alone.kv_bytes + found["draft", 1].kv_bytes)


def test_auto_runs_with_forced_acceptance() -> None:
    if "auto" not in TREES:
        pytest.skip("no such tree")
    report = modelled(QWEN25, methods=("plain", "specvlm"), num_frames=(2,), trees=("auto",))
    assert report.summaries[-1].error is None
    assert report.summaries[-1].completion_tokens == 40


def test_what_cannot_be_modelled_is_refused() -> None:
    pair = make_pair(tiny_shape(QWEN25), tiny_shape(QWEN25), 5.5)
    with pytest.raises(ConfigError, match="depth 5"):
        check_setup(pair, Grid(methods=("plain", "specvlm"), num_frames=(2,), trees=("static",)), SIZE)
    with pytest.raises(ConfigError, match="assisted"):
        check_setup(replace(pair, accepted=1.0), Grid(num_frames=(2,)), SIZE)
    with pytest.raises(ConfigError, match="num_frames"):
        check_setup(replace(pair, accepted=1.0), Grid(methods=("plain",)), SIZE)
    with pytest.raises(ConfigError, match="draft"):
        check_setup(replace(pair, draft=None), Grid(methods=("plain", "specvlm"), num_frames=(2,)), SIZE)
    with pytest.raises(ConfigError, match="num_frames=3"):  # before minutes pass in making the models
        check_setup(replace(pair, accepted=1.0), Grid(methods=("plain",), num_frames=(2, 3)), SIZE)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(find_shape("qwen2.5-vl-32b"), find_shape("qwen2.5-vl-7b"), 3.9)
    load = Load(128, (360, 640), 256)
    needed = memory_needed(pair, load, torch.bfloat16)
    assert 85e9 < needed < 110e9  # 83.5 GB of weights, 5.2 GB and 1.1 GB of keys and values, the prefill
    monkeypatch.setattr("specvlm.bench.modelled.free_memory_bytes", lambda device: 80 << 30)
    with pytest.raises(ConfigError, match=r"32b with qwen2\.5-vl-7b in bfloat16.*GiB.*80 GiB free.*--layers"):
        refuse_without_memory(pair, load, torch.bfloat16, CPU)
    monkeypatch.setattr("specvlm.bench.modelled.free_memory_bytes", lambda device: None)
    refuse_without_memory(pair, load, torch.bfloat16, CPU)  # nobody knows: try
    refuse_without_memory(make_pair(tiny_shape(QWEN25), None, 0.0), load, torch.float32, CPU)


def test_bytes_of_a_pass_are_those_of_the_decoder() -> None:
    shape = find_shape("qwen2.5-vl-7b")
    small = replace(shape, text=replace(shape.text, layers=1))
    model = empty_model(small, torch.bfloat16)
    decoder = sum(p.numel() for p in model.model.language_model.layers.parameters())
    rest = model.model.language_model.norm.weight.numel() + model.get_output_embeddings().weight.numel()
    assert small.text.pass_bytes(0, 2) == 2 * (decoder + rest)
    assert (
        small.text.pass_bytes(10, 2) - small.text.pass_bytes(0, 2) == 10 * 2 * 2 * 4 * 128
    )  # K and V, 4 heads
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)


def test_a_video_is_the_same_for_a_seed() -> None:
    captioner = tiny_pair(QWEN25)
    first, again, other = (modelled_video(captioner, 2, SIZE, seed) for seed in (1, 1, 2))
    key = "pixel_values_videos"
    assert torch.equal(first.inputs.tensors[key], again.inputs.tensors[key])
    assert not torch.equal(first.inputs.tensors[key], other.inputs.tensors[key])


@pytest.mark.parametrize("tree", ["static", "dynamic"])
def test_told_acceptance_moves_on_in_a_replayed_round(tree: TreeName) -> None:
    """Rounds as graphs ask nothing of the host and write what eager rounds write, caption after caption."""
    captioner = tiny_pair(QWEN25)
    video = modelled_video(captioner, 2, SIZE)

    def caption() -> tuple[tuple[int, ...], tuple[int, ...]]:
        made = captioner.caption(video, tree=tree, max_new_tokens=40)
        return made.token_ids, made.stats.acceptance_histogram

    eager = caption()
    emulator = emulate(captioner)
    assert [caption() for _ in range(3)] == [eager] * 3
    assert emulator.replayed > 20
    assert sum(eager[1]) > eager[1][-1]  # rounds differ
