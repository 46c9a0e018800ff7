"""`specvlm export OUT DEST`: a run folder as one tidy dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm_cli.commands.options import output
from specvlm_cli.exits import ExitCode
from specvlm_cli.export.request import (
    ROWS_PER_FILE,
    FailuresName,
    FormatName,
    LinkName,
    PathsName,
    Request,
    format_of,
)
from specvlm_cli.text import clean

if TYPE_CHECKING:
    from specvlm_cli.export.job import Exported

_HOW = "How it is written"


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Run folder of specvlm caption.")],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DEST",
            help="A folder; or a file that ends in .jsonl, .csv or .parquet.",
            parser=output("DEST"),
        ),
    ],
    format: Annotated[  # noqa: A002  the name of the flag
        FormatName | None,
        typer.Option("--format", help="Default: what DEST's name says, else parquet."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Columns of the captions, separated by commas.", metavar="A,B"),
    ] = None,
    failures: Annotated[
        FailuresName | None,
        typer.Option(
            "--failures",
            help="Failures beside the captions, none, or nothing else. "
            "Default: with in a folder, without in a file.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DEST where it is an earlier export, and nothing else."),
    ] = False,
    paths: Annotated[
        PathsName,
        typer.Option(
            "--paths",
            help="How rows name videos: below their input folder, by their absolute path, or as the input named them.",
            rich_help_panel=_HOW,
        ),
    ] = "relative",
    rows_per_file: Annotated[
        int,
        typer.Option(
            "--rows-per-file",
            help="Most rows of one Parquet file of a folder.",
            min=1,
            max=100_000_000,
            rich_help_panel=_HOW,
        ),
    ] = ROWS_PER_FILE,
    videos: Annotated[
        LinkName,
        typer.Option("--videos", help="How videos come into a videofolder.", rich_help_panel=_HOW),
    ] = "symlink",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print what came of it as one JSON object.", rich_help_panel="Talking"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing unless it fails.", rich_help_panel="Talking")
    ] = False,
    verbose: Annotated[  # the app looks for it, see app.py
        bool,
        typer.Option("--verbose", "-v", help="Show the traceback of an error.", rich_help_panel="Talking"),
    ] = False,
) -> int:
    """Write the captions of all shards as one dataset, each caption once. Works while the run goes on.

    The same ledger gives the same bytes. DEST appears when all of it is on disk, or not at all.
    """
    from specvlm_cli import show
    from specvlm_cli.export import job
    from specvlm_cli.run_view import view

    run = view(out)
    request = Request(
        destination=destination,
        format=format_of(destination, format),
        overwrite=overwrite,
        columns=None if columns is None else tuple(name.strip() for name in columns.split(",")),
        rows_per_file=rows_per_file,
        videos=videos,
        paths=paths,
    )
    request = replace(request, failures=failures or ("without" if request.one_file else "with"))
    with _progress(quiet) as tick:
        found = job.export(run, request, tick)
    if as_json:
        show.as_json(found.as_json())
    if not quiet:
        _tell(found)
    return ExitCode.OK


def _tell(found: Exported) -> None:
    from specvlm_cli.screen.words import counted
    from specvlm_cli.talk import STDERR

    for note in found.notes:
        print(f"note: {clean(note)}", file=STDERR)
    failures = f" and {counted(found.failures, 'failure')}" if found.failures else ""
    doubles = f", {counted(found.doubles, 'double')} left out" if found.doubles else ""
    where = f"{clean(found.destination)} ({found.format}, {counted(found.files, 'file')})"
    print(f"{counted(found.captions, 'caption')}{failures} in {where}{doubles}", file=STDERR)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda done, of: None
        return
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
