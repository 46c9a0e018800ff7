"""`specvlm doctor [OUT]`: what is wrong with this machine, and how to fix it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm.preset import find_preset, presets
from specvlm_cli.exits import ExitCode, Flag, UsageError

if TYPE_CHECKING:
    from specvlm_cli.doctor.checks import TimedVerdict

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_INDENT = 20  # of what a check found


def doctor(
    out: Annotated[
        Path, typer.Argument(metavar="[OUT]", help="Run folder to check. Default: the current folder.")
    ] = Path(),
    preset: Annotated[
        str, typer.Option("--preset", help="Pair for the generation test. Nothing is downloaded.")
    ] = "demo",
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="ID",
            help="Checkpoint to check: folder or hub id on disk. No weights are loaded.",
        ),
    ] = None,
    draft: Annotated[str | None, typer.Option("--draft", metavar="ID", help="Draft for that target.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[  # the app looks for it, see app.py
        bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")
    ] = False,
) -> int:
    """Check this machine: packages, devices, readers, disks, limits. Exit code 1 if a check fails.

    Takes about half a minute. What it writes for a test it removes again.
    """
    from specvlm_cli.console import tables
    from specvlm_cli.doctor.examination import examination

    if find_preset(preset) is None:
        known = ", ".join(one.name for one in presets())
        raise UsageError(Flag("preset", preset), ": there is no such preset", fix=f"give one of {known}")
    if draft is not None and target is None:
        raise UsageError(Flag("draft", draft), ": give the --target that it is meant for")
    tell = (lambda finding: None) if as_json else _tell
    found = examination(out, preset, tell, target=target, draft=draft)
    if as_json:
        tables.as_json(found.as_json())
    return ExitCode.OK if found.ok else ExitCode.FATAL


def _tell(finding: TimedVerdict) -> None:
    from specvlm_cli.console import tables

    fix = f" -> {finding.fix}" if finding.fix else ""
    status = f"{finding.status:<5}"
    tables.hanging(status, f"{finding.name:<14} {finding.detail}{fix}", _INDENT, _STYLES[finding.status])
