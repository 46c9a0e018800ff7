"""Rounds as graphs: what is recorded once serves every later round and video, and nothing that changes is baked in."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from specvlm import attention, decode, graphs
from specvlm.cache import rounded
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import TREES
from specvlm.errors import NonFiniteLogitsError
from specvlm.model import Lengths
from specvlm.tree import ROOT, STATIC_PATHS, DynamicShape, StaticShape
from tests.emulated_graphs import (
    CannotCaptureError,
    Emulator,
    Recorder,
    address,
    attend_by,
    caches_of,
    emulate,
    kept_decoders,
    rig_of,
    run_eagerly,
    slabs_of,
    strangers,
)
from tests.fake_cuda import Case, round_that_stays
from tests.tiny import FamilyName, Size, caption_rows, random_frames, tiny_captioner

FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")
TARGET = Size(layers=2, seed=1, vocabulary=320)
PROMPTS = ("Hi there.", "Look at <video> and tell.", "What? And why? Say more than that of it.")
NEW_TOKENS = 13


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that captions of a few tokens cross several borders, and short prompts have a prefix."""
    monkeypatch.setattr(decode, "TOLD_STEP", 8)
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
    run_eagerly(captioner)
    return captioner, videos


class Written(NamedTuple):
    """What became of one row."""

    tokens: tuple[int, ...]
    histogram: tuple[int, ...]  # a draft that looks at the wrong things shows here alone


