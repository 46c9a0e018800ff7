"""Stopping early, on a signal or when the time is over: the first signal asks, the second insists.

Knows nothing of what is being stopped.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_asked: list[str] = []  # the signals that have come since a block began to handle them
MAX_RUNTIME = "max-runtime"


def is_asked() -> bool:
    """Say whether a signal has asked the present command to stop."""
    return bool(_asked)


class NotBegunError(BaseException):
    """A signal asked to stop while there was nothing yet that could be stopped in order."""


def end_if_asked() -> None:
    """End what can be begun again, once a signal has asked to stop.

    Raises:
        NotBegunError: One has.
    """
    if _asked:
        raise NotBegunError("a signal")


class Stop:
    """Whether, why and since when to stop."""

    def __init__(self) -> None:
        self._tell: Callable[[], None] = lambda: None
        self._reason: str | None = None
        self._since_s = 0.0
        self._end_s: float | None = None
        self._is_at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have a signal end the block with NotBegunError: nothing in it is worth finishing."""
        end_if_asked()
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener` once stopping is asked for; at once, if it was already."""
        self._tell = listener
        if self._reason is not None:
            listener()

    def end_after(self, seconds: float) -> None:
        """Ask to stop by ourselves once this time has passed, counted from now."""
        self._end_s = time.monotonic() + seconds

    @property
    def reason(self) -> str | None:
        """Why to stop; None: continue."""
        if self._reason is None and self._end_s is not None and time.monotonic() >= self._end_s:
            self.ask(MAX_RUNTIME)
        return self._reason

    def asked_s_ago(self) -> float:
        """Return how long ago stopping was asked for."""
        return time.monotonic() - self._since_s

    def due_in_s(self) -> float | None:
        """Return in how many seconds the time will be over; None: never."""
        return None if self._end_s is None else self._end_s - time.monotonic()

    def ask(self, reason: str) -> None:
        """Ask to stop."""
        self._reason, self._since_s = reason, time.monotonic()
        self._tell()

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Ask to stop, or end a block that is to end at once; after another signal, raise KeyboardInterrupt."""
        if self._reason not in (None, MAX_RUNTIME):
            raise KeyboardInterrupt
        _asked.append(signal.Signals(number).name)
        self.ask(signal.Signals(number).name)
        if self._is_at_once:
            raise NotBegunError(signal.Signals(number).name)


@contextmanager
def until_listening() -> Iterator[None]:
    """Have a signal end the block with NotBegunError, but for the time in which somebody is `listening`.

    A manifest of millions of rows takes a while to read, and its temporary files are to be removed.
    """

    def end(number: int, _: FrameType | None) -> None:
        _asked.append(signal.Signals(number).name)
        raise NotBegunError(signal.Signals(number).name)

    try:
        with _handled(end):
            yield
    finally:
        _asked.clear()


@contextmanager
def listening() -> Iterator[Stop]:
    """Turn signals into a request while the block runs, then give them back. SIGHUP stays ignored under nohup."""
    stop = Stop()
    with _handled(stop.on_signal):
        yield stop


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handler) for number in _SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
