"""Checks, one at a time: whatever one does (raise, hang), it ends as a finding and the next one runs.

A check that hangs is left to itself in a thread that ends with the process. It knows nothing of what is checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class CheckVerdict:
    """What a check found.

    Attributes:
        status: In order; works, but not well, or not everything; does not work.
        detail: What was found, in a few words.
        fix: How to fix it; empty if nothing is wrong.
    """

    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at.

    Attributes:
        name: One or two words.
        look: Does it.
        limit_s: How long that may take.
    """

    name: str
    look: Callable[[], CheckVerdict]
    limit_s: float = 10.0


@dataclass(frozen=True, slots=True)
class TimedVerdict:
    """A check's verdict, with its name and the time that it took."""

    name: str
    status: Status
    detail: str
    fix: str
    seconds: float


def ok(detail: str) -> CheckVerdict:
    """Return that something is in order."""
    return CheckVerdict("ok", detail)


def warn(detail: str, fix: str) -> CheckVerdict:
    """Return that something works, but not well."""
    return CheckVerdict("warn", detail, fix)


def fail(detail: str, fix: str) -> CheckVerdict:
    """Return that something does not work."""
    return CheckVerdict("fail", detail, fix)


def examine(check: Check) -> TimedVerdict:
    """Do one check, within its time limit."""
    found: list[CheckVerdict] = []
    began = time.monotonic()
    thread = threading.Thread(target=lambda: found.append(_looked(check)), daemon=True, name=check.name)
    thread.start()
    thread.join(check.limit_s)
    late = fail(f"no answer within {check.limit_s:g} s", "something hangs: a disk, a driver or a device")
    verdict = found[0] if found else late
    return TimedVerdict(
        check.name, verdict.status, verdict.detail, verdict.fix, round(time.monotonic() - began, 3)
    )


def _looked(check: Check) -> CheckVerdict:
    try:
        return check.look()
    except Exception as error:  # a check that fails must not take the others with it
        reason = " ".join(str(error).split()) or "no message"
        return fail(f"{type(error).__name__}: {reason}"[:400], "fix that, or report it with this message")
