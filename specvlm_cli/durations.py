"""Spans of time as people type them: `90`, `60s`, `10m`, `3h50m`, `1d`."""

from __future__ import annotations

import re

from specvlm_cli.exits import Flag, UsageError

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_SPAN = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?[dhms])+")
_PIECE = re.compile(r"([0-9.]+)([dhms])")


def seconds(name: str, text: str) -> float:
    """Return a span in seconds; `name`: of the flag.

    Raises:
        UsageError: The text is not a span of time.
    """
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text):
        return float(text)
    if not _SPAN.fullmatch(text):
        raise UsageError(Flag(name, text), "is not a time", fix="give seconds, or e.g. 60s, 10m, 3h50m")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PIECE.findall(text))


def positive_seconds(name: str, text: str) -> float:
    """Return a span in seconds that is longer than none.

    Raises:
        UsageError: The text is zero, or not a span of time.
    """
    value = seconds(name, text)
    if value <= 0:
        raise UsageError(Flag(name, text), "leaves no time", fix="give more, e.g. 60s")
    return value
