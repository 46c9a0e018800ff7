"""Which frames a video seems to have, from its packets alone: what the choice of frames begins with. No pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specvlm.errors import VideoDecodeError
from specvlm.video.contents import ends_early
from specvlm.video.demuxing import (
    CORRUPT,
    DISCARD,
    HIDDEN,
    INDEXED,
    KEY,
    UNKNOWN,
    OpenVideo,
    Packets,
    rate_of,
)
from specvlm.video.sampling import mean_gap_s

BROADCAST = frozenset({"mpegts", "mpeg"})  # may be recorded from anywhere on


@dataclass(frozen=True, slots=True)
class FramePlan:
    """All frames of a video, or of a part of it, in the order in which they are shown.

    Attributes:
        times_s: [T] presentation times in seconds from the first frame of the video.
        numbers: [T] number of the frame's own packet, in file order.
        starts: [T] number of the packet from which decoding must begin for this frame.
        trusted: Every packet has a time of its own, in a container with an index.
        losses: [K] numbers of packets that are corrupt, or behind which data are missing; increasing.
        truncated: The file ends before its container says, or demuxing it ended in an error.
        duration_s: Length of the video; the last frame is taken to last as long as the mean one.
        fps: Mean frame rate; 0 where a single frame does not tell.
    """

    times_s: NDArray[np.float64]
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]
    trusted: bool
    losses: NDArray[np.int64]
    truncated: bool
    duration_s: float
    fps: float


def plan_of(source: OpenVideo, packets: Packets) -> FramePlan:
    """Plan the reading of all packets of a file, or of those of a part of it.

    Raises:
        VideoDecodeError: There is no packet that shows anything.
        VideoUnavailableError: The system failed to read the file.
    """
    pts, dts, flags, _ = packets.columns()
    trusted = source.format in INDEXED and bool(len(pts) and flags[0] & KEY and (pts != UNKNOWN).all())
    stamps = np.where(pts != UNKNOWN, pts, dts if source.format == "avi" else UNKNOWN)
    if (stamps == UNKNOWN).all():
        stamps = np.arange(len(pts))
    keys = np.flatnonzero((flags & (KEY | CORRUPT) == KEY) & (stamps != UNKNOWN))
    shown = (stamps != UNKNOWN) & (flags & (DISCARD | CORRUPT | HIDDEN) == 0)
    if len(keys):  # nothing before the first key frame, in either order, can be decoded
        shown &= (np.arange(len(pts)) >= keys[0]) & (stamps >= stamps[keys[0]])
    numbers = np.flatnonzero(shown)
    if not len(numbers):
        reason = "holds no frame: cut short or damaged; copy or download it again"
        raise VideoDecodeError(source.file.label, reason)
    ticks, where = np.unique(stamps[numbers], return_index=True)
    first = packets.whole[0] if packets.whole else ticks[0]
    times_s: NDArray[np.float64] = (ticks - first) * source.tick_s
    length = packets.whole[1:] if packets.whole else length_of(source, times_s, packets.last_duration)
    return FramePlan(
        times_s=times_s,
        numbers=numbers[where],
        starts=_starts(ticks, numbers[where], stamps, keys),
        trusted=trusted and len(ticks) == len(numbers),
        losses=packets.losses(source.tick_s, headless=source.format not in BROADCAST),
        truncated=packets.ended_early or ends_early(source.file, source.format),
        duration_s=length[0],
        fps=length[1],
    )


def length_of(source: OpenVideo, times_s: NDArray[np.float64], last_duration: int) -> tuple[float, float]:
    """(duration in seconds, mean frame rate) of a video with these frames."""
    gap_s = mean_gap_s(times_s)
    stays_s = gap_s or last_duration * source.tick_s
    return float(times_s[-1]) + stays_s, 1.0 / gap_s if gap_s else float(rate_of(source))


def _starts(
    ticks: NDArray[np.int64], numbers: NDArray[np.int64], stamps: NDArray[np.int64], keys: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The last key packet that is shown no later than each frame; leading frames get an earlier one."""
    if not len(keys):
        return np.zeros(len(ticks), np.int64)
    in_time = keys[np.argsort(stamps[keys], kind="stable")]
    start = in_time[np.maximum(np.searchsorted(stamps[in_time], ticks, side="right") - 1, 0)]
    return np.where(start <= numbers, start, keys[0]).astype(np.int64)
