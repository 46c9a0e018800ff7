"""Help in plain text: `-h` shows the flags that most people need and some examples, `--help` every flag."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import typer
import typer.core

MOST_USED = {
    "audit": "--sample --json",
    "bench": "--preset --target --draft --methods --tree --batch-size --limit --repeat --out --json",
    "caption": "--preset --target --draft --prompt --out --batch-size --max-new-tokens --num-frames --fps "
    "--limit --retry-failed --shard --dry-run --quiet",
    "doctor": "--target --draft --json",
    "export": "--format --columns --failures --paths --overwrite",
    "inspect": "--preset --target --draft --prompt --out",
    "presets": "--json",
    "slurm": "--shards --time --gpus-per-task --partition --account --max-running --only-missing --setup",
    "status": "--only-missing --verify --json",
    "train": "--target --out --limit --epochs --batch-size --max-runtime",
    "vocab": "--out --size",
}
EXAMPLES = {
    "audit": ("specvlm audit out/", "specvlm audit out/ --sample 100 --json"),
    "bench": (
        "specvlm bench ./videos --preset qwen2.5-vl-7b --limit 8",
        "specvlm bench ./videos --preset qwen3-vl-8b --batch-size 1,8 -o bench/",
    ),
    "caption": (
        "specvlm caption ./videos --preset qwen3-vl-8b -o out/",
        'specvlm caption ./videos --preset qwen3-vl-8b --prompt "What happens?" -o out/',
        "specvlm caption clips.parquet --preset qwen3-vl-8b --keep-columns id -o out/",
        "find . -name '*.mp4' | specvlm caption - --preset qwen3-vl-8b -q -o out/",
    ),
    "doctor": (
        "specvlm doctor",
        "specvlm doctor --target Qwen/Qwen3-VL-8B-Instruct",
    ),
    "export": (
        "specvlm export out/ dataset/",
        "specvlm export out/ captions.csv --columns path,caption",
    ),
    "inspect": ("specvlm inspect clip.mp4 --preset qwen2.5-vl-7b",),
    "presets": ("specvlm presets",),
    "slurm": ("specvlm slurm out/ --shards 8 -- caption videos/ --preset qwen3-vl-8b | sbatch",),
    "specvlm": (
        "specvlm caption ./videos --preset qwen3-vl-8b -o out/",
        "specvlm status out/",
        "specvlm export out/ dataset/",
        "specvlm caption examples/videos --preset demo   # tiny models, any machine",
    ),
    "status": ("specvlm status out/", "specvlm status out/ --verify"),
    "train": ("specvlm train ./videos --target Qwen/Qwen3-VL-32B-Instruct -o head/",),
    "vocab": ("specvlm vocab out/ -o vocab.json",),
}
_WIDEST, _NARROWEST, _FLAGS = 100, 40, 26  # columns of a page, and of its flags
_UNGROUPED = "Options"


def page_of(group: Any, name: str) -> str:
    """Return what `specvlm NAME --help` prints."""
    context = typer.Context(group.commands[name], info_name=f"specvlm {name}")
    return "\n".join(_page(group.commands[name], context, short=False))


class _ShortHelp:
    """Adds `-h` to a command."""

    _short: Any = None

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; the same objects each time, as the parser compares them."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the other base class
        if self._short is None:
            self._short = copy(params[-1])  # --help
            self._short.name, self._short.opts = "short_help", ["-h"]
            self._short.callback = self._show
        return [*params, self._short]

    def _show(self, ctx: Any, _: object, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            print("\n".join(_page(ctx.command, ctx, short=True)))
            ctx.exit()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole page."""
        formatter.write("\n".join(_page(ctx.command, ctx, short=False)) + "\n")


class HelpCommand(_ShortHelp, typer.core.TyperCommand):
    """A command with `-h` and `--help`."""


class HelpGroup(_ShortHelp, typer.core.TyperGroup):
    """The commands of `specvlm`, with `-h` and `--help`, which show the same."""


def _width() -> int:
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))


