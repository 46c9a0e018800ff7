"""The flags of `specvlm caption`, in groups. Every flag has an environment variable: SPECVLM_ and its name.

Defaults are those of the dataclasses that the flags end up in. What a flag means is worked out in `caption.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from specvlm.config import (
    BackendName,
    FrameSettings,
    GenerationSettings,
    PositionsName,
    PrunerName,
    SpeculationSettings,
    TreeName,
)
from specvlm_cli.caption.start import ChangePolicy
from specvlm_cli.commands.options import flag, output, read_config
from specvlm_cli.console.messages import ProgressName
from specvlm_cli.console.safe_text import short
from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.inputs import EXTENSIONS
from specvlm_cli.run.lock import LockedPolicy
from specvlm_cli.workers.messages import OnOom

DEFAULT_OUT = Path("specvlm-out")
MOST = (1 << 31) - 1  # of anything that is counted
MOST_IN_FLIGHT = 1024
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_SPECULATION = SpeculationSettings()
_GENERATION = GenerationSettings()
_FRAMES = FrameSettings()

_INPUT, _MODELS, _GUESSING, _READING = "Input and output", "Models", "Speculation", "Frames"
_BATCH, _WRITING, _RESUME, _TALKING = (
    "Batch",
    "Generation",
    "Resume, failures and stopping",
    "Messages, measurement and configuration",
)


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """What to caption, and where to."""

    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Folders, videos, quoted globs, manifests (.parquet, .csv, .jsonl; a folder of Parquet parts), "
            "lists of paths (.txt), or - for paths on standard input.",
        ),
    ]
    out: Annotated[
        Path,
        flag(
            _INPUT,
            "--out -o",
            "Run folder for captions, failures and progress.",
            metavar="FOLDER",
            parser=output("out"),
        ),
    ] = DEFAULT_OUT
    recursive: Annotated[bool, flag(_INPUT, "--recursive/--no-recursive", "Search subfolders.")] = True
    extensions: Annotated[
        str,
        flag(
            _INPUT,
            "--extensions",
            "File extensions of videos in folders and globs, separated by commas.",
            metavar="LIST",
        ),
    ] = ",".join(EXTENSIONS)
    path_column: Annotated[
        str | None,
        flag(
            _INPUT, "--path-column", "Manifest column with the path. Default: a usual name.", metavar="NAME"
        ),
    ] = None
    id_column: Annotated[
        str | None,
        flag(_INPUT, "--id-column", "Manifest column with the id. Default: a usual name.", metavar="NAME"),
    ] = None
    start_column: Annotated[
        str | None,
        flag(_INPUT, "--start-column", "Manifest column with the start of a clip.", metavar="NAME"),
    ] = None
    end_column: Annotated[
        str | None, flag(_INPUT, "--end-column", "Manifest column with the end of a clip.", metavar="NAME")
    ] = None
    prompt_column: Annotated[
        str | None,
        flag(
            _INPUT,
            "--prompt-column",
            "Manifest column with a prompt, or prompts, for each video.",
            metavar="NAME",
        ),
    ] = None
    keep_columns: Annotated[
        str,
        flag(
            _INPUT,
            "--keep-columns",
            "Manifest columns to copy to the rows, separated by commas.",
            metavar="NAMES",
        ),
    ] = ""
    limit: Annotated[
        int | None,
        flag(
            _INPUT,
            "--limit",
            "Caption at most N videos, not counting finished ones.",
            metavar="N",
            min=1,
            max=MOST,
        ),
    ] = None
    min_age: Annotated[
        str,
        flag(
            _INPUT,
            "--min-age",
            "Skip files changed within this time, e.g. 60s; the next run takes them.",
            metavar="TIME",
        ),
    ] = "0s"
    allow_empty: Annotated[
        bool, flag(_INPUT, "--allow-empty", "Exit 0 if an input holds no video, instead of 2.")
    ] = False
    root: Annotated[
        Path | None,
        flag(_INPUT, "--root", "Read no file outside this folder, not even through links.", metavar="FOLDER"),
    ] = None
    shard: Annotated[
        str | None,
        flag(
            _INPUT,
            "--shard",
            "Caption only shard I of N; auto reads the job scheduler's variables.",
            metavar="I/N|auto",
        ),
    ] = None
    reshard: Annotated[
        bool, flag(_INPUT, "--reshard", "Redistribute the run folder over a different number of shards.")
    ] = False
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="The question, as TEXT or @FILE; repeat for several. Default: the preset's.",
            rich_help_panel=_INPUT,
            metavar="TEXT",
        ),
    ] = None
    system: Annotated[
        str | None, flag(_INPUT, "--system", "System message: TEXT, or @FILE.", metavar="TEXT")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which models, and where they go."""

    preset: Annotated[
        str | None,
        flag(
            _MODELS,
            "--preset",
            "Named pair of target and draft, see specvlm presets; auto: the largest that fits the GPUs.",
            metavar="NAME",
        ),
    ] = None
    target: Annotated[
        str | None,
        flag(_MODELS, "--target", "Large model that writes the captions: hub id or folder.", metavar="ID"),
    ] = None
    draft: Annotated[
        str | None,
        flag(
            _MODELS,
            "--draft",
            "Draft model or trained head: hub id, folder or none.",
            metavar="ID",
        ),
    ] = None
    revision: Annotated[
        str | None, flag(_MODELS, "--revision", "Branch, tag or commit of the target.", metavar="NAME")
    ] = None
    draft_revision: Annotated[
        str | None, flag(_MODELS, "--draft-revision", "Branch, tag or commit of the draft.", metavar="NAME")
    ] = None
    dtype: Annotated[DtypeName, flag(_MODELS, "--dtype", "Number format of the weights.")] = "auto"
    device_map: Annotated[
        str | None,
        flag(
            _MODELS,
            "--device-map",
            "Device of the target, e.g. cuda:1; auto spreads it over all GPUs.",
            metavar="MAP",
        ),
    ] = None
    gpus: Annotated[
        str | None,
        flag(
            _MODELS,
            "--gpus",
            "GPUs to use: all, a number, or a list such as 0,2. Default: all.",
            metavar="GPUS",
        ),
    ] = None
    local_files_only: Annotated[
        bool, flag(_MODELS, "--local-files-only", "Use local files only; never contact the model hub.")
    ] = False
    trust_remote_code: Annotated[
        bool, flag(_MODELS, "--trust-remote-code", "Allow checkpoints to run their own code.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PruningFlags:
    """What the draft sees of a video; None: the default, if the draft takes it."""

    pruner: Annotated[
        PrunerName | None,
        flag(
            _GUESSING,
            "--pruner",
            "How to choose the video tokens that the draft sees.",
            show_default=_SPECULATION.pruner,
        ),
    ] = None
    prune_ratio: Annotated[
        float | None,
        flag(
            _GUESSING,
            "--prune-ratio",
            "Share of video tokens hidden from the draft.",
            metavar="SHARE",
            show_default=f"{_SPECULATION.prune_ratio:g}",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        flag(
            _GUESSING,
            "--top-p",
            "Share of the attention that the specvlm pruner keeps first.",
            metavar="SHARE",
            show_default=f"{_SPECULATION.top_p:g}",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SpeculationFlags(PruningFlags):
    """How the draft guesses."""

    tree: Annotated[
        TreeName, flag(_GUESSING, "--tree", "Shape of the draft's guesses in each round; auto adapts it.")
    ] = _SPECULATION.tree
    depth: Annotated[
        int | None,
        flag(_GUESSING, "--depth", "Depth of chain and dynamic trees; limit for auto.", metavar="N"),
    ] = _SPECULATION.depth
    nodes: Annotated[
        int | None,
        flag(_GUESSING, "--nodes", "Most nodes of dynamic and auto trees, including the root.", metavar="N"),
    ] = _SPECULATION.nodes
    draft_vocab: Annotated[
        str | None,
        flag(
            _GUESSING,
            "--draft-vocab",
            "Restrict the draft to the N most used tokens, or to those in a file written by specvlm vocab.",
            metavar="N|FILE",
        ),
    ] = None
    positions: Annotated[
        PositionsName | None,
        flag(
            _GUESSING,
            "--positions",
            "Positions of the video tokens that the draft sees.",
            show_default=_SPECULATION.positions,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FrameFlags:
    """Which frames are read, and how."""

    fps: Annotated[
        float | None, flag(_READING, "--fps", "Frames to read per second of video.", metavar="RATE")
    ] = None
    num_frames: Annotated[
        int | None,
        flag(_READING, "--num-frames", "Frames to read from each video, whatever its length.", metavar="N"),
    ] = None
    min_frames: Annotated[
        int | None, flag(_READING, "--min-frames", "Minimum number of frames with --fps.", metavar="N")
    ] = None
    max_frames: Annotated[
        int | None, flag(_READING, "--max-frames", "Maximum number of frames with --fps.", metavar="N")
    ] = None
    max_pixels: Annotated[
        int | None,
        flag(
            _READING, "--max-pixels", "Maximum pixels per frame; larger frames are scaled down.", metavar="N"
        ),
    ] = None
    total_pixels: Annotated[
        int | None,
        flag(_READING, "--total-pixels", "Maximum pixels per video, all frames together.", metavar="N"),
    ] = None
    video_backend: Annotated[
        BackendName, flag(_READING, "--video-backend", "Video reader; auto is PyAV.")
    ] = _FRAMES.backend
    min_decoded: Annotated[
        float,
        flag(
            _READING,
            "--min-decoded",
            "Share of frames of a damaged video that must be readable.",
            metavar="SHARE",
        ),
    ] = _FRAMES.min_decoded
    decode_timeout: Annotated[
        str,
        flag(
            _READING,
            "--decode-timeout",
            "Time limit for reading one video; grows with its size.",
            metavar="TIME",
        ),
    ] = "60s"


@dataclass(frozen=True, kw_only=True)
class ReadingFlags(FrameFlags):
    """How many videos are read ahead."""

    decode_workers: Annotated[
        int | None,
        flag(
            _READING,
            "--decode-workers",
            "Videos to read in parallel. Default: depends on the CPU cores.",
            metavar="N",
            min=1,
            max=256,
        ),
    ] = None


def batch_size(text: str | int) -> int | None:
    """Return what `--batch-size` says; None: auto.

    Raises:
        UsageError: It is not auto or a number from 1 to 1024.
    """
    if text == "auto":
        return None
    if re.fullmatch(r"[0-9]{1,4}", str(text)) and 1 <= int(text) <= MOST_IN_FLIGHT:
        return int(text)
    given = Flag("batch_size", repr(short(str(text), 60)))
    raise UsageError("invalid", given, fix=f"use auto, or a number from 1 to {MOST_IN_FLIGHT}")


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """How many videos are decoded together."""

    batch_size: Annotated[
        int | None,
        flag(
            _BATCH,
            "--batch-size",
            "Videos to caption together on each GPU; auto: as many as fit, at most 32 (CPU) or 64 (GPU).",
            metavar="auto|N",
            parser=batch_size,
            show_default="auto",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """What the target writes."""

    max_new_tokens: Annotated[
        int, flag(_WRITING, "--max-new-tokens", "Maximum tokens per caption.", metavar="N")
    ] = _GENERATION.max_new_tokens
    temperature: Annotated[
        float, flag(_WRITING, "--temperature", "Sampling temperature; 0 is greedy.", metavar="T")
    ] = _GENERATION.temperature
    top_k: Annotated[
        int | None, flag(_WRITING, "--top-k", "Sample from the K most likely tokens.", metavar="K")
    ] = _GENERATION.top_k
    seed: Annotated[int, flag(_WRITING, "--seed", "Seed for sampling.", metavar="N")] = _GENERATION.seed
    exact: Annotated[
        bool,
        flag(
            _WRITING,
            "--exact/--no-exact",
            "Decide near-ties as stock generate() does, with plain steps. Matters in bfloat16 and float16.",
        ),
    ] = _GENERATION.exact


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """What is done again, what failures mean, when to stop."""

    overwrite: Annotated[bool, flag(_RESUME, "--overwrite", "Caption finished videos again.")] = False
    retry_failed: Annotated[bool, flag(_RESUME, "--retry-failed", "Retry videos that failed before.")] = False
    on_config_change: Annotated[
        ChangePolicy,
        flag(
            _RESUME,
            "--on-config-change",
            "If the folder holds captions made with other settings: error stops, reuse keeps both, "
            "new starts a new folder.",
        ),
    ] = "error"
    if_locked: Annotated[
        LockedPolicy,
        flag(
            _RESUME,
            "--if-locked",
            "If another process uses the folder: fail (exit 75), skip (exit 0) or wait.",
        ),
    ] = "fail"
    retries: Annotated[
        int,
        flag(_RESUME, "--retries", "Retries after temporary errors.", metavar="N", min=0, max=100),
    ] = 2
    timeout: Annotated[
        str, flag(_RESUME, "--timeout", "Time limit for the captions of one video.", metavar="TIME")
    ] = "10m"
    on_oom: Annotated[
        OnOom,
        flag(
            _RESUME,
            "--on-oom",
            "If memory runs out twice for a video: fail it, or reduce its frames (recorded in the row).",
        ),
    ] = "fail"
    max_runtime: Annotated[
        str | None,
        flag(_RESUME, "--max-runtime", "Stop after this time with exit code 75, e.g. 3h50m.", metavar="TIME"),
    ] = None
    grace: Annotated[
        str, flag(_RESUME, "--grace", "Time to finish videos in progress after a signal.", metavar="TIME")
    ] = "60s"
    fail_fast: Annotated[bool, flag(_RESUME, "--fail-fast", "Stop at the first failed video.")] = False
    max_failures: Annotated[
        str | None,
        flag(_RESUME, "--max-failures", "Stop after N failed videos, or P% of them.", metavar="N|P%"),
    ] = None
    exit_zero: Annotated[bool, flag(_RESUME, "--exit-zero", "Exit 0 even if videos failed.")] = False


@dataclass(frozen=True, kw_only=True)
class TalkingFlags:
    """What is said, and measured."""

    baseline_sample: Annotated[
        float,
        flag(
            _TALKING,
            "--baseline-sample",
            "Share of videos to decode plainly too, to compare and time.",
            metavar="SHARE",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0
    dry_run: Annotated[bool, flag(_TALKING, "--dry-run -n", "Print the videos to caption, and exit.")] = False
    json_output: Annotated[bool, flag(_TALKING, "--json", "Print the result as one JSON object.")] = False
    quiet: Annotated[bool, flag(_TALKING, "--quiet -q", "Print nothing unless something fails.")] = False
    verbose: Annotated[
        bool, flag(_TALKING, "--verbose -v", "Print each caption, and tracebacks of errors.")
    ] = False
    log_file: Annotated[
        Path | None,
        flag(_TALKING, "--log-file", "Append messages and progress to this file.", metavar="FILE"),
    ] = None
    progress: Annotated[
        ProgressName,
        flag(_TALKING, "--progress", "Progress bar, a line every 30 s, or none; auto: bar on a terminal."),
    ] = "auto"
    config: Annotated[
        Path | None,
        flag(
            _TALKING,
            "--config",
            "TOML file with flags by name, e.g. prune-ratio = 0.8.",
            metavar="FILE",
            is_eager=True,
            callback=read_config,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CaptionFlags(
    TalkingFlags,
    ResumeFlags,
    GenerationFlags,
    ReadingFlags,
    SpeculationFlags,
    BatchFlags,
    ModelFlags,
    InputFlags,
):
    """All of them; the groups are listed from the last to the first, as dataclasses collect fields."""
