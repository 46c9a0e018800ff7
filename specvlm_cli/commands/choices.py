"""What flags mean that several commands share: the pair of models, prompts, frames. Reads no video, loads no model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from specvlm.config import FrameSettings
from specvlm.drafts.kept_tokens import KeptTokens
from specvlm.drafts.kinds import is_head
from specvlm.preset import Preset, find_preset, presets
from specvlm_cli import engine, vocab
from specvlm_cli.commands.caption_flags import FrameFlags
from specvlm_cli.commands.options import variable
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import MOST_PROMPTS, InputOptions, Inputs
from specvlm_cli.settings import ModelChoice
from specvlm_cli.text import clean, short

DEFAULT_PRESET, AUTO_PRESET = "demo", "auto"
_DEVICE = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|mps|(cuda|xpu)(:[0-9]{1,4})?")
_FRAMES = FrameSettings()


def pair_of(preset: str | None, target: str | None) -> Preset | None:
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


def draft_of(draft: str | None, pair: Preset | None) -> str | None:
    """Return the draft to use: what was given, else the preset's; None: none."""
    found = draft or (pair.draft if pair else "none")
    return None if found == "none" else found


def refuse_for_head(draft: str | None, given: Mapping[str, object]) -> None:
    """Refuse settings of what a draft sees of a video where the draft is a trained head: its compressor decides that.

    Args:
        draft: What `draft_of` gave.
        given: What was asked for, by the names of the flags.

    Raises:
        UsageError: It is so.
    """
    if draft is None or not given or not is_head(draft):
        return
    name, value = next(iter(given.items()))
    raise UsageError(
        f"--{name.replace('_', '-')} {value} has no effect on {clean(engine.public_name(draft))}, a trained head: "
        "its own compressor decides what it sees of a video; leave it out"
    )


def check_models(
    pair: Preset | None, draft: str | None, draft_revision: str | None, device_map: str | None
) -> None:
    """Refuse a draft's revision without a draft, or of a head's folder, and a place that no device has by name.

    Raises:
        UsageError: It is so.
    """
    if draft_revision is not None and draft_of(draft, pair) is None:
        raise UsageError(f"--draft-revision {clean(draft_revision)} has no draft to go with; give --draft")
    if draft_revision is not None and is_head(str(draft_of(draft, pair))):
        raise UsageError(
            f"--draft-revision {clean(draft_revision)}: a trained head is a folder, without revisions; leave it out"
        )
    check_device(device_map)


def check_device(device_map: str | None) -> None:
    """Refuse a place that no device has by name.

    Raises:
        UsageError: It is none.
    """
    if device_map is not None and not _DEVICE.fullmatch(device_map):
        raise UsageError(
            f"--device-map {clean(device_map)!r} is unknown; give cuda, cuda:N, xpu, xpu:N, mps, cpu, auto, "
            "balanced, balanced_low_0 or sequential"
        )


def prompt_texts(given: Sequence[str] | None, pair: Preset | None) -> tuple[str, ...]:
    """Return the prompts. The environment is read here: a variable is one prompt, with all its words."""
    from_environment = os.environ.get(variable("--prompt"))
    prompts = tuple(
        text_of("--prompt", text) for text in given or ([from_environment] if from_environment else [])
    )
    if len(set(prompts)) < len(prompts):
        raise UsageError("--prompt was given twice with the same text; give each prompt once")
    if len(prompts) > MOST_PROMPTS:
        raise UsageError(f"--prompt was given {len(prompts)} times; give at most {MOST_PROMPTS}")
    return prompts or (pair.prompt if pair else presets()[0].prompt,)


def text_of(name: str, given: str) -> str:
    """Return TEXT, or what is in FILE for @FILE."""
    text = _file_text(name, given[1:]) if given.startswith("@") else given
    if not text.strip():
        raise UsageError(f"{name} is empty; give some text")
    if bad := re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text):
        raise UsageError(f"{name} holds the control character {bad.group()!r}; remove it")
    return text


def _file_text(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} @{clean(path)}: {reason}; give a text file, or the text itself") from error


def frame_settings(flags: FrameFlags, pair: Preset | None) -> FrameSettings:
    """Return the preset's frame settings with what was given put over them."""
    names = ("fps", "num_frames", "min_frames", "max_frames", "max_pixels", "total_pixels")
    given = {name: getattr(flags, name) for name in names}
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
    return replace(base, backend=flags.video_backend, min_decoded=flags.min_decoded, **chosen)


class _Models(Protocol):
    """The flags that say which models to load; `caption` and `bench` both have them."""

    @property
    def target(self) -> str | None: ...

    @property
    def draft(self) -> str | None: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def draft_revision(self) -> str | None: ...

    @property
    def dtype(self) -> str: ...

    @property
    def device_map(self) -> str | None: ...

    @property
    def local_files_only(self) -> bool: ...

    @property
    def trust_remote_code(self) -> bool: ...


def guessable(given: str | None, draft: str | None) -> int | KeptTokens | None:
    """Return what `--draft-vocab` says; None: it was not given.

    Args:
        given: The flag.
        draft: What `draft_of` gave.

    Raises:
        UsageError: There is no draft, or it is neither a number nor a file of `specvlm vocab`.
    """
    if given is None:
        return None
    if draft is None:
        raise UsageError(f"--draft-vocab {clean(given)} has no draft to go with; give --draft")
    return vocab.parse(given)


def model_choice(flags: _Models, pair: Preset | None) -> ModelChoice:
    """Which models to load, and how."""
    return ModelChoice(
        name=engine.public_name(pair.target if pair else str(flags.target)),
        load=pair.name if pair else str(flags.target),
        draft=flags.draft,
        revision=flags.revision,
        draft_revision=flags.draft_revision,
        dtype=flags.dtype,
        device_map=flags.device_map,
        local_files_only=flags.local_files_only,
        trust_remote_code=flags.trust_remote_code,
    )


class _InputFlags(Protocol):
    """The flags that say where inputs are found and which columns a manifest has; `caption` and `train` have them."""

    @property
    def recursive(self) -> bool: ...

    @property
    def extensions(self) -> str: ...

    @property
    def path_column(self) -> str | None: ...

    @property
    def id_column(self) -> str | None: ...

    @property
    def start_column(self) -> str | None: ...

    @property
    def end_column(self) -> str | None: ...

    @property
    def prompt_column(self) -> str | None: ...


def input_options(flags: _InputFlags, **more: Any) -> InputOptions:
    """How inputs are read; `more` are options that only one command has."""
    return InputOptions(
        recursive=flags.recursive,
        extensions=tuple(_extensions(flags.extensions)),
        path_column=flags.path_column,
        id_column=flags.id_column,
        start_column=flags.start_column,
        end_column=flags.end_column,
        prompt_column=flags.prompt_column,
        **more,
    )


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
        raise UsageError(f"--extensions {clean(text)!r} names none; give e.g. mp4,webm")
    return names


def root_of(root: Path | None) -> bytes | None:
    """Return the folder outside which nothing is read, links followed; None: there is none."""
    if root is None:
        return None
    if not root.is_dir():
        raise UsageError(f"--root {clean(str(root))}: no such folder; give the folder that holds the videos")
    return os.fsencode(root.resolve())
