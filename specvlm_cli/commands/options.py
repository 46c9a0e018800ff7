"""How a command's flags are declared: as fields of a dataclass, each with its help, group and variable."""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import typer

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FLAG_NAMES, Flag, UsageError
from specvlm_cli.inputs.values import is_address

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PREFIX = "SPECVLM_"

Flags = TypeVar("Flags")


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


def output(name: str) -> Callable[[str | Path], Path]:
    """Return what makes a path of the value of `name`, which says where something is written."""

    def path(text: str | Path) -> Path:
        shown = str(text)
        if not shown:
            raise UsageError(Flag(name), "is empty", fix="give a path")
        if "://" in shown and is_address(os.fsencode(text)):
            why = ": nothing is written to remote addresses"
            raise UsageError(Flag(name, shown), why, fix="give a local path")
        return Path(text)

    return path


def same_as(flags: type, name: str) -> Any:
    """Return how another command declares a flag: its spellings, help, group and variable."""
    declared = get_type_hints(flags, include_extras=True)[name]
    return get_args(declared)[1]


def picked(flags: object, settings: type[DataclassInstance]) -> dict[str, Any]:
    """Return what flags say about the fields of a settings class, by name; without those that were not given."""
    names = [field.name for field in fields(settings)]
    found = {name: getattr(flags, FLAG_NAMES.get(name, name), None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def command(flags: type[Flags], run: Callable[[Flags], int]) -> Callable[..., int]:
    """Return a function with one parameter for each field of a dataclass of flags, which calls `run` with it.

    Its help is what `run` says.
    """

    def called(**given: Any) -> int:
        return run(flags(**given))

    hints = get_type_hints(flags, include_extras=True)
    parameters = [_parameter(field, hints[field.name]) for field in fields(flags)]  # type: ignore[arg-type]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = hints | {"return": int}
    called.__doc__, called.__name__ = run.__doc__, run.__name__
    return called


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a TOML file says as the defaults of the flags that are not given."""
    if path is None or context.resilient_parsing:
        return path
    shown = f"--config {clean(str(path))}"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}; give a TOML file that can be read") from error
    except ValueError as error:
        raise UsageError(f"{shown}: no valid TOML ({error}); fix it") from error
    names = _names_of_flags(context)
    if unknown := sorted(set(found) - set(names)):
        raise UsageError(
            f"{shown}: {clean(unknown[0])!r} is no flag; give names like those of --help, without --"
        )
    chosen = {names[key]: _checked(shown, key, value) for key, value in found.items()}
    if isinstance(chosen.get("prompt"), str):
        chosen["prompt"] = [chosen["prompt"]]
    if os.environ.get(variable("--prompt")):  # read by ourselves, because a prompt holds spaces
        chosen.pop("prompt", None)
    context.default_map = {**(context.default_map or {}), **chosen}
    return path


def _names_of_flags(context: typer.Context) -> dict[str, str]:
    """Return the name of each flag as people write it in a file -> the name of its parameter."""
    return {
        spelling.removeprefix("--"): str(one.name)
        for one in context.command.params
        for spelling in one.opts
        if spelling.startswith("--") and spelling != "--config"
    }


def _checked(shown: str, key: str, value: object) -> object:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | bool | int | float) for one in values):
        raise UsageError(f"{shown}: {clean(key)} is neither text nor a number; give one of those")
    return value
