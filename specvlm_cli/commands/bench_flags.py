"""The flags of `specvlm bench`. What they mean is worked out in `bench.py`.

Lists are separated by commas. A flag that `caption` has too shares its variable, except
where that holds one value, or names a run folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from specvlm.bench.grid import Grid
from specvlm.bench.records import METHODS
from specvlm.config import PRUNERS, TREES
from specvlm_cli.commands.caption_flags import CaptionFlags, DtypeName
from specvlm_cli.commands.options import flag, output, same_as, variable
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import Flag, UsageError

_INPUT, _COMPARED, _TALKING = "Input and output", "What is compared", "Messages"
_GRID = Grid()
REPEAT = 3
MOST_REPEATS = 1000

Value = TypeVar("Value")


def listed(values: tuple[object, ...]) -> str:
    """Return values as they are typed."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def in_range(name: str, value: int | None, most: int) -> None:
    """Refuse a number below 1 or above `most`.

    Raises:
        UsageError: It is so.
    """
    if value is not None and not 1 <= value <= most:
        raise UsageError(Flag(name, value), "is out of range", fix=f"give 1 to {most}")


def one_prompt(given: list[str] | None, command: str) -> list[str] | None:
    """Return the one prompt there is; None: none was given.

    Raises:
        UsageError: There are several.
    """
    if given and len(given) > 1:
        raise UsageError(
            Flag("prompt"), f"was given {len(given)} times, and {command} asks one question", fix="give one"
        )
    return given or None


def values_of(name: str, text: str, kind: Callable[[str], Value], example: str) -> tuple[Value, ...]:
    """Return the values that a list names, each once.

    Raises:
        UsageError: The list is empty, or a value is not of this kind.
    """
    found: dict[Value, None] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        try:
            found[kind(part)] = None
        except ValueError as error:
            what = f"is no {'number' if kind is float else 'whole number'}"
            if part == text.strip():
                raise UsageError(Flag(name, repr(part)), what, fix=f"give e.g. {example}") from error
            raise UsageError(
                Flag(name, text), f": {clean(part)!r} {what}", fix=f"give e.g. {example}"
            ) from error
    if not found:
        raise UsageError(Flag(name, repr(text)), "is an empty list", fix=f"give e.g. {example}")
    return tuple(found)


def _list(panel: str, names: str, text: str, **more: Any) -> object:
    """Declare a list, without a variable: that of `caption` holds one value."""
    long, *others = names.split()
    return typer.Option(long, *others, help=text, rich_help_panel=panel, metavar="LIST", **more)


@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """All of them."""

    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT...]",
            help="Videos, folders, quoted globs, manifests or - as for caption. Default: the example clips.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        flag(
            _INPUT,
            "--limit",
            "Use at most N videos. Without INPUT, this also removes the time limit of 60 s.",
            metavar="N",
        ),
    ] = None
    out: Annotated[  # no variable: SPECVLM_OUT is a run folder
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for bench.parquet (one row per timed caption) and bench.html (plots).",
            rich_help_panel=_INPUT,
            metavar="FOLDER",
            parser=output("out"),
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="The question, as TEXT or @FILE. Default: the preset's.",
            rich_help_panel=_INPUT,
            metavar="TEXT",
        ),
    ] = None
    methods: Annotated[
        str | None,
        _list(_COMPARED, "--methods", f"Methods to compare: {listed(METHODS)}. Default: all that can run."),
    ] = None
    pruner: Annotated[
        str | None,
        _list(
            _COMPARED,
            "--pruner",
            f"Pruners of the specvlm method, of {listed(PRUNERS)}.",
            show_default=listed(_GRID.pruners),
        ),
    ] = None
    prune_ratio: Annotated[
        str | None,
        _list(
            _COMPARED,
            "--prune-ratio",
            "Shares of video tokens hidden from the draft, one measurement each.",
            show_default=listed(_GRID.prune_ratios),
        ),
    ] = None
    tree: Annotated[str, _list(_COMPARED, "--tree", f"Trees for sd, specvlm and head: {listed(TREES)}.")] = (
        listed(_GRID.trees)
    )
    num_frames: Annotated[
        str | None,
        _list(
            _COMPARED, "--num-frames", "Frames to read, one measurement per number. Default: the preset's."
        ),
    ] = None
    batch_size: Annotated[
        str,
        _list(
            _COMPARED,
            "--batch-size",
            "Videos to caption together, one measurement per number, stock included; auto: the largest that fits.",
        ),
    ] = listed(_GRID.batch_sizes)
    repeat: Annotated[
        int,
        flag(
            _COMPARED,
            "--repeat",
            "Timed turns per video, after one for warm-up.",
            metavar="N",
        ),
    ] = REPEAT
    max_new_tokens: Annotated[int, same_as(CaptionFlags, "max_new_tokens")] = CaptionFlags.max_new_tokens
    exact: Annotated[
        bool | None,
        flag(
            _COMPARED,
            "--exact/--no-exact",
            "Decide near-ties with plain steps. Default: both ways in bfloat16 and float16, to compare.",
        ),
    ] = None
    preset: Annotated[str | None, same_as(CaptionFlags, "preset")] = None
    target: Annotated[str | None, same_as(CaptionFlags, "target")] = None
    drafts: Annotated[  # its variable is read by ourselves, because a folder's name may hold spaces
        list[str] | None,
        typer.Option(
            "--draft",
            help="Draft model or trained head: hub id, folder or none. Repeat to compare several.",
            rich_help_panel=_COMPARED,
            metavar="ID",
        ),
    ] = None
    draft_vocab: Annotated[str | None, same_as(CaptionFlags, "draft_vocab")] = None
    revision: Annotated[str | None, same_as(CaptionFlags, "revision")] = None
    draft_revision: Annotated[str | None, same_as(CaptionFlags, "draft_revision")] = None
    dtype: Annotated[DtypeName, same_as(CaptionFlags, "dtype")] = "auto"
    device_map: Annotated[str | None, same_as(CaptionFlags, "device_map")] = None
    local_files_only: Annotated[bool, same_as(CaptionFlags, "local_files_only")] = False
    trust_remote_code: Annotated[bool, same_as(CaptionFlags, "trust_remote_code")] = False
    json_output: Annotated[
        bool, flag(_TALKING, "--json", "Print conditions and summaries as one JSON object.")
    ] = False
    quiet: Annotated[bool, flag(_TALKING, "--quiet -q", "Print no progress and no notes.")] = False
    verbose: Annotated[  # the app looks for it, see app.py
        bool,
        typer.Option("--verbose", "-v", help="Print the traceback of an error.", rich_help_panel=_TALKING),
    ] = False

    @property
    def draft(self) -> str | None:
        """The first draft that was given."""
        return next(iter(self.given_drafts), None)

    @property
    def given_drafts(self) -> tuple[str, ...]:
        """The drafts that were given; the variable holds one."""
        from_environment = os.environ.get(variable("--draft"))
        return tuple(self.drafts or ([from_environment] if from_environment else []))
