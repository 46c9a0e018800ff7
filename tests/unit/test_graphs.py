"""Rounds as graphs: what is recorded once serves every later round and video, and nothing that changes is baked in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from specvlm import attention, graphs
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import TREES
from specvlm.errors import NonFiniteLogitsError
from specvlm.graphs import Graphs, index_step
from specvlm.tree import ROOT, STATIC_PATHS, DynamicShape, StaticShape
from tests.emulated_graphs import (
    FORBIDDEN,
    CannotCaptureError,
    Emulator,
    Recorder,
    address,
    emulate,
    held_tensors,
)
from tests.fake_cuda import Case, run_round
from tests.tiny import FamilyName, Size, random_frames, tiny_captioner

FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")
TARGET = Size(layers=2, seed=1, vocabulary=320)
PROMPTS = ("Hi there.", "Look at <video> and tell.", "What? And why? Say more than that of it.")
NEW_TOKENS = 13


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that captions of a few tokens cross several borders, and short prompts have a prefix."""
    monkeypatch.setattr(graphs, "STEP", 8)
    monkeypatch.setattr(attention, "PREFIX_STEP", 8)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 8)


_CAPTIONERS: dict[FamilyName, tuple[Captioner, list[PreparedVideo]]] = {}


def pair(family: FamilyName) -> tuple[Captioner, list[PreparedVideo]]:
    """A captioner whose draft errs at times, and videos; shared, eager when handed out.

    Three videos are of different lengths, the fourth is as long as the first.
    """
    if family not in _CAPTIONERS:
        captioner = tiny_captioner(family, TARGET, TARGET)
        torch.manual_seed(5)
        for parameter in captioner.draft.model.model.parameters():  # type: ignore[union-attr]
            parameter += 0.02 * parameter.std(correction=0) * torch.randn_like(parameter)
        videos = [
            captioner.prepare(random_frames(seed, frames), prompt)
            for seed, (frames, prompt) in enumerate(zip((4, 2, 4, 4), (*PROMPTS, "Hi their."), strict=True))
        ]
        _CAPTIONERS[family] = captioner, videos
    captioner, videos = _CAPTIONERS[family]
    config = captioner.generation_config
    config.repetition_penalty = config.min_new_tokens = config.forced_eos_token_id = None
    config.eos_token_id = []  # captions run to their limit
    for model in (captioner.target, captioner.draft.model):  # type: ignore[union-attr]
        model.graphs, model.round_attention = None, "masked"
    return captioner, videos


def attend(captioner: Captioner, how: attention.RoundAttention) -> None:
    for model in (captioner.target, captioner.draft.model):  # type: ignore[union-attr]
        model.round_attention = how


class Written(NamedTuple):
    """What became of one row."""

    tokens: tuple[int, ...]
    histogram: tuple[int, ...]  # a draft that looks at the wrong things shows here alone


