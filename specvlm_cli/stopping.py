"""Stopping early on a signal: the first asks, the second insists. Knows nothing of what is being stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Whether and why to stop before the next video."""

    def __init__(self, when_asked: Callable[[], None]) -> None:
        self.reason: str | None = None
        self._when_asked = when_asked

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Ask to stop; asked again, raise KeyboardInterrupt at once."""
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        self._when_asked()


@contextmanager
def listening(when_asked: Callable[[], None]) -> Iterator[Stop]:
    """Turn signals into a request while the block runs, then give them back; `when_asked` is called at the first.

    SIGHUP stays ignored under nohup.
    """
    stop = Stop(when_asked)
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, stop.on_signal) for number in _SIGNALS if number not in ignored}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
