"""On a CUDA device, by hand: `pytest -m gpu`. Parity in float32, and what bfloat16 may and may not do."""

from __future__ import annotations

import pytest
import torch

from specvlm.captioner import Captioner
from specvlm.config import TREES, FrameSettings
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.families import family_of
from specvlm.model import VideoLM
from tests.tiny import FamilyName, Size, processor_for, random_frames, stock_ids, tiny_captioner, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def cuda_captioner(family: FamilyName, dtype: torch.dtype) -> Captioner:
    """A random pair on the first GPU."""
    info = tiny_captioner(family, Size(), None).info
    large, small = (tiny_model(family, size).to("cuda", dtype) for size in (Size(3, seed=1), Size(1, seed=2)))
    target, draft = (VideoLM(model, family_of(model.config, "tiny")) for model in (large, small))
    return Captioner(target, processor_for(family), SmallModelDraft(draft, 300), info, FrameSettings())


@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("tree", TREES)
def test_float32_is_stock(family: FamilyName, tree: str) -> None:
    captioner = cuda_captioner(family, torch.float32)
    video = captioner.prepare(random_frames(1), "Hi there.")
    tensors = {name: value.to("cuda") for name, value in video.inputs.tensors.items()}
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
    tensors = {name: value.to("cuda") for name, value in video.inputs.tensors.items()}
    out = captioner.target.model.generate(
        **tensors, max_new_tokens=first + 1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best, second = out.logits[first][0].float().topk(2).values.tolist()
    assert best - second < 2**-6 * abs(best)
