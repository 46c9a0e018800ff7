"""Damaged, odd and sound videos through the reading processes, at a small size of `tests/faults/videos.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import mutants, videos

_KINDS = ("h264", "h264 open gop", "h264 variable", "h264 ts", "hevc open gop", "vp9", "mpeg4 avi b")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for what is left in /proc")
def test_every_video_has_one_outcome_and_no_sound_one_is_wrong(tmp_path: Path) -> None:
    # Most of these are flipped bits, and sixty are few: the share that goes unseen scatters.
    report = videos.run(tmp_path, count=60, seed=1, kinds=_KINDS, clips=4, most_unseen=0.25)
    assert report.violations == []
    counts = report.counts
    assert sum(counts[group].files for group in mutants.DAMAGES if group in counts) > 40
    assert (counts["sound"].read, counts["stream-copied"].read) == (2 * len(_KINDS), 5 * 4)
    assert counts["odd"].files > 90
    assert sum(count.failed for count in counts.values()) > 80
    assert sum(count.flags["damaged"] for count in counts.values()) > 10
