"""`specvlm status OUT`: how far a run is, whether its files are in order, which shards are left. Read-only."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specvlm_cli.console.safe_text import short
from specvlm_cli.exits import ExitCode, Flag, UsageError

if TYPE_CHECKING:
    from specvlm_cli.caption.outcome import Figures
    from specvlm_cli.run.holder import Holder
    from specvlm_cli.run.progress import RunStatus, ShardStatus
    from specvlm_cli.run.view import RunView


def status(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Run folder of specvlm caption.")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check ledgers against parts; print one line per problem and exit 1.",
        ),
    ] = False,
    only_missing: Annotated[
        bool,
        typer.Option(
            "--only-missing",
            help="Print unfinished shards in the form of Slurm's --array, e.g. 0,3-5.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[  # the app looks for it, see app.py
        bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")
    ] = False,
) -> int:
    """Show the progress of a run. Changes no file; works during the run.

    Exit code 0, also where videos failed; 1 where --verify finds something wrong; 2 where OUT is no run folder.
    """
    from specvlm_cli.run.view import view

    if verify and only_missing:
        raise UsageError(
            Flag("verify"), "and", Flag("only_missing"), "answer different questions", fix="give one of them"
        )
    run = view(out)
    if verify:
        return _verify(run, as_json)
    if only_missing:
        return _only_missing(run, as_json)
    return _status(run, as_json)


def _status(run: RunView, as_json: bool) -> int:
    from specvlm_cli.console import tables
    from specvlm_cli.run.progress import status as read

    found = read(run)
    if as_json:
        tables.as_json(found.as_json())
    else:
        _show(found)
    return ExitCode.OK


def _only_missing(run: RunView, as_json: bool) -> int:
    from specvlm_cli.console import tables
    from specvlm_cli.run.progress import SCHEMA, array_expression, missing_shards

    missing = missing_shards(run)
    expression = array_expression(missing)
    if as_json:
        tables.as_json({"schema": SCHEMA, "missing_shards": list(missing), "array": expression})
    elif expression:
        tables.line(expression)
    return ExitCode.OK


def _verify(run: RunView, as_json: bool) -> int:
    from specvlm_cli.console import tables
    from specvlm_cli.console.messages import STDERR
    from specvlm_cli.run.integrity import verify
    from specvlm_cli.run.progress import SCHEMA

    wrong: list[str] = []
    notes: list[str] = []
    for finding in verify(run):
        (wrong if finding.wrong else notes).append(finding.text)
        if not as_json and finding.wrong:
            tables.line(finding.text)
        elif not as_json:
            print(f"note: {finding.text}", file=STDERR)
    if as_json:
        tables.as_json({"schema": SCHEMA, "ok": not wrong, "problems": wrong, "notes": notes})
    elif not wrong:
        print(f"{short(str(run.root), 200)}: nothing wrong", file=STDERR)
    return ExitCode.FATAL if wrong else ExitCode.OK


# How it looks


def _show(found: RunStatus) -> None:
    from specvlm_cli.console import tables

    tables.pairs(list(_lines(found)))
    if found.errors:
        tables.line("")
        lines = [
            (f"{kind.count:,}", kind.stage, kind.error_type, short(kind.error, 160)) for kind in found.errors
        ]
        tables.table(("failures", "stage", "kind", "for example"), lines, right={0})
    if len(found.shards) > 1:
        tables.line("")
        tables.table(_SHARDS, [_shard(one) for one in found.shards], right=set(range(6)))


def _lines(found: RunStatus) -> Iterator[tuple[str, str]]:
    from specvlm.words import amount, counted
    from specvlm_cli.console.words import share

    shards = f" ({len(found.shards)} shards)" if len(found.shards) > 1 else ""
    yield "run folder", f"{found.out}{shards}"
    if found.problem is not None:
        yield "problem", found.problem
    yield from (("problem", one.problem) for one in found.shards[:1] if one.problem and not shards)
    counts = found.counts
    ended = f"{counts.done:,} done, {counts.failed:,} failed"
    yield "videos", f"{counts.total:,}: {ended}, {counts.running:,} running, {counts.pending:,} pending"
    yield "captions", f"{counted(found.captions, 'caption')}{_ago(found)}"
    yield "pace", _pace(found)
    if found.waited_share is not None:
        yield "waiting for input", f"{share(found.waited_share, 1.0)} of the time, with slots free"
    yield from _speculation(found.figures)
    yield "at work", _holders(found)
    yield "disk", f"{amount(found.free_bytes)} free"


def _ago(found: RunStatus) -> str:
    from specvlm_cli.console.words import duration

    if found.last_caption_at is None:
        return ""
    age = datetime.fromisoformat(found.at) - datetime.fromisoformat(found.last_caption_at)
    return f", the latest {duration(max(age.total_seconds(), 0.0))} ago"


def _pace(found: RunStatus) -> str:
    from specvlm_cli.console.words import duration, per_hour, per_s

    if not found.videos_per_hour:
        return "not known yet"
    running = any(one.running for one in found.shards)
    rate = per_hour(found.videos_per_hour)
    if found.tokens_per_s is not None:
        rate += f", {per_s(found.tokens_per_s)}"
    if found.eta_s is not None:
        return f"{rate}, about {duration(found.eta_s)} left"
    left = found.counts.pending + found.counts.running
    return rate if running or not left else f"{rate} when it last ran"


def _speculation(figures: Figures) -> Iterator[tuple[str, str]]:
    from specvlm.words import counted
    from specvlm_cli.console.report import speedups

    yield from speedups(figures)
    if figures.mean_accepted_tokens is not None:
        tokens = f"{figures.mean_accepted_tokens:.2f} draft tokens"
        yield "accepted per round", f"{tokens}, over the latest {counted(figures.captions, 'caption')}"


def _holders(found: RunStatus) -> str:
    """Tell who works; with several shards each is named in the table."""
    running = [one for one in found.shards if one.running]
    if len(found.shards) == 1:
        return _holder(found.shards[0].holder)
    return f"{len(running)} of {len(found.shards)} shards" if running else "none"


def _holder(holder: Holder | None) -> str:
    if holder is None:
        return "none"
    since = f" since {holder.since}" if holder.since else ""
    who = f"process {holder.pid} on {holder.host}{since}"
    if holder.alive is None:
        return f"{who}, as far as can be seen from here"
    return who if holder.alive else f"none; {who} died, the next start resumes from there"


_SHARDS = ("shard", "done", "failed", "running", "pending", "left", "at work")


def _shard(one: ShardStatus) -> tuple[str, ...]:
    from specvlm_cli.console.words import duration

    counts = one.counts
    numbers = (counts.done, counts.failed, counts.running, counts.pending)
    left = "" if one.eta_s is None else duration(one.eta_s)
    shown = [""] * 4 if one.problem else [f"{number:,}" for number in numbers]
    return str(one.shard), *shown, left, one.problem or _holder(one.holder)
