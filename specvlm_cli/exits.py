"""Exit codes, and the errors that end a command with one of them. Knows nothing of what was being done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from specvlm.errors import Setting, SettingsError
from specvlm_cli.console.safe_text import clean

FLAG_NAMES = {"backend": "video_backend"}  # of settings whose flags are not called like them


class ExitCode(IntEnum):
    """A contract with people's scripts; the same numbers are in docs/caption.md."""

    OK = 0  # all done, or nothing to do
    FATAL = 1  # a model does not load, the disk is full, the ledger is damaged
    USAGE = 2  # usage or configuration, a config change included
    SOME_FAILED = 3  # finished, but at least one video failed
    TOO_MANY_FAILED = 4  # --max-failures tripped
    STOPPED = 75  # stopped early and can resume: a signal, or locked by another run
    INTERRUPTED = 130  # second Ctrl-C


class CommandError(Exception):
    """Ends the command. The message is one line: the value, the reason, the fix."""

    code = ExitCode.FATAL


class FatalError(CommandError):
    """The run cannot continue."""


@dataclass(frozen=True, slots=True)
class Flag(Setting):
    """A flag as it was typed, without quotes around its value; None: it has none, or the message leaves it out."""

    value: object = None

    @property
    def shown(self) -> str:
        return "" if self.value is None else str(self.value)


def flag_name(setting: Setting) -> str:
    """Return the flag of a setting, without its value."""
    return "--" + FLAG_NAMES.get(setting.name, setting.name).replace("_", "-")


def as_flag(setting: Setting) -> str:
    """Return a setting as people type it: `--prune-ratio 1.5`."""
    return f"{flag_name(setting)} {clean(setting.shown)}".rstrip()


class UsageError(SettingsError, CommandError):
    """What was asked for is wrong or contradicts what is on disk."""

    code = ExitCode.USAGE

    def __str__(self) -> str:
        return self.worded(as_flag)


def excluding(one: Flag, other: Flag) -> UsageError:
    """Return the error about two flags of which only one can be given."""
    return UsageError(one, "and", other, "exclude each other", fix="give one of them")


class BusyError(CommandError):
    """Another run holds the output folder."""

    code = ExitCode.STOPPED
