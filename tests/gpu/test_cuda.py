"""On a CUDA device, by hand: `pytest -m gpu`. Parity in float32, and what bfloat16 may and may not do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch

from specvlm import attention, decode
from specvlm.attention import AttentionPlan, RoundAttention, VisibleNodes, own_mask, ragged_mask
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import TREES, FrameSettings
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.families import family_of
from specvlm.model import VideoLM, _cuda_attention
from specvlm.training.example import read_example
from specvlm.training.objective import ObjectiveSettings, distillation_loss
from tests.emulated_graphs import attend_by, kept_decoders, rig_of
from tests.tiny import (
    FamilyName,
    Size,
    caption_rows,
    processor_for,
    random_frames,
    stock_ids,
    tiny_captioner,
    tiny_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


DEVICE = "cuda"
WIDE = {"width": 64, "heads": 4, "kv_heads": 2}  # heads of 16: fit for every kernel


def cuda_captioner(
    family: FamilyName, dtype: torch.dtype, guessable: Sequence[int] | None = None
) -> Captioner:
    """A random pair on the first GPU. `guessable`: what the draft may guess; None: every token."""
    info = tiny_captioner(family, Size(), None).info
    sizes = (Size(3, seed=1, **WIDE), Size(1, seed=2, **WIDE))
    large, small = (tiny_model(family, size).to(DEVICE, dtype) for size in sizes)
    target, draft = (VideoLM(model, family_of(model.config, "tiny")) for model in (large, small))
    return Captioner(
        target, processor_for(family), SmallModelDraft(draft, 300, guessable), info, FrameSettings()
    )


@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("guessable", [None, range(0, 300, 2)], ids=["all", "half"])
def test_float32_is_stock(family: FamilyName, tree: str, guessable: Sequence[int] | None) -> None:
    captioner = cuda_captioner(family, torch.float32, guessable)
    video = captioner.prepare(random_frames(1), "Hi there.")
    tensors = {name: value.to(DEVICE) for name, value in video.inputs.tensors.items()}
    stock = stock_ids(captioner.target.model, tensors, 24)
    caption = captioner.caption(video, tree=tree, max_new_tokens=24)  # type: ignore[arg-type]
    assert caption.token_ids == stock
    assert caption.stats.peak_memory_bytes < 2**30


def test_stage_times_are_within_the_whole() -> None:
    """Stages inside rounds come from events; together they are no longer than the rounds."""
    captioner = cuda_captioner("qwen", torch.float32)
    stats = captioner.caption(random_frames(1), max_new_tokens=40).stats
    assert 0 < stats.draft_s + stats.verify_s + stats.commit_s <= stats.decode_s * 1.02


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_bfloat16_differs_only_at_near_ties(family: FamilyName) -> None:
    """Where a caption leaves the plain one, the plain top-2 margin there is within bfloat16's rounding."""
    captioner = cuda_captioner(family, torch.bfloat16)
    video = captioner.prepare(random_frames(1), "Hi there.")
    plain = captioner.caption(video, speculate=False, max_new_tokens=24).token_ids
    fast = captioner.caption(video, max_new_tokens=24).token_ids
    if fast == plain:
        return
    first = next(i for i, pair in enumerate(zip(fast, plain, strict=False)) if pair[0] != pair[1])
    tensors = {name: value.to(DEVICE) for name, value in video.inputs.tensors.items()}
    out = captioner.target.model.generate(
        **tensors, max_new_tokens=first + 1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best, second = out.logits[first][0].float().topk(2).values.tolist()
    assert best - second < 2**-6 * abs(best)


def headed(family: FamilyName, dtype: torch.dtype) -> Captioner:
    """A captioner whose draft is an untrained head, moved to the first GPU after it was made."""
    captioner = cuda_captioner(family, dtype)
    target = captioner.target
    config = HeadConfig("tiny", None, target.family.name, target.hidden_size)
    head = HeadModel.fresh(target, config, 0).to(DEVICE, dtype).eval().requires_grad_(False)
    captioner.draft = HeadDraft(head, target)
    return captioner


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("how", ["masked", "split"])
def test_a_head_in_float32_is_stock_by_graphs_and_without(
    family: FamilyName, tree: Any, how: RoundAttention
) -> None:
    """Greedy and sampled, several videos in one rig, one row and two; without a warning."""
    captioner = headed(family, torch.float32)
    assert isinstance(captioner.draft, HeadDraft)
    assert captioner.draft.head.text.rotary_emb.inv_freq.device.type == DEVICE
    attend_by(captioner, how)
    videos = [captioner.prepare(random_frames(seed), "Hi there."[: 9 - seed]) for seed in range(2)]
    tensors = [{n: v.to(DEVICE) for n, v in video.inputs.tensors.items()} for video in videos]
    stock = [stock_ids(captioner.target.model, one, 24) for one in tensors]

    def run(**options: Any) -> list[tuple[int, ...]]:
        batches = ([videos[0]], [videos[1]], videos)
        return [
            one.token_ids
            for batch in batches
            for one in caption_rows(captioner, batch, max_new_tokens=24, **options)
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tree=tree) == stock * 2
        drawn = run(tree=tree, temperature=0.7)
        assert captured(captioner)
    eagerly(captioner)
    assert run(tree=tree) == stock * 2
    assert drawn == run(speculate=False, temperature=0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_in_other_formats_runs_by_graphs(dtype: torch.dtype) -> None:
    captioner = headed("qwen", dtype)
    assert isinstance(captioner.draft, HeadDraft)
    assert captioner.draft.head.text.rotary_emb.inv_freq.dtype == torch.float32
    video = captioner.prepare(random_frames(1), "Hi there.")
    eager, graphed = without_and_with_graphs(captioner, video)
    assert graphed == eager
    assert captured(captioner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_learns_on_the_device(dtype: torch.dtype) -> None:
    """A loss with gradients of every kind, the gate's through the attention mask too."""
    captioner = headed("qwen", dtype)
    assert isinstance(captioner.draft, HeadDraft)
    head, target = captioner.draft.head.train().requires_grad_(True), captioner.target
    video = captioner.prepare(random_frames(1), "Hi there.")
    tokens = captioner.caption(video, speculate=False, max_new_tokens=12).token_ids
    example = read_example(target, video.inputs, tokens).to(head.device)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        loss = distillation_loss(head, target, example, ObjectiveSettings(unroll=1), generator).total
        loss.backward()  # type: ignore[no-untyped-call]
    assert head.compressor.gate is not None
    for weight in (head.join.weight, head.compressor.gate.bias):
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
        assert weight.grad.any()


def eagerly(captioner: Captioner) -> None:
    """From now on without graphs."""
    captioner.target.captures = False
    captioner._decoders.clear()


def without_and_with_graphs(
    captioner: Captioner, video: PreparedVideo
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One caption by rounds of the very same shapes, run eagerly and by graphs."""
    options: dict[str, Any] = {"tree": "static", "max_new_tokens": 60}
    captioner.caption(video, **options)
    rig_of(kept_decoders(captioner)[-1]).working = False
    eager = captioner.caption(video, **options).token_ids
    captioner._decoders.clear()
    captioner.caption(video, **options)
    return eager, captioner.caption(video, **options).token_ids


def captured(captioner: Captioner) -> int:
    """Kinds of rounds that were captured."""
    rigs = [rig_of(decoder) for decoder in kept_decoders(captioner)]
    assert all(rig.working for rig in rigs)
    return sum(one.stages is not None for rig in rigs for one in rig._rounds.values())


def has(how: RoundAttention, dtype: torch.dtype, width: int = 16) -> bool:
    """Whether this machine has this way to attend."""
    if how != "varlen":
        return True
    device = torch.device(DEVICE, torch.cuda.current_device())
    return _cuda_attention(device, dtype, width) == "varlen"


@pytest.fixture
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts have a prefix, and captions cross borders."""
    monkeypatch.setattr(decode, "TOLD_STEP", 16)
    monkeypatch.setattr(attention, "PREFIX_STEP", 16)
    monkeypatch.setattr(attention, "SHORTEST_PREFIX", 16)


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("how", "guessable"), [("masked", range(0, 300, 2)), ("split", None)])
def test_graphs_write_what_eager_rounds_write(
    family: FamilyName, tree: Any, temperature: float, how: RoundAttention, guessable: Sequence[int] | None
) -> None:
    """In float32, for several videos in one rig, one row and two; without a warning."""
    captioner = cuda_captioner(family, torch.float32, guessable)
    captioner.generation_config.repetition_penalty = 1.2
    attend_by(captioner, how)
    videos = [captioner.prepare(random_frames(seed), "Hi there."[: 9 - seed]) for seed in range(3)]
    batches = [[video] for video in videos] + [videos[:2], videos[1:]]
    options: dict[str, Any] = {"tree": tree, "temperature": temperature, "max_new_tokens": 40}

    def run() -> list[list[tuple[int, ...]]]:
        return [[one.token_ids for one in caption_rows(captioner, some, **options)] for some in batches]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed = run()
        assert captured(captioner)
    eagerly(captioner)
    assert run() == graphed


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("how", get_args(RoundAttention))
def test_every_way_to_attend_is_stock_in_float32(family: FamilyName, how: RoundAttention) -> None:
    """One video and three of other lengths."""
    if not has(how, torch.float32):
        pytest.skip("no such kernel for float32")
    captioner = cuda_captioner(family, torch.float32)
    attend_by(captioner, how)
    eagerly(captioner)
    videos = [captioner.prepare(random_frames(seed, 2 + 2 * seed), "Hi there.") for seed in range(3)]
    stock = [stock_ids(captioner.target.model, on_device(video), 24) for video in videos]
    for tree in ("chain", "static", "dynamic"):
        caption = captioner.caption(videos[0], tree=tree, max_new_tokens=24)  # type: ignore[arg-type]
        assert caption.token_ids == stock[0], tree
        rows = caption_rows(captioner, videos, tree=tree, max_new_tokens=24)
        assert [one.token_ids for one in rows] == stock, tree


def on_device(video: PreparedVideo) -> dict[str, torch.Tensor]:
    """What stock `generate()` takes."""
    return {name: value.to(DEVICE) for name, value in video.inputs.tensors.items()}


@pytest.mark.usefixtures("_small_steps")
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("how", "batch_size"), [("masked", 3), ("split", 5)])
def test_batches_that_shrink_and_fill_again_are_stock_by_graphs(
    family: FamilyName, tree: Any, how: RoundAttention, batch_size: int
) -> None:
    """In float32: captions that end at different moments, other videos in their slots; twice, without a warning."""
    captioner = cuda_captioner(family, torch.float32)
    attend_by(captioner, how)
    captioner.target.model.generation_config.eos_token_id = []
    videos = [captioner.prepare(random_frames(seed, 2 + 2 * (seed % 3)), "Hi there.") for seed in range(6)]
    free = [stock_ids(captioner.target.model, on_device(video), 30) for video in videos]
    ends = [text[3 + 4 * number] for number, text in enumerate(free)]
    captioner.target.model.generation_config.eos_token_id = ends
    stock = [stock_ids(captioner.target.model, on_device(video), 30) for video in videos]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            many = captioner.caption_many(
                videos * 2, batch_size=batch_size, tree=tree, max_new_tokens=30, on_error="raise"
            )
            got = {done.index: done.caption for done in many}
            assert [got[index].token_ids for index in range(12)] == stock * 2  # type: ignore[union-attr]
        assert captured(captioner)


@pytest.mark.parametrize("how", get_args(RoundAttention))
@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize(("width", "nodes", "own"), [(128, 26, 26), (64, 1, 5), (128, 7, 12)])
def test_every_way_to_attend_gives_the_same_numbers(
    how: RoundAttention, dtype: torch.dtype, off: float, width: int, nodes: int, own: int
) -> None:
    """Two rows over long prefixes, 28 heads on 4, against plain arithmetic in float64; keys as they lie in a slab."""
    if not has(how, dtype, width):
        pytest.skip("no such kernel")
    torch.manual_seed(nodes)
    visible, lengths = 3100, torch.tensor([2990, 3001], device=DEVICE)
    query = torch.randn(2, nodes, 28, width, device=DEVICE, dtype=dtype).transpose(1, 2)
    # The kernel for sequences of different lengths takes whole rows of a slab.
    slab = torch.randn(2, 2, visible + (0 if how == "varlen" else 100), 4, width, device=DEVICE, dtype=dtype)
    key, value = slab[:, :, :visible].transpose(2, 3)
    sees = torch.rand(2, nodes, own, device=DEVICE) < 0.5
    sees |= torch.eye(nodes, own, dtype=torch.bool, device=DEVICE)
    rows = {
        "masked": [VisibleNodes(slice(0, 2), ragged_mask(lengths, sees, visible, 7, dtype))],
        "varlen": [VisibleNodes(slice(0, 2), own_mask(sees, 7, dtype), lengths=lengths)],
        "split": [
            VisibleNodes(at, ragged_mask(lengths[at], sees[at], visible, 7, dtype, prefix), prefix)
            for at, prefix in ((slice(0, 1), 2944), (slice(1, 2), 3001))
        ],
    }[how]
    keys, values = [key[one.where] for one in rows], [value[one.where] for one in rows]
    out, _ = attention._attend(torch.nn.Identity(), query, keys, values, AttentionPlan(rows=tuple(rows)))
    packed = attention._pack_groups(query, 4).double()
    mask = ragged_mask(lengths, sees, visible, 7, torch.float64)
    weights = (packed @ key.double().transpose(2, 3) * width**-0.5 + mask).softmax(-1)
    exact = attention._unpack_groups(weights @ value.double(), 28)
    assert (out.double() - exact).abs().max() < off


@pytest.mark.parametrize("how", ["masked", "split"])
def test_bfloat16_by_graphs_is_bfloat16_without(how: RoundAttention) -> None:
    """The same kernels on the same numbers: to the last token."""
    captioner = cuda_captioner("qwen", torch.bfloat16)
    attend_by(captioner, how)
    video = captioner.prepare(random_frames(1), "Hi there.")
    eager, graphed = without_and_with_graphs(captioner, video)
    assert graphed == eager
    assert captured(captioner)
