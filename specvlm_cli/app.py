"""The `specvlm` command: the Typer app, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import os
import sqlite3
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated

import typer

from specvlm.errors import ConfigError, IncompatibleDraftError, PromptError, SettingsError, SpecvlmError
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
from specvlm_cli.console import streams
from specvlm_cli.console.messages import error_line, error_trace
from specvlm_cli.console.safe_text import short
from specvlm_cli.exits import CommandError, ExitCode, as_flag, flag_name
from specvlm_cli.process import keep_torch_out_of_foreign_folders
from specvlm_cli.run.database import was_interrupted
from specvlm_cli.stopping import NotBegunError, until_listening

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

# Commands that stop in order on a signal, and resume when started again.
_RESUMED = ("caption", "audit", "train")


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
        error_line(f"stopped by {error}; start again to resume")
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FATAL
    except Exception as error:
        if was_interrupted(error):  # by a signal, while a ledger was read
            if given[0] not in _RESUMED:
                return ExitCode.INTERRUPTED
            error_line("stopped by a signal; start again to resume")
            return ExitCode.STOPPED
        if _verbose(given):
            error_trace(traceback.format_exc())
        message, code = _explained(error)
        error_line(message + _source(error, given))
        return code


def _verbose(arguments: Sequence[str]) -> bool:
    asked = os.environ.get("SPECVLM_VERBOSE", "").lower() in ("1", "true", "yes", "on")
    return asked or "-v" in arguments or "--verbose" in arguments


def _source(error: Exception, given: Sequence[str]) -> str:
    """Return the value of the flag that an error is about, or its variable, where the message does not say it."""
    for flag in _flags_of(error):
        if flag in given[:-1] and isinstance(error, typer.BadParameter):
            value = short(given[list(given).index(flag) + 1], 60)
            return "" if value in error.message else f" ({flag} {value})"
        if flag not in given and (value := os.environ.get(variable(flag), "")):
            return f" ({variable(flag)}={short(value, 60)})"
    return ""


def _flags_of(error: Exception) -> list[str]:
    """Return the flags that an error is about."""
    if isinstance(error, SettingsError):
        return [flag_name(setting) for setting in error.settings]
    if isinstance(error, typer.BadParameter) and error.param is not None:
        return error.param.opts[:1]
    return []


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


def _explained(error: Exception) -> tuple[str, ExitCode]:
    """Return the one line and the exit code for an error that ended a command."""
    if isinstance(error, CommandError):
        return str(error), error.code
    if isinstance(error, typer.TyperException):
        return _plainly(error.format_message()), ExitCode.USAGE
    if isinstance(error, ConfigError):
        return error.worded(as_flag), ExitCode.USAGE
    if isinstance(error, (IncompatibleDraftError, PromptError)):
        return str(error), ExitCode.USAGE
    if isinstance(error, SpecvlmError):
        return str(error), ExitCode.FATAL
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        return "the ledger is in use by another program; close it there, then start again", ExitCode.STOPPED
    if isinstance(error, (OSError, sqlite3.Error)):
        return (
            f"{error}; fix this and start again (the run folder keeps all captions so far)",
            ExitCode.FATAL,
        )
    return f"{type(error).__name__}: {error}; run it with -v for the traceback", ExitCode.FATAL
