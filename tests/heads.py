"""Heads for tiny random targets, overfitted to the very captions of the test videos, so that guesses are accepted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specvlm.captioner import Captioner, PreparedVideo
from specvlm.drafts.compressor import DEFAULT_OPERATORS, OPERATORS, CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.model import VideoLM
from specvlm.training.example import Example, read_example
from specvlm.training.objective import ObjectiveSettings, distillation_loss
from tests.tiny import FamilyName, Size, random_frames, tiny_captioner

FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")
TARGET = Size(layers=3, seed=1, vocabulary=320)
NONE = CompressorConfig("none", ())
COMPRESSORS = {
    "none": NONE,
    **{name: CompressorConfig("single", (name,), ratio=3.0) for name in OPERATORS},
    "select": CompressorConfig("select", DEFAULT_OPERATORS, ratio=3.0),
    "weighted": CompressorConfig("weighted", OPERATORS, ratio=4.0),
    "concat": CompressorConfig("concat", ("resampler", "pool", "prune-guided"), ratio=3.0),
}
# Of other lengths, prompts and places of the video.
PROMPTS = ((3, 4, "Hi there."), (4, 2, "Look at <video> and tell."), (5, 6, "What?"))
FITTED_TOKENS = 20
STEPS, FURTHER_STEPS, RATE = 80, 14, 1e-2
Weights = dict[str, torch.Tensor]


def config_of(target: VideoLM, compressor: CompressorConfig = NONE) -> HeadConfig:
    """A head for this target."""
    return HeadConfig("tiny", None, target.family.name, target.hidden_size, compressor=compressor)


def videos_of(captioner: Captioner) -> list[PreparedVideo]:
    """The videos that heads are fitted to."""
    return [captioner.prepare(random_frames(seed, frames), prompt) for seed, frames, prompt in PROMPTS]


def written(captioner: Captioner, video: PreparedVideo, **options: Any) -> tuple[int, ...]:
    """What the target writes alone."""
    options = {"max_new_tokens": FITTED_TOKENS} | options
    return captioner.caption(video, speculate=False, **options).token_ids


def examples_of(target: VideoLM, told: Sequence[tuple[PreparedVideo, Sequence[int]]]) -> list[Example]:
    """What a head learns from videos and their captions."""
    target.keep_features()
    return [read_example(target, video.inputs, tokens) for video, tokens in told]


def fit(
    head: HeadModel, target: VideoLM, examples: Sequence[Example], steps: int, settings: ObjectiveSettings
) -> list[float]:
    """Overfit a head; -> the losses of its steps."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(head.parameters(), RATE)
    losses = []
    head.train()
    for _ in range(steps if examples else 0):
        optimizer.zero_grad()
        total = torch.zeros(())
        for example in examples:
            total = total + distillation_loss(head, target, example, settings, generator).total
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach()))
    head.eval()
    return losses


def target_captioner(family: FamilyName, size: Size = TARGET) -> Captioner:
    """A captioner without a draft, whose captions run to their limit."""
    captioner = tiny_captioner(family, size, None)
    captioner.generation_config.eos_token_id = []
    return captioner


@cache
def _fitted_weights(family: FamilyName, name: str, unroll: int) -> Weights:
    """Weights of a head that knows the captions of the test videos; fitted by one of the tests' processes."""
    kept = Path(os.environ["TESTS_SHARED_FOLDER"]) / f"head-{family}-{name}-{unroll}.safetensors"
    if not kept.exists():
        mine = kept.with_suffix(f".{os.getpid()}")
        save_file(_fit(family, name, unroll), mine)
        mine.rename(kept)
    return load_file(kept)


def _fit(family: FamilyName, name: str, unroll: int) -> Weights:
    """The common part is fitted without a compressor."""
    captioner = target_captioner(family)
    target = captioner.target
    head = HeadModel.fresh(target, config_of(target, COMPRESSORS[name]), seed=7)
    told = [(video, written(captioner, video)) for video in videos_of(captioner)]
    if name != "none":
        common = _fitted_weights(family, "none", unroll)
        head.load_state_dict(common, strict=False)
    steps = STEPS if name == "none" else FURTHER_STEPS
    fit(
        head,
        target,
        examples_of(target, told),
        steps,
        ObjectiveSettings(cross_entropy=1.0, unroll=unroll),
    )
    return {key: value.contiguous() for key, value in head.state_dict().items()}


def fitted_head(target: VideoLM, family: FamilyName, name: str = "none", *, unroll: int = 1) -> HeadModel:
    """A head for a target of the size `TARGET`, ready to guess."""
    head = HeadModel.fresh(target, config_of(target, COMPRESSORS[name]), seed=7)
    head.load_state_dict(_fitted_weights(family, name, unroll))
    return head.eval().requires_grad_(False)


def head_captioner(
    family: FamilyName,
    name: str = "none",
    *,
    unroll: int = 1,
    ids: Sequence[int] | None = None,
) -> Captioner:
    """A captioner whose draft is a head that is right most of the time about the test videos."""
    captioner = target_captioner(family)
    head = fitted_head(captioner.target, family, name, unroll=unroll)
    captioner.draft = HeadDraft(head, captioner.target, ids)
    captioner.info = replace(captioner.info, draft="head")
    return captioner


def fresh_captioner(family: FamilyName) -> Captioner:
    """A captioner whose head knows nothing."""
    captioner = target_captioner(family)
    config = config_of(captioner.target, COMPRESSORS["select"])
    head = HeadModel.fresh(captioner.target, config, seed=7).eval().requires_grad_(False)
    captioner.draft = HeadDraft(head, captioner.target)
    return captioner
