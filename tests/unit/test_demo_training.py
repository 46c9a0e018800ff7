"""What the demo models are trained with is what stock `transformers` computes, also when tokens are dropped."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from recipes.demo.batches import Batch, Drawer
from recipes.demo.clips import render, scene_for
from recipes.demo.evaluate import prepared
from recipes.demo.models import (
    CHECKPOINTS,
    FRAMES,
    Role,
    build_model,
    deepened,
    llava_processor,
    places,
    qwen3_processor,
    qwen_processor,
    text_layers,
)
from recipes.demo.tokenizer import Family, train_tokenizer
from recipes.demo.train import (
    CellHead,
    Plan,
    Seen,
    Trainer,
    caption_logits,
    fewer_layers,
    kept_tokens,
    load_model,
    video_id,
    video_spots,
    video_tokens,
)
from specvlm.packaged import demo_folder

FAMILIES: tuple[Family, ...] = get_args(Family)
MAKERS = {"qwen": qwen_processor, "llava": llava_processor, "qwen3": qwen3_processor}
ROWS = 2


@cache
def drawer(family: Family) -> Drawer:
    """Draws batches with a small vocabulary."""
    return Drawer(family, MAKERS[family](train_tokenizer(family, clips=60)))


def model_of(family: Family, role: Role = "target", layers: int = 3) -> Any:
    torch.manual_seed(1)
    return build_model(family, role, drawer(family).tokenizer, layers)


def batch_of(family: Family, number: int = 3, frames: int = FRAMES) -> Batch:
    return drawer(family).batch(number, ROWS * frames // FRAMES, 0.4, frames)


def stock_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of the caption by the stock forward of the whole model."""
    ids = torch.cat([batch.prompt_ids, batch.caption_ids], dim=1)
    given: dict[str, Any] = {**batch.pixels, "input_ids": ids}
    if "video_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == video_id(model)).int() * 2
        given["second_per_grid_ts"] = torch.full((ROWS,), batch.seconds_per_grid)
    logits: torch.Tensor = model(**given).logits
    return logits[:, batch.prompt_ids.shape[1] - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("number", "frames"), [(3, FRAMES), (4, FRAMES), (4, 3 * FRAMES)])
@torch.inference_mode()
def test_unpruned_logits_are_those_of_the_stock_forward(family: Family, number: int, frames: int) -> None:
    batch, model = batch_of(family, number, frames), model_of(family)
    ours = caption_logits(model, batch, video_tokens(model, batch), None)
    assert ours.shape[:2] == batch.caption_ids.shape
    torch.testing.assert_close(ours, stock_logits(model, batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "role"), [("qwen3", "target"), ("qwen3", "draft"), ("qwen", "draft")])
@torch.inference_mode()
def test_dropping_tokens_is_hiding_them_from_all_others(family: Family, role: Role) -> None:
    """Text and kept tokens stay where they are, with their own rows of every feature."""
    batch, model = batch_of(family), model_of(family, role, 3 if role == "target" else 1)
    seen = video_tokens(model, batch)
    keep = kept_tokens(ROWS, seen.tokens.shape[1], 0.9, seed=5)
    assert keep is not None
    assert keep[0].tolist() != keep[1].tolist()
    ours = caption_logits(model, batch, seen, keep)
    hidden = hiding(model, batch, keep)
    for module in text_layers(model):
        module.register_forward_pre_hook(hidden, with_kwargs=True)
    masked = caption_logits(model, batch, seen, None)
    torch.testing.assert_close(ours, masked, atol=1e-4, rtol=0)


def hiding(model: Any, batch: Batch, keep: torch.Tensor) -> Any:
    """A hook that gives each layer a causal mask without the dropped tokens."""
    spots = video_spots(model, batch)
    length = batch.prompt_ids.shape[1] + batch.caption_ids.shape[1] - 1
    shown = torch.ones(ROWS, length, dtype=torch.bool).index_fill(1, spots, False)
    shown = shown.scatter(1, spots[keep], True)
    own = torch.eye(length, dtype=torch.bool)  # a hidden token still sees itself, so that no row is empty
    mask = (torch.ones(length, length).tril().bool() & shown[:, None, :] | own)[:, None]
    return lambda _layer, given, named: (given, {**named, "attention_mask": mask})


@torch.inference_mode()
def test_what_deepstack_adds_reaches_the_caption() -> None:
    batch, model = batch_of("qwen3"), model_of("qwen3")
    seen = video_tokens(model, batch)
    assert [level.shape for level in seen.deep] == [seen.tokens.shape] * 2
    whole = caption_logits(model, batch, seen, None)
    for level in range(2):
        without = [torch.zeros_like(d) if i == level else d for i, d in enumerate(seen.deep)]
        other = caption_logits(model, batch, Seen(seen.tokens, without), None)
        assert float((whole - other).abs().max()) > 1e-3


