"""`specvlm audit OUT`: captions of a run made again by stock `generate()`, and compared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm_cli.commands.caption_flags import FrameFlags, ModelFlags
from specvlm_cli.commands.choices import check_device, read_limits
from specvlm_cli.commands.options import picked, same_as
from specvlm_cli.console.safe_text import caption_line

if TYPE_CHECKING:
    from specvlm_cli.audit.differences import Difference
    from specvlm_cli.audit.start import Audited
    from specvlm_cli.audit.work import Tick

_WHICH, _MODELS, _TALKING = "Which captions", "Models and reading", "Messages"
_LOG_EVERY_S = 30.0
_BEFORE, _BEHIND = 20, 40  # characters of a caption that are shown around what differs
_MEANINGS = {
    "equal": "stock generate() writes the same",
    "different": "it writes something else, or from something else",
    "changed": "the video file is another one now; not compared",
    "missing": "the video file is gone; not compared",
    "unreadable": "the video gives no frames; not compared",
    "failed": "stock generate() failed; not compared",
}


@dataclass(frozen=True, kw_only=True)
class AuditFlags:
    """Which captions of a run are made again, and where."""

    out: Annotated[Path, typer.Argument(metavar="OUT", help="Run folder of specvlm caption.")]
    sample: Annotated[
        str,
        typer.Option(
            "--sample",
            help="How many captions: a share (1%), a number (500) or all. A larger sample contains a smaller one.",
            rich_help_panel=_WHICH,
            metavar="SIZE",
        ),
    ] = "1%"
    # Without a variable: that of caption may say how the run was divided, not how its audit is.
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            help="Audit shard I of N of the sample only; auto asks the job scheduler's variables.",
            rich_help_panel=_WHICH,
            metavar="I/N",
        ),
    ] = "0/1"
    again: Annotated[
        bool,
        typer.Option("--again", help="Discard earlier results and start over.", rich_help_panel=_WHICH),
    ] = False
    device_map: Annotated[str | None, same_as(ModelFlags, "device_map")] = None
    local_files_only: Annotated[bool, same_as(ModelFlags, "local_files_only")] = False
    trust_remote_code: Annotated[bool, same_as(ModelFlags, "trust_remote_code")] = False
    decode_timeout: Annotated[str, same_as(FrameFlags, "decode_timeout")] = "60s"
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=_TALKING)
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Show no progress, and no result unless --json.", rich_help_panel=_TALKING
        ),
    ] = False
    verbose: Annotated[  # the app looks for it, see app.py
        bool,
        typer.Option("--verbose", "-v", help="Print the traceback of an error.", rich_help_panel=_TALKING),
    ] = False


def audit(flags: AuditFlags) -> int:
    """Make captions of a run again with stock generate() alone, and compare them with the rows.

    The same frames are read again, one video at a time. Run it again to resume; what was compared is kept in OUT/audit.
    Nothing else in OUT is written, and a run may continue in it.

    Exit code 0 where every caption of the sample is equal, 3 where one is not or could not be compared.
    """
    from specvlm_cli.audit.made_with import How
    from specvlm_cli.audit.sample import parse_sample
    from specvlm_cli.run.shard import parse_shard
    from specvlm_cli.run.view import view

    check_device(flags.device_map)
    sample, shard = parse_sample(flags.sample), parse_shard(flags.shard)
    limits = read_limits(flags)
    run = view(flags.out)

    from specvlm_cli.audit import start

    how = How(**picked(flags, How) | {"limits": limits, "quiet": flags.quiet or flags.json_output})
    request = start.AuditRequest(sample, shard, how, flags.again)
    with _progress(flags.quiet) as tick:
        found = start.audit(run, request, tick)
    _show(found, flags)
    return found.exit_code


def _show(found: Audited, flags: AuditFlags) -> None:
    from specvlm_cli.console import tables
    from specvlm_cli.console.messages import STDERR

    if flags.json_output:
        tables.as_json(found.as_json())
    elif not flags.quiet:
        _tables(found)
    if found.left:
        why = f"stopped by {found.stopped}" if found.stopped else "the run took captions out meanwhile"
        print(f"{why}, {found.left} left; start again to resume", file=STDERR)


# How it looks


def _tables(found: Audited) -> None:
    from specvlm_cli.console import tables

    tables.pairs(
        [
            ("run folder", found.out),
            ("target", found.target),
            ("sample", f"{found.sample}: {found.chosen:,} of {found.captions:,} captions"),
            ("compared", f"{found.compared:,} of {found.chosen:,}"),
        ]
    )
    tables.line("")
    lines = [(outcome, f"{count:,}", _MEANINGS[outcome]) for outcome, count in found.counts.items()]
    tables.table(("outcome", "captions", ""), lines, right={1})
    if found.shown:
        tables.line("")
        tables.table(_DIFFERENCES, [_difference(one) for one in found.shown], right={0, 1})
        tables.line("")
        tables.pairs([("all differences", found.differences_file)])


_DIFFERENCES = ("token", "margin", "path", "prompt", "what differs", "run", "stock")


def _difference(one: Difference) -> tuple[str, ...]:
    row, verdict = one.row, one.verdict
    ours, theirs = around(row["caption"], verdict.stock_text)
    return (
        "" if verdict.token_index is None else f"{verdict.token_index:,}",
        "" if verdict.margin is None else f"{verdict.margin:.3g}",
        row["path"],  # whole, to be copied; a table cleans it
        shortened(row.get("prompt") or "", _BEHIND),
        ", ".join(verdict.differs) or f"{verdict.outcome}: {shortened(verdict.error or '', 60)}",
        ours,
        theirs,
    )


def shortened(text: str, width: int) -> str:
    """Return text on one line, of at most so many characters."""
    line = caption_line(text)
    return line if len(line) <= width else f"{line[: width - 1]}…"


def around(ours: str, theirs: str | None) -> tuple[str, str]:
    """Return two captions around the place where they differ; nothing of a caption that is equal or not there."""
    if theirs is None or ours == theirs:
        return "", ""
    shorter = min(len(ours), len(theirs))
    same = next((place for place in range(shorter) if ours[place] != theirs[place]), shorter)
    first = max(same - _BEFORE, 0)
    before = "…" if first else ""
    width = _BEFORE + _BEHIND
    return before + shortened(ours[first:], width), before + shortened(theirs[first:], width)


@contextmanager
def _progress(quiet: bool) -> Iterator[Tick]:
    """Draw a bar on a terminal, a line every 30 s elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda done, of, odd: None
        return
    if not console.is_terminal:
        yield _Lines().tick
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def tick(done: int, of: int, odd: int) -> None:
            bar.update(task, completed=done, total=of, description=f"{odd} not equal")

        yield tick


class _Lines:
    """Progress as plain lines, one every 30 s."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def tick(self, done: int, of: int, odd: int) -> None:
        from specvlm_cli.console.messages import STDERR

        if time.monotonic() - self._last_s >= _LOG_EVERY_S:
            self._last_s = time.monotonic()
            print(f"audited {done:,} of {of:,} captions, {odd:,} not equal", file=STDERR)