def written(captioner: Captioner, videos: list[PreparedVideo], **options: Any) -> list[Written]:
    options = {"max_new_tokens": NEW_TOKENS} | options
    adaptive = options.get("tree") == "auto"  # trees as the clock has it
    return [
        Written(caption.token_ids, () if adaptive else caption.stats.acceptance_histogram)
        for caption in captioner.caption_rows(videos, **options)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [tree for tree in TREES if tree != "auto"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("rows", [1, 2])
def test_graphs_write_what_eager_rounds_write(
    family: FamilyName, tree: str, temperature: float, penalty: float, rows: int
) -> None:
    """Two jobs in one rig, over growing indices; the second by graphs of the first where lengths are the same."""
    captioner, videos = pair(family)
    captioner.generation_config.repetition_penalty = penalty
    first, other, _, like_first = videos
    jobs = [[first], [like_first]] if rows == 1 else [[first, other], [other, like_first]]
    options: dict[str, Any] = {"tree": tree, "temperature": temperature}
    if rows == 2:  # one row ends before the other
        captioner.generation_config.eos_token_id = [
            written(captioner, videos[:1], **options)[0].tokens[NEW_TOKENS // 2]
        ]
    eager = [written(captioner, job, seed=seed, **options) for seed, job in enumerate(jobs)]
    emulator = emulate(captioner)
    attend(captioner, "split" if (temperature > 0) == (rows == 1) else "masked")
    graphed = [written(captioner, job, seed=seed, **options) for seed, job in enumerate(jobs)]
    assert graphed == eager
    assert emulator.replayed >= 6


@pytest.mark.parametrize("tree", ["chain", "dynamic"])
def test_a_long_caption_looks_further_and_further(tree: str) -> None:
    """Six borders of the index; twice, so that each stretch has been captured before."""
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree=tree, max_new_tokens=45)
    emulate(captioner)
    for _ in range(2):
        assert written(captioner, videos[:1], tree=tree, max_new_tokens=45) == eager


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_rounds_and_trees_that_change_share_a_rig(family: FamilyName) -> None:
    """Plain, `auto`, rules that come and go, and another limit, one after the other over the same slabs."""
    captioner, videos = pair(family)
    kinds: list[dict[str, Any]] = [
        {"speculate": False},
        {"tree": "auto"},
        {"min_new_tokens": 9},
        {"forced_eos_token_id": 7},
        {"forced_eos_token_id": 7, "max_new_tokens": 13},
        {"speculate": False, "temperature": 0.9, "seed": 2**40 + 3},
        {"temperature": 0.9, "seed": 2**40 + 4, "top_k": 4},
        {"prune_ratio": 0.0},
    ]

    def run() -> list[list[Written]]:
        texts = []
        for kind in kinds:
            given = dict(kind)
            for name in ("min_new_tokens", "forced_eos_token_id"):
                setattr(captioner.generation_config, name, given.pop(name, None))
            texts.append(written(captioner, videos[:1], **({"tree": "chain", "depth": 3} | given)))
        return texts

    eager = run()
    emulator = emulate(captioner)
    assert run() == eager
    slabs, replayed = kept_slabs(captioner), emulator.replayed
    assert run() == eager
    assert kept_slabs(captioner) is slabs
    assert emulator.replayed > 2 * replayed


def kept_slabs(captioner: Captioner) -> Any:
    assert captioner.target.graphs is not None
    assert captioner.target.graphs._kept is not None
    return captioner.target.graphs._kept.slabs


def test_prompts_that_share_a_video_share_its_rig() -> None:
    """One cache for several prompts of one video, then another video's: the same slabs."""
    captioner, _ = pair("llava")

    def run() -> list[tuple[int, ...]]:
        return [
            caption.token_ids
            for seed in (1, 2)
            for caption in captioner.caption_prompts(
                random_frames(seed), PROMPTS, tree="static", max_new_tokens=NEW_TOKENS
            )
        ]

    eager = run()
    emulator = emulate(captioner)
    assert run() == eager
    slabs, recorded = kept_slabs(captioner), len(emulator.captured)
    assert run() == eager
    assert kept_slabs(captioner) is slabs
    assert emulator.replayed > 3 * recorded


def test_a_second_video_needs_no_more_graphs() -> None:
    """Another video, of the same size or a little shorter: replayed from its first round on."""
    captioner, videos = pair("qwen")
    emulator = emulate(captioner)
    for _ in range(2):
        written(captioner, videos[:1], tree="chain")
    recorded, replayed = len(emulator.captured), emulator.replayed
    other = captioner.prepare(random_frames(77), "Hi their.")
    rounds = captioner.caption(other, tree="chain", max_new_tokens=NEW_TOKENS).stats.num_drafts
    assert len(emulator.captured) == recorded
    assert emulator.replayed - replayed == 3 * rounds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [tree for tree in TREES if tree != "auto"])
def test_graphs_read_nothing_that_nobody_keeps(family: FamilyName, tree: str) -> None:
    """Weights, slabs, tensors in their places, constants of the tree, and what the stages before them gave."""
    captioner, videos = pair(family)
    captioner.generation_config.repetition_penalty = 1.2
    captioner.generation_config.min_new_tokens = 3
    emulator = emulate(captioner)
    written(captioner, videos[:1], tree=tree, temperature=0.7)
    target, draft = captioner.target, captioner.draft.model  # type: ignore[union-attr]
    assert target.graphs is not None
    assert draft.graphs is not None
    rig, small = target.graphs._kept, draft.graphs._kept
    assert rig is not None
    assert small is not None
    kept = [
        *rig.slabs.by_device.values(),
        *small.slabs.by_device.values(),
        *rig.rig._tensors.values(),
        *(
            tensor
            for model in (target, draft)
            for tensor in (*model.model.parameters(), *model.model.buffers())
        ),
        *held_tensors([key[0] for key in rig.rig._rounds]),  # type: ignore[index]
    ]
    known = {address(tensor) for tensor in kept}
    assert emulator.captured
    for number, recorder in enumerate(emulator.captured):
        before = emulator.captured[number - number % 3 : number]
        mine = known | {made for earlier in before for made in earlier.made}
        strangers = {where: tensor.shape for where, tensor in recorder.read.items() if where not in mine}
        assert not strangers, number


def test_the_emulator_finds_a_stranger() -> None:
    """A tensor made for one job alone is none of those that the test above knows."""
    stranger, recorder = torch.ones(3), Recorder()
    with recorder:
        stranger + 1
    assert address(stranger) in recorder.read


def test_a_longer_video_gets_larger_slabs_and_new_graphs() -> None:
    captioner, videos = pair("llava")
    short, long = videos[1], captioner.prepare(random_frames(9, 12), PROMPTS[2])
    eager = [written(captioner, [video], tree="static") for video in (short, long, short)]
    emulate(captioner)
    attend(captioner, "split")
    slabs = []
    for video, text in zip((short, long, short), eager, strict=True):
        assert written(captioner, [video], tree="static") == text
        slabs.append(kept_slabs(captioner))
    assert slabs[0] is not slabs[1]
    assert slabs[0].capacity < slabs[1].capacity
    assert slabs[2] is slabs[1]


def test_a_draft_in_other_slabs_gets_other_graphs() -> None:
    """The target's slabs stay; graphs that look into the draft's old ones are of no use."""
    captioner, videos = pair("qwen")
    eager = [written(captioner, [video], tree="chain") for video in (videos[0], videos[3])]
    emulate(captioner)
    for video, expected in zip((videos[0], videos[3]), eager, strict=True):
        assert written(captioner, [video], tree="chain") == expected
        captioner.draft.model.graphs._kept = None  # type: ignore[union-attr]
    assert eager[0] != eager[1]


@pytest.mark.parametrize("how", ["masked", "split"])
def test_a_longer_prompt_in_the_same_slabs_gets_graphs_that_see_all_of_it(
    how: attention.RoundAttention,
) -> None:
    """Slabs that stay from the beginning; the short prompt's graphs look less far than the other needs."""
    captioner, videos = pair("qwen")
    short, *_, long = sorted(videos, key=lambda video: video.inputs.prompt_tokens)
    assert long.inputs.prompt_tokens - short.inputs.prompt_tokens > graphs.STEP
    jobs: list[tuple[PreparedVideo, dict[str, Any]]] = [
        (short, {"speculate": False}),
        (long, {"speculate": False}),
        (long, {"tree": "chain", "prune_ratio": 1.0}),  # one target's prompt, and two of the draft's
        (long, {"tree": "chain", "prune_ratio": 0.0}),
    ]
    eager = [written(captioner, [video], **options) for video, options in jobs]
    emulate(captioner)
    for model in (captioner.target, captioner.draft.model):  # type: ignore[union-attr]
        model.new_cache(1, 400)
    attend(captioner, how)
    assert [written(captioner, [video], **options) for video, options in jobs] == eager


def test_what_a_broken_video_left_in_the_slabs_does_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree="static")
    emulate(captioner)
    written(captioner, videos[:1], tree="static")
    with monkeypatch.context() as broken:
        broken.setattr(captioner.target, "logits", lambda hidden: hidden.new_full((1, 1, 320), float("nan")))
        with pytest.raises(NonFiniteLogitsError):
            written(captioner, videos[:1], tree="static")
    for model in (captioner.target, captioner.draft.model):  # type: ignore[union-attr]
        assert model.graphs is not None
        assert model.graphs._kept is not None
        for slab in model.graphs._kept.slabs.by_device.values():
            with torch.inference_mode():
                slab.fill_(float("nan"))
    assert written(captioner, videos[:1], tree="static") == eager