@pytest.mark.parametrize("role", get_args(Role))
def test_the_whole_tower_learns_before_there_is_a_text_model(role: Role) -> None:
    batch, model = batch_of("qwen3"), model_of("qwen3", role, 1)
    head = CellHead(CHECKPOINTS["qwen3", role].text_width, ("colour", "shape", "motion", "row"))
    levels = video_tokens(model, batch).levels
    assert len(levels) == 2
    torch.stack([head(level, batch.cells)[0] for level in levels]).mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.model.visual.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_deepened_model_computes_the_same(family: Family) -> None:
    batch, shallow = batch_of(family), model_of(family, layers=6)
    deep: Any = deepened(shallow, family, "target", drawer(family).tokenizer, 18)
    assert len(text_layers(deep)) == 18
    before, after = (caption_logits(m, batch, video_tokens(m, batch), None) for m in (shallow, deep))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


def test_longer_clips_show_the_same_seconds_in_fewer_clips() -> None:
    short, long = (drawer("qwen").batch(3, 6, 0.4, frames) for frames in (FRAMES, 2 * FRAMES))
    assert (len(short.scenes), len(long.scenes)) == (6, 3)
    assert long.scenes == short.scenes[:3]
    assert long.seconds_per_grid == short.seconds_per_grid / 2
    video = drawer("qwen").processor.video_token_id
    tokens = [int((batch.prompt_ids[0] == video).sum()) for batch in (short, long)]
    assert tokens[1] == 2 * tokens[0]


@pytest.mark.parametrize("number", range(4))  # some with noise, some without
def test_one_clip_of_many_frames_is_a_batch(number: int) -> None:
    batch = drawer("qwen").batch(number, ROWS, 0.4, 240)
    assert len(batch.scenes) == len(batch.pixels["video_grid_thw"]) == 1
    assert int(batch.pixels["video_grid_thw"][0, 0]) == 120


@torch.inference_mode()
def test_a_run_extends_a_checkpoint_with_layers_that_add_nothing(tmp_path: Path) -> None:
    start = demo_folder("qwen-draft")
    plan = Plan("qwen", "draft", minutes=1.0, batch_size=2, extend=str(start), layers=3, frames=[16])
    trainer, before = Trainer(plan, tmp_path), load_model(start)
    assert len(text_layers(trainer.model)) == trainer.progress.layers == 3
    batch = trainer.drawer.batch(3, ROWS, 0.4)
    first, second = (caption_logits(m, batch, video_tokens(m, batch), None) for m in (before, trainer.model))
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


def test_layers_that_deepstack_adds_behind_stay_where_they_are() -> None:
    assert places(CHECKPOINTS["qwen3", "target"], 6, 18) == [0, 1, 2, 6, 10, 14]
    assert places(CHECKPOINTS["qwen", "target"], 6, 18) == [0, 3, 6, 9, 12, 15]
    for sizes in CHECKPOINTS.values():
        assert len(sizes.deepstack) <= sizes.first_layers
        assert places(sizes, sizes.text_layers, sizes.text_layers) == [*range(sizes.text_layers)]


def test_of_a_deep_text_model_a_shallow_one_takes_every_third_layer() -> None:
    state = {f"model.language_model.layers.{i}.mlp.weight": torch.tensor(i) for i in range(18)}
    state |= {"lm_head.weight": torch.tensor(40), "model.visual.blocks.3.mlp.weight": torch.tensor(50)}
    found = fewer_layers(state, 6)
    assert found.pop("lm_head.weight") == 40
    assert {name: int(value) for name, value in found.items()} == {
        f"model.language_model.layers.{i}.mlp.weight": 3 * i for i in range(6)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_the_stock_processor_writes(family: Family) -> None:
    times_s = (np.arange(8) / 2).astype(np.float32)
    frames = render(scene_for(5), times_s, 96, 96)
    stock = prepared(drawer(family).processor, frames, "Describe the video.")
    made = drawer(family).prompt_ids("Describe the video.", stock, [times_s, times_s])
    assert made.tolist() == stock["input_ids"].expand(2, -1).tolist()


def test_each_pair_of_frames_is_told_with_its_own_time() -> None:
    batch = batch_of("qwen3")
    told = [drawer("qwen3").tokenizer.decode(row) for row in batch.prompt_ids]
    times = [
        [float(time) for time in re.findall(r"<(\d\.\d) seconds><\|vision_start", text)] for text in told
    ]
    assert [len(row) for row in times] == [4, 4]
    assert times[0] != times[1]
    assert all(0.4 < later - earlier < 1.6 for row in times for earlier, later in pairwise(row))


@pytest.mark.parametrize(
    ("height", "width", "cells"),
    [(96, 96, 36), (192, 192, 36), (720, 1280, 32), (480, 640, 35), (64, 128, 32)],
)
@pytest.mark.parametrize("frames", [8, 16])
def test_pictures_of_any_size_take_about_the_same_video_tokens(
    height: int, width: int, cells: int, frames: int
) -> None:
    made = prepared(drawer("qwen3").processor, np.zeros((frames, height, width, 3), np.uint8), "What?")
    assert int((made["input_ids"] == drawer("qwen3").processor.video_token_id).sum()) == cells * frames // 2
