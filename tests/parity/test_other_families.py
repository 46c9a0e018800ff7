"""Families beyond those of the papers: prompts as the stock processor makes them, and captions as stock writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from specvlm.config import SpeculationSettings
from specvlm.drafts.compressor import stretches
from specvlm.drafts.head import HeadDraft
from specvlm.families import FAMILIES, Qwen3VL, register
from specvlm.prefill import PrefillRow, ToSee, embed, prefill_target, prune_prompt
from specvlm.pruning import prune
from specvlm.training import memory
from tests.heads import COMPRESSORS, fresh_captioner, head_captioner, videos_of
from tests.parity.test_batches import RandomCase
from tests.parity.test_fuzz import check_case
from tests.parity.test_prompts import FRAMES, PROMPTS
from tests.parity.test_stock import DRAFTS, NEW_TOKENS, captioner_for, ids
from tests.tiny import FamilyName, Size, processor_for, random_frames, stock_ids, tiny_captioner, tiny_model

OTHERS: tuple[FamilyName, ...] = ("qwen2", "qwen3", "qwen3-moe")
WITH_TIMES: tuple[FamilyName, ...] = ("qwen3", "qwen3-moe")


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("seed", range(6))
def test_random_cases(family: FamilyName, seed: int) -> None:
    check_case(1000 + seed, family)


@pytest.mark.filterwarnings("ignore:Both `min_new_tokens`", "ignore:Unfeasible length")
@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("seed", range(4))
def test_random_batches(family: FamilyName, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = RandomCase(500 + seed, family)
    case.set_rules(monkeypatch)
    case.check()


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_only_the_text_is_prepared_anew(family: FamilyName, prompt: str) -> None:
    captioner = captioner_for(family, "noisy")
    model, processor = captioner.target.family, captioner.processor
    first = model.prepare(processor, FRAMES, "Another prompt, with <video> inside.")
    again = model.prepare_again(processor, first, prompt)
    full = model.prepare(processor, FRAMES, prompt)
    assert again.tensors.keys() == full.tensors.keys()
    for name, tensor in full.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
    assert torch.equal(again.video_at, full.video_at)
    assert again.tensors["pixel_values_videos"] is first.tensors["pixel_values_videos"]


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_several_prompts_of_a_video_share_its_prefill(family: FamilyName, draft: str) -> None:
    """Times before, between and behind what the prompts have in common."""
    captioner = captioner_for(family, draft)
    session = captioner.session(FRAMES, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        tensors = captioner.prepare(FRAMES, prompt).inputs.tensors
        stock = stock_ids(captioner.target.model, tensors, NEW_TOKENS)
        assert session.caption(index, max_new_tokens=NEW_TOKENS, tree="static").token_ids == stock, prompt


@pytest.mark.parametrize("family", WITH_TIMES)
def test_the_prompt_tells_the_true_times(family: FamilyName) -> None:
    """Frames of no steady rate: a mean rate would tell other times."""
    frames = random_frames(0, 6)._replace(times_s=np.array([0.0, 0.5, 7.25, 7.5, 61.0, 64.0]))
    captioner = captioner_for(family, "noisy")
    inputs = captioner.prepare(frames, "Hi").inputs
    said = captioner.processor.tokenizer.decode(inputs.token_ids[0])
    assert [said.count(f"<{time_s} seconds>") for time_s in ("0.2", "7.4", "62.5")] == [1, 1, 1]
    assert said.count(" seconds>") == 3
    counts = stretches(inputs.video_at)
    assert len(counts) == 3
    assert sum(counts) == inputs.video_tokens


def test_the_prompt_is_the_stock_processors() -> None:
    """At a steady rate, what the processor makes of frame numbers and a rate."""
    frames = random_frames(0, 8)  # at two per second
    inputs = captioner_for("qwen3", "noisy").prepare(frames, "Hi").inputs
    processor = processor_for("qwen3")
    content = [{"type": "video"}, {"type": "text", "text": "Hi"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    told = VideoMetadata(total_num_frames=96, fps=24.0, frames_indices=list(range(0, 96, 12)))
    made = processor(
        text=[text],
        videos=[torch.from_numpy(frames.pixels).permute(0, 3, 1, 2)],
        video_metadata=[[told]],
        do_sample_frames=False,
        cap_pixels_per_frame=True,
        return_tensors="pt",
    )
    assert inputs.tensors.keys() == made.keys()
    for name, tensor in made.items():
        assert torch.equal(inputs.tensors[name], tensor), name


@pytest.mark.parametrize("family", WITH_TIMES)
def test_a_lone_frame_is_shown_twice(family: FamilyName) -> None:
    captioner = captioner_for(family, "noisy")
    prepared = captioner.prepare(random_frames(0, 1), "Hi")
    assert prepared.num_frames == 1
    assert prepared.inputs.tensors["video_grid_thw"][0, 0] == 1
    stock = stock_ids(captioner.target.model, prepared.inputs.tensors, NEW_TOKENS)
    assert ids(captioner, prepared) == stock


@pytest.mark.parametrize("family", WITH_TIMES)
def test_pruning_keeps_the_text_between_and_drops_the_rows_of_every_layer(family: FamilyName) -> None:
    captioner = captioner_for(family, "same")
    inputs = captioner.prepare(random_frames(0, 8), "Look at <video> and tell.").inputs
    with torch.inference_mode():
        (prompt,) = embed(captioner.target, [ToSee(inputs)])
    assert len(prompt.deep) == 2
    scores = torch.rand(inputs.video_tokens, generator=torch.Generator().manual_seed(0))
    keep = prune(scores, SpeculationSettings(prune_ratio=0.9))
    pruned = prune_prompt(prompt, keep, compact=False)
    kept = inputs.video_at[keep]
    assert pruned.length == prompt.length - inputs.video_tokens + int(keep.sum())
    assert torch.equal(pruned.embeds[0, pruned.video_at], prompt.embeds[0, kept])
    assert torch.equal(pruned.positions[:, pruned.video_at], prompt.positions[:, kept])
    for ours, theirs in zip(pruned.deep, prompt.deep, strict=True):
        assert torch.equal(ours, theirs[keep])


@pytest.mark.parametrize(
    "broken", ["", "no deep features", "rows of other tokens", "layers the other way round"]
)
def test_deep_features_reach_the_layers_of_their_tokens(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = captioner_for("qwen3", "same")
    inputs = captioner.prepare(random_frames(3, 6), "Look at <video> and tell.").inputs
    sound = Qwen3VL.text_arguments

    def arguments(self: Qwen3VL, where: torch.Tensor, deep: Any) -> dict[str, Any]:
        if broken == "no deep features":
            return {}
        if broken == "rows of other tokens":
            return sound(self, where, [layer.roll(7, 0) for layer in deep])
        return sound(self, where, deep[::-1] if broken else deep)

    monkeypatch.setattr(Qwen3VL, "text_arguments", arguments)
    with torch.inference_mode():
        stock = captioner.target.model(**inputs.tensors).logits[:, -1:]
        (prompt,) = embed(captioner.target, [ToSee(inputs)])
        cache = captioner.target.new_cache(prompt.length)
        (told,) = prefill_target(captioner.target, cache, [PrefillRow(prompt, 0)])
    assert torch.allclose(told.logits, stock, atol=1e-4) == (not broken)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("none", "prune") else pytest.param(name, marks=pytest.mark.slow)
        for name in COMPRESSORS
    ],
)
def test_heads_guess_as_they_learned(name: str) -> None:
    """A head that was fitted to the captions is right most of the time, and changes none of them."""
    captioner = head_captioner("qwen3", name)
    for video in videos_of(captioner):
        plain = captioner.caption(video, speculate=False, max_new_tokens=NEW_TOKENS)
        made = captioner.caption(video, tree="chain", depth=4, max_new_tokens=NEW_TOKENS)
        assert made.token_ids == plain.token_ids
        if name == "none":
            assert made.stats.num_accepted_tokens / made.stats.num_drafts > 1.0


@pytest.mark.parametrize("family", OTHERS)
def test_what_learning_takes_in_memory_is_estimated(family: FamilyName) -> None:
    captioner = fresh_captioner(family)
    assert isinstance(captioner.draft, HeadDraft)
    few, many = (captioner.prepare(random_frames(0, count), "Hi.").inputs for count in (4, 40))
    needs = [
        memory.need(captioner.target, captioner.draft.head, memory.SampleSize(one, 64)) for one in (few, many)
    ]
    assert 0 < needs[0].target < needs[1].target
    assert 0 < needs[0].head < needs[1].head


class Renamed(Qwen3VL):
    """A family as another package would bring it."""

    name = "qwen3_renamed"


def test_a_family_of_another_package_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else has to know of it."""
    monkeypatch.setattr("specvlm.families.FAMILIES", dict(FAMILIES))
    register(Renamed)
    monkeypatch.setattr("tests.tiny.tiny_model", renamed_model)
    captioner = tiny_captioner("qwen3", Size(seed=1), Size(layers=1, seed=2))
    assert isinstance(captioner.target.family, Renamed)
    prepared = captioner.prepare(random_frames(3, 4), "Hi there.")
    stock = stock_ids(captioner.target.model, prepared.inputs.tensors, NEW_TOKENS)
    assert ids(captioner, prepared) == stock


def renamed_model(family: FamilyName, size: Size) -> Any:
    """A tiny model whose config has another model type."""
    model = tiny_model(family, size)
    model.config.model_type = Renamed.name
    return model


def test_an_entry_point_brings_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from specvlm import families

    class Found:
        @staticmethod
        def load() -> type[Renamed]:
            return Renamed

    def entry_points(*, group: str, name: str) -> list[Any]:
        return [Found] if (group, name) == ("specvlm.families", "qwen3_renamed") else []

    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(families, "entry_points", entry_points)
    config = type("Config", (), {"model_type": "qwen3_renamed"})
    assert isinstance(families.family_of(config, "x"), Renamed)