def written(captioner: Captioner, videos: list[PreparedVideo], **options: Any) -> list[Written]:
    options = {"max_new_tokens": NEW_TOKENS} | options
    adaptive = options.get("tree") == "auto"  # trees as the clock has it
    return [
        Written(caption.token_ids, () if adaptive else caption.stats.acceptance_histogram)
        for caption in caption_rows(captioner, videos, **options)
    ]


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [tree for tree in TREES if tree != "auto"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("rows", [1, 2])
def test_graphs_write_what_eager_rounds_write(
    family: FamilyName, tree: str, temperature: float, penalty: float, rows: int
) -> None:
    """Two batches in one rig; the second by graphs of the first where lengths are the same."""
    captioner, videos = pair(family)
    captioner.generation_config.repetition_penalty = penalty
    first, other, _, like_first = videos
    batches = [[first], [like_first]] if rows == 1 else [[first, other], [like_first, other]]
    options: dict[str, Any] = {"tree": tree, "temperature": temperature, "seed": 3}
    if rows == 2:  # one row ends before the other
        captioner.generation_config.eos_token_id = [
            written(captioner, videos[:1], **options)[0].tokens[NEW_TOKENS // 2]
        ]
    eager = [written(captioner, batch, **options) for batch in batches]
    emulator = emulate(captioner)
    attend_by(captioner, "split" if (temperature > 0) == (rows == 1) else "masked")
    graphed = [written(captioner, batch, **options) for batch in batches]
    assert graphed == eager
    assert emulator.replayed >= 3


@pytest.mark.parametrize("tree", ["chain", "dynamic"])
def test_a_long_caption_looks_further_and_further(tree: str) -> None:
    """Six borders of the index; twice, so that each stretch has been captured before."""
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree=tree, max_new_tokens=45)
    emulate(captioner)
    for _ in range(2):
        assert written(captioner, videos[:1], tree=tree, max_new_tokens=45) == eager


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_round_is_what_it_is_eagerly(family: FamilyName) -> None:
    """Plain, `auto`, rules that come and go, another limit and another seed: three times each, in one captioner."""
    captioner, videos = pair(family)
    kinds: list[dict[str, Any]] = [
        {"speculate": False},
        {"tree": "auto"},
        {"min_new_tokens": 9},
        {"forced_eos_token_id": 7},
        {"forced_eos_token_id": 7, "max_new_tokens": 12},
        {"speculate": False, "temperature": 0.9, "seed": 2**40 + 3},
        {"temperature": 0.9, "seed": 2**40 + 4, "top_k": 4},
        {"prune_ratio": 0.0},
    ]

    def run(kind: dict[str, Any]) -> list[Written]:
        given = dict(kind)
        for name in ("min_new_tokens", "forced_eos_token_id"):
            setattr(captioner.generation_config, name, given.pop(name, None))
        return written(captioner, videos[:1], **({"tree": "chain", "depth": 3} | given))

    eager = [run(kind) for kind in kinds]
    emulator = emulate(captioner)
    for kind, expected in zip(kinds, eager, strict=True):
        before = emulator.replayed
        assert [run(kind) for _ in range(3)] == [expected] * 3
        assert emulator.replayed - before >= 9


def test_kinds_that_take_turns_keep_their_graphs() -> None:
    """Plain captions and captions with the draft, one after the other: nothing new is captured the third time."""
    captioner, videos = pair("llava")
    kinds: list[dict[str, Any]] = [{"speculate": False}, {"tree": "chain"}]
    eager = [written(captioner, videos[:1], **kind) for kind in kinds]
    emulator = emulate(captioner)
    recorded = []
    for _ in range(4):
        assert [written(captioner, videos[:1], **kind) for kind in kinds] == eager
        recorded.append(len(emulator.captured))
    assert recorded[1] == recorded[2] == recorded[3] > 0


def kept_slabs(captioner: Captioner) -> list[Any]:
    return slabs_of(kept_decoders(captioner)[-1])


def test_prompts_that_share_a_video_share_its_rig() -> None:
    """Several prompts of one video, then another video's: the same slabs."""
    captioner, _ = pair("llava")

    def run() -> list[tuple[int, ...]]:
        return [
            caption.token_ids
            for seed in (1, 2)
            for caption in captioner.caption_prompts(
                random_frames(seed), ("Hi there.", "Hi their."), tree="static", max_new_tokens=NEW_TOKENS
            )
        ]

    eager = run()
    emulator = emulate(captioner)
    assert run() == eager
    slabs, recorded = kept_slabs(captioner), len(emulator.captured)
    assert run() == eager
    assert kept_slabs(captioner) == slabs
    assert emulator.replayed > 3 * recorded


@pytest.mark.parametrize("how", ["masked", "split", "varlen"])
def test_a_second_video_needs_no_more_graphs(how: attention.RoundAttention) -> None:
    """Another video, of the same size or a little shorter: replayed from its first round on."""
    captioner, videos = pair("qwen")
    emulator = emulate(captioner)
    attend_by(captioner, how)
    for _ in range(2):
        written(captioner, videos[:1], tree="chain")
    recorded, replayed = len(emulator.captured), emulator.replayed
    other = captioner.prepare(random_frames(77), "Hi their.")
    rounds = captioner.caption(other, tree="chain", max_new_tokens=NEW_TOKENS).stats.num_drafts
    assert len(emulator.captured) == recorded
    assert emulator.replayed - replayed == 3 * rounds


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["masked", "split", "varlen"])
def test_one_graph_serves_many_rounds(family: FamilyName, how: attention.RoundAttention) -> None:
    """Rounds of which target and draft are told the same: at most eight slots further on, or any number."""
    captioner, videos = pair(family)
    emulator = emulate(captioner)
    attend_by(captioner, how)
    rounds = captioner.caption(videos[0], tree="chain", depth=1, max_new_tokens=40).stats.num_drafts
    assert rounds >= 20
    # One eager round and one capture for each stretch of eight slots, of which either model has its own.
    stretches = 1 if how == "varlen" else 2 * (40 // 8 + 2)
    assert len(emulator.captured) <= 3 * stretches
    assert emulator.replayed >= 3 * (rounds - 2 * stretches)
    assert emulator.replayed > 0


HOW = ("masked", "split", "varlen")


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [tree for tree in TREES if tree != "auto"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rows", [1, 3])
def test_graphs_read_nothing_that_nobody_keeps(
    family: FamilyName, tree: str, how: attention.RoundAttention, rows: int
) -> None:
    """Weights, slabs, tensors in their places, tables, constants of the tree, and what the stages before them gave."""
    captioner, videos = pair(family)
    captioner.generation_config.repetition_penalty = 1.2
    captioner.generation_config.min_new_tokens = 3
    emulator = emulate(captioner)
    attend_by(captioner, how)
    for _ in range(2):  # what is captured in the second batch reads what the first one made, too
        written(captioner, videos[:rows], tree=tree, temperature=0.7)
    assert emulator.captured
    assert strangers(captioner, emulator) == []


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
    attend_by(captioner, "split")
    capacities = []
    for video, text in zip((short, long, short), eager, strict=True):
        assert written(captioner, [video], tree="static") == text
        cache = caches_of(kept_decoders(captioner)[-1])[0]
        capacities.append({slab.capacity for slab in cache._slabs})
    assert max(capacities[0]) < max(capacities[1])


def test_a_draft_in_other_slabs_gets_other_graphs() -> None:
    """The target's slabs stay; graphs that look into the draft's old ones are of no use."""
    captioner, videos = pair("qwen")
    eager = [written(captioner, [video], tree="chain") for video in (videos[0], videos[3])]
    emulate(captioner)
    seen = []
    for video, expected in zip((videos[0], videos[3]), eager, strict=True):
        assert written(captioner, [video], tree="chain") == expected
        target, draft = caches_of(kept_decoders(captioner)[-1])
        seen.append(([slab.number for slab in target._slabs], [slab.number for slab in draft._slabs]))
        draft.release()
    assert eager[0] != eager[1]
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("how", ["masked", "split", "varlen"])
def test_a_longer_prompt_in_the_same_slabs_gets_graphs_that_see_all_of_it(
    how: attention.RoundAttention,
) -> None:
    """Slabs that stay; the short prompt's graphs look less far than the other needs."""
    captioner, videos = pair("qwen")
    short, long = next(
        (one, other)
        for one, other in itertools.permutations(videos, 2)
        if decode.TOLD_STEP < other.inputs.prompt_tokens - one.inputs.prompt_tokens < 60
    )
    kinds: list[dict[str, Any]] = [{"speculate": False}, {"tree": "chain"}]
    for kind in kinds:
        nodes = captioner.nodes(captioner.kind(kind.get("speculate", True), {"tree": "chain"}))
        needed = [video.inputs.prompt_tokens + nodes for video in (short, long)]
        limit = next(n for n in range(12, 76) if len({rounded(slots + n) for slots in needed}) == 1)
        eager = [written(captioner, [video], max_new_tokens=limit, **kind) for video in (short, long)]
        emulate(captioner)
        attend_by(captioner, how)
        numbers = set()
        for video, expected in zip((short, long) * 2, eager * 2, strict=True):
            assert written(captioner, [video], max_new_tokens=limit, **kind) == expected
            numbers |= {slab.number for slab in caches_of(kept_decoders(captioner)[-1])[0]._slabs}
        assert len(numbers) == 1
        run_eagerly(captioner)


def test_what_a_broken_video_left_in_the_slabs_does_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree="static")
    emulate(captioner)
    written(captioner, videos[:1], tree="static")
    with monkeypatch.context() as broken:
        broken.setattr(captioner.target, "logits", lambda hidden: hidden.new_full((1, 1, 320), float("nan")))
        with pytest.raises(NonFiniteLogitsError):
            written(captioner, videos[:1], tree="static")
    for slab in kept_slabs(captioner):
        for part in slab.row(0):
            with torch.inference_mode():
                part.fill_(float("nan"))
    assert written(captioner, videos[:1], tree="static") == eager


def test_captions_that_run_in_turns_do_not_share_slabs() -> None:
    """Two streams of one captioner, a piece of each at a time: each in memory of its own."""
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


def ending_at(captioner: Captioner, videos: list[PreparedVideo], **options: Any) -> list[int]:
    """End-of-sequence tokens with which the captions of these videos end at different moments."""
    texts = [one.tokens for one in written(captioner, videos, **options)]
    return [text[3 + 5 * number % 23] for number, text in enumerate(texts)]


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [tree for tree in TREES if tree != "auto"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("batch_size", [3, 5])
def test_batches_that_shrink_and_fill_again(
    family: FamilyName, tree: str, how: attention.RoundAttention, batch_size: int
) -> None:
    """Rows end at different moments, others take their slots, and the last ones run in smaller and smaller batches.

    A graph that knew an old layout, or read the lengths, tables or state of a row that went, would show: in what is
    written, or in how many guesses were accepted.
    """
    captioner, videos = pair(family)
    options: dict[str, Any] = {"tree": tree, "max_new_tokens": 20}
    captioner.generation_config.eos_token_id = ending_at(captioner, videos, **options)
    captioner.generation_config.repetition_penalty = 1.1
    many = videos * 2

    def run() -> dict[int, Written]:
        told = captioner.caption_many(many, batch_size=batch_size, on_error="raise", **options)
        captions = {done.index: done.caption for done in told}
        return {
            index: Written(caption.token_ids, caption.stats.acceptance_histogram)
            for index, caption in sorted(captions.items())
            if caption is not None
        }

    eager = run()
    assert len({len(one.tokens) for one in eager.values()}) > 1
    assert len(eager) == len(many)
    emulator = emulate(captioner)
    attend_by(captioner, how)
    assert run() == eager
    assert run() == eager
    assert emulator.replayed > 0
    assert strangers(captioner, emulator) == []


def test_rows_of_several_slabs_in_one_batch() -> None:
    """Short and long videos in flight together: rows of a slab that are no slice of the batch are found by tables."""
    captioner, videos = pair("qwen")
    long = [captioner.prepare(random_frames(seed, 12), PROMPTS[2]) for seed in (31, 32)]
    batch = [videos[0], long[0], videos[3], long[1], videos[1]]
    options: dict[str, Any] = {"tree": "static", "max_new_tokens": 30}
    captioner.generation_config.eos_token_id = ending_at(captioner, batch, **options)
    eager = written(captioner, batch, **options)
    for how in ("masked", "split", "varlen"):
        emulator = emulate(captioner)
        attend_by(captioner, how)  # type: ignore[arg-type]
        for _ in range(2):
            assert written(captioner, batch, **options) == eager
        assert len({slab.capacity for slab in kept_slabs(captioner)}) > 1
        assert emulator.replayed > 0
        assert strangers(captioner, emulator) == []
        run_eagerly(captioner)


def test_graphs_are_for_few_sizes_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that ends one by one runs with rows that are done until the next size is reached."""
    captioner, videos = pair("llava")
    batch = videos * 3
    options: dict[str, Any] = {"tree": "chain", "depth": 1, "max_new_tokens": 40}
    captioner.generation_config.eos_token_id = ending_at(captioner, videos, **options)
    eager = written(captioner, batch, **options)
    sizes: list[int] = []
    real = decode._Rounds.run

    def run(rounds: Any, shape: Any, index: Any) -> Any:
        sizes.append(len(index.most))
        return real(rounds, shape, index)

    monkeypatch.setattr(decode._Rounds, "run", run)
    emulate(captioner)
    assert written(captioner, batch, **options) == eager
    assert len(set(sizes)) > 1
    assert set(sizes) <= {12, *decode.GRAPH_ROWS}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_failed_capture_costs_a_warning_and_nothing_else(stage: int) -> None:
    captioner, videos = pair("llava")
    eager = [written(captioner, [video], tree="dynamic", temperature=0.7) for video in videos]
    emulator = emulate(captioner)
    emulator.fails_at = stage
    twice = [videos[0], videos[0]]  # what was met in the first caption is captured in the second
    with pytest.warns(RuntimeWarning, match="CannotCaptureError: no graph today"):
        graphed = [[written(captioner, [one], tree="dynamic", temperature=0.7) for one in twice][1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed += [written(captioner, [video], tree="dynamic", temperature=0.7) for video in videos[1:]]
    assert graphed == eager
    assert (len(emulator.captured), emulator.replayed) == (stage, 0)


def test_plain_steps_inside_auto_are_timed_by_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates of plain decoding come from plain steps between rounds with guesses; the caption is what it was."""
    from specvlm import adaptive

    monkeypatch.setattr(adaptive, "_PLAIN_AGAIN", 2)
    captioner, videos = pair("qwen")
    eager = captioner.caption(videos[0], tree="auto", max_new_tokens=40)
    emulator = emulate(captioner)
    for _ in range(3):
        caption = captioner.caption(videos[0], tree="auto", max_new_tokens=40)
        assert caption.token_ids == eager.token_ids
        assert caption.stats.plain_token_s is not None
    assert emulator.replayed > 0


def test_the_round_used_least_lately_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_ROUNDS", 2)
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree="chain", max_new_tokens=30)
    emulate(captioner)
    assert written(captioner, videos[:1], tree="chain", max_new_tokens=30) == eager
    assert len(rig_of(kept_decoders(captioner)[-1])._rounds) == 2


def test_lengths_are_told_in_steps() -> None:
    """What a graph knows of lengths: at most, and at least, so many slots; with `varlen` nothing."""
    captioner, _ = pair("qwen")
    target = captioner.target
    lengths = Lengths(torch.tensor([16, 17, 31]), (16, 17, 31), (16, 17, 31))
    target.told_step = 1
    assert target._told(lengths) is lengths
    target.told_step = 8
    assert target._told(lengths)[1:] == ((16, 24, 32), (16, 16, 24))
    target.round_attention = "varlen"
    assert target._told(lengths)[1:] == ((0, 0, 0), (0, 0, 0))
    assert target._told(lengths).slots is lengths.slots


def test_a_caption_that_is_over_gives_its_decoder_back() -> None:
    """At once, not when a collector comes by; and no sequence is left in it."""
    captioner, videos = pair("qwen")
    emulate(captioner)
    captioner.caption(videos[0], tree="chain", max_new_tokens=NEW_TOKENS)
    assert [len(decoder) for decoder in kept_decoders(captioner)] == [0]
    stream = captioner.stream(videos[0], tree="chain", max_new_tokens=NEW_TOKENS)
    next(stream)
    assert kept_decoders(captioner) == []
    stream.close()
    assert [len(decoder) for decoder in kept_decoders(captioner)] == [0]


def test_a_place_keeps_its_address_for_every_shape() -> None:
    """A batch that shrinks and grows again finds the tensors that its graphs know."""
    rig = graphs.Rig(Emulator())
    first = rig.place("x", torch.tensor([1, 2]))
    assert rig.place("x", torch.tensor([3, 4])) is first
    assert first.tolist() == [3, 4]
    larger = rig.place("x", torch.tensor([1, 2, 3]))
    assert larger is not first
    assert rig.place("x", torch.tensor([5, 6])) is first
    assert rig.place("y", torch.tensor([7, 8])) is not first
    assert (first.tolist(), larger.tolist()) == ([5, 6], [1, 2, 3])


def test_a_reset_forgets_all_graphs() -> None:
    """After a fault nothing that was recorded is to be trusted."""
    captioner, videos = pair("qwen")
    eager = written(captioner, videos[:1], tree="chain")
    emulator = emulate(captioner)
    for _ in range(2):
        written(captioner, videos[:1], tree="chain")
    decoder = kept_decoders(captioner)[-1]
    assert rig_of(decoder)._rounds
    decoder.reset()
    assert not rig_of(decoder)._rounds
    assert not rig_of(decoder)._tensors
    assert slabs_of(decoder) == []
    recorded = len(emulator.captured)
    assert [written(captioner, videos[:1], tree="chain") for _ in range(2)] == [eager] * 2
    assert len(emulator.captured) > recorded


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


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["masked", "split", "varlen"])
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
    seen = round_that_stays(Case(family, SHAPES[shape], how, dtype, exact, trimmed), monkeypatch)
    parts = how == "varlen" or (how == "split" and not (exact and shape == "root"))
    assert ("aten._scaled_dot_product_efficient_attention.default" in seen.names) == parts
    assert ("aten._scaled_dot_product_flash_attention.default" in seen.names) == (
        how == "split" and parts and dtype == torch.bfloat16
    )
    assert any("varlen" in name for name in seen.names) == (how == "varlen")
