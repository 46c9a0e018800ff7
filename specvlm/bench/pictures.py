"""A picture for the page of a bench: what the draft was given of one clip. Measures nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from specvlm.bench.clips import Clip
from specvlm.bench.page import PageSheet
from specvlm.bench.records import BenchReport, Configuration
from specvlm.config import SpeculationSettings
from specvlm.records import Frames

if TYPE_CHECKING:
    from specvlm.captioner import Captioner


def sheets_of(captioner: Captioner, report: BenchReport, clips: Sequence[Clip]) -> tuple[PageSheet, ...]:
    """Draw one sheet: the first clip that was captioned, with the strongest pruning that ran.

    Returns:
        The sheet; none where nothing was pruned.

    Raises:
        SpecvlmError: The clip gives no frames any more.
    """
    pruned = [one.configuration for one in report.summaries if one.videos and one.configuration.prune_ratio]
    captioned = [clip for clip in clips if clip.name in report.conditions.videos]
    if not pruned or not captioned:
        return ()
    how = max(pruned, key=lambda one: one.prune_ratio or 0.0)
    return (_sheet(captioner, report, captioned[0], how),)


def _sheet(captioner: Captioner, report: BenchReport, clip: Clip, how: Configuration) -> PageSheet:
    from specvlm.inspection import look
    from specvlm.inspection.sheet import SheetText, draw_sheet

    prompt = clip.prompt or report.conditions.prompt
    settings = SpeculationSettings(pruner=how.pruner or "none", prune_ratio=how.prune_ratio or 0.0)
    found = look(captioner, _frames(captioner, clip, how.frames_asked), prompt, settings)
    png = io.BytesIO()
    draw_sheet(found, SheetText(clip.name, report.conditions.target, prompt)).save(png, "PNG")
    return PageSheet(f"What the draft saw of {clip.name}", png.getvalue())


def _frames(captioner: Captioner, clip: Clip, num_frames: int | None) -> Frames:
    from specvlm.video import read_video

    if isinstance(clip.video, Frames):
        return clip.video
    settings = clip.frame_settings(captioner.frames, num_frames)
    return read_video(clip.video, settings, frame_multiple=captioner.frame_multiple)
