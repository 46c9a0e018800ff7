"""The shipped pairs on the shipped clips: real files, trained weights, and stock `generate()` beside them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import specvlm
from specvlm.config import PRUNERS, TREES
from tests.tiny import stock_ids

EXAMPLES = Path(__file__).parents[2] / "examples" / "videos"
VIDEOS = sorted(file for file in EXAMPLES.iterdir() if file.suffix in (".mp4", ".webm"))
PRESETS = ("demo", "demo-llava", "demo-qwen3-vl")
LIMIT = 160


@cache
def pair(preset: str) -> tuple[specvlm.Captioner, Any]:
    """The captioner, and its target as stock loads it."""
    captioner = specvlm.load(preset)
    stock = AutoModelForImageTextToText.from_pretrained(captioner.info.target, dtype=torch.float32)
    return captioner, stock.eval()


@cache
def stock_caption(preset: str, video: Path) -> tuple[specvlm.PreparedVideo, tuple[int, ...]]:
    captioner, stock = pair(preset)
    prepared = captioner.prepare(video, "Describe the video.")
    return prepared, stock_ids(stock, prepared.inputs.tensors, LIMIT)


def test_there_are_eight_clips() -> None:
    assert len(VIDEOS) == 8
    assert {file.suffix for file in VIDEOS} == {".mp4", ".webm"}


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("video", VIDEOS, ids=lambda video: video.stem)
@pytest.mark.parametrize("tree", TREES)
def test_demo_captions_are_stock(preset: str, video: Path, tree: str) -> None:
    prepared, stock = stock_caption(preset, video)
    captioner, _ = pair(preset)
    assert prepared.inputs.video_tokens >= 128
    assert stock[-1] in captioner.generation_config.eos_token_id
    plain = captioner.caption(prepared, speculate=False, max_new_tokens=LIMIT)
    assert plain.token_ids == stock
    fast = captioner.caption(prepared, tree=tree, max_new_tokens=LIMIT)
    assert fast.token_ids == stock
    assert fast.stats.video_tokens_kept == round(0.1 * prepared.inputs.video_tokens)


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 1.0])
def test_every_pruner_on_one_demo_clip(preset: str, pruner: str, ratio: float) -> None:
    prepared, stock = stock_caption(preset, VIDEOS[-1])
    caption = pair(preset)[0].caption(
        prepared, pruner=pruner, prune_ratio=ratio, positions="compact", max_new_tokens=LIMIT
    )  # type: ignore[call-overload]
    assert caption.token_ids == stock


@pytest.mark.parametrize("preset", PRESETS)
def test_a_repetition_penalty_as_real_checkpoints_ship_it(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.05 over prompt and caption; captions repeat words, so choices do change on the way."""
    captioner, stock = pair(preset)
    prepared, _ = stock_caption(preset, VIDEOS[0])
    for model in (captioner.target.model, stock):
        monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.05)
    expected = stock_ids(stock, prepared.inputs.tensors, LIMIT)
    for tree in TREES:
        assert captioner.caption(prepared, tree=tree, max_new_tokens=LIMIT).token_ids == expected


def test_demo_captions_tell_the_truth() -> None:
    """At least 95 % of the facts of the example clips, read from the files as shipped."""
    from recipes.demo.captions import compare, facts_in

    told = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    right = asked = 0
    for video in VIDEOS:
        line = next(line for line in told.splitlines() if line.startswith(f"**{video.name}**"))
        truth = line.partition(": ")[2] if "): " not in line else line.partition("): ")[2]
        said = pair("demo")[0].detokenize(stock_caption("demo", video)[1])
        for hits, of in compare(facts_in(said), facts_in(truth)).values():
            right, asked = right + hits, asked + of
    assert asked > 50
    assert right >= 0.95 * asked
