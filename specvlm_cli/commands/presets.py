"""`specvlm presets`: the named pairs, what they need, and which of them are on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm_cli.exits import ExitCode

if TYPE_CHECKING:
    from specvlm_cli.checkpoints import PresetView

SCHEMA = 1
_HEADER = ("preset", "target", "draft", "family", "frames", "memory", "on disk")


def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[  # the app looks for it, see app.py
        bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")
    ] = False,
) -> int:
    """List the named pairs of target and draft, and whether they are on disk already. Asks no network.

    Memory is an estimate: the weights of both models in bf16, and their caches for the longest video that the
    preset reads. Working memory comes on top; leave a fifth more.
    """
    from specvlm_cli import show
    from specvlm_cli.checkpoints import preset_views

    found = preset_views()
    if as_json:
        plain = [{**asdict(one), "memory_bytes": one.memory_bytes} for one in found]
        show.as_json({"schema": SCHEMA, "presets": plain})
    else:
        show.table(_HEADER, [_line(one) for one in found], right={5})
    return ExitCode.OK


def _line(one: PresetView) -> tuple[str, ...]:
    from specvlm_cli.screen.words import amount

    return one.name, one.target, one.draft, one.family, one.frames, amount(one.memory_bytes), _disk(one)


def _disk(one: PresetView) -> str:
    if one.target_on_disk == one.draft_on_disk:
        return one.target_on_disk
    return f"target {one.target_on_disk}, draft {one.draft_on_disk}"
