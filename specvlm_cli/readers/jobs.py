"""What is asked of the reading processes, within which limits, and what it is when they give no frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from specvlm.config import FrameSettings
from specvlm.errors import ConfigError
from specvlm_cli.caption.failure import BAD_INPUT

_BYTES_PER_S = 5e6  # of a file that is decoded whole
MOST_EXTRA_S = 3600.0
DEFAULT_READER = "specvlm.video.reading:read"


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading one video may take.

    Attributes:
        timeout_s: Wall time of one attempt, for a small file; see `extra_s`.
        cpu_s: Processor time of one attempt, in all its threads; None: twice its wall time.
        address_space_bytes: Memory that its process may map, the frames and the libraries included.
        frames_bytes: Frames of one video; no file that its process writes can be larger either.
    """

    timeout_s: float = 60.0
    cpu_s: float | None = None
    address_space_bytes: int = 4 << 30
    frames_bytes: int = 2 << 30

    def extra_s(self, size_bytes: int) -> float:
        """Return the wall time that a file of this size may take beyond `timeout_s`."""
        return min(size_bytes / _BYTES_PER_S, MOST_EXTRA_S)

    def whole_cpu_s(self, extra_s: float = 0.0) -> int:
        """Return the limit on processor time as the kernel takes it."""
        return max(1, math.ceil(2 * (self.timeout_s + extra_s) if self.cpu_s is None else self.cpu_s))


@dataclass(frozen=True, slots=True)
class ReadJob:
    """One video to read.

    Attributes:
        key: Comes back with the outcome.
        path: The file.
        settings: Which frames, how large, by which reader.
        frame_multiple: The number of frames is a multiple of this where the part holds that many.
        root: Nothing outside this folder is read; None: anything.
    """

    key: int
    path: bytes
    settings: FrameSettings
    frame_multiple: int
    root: bytes | None = None

    def for_video(
        self, key: int, path: bytes, start_s: float | None, end_s: float | None
    ) -> ReadJob | ReadFailure:
        """Return the job that reads a part of another video in the same way; a failure if there is no such part."""
        settings = self.settings
        try:
            if start_s is not None or end_s is not None:
                settings = replace(settings, start_s=start_s or 0.0, end_s=end_s)
        except ConfigError as error:
            return ReadFailure(key, "open", BAD_INPUT, str(error), transient=False)
        return replace(self, key=key, path=path, settings=settings)


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """Why a video gives no frames.

    Attributes:
        key: The job's.
        stage: `"open"` (the file) or `"decode"` (its frames).
        error_type: Name of the library's exception, or `DecodeTimeout`, `DecoderCrashed`, `DecoderOutOfMemory`,
            `DecoderMisreported` (what its process said made no sense).
        error: One line, without the path.
        transient: Another try may work.
    """

    key: int
    stage: str
    error_type: str
    error: str
    transient: bool
