"""Why a video has no caption, as one flat record that crosses processes. Knows no ledger and no video."""

from __future__ import annotations

from dataclasses import dataclass

from specvlm.errors import VideoError
from specvlm_cli.console.safe_text import storable

LONGEST = 2000  # characters of a reason
BAD_INPUT = "BadInput"  # error type of an input that names no video, or an impossible part of one


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a video has no caption."""

    stage: str  # open, decode, preprocess, generate or write
    error_type: str
    error: str  # one line


def failure_of(stage: str, error: BaseException) -> Failure:
    """Return what an exception says, as one line."""
    text = error.reason if isinstance(error, VideoError) else str(error)
    line = " ".join(storable(text).split()) or "no message"
    return Failure(stage, type(error).__name__, line[:LONGEST])
