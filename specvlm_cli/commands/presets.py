"""`specvlm presets`: the named pairs, what they need, and which of them are on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm_cli.exits import ExitCode

if TYPE_CHECKING:
    from specvlm_cli.checkpoints import PresetView

SCHEMA = 1
_WIDTH = 80


def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[  # the app looks for it, see app.py
        bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")
    ] = False,
) -> int:
    """List the named pairs of target and draft, and which are on disk. Works offline.

    Memory is an estimate: the weights of both models in bf16, and their caches for the longest video that the
    preset reads. Working memory comes on top; leave a fifth more.
    """
    from specvlm.words import amount
    from specvlm_cli.checkpoints import preset_views
    from specvlm_cli.console import tables

    found = preset_views()
    if as_json:
        plain = [{**asdict(one), "memory_bytes": one.memory_bytes} for one in found]
        tables.as_json({"schema": SCHEMA, "presets": plain})
    else:
        for one in found:
            frames = one.frames.removesuffix(" frames")
            tables.line(f"{one.name:<20}{amount(one.memory_bytes):>9}   {_disk(one):<12}   frames: {frames}")
            pair = f"    {one.target} + {one.draft}"
            if len(pair) > _WIDTH:
                pair = pair.replace(" + ", "\n    + ")
            for text in pair.splitlines():
                tables.line(text, "dim")
    return ExitCode.OK


def _disk(one: PresetView) -> str:
    words = {"yes": "on disk", "partly": "part on disk", "no": "not on disk"}
    if one.target_on_disk == one.draft_on_disk:
        return words[one.target_on_disk]
    return f"target {words[one.target_on_disk]}, draft {words[one.draft_on_disk]}"
