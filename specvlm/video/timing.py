"""When frames that came out of a decoder are on screen. Pure, of stamps; knows no file, no decoder.

A frame brings two stamps, either of which may be missing or wrong, and the length of its own stay. FFmpeg's rule
picks one of the two; clocks that begin again go on where they stopped; what has no stamp is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_STEP_BACK_S = 0.1  # of a clock that goes on; one that goes back further was set anew
_LARGEST_GAP_S = 10.0  # within a recording, in containers whose clock may jump


class Stamp(NamedTuple):
    """What a decoder says of a frame's time, in ticks; None: nothing."""

    pts: int | None
    dts: int | None  # of the packet that brought the frame out
    duration: int  # 0: unknown


def best_effort(stamps: Sequence[Stamp]) -> list[int | None]:
    """FFmpeg's choice for each frame: its `pts`, or its `dts` where those go wrong less often."""
    chosen: list[int | None] = []
    faulty_pts = faulty_dts = 0
    last_pts = last_dts = -(1 << 63)
    for pts, dts, _ in stamps:
        if dts is not None:
            faulty_dts += dts <= last_dts
            last_dts = dts
        elif pts is not None:
            last_dts = pts
        if pts is not None:
            faulty_pts += pts <= last_pts
            last_pts = pts
        elif dts is not None:
            last_pts = dts
        by_pts = pts is not None and (faulty_pts <= faulty_dts or dts is None)
        chosen.append(pts if by_pts else dts)
    return chosen


def frame_times(
    stamps: Sequence[Stamp], tick_s: float, usual_s: float, *, jumps: bool
) -> NDArray[np.float64]:
    """Times of all frames of a video, in the order in which they came out.

    Args:
        stamps: Of each frame.
        tick_s: Seconds per tick.
        usual_s: Time between frames where no stamps tell.
        jumps: Whether the container's clock may jump ahead without a gap in the recording.

    Returns:
        [T] seconds from the first frame, increasing.
    """
    known: list[tuple[int, float]] = []  # number of a frame, and its time
    offset_s, step_s = 0.0, usual_s
    for number, stamp in enumerate(best_effort(stamps)):
        if stamp is None:
            continue
        time_s = stamp * tick_s + offset_s
        if known:
            before, before_s = known[-1]
            expected_s = before_s + step_s * (number - before)
            if time_s < before_s - _STEP_BACK_S or (jumps and time_s > expected_s + _LARGEST_GAP_S):
                offset_s += expected_s - time_s
                time_s = expected_s
            time_s = max(time_s, before_s + tick_s)
            if number == before + 1:
                step_s = time_s - before_s
        known.append((number, time_s))
    return _filled_in(known, len(stamps), step_s)


def _filled_in(known: Sequence[tuple[int, float]], count: int, step_s: float) -> NDArray[np.float64]:
    """Times of frames without a stamp: between their neighbours, or one step further."""
    numbers = np.arange(count)
    if not known:
        return np.asarray(numbers * step_s, np.float64)
    places, times_s = np.array([number for number, _ in known]), np.array([time_s for _, time_s in known])
    if len(known) > 1:
        step_s = float(np.median(np.diff(times_s) / np.diff(places)))
    outside = np.minimum(numbers - places[0], 0) + np.maximum(numbers - places[-1], 0)
    filled = np.interp(numbers, places, times_s) + outside * step_s
    return np.asarray(filled - filled[0], np.float64)
