"""`specvlm vocab [OUT] -o FILE`: which tokens captions use, as a file for `--draft-vocab`.

Transformers is imported when the flags have turned out to make sense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import specvlm
from specvlm_cli.caption import engine
from specvlm_cli.caption.settings import ModelChoice
from specvlm_cli.commands.caption_flags import MOST, ModelFlags
from specvlm_cli.commands.choices import model_choice, pair_of
from specvlm_cli.commands.options import output, same_as
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import ExitCode, Flag, UsageError, excluding

if TYPE_CHECKING:
    from specvlm_cli.run.view import RunView
    from specvlm_cli.vocab import VocabularyRequest, WrittenVocabulary

SCHEMA = 1
_COUNTED, _KEPT, _TALKING = "Input", "Output", "Messages"


@dataclass(frozen=True, kw_only=True)
class VocabFlags:
    """What is counted, and how much of it is kept. Without variables: those of `caption` are about a run."""

    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Run folder of specvlm caption whose captions are counted."),
    ] = None
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="Text file with captions. Repeat for several.",
            rich_help_panel=_COUNTED,
            metavar="FILE",
        ),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write, for --draft-vocab. Replaces an earlier one.",
            parser=output("out"),
            rich_help_panel=_KEPT,
            metavar="FILE",
        ),
    ] = None
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            help="Keep the N most used tokens, filled up with the tokenizer's first ones.",
            rich_help_panel=_KEPT,
            metavar="N",
            min=1,
            max=MOST,
        ),
    ] = None
    coverage: Annotated[
        float | None,
        typer.Option(
            "--coverage",
            help="Keep the fewest tokens that cover this share of the captions, e.g. 0.999. Default: every used token.",
            rich_help_panel=_KEPT,
            metavar="SHARE",
        ),
    ] = None
    preset: Annotated[str | None, same_as(ModelFlags, "preset")] = None
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Model whose tokenizer to use: hub id or folder. Default: the run's target.",
            rich_help_panel="Models",
            metavar="ID",
        ),
    ] = None
    revision: Annotated[str | None, same_as(ModelFlags, "revision")] = None
    local_files_only: Annotated[bool, same_as(ModelFlags, "local_files_only")] = False
    trust_remote_code: Annotated[bool, same_as(ModelFlags, "trust_remote_code")] = False
    json_output: Annotated[
        bool,
        typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=_TALKING),
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing unless it fails.", rich_help_panel=_TALKING)
    ] = False
    verbose: Annotated[  # the app looks for it, see app.py
        bool,
        typer.Option("--verbose", "-v", help="Print the traceback of an error.", rich_help_panel=_TALKING),
    ] = False


def vocab(flags: VocabFlags) -> int:
    """Count the tokens that captions use, and write a file for --draft-vocab.

    Captions come from a run folder, also during a run, from text files, or from both.
    """
    from specvlm_cli import vocab as job

    if flags.file is None:
        raise UsageError("nowhere to write to; give a file with -o, e.g. -o vocab.json")
    wanted = _wanted(flags)
    job.check_place(flags.file)
    target = _target(flags, wanted.run)
    made = job.make(wanted, engine.load_tokenizer(target, quiet=flags.quiet))
    job.write(made.kept, flags.file, specvlm.__version__)
    _show(made, target.name, flags)
    return ExitCode.OK


def _wanted(flags: VocabFlags) -> VocabularyRequest:
    from specvlm_cli.run.view import view
    from specvlm_cli.vocab import VocabularyRequest

    if flags.out is None and not flags.text:
        raise UsageError("nothing to count; give a run folder, or text files with --text")
    if flags.size is not None and flags.coverage is not None:
        raise excluding(Flag("size", flags.size), Flag("coverage", flags.coverage))
    coverage = 1.0 if flags.coverage is None else flags.coverage
    if not 0.0 < coverage <= 1.0 or math.isnan(coverage):
        raise UsageError(Flag("coverage", coverage), "is out of range", fix="give a share above 0, at most 1")
    run = None if flags.out is None else view(flags.out)
    return VocabularyRequest(run, tuple(flags.text or ()), flags.size, coverage)


def _target(flags: VocabFlags, run: RunView | None) -> ModelChoice:
    """Return whose tokenizer counts, and in which revision: as the flags say, else the run's target."""
    if flags.preset is not None or flags.target is not None:
        return model_choice(flags, pair_of(flags.preset, flags.target))
    settings = {} if run is None else run.settings
    if not isinstance(settings.get("target"), str):
        why = "text files have no tokenizer" if run is None else "the run folder does not say its target"
        raise UsageError(f"{why}; give --target or --preset")
    revision = flags.revision or settings.get("revision")
    return model_choice(replace(flags, target=settings["target"]), None, revision=revision)


def _show(made: WrittenVocabulary, target: str, flags: VocabFlags) -> None:
    from specvlm_cli.console import tables

    kept = made.kept
    if flags.json_output:
        found = {
            "schema": SCHEMA,
            "file": clean(str(flags.file)),
            "target": target,
            "tokenizer": kept.tokenizer,
            "captions": made.captions,
            "text_files": made.files,
            "tokens": kept.tokens,
            "distinct": kept.distinct,
            "vocabulary": made.vocabulary,
            "kept": len(kept.counts),
            "coverage": kept.coverage,
        }
        tables.as_json(found)
    elif not flags.quiet:
        tables.pairs(_lines(made, flags))


def _lines(made: WrittenVocabulary, flags: VocabFlags) -> list[tuple[str, str]]:
    from specvlm.words import counted

    kept = made.kept
    of_files = f" and {counted(made.files, 'text file')}" if made.files else ""
    where = counted(made.captions, "caption") if made.captions else ""
    where = f"{where}{of_files}" if where else of_files.removeprefix(" and ")
    unused = sum(not count for _, count in kept.counts)
    fill = f", {unused:,} of them not used" if unused else ""
    return [
        ("counted", f"{counted(kept.tokens, 'token')} in {where}"),
        ("distinct", f"{kept.distinct:,} of {made.vocabulary:,} in the tokenizer"),
        ("kept", f"{len(kept.counts):,}{fill}, {kept.coverage:.2%} of what was counted"),
        ("file", f"{flags.file}; for --draft-vocab"),
    ]
