"""Read video: path -> the chosen frames and their true times.

Frames are chosen first, from the times of the packets, and only those are decoded. Knows no model, no torch
and no job: it is made to run in a child process that can be killed. Importing it is cheap; numpy and the
decoders are loaded by the first read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from specvlm.config import FrameSettings

if TYPE_CHECKING:
    from specvlm.records import Frames

__all__ = ["read_video"]

_DEFAULTS = FrameSettings()


def read_video(
    path: str | os.PathLike[str] | bytes,
    settings: FrameSettings = _DEFAULTS,
    *,
    frame_multiple: int = 1,
    root: str | os.PathLike[str] | bytes | None = None,
) -> Frames:
    """Read the chosen frames of one video file.

    Args:
        path: A local file; bytes for names that are not UTF-8.
        settings: Which frames, how large, by which reader.
        frame_multiple: The number of frames is a multiple of this where the part holds that many (a family's
            temporal patch).
        root: A folder; nothing outside it is read, wherever links lead. None: anything.

    Returns:
        uint8 pixels [F, height, width, 3], RGB and upright; times [F] in seconds from the first frame of the
        video; the file's own facts. No frame is given twice, so a short part gives fewer than asked for. A
        file that is cut short gives frames of what is there. Frames that damage has reached are left out as
        long as `settings.min_decoded` of the chosen ones are intact; `source.flags` tell.

    Raises:
        ConfigError: `backend="decord"`, and decord is not installed; or `frame_multiple` is not positive.
        VideoNotFoundError: There is no such file, or it is a URL.
        PathDeniedError: The opened file is not below `root`.
        NotAVideoError: A folder, pipe, empty file, text, audio only, ...
        VideoDecodeError: Too few of the chosen frames can be decoded, or the codec or frame size is not
            supported.
        VideoRangeError: The part begins after the end of the video.
        VideoUnavailableError: The system cannot open or read the file now; another try may work.
        VideoChangedError: The file was changed, replaced or deleted while it was read.
        VideoError: The system refuses to open the file.
    """
    from specvlm.video.reading import read

    return read(path, settings, frame_multiple, root)
