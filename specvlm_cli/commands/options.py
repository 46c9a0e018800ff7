"""How a flag is declared: its help, its group, and the environment variable that every flag has."""

from __future__ import annotations

from typing import Any

import typer

PREFIX = "SPECVLM_"


def variable(flag: str) -> str:
    """Return the environment variable of a long flag: `--prune-ratio` -> `SPECVLM_PRUNE_RATIO`."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def flag(group: str, names: str, text: str, **more: Any) -> Any:
    """Declare an option; `names` are its spellings, the long one first, e.g. `"--out -o"`."""
    long, *others = names.split()
    return typer.Option(
        long,
        *others,
        help=text,
        rich_help_panel=group,
        envvar=variable(long.partition("/")[0]),
        show_envvar=False,
        **more,
    )
