"""`specvlm caption INPUT... -o OUT`: parse the flags, run one start, show how it ended.

Every flag has an environment variable, SPECVLM_ and its name in capitals; a flag given on the command line
wins. Defaults are those of the dataclasses in `specvlm.config`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import specvlm
from specvlm.config import (
    BackendName,
    FrameSettings,
    GenerationSettings,
    PositionsName,
    PrunerName,
    SpeculationSettings,
    TreeName,
)
from specvlm.preset import Preset, find_preset, presets
from specvlm_cli import engine, job
from specvlm_cli.commands.options import flag, variable
from specvlm_cli.discover import EXTENSIONS, discover
from specvlm_cli.exits import ExitCode, UsageError
from specvlm_cli.job import ChangePolicy, Request
from specvlm_cli.results import Outcome
from specvlm_cli.runner import Policy
from specvlm_cli.settings import CaptionSettings, ModelChoice
from specvlm_cli.talk import ProgressName, Talk, counted
from specvlm_cli.text import clean

DEFAULT_PRESET = "demo"
DEFAULT_OUT = Path("specvlm-out")
MOST = (1 << 31) - 1  # of anything that is counted
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_DEVICE = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|mps|(cuda|xpu)(:[0-9]{1,4})?")

_SPECULATION = SpeculationSettings()
_GENERATION = GenerationSettings()
_FRAMES = FrameSettings()

_INPUT, _MODELS, _GUESSING, _READING = "Input and output", "Models", "Speculation", "Frames"
_WRITING, _RESUME, _TALKING = "Generation", "Resume and failures", "Talking"


def _folder(text: str | Path) -> Path:
    if text == "":
        raise UsageError("--out is empty; give a folder")
    return Path(text)


def caption(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Folders, videos or quoted globs.")],
    out: Annotated[
        Path, flag(_INPUT, "--out -o", "Run folder for captions, failures and progress.", parser=_folder)
    ] = DEFAULT_OUT,
    recursive: Annotated[
        bool, flag(_INPUT, "--recursive/--no-recursive", "Enter folders below a folder.")
    ] = True,
    extensions: Annotated[
        str,
        flag(_INPUT, "--extensions", "Names that count as videos in folders and globs, separated by commas."),
    ] = ",".join(EXTENSIONS),
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
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="What to ask: TEXT, or @FILE. Default: the preset's.",
            rich_help_panel=_INPUT,
            metavar="TEXT",
        ),
    ] = None,
    system: Annotated[
        str | None, flag(_INPUT, "--system", "System message: TEXT, or @FILE.", metavar="TEXT")
    ] = None,
    preset: Annotated[
        str | None,
        flag(_MODELS, "--preset", "A named pair: " + ", ".join(one.name for one in presets()) + "."),
    ] = None,
    target: Annotated[
        str | None,
        flag(_MODELS, "--target", "Model whose captions these are: hub id or folder.", metavar="ID"),
    ] = None,
    draft: Annotated[
        str | None, flag(_MODELS, "--draft", "Model that guesses: hub id, folder or none.", metavar="ID")
    ] = None,
    revision: Annotated[
        str | None, flag(_MODELS, "--revision", "Branch, tag or commit of the target.", metavar="NAME")
    ] = None,
    draft_revision: Annotated[
        str | None, flag(_MODELS, "--draft-revision", "Branch, tag or commit of the draft.", metavar="NAME")
    ] = None,
    dtype: Annotated[DtypeName, flag(_MODELS, "--dtype", "auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[
        str | None,
        flag(_MODELS, "--device-map", "Where the target goes, e.g. cuda:1 or auto.", metavar="MAP"),
    ] = None,
    local_files_only: Annotated[
        bool, flag(_MODELS, "--local-files-only", "Never ask the model hub.")
    ] = False,
    trust_remote_code: Annotated[
        bool, flag(_MODELS, "--trust-remote-code", "Run code that comes with a checkpoint.")
    ] = False,
    pruner: Annotated[
        PrunerName, flag(_GUESSING, "--pruner", "Which video tokens the draft sees.")
    ] = _SPECULATION.pruner,
    prune_ratio: Annotated[
        float,
        flag(
            _GUESSING, "--prune-ratio", "Share of video tokens that the draft does not see.", metavar="SHARE"
        ),
    ] = _SPECULATION.prune_ratio,
    top_p: Annotated[
        float,
        flag(
            _GUESSING,
            "--top-p",
            "Share of the attention that the specvlm pruner takes first.",
            metavar="SHARE",
        ),
    ] = _SPECULATION.top_p,
    tree: Annotated[TreeName, flag(_GUESSING, "--tree", "Shape of one round's guesses.")] = _SPECULATION.tree,
    depth: Annotated[
        int, flag(_GUESSING, "--depth", "Depth of chain and dynamic trees, in tokens.", metavar="N")
    ] = _SPECULATION.depth,
    nodes: Annotated[
        int, flag(_GUESSING, "--nodes", "Most nodes of a dynamic tree, root included.", metavar="N")
    ] = _SPECULATION.nodes,
    positions: Annotated[
        PositionsName, flag(_GUESSING, "--positions", "Whether kept video tokens keep their positions.")
    ] = _SPECULATION.positions,
    fps: Annotated[
        float | None, flag(_READING, "--fps", "Frames to read per second.", metavar="RATE")
    ] = None,
    num_frames: Annotated[
        int | None, flag(_READING, "--num-frames", "Frames to read, whatever the length.", metavar="N")
    ] = None,
    min_frames: Annotated[
        int | None, flag(_READING, "--min-frames", "Fewest frames with --fps.", metavar="N")
    ] = None,
    max_frames: Annotated[
        int | None, flag(_READING, "--max-frames", "Most frames with --fps.", metavar="N")
    ] = None,
    max_pixels: Annotated[
        int | None,
        flag(_READING, "--max-pixels", "Most pixels of a frame; larger ones are scaled down.", metavar="N"),
    ] = None,
    total_pixels: Annotated[
        int | None, flag(_READING, "--total-pixels", "Most pixels of all frames of a video.", metavar="N")
    ] = None,
    video_backend: Annotated[
        BackendName, flag(_READING, "--video-backend", "Which reader to use.")
    ] = _FRAMES.backend,
    max_new_tokens: Annotated[
        int, flag(_WRITING, "--max-new-tokens", "Most tokens of a caption.", metavar="N")
    ] = _GENERATION.max_new_tokens,
    temperature: Annotated[
        float, flag(_WRITING, "--temperature", "0 is greedy; above 0 samples.", metavar="T")
    ] = _GENERATION.temperature,
    top_k: Annotated[
        int | None, flag(_WRITING, "--top-k", "Sample from the K likeliest tokens.", metavar="K")
    ] = _GENERATION.top_k,
    seed: Annotated[int, flag(_WRITING, "--seed", "Seed of sampling.", metavar="N")] = _GENERATION.seed,
    overwrite: Annotated[bool, flag(_RESUME, "--overwrite", "Caption the given videos anew.")] = False,
    retry_failed: Annotated[
        bool, flag(_RESUME, "--retry-failed", "Try videos again that failed before.")
    ] = False,
    on_config_change: Annotated[
        ChangePolicy,
        flag(
            _RESUME,
            "--on-config-change",
            "With captions of other settings there: stop, keep both, or a new folder.",
        ),
    ] = "error",
    fail_fast: Annotated[bool, flag(_RESUME, "--fail-fast", "Stop at the first failed video.")] = False,
    max_failures: Annotated[
        str | None,
        flag(_RESUME, "--max-failures", "Stop once N videos, or P% of them, have failed.", metavar="N|P%"),
    ] = None,
    exit_zero: Annotated[bool, flag(_RESUME, "--exit-zero", "Exit 0 although videos failed.")] = False,
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
    ] = 0.0,
    dry_run: Annotated[
        bool, flag(_TALKING, "--dry-run -n", "Print the videos that would be captioned.")
    ] = False,
    json_output: Annotated[bool, flag(_TALKING, "--json", "Print the outcome as one JSON object.")] = False,
    quiet: Annotated[bool, flag(_TALKING, "--quiet -q", "Say nothing unless something fails.")] = False,
    verbose: Annotated[bool, flag(_TALKING, "--verbose -v", "Show each caption, and tracebacks.")] = False,
    log_file: Annotated[
        Path | None,
        flag(_TALKING, "--log-file", "Append messages and progress to this file.", metavar="FILE"),
    ] = None,
    progress: Annotated[
        ProgressName, flag(_TALKING, "--progress", "Bar, a line every 30 s, or none; auto asks the terminal.")
    ] = "auto",
) -> int:
    """Caption what is new; run it again to go on.

    Each flag can also be set by an environment variable, e.g. SPECVLM_PRUNE_RATIO for --prune-ratio.
    """
    pair = _pair(preset, target)
    _check_models(pair, draft, draft_revision, device_map)
    settings = CaptionSettings(
        models=ModelChoice(
            name=engine.public_name(pair.target if pair else str(target)),
            load=pair.name if pair else str(target),
            draft=draft,
            revision=revision,
            draft_revision=draft_revision,
            dtype=dtype,
            device_map=device_map,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        ),
        prompt=_prompt(prompt, pair),
        system=None if system is None else _text("--system", system),
        frames=_frames(
            pair,
            video_backend,
            fps=fps,
            num_frames=num_frames,
            min_frames=min_frames,
            max_frames=max_frames,
            max_pixels=max_pixels,
            total_pixels=total_pixels,
        ),
        generation=GenerationSettings(max_new_tokens, temperature, top_k, seed),
        speculation=SpeculationSettings(pruner, prune_ratio, top_p, tree, positions, depth, nodes),
    )
    _refuse_pointless_baseline(settings, pair, baseline_sample)
    most, share = _most_failures(fail_fast, max_failures)
    with Talk(quiet=quiet, verbose=verbose, progress=progress, log_file=log_file) as talk:
        found = discover(inputs, recursive=recursive, extensions=_extensions(extensions))
        for folder in found.unreadable:
            talk.warn(f"left out, not readable: {folder}")
        request = Request(
            items=found.items,
            unreadable=len(found.unreadable),
            out=out,
            settings=settings,
            policy=Policy(baseline_sample=baseline_sample, limit=limit, max_failures=most),
            version=specvlm.__version__,
            overwrite=overwrite,
            retry_failed=retry_failed,
            on_config_change=on_config_change,
            max_failures_share=share,
            exit_zero=exit_zero,
        )
        if preset is None and target is None:
            talk.note(
                f"no --preset or --target: using the tiny {DEFAULT_PRESET} pair, it knows only drawn shapes; "
                "for real videos choose one, e.g. --preset qwen2.5-vl-7b"
            )
        return _show_plan(request, talk, json_output) if dry_run else _run(request, talk, json_output, quiet)


def _run(request: Request, talk: Talk, json_output: bool, quiet: bool) -> int:
    outcome = job.run(
        request,
        lambda: engine.load(request.settings, quiet=quiet),
        talk,
        check=lambda: engine.check_device(request.settings.models.device_map),
    )
    talk.close(outcome, overwriting=request.overwrite)
    if json_output:
        _print_json(outcome)
    return outcome.exit_code


def _show_plan(request: Request, talk: Talk, json_output: bool) -> int:
    outcome, paths = job.plan(request)
    names = [clean(os.fsdecode(path)) for path in paths]
    if json_output:
        _print_json(outcome, would_caption=names)
    else:
        for name in names:
            print(name)
    talk.note(
        f"{counted(len(names), 'video')} would be captioned into {outcome.out}; {outcome.done} are done"
    )
    return ExitCode.OK


def _print_json(outcome: Outcome, **more: Any) -> None:
    print(json.dumps(outcome.as_json() | more))


def _pair(preset: str | None, target: str | None) -> Preset | None:
    """Return the preset to use; None: the target that was given."""
    if preset is not None and target is not None:
        raise UsageError(
            f"--preset {clean(preset)} and --target {clean(target)} exclude each other; give one of them"
        )
    if target is not None:
        return None
    found = find_preset(preset or DEFAULT_PRESET)
    if found is None:
        known = ", ".join(one.name for one in presets())
        raise UsageError(
            f"--preset {clean(str(preset))} is unknown; choose {known}, or give --target and --draft"
        )
    return found


def _check_models(
    pair: Preset | None, draft: str | None, draft_revision: str | None, device_map: str | None
) -> None:
    if draft_revision is not None and (draft or (pair.draft if pair else "none")) == "none":
        raise UsageError(f"--draft-revision {clean(draft_revision)} has no draft to go with; give --draft")
    if device_map is not None and not _DEVICE.fullmatch(device_map):
        raise UsageError(
            f"--device-map {clean(device_map)!r} is unknown; give cuda, cuda:N, xpu, xpu:N, mps, cpu, auto, "
            "balanced, balanced_low_0 or sequential"
        )


def _prompt(given: Sequence[str] | None, pair: Preset | None) -> str:
    """Return the one prompt. The environment is read here: a variable is one prompt, with all its words."""
    from_environment = os.environ.get(variable("--prompt"))
    prompts = given or ([from_environment] if from_environment else [])
    if len(prompts) > 1:
        raise UsageError(
            f"--prompt was given {len(prompts)} times; this version takes one prompt for all videos"
        )
    if prompts:
        return _text("--prompt", prompts[0])
    return pair.prompt if pair else presets()[0].prompt


def _text(name: str, given: str) -> str:
    """Return TEXT, or what is in FILE for @FILE."""
    text = _file_text(name, given[1:]) if given.startswith("@") else given
    if not text.strip():
        raise UsageError(f"{name} is empty; give some text")
    if bad := re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text):
        raise UsageError(f"{name} holds the control character {bad.group()!r}; remove it")
    return text


def _file_text(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} @{clean(path)}: {reason}; give a text file, or the text itself") from error


def _frames(pair: Preset | None, backend: BackendName, **given: float | int | None) -> FrameSettings:
    """Return the preset's frame settings with what was given put over them."""
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    base = pair.frames if pair else _FRAMES
    if "fps" in chosen or "num_frames" in chosen:
        base = replace(base, fps=None, num_frames=None)
    fewest, most = chosen.get("min_frames", base.min_frames), chosen.get("max_frames", base.max_frames)
    if fewest > most and ("min_frames" in chosen) != ("max_frames" in chosen):
        given_name, given_value, other, value = (
            ("--min-frames", fewest, "--max-frames", most)
            if "min_frames" in chosen
            else ("--max-frames", most, "--min-frames", fewest)
        )
        whose = f"preset {pair.name}" if pair else "default"
        raise UsageError(
            f"{given_name} {given_value} goes against {other} {value}, which the {whose} sets; give {other} too"
        )
    return replace(base, backend=backend, **chosen)


