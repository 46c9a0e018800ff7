"""The sampling rule: exact cases, and its promises over random videos."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from specvlm.config import FrameSettings
from specvlm.video.sampling import select_frames


def steady(count: int, fps: float = 30.0) -> NDArray[np.float64]:
    return np.arange(count) / fps


@pytest.mark.parametrize(
    ("times_s", "settings", "multiple", "expected"),
    [
        pytest.param(steady(120), FrameSettings(), 1, list(range(0, 120, 15)), id="2 fps unless told"),
        pytest.param(steady(120), FrameSettings(fps=1.0), 1, [0, 30, 60, 90], id="fps"),
        pytest.param(steady(120), FrameSettings(num_frames=5), 1, [0, 24, 48, 72, 96], id="num_frames"),
        pytest.param(steady(120), FrameSettings(num_frames=5), 2, [0, 30, 60, 90], id="rounded down"),
        pytest.param(steady(120), FrameSettings(num_frames=1), 2, [0, 60], id="one multiple at least"),
        pytest.param(steady(30), FrameSettings(), 1, [0, 7, 15, 22], id="min_frames"),
        pytest.param(
            steady(120), FrameSettings(min_frames=9), 2, list(range(0, 120, 12)), id="min rounded up"
        ),
        pytest.param(
            steady(120), FrameSettings(fps=10, max_frames=6), 1, [0, 20, 40, 60, 80, 100], id="max_frames"
        ),
        pytest.param(
            steady(120), FrameSettings(fps=10, max_frames=7), 2, [0, 20, 40, 60, 80, 100], id="max, multiple"
        ),
        pytest.param(steady(3), FrameSettings(), 1, [0, 1, 2], id="shorter than min_frames"),
        pytest.param(steady(3), FrameSettings(), 2, [0, 1], id="shorter, multiple"),
        pytest.param(steady(1), FrameSettings(), 2, [0], id="one frame"),
        pytest.param(steady(120), FrameSettings(num_frames=200), 1, list(range(120)), id="all there are"),
        pytest.param(steady(120), FrameSettings(start_s=1.0, end_s=3.0), 1, [30, 45, 60, 75], id="part"),
        pytest.param(
            steady(120), FrameSettings(start_s=3.0, end_s=99.0), 1, [90, 97, 105, 112], id="end past the end"
        ),
        pytest.param(steady(120), FrameSettings(start_s=1.01, end_s=1.02), 1, [30], id="inside one frame"),
        pytest.param(
            steady(120), FrameSettings(start_s=1.0, end_s=1.1), 1, [30, 31, 32], id="end is exclusive"
        ),
        pytest.param(steady(120), FrameSettings(start_s=4.0), 1, [], id="start at the end"),
        pytest.param(steady(1), FrameSettings(start_s=0.01), 1, [], id="start after the only frame"),
        pytest.param(
            np.array([0.0, 1.0, 1.1, 1.2, 3.0]), FrameSettings(num_frames=3), 1, [0, 3, 4], id="by true times"
        ),
        pytest.param(
            np.array([0.0, 3.8, 3.9, 4.0]), FrameSettings(num_frames=4), 1, [0, 1, 2, 3], id="no repeats"
        ),
    ],
)
def test_exact_choice(
    times_s: NDArray[np.float64], settings: FrameSettings, multiple: int, expected: list[int]
) -> None:
    assert select_frames(times_s, settings, multiple).tolist() == expected


@pytest.mark.parametrize("fps", [23.976, 25.0, 29.97, 30.0])
def test_times_rounded_to_milliseconds_choose_the_same_frames(fps: float) -> None:
    for count in range(1, 400, 3):
        exact = steady(count, fps)
        assert len(select_frames(np.round(exact, 3), FrameSettings())) == len(
            select_frames(exact, FrameSettings())
        )
    exact = steady(400, fps)
    for settings in (FrameSettings(), FrameSettings(num_frames=16), FrameSettings(fps=2.0, end_s=9.0)):
        in_matroska = select_frames(np.round(exact, 3), settings)
        apart = np.abs(in_matroska - select_frames(exact, settings))
        # A moment may fall within half a millisecond of the tolerance's own edge; then they are neighbours.
        assert apart.max() <= 1
        assert apart.sum() <= 1


def random_settings(rng: np.random.Generator, end_s: float) -> FrameSettings:
    by_count = bool(rng.random() < 0.5)
    start_s = float(rng.choice([0.0, rng.uniform(0, end_s)]))
    least = int(rng.integers(1, 20))
    return FrameSettings(
        fps=None if by_count else float(rng.uniform(0.1, 40)),
        num_frames=int(rng.integers(1, 60)) if by_count else None,
        min_frames=least,
        max_frames=least + int(rng.integers(0, 50)),
        start_s=start_s,
        end_s=start_s + float(rng.uniform(1e-3, 1.2 * end_s)) if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("seed", range(8))
def test_promises_hold_for_random_videos(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(150):
        gaps_s = rng.choice(
            [1 / 30, 0.002, 0.5, 4.0], size=int(rng.integers(1, 200)), p=[0.7, 0.2, 0.08, 0.02]
        )
        times_s = np.concatenate([[0.0], np.cumsum(gaps_s)])
        multiple = int(rng.integers(1, 5))
        settings = random_settings(rng, float(times_s[-1]))
        chosen = select_frames(times_s, settings, multiple)

        assert len(chosen) > 0
        assert (np.diff(chosen) > 0).all(), "sorted, and no frame twice"
        assert chosen[0] >= 0
        assert chosen[-1] < len(times_s)
        assert len(chosen) < multiple or len(chosen) % multiple == 0
        if settings.end_s is not None:
            assert times_s[chosen[-1]] < settings.end_s or len(chosen) == 1
        next_s = np.append(times_s, np.inf)[chosen[0] + 1]
        assert next_s > settings.start_s - 2e-3, "nothing that has left the screen when the part begins"
        most = settings.num_frames if settings.num_frames is not None else settings.max_frames
        assert len(chosen) <= max(most, multiple)
        assert chosen.tolist() == select_frames(times_s, settings, multiple).tolist()
