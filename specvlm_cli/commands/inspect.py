"""`specvlm inspect VIDEO`: what the target looked at in one video and what the draft was given, as a picture.

Torch and Pillow are imported when the flags have turned out to make sense.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm.bench.words import frames_note
from specvlm.drafts.kinds import is_head
from specvlm.preset import Preset
from specvlm.words import counted, percent
from specvlm_cli.caption import engine
from specvlm_cli.caption.settings import CaptionSettings
from specvlm_cli.commands.bench_flags import in_range, one_prompt
from specvlm_cli.commands.caption_flags import DtypeName, FrameFlags, InputFlags, ModelFlags, PruningFlags
from specvlm_cli.commands.choices import (
    DEFAULT_PRESET,
    caption_settings,
    pair_of,
    read_limits,
)
from specvlm_cli.commands.options import output, same_as
from specvlm_cli.console.messages import STDERR
from specvlm_cli.console.safe_text import clean, storable
from specvlm_cli.exits import ExitCode, FatalError, Flag, UsageError
from specvlm_cli.readers import ReadJob
from specvlm_cli.readers.single import read_one
from specvlm_cli.safe_files import new_file

if TYPE_CHECKING:
    from specvlm import Captioner
    from specvlm.inspection import Inspection

SCHEMA = 1
_SHEET = "Output"
_MOST_PICTURES = 400
_MOST_STEPS = 24  # whose numbers fit on a line


@dataclass(frozen=True, kw_only=True)
class InspectFlags(FrameFlags, PruningFlags):
    """Of the video, the target, the pruner and the sheet."""

    video: Annotated[list[Path], typer.Argument(metavar="VIDEO", help="The one video to look at.")]
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="The question, as TEXT or @FILE. Default: the preset's.",
            rich_help_panel="Input and output",
            metavar="TEXT",
        ),
    ] = None
    system: Annotated[str | None, same_as(InputFlags, "system")] = None
    preset: Annotated[str | None, same_as(ModelFlags, "preset")] = None
    target: Annotated[str | None, same_as(ModelFlags, "target")] = None
    draft: Annotated[  # no variable: SPECVLM_DRAFT may be a small model, which nothing here depends on
        Path | None,
        typer.Option(
            "--draft",
            help="Folder of a trained head, to show what its compressor keeps. Default: the preset's.",
            rich_help_panel="Models",
            metavar="FOLDER",
        ),
    ] = None
    revision: Annotated[str | None, same_as(ModelFlags, "revision")] = None
    dtype: Annotated[DtypeName, same_as(ModelFlags, "dtype")] = "auto"
    device_map: Annotated[str | None, same_as(ModelFlags, "device_map")] = None
    local_files_only: Annotated[bool, same_as(ModelFlags, "local_files_only")] = False
    trust_remote_code: Annotated[bool, same_as(ModelFlags, "trust_remote_code")] = False
    # Without variables of their own: SPECVLM_OUT is a run folder, and SPECVLM_OVERWRITE means captions.
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="PNG to write. Default: VIDEO-inspect.png in the current folder.",
            parser=output("out"),
            rich_help_panel=_SHEET,
            metavar="FILE",
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the PNG if it exists.", rich_help_panel=_SHEET)
    ] = False
    light: Annotated[
        bool, typer.Option("--light", help="Draw on white instead of black.", rich_help_panel=_SHEET)
    ] = False
    pictures: Annotated[
        int | None,
        typer.Option(
            "--pictures",
            help="Maximum number of frames to show, evenly spaced. Default: 12.",
            rich_help_panel=_SHEET,
            metavar="N",
        ),
    ] = None
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object.", rich_help_panel=_SHEET)
    ] = False
    verbose: Annotated[  # the app looks for it, see app.py
        bool,
        typer.Option("--verbose", "-v", help="Print the traceback of an error.", rich_help_panel=_SHEET),
    ] = False


@dataclass(frozen=True, slots=True)
class _Question:
    """What the flags ask for."""

    video: Path
    captions: CaptionSettings
    sheet: Path


def inspect(flags: InspectFlags) -> int:
    """Draw what the target attends to in a video, and what the draft would see.

    The target reads the video and the prompt; nothing is generated, and no draft is loaded but a trained head.

    The sheet shows frames with the target's attention as heat, and the kept cells outlined.
    """
    in_range("pictures", flags.pictures, _MOST_PICTURES)
    pair = pair_of(flags.preset, flags.target)
    asked = _question(flags, pair)
    captions, prompt = asked.captions, asked.captions.prompts[0]
    limits = read_limits(flags)
    if flags.preset is None and flags.target is None:
        _tell(f"no --preset or --target: using the tiny {DEFAULT_PRESET} pair, it knows only drawn shapes")
    captioner = engine.load_captioner(captions.models, quiet=flags.json_output)
    read = read_one(ReadJob(0, os.fsencode(asked.video), captions.frames, captioner.frame_multiple), limits)
    number = flags.num_frames
    if number and (note := frames_note(number, len(read.pixels), captioner.frame_multiple)):
        _tell(note)

    from specvlm.inspection import look, look_through_head

    if captioner.draft is None:
        found = look(captioner, read, prompt, captions.speculation, system=captions.system)
    else:
        found = look_through_head(captioner, read, prompt, system=captions.system)
    _write(asked.sheet, _picture(found, flags, asked))
    _print(found, captioner, flags, asked)
    return ExitCode.OK


def _question(flags: InspectFlags, pair: Preset | None) -> _Question:
    one_prompt(flags.prompt, "inspect")
    captions = caption_settings(flags, pair, draft=_head(flags, pair) or "none")
    video = _existing_file(flags.video)
    return _Question(video, captions, _sheet_path(video, flags.out, flags.overwrite))


def _head(flags: InspectFlags, pair: Preset | None) -> str | None:
    """Return the folder of the head to look through; None: the draft is a small model.

    Raises:
        UsageError: A draft was given that is no head.
    """
    if flags.draft is None:
        return pair.draft if pair is not None and is_head(pair.draft) else None
    if not is_head(flags.draft):
        raise UsageError(
            Flag("draft", flags.draft),
            "is no folder of a trained head, and what a small model is given depends on --pruner alone",
            fix="leave it out",
        )
    return str(flags.draft)


def _existing_file(given: Sequence[Path]) -> Path:
    video, *others = given
    if others:
        raise UsageError(f"inspect takes one video at a time, and {1 + len(others)} were given; give one")
    if video.is_dir():
        raise UsageError(f"{clean(str(video))} is a folder; give one video of it")
    if not video.exists():
        raise UsageError(f"{clean(str(video))}: no such file; give a video")
    return video


def _sheet_path(video: Path, out: Path | None, overwrite: bool) -> Path:
    sheet = Path(f"{video.stem}-inspect.png") if out is None else out
    shown = clean(str(sheet))
    if sheet.suffix.lower() != ".png":
        raise UsageError(Flag("out", repr(shown)), "is no PNG", fix="give a name that ends with .png")
    if not sheet.parent.is_dir():
        raise UsageError(
            Flag("out", shown), ": its folder does not exist", fix="make it, or give another one"
        )
    if sheet.is_dir() or (sheet.exists() and not overwrite):
        fix = "give another --out" if sheet.is_dir() else "give --overwrite, or another --out"
        raise UsageError(f"{shown} exists; {fix}")
    return sheet


def _tell(message: str) -> None:
    print(clean(message), file=STDERR)


def _picture(found: Inspection, flags: InspectFlags, asked: _Question) -> bytes:
    from specvlm.inspection.drawing import DARK, LIGHT
    from specvlm.inspection.sheet import MOST_PICTURES, SheetText, draw_sheet

    text = SheetText(asked.video.name, asked.captions.models.name, asked.captions.prompts[0])
    png = io.BytesIO()
    theme = LIGHT if flags.light else DARK
    draw_sheet(found, text, flags.pictures or MOST_PICTURES, theme).save(png, "PNG")
    return png.getvalue()


def _write(sheet: Path, png: bytes) -> None:
    """Write the sheet under another name first: what is seen under its own is whole.

    Raises:
        FatalError: The folder takes no file.
    """
    temporary = sheet.with_name(f".specvlm-inspect-{os.getpid()}.png")
    try:
        with new_file(temporary) as file:
            file.write(png)
        temporary.replace(sheet)
    except OSError as error:
        shown = clean(str(sheet))
        raise FatalError(f"{shown}: cannot be written ({error.strerror}); give another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _print(found: Inspection, captioner: Captioner, flags: InspectFlags, asked: _Question) -> None:
    from specvlm_cli.console import tables

    if not flags.json_output:
        tables.pairs(_lines(found, asked))
        return
    about = {
        "schema": SCHEMA,
        "video": storable(str(asked.video)),
        "sheet": storable(str(asked.sheet)),
        "target": asked.captions.models.name,
        "target_revision": captioner.info.target_revision,
        "draft": None if captioner.info.draft is None else engine.public_name(captioner.info.draft),
        "dtype": captioner.info.dtype,
        "device": captioner.info.device,
        "prompt": asked.captions.prompts[0],
        "system": asked.captions.system,
    }
    tables.as_json(about | found.figures())


def _lines(found: Inspection, asked: _Question) -> list[tuple[str, str]]:
    grid = found.grid
    cells = f"{counted(grid.steps, 'step')} of {grid.rows} x {grid.columns} cells"
    return [
        ("sheet", str(asked.sheet)),
        ("pruner" if found.compression is None else "compressor", found.pruner_words),
        ("frames", f"{len(found.frames.pixels)}, {cells}"),
        (
            "video tokens",
            f"{found.video_tokens}, {percent(found.attention_to_video)} of the text's attention",
        ),
        *(_cells(found) if found.has_cells else [("the head sees", f"{_seen(found)}, made of all cells")]),
    ]


def _seen(found: Inspection) -> str:
    return f"{found.seen} ({percent(found.seen / found.video_tokens)})"


def _cells(found: Inspection) -> list[tuple[str, str]]:
    """Which video tokens are kept."""
    return [
        ("kept", f"{_seen(found)}, {_attention(found.attention_kept())}"),
        *((f"  {one.name}", f"{one.kept}, {_attention(one.attention)}") for one in found.stages),
        ("kept by step", _by_step([step.kept for step in found.steps])),
        *_beyond(found),
    ]


def _beyond(found: Inspection) -> list[tuple[str, str]]:
    """Video tokens of no step: the newline behind LLaVA-OneVision's video."""
    numbers = found.figures()["no_cells"]
    if not numbers["video_tokens"]:
        return []
    kept = numbers["kept_first"] + numbers["kept_second"]
    return [("of no step", f"{kept} of {counted(numbers['video_tokens'], 'newline token')} behind the video")]


def _attention(share: float) -> str:
    return f"{percent(share)} of the attention to the video"


def _by_step(kept: list[int]) -> str:
    if len(kept) <= _MOST_STEPS:
        return " ".join(map(str, kept))
    return f"{min(kept)} to {max(kept)}, {sum(kept) / len(kept):.1f} on average; --json has all"
