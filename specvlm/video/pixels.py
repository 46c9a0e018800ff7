"""Size and storage of decoded frames: one scaler behind both readers, so that both give the same pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from specvlm.config import FrameSettings

_MATRIX = Type.DISPLAYMATRIX
# Gives the memory that frames are put into, for a shape [F, height, width, 3]; asked once a video.
Memory = Callable[[tuple[int, int, int, int]], NDArray[np.uint8]]


def own_memory(shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Memory of this process."""
    return np.empty(shape, np.uint8)


class Decoded(NamedTuple):
    """What a reader hands back."""

    pixels: NDArray[np.uint8]  # [K, height, width, 3], RGB, upright, scaled
    width: int  # upright, before scaling
    height: int
    places: NDArray[np.int64]  # [K], increasing: which of the chosen frames these are


class Orientation(NamedTuple):
    """How a stored picture becomes the one that is shown: the first of these first."""

    transpose: bool
    flip_x: bool  # left becomes right
    flip_y: bool


UPRIGHT = Orientation(False, False, False)
_SKEW = 0.02  # of a display matrix that is taken for one of whole quarter turns: about a degree


def orientation_of(frame: VideoFrame) -> Orientation:
    """What the display matrix of a frame says. Turns by other angles than 90 degrees are not made."""
    matrix: Any = frame.side_data.get(_MATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return UPRIGHT
    # x' = a x + c y and y' = b x + d y
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(b) + abs(c) < _SKEW * (abs(a) + abs(d)):
        return Orientation(False, a < 0, d < 0)
    if abs(a) + abs(d) < _SKEW * (abs(b) + abs(c)):
        return Orientation(True, c < 0, b < 0)
    return UPRIGHT


def pixel_limit(settings: FrameSettings, frames: int) -> int | None:
    """Most pixels of one of `frames` frames; None where there is no limit."""
    limits = [settings.max_pixels] if settings.max_pixels is not None else []
    if settings.total_pixels is not None:
        limits.append(max(1, settings.total_pixels // frames))
    return min(limits, default=None)


def fit(width: int, height: int, limit: int | None) -> tuple[int, int]:
    """The largest even size of the same shape within `limit` pixels; the size itself where it fits."""
    if limit is None or width * height <= limit:
        return width, height
    scale = math.sqrt(limit / (width * height))
    return _even(width * scale), _even(height * scale)


def _even(side: float) -> int:
    return max(1, int(side) // 2 * 2)


class FrameStore:
    """The result's memory, filled frame by frame: never more than one frame is held at its full size.

    Attributes:
        filled: The places where frames are stored.

    Frames are turned to RGB at full size and then scaled by area: two steps, because the one-step conversion
    differs between the FFmpeg releases that the readers carry, while these agree to the bit.
    """

    def __init__(self, frames: int, limit: int | None, memory: Memory = own_memory) -> None:
        """Room for `frames` frames of at most `limit` pixels; the first one stored decides their size."""
        self.filled: set[int] = set()
        self._frames = frames
        self._limit = limit
        self._memory = memory
        self._pixels: NDArray[np.uint8] | None = None
        self._full_size = (0, 0)
        self._to_rgb = VideoReformatter()
        self._scale = VideoReformatter()

    def put(self, place: int, frame: VideoFrame, orientation: Orientation = UPRIGHT) -> None:
        """Store `frame` as number `place`, made upright."""
        rgb = self._to_rgb.reformat(frame, format="rgb24", threads=1)
        if orientation != UPRIGHT:
            rgb = _made_upright(rgb, orientation)
        if self._pixels is None:
            self._full_size = rgb.width, rgb.height
            width, height = fit(*self._full_size, self._limit)
            self._pixels = self._memory((self._frames, height, width, 3))
        height, width = self._pixels.shape[1:3]
        if (rgb.width, rgb.height) != (width, height):
            rgb = self._scale.reformat(
                rgb, width, height, "rgb24", interpolation=Interpolation.AREA, threads=1
            )
        self._pixels[place] = rgb.to_ndarray()
        self.filled.add(place)

    def result(self, places: Sequence[int]) -> Decoded:
        """What was stored at `places`, which increase and are not empty; the rest is given up."""
        assert self._pixels is not None, "no frame was put"
        for target, place in enumerate(places):
            if target != place:
                self._pixels[target] = self._pixels[place]
        return Decoded(self._pixels[: len(places)], *self._full_size, np.array(places, np.int64))


def _made_upright(rgb: VideoFrame, orientation: Orientation) -> VideoFrame:
    pixels = rgb.to_ndarray().astype(np.uint8, copy=False)
    if orientation.transpose:
        pixels = pixels.transpose(1, 0, 2)
    if orientation.flip_x:
        pixels = pixels[:, ::-1]
    if orientation.flip_y:
        pixels = pixels[::-1]
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
