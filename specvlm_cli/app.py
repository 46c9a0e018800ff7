"""The `specvlm` command: the Typer app, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated

import typer

from specvlm.errors import ConfigError, IncompatibleDraftError, PromptError, SpecvlmError
from specvlm_cli import streams
from specvlm_cli.commands.audit import AuditFlags, audit
from specvlm_cli.commands.bench import bench
from specvlm_cli.commands.bench_flags import BenchFlags
from specvlm_cli.commands.caption import caption
from specvlm_cli.commands.caption_flags import CaptionFlags
from specvlm_cli.commands.doctor import doctor
from specvlm_cli.commands.export import export
from specvlm_cli.commands.help import HelpCommand, HelpGroup
from specvlm_cli.commands.inspect import InspectFlags, inspect
from specvlm_cli.commands.options import command, variable
from specvlm_cli.commands.presets import presets
from specvlm_cli.commands.slurm import SlurmFlags, slurm
from specvlm_cli.commands.status import status
from specvlm_cli.commands.train import train
from specvlm_cli.commands.train_flags import TrainFlags
from specvlm_cli.commands.vocab import VocabFlags, vocab
from specvlm_cli.database import was_interrupted
from specvlm_cli.exits import CommandError, ExitCode
from specvlm_cli.process import keep_torch_out_of_foreign_folders
from specvlm_cli.stopping import NotBegunError, until_listening
from specvlm_cli.talk import error_line, error_trace
from specvlm_cli.text import short

app = typer.Typer(
    name="specvlm",
    cls=HelpGroup,
    help="Caption folders of videos with a large video LLM: the same tokens, faster.",
    pretty_exceptions_enable=False,
    add_completion=False,
)
_COMMANDS: tuple[Callable[..., int], ...] = (
    command(CaptionFlags, caption),
    status,
    export,
    command(AuditFlags, audit),
    command(BenchFlags, bench),
    command(InspectFlags, inspect),
    command(TrainFlags, train),
    command(VocabFlags, vocab),
    command(SlurmFlags, slurm),
    presets,
    doctor,
)
for _run in _COMMANDS:
    app.command(name=_run.__name__, cls=HelpCommand)(_run)

_RESUMED = (
    "caption",
    "audit",
    "train",
)  # commands that a signal ends in order, and that go on when started again


def _print_version(wanted: bool) -> None:
    if wanted:
        from specvlm import __version__

        print(f"specvlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    streams.prepare()
    try:
        if given[0] in ("caption", "audit", "train", "bench", "inspect", "doctor"):
            keep_torch_out_of_foreign_folders()
        listening = until_listening() if given[0] in _RESUMED else nullcontext()
        with streams.escaping(), listening:
            code = int(app(args=given, prog_name="specvlm", standalone_mode=False) or 0)
        sys.stdout.flush()  # here, where a reader that has gone can still be dealt with
        return code
    except NotBegunError as error:
        error_line(f"stopped by {error}; start again to go on")
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FATAL
    except Exception as error:
        if was_interrupted(error):  # by a signal, while a ledger was read
            if given[0] not in _RESUMED:
                return ExitCode.INTERRUPTED
            error_line("stopped by a signal; start again to go on")
            return ExitCode.STOPPED
        if _verbose(given):
            error_trace(traceback.format_exc())
        message, code = _explained(error)
        error_line(_with_source(message, given) if code == ExitCode.USAGE else message)
        return code


def _verbose(arguments: Sequence[str]) -> bool:
    asked = os.environ.get("SPECVLM_VERBOSE", "").lower() in ("1", "true", "yes", "on")
    return asked or "-v" in arguments or "--verbose" in arguments


def _with_source(message: str, given: Sequence[str]) -> str:
    """Add to a message about a flag's value what the value is, and which variable it came from."""
    words = re.findall(r"--([a-z-]+)|\b([a-z_]+)=", message)
    for flag in ("--" + (long or name.replace("_", "-")) for long, name in words):
        if flag in given[:-1] and message.startswith("Invalid value"):
            value = short(given[list(given).index(flag) + 1], 60)
            return message if value in message else f"{message} ({flag} {value})"
        if flag not in given and (value := os.environ.get(variable(flag), "")):
            return f"{message} ({variable(flag)}={short(value, 60)})"
    return message


def _plainly(message: str) -> str:
    """Return a message of the command-line library without its own words, and with a way out."""
    if message.startswith("Missing argument 'INPUT...'"):
        return (
            "nothing to caption: give a folder, a video, a quoted glob, a manifest, or - for standard input"
        )
    if message.startswith("Missing argument 'VIDEOS...'"):
        return "nothing to learn from: give a folder, a video, a quoted glob, a manifest, or - for standard input"
    if message.startswith("Missing argument 'VIDEO'"):
        return "nothing to inspect: give a video"
    return message.replace("Value error, ", "")


def _as_flags(message: str) -> str:
    """Return a message about a setting with the setting named as people typed it."""
    return re.sub(
        r"\b([a-z]+(?:_[a-z0-9]+)*)=(?=[\d.'-]|nan\b|inf\b)",
        lambda found: f"--{found[1].replace('_', '-')} ",
        message,
    )


def _explained(error: Exception) -> tuple[str, ExitCode]:
    """Return the one line and the exit code for an error that ended a command."""
    if isinstance(error, CommandError):
        return str(error), error.code
    if isinstance(error, typer.TyperException):
        return _plainly(error.format_message()), ExitCode.USAGE
    if isinstance(error, ConfigError):
        return _as_flags(str(error)), ExitCode.USAGE
    if isinstance(error, (IncompatibleDraftError, PromptError)):
        return str(error), ExitCode.USAGE
    if isinstance(error, SpecvlmError):
        return str(error), ExitCode.FATAL
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        return "the ledger is in use by another program; close it there, then start again", ExitCode.STOPPED
    if isinstance(error, (OSError, sqlite3.Error)):
        return (
            f"{error}; mend this and start again (a run folder keeps what was captioned so far)",
            ExitCode.FATAL,
        )
    return f"{type(error).__name__}: {error}; run it with -v for the traceback", ExitCode.FATAL