def test_captions_that_run_in_turns_do_not_share_slabs() -> None:
    """Two streams of one captioner, a piece of each at a time: the second runs eagerly in memory of its own."""
    captioner, videos = pair("qwen")
    eager = [captioner.caption(video, max_new_tokens=NEW_TOKENS).text for video in videos[:2]]
    emulate(captioner)
    captioner.caption(videos[0], max_new_tokens=NEW_TOKENS)
    streams = [captioner.stream(video, max_new_tokens=NEW_TOKENS) for video in videos[:2]]
    texts = ["", ""]
    going: list[tuple[int, Iterator[str]]] = list(enumerate(streams))
    while going:
        for number, stream in list(going):
            piece = next(stream, None)
            if piece is None:
                going.remove((number, stream))
            texts[number] += piece or ""
    assert [text.strip() for text in texts] == eager


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_failed_capture_costs_a_warning_and_nothing_else(stage: int) -> None:
    captioner, videos = pair("llava")
    eager = [written(captioner, [video], tree="dynamic", temperature=0.7) for video in videos]
    emulator = emulate(captioner)
    emulator.fails_at = stage
    with pytest.warns(RuntimeWarning, match="CannotCaptureError: no graph today"):
        graphed = [written(captioner, videos[:1], tree="dynamic", temperature=0.7)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed += [written(captioner, [video], tree="dynamic", temperature=0.7) for video in videos[1:]]
    assert graphed == eager
    assert (len(emulator.captured), emulator.replayed) == (stage, 0)


def test_plain_steps_are_timed_by_graphs_too() -> None:
    """Rewound to earlier tokens, and the caption is what it was."""
    captioner, videos = pair("qwen")
    eager = captioner.caption(videos[0], tree="chain", max_new_tokens=NEW_TOKENS)
    emulate(captioner)
    captioner.plain_estimate = type(captioner.plain_estimate)()
    for _ in range(3):
        caption = captioner.caption(videos[0], tree="chain", max_new_tokens=NEW_TOKENS, estimate=True)
        assert caption.token_ids == eager.token_ids


def test_the_round_used_least_lately_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_ROUNDS", 2)
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree="chain", max_new_tokens=30)
    emulate(captioner)
    assert written(captioner, videos[:1], tree="chain", max_new_tokens=30) == eager
    rig = captioner.target.graphs._kept.rig  # type: ignore[union-attr]
    assert [key[1].longest for key in rig._rounds] == [24, 32]  # type: ignore[index]


