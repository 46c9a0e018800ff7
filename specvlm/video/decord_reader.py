"""The default reader: decord, where nothing in the packet index speaks against it.

decord 0.6.0 believes headers, counts frames instead of reading their times, and on some files hangs, aborts
or returns other frames than asked for. `refusal` names the files where that is known, where its pixels are not
PyAV's, or where its FFmpeg 4.1 does not notice damage: they go to the other reader. So does a file that its FFmpeg
complains of. A hostile file can still hang or abort the process that reads it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from specvlm.errors import VideoError
from specvlm.video import decord_log
from specvlm.video.index import PacketIndex
from specvlm.video.opening import VideoFile
from specvlm.video.pixels import Decoded, FrameStore, Memory, own_memory

_CONTAINERS = frozenset({"mov", "matroska", "avi", "flv"})
_CODECS = frozenset({"h264", "mpeg4"})
_BLIND = frozenset({"hevc", "vp8", "vp9"})  # decoded well, but damaged ones without a complaint
# Formats that decord's FFmpeg 4.1 and PyAV's turn into the same RGB; others differ in their chroma.
_SAME_PIXELS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
_NO_STAND_INS = 1e-9  # share of frames that decord may replace by another one; its default is any, 0 is off
_CHUNK_BYTES = 64 << 20  # of frames held at their full size at a time, or one frame
_TIME_TOLERANCE_S = 1e-3
_FLOAT32_STEP = 1.2e-7  # decord reports times as float32


class DecordFailedError(Exception):
    """decord gave an error, or frames that are not the ones asked for. Does not leave this package."""


def is_installed() -> bool:
    """Whether decord can be imported; there are no wheels for macOS and ARM."""
    return importlib.util.find_spec("decord") is not None


def refusal(index: PacketIndex) -> str | None:
    """Why this file should not be given to decord; None if it may."""
    if index.container not in _CONTAINERS:
        return f"it misreads {index.container} files"
    if index.codec in _BLIND:
        return f"it does not notice damage in {index.codec}"
    if index.codec not in _CODECS:
        return f"it does not read {index.codec} well"
    if index.pixel_format not in _SAME_PIXELS or ("420" in index.pixel_format and index.height % 2):
        return f"it converts {index.pixel_format} pixels of {index.width}x{index.height} frames inexactly"
    return index.doubts[0] if index.doubts else None


def decode(
    file: VideoFile,
    index: PacketIndex,
    chosen: NDArray[np.int64],
    limit: int | None,
    memory: Memory = own_memory,
) -> tuple[Decoded, str]:
    """Decode the chosen frames, all of them.

    Args:
        file: The open file.
        index: Its packet index.
        chosen: [F] indices into the index, increasing.
        limit: Most pixels of a frame; None for no scaling.
        memory: Where frames are put.

    Returns:
        The frames, and the reader's name with its version.

    Raises:
        DecordFailedError: decord failed, complained, or its frame times are not the index's.
        VideoError: `memory` has none for this video.
    """
    try:
        decord = load()
        with decord_log.listening() as complaints:
            reader = decord.VideoReader(
                file.location, ctx=decord.cpu(0), num_threads=1, fault_tol=_NO_STAND_INS
            )
            _require_same_times(reader, index, chosen)
            decoded = _read(reader, index, chosen, FrameStore(len(chosen), limit, memory))
            _require_no_complaint(complaints)
        return decoded, f"decord {decord.__version__}"
    except (DecordFailedError, VideoError):
        raise
    except Exception as error:  # its own errors, AssertionError, IndexError, RuntimeError, OSError, ...
        raise DecordFailedError(f"it failed ({type(error).__name__})") from None


def load() -> Any:
    """Import decord, and keep it quiet."""
    decord: Any = importlib.import_module("decord")  # untyped
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _require_same_times(reader: Any, index: PacketIndex, chosen: NDArray[np.int64]) -> None:
    if len(reader) <= chosen[-1]:
        raise DecordFailedError(f"it sees {len(reader)} of {len(index.times_s)} frames")
    expected_s = index.times_s[chosen]
    # decord's times begin at the file's clock, not at the first frame.
    stamps_s = np.asarray(reader.get_frame_timestamp([0, *chosen.tolist()]))[:, 0].astype(np.float64)
    allowed_s = _TIME_TOLERANCE_S + 2 * _FLOAT32_STEP * np.abs(stamps_s).max()
    if not (np.abs(stamps_s[1:] - stamps_s[0] - expected_s) <= allowed_s).all():
        raise DecordFailedError("its frame times are not those of the packets")


def _require_no_complaint(complaints: decord_log.Complaints | None) -> None:
    if complaints is None:
        raise DecordFailedError("its messages cannot be heard here, so damage would go unnoticed")
    if complaints:
        raise DecordFailedError(f"it complained {len(complaints)} times")


def _read(reader: Any, index: PacketIndex, chosen: NDArray[np.int64], store: FrameStore) -> Decoded:
    step = max(1, _CHUNK_BYTES // (3 * index.width * index.height))
    for place in range(0, len(chosen), step):
        batch = _to_numpy(reader.get_batch(chosen[place : place + step].tolist()))
        _require_shape(batch, index)
        for offset, pixels in enumerate(batch):
            store.put(place + offset, VideoFrame.from_ndarray(pixels, format="rgb24"))
    return store.result(range(len(chosen)))


def _to_numpy(batch: Any) -> NDArray[np.uint8]:
    """Its own array, or that of the bridge that the caller has set (`decord.bridge`)."""
    return np.asarray(batch.asnumpy() if hasattr(batch, "asnumpy") else batch)


def _require_shape(batch: NDArray[np.uint8], index: PacketIndex) -> None:
    """Frames come upright, so sides may be swapped; at some sizes they come with four channels."""
    height, width, channels = batch.shape[1:]
    if channels != 3 or sorted((height, width)) != sorted((index.height, index.width)):
        raise DecordFailedError(f"it returned frames of {width}x{height}x{channels}")
