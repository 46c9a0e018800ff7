"""The flags of `specvlm train`. What they mean is worked out in `train.py`.

Those of `caption` share its variables. Defaults of head and loss are those of the library's classes, which bring torch;
they are named here for the help alone, and a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from specvlm.training.settings import Schedule, TrainingSettings
from specvlm_cli.commands.caption_flags import MOST, CaptionFlags, DtypeName, ReadingFlags
from specvlm_cli.commands.options import flag, output, read_config, same_as
from specvlm_cli.console.messages import ProgressName
from specvlm_cli.run.lock import LockedPolicy

CompressorName = Literal[
    "select",
    "weighted",
    "concat",
    "none",
    "prune",
    "prune-guided",
    "pool",
    "conv",
    "resampler",
    "text-only",
]

_INPUT, _HEAD, _LEARNING, _STOPPING, _TALKING = (
    "Input and output",
    "The head",
    "Learning",
    "Held-out videos and checkpoints",
    "Messages, measurement and configuration",
)
_TRAINING, _SCHEDULE = TrainingSettings(), Schedule()
HELD_OUT, HELD_OUT_LIMIT = "0.05", 32
CHECKPOINT_EVERY = "5m"


@dataclass(frozen=True, kw_only=True)
class TrainInputFlags:
    """What to learn from, and where to."""

    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEOS...",
            help="Folders, videos, quoted globs, manifests or - as for caption. They need no captions.",
        ),
    ]
    out: Annotated[  # no variable: SPECVLM_OUT is a run folder
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the head; pass it to --draft. Run again to resume.",
            parser=output("out"),
            rich_help_panel=_INPUT,
            metavar="HEAD",
        ),
    ]
    recursive: Annotated[bool, same_as(CaptionFlags, "recursive")] = CaptionFlags.recursive
    extensions: Annotated[str, same_as(CaptionFlags, "extensions")] = CaptionFlags.extensions
    path_column: Annotated[str | None, same_as(CaptionFlags, "path_column")] = None
    id_column: Annotated[str | None, same_as(CaptionFlags, "id_column")] = None
    start_column: Annotated[str | None, same_as(CaptionFlags, "start_column")] = None
    end_column: Annotated[str | None, same_as(CaptionFlags, "end_column")] = None
    prompt_column: Annotated[str | None, same_as(CaptionFlags, "prompt_column")] = None
    limit: Annotated[
        int | None, flag(_INPUT, "--limit", "Use the first N videos.", metavar="N", min=1, max=MOST)
    ] = None
    root: Annotated[Path | None, same_as(CaptionFlags, "root")] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="The question, as TEXT or @FILE; repeat for several. Default: the preset's.",
            rich_help_panel=_INPUT,
            metavar="TEXT",
        ),
    ] = None
    system: Annotated[str | None, same_as(CaptionFlags, "system")] = None


@dataclass(frozen=True, kw_only=True)
class TrainModelFlags(ReadingFlags):
    """Which target, how it captions, and how its videos are read: as in `caption`."""

    preset: Annotated[str | None, same_as(CaptionFlags, "preset")] = None
    target: Annotated[str | None, same_as(CaptionFlags, "target")] = None
    draft: Annotated[str | None, same_as(CaptionFlags, "draft")] = None
    revision: Annotated[str | None, same_as(CaptionFlags, "revision")] = None
    draft_revision: Annotated[str | None, same_as(CaptionFlags, "draft_revision")] = None
    dtype: Annotated[DtypeName, same_as(CaptionFlags, "dtype")] = "auto"
    device_map: Annotated[str | None, same_as(CaptionFlags, "device_map")] = None
    local_files_only: Annotated[bool, same_as(CaptionFlags, "local_files_only")] = False
    trust_remote_code: Annotated[bool, same_as(CaptionFlags, "trust_remote_code")] = False
    batch_size: Annotated[int | None, same_as(CaptionFlags, "batch_size")] = None
    max_new_tokens: Annotated[int, same_as(CaptionFlags, "max_new_tokens")] = CaptionFlags.max_new_tokens
    temperature: Annotated[float, same_as(CaptionFlags, "temperature")] = CaptionFlags.temperature
    top_k: Annotated[int | None, same_as(CaptionFlags, "top_k")] = None


@dataclass(frozen=True, kw_only=True)
class HeadFlags:
    """Which head, and what is minimised."""

    compressor: Annotated[
        CompressorName,
        flag(
            _HEAD,
            "--compressor",
            "How to compress the video tokens: a learned choice of operators, or one operator.",
        ),
    ] = "select"
    operators: Annotated[
        str | None,
        flag(
            _HEAD,
            "--operators",
            "Operators that select, weighted and concat choose from. Default: prune,pool,conv,resampler,text-only.",
            metavar="LIST",
        ),
    ] = None
    compression_ratio: Annotated[
        float | None,
        flag(
            _HEAD,
            "--compression-ratio",
            "Compression ratio: video tokens per remaining token. Default: 5.",
            metavar="X",
        ),
    ] = None
    queries: Annotated[
        int | None, flag(_HEAD, "--queries", "Tokens that the resampler outputs. Default: 2.", metavar="N")
    ] = None
    head_device: Annotated[
        str | None,
        flag(
            _HEAD,
            "--head-device",
            "Device to train the head on, e.g. cuda:1. Default: the target's.",
            metavar="DEVICE",
        ),
    ] = None
    cross_entropy: Annotated[
        float | None,
        flag(
            _HEAD,
            "--cross-entropy",
            "Weight of the cross-entropy to the target's logits. Default: 0.1.",
            metavar="W",
        ),
    ] = None
    smooth_l1: Annotated[
        float | None,
        flag(
            _HEAD,
            "--smooth-l1",
            "Weight of the smooth L1 distance to the target's features. Default: 1.",
            metavar="W",
        ),
    ] = None
    unroll: Annotated[
        int | None,
        flag(
            _HEAD,
            "--unroll",
            "Extra passes in which the head reads its own features. Default: 0.",
            metavar="N",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LearningFlags:
    """How the weights learn, and how long."""

    learning_rate: Annotated[
        float, flag(_LEARNING, "--learning-rate", "Learning rate of AdamW.", metavar="RATE")
    ] = _TRAINING.learning_rate
    accumulate: Annotated[int, flag(_LEARNING, "--accumulate", "Samples per step.", metavar="N")] = (
        _TRAINING.accumulate
    )
    clip_norm: Annotated[
        float | None,
        flag(
            _LEARNING,
            "--clip-norm",
            "Clip gradients to this norm. Default: off.",
            metavar="NORM",
        ),
    ] = _TRAINING.clip_norm
    epochs: Annotated[int, flag(_LEARNING, "--epochs", "Passes over the samples.", metavar="N")] = (
        _SCHEDULE.epochs
    )
    max_steps: Annotated[
        int | None, flag(_LEARNING, "--max-steps", "Maximum number of steps.", metavar="N")
    ] = None
    seed: Annotated[
        int,
        flag(
            _LEARNING,
            "--seed",
            "Seed for weights, order, noise, held-out videos and sampling.",
            metavar="N",
        ),
    ] = _TRAINING.seed


@dataclass(frozen=True, kw_only=True)
class StoppingFlags:
    """What is held out, how often the training is looked at and written down, and when it stops."""

    held_out: Annotated[
        str,
        flag(
            _STOPPING,
            "--held-out",
            "Videos for evaluation only: a share of all, 0 for none, or a folder.",
            metavar="SHARE|FOLDER",
        ),
    ] = HELD_OUT
    held_out_limit: Annotated[
        int,
        flag(
            _STOPPING, "--held-out-limit", "Maximum number of held-out videos.", metavar="N", min=1, max=MOST
        ),
    ] = HELD_OUT_LIMIT
    evaluate_every: Annotated[
        int,
        flag(_STOPPING, "--evaluate-every", "Steps between evaluations.", metavar="N"),
    ] = _SCHEDULE.evaluate_every
    checkpoint_every: Annotated[
        str,
        flag(
            _STOPPING,
            "--checkpoint-every",
            "Steps, or time such as 10m, between checkpoints.",
            metavar="N|TIME",
        ),
    ] = CHECKPOINT_EVERY
    max_runtime: Annotated[str | None, same_as(CaptionFlags, "max_runtime")] = None
    if_locked: Annotated[LockedPolicy, same_as(CaptionFlags, "if_locked")] = "fail"
    exit_zero: Annotated[
        bool, flag("Resume, failures and stopping", "--exit-zero", "Exit 0 even if samples were skipped.")
    ] = False
    json_output: Annotated[bool, flag(_TALKING, "--json", "Print the result as one JSON object.")] = False
    quiet: Annotated[bool, flag(_TALKING, "--quiet -q", "Print nothing unless something fails.")] = False
    verbose: Annotated[
        bool, flag(_TALKING, "--verbose -v", "Print each step and new caption, and tracebacks of errors.")
    ] = False
    log_file: Annotated[Path | None, same_as(CaptionFlags, "log_file")] = None
    progress: Annotated[ProgressName, same_as(CaptionFlags, "progress")] = "auto"
    config: Annotated[
        Path | None,
        flag(
            _TALKING,
            "--config",
            "TOML file with flags by name, e.g. accumulate = 16.",
            metavar="FILE",
            is_eager=True,
            callback=read_config,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainFlags(StoppingFlags, LearningFlags, HeadFlags, TrainModelFlags, TrainInputFlags):
    """All of them; the groups are listed from the last to the first, as dataclasses collect fields."""
