"""`specvlm bench --shape`: the costs of a pair that is not at hand, on models of its shape with random weights."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from specvlm.bench.grid import WITH_DRAFT, Grid
from specvlm.bench.records import METHODS, Report
from specvlm_cli.commands.bench_flags import BenchFlags
from specvlm_cli.commands.choices import check_device
from specvlm_cli.exits import UsageError
from specvlm_cli.screen.bench import BenchTalk
from specvlm_cli.text import clean

if TYPE_CHECKING:
    import torch

    from specvlm.bench.modelled import Pair

_OF_CHECKPOINTS = (
    "inputs",
    "prompt",
    "preset",
    "target",
    "drafts",
    "revision",
    "draft_revision",
    "limit",
    "draft_vocab",
)
_FRAMES = 64  # a modelled video has no length of its own
_MANY = 1_000_000_000  # parameters that a CPU is slow with
_CANNOT = ("assisted", "head")  # their acceptance cannot be given


def refuse_mixture(flags: BenchFlags) -> None:
    """Refuse flags of checkpoints beside a shape, and flags of shapes without one.

    Raises:
        UsageError: It is so.
    """
    if flags.shape is None:
        for name in ("draft_shape", "assume_accepted", "layers", "frame_size"):
            if getattr(flags, name) is not None:
                raise UsageError(f"{_flag(name)} {getattr(flags, name)} has no --shape to go with; give one")
        return
    if flags.exact is not None:
        raise UsageError(
            "--exact and --shape exclude each other: random weights settle nothing; leave it out"
        )
    for name in _OF_CHECKPOINTS:
        if getattr(flags, name):
            shown = {"inputs": "INPUT", "drafts": "--draft"}.get(name, _flag(name))
            raise UsageError(f"{shown} and --shape exclude each other: a shape has random weights; give one")
    if (flags.draft_shape is None) != (flags.assume_accepted is None):
        raise UsageError("--draft-shape and --assume-accepted belong together; give both, or neither")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def modelled_grid(flags: BenchFlags, grid: Grid) -> Grid:
    """The grid of a shape bench: without what cannot be modelled, where the methods were not asked for by name."""
    unfit = (*_CANNOT, *(WITH_DRAFT if flags.draft_shape is None else ()))
    methods = tuple(one for one in METHODS if one not in unfit) if flags.methods is None else grid.methods
    frames = grid.num_frames if flags.num_frames is not None else (_FRAMES,)
    return replace(grid, methods=methods, num_frames=frames)


def modelled(flags: BenchFlags, grid: Grid, command: str, talk: BenchTalk) -> Report:
    """Build the models and measure them. Here torch is imported.

    Raises:
        ConfigError: There is no such shape, it cannot be modelled, or it does not fit into memory.
    """
    check_device(flags.device_map)

    from specvlm.bench.measure import Asked
    from specvlm.bench.modelled import (
        Load,
        ModelledSetup,
        bench_modelled,
        build_pair,
        check_setup,
        parameters_of,
        refuse_without_memory,
    )
    from specvlm.bench.shapes import frame_size_of

    pair, device = _pair(flags), _device(flags)
    dtype = _dtype(flags, device)
    size = frame_size_of(pair.target) if flags.frame_size is None else _size(flags.frame_size)
    check_setup(pair, grid, size)
    frames = max(number for number in grid.num_frames if number is not None)
    load = Load(frames, size, flags.max_new_tokens, max(grid.batch_sizes))
    refuse_without_memory(pair, load, dtype, device)
    talk.note(pair.label)
    count = parameters_of(pair)
    if device.type == "cpu" and pair.layers is None and count >= _MANY:
        talk.note(
            f"building {count / 1e9:.1f} billion parameters on the CPU, which takes minutes, and so does each "
            "caption; --layers N builds only N of the target's layers"
        )
    captioner = build_pair(pair, device, dtype)
    asked = Asked(
        command=command,
        target=captioner.info.target,
        draft=captioner.info.draft,
        prompt="random tokens",
        max_new_tokens=flags.max_new_tokens,
        repeat=flags.repeat,
        clips=f"random pixels of {size[0]} x {size[1]}",
    )
    with talk.working():
        return bench_modelled(captioner, ModelledSetup(grid, size, asked), talk)


def _size(text: str) -> tuple[int, int]:
    """Read HxW.

    Raises:
        UsageError: It is not that.
    """
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if found is None:
        raise UsageError(f"--frame-size {clean(text)} is not a height and a width; give e.g. 360x640")
    return int(found[1]), int(found[2])


def _pair(flags: BenchFlags) -> Pair:
    from specvlm.bench.modelled import make_pair
    from specvlm.published import find_shape

    draft = None if flags.draft_shape is None else find_shape(flags.draft_shape)
    return make_pair(find_shape(str(flags.shape)), draft, flags.assume_accepted or 0.0, flags.layers)


def _device(flags: BenchFlags) -> torch.device:
    import torch

    if flags.device_map is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, number = flags.device_map.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    if int(number or 0) >= there.get(kind, 0):
        raise UsageError(
            f"--device-map {flags.device_map}: a shape goes onto one device that is there; give cpu or e.g. cuda:0"
        )
    return torch.device(flags.device_map)


def _dtype(flags: BenchFlags, device: torch.device) -> torch.dtype:
    import torch

    if flags.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return cast("torch.dtype", getattr(torch, flags.dtype))
