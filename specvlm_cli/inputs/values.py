"""The values of a manifest's cells: what they mean, and which of them are refused. Knows no file."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from specvlm_cli.console.safe_text import short, storable

MOST_CELL_BYTES = 1 << 20
MOST_ROW_BYTES = 4 << 20  # of text formats
MOST_PATH_BYTES = 4096
MOST_ID_CHARACTERS = 1024
MOST_SECONDS = 1e9  # a time further into a video is a mistake of units
MOST_PROMPTS = 100  # of one row

_ADDRESS = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://")
_NUMBERS = (float, int, Decimal)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_CLOCK = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,9}):([0-9]{1,2}(?:\.[0-9]*)?)")
_NO_ID = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NO_PROMPT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class Fault(str):
    """Stands where a row's path would: why the row says nothing that could be used."""

    __slots__ = ()


class CellError(ValueError):
    """A cell cannot be used. The message is one line: the value, the reason, the fix."""


def is_address(path: bytes) -> bool:
    """Say whether this is the address of something remote, and no path."""
    return _ADDRESS.match(path) is not None


def path_of(value: object) -> bytes:
    """Return a cell's path; text that came from undecodable bytes becomes those bytes again.

    Raises:
        CellError: It is none that a file could have.
    """
    if value.__class__ is str:
        try:
            path = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise CellError(f"path {_quoted(value)} is no text; correct the row") from error
    elif value.__class__ is bytes:
        path = value
    elif value is None:
        raise CellError("no path; give one, or remove the row")
    elif isinstance(value, Fault):
        raise CellError(value)
    else:
        raise CellError(f"path {_quoted(value)} is no text; give a path, or remove the row")
    _refuse_path(path)
    return path


def _refuse_path(path: bytes) -> None:
    if not path:
        raise CellError("the path is empty; give one, or remove the row")
    if len(path) > MOST_PATH_BYTES:
        raise CellError(
            f"a path of {len(path)} bytes ({_quoted(path)}), the most is {MOST_PATH_BYTES}; shorten it"
        )
    if b"\0" in path:
        raise CellError(f"path {_quoted(path)} holds a NUL, which no file name can; correct the row")


def own_id(value: object) -> str | None:
    """Return a cell's id; None: the cell is empty.

    Raises:
        CellError: It cannot be an id.
    """
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise CellError(f"id {_quoted(value)} is neither text nor a whole number; correct the row")
    if len(value) > MOST_ID_CHARACTERS:
        raise CellError(f"id {_quoted(value)} is longer than {MOST_ID_CHARACTERS} characters; shorten it")
    if not value.isprintable() and _NO_ID.search(value):
        raise CellError(f"id {_quoted(value)} holds a control character or is not UTF-8; correct the row")
    return value


def segment(start: object, end: object) -> tuple[float | None, float | None]:
    """Return start and end of a part, in seconds; None: an empty cell.

    Raises:
        CellError: One of them is no time, or the end is not after the start.
    """
    start_s, end_s = _seconds("start", start), _seconds("end", end)
    if end_s is not None and end_s <= (start_s or 0.0):
        raise CellError(f"end {_quoted(end)} is not after start {_quoted(start or 0)}; correct the row")
    return start_s, end_s


def _seconds(name: str, value: object) -> float | None:
    if value is None or value == "":
        return None
    found = value if value.__class__ is float else _time(value)
    if found is None:
        raise CellError(f"{name} {_quoted(value)} is no time; give seconds or H:MM:SS.mmm")
    if not 0.0 <= found <= MOST_SECONDS:
        raise CellError(
            f"{name} {_quoted(value)} is no time of a video; give seconds from 0 to {MOST_SECONDS:g}"
        )
    return found + 0.0  # not -0.0, which would make another id


def _time(value: object) -> float | None:
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _NUMBER.fullmatch(text) else _clock(text)
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _clock(text: str) -> float | None:
    found = _CLOCK.fullmatch(text)
    if found is None:
        return None
    hours, minutes, seconds = found.groups()
    if float(seconds) >= 60 or (hours is not None and int(minutes) >= 60):
        return None
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def prompts_of(value: object) -> tuple[str, ...] | None:
    """Return a cell's prompts; None: the cell is empty.

    Raises:
        CellError: It is neither text nor a list of texts, or is none that a model could be given.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return (_prompt(value),) if value and not value.isspace() else None
    if not isinstance(value, list):
        raise CellError(f"prompt {_quoted(value)} is neither text nor a list of texts; correct the row")
    if len(value) > MOST_PROMPTS:
        raise CellError(f"{len(value)} prompts, the most for one video is {MOST_PROMPTS}; give fewer")
    return tuple(map(_listed_prompt, value)) or None


def _listed_prompt(value: object) -> str:
    if not isinstance(value, str) or not value or value.isspace():
        raise CellError(f"{_quoted(value)} in the list of prompts is no prompt; give texts alone")
    return _prompt(value)


def _prompt(text: str) -> str:
    if bad := _NO_PROMPT.search(text):
        raise CellError(f"prompt {_quoted(text)} holds the control character {bad.group()!r}; remove it")
    if len(text) > MOST_CELL_BYTES // 4 and len(text.encode()) > MOST_CELL_BYTES:
        raise CellError(f"prompt {_quoted(text)} is longer than {MOST_CELL_BYTES} bytes; shorten it")
    return text


def _quoted(value: object) -> str:
    """Return a value as a message may show it: cleaned, and not all of a long one."""
    if isinstance(value, bytes):
        value = value[:400].decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return f"'{short(value[:400], 60)}'"
    return short(_outline(value), 60)


def _outline(value: object) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)[:400]
    except (ValueError, RecursionError):  # a number of thousands of digits; a list a thousand deep
        return f"of type {type(value).__name__}"


def plain_text(value: str) -> str:
    r"""Return text that may be kept: what is not UTF-8 stands as `\xff`."""
    return value if value.isascii() else storable(value)


def plain_number(value: Any) -> float | None:
    """Return a number that JSON has; null for the others."""
    return float(value) if value is not None and math.isfinite(value) else None


def json_text(value: object) -> str:
    """Return any value as JSON text, numbers that JSON has not as null.

    Raises:
        CellError: It is nested too deeply, or holds a number that is too long.
    """
    try:
        return json.dumps(_cleaned(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise CellError(f"a kept value cannot be written as JSON ({error}); correct the row") from error


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, bytes):
        return plain_text(value.decode("utf-8", "surrogateescape"))
    if isinstance(value, float):
        return plain_number(value)
    if isinstance(value, dict):
        return {plain_text(str(name)): _cleaned(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(one) for one in value]
    return value if value is None or isinstance(value, bool | int) else plain_text(str(value))
