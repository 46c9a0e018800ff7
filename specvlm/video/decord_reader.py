"""A reader by choice: decord 0.6.0, for files on which it can be trusted.

It believes headers and key flags, counts frames instead of reading their times, and on some files hangs, aborts or
returns other frames than asked for. A hostile file can still hang or abort the process that reads it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from specvlm.errors import VideoError
from specvlm.video.demuxing import DISCARD, HIDDEN, KEY, UNKNOWN, OpenVideo, Packets
from specvlm.video.pixels import Decoded, FrameStore, orientation_of
from specvlm.video.plan import FramePlan

# Formats that decord's FFmpeg 4.1 and PyAV's turn into the same RGB; others differ in their chroma.
_SAME_PIXELS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
_NO_STAND_INS = 1e-9  # share of frames that decord may replace by another one; its default is any, 0 is off
_TIME_TOLERANCE_S = 1e-3
_ERROR = 16  # AV_LOG_ERROR; what is graver has smaller numbers
_FLOAT32_STEP = 1.2e-7  # decord reports times as float32


class DecordFailedError(Exception):
    """decord gave an error, or frames that are not the ones asked for. Does not leave this package."""


def is_installed() -> bool:
    """Whether decord can be imported; there are no wheels for macOS and ARM."""
    return importlib.util.find_spec("decord") is not None


def name() -> str:
    """Its name and version."""
    return f"decord {load().__version__}"


def refusal(source: OpenVideo, packets: Packets, plan: FramePlan) -> str | None:
    """Why this file should not be given to decord; None if it may."""
    context, pixels = source.stream.codec_context, source.pixel_format
    pts, dts, flags, _ = packets.columns()
    keys = flags & KEY > 0
    known = {*pts[keys].tolist(), *dts[keys].tolist()}
    entries = source.stream.index_entries
    try:
        frames = [*context.decode(packets.held[0]), *context.decode(None)] if packets.held else []
    except (av.error.FFmpegError, ValueError):
        frames = []
    size, odd = f"{context.width}x{context.height}", "420" in pixels and context.height % 2
    checks = (
        (source.codec != "h264", f"it reads {source.codec} wrongly, or does not notice damage in it"),
        (pixels not in _SAME_PIXELS or odd, f"it converts {pixels} pixels of {size} frames inexactly"),
        (not plan.trusted, f"packets of a {source.format} file do not tell its frames"),
        (plan.truncated or len(plan.losses), "it is cut short or damaged"),
        (len(source.container.streams.video) > 1, "it has several video streams"),
        ((flags & (DISCARD | HIDDEN)).any(), "it has packets that are not shown"),
        ((pts < np.maximum.accumulate(np.where(keys, pts, UNKNOWN))).any(), "it has open groups of pictures"),
        (any(e.is_keyframe and e.timestamp not in known for e in entries), "its index has false key frames"),
        (not frames, "it is too large to be checked"),
        (frames and frames[0].interlaced_frame, "it is interlaced"),
        (frames and sum(orientation_of(frames[0])) % 2, "it is mirrored"),
    )
    return next((reason for wrong, reason in checks if wrong), None)


def decode(
    source: OpenVideo, times_s: NDArray[np.float64], chosen: NDArray[np.int64], store: FrameStore
) -> Decoded:
    """Decode the chosen frames, all of them.

    Args:
        source: The open file.
        times_s: [T] times of all its frames.
        chosen: [F] indices into them, increasing.
        store: Room for the chosen frames.

    Raises:
        DecordFailedError: decord failed, complained, or its frame times are others.
        VideoError: `store` has no memory for this video.
    """
    try:
        decord = load()
        before = _complaints()
        reader = decord.VideoReader(
            source.file.location, ctx=decord.cpu(0), num_threads=1, fault_tol=_NO_STAND_INS
        )
        _require_same_times(reader, times_s, chosen)
        for place, number in enumerate(chosen.tolist()):
            store.put(place, VideoFrame.from_ndarray(_to_numpy(reader[number]), format="rgb24"))
        if complaints := _complaints() - before:
            raise DecordFailedError(f"it complained {complaints} times")
        return store.result(range(len(chosen)))
    except (DecordFailedError, VideoError):
        raise
    except Exception as error:  # its own errors, AssertionError, IndexError, RuntimeError, OSError, ...
        raise DecordFailedError(f"it failed ({type(error).__name__})") from None


@cache
def load() -> Any:
    """Import decord, keep it quiet, and listen to its FFmpeg, which passes off as sound what it has concealed.

    Its FFmpeg is another library than PyAV's, with a log of its own, which is ours from now on.
    """
    decord: Any = importlib.import_module("decord")  # untyped
    decord.logging.set_level(decord.logging.QUIET)
    with suppress(OSError):
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "/libavutil" in line}
        for path in paths:
            if "decord" in Path(path).parent.name:
                ctypes.CDLL(path).av_log_set_callback(_CALLBACK)
                _heard.append(0)
    return decord


_heard: list[int] = []  # the number of errors, once they are listened to


def _hear(_: int | None, level: int, __: bytes | None, ___: int | None) -> None:
    _heard[0] += level <= _ERROR


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_hear)


def _complaints() -> int:
    """Errors of decord's FFmpeg until now. Those of other threads that read with decord count too."""
    if not _heard:
        raise DecordFailedError("its messages cannot be heard here, so damage would go unnoticed")
    return _heard[0]


def _require_same_times(reader: Any, times_s: NDArray[np.float64], chosen: NDArray[np.int64]) -> None:
    if len(reader) != len(times_s):
        raise DecordFailedError(f"it sees {len(reader)} of {len(times_s)} frames")
    expected_s = times_s[chosen]
    # decord's times begin at the file's clock, not at the first frame.
    stamps_s = np.asarray(reader.get_frame_timestamp([0, *chosen.tolist()]))[:, 0].astype(np.float64)
    allowed_s = _TIME_TOLERANCE_S + 2 * _FLOAT32_STEP * np.abs(stamps_s).max()
    if not (np.abs(stamps_s[1:] - stamps_s[0] - expected_s) <= allowed_s).all():
        raise DecordFailedError("its frame times are not those of the packets")


def _to_numpy(frame: Any) -> NDArray[np.uint8]:
    """Its own array, or that of the bridge that the caller has set (`decord.bridge`)."""
    return np.asarray(frame.asnumpy() if hasattr(frame, "asnumpy") else frame)
