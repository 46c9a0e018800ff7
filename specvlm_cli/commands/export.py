"""`specvlm export OUT DEST`: a run folder as one tidy dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm_cli.commands.options import output
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import ExitCode
from specvlm_cli.export.request import (
    ROWS_PER_FILE,
    ExportRequest,
    FailuresName,
    FormatName,
    LinkName,
    PathsName,
    format_of,
)

if TYPE_CHECKING:
    from specvlm_cli.export.write import Exported

_HOW = "Format details"


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
        typer.Option("--format", help="Format. Default: the extension of DEST, else parquet."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Columns to write, separated by commas.", metavar="A,B"),
    ] = None,
    failures: Annotated[
        FailuresName | None,
        typer.Option(
            "--failures",
            help="Write captions with failures, without, or failures only. "
            "Default: with in a folder, without in a file.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DEST if it is an earlier export."),
    ] = False,
    paths: Annotated[
        PathsName,
        typer.Option(
            "--paths",
            help="Paths in the rows: relative to the input folder, absolute, or as given in the input.",
            rich_help_panel=_HOW,
        ),
    ] = "relative",
    rows_per_file: Annotated[
        int,
        typer.Option(
            "--rows-per-file",
            help="Maximum rows per Parquet file.",
            min=1,
            max=100_000_000,
            metavar="N",
            rich_help_panel=_HOW,
        ),
    ] = ROWS_PER_FILE,
    videos: Annotated[
        LinkName,
        typer.Option("--videos", help="How to place videos in a videofolder.", rich_help_panel=_HOW),
    ] = "symlink",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel="Messages"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing unless it fails.", rich_help_panel="Messages")
    ] = False,
    verbose: Annotated[  # the app looks for it, see app.py
        bool,
        typer.Option("--verbose", "-v", help="Print the traceback of an error.", rich_help_panel="Messages"),
    ] = False,
) -> int:
    """Write all captions of a run as one dataset. Works during the run.

    Each caption appears once. The same ledger gives the same bytes. DEST appears only when it is complete.
    """
    from specvlm_cli.console import tables
    from specvlm_cli.export import write
    from specvlm_cli.run.view import view

    run = view(out)
    request = ExportRequest(
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
        found = write.export(run, request, tick)
    if as_json:
        tables.as_json(found.as_json())
    if not quiet:
        _tell(found)
    return ExitCode.OK


def _tell(found: Exported) -> None:
    from specvlm.words import counted
    from specvlm_cli.console.messages import STDERR

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
