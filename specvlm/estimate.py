"""What plain decoding would have taken, from a few plain steps timed after a caption is done, on its own caches.

Steps are cheap but not free: together they take at most a set share of the captioning time. Knows no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

SHARE = 0.025  # of captioning time may go into plain steps
MOST_STEPS = 8  # of one caption
ENOUGH_STEPS = 5  # of one caption, to need no other's
_SIMILAR = 1.25  # caches whose lengths differ by no more than this factor
_RECENT = 64


class PlainEstimate:
    """Steps of recent captions, and how many the next caption may afford."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens in the cache, seconds
        self._credit_s = 0.0

    def affordable(self, caption_s: float) -> int:
        """Steps to time after a caption that took so long; call it once for each."""
        self._credit_s += SHARE * caption_s
        if not self._steps:
            return 1
        return min(int(self._credit_s / median(seconds for _, seconds in self._steps)), MOST_STEPS)

    def token_s(self, length: int, steps: Sequence[float]) -> float | None:
        """Seconds of a plain step on a cache of `length` tokens; None: not known.

        Args:
            length: Of this caption's cache.
            steps: Seconds of the steps that were timed on it. Where they are few, recent ones on caches of about
                this length count too.
        """
        self._credit_s -= sum(steps)
        self._steps.extend((length, seconds) for seconds in steps)
        if len(steps) >= ENOUGH_STEPS:
            return median(steps)
        alike = [s for n, s in self._steps if n <= length * _SIMILAR and length <= n * _SIMILAR]
        return median(alike[-_RECENT // 4 :]) if alike else None
