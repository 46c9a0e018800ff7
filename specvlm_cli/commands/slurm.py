"""`specvlm slurm OUT -- caption INPUT... [flags]`: print a Slurm batch script that captions in shards.

What follows `--` is parsed as `caption` parses it, so that a misspelt flag is refused here and not in every
task. Nothing is submitted; all that is made is the folder for the logs, because Slurm makes none and a task
whose log cannot be opened ends without a word.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import specvlm
from specvlm_cli import durations
from specvlm_cli.commands.caption import caption, check
from specvlm_cli.commands.caption_flags import CaptionFlags
from specvlm_cli.commands.options import command, flag, output
from specvlm_cli.console.messages import STDERR
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import ExitCode, Flag, UsageError
from specvlm_cli.run.layout import RunFolder
from specvlm_cli.run.shard import MOST_SHARDS
from specvlm_cli.slurm import (
    CPUS_PER_TASK,
    MAX_REQUEUES,
    MOST_TASKS,
    STOP_BEFORE_S,
    ArrayJob,
    script,
    submissions,
)

_JOB, _NEEDS = "The job", "Resources of each task"
_ONCE = {"overwrite": "--overwrite", "retry_failed": "--retry-failed"}
_OURS = frozenset(
    "array job-name no-requeue nodes ntasks open-mode output parsable requeue signal wrap".split()
)
_MOST_STOP_BEFORE_S = 65_535  # sbatch knows no more


@dataclass(frozen=True, kw_only=True)
class SlurmFlags:
    """Of the job, and of what each of its tasks asks for."""

    out: Annotated[str, typer.Argument(metavar="OUT", help="Run folder, as all nodes see it.")]
    words: Annotated[
        list[str], typer.Argument(metavar="-- caption INPUT...", help="What each task runs, with its flags.")
    ]
    shards: Annotated[
        int | None,
        flag(
            _JOB,
            "--shards",
            "Number of tasks. Default: the number of shards of OUT.",
            metavar="N",
            min=1,
            max=MOST_SHARDS,
        ),
    ] = None
    only_missing: Annotated[
        bool, flag(_JOB, "--only-missing", "Only unfinished shards; print no script if there are none.")
    ] = False
    name: Annotated[str, flag(_JOB, "--name", "Name of the job and its logs.", metavar="NAME")] = "specvlm"
    logs: Annotated[
        str | None,
        flag(_JOB, "--logs", "Folder for the tasks' logs. Default: OUT/logs.", metavar="FOLDER"),
    ] = None
    max_running: Annotated[
        int | None,
        flag(_JOB, "--max-running", "Maximum number of tasks at the same time.", metavar="N", min=1),
    ] = None
    stop_before: Annotated[
        str,
        flag(_JOB, "--stop-before", "Stop each task this long before its time limit.", metavar="TIME"),
    ] = f"{STOP_BEFORE_S}s"
    max_requeues: Annotated[
        int,
        flag(
            _JOB,
            "--max-requeues",
            "Requeue a task at most N times in a row without progress.",
            metavar="N",
            min=0,
            max=10_000,
        ),
    ] = MAX_REQUEUES
    time: Annotated[
        str | None,
        flag(_NEEDS, "--time", "Time limit, as Slurm writes it, e.g. 04:00:00.", metavar="LIMIT"),
    ] = None
    gpus_per_task: Annotated[
        str, flag(_NEEDS, "--gpus-per-task", "GPUs, as N or TYPE:N; 0: none.", metavar="[TYPE:]N")
    ] = "1"
    cpus_per_task: Annotated[
        int, flag(_NEEDS, "--cpus-per-task", "CPU cores.", metavar="N", min=1, max=65_535)
    ] = CPUS_PER_TASK
    mem: Annotated[str | None, flag(_NEEDS, "--mem", "Main memory, e.g. 64G.", metavar="SIZE")] = None
    partition: Annotated[str | None, flag(_NEEDS, "--partition", "Partition.", metavar="NAME")] = None
    account: Annotated[str | None, flag(_NEEDS, "--account", "Account to charge.", metavar="NAME")] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch",
            help="Another sbatch option, e.g. constraint=a100. Repeat for several.",
            rich_help_panel=_NEEDS,
            metavar="KEY[=VALUE]",
        ),
    ] = None
    setup: Annotated[
        list[str] | None,
        typer.Option(
            "--setup",
            help="Line of bash for the top of the script, e.g. 'module load cuda'. Repeat for several.",
            rich_help_panel=_NEEDS,
            metavar="LINE",
        ),
    ] = None


def slurm(flags: SlurmFlags) -> int:
    """Print a Slurm batch script that runs `caption` as an array of shards.

    Submit it with: specvlm slurm OUT --shards 8 -- caption INPUT... | sbatch
    """
    job = _job(flags)
    text = script(job)
    if not job.tasks:
        print(f"all shards of {clean(str(job.out))} are finished; no script to print", file=STDERR)
        return ExitCode.OK
    _make_logs(job.logs)
    _tell_windows(job)
    sys.stdout.flush()
    # It names files, so it is UTF-8 whatever the terminal's encoding is.
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
    return ExitCode.OK


def _tell_windows(job: ArrayJob) -> None:
    """Say how to submit more tasks than one array may have."""
    if lines := submissions(job):
        print(
            f"warning: {len(job.tasks):,} tasks are more than the {MOST_TASKS:,} that an array may have unless Slurm's "
            f"MaxArraySize was raised; save the script as {job.name}.sbatch and submit all of them with",
            *lines,
            sep="\n",
            file=STDERR,
        )


def _job(flags: SlurmFlags) -> ArrayJob:
    out = _folder("OUT", flags.out)
    arguments, first_start, grace_s = _caption_words(flags.words)
    shards = _shard_count(out, flags.shards)
    return ArrayJob(
        program=_program(),
        folder=_here(),
        out=out,
        logs=out / "logs" if flags.logs is None else _folder("--logs", flags.logs),
        shards=shards,
        tasks=_missing(out, shards) if flags.only_missing else range(shards),
        arguments=arguments,
        first_start=first_start,
        setup=flags.setup or [],
        name=_name(flags.name),
        directives=[*_needs(flags), *map(_passed_on, flags.sbatch or [])],
        max_running=flags.max_running,
        stop_before_s=_stop_before_s(flags.stop_before, flags.time, grace_s),
        max_requeues=flags.max_requeues,
        version=specvlm.__version__,
    )


def _make_logs(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = clean(str(folder))
        raise UsageError(f"{where}: cannot be made ({error.strerror}); give --logs another folder") from error


def _program() -> list[str]:
    """Return how specvlm is started in this environment, whatever PATH says in a task."""
    command = Path(sys.executable).with_name("specvlm")
    return [str(command)] if command.exists() else [sys.executable, "-P", "-m", "specvlm_cli"]


def _folder(name: str, text: str) -> Path:
    return _here() / output(name)(text)


def _here() -> Path:
    """Return where we are by the shell's name for it: what it really is may be called otherwise on a node."""
    named = os.environ.get("PWD", "")
    try:
        return Path(named) if os.path.isabs(named) and os.path.samefile(named, ".") else Path.cwd()
    except OSError:
        return Path.cwd()


