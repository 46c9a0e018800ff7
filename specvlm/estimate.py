"""What plain decoding would have taken, from a few plain steps timed after a caption is done, on its own caches.

Steps are cheap but not free: together they take at most a set share of the captioning time. Knows no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

SHARE = 0.025  # of captioning time may go into plain steps
MOST_STEPS = 8  # of one caption
WARM_UP = 1  # steps that come first and do not count: what ran before them has left the caches to itself
FEWEST_STEPS = WARM_UP + 2
ENOUGH_STEPS = 5  # timed on one caption, to need no other's
_SIMILAR = 1.25  # caches whose lengths differ by no more than this factor
_RECENT = 64


class PlainEstimate:
    """Steps of recent captions, and how many the next caption may afford."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens in the cache, seconds
        self._credit_s = 0.0

    def affordable(self, caption_s: float) -> int:
        """Steps to run after a caption that took so long, the warm-up included; call it once for each."""
        self._credit_s += SHARE * caption_s
        if not self._steps:
            return FEWEST_STEPS
        count = int(self._credit_s / median(seconds for _, seconds in self._steps))
        return 0 if count < FEWEST_STEPS else min(count, MOST_STEPS)

    def token_s(self, length: int, steps: Sequence[float]) -> float | None:
        """Seconds of a plain step on a cache of `length` tokens; None: not known.

        Args:
            length: Of this caption's cache.
            steps: Seconds of all steps that were run on it. Where few or none were, recent ones on caches of about
                this length count too.
        """
        self._credit_s -= sum(steps)
        timed = steps[WARM_UP:]
        self._steps.extend((length, seconds) for seconds in timed)
        if len(timed) >= ENOUGH_STEPS:
            return median(timed)
        alike = [s for n, s in self._steps if n <= length * _SIMILAR and length <= n * _SIMILAR]
        return median(alike[-_RECENT // 4 :]) if alike else None
