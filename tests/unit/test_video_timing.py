"""Times from a decoder's stamps: FFmpeg's rule, clocks that begin again, and what has no stamp."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from specvlm.video.timing import Stamp, best_effort, frame_times

_TICK_S = 1 / 1000


def _times(stamps: Sequence[int | None], *, jumps: bool = True, usual_s: float = 0.04) -> list[float]:
    frames = [Stamp(stamp, None, 0) for stamp in stamps]
    return [round(float(time), 6) for time in frame_times(frames, _TICK_S, usual_s, jumps=jumps)]


@pytest.mark.parametrize(
    ("stamps", "times_s"),
    [
        ([0, 40, 80], [0, 0.04, 0.08]),
        ([5000, 5040, 5200], [0, 0.04, 0.2]),
        ([0, 80, 160, 0, 80, 160], [0, 0.08, 0.16, 0.24, 0.32, 0.4]),  # begins again
        ([9000, 9040, 1000, 1040], [0, 0.04, 0.08, 0.12]),  # backwards
        ([0, 200, 400, 250, 450], [0, 0.2, 0.4, 0.6, 0.8]),  # overlapping
        ([0, 40, 30, 80, 120, 110], [0, 0.04, 0.041, 0.08, 0.12, 0.121]),  # a clock that shivers
        ([0, 0, 0, 9, 9, 9], [0, 0.04, 0.08, 0.12, 0.16, 0.2]),  # a clock that stands still
        ([0, 200, 0, 200, 0, 200], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),  # three parts
        ([0, 40, 60_000, 60_040], [0, 0.04, 0.08, 0.12]),  # much later
        ([0, 40, 4000, 4040], [0, 0.04, 4, 4.04]),  # a pause
        ([None, None, None], [0, 0.04, 0.08]),
        ([70, None, None], [0, 0.04, 0.08]),
        ([None, None, 500, 533, 566], [0, 0.033, 0.066, 0.099, 0.132]),
        ([0, None, None, 90, None, None], [0, 0.03, 0.06, 0.09, 0.12, 0.15]),
        ([0, 120, None, 0, None, 240], [0, 0.12, 0.24, 0.36, 0.48, 0.6]),
        ([0], [0]),
        ([None], [0]),
    ],
)
def test_times(stamps: list[int | None], times_s: list[float]) -> None:
    assert _times(stamps) == pytest.approx(times_s)


def test_only_some_clocks_jump() -> None:
    assert _times([0, 40, 60_000], jumps=False) == [0, 0.04, 60]


def test_times_always_increase() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        stamps = [None if rng.random() < 0.3 else int(rng.integers(-(10**6), 10**6)) for _ in range(30)]
        assert (np.diff(_times(stamps, jumps=bool(rng.integers(2)))) > 0).all()


def test_the_stamp_that_goes_wrong_less_often() -> None:
    sound = [Stamp(pts, dts, 0) for pts, dts in ((2, 0), (3, 1), (4, 2))]
    assert best_effort(sound) == [2, 3, 4]
    reordered = [Stamp(pts, dts, 0) for pts, dts in ((2, 0), (1, 1), (0, 2), (3, 3))]
    assert best_effort(reordered) == [2, 1, 2, 3]
    assert best_effort([Stamp(None, 7, 0), Stamp(9, None, 0), Stamp(None, None, 0)]) == [7, 9, None]