def _overview(group: HelpGroup, ctx: Any) -> Iterator[str]:
    yield from _head(group, ctx, "COMMAND [OPTIONS]")
    yield "Commands:"
    for name, command in group.commands.items():
        yield from _entry(name, _sentences(command.help)[0], 12)
    yield ""
    yield "Options:"
    yield from _entry("--version", "Print the version and exit.", 12)
    yield ""
    yield "specvlm COMMAND -h shows a command's most used flags, --help all of them."


def _page(command: HelpCommand | HelpGroup, ctx: Any, *, short: bool) -> Iterator[str]:
    if isinstance(command, HelpGroup):
        yield from _overview(command, ctx)
        return
    kinds: dict[str, list[Any]] = {"argument": [], "option": []}
    for one in command.params:
        kinds[one.param_type_name].append(one)
    usage = " ".join(["[OPTIONS]", *map(_value_name, kinds["argument"])])
    yield from _head(command, ctx, usage, short=short)
    for argument in kinds["argument"]:
        yield from _entry(_value_name(argument), argument.help, 12)
    if kinds["argument"]:
        yield ""
    rank = {name: number for number, name in enumerate(MOST_USED[str(command.name)].split())}
    flags = sorted(kinds["option"], key=lambda one: rank.get(one.opts[0], len(rank)))
    if short:
        shown = [one for one in flags if one.opts[0] in rank]
        yield from _section("Most used flags", shown, ctx)
        yield f"--help shows {len(flags) - len(shown)} more."
        return
    groups: dict[str, list[Any]] = {_UNGROUPED: []}
    for group in map(_group, kinds["option"]):  # in the order in which they are declared
        groups.setdefault(group, [])
    for one in flags:
        groups[_group(one)].append(one)
    for group, members in groups.items():
        if members:
            yield from _section(group, members, ctx)


def _head(command: HelpCommand | HelpGroup, ctx: Any, usage: str, *, short: bool = False) -> Iterator[str]:
    yield f"Usage: {ctx.command_path} {usage}"
    yield ""
    summary, *rest = _sentences(command.help)
    for paragraph in [summary] if short else [summary, *rest]:
        yield from textwrap.wrap(paragraph, _width())
        yield ""
    yield "Examples:"
    yield from (f"  {example}" for example in EXAMPLES[str(command.name)])
    yield ""


def _section(title: str, flags: Sequence[Any], ctx: Any) -> Iterator[str]:
    yield f"{title}:"
    for one in flags:
        yield from _entry(_spelling(one), " ".join(filter(None, (one.help, _values(one, ctx)))), _FLAGS)
    yield ""


def _entry(name: str, text: str, column: int) -> Iterator[str]:
    """A name and what it means, from a column on; a name that is too long has a line of its own."""
    lines = textwrap.wrap(text, _width() - column - 2, break_on_hyphens=False)
    if len(name) > column - 2:
        yield f"  {name}"
        name = ""
    for line in lines:
        yield f"  {name:{column}}{line}"
        name = ""


def _sentences(text: str | None) -> list[str]:
    """The first sentence, and the paragraphs of the rest."""
    paragraphs = [" ".join(one.split()) for one in (text or "").split("\n\n")]
    first, _, rest = paragraphs[0].partition(". ")
    return [first.rstrip(".") + ".", *filter(None, (rest, *paragraphs[1:]))]


def _group(one: Any) -> str:
    return str(one.rich_help_panel or _UNGROUPED)


def _value_name(one: Any) -> str:
    return str(one.metavar or one.name.upper())


def _spelling(one: Any) -> str:
    long, *others = sorted(one.opts, key=len, reverse=True)
    names = ", ".join([*others, long, *one.secondary_opts])
    return names if one.is_flag else f"{names} {one.metavar or 'NAME'}"


def _values(one: Any, ctx: Any) -> str:
    """What may be given and what is taken otherwise, in brackets."""
    choices = one.display_type(ctx).strip("<>")  # a|b|c, or the name of a type
    found = [choices.replace("|", ", ")] if "|" in choices and not one.metavar else []
    default = one.show_default if isinstance(one.show_default, str) else _default(one, ctx)
    if default:
        found.append(f"default: {default}")
    text = "; ".join(filter(None, found))
    return f"[{text}]" if text else ""


def _default(one: Any, ctx: Any) -> str:
    value = one.get_default(ctx, call=False)
    if value is None or value == "" or (one.is_flag and (value is False or one.secondary_opts)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