def _shard_count(out: Path, given: int | None) -> int:
    known = RunFolder(out).read()
    shards = known.shards if known is not None else given
    if shards is None:
        raise UsageError(
            f"{clean(str(out))} is no run folder yet; say with --shards N how many tasks to make"
        )
    if given not in (None, shards):
        raise UsageError(
            Flag("shards", given),
            f": {clean(str(out))} was begun with {shards}",
            fix="leave --shards out, or give another OUT",
        )
    return shards


def _missing(out: Path, shards: int) -> Sequence[int]:
    from specvlm_cli.run.progress import missing_shards
    from specvlm_cli.run.view import view

    return missing_shards(view(out)) if RunFolder(out).read() is not None else range(shards)


# What follows `--`


def _caption_words(words: Sequence[str]) -> tuple[list[str], list[str], float]:
    """Return the words behind `caption` for every start of a task, those for its first start only, and its grace.

    Started with --overwrite again after each requeue, a task would never come to its end.

    Raises:
        UsageError: They are no command line of `caption`, or one that goes against an array of shards.
    """
    name, *given = words
    if name != "caption":
        raise UsageError(f"{clean(name)}: only caption runs in shards; write -- caption INPUT... [flags]")
    asked = _parsed(given)
    _refuse_what_goes_against_shards(asked)
    grace_s = check(CaptionFlags(**asked.params)).grace_s
    once = [word for field, word in _ONCE.items() if asked.params[field]]
    always = [word for word in given if word not in once]
    if once and not _only_these_are_out(asked, always, once):
        raise UsageError(
            f"{' '.join(once)} would start over after each requeue; give it as a flag of its own, not by a "
            "variable, a file or as another flag's value"
        )
    return always, once, grace_s


def _parsed(words: Sequence[str]) -> Any:
    """Return the context that typer makes of a command line of `caption`, without running it."""
    parser = typer.Typer(add_completion=False)
    parser.command()(command(CaptionFlags, caption))
    reading: Any = typer.main.get_command(parser)
    return reading.make_context("caption", list(words))


