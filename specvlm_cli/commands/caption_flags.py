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
from specvlm.preset import presets
from specvlm_cli.commands.options import flag, output, read_config
from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.generating.messages import OnOom
from specvlm_cli.inputs import EXTENSIONS
from specvlm_cli.job import ChangePolicy, LockedPolicy
from specvlm_cli.talk import ProgressName
from specvlm_cli.text import short

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
    "Messages, measuring and configuration",
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
        flag(_INPUT, "--out -o", "Run folder for captions, failures and progress.", parser=output("out")),
    ] = DEFAULT_OUT
    recursive: Annotated[
        bool, flag(_INPUT, "--recursive/--no-recursive", "Enter folders below a folder.")
    ] = True
    extensions: Annotated[
        str,
        flag(_INPUT, "--extensions", "Names that count as videos in folders and globs, separated by commas."),
    ] = ",".join(EXTENSIONS)
    path_column: Annotated[
        str | None,
        flag(
            _INPUT, "--path-column", "Manifest column of the path; found by its usual names.", metavar="NAME"
        ),
    ] = None
    id_column: Annotated[
        str | None,
        flag(_INPUT, "--id-column", "Manifest column of the id; found by its usual names.", metavar="NAME"),
    ] = None
    start_column: Annotated[
        str | None, flag(_INPUT, "--start-column", "Manifest column of a part's start.", metavar="NAME")
    ] = None
    end_column: Annotated[
        str | None, flag(_INPUT, "--end-column", "Manifest column of a part's end.", metavar="NAME")
    ] = None
    prompt_column: Annotated[
        str | None,
        flag(
            _INPUT, "--prompt-column", "Manifest column of a video's own prompt, or prompts.", metavar="NAME"
        ),
    ] = None
    keep_columns: Annotated[
        str,
        flag(
            _INPUT,
            "--keep-columns",
            "Manifest columns that pass through to the rows, separated by commas.",
            metavar="NAMES",
        ),
    ] = ""
    limit: Annotated[
        int | None,
        flag(
            _INPUT,
            "--limit",
            "Work on at most N videos, after what is already done.",
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
            "Leave files that changed within this time for the next start, e.g. 60s.",
            metavar="TIME",
        ),
    ] = "0s"
    allow_empty: Annotated[
        bool, flag(_INPUT, "--allow-empty", "An input without a video is no mistake, only nothing to do.")
    ] = False
    root: Annotated[
        Path | None,
        flag(_INPUT, "--root", "Read nothing outside this folder, wherever links lead.", metavar="FOLDER"),
    ] = None
    shard: Annotated[
        str | None,
        flag(
            _INPUT,
            "--shard",
            "Caption shard I of N only; auto asks the job scheduler's variables.",
            metavar="I/N|auto",
        ),
    ] = None
    reshard: Annotated[
        bool, flag(_INPUT, "--reshard", "Divide the run folder anew, where it has another number of shards.")
    ] = False
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="What to ask: TEXT, or @FILE. Default: the preset's.",
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
            "A named pair: "
            + ", ".join(one.name for one in presets())
            + "; auto: the largest that fits the GPUs.",
        ),
    ] = None
    target: Annotated[
        str | None,
        flag(_MODELS, "--target", "Model whose captions these are: hub id or folder.", metavar="ID"),
    ] = None
    draft: Annotated[
        str | None,
        flag(
            _MODELS,
            "--draft",
            "What guesses: hub id or folder of a model, folder of a trained head, or none.",
            metavar="ID",
        ),
    ] = None
    revision: Annotated[
        str | None, flag(_MODELS, "--revision", "Branch, tag or commit of the target.", metavar="NAME")
    ] = None
    draft_revision: Annotated[
        str | None, flag(_MODELS, "--draft-revision", "Branch, tag or commit of the draft.", metavar="NAME")
    ] = None
    dtype: Annotated[DtypeName, flag(_MODELS, "--dtype", "auto, float32, bfloat16 or float16.")] = "auto"
    device_map: Annotated[
        str | None,
        flag(_MODELS, "--device-map", "Where the target goes, e.g. cuda:1 or auto.", metavar="MAP"),
    ] = None
    gpus: Annotated[
        str | None,
        flag(
            _MODELS,
            "--gpus",
            "all, how many, or which, e.g. 0,2: one worker on each. Default: all.",
            metavar="GPUS",
        ),
    ] = None
    local_files_only: Annotated[bool, flag(_MODELS, "--local-files-only", "Never ask the model hub.")] = False
    trust_remote_code: Annotated[
        bool, flag(_MODELS, "--trust-remote-code", "Run code that comes with a checkpoint.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PruningFlags:
    """What the draft sees of a video; None: as by default, where the draft can be told."""

    pruner: Annotated[
        PrunerName | None,
        flag(
            _GUESSING,
            "--pruner",
            "Which video tokens the draft sees.",
            show_default=_SPECULATION.pruner,
        ),
    ] = None
    prune_ratio: Annotated[
        float | None,
        flag(
            _GUESSING,
            "--prune-ratio",
            "Share of video tokens that the draft does not see.",
            metavar="SHARE",
            show_default=f"{_SPECULATION.prune_ratio:g}",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        flag(
            _GUESSING,
            "--top-p",
            "Share of the attention that the specvlm pruner takes first.",
            metavar="SHARE",
            show_default=f"{_SPECULATION.top_p:g}",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SpeculationFlags(PruningFlags):
    """How the draft guesses."""

    tree: Annotated[TreeName, flag(_GUESSING, "--tree", "Shape of one round's guesses.")] = _SPECULATION.tree
    depth: Annotated[
        int | None,
        flag(_GUESSING, "--depth", "Depth of chain and dynamic trees, most depth of auto.", metavar="N"),
    ] = _SPECULATION.depth
    nodes: Annotated[
        int | None,
        flag(_GUESSING, "--nodes", "Most nodes of dynamic and auto trees, root included.", metavar="N"),
    ] = _SPECULATION.nodes
    draft_vocab: Annotated[
        str | None,
        flag(
            _GUESSING,
            "--draft-vocab",
            "Have the draft guess from the N tokens that captions use most, or from those in a file of specvlm vocab.",
            metavar="N|FILE",
        ),
    ] = None
    positions: Annotated[
        PositionsName | None,
        flag(
            _GUESSING,
            "--positions",
            "Whether kept video tokens keep their positions.",
            show_default=_SPECULATION.positions,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FrameFlags:
    """Which frames are read, and how."""

    fps: Annotated[float | None, flag(_READING, "--fps", "Frames to read per second.", metavar="RATE")] = None
    num_frames: Annotated[
        int | None, flag(_READING, "--num-frames", "Frames to read, whatever the length.", metavar="N")
    ] = None
    min_frames: Annotated[
        int | None, flag(_READING, "--min-frames", "Fewest frames with --fps.", metavar="N")
    ] = None
    max_frames: Annotated[
        int | None, flag(_READING, "--max-frames", "Most frames with --fps.", metavar="N")
    ] = None
    max_pixels: Annotated[
        int | None,
        flag(_READING, "--max-pixels", "Most pixels of a frame; larger ones are scaled down.", metavar="N"),
    ] = None
    total_pixels: Annotated[
        int | None, flag(_READING, "--total-pixels", "Most pixels of all frames of a video.", metavar="N")
    ] = None
    video_backend: Annotated[
        BackendName, flag(_READING, "--video-backend", "Which reader to use; auto is PyAV.")
    ] = _FRAMES.backend
    min_decoded: Annotated[
        float,
        flag(
            _READING,
            "--min-decoded",
            "Share of the frames that must be intact in a damaged video.",
            metavar="SHARE",
        ),
    ] = _FRAMES.min_decoded
    decode_timeout: Annotated[
        str,
        flag(
            _READING,
            "--decode-timeout",
            "Most time to read one video, by each reader that is tried.",
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
            "Videos read at the same time. Default: by the cores.",
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
            "Videos decoded together on each GPU; auto: as many as memory holds and as help.",
            metavar="auto|N",
            parser=batch_size,
            show_default="auto",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """What the target writes."""

    max_new_tokens: Annotated[
        int, flag(_WRITING, "--max-new-tokens", "Most tokens of a caption.", metavar="N")
    ] = _GENERATION.max_new_tokens
    temperature: Annotated[
        float, flag(_WRITING, "--temperature", "0 is greedy; above 0 samples.", metavar="T")
    ] = _GENERATION.temperature
    top_k: Annotated[
        int | None, flag(_WRITING, "--top-k", "Sample from the K likeliest tokens.", metavar="K")
    ] = _GENERATION.top_k
    seed: Annotated[int, flag(_WRITING, "--seed", "Seed of sampling.", metavar="N")] = _GENERATION.seed
    exact: Annotated[
        bool,
        flag(
            _WRITING,
            "--exact/--no-exact",
            "Decide near-ties as stock generate() does, by plain steps; matters in bfloat16 and float16.",
        ),
    ] = _GENERATION.exact


@dataclass(frozen=True, kw_only=True)
class ResumeFlags:
    """What is done again, what failures mean, when to stop."""

    overwrite: Annotated[bool, flag(_RESUME, "--overwrite", "Caption the given videos anew.")] = False
    retry_failed: Annotated[bool, flag(_RESUME, "--retry-failed", "Try videos again that failed before.")] = (
        False
    )
    on_config_change: Annotated[
        ChangePolicy,
        flag(
            _RESUME,
            "--on-config-change",
            "With captions of other settings there: stop, keep both, or a new folder.",
        ),
    ] = "error"
    if_locked: Annotated[
        LockedPolicy,
        flag(_RESUME, "--if-locked", "With another start at work: fail (exit 75), skip (exit 0) or wait."),
    ] = "fail"
    retries: Annotated[
        int,
        flag(_RESUME, "--retries", "Further tries after faults that may pass.", metavar="N", min=0, max=100),
    ] = 2
    timeout: Annotated[
        str, flag(_RESUME, "--timeout", "Most time to generate the captions of one video.", metavar="TIME")
    ] = "10m"
    on_oom: Annotated[
        OnOom,
        flag(
            _RESUME, "--on-oom", "Where memory runs out twice: fail, or reduce the frames (the row says so)."
        ),
    ] = "fail"
    max_runtime: Annotated[
        str | None,
        flag(_RESUME, "--max-runtime", "Stop after this time, exit 75, e.g. 3h50m.", metavar="TIME"),
    ] = None
    grace: Annotated[
        str, flag(_RESUME, "--grace", "Most time to finish what is in hand after a signal.", metavar="TIME")
    ] = "60s"
    fail_fast: Annotated[bool, flag(_RESUME, "--fail-fast", "Stop at the first failed video.")] = False
    max_failures: Annotated[
        str | None,
        flag(_RESUME, "--max-failures", "Stop once N videos, or P% of them, have failed.", metavar="N|P%"),
    ] = None
    exit_zero: Annotated[bool, flag(_RESUME, "--exit-zero", "Exit 0 although videos failed.")] = False


@dataclass(frozen=True, kw_only=True)
class TalkingFlags:
    """What is said, and measured."""

    baseline_sample: Annotated[
        float,
        flag(
            _TALKING,
            "--baseline-sample",
            "Share of videos also decoded plainly, compared and timed.",
            metavar="SHARE",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0
    dry_run: Annotated[bool, flag(_TALKING, "--dry-run -n", "Print the videos that would be captioned.")] = (
        False
    )
    json_output: Annotated[bool, flag(_TALKING, "--json", "Print the outcome as one JSON object.")] = False
    quiet: Annotated[bool, flag(_TALKING, "--quiet -q", "Say nothing unless something fails.")] = False
    verbose: Annotated[bool, flag(_TALKING, "--verbose -v", "Show each caption, and tracebacks.")] = False
    log_file: Annotated[
        Path | None,
        flag(_TALKING, "--log-file", "Append messages and progress to this file.", metavar="FILE"),
    ] = None
    progress: Annotated[
        ProgressName, flag(_TALKING, "--progress", "Bar, a line every 30 s, or none; auto asks the terminal.")
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
