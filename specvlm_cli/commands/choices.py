"""What flags mean that several commands share: the pair of models, prompts, frames. Reads no video, loads no model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specvlm.config import FrameSettings, GenerationSettings, SpeculationSettings
from specvlm.drafts.kept_tokens import KeptTokens
from specvlm.drafts.kinds import is_head
from specvlm.preset import Preset, find_preset, presets
from specvlm_cli import vocab
from specvlm_cli.caption import engine
from specvlm_cli.caption.settings import CaptionSettings, ModelChoice
from specvlm_cli.commands.caption_flags import CaptionFlags, FrameFlags
from specvlm_cli.commands.options import picked, variable
from specvlm_cli.console.safe_text import clean, short
from specvlm_cli.durations import positive_seconds
from specvlm_cli.exits import Flag, UsageError, excluding, flag_name
from specvlm_cli.inputs import MOST_PROMPTS, InputOptions, Inputs
from specvlm_cli.readers import Limits

if TYPE_CHECKING:
    from specvlm_cli.commands.audit import AuditFlags
    from specvlm_cli.commands.inspect import InspectFlags
    from specvlm_cli.commands.train_flags import TrainFlags

DEFAULT_PRESET, AUTO_PRESET = "demo", "auto"
_DEVICE = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|mps|(cuda|xpu)(:[0-9]{1,4})?")
_FRAMES = FrameSettings()
_OF_SMALL_MODELS = ("pruner", "prune_ratio", "top_p", "positions")


def pair_of(preset: str | None, target: str | None) -> Preset | None:
    """Return the preset to use; None: the target that was given."""
    if preset is not None and target is not None:
        raise excluding(Flag("preset", preset), Flag("target", target))
    if target is not None:
        return None
    found = find_preset(preset or DEFAULT_PRESET)
    if found is None:
        known = ", ".join(one.name for one in presets())
        raise UsageError(
            Flag("preset", preset), "is unknown", fix=f"choose {known}, or give --target and --draft"
        )
    return found


def draft_of(draft: str | None, pair: Preset | None) -> str | None:
    """Return the draft to use: what was given, else the preset's; None: none."""
    found = draft or (pair.draft if pair else "none")
    return None if found == "none" else found


def refuse_for_head(draft: str | None, flags: object) -> None:
    """Refuse settings of what a draft sees of a video where the draft is a trained head: its compressor decides that.

    Args:
        draft: What `draft_of` gave.
        flags: What was asked for.

    Raises:
        UsageError: One of these settings was given, and the draft is a head.
    """
    name = next((name for name in _OF_SMALL_MODELS if getattr(flags, name, None) is not None), None)
    if draft is None or name is None or not is_head(draft):
        return
    value = getattr(flags, name)
    raise UsageError(
        Flag(name, value),
        f"has no effect on {clean(engine.public_name(draft))}, a trained head: its own compressor decides what it "
        "sees of a video",
        fix="leave it out",
    )


def check_models(draft: str | None, draft_revision: str | None, device_map: str | None) -> None:
    """Refuse a draft's revision without a draft, or of a head's folder, and a place that no device has by name.

    Raises:
        UsageError: It is so.
    """
    if draft_revision is not None and draft is None:
        raise UsageError(
            Flag("draft_revision", draft_revision), "has no draft to go with", fix="give --draft"
        )
    if draft_revision is not None and is_head(str(draft)):
        raise UsageError(
            Flag("draft_revision", draft_revision),
            ": a trained head is a folder, without revisions",
            fix="leave it out",
        )
    check_device(device_map)


def check_device(device_map: str | None) -> None:
    """Refuse a place that no device has by name.

    Raises:
        UsageError: It is none.
    """
    if device_map is not None and not _DEVICE.fullmatch(device_map):
        raise UsageError(
            Flag("device_map", repr(device_map)),
            "is unknown",
            fix="give cuda, cuda:N, xpu, xpu:N, mps, cpu, auto, balanced, balanced_low_0 or sequential",
        )


def prompt_texts(texts: Sequence[str] | None, pair: Preset | None) -> tuple[str, ...]:
    """Return the prompts. The environment is read here: a variable is one prompt, with all its words."""
    from_environment = os.environ.get(variable("--prompt"))
    prompts = tuple(
        text_of("prompt", text) for text in texts or ([from_environment] if from_environment else [])
    )
    if len(set(prompts)) < len(prompts):
        raise UsageError(Flag("prompt"), "was given twice with the same text", fix="give each prompt once")
    if len(prompts) > MOST_PROMPTS:
        raise UsageError(
            Flag("prompt"), f"was given {len(prompts)} times", fix=f"give at most {MOST_PROMPTS}"
        )
    return prompts or (pair.prompt if pair else presets()[0].prompt,)


def text_of(name: str, text: str) -> str:
    """Return TEXT, or what is in FILE for @FILE."""
    text = _file_text(name, text[1:]) if text.startswith("@") else text
    if not text.strip():
        raise UsageError(Flag(name), "is empty", fix="give some text")
    if bad := re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text):
        raise UsageError(Flag(name), f"holds the control character {bad.group()!r}", fix="remove it")
    return text