def _refuse_what_goes_against_shards(asked: Any) -> None:
    for name, fix in (("out", "it is OUT"), ("shard", "each task gets its own")):
        if asked.get_parameter_source(name).name == "COMMANDLINE":
            raise UsageError(Flag(name, asked.params[name]), f"after caption: {fix}", fix="leave it out")
    if asked.params["reshard"]:
        raise UsageError(
            Flag("reshard"), "has to be over before the tasks begin", fix="run specvlm caption with it, here"
        )
    if asked.params["dry_run"]:
        raise UsageError(
            Flag("dry_run"), "in every task would caption nothing", fix="run specvlm caption with it, here"
        )
    if asked.params["on_config_change"] == "new":
        raise UsageError(Flag("on_config_change", "new"), "would leave OUT", fix="give the new folder as OUT")
    if "-" in asked.params["inputs"]:
        raise UsageError("- is the standard input, which tasks do not have; put the paths into a manifest")


def _only_these_are_out(before: Any, words: Sequence[str], once: Sequence[str]) -> bool:
    """Say whether leaving flags out of the words left them, and nothing else, out of what the words mean."""
    try:
        after = _parsed(words)
    except typer.TyperException:  # what was left out was another flag's value
        return False
    return bool(
        after.params == before.params | {field: False for field, word in _ONCE.items() if word in once}
    )


# Options for Slurm


_MEMORY = re.compile(r"[0-9]+[KMGT]?")


def _needs(flags: SlurmFlags) -> list[tuple[str, str]]:
    if flags.mem is not None and not _MEMORY.fullmatch(flags.mem):
        raise UsageError(
            Flag("mem", flags.mem), "is no size", fix="give a number with K, M, G or T, e.g. 64G"
        )
    given = [
        ("time", flags.time),
        ("cpus-per-task", str(flags.cpus_per_task)),
        ("gres", _gpus(flags.gpus_per_task)),
        ("mem", flags.mem),
        ("partition", flags.partition),
        ("account", flags.account),
    ]
    return [(key, _word(key, value)) for key, value in given if value is not None]


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise UsageError(Flag("name", repr(text)), ": give letters, digits, dots, dashes and underscores")
    return text


def _word(key: str, text: str) -> str:
    """Return the value of an option that is one word to Slurm."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,:+-]*", text):
        raise UsageError(Flag(key, repr(text)), "is nothing that Slurm knows", fix="give one word")
    return text


def _gpus(text: str) -> str | None:
    if text == "0":
        return None
    if not re.fullmatch(r"(?:[A-Za-z][A-Za-z0-9_.-]*:)?[1-9][0-9]{0,3}", text):
        raise UsageError(Flag("gpus_per_task", repr(text)), ": give a number, or TYPE:N, e.g. a100:1")
    return f"gpu:{text}"


def _passed_on(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    key = key.removeprefix("--")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise UsageError(Flag("sbatch", repr(text)), ": give KEY or KEY=VALUE, e.g. constraint=a100")
    if key in _OURS:
        raise UsageError(
            Flag("sbatch", text), f": --{key} is what this script is built on", fix="leave it out"
        )
    return key, value


def _stop_before_s(text: str, limit: str | None, grace_s: float) -> int:
    """Return the time between Slurm's warning and its limit, in whole seconds; it has to fit into the limit."""
    stop_s = int(durations.seconds("stop_before", text))
    if not 0 < stop_s <= _MOST_STOP_BEFORE_S:
        raise UsageError(Flag("stop_before", text), f": give 1 to {_MOST_STOP_BEFORE_S} seconds")
    if stop_s <= grace_s:
        raise UsageError(
            Flag("stop_before", text),
            f"is no longer than the --grace of {grace_s:g} s after caption: tasks would be killed while they finish",
            fix="give more, or a shorter --grace",
        )
    limit_s = None if limit is None else _limit_s(limit)
    if limit_s is not None and limit_s <= stop_s + 60:  # the warning may come a minute early
        raise UsageError(
            Flag("time", limit), "leaves no time to work before", Flag("stop_before", text), fix="give more"
        )
    return stop_s


def _limit_s(text: str) -> int | None:
    """Return a time limit in seconds as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None: no limit."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,7})(?::(\d{1,7}))?(?::(\d{1,7}))?", text)
    if not found:
        raise UsageError(
            Flag("time", text), "is no time limit", fix="give e.g. 04:00:00, 1-12:00:00 or minutes"
        )
    days, *numbers = (None if number is None else int(number) for number in found.groups())
    first, second, third = numbers
    assert first is not None
    if days is not None or third is not None:
        return (((days or 0) * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    return first * 60 + (second or 0)
