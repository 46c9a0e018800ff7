"""Stopping early on a signal: the first asks, the second insists. Knows nothing of what is being stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether and why to stop before the next video."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Ask to stop; asked again, raise KeyboardInterrupt at once."""
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request while the block runs, then give them back."""
    stop = Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