def _file_text(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        fix = "give a text file, or the text itself"
        raise UsageError(Flag(name, f"@{path}"), f": {reason}", fix=fix) from error


def frame_settings(flags: FrameFlags, pair: Preset | None) -> FrameSettings:
    """Return the preset's frame settings with what was given put over them."""
    chosen = picked(flags, FrameSettings)
    base = pair.frames if pair else _FRAMES
    if "fps" in chosen or "num_frames" in chosen:
        base = replace(base, fps=None, num_frames=None)
    fewest, most = chosen.get("min_frames", base.min_frames), chosen.get("max_frames", base.max_frames)
    if fewest > most and ("min_frames" in chosen) != ("max_frames" in chosen):
        both = Flag("min_frames", fewest), Flag("max_frames", most)
        given, other = both if "min_frames" in chosen else both[::-1]
        whose = f", which the {f'preset {pair.name}' if pair else 'default'} sets"
        raise UsageError(given, "goes against", other, whose, fix=f"give {flag_name(other)} too")
    return replace(base, **chosen)


def guessable(text: str | None, draft: str | None) -> int | KeptTokens | None:
    """Return what `--draft-vocab` says; None: it was not given.

    Args:
        text: The flag.
        draft: What `draft_of` gave.

    Raises:
        UsageError: There is no draft, or it is neither a number nor a file of `specvlm vocab`.
    """
    if text is None:
        return None
    if draft is None:
        raise UsageError(Flag("draft_vocab", text), "has no draft to go with", fix="give --draft")
    return vocab.parse(text)


def model_choice(flags: object, pair: Preset | None, **more: Any) -> ModelChoice:
    """Return which models to load, and how; `more` goes over what the flags say."""
    chosen = picked(flags, ModelChoice)
    target = pair.target if pair else chosen["target"]
    chosen |= {"name": engine.public_name(target), "target": pair.name if pair else target}
    return ModelChoice(**chosen | more)


def caption_settings(
    flags: CaptionFlags | TrainFlags | InspectFlags, pair: Preset | None, **models: Any
) -> CaptionSettings:
    """Return what captions depend on, and how they are made; `models` goes over what the flags say.

    Raises:
        UsageError: Flags contradict each other.
        ConfigError: A setting is out of range.
    """
    draft = draft_of(models.get("draft", flags.draft), pair)
    check_models(draft, getattr(flags, "draft_revision", None), flags.device_map)
    refuse_for_head(draft, flags)
    vocabulary = guessable(getattr(flags, "draft_vocab", None), draft)
    return CaptionSettings(
        models=model_choice(flags, pair, draft_vocab=vocabulary, **models),
        prompts=prompt_texts(flags.prompt, pair),
        system=None if flags.system is None else text_of("system", flags.system),
        frames=frame_settings(flags, pair),
        generation=GenerationSettings(**picked(flags, GenerationSettings)),
        speculation=SpeculationSettings(**picked(flags, SpeculationSettings)),
    )


def read_limits(flags: FrameFlags | AuditFlags) -> Limits:
    """Return what reading one video may take."""
    return Limits(timeout_s=positive_seconds("decode_timeout", flags.decode_timeout))


def runtime_limit_s(flags: CaptionFlags | TrainFlags) -> float | None:
    """Return after how many seconds to stop; None: never."""
    return None if flags.max_runtime is None else positive_seconds("max_runtime", flags.max_runtime)


def input_options(flags: object, extensions: str, **more: Any) -> InputOptions:
    """Return how inputs are read; `more` goes over what the flags say."""
    chosen = picked(flags, InputOptions) | {"extensions": tuple(_extensions(extensions))}
    return InputOptions(**chosen | more)


def warn_of_unused_times(inputs: Inputs, warn: Callable[[str], None]) -> None:
    """Say which columns of manifests seem to name parts of videos and are not read: whole videos are captioned."""
    for manifest, columns in inputs.report.unused_times.items():
        names = short(", ".join(columns), 200)
        warn(
            f"{manifest}: whole videos are captioned, without the times in {names}; for parts, give columns of numbers "
            "or H:MM:SS with --start-column and --end-column, or an empty name to say that none are meant"
        )


def refuse_empty(inputs: Inputs, advice: str) -> None:
    """Refuse arguments that named no video.

    Args:
        inputs: Read to their end.
        advice: What to do about it.

    Raises:
        UsageError: There is one.
    """
    if empty := inputs.report.empty:
        more = f", like {len(empty) - 1} more inputs" if len(empty) > 1 else ""
        raise UsageError(f"{empty[0]}: no video is there{more}; {advice}")


def _extensions(text: str) -> list[str]:
    names = [name for name in re.split(r"[\s,]+", text) if name.strip(".")]
    if not names:
        raise UsageError(Flag("extensions", repr(text)), "lists no extension", fix="give e.g. mp4,webm")
    return names


def root_of(root: Path | None) -> bytes | None:
    """Return the folder outside which nothing is read, links followed; None: there is none."""
    if root is None:
        return None
    if not root.is_dir():
        raise UsageError(Flag("root", root), ": no such folder", fix="give the folder that holds the videos")
    return os.fsencode(root.resolve())
