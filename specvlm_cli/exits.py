"""Exit codes, and the errors that end a command with one of them. Knows nothing of what was being done."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """A contract with people's scripts; the same numbers stand in the README."""

    OK = 0  # all done, or nothing to do
    FATAL = 1  # a model does not load, the disk is full, the ledger is damaged
    USAGE = 2  # usage or configuration, a config change included
    SOME_FAILED = 3  # finished, but at least one video failed
    TOO_MANY_FAILED = 4  # --max-failures tripped
    STOPPED = 75  # stopped early and can go on: a signal, or locked by another run
    INTERRUPTED = 130  # second Ctrl-C


class CommandError(Exception):
    """Ends the command. The message is one line: the value, the reason, the fix."""

    code = ExitCode.FATAL


class FatalError(CommandError):
    """The run cannot go on."""


class UsageError(CommandError):
    """What was asked for is wrong or contradicts what is on disk."""

    code = ExitCode.USAGE


class BusyError(CommandError):
    """Another run holds the output folder."""

    code = ExitCode.STOPPED
