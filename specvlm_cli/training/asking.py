"""How the target is asked about a video, and by whom: what lessons and exams have in common. Reads nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from specvlm.captioner import Captioner
from specvlm_cli.caption.settings import CaptionSettings, Plain
from specvlm_cli.readers import ReadFailure, ReadJob
from specvlm_cli.training.captions import LeftOut
from specvlm_cli.training.samples import TrainingVideo


class SampleListener(Protocol):
    """Receives what happens to samples."""

    def left_out(self, left: LeftOut) -> None: ...

    def captioned(self, name: str, text: str) -> None: ...

    def measured(self, videos: int, of: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Asking:
    """How the target is asked.

    Attributes:
        captions: What captions depend on, and how they are made.
        settings: All that the text depends on besides frames and prompt, for the key of a caption.
        read: A job that says how videos are read.
        unroll: Passes of the head, for the memory that it takes.
    """

    captions: CaptionSettings
    settings: Plain
    read: ReadJob
    unroll: int = 0

    def job(self, key: int, video: TrainingVideo) -> ReadJob | ReadFailure:
        """Return what reads a video, or why it cannot be read."""
        return self.read.for_video(key, video.path, video.start_s, video.end_s)


class Captioners(NamedTuple):
    """Who decodes."""

    teacher: Captioner  # the target with its draft, or without
    pupil: Captioner  # the target with the head in use
