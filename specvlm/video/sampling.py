"""Which frames of a video are read: the one rule. Pure, of times and settings; knows no file, no decoder."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from specvlm.config import FrameSettings

_DEFAULT_FPS = 2.0
# Matroska and FLV round times to milliseconds; the same clip in mp4 should give the same frames. Frames of
# 1001/30000 s fall on odd half milliseconds past the moments asked for: the tolerance keeps between those.
_TOLERANCE_S = 1.25e-3


def mean_gap_s(times_s: NDArray[np.float64]) -> float:
    """Mean time between frames; 0 for a single one. The last frame is taken to stay on screen that long."""
    return float(times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else 0.0


def select_frames(
    times_s: NDArray[np.float64], settings: FrameSettings, frame_multiple: int = 1
) -> NDArray[np.int64]:
    """Choose frames: n of them, at start + i * span / n, each the one on screen at that time.

    Args:
        times_s: [T] times of all frames of the video in presentation order, from the first frame.
        settings: What to choose.
        frame_multiple: The count is a multiple of this where the part holds that many frames.

    Returns:
        [F] int64 indices into `times_s`, strictly increasing: no frame is given twice, and a part that holds
        fewer frames than asked for gives them all (or the largest multiple). Empty if it begins past the end.
    """
    end_of_video_s = float(times_s[-1]) + mean_gap_s(times_s)
    start_s = settings.start_s
    if start_s >= end_of_video_s and start_s > 0.0:
        return np.empty(0, np.int64)
    end_s = end_of_video_s if settings.end_s is None else min(settings.end_s, end_of_video_s)
    first = _on_screen(times_s, start_s)
    last = max(first, int(np.searchsorted(times_s, end_s - _TOLERANCE_S, side="left")) - 1)
    count = _frame_count(end_s - start_s, last - first + 1, settings, frame_multiple)
    moments_s = start_s + np.arange(count) * ((end_s - start_s) / count)
    nearest = np.searchsorted(times_s, moments_s + _TOLERANCE_S, side="right") - 1
    return _without_repeats(np.clip(nearest, first, last), last)


def _on_screen(times_s: NDArray[np.float64], moment_s: float) -> int:
    return max(0, int(np.searchsorted(times_s, moment_s + _TOLERANCE_S, side="right")) - 1)


def _frame_count(span_s: float, available: int, settings: FrameSettings, multiple: int) -> int:
    if settings.num_frames is not None:
        wanted = settings.num_frames
    else:
        fps = _DEFAULT_FPS if settings.fps is None else settings.fps
        least = math.ceil(settings.min_frames / multiple) * multiple
        # To the nearest multiple: a clip that lasts a little under 4 s still gives the 8 frames of 4 s.
        nearest = math.floor((span_s + _TOLERANCE_S) * fps / multiple + 0.5) * multiple
        wanted = min(max(nearest, least), settings.max_frames)
    wanted = max(wanted - wanted % multiple, multiple)
    if wanted <= available:
        return wanted
    return available - available % multiple or available


def _without_repeats(indices: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """Move repeated frames to the next free one, then back from the end where there is none left."""
    steps = np.arange(len(indices))
    spread = np.maximum.accumulate(indices - steps)
    return (np.minimum(spread, last - len(indices) + 1) + steps).astype(np.int64)