def _extensions(text: str) -> list[str]:
    names = [name for name in re.split(r"[\s,]+", text) if name.strip(".")]
    if not names:
        raise UsageError(f"--extensions {clean(text)!r} names none; give e.g. mp4,webm")
    return names


def _refuse_pointless_baseline(settings: CaptionSettings, pair: Preset | None, share: float) -> None:
    draft = settings.models.draft or (pair.draft if pair else "none")
    if share and draft == "none":
        raise UsageError(f"--baseline-sample {share} compares with a draft, and there is none; give --draft")


def _most_failures(fail_fast: bool, text: str | None) -> tuple[int | None, float | None]:
    """Return `--max-failures` as a number of videos, or as a share of them."""
    if fail_fast and text is not None:
        raise UsageError(f"--fail-fast and --max-failures {clean(text)} exclude each other; give one of them")
    if fail_fast:
        return 1, None
    if text is None:
        return None, None
    if found := re.fullmatch(r"([0-9]*\.?[0-9]+)%", text):
        share = float(found.group(1)) / 100.0
        if 0.0 < share <= 1.0:
            return None, share
    elif re.fullmatch(r"[0-9]{1,10}", text) and 0 < int(text) <= MOST:
        return int(text), None
    raise UsageError(
        f"--max-failures {clean(text)} is no limit; give a number of videos, e.g. 10, or a share, e.g. 5%"
    )
