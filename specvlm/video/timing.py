"""When frames that came out of a decoder are on screen. Pure, of stamps; knows no file, no decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_STEP_BACK_S = 0.1  # of a running clock; one that goes back further was reset
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
    numbers: list[int] = []  # of frames whose time is known
    times_s: list[float] = []
    offset_s, step_s, stuck = 0.0, usual_s, 0
    for number, stamp in enumerate(best_effort(stamps)):
        if stamp is None:
            continue
        time_s = stamp * tick_s + offset_s
        if numbers:
            expected_s = times_s[-1] + step_s * (number - numbers[-1])
            if time_s < times_s[-1] - _STEP_BACK_S or (jumps and time_s > expected_s + _LARGEST_GAP_S):
                offset_s += expected_s - time_s
                time_s = expected_s
            stuck += time_s <= times_s[-1]
            time_s = max(time_s, times_s[-1] + tick_s)
            step_s = time_s - times_s[-1] if number == numbers[-1] + 1 else step_s
        numbers.append(number)
        times_s.append(time_s)
    if 2 * stuck > len(numbers):  # these stamps are none
        numbers, times_s = [], []
    step_s = float(np.median(np.diff(times_s) / np.diff(numbers))) if len(numbers) > 1 else usual_s
    count, known = np.arange(len(stamps)), numbers or [0]
    outside = np.minimum(count - known[0], 0) + np.maximum(count - known[-1], 0)
    filled = np.interp(count, known, times_s or [0.0]) + outside * step_s
    return np.asarray(filled - filled[0], np.float64)
