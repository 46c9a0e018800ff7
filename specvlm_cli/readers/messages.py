r"""What goes between the coordinator, the read server and a reading child.

Coordinator and read server trust each other and exchange records of fixed size. A child has read a file that may be
hostile, so what it says is data to be checked: JSON lines with known names, types and bounds, and nothing else.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from specvlm.config import FrameSettings
from specvlm.records import VideoSource
from specvlm_cli.caption.failure import LONGEST
from specvlm_cli.console.safe_text import clean
from specvlm_cli.readers.jobs import ReadJob
from specvlm_cli.readers.shared import MOST_BYTES, MisreportError

RECORD = struct.Struct("<cQq")  # what, number of the attempt, value
FORK, KILL = b"F", b"K"  # to the read server; a fork comes with the child's end of a socket
READY, STARTED, ENDED = b"R", b"S", b"E"  # from it; the value is a process id, or a wait status
NOT_STARTED = -1  # instead of a wait status: there was no process to be had

_LONGEST_PATH = 1 << 13  # no system opens longer ones; these fail in the same way when cut to this length
_MOST_FRAMES, _LARGEST_SIDE = 100_000, 1 << 16
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_BACKEND = re.compile(r"[A-Za-z0-9_.+ -]{1,64}")
_FLAGS = ("truncated", "damaged", "partial")


@dataclass(frozen=True, slots=True)
class Said:
    """What a child failed with, in its own words.

    Attributes:
        stage: `"open"` or `"decode"`.
        error_type: Name of the exception.
        error: One line.
        transient: Another try may work.
    """

    stage: str
    error_type: str
    error: str
    transient: bool


@dataclass(frozen=True, slots=True)
class ReaderReport:
    """All that a child said.

    Attributes:
        began: The last step that it began; None: it did not say.
        size_bytes: The file's size, for its time limit; 0: it is not open yet.
        failed: Why there are no frames.
        shape: [F, height, width, 3] of the frames that it sent.
        source: The file's own facts.
    """

    began: str | None = None
    size_bytes: int = 0
    failed: Said | None = None
    shape: tuple[int, int, int, int] | None = None
    source: VideoSource | None = None


def job_line(job: ReadJob) -> bytes:
    """Return the request line for a child."""
    wanted = {
        "path": _text(job.path),
        "settings": asdict(job.settings),
        "frame_multiple": job.frame_multiple,
        "root": None if job.root is None else _text(job.root),
    }
    return json.dumps(wanted).encode("ascii") + b"\n"


def job_of(line: bytes) -> ReadJob:
    """Undo `job_line`."""
    wanted = json.loads(line)
    path, root = _bytes(wanted["path"]), None if wanted["root"] is None else _bytes(wanted["root"])
    return ReadJob(0, path, FrameSettings(**wanted["settings"]), wanted["frame_multiple"], root)


def _text(path: bytes) -> str:
    return path[:_LONGEST_PATH].decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def began_line(step: str, size_bytes: int) -> bytes:
    """Return the line by which a child says that it begins a step, and how large the file is; 0: not known yet."""
    return json.dumps({"began": step, "size_bytes": size_bytes}).encode("ascii") + b"\n"


def failed_line(said: Said) -> bytes:
    """Return the line by which a child says why there are no frames."""
    return json.dumps({"failed": asdict(said)}).encode("ascii") + b"\n"


def read_line(shape: tuple[int, ...], source: VideoSource) -> bytes:
    """Return the line that goes with the memory in which the frames are."""
    return json.dumps({"shape": shape, "source": source._asdict()}).encode("ascii") + b"\n"


def report_of(data: bytes) -> ReaderReport:
    """Return what a child said, checked.

    Raises:
        MisreportError: It is not what a child of ours says.
    """
    if len(data) > MOST_BYTES:
        raise MisreportError(f"more than {MOST_BYTES} bytes")
    report = ReaderReport()
    for line in data.splitlines():
        report = _with_line(report, line)
    return report


def _with_line(report: ReaderReport, line: bytes) -> ReaderReport:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise MisreportError("no JSON") from None
    if report.failed is not None or report.shape is not None:
        raise MisreportError("something after the end")
    match said:
        case {"began": str(step), "size_bytes": size, **rest} if (
            not rest and _WORD.fullmatch(step) and _is_count(size)
        ):
            return ReaderReport(step, size)
        case {"failed": dict(failed), **rest} if not rest:
            return replace(report, failed=_said(failed))
        case {"shape": list(shape), "source": dict(source), **rest} if not rest:
            return replace(report, shape=_shape(shape), source=_source(source))
    raise MisreportError("unknown words")


def _said(failed: dict[str, Any]) -> Said:
    match failed:
        case {
            "stage": ("open" | "decode") as stage,
            "error_type": str(name),
            "error": str(error),
            "transient": bool(transient),
            **rest,
        } if not rest and _WORD.fullmatch(name):
            line = clean(" ".join(error.split()))
            return Said(stage, name, line[:LONGEST] or "no message", transient)
    raise MisreportError("a failure without sense")


def _shape(shape: list[Any]) -> tuple[int, int, int, int]:
    if len(shape) == 4 and all(type(length) is int for length in shape):
        frames, height, width, channels = shape
        sides = 1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE
        if 1 <= frames <= _MOST_FRAMES and sides and channels == 3:
            return frames, height, width, channels
    raise MisreportError("frames of an impossible shape")


def _is_amount(value: Any) -> bool:
    return _is_count(value) or (type(value) is float and math.isfinite(value) and value >= 0)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_time(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_backend(value: Any) -> bool:
    return isinstance(value, str) and _BACKEND.fullmatch(value) is not None


def _are_flags(value: Any) -> bool:
    return isinstance(value, list) and value == [flag for flag in _FLAGS if flag in value]


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "duration_s": _is_amount,
    "fps": _is_amount,
    "width": _is_count,
    "height": _is_count,
    "backend": _is_backend,
    "decode_s": _is_amount,
    "flags": _are_flags,
    "size_bytes": _is_count,
    "mtime_ns": _is_time,
}


def _source(source: dict[str, Any]) -> VideoSource:
    if source.keys() != _CHECKS.keys() or not all(_CHECKS[name](source[name]) for name in source):
        raise MisreportError("facts without sense")
    return VideoSource(**source | {"flags": tuple(source["flags"])})