def test_an_index_is_told_in_steps() -> None:
    assert [index_step(index) for index in (0, 1, 7, 8, 15, 16)] == [8, 8, 8, 16, 16, 24]


def test_a_job_that_is_over_gives_its_slabs_back() -> None:
    """At once, not when a collector comes by."""
    captioner, videos = pair("qwen")
    emulate(captioner)
    captioner.caption(videos[0], tree="chain", max_new_tokens=NEW_TOKENS)
    assert captioner.target.graphs._kept.holder() is None  # type: ignore[union-attr]


def test_a_place_keeps_its_address_until_its_shape_changes() -> None:
    rig = graphs.Rig(Graphs(lambda _: Emulator()), Emulator())
    first = rig.place("x", torch.tensor([1, 2]))
    assert rig.place("x", torch.tensor([3, 4])) is first
    assert first.tolist() == [3, 4]
    rig.stages("round", [lambda _: first + 1])
    assert rig._rounds
    assert rig.place("x", torch.tensor([1, 2, 3])) is not first
    assert not rig._rounds


def test_the_emulator_refuses_what_a_capture_refuses() -> None:
    def asks(_: Any) -> int:
        return int(torch.ones(3).sum())

    with pytest.raises(CannotCaptureError, match="_local_scalar_dense"):
        Emulator()(asks, None)


def test_a_recording_changes_nothing_and_bakes_what_the_host_knew() -> None:
    """What graphs do to numbers and tensors, so that the tests above mean something."""
    number, tensor = [1], torch.tensor([10])
    recorded = Emulator()(lambda _: tensor.add_(number[0]) * 2, None)
    assert tensor.tolist() == [10]
    number[0] = 5
    tensor.fill_(20)
    recorded.replay()
    assert (tensor.tolist(), recorded.output.tolist()) == ([21], [42])


SHAPES = {
    "root": ROOT,
    "chain": StaticShape(tuple((0,) * depth for depth in range(1, 4)), torch.device("cpu")),
    "static": StaticShape(STATIC_PATHS, torch.device("cpu"), ranks=4),
    "dynamic": DynamicShape(4, 20, 3, torch.device("cpu")),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["masked", "split"])
@pytest.mark.parametrize(
    ("family", "dtype", "exact", "trimmed"),
    [
        ("qwen", torch.bfloat16, False, True),
        ("llava", torch.float32, False, False),
        ("llava", torch.bfloat16, True, True),
    ],
)
def test_a_round_on_cuda_stays_there(
    shape: str,
    how: attention.RoundAttention,
    family: FamilyName,
    dtype: torch.dtype,
    exact: bool,
    trimmed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No operation touches the host's memory or asks for a value, and none copies the cache."""
    flash = dtype == torch.bfloat16
    monkeypatch.setattr(attention, "_cuda_kernels", lambda *_: attention._Kernels(flash, True))
    seen = run_round(Case(family, SHAPES[shape], how, dtype, exact, trimmed), 4000)
    assert seen.elsewhere == set()
    assert [name for name in seen.names if any(word in name for word in FORBIDDEN)] == []
    if how == "split":  # the mask of `masked` is as long as the prompt
        assert seen.largest < 4000 * 2 * 16  # one row's keys in one layer
    parts = how == "split" and not (exact and shape == "root")
    assert ("aten._scaled_dot_product_efficient_attention.default" in seen.names) == parts
    assert ("aten._scaled_dot_product_flash_attention.default" in seen.names) == (parts and flash)
