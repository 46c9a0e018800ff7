"""How far a run is: counts, videos per hour, tokens per second, time left, speedup so far. Knows no terminal.

Counts begin with what earlier starts did; rates and all other figures are of this start alone. The work reports what
ends, another thread asks how things stand. Neither takes longer the more there is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import fsdecode
from typing import NamedTuple

from specvlm.words import amount
from specvlm_cli.caption.outcome import LiveStatus, PlainSpeedup, Running, Tally
from specvlm_cli.console.words import between, duration, over_plain, per_hour, per_s
from specvlm_cli.run.ledger import Claim, Failure, Row

WINDOW_S = 120.0
FEWEST = 20  # videos in the window, however long they take
ENOUGH = 5  # videos after which the time left is more than a guess


class Last(NamedTuple):
    """The newest caption, as the model wrote it."""

    name: str
    caption: str


class Ended(NamedTuple):
    """What came to an end up to some moment."""

    videos: int = 0  # with captions or not
    captioned: int = 0
    tokens: int = 0


class Before(NamedTuple):
    """Videos that were done, or had failed, before this start."""

    done: int = 0
    failed: int = 0


class _Mark(NamedTuple):
    at_s: float
    ended: Ended


class Rates(NamedTuple):
    """How fast things come to an end."""

    each_s: float | None = None  # from the end of one video to the end of the next; None: none has ended
    videos_per_hour: float | None = None  # of those that got their captions; None: none did
    tokens_per_s: float | None = None  # of their captions


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a start is at one moment.

    Attributes:
        todo: Videos to work on.
        captioned: Of those, how many have a caption now.
        failed: Of those, how many have failed.
        before: What earlier starts did of the same inputs, and is left as it is.
        elapsed_s: Time since the work began.
        rates: How fast it goes, lately.
        running: Speedup and accepted tokens so far.
        kinds: Failures by kind, the most frequent first.
        status: What is going on; None if unknown.
        last: The newest caption.
    """

    todo: int
    captioned: int = 0
    failed: int = 0
    before: Before = Before()  # noqa: RUF009  immutable
    elapsed_s: float = 0.0
    rates: Rates = field(default_factory=Rates)
    running: Running = field(default_factory=Running)
    kinds: tuple[tuple[str, int], ...] = ()
    status: LiveStatus | None = None
    last: Last | None = None

    @property
    def ended(self) -> int:
        """Videos that this start is done with."""
        return self.captioned + self.failed

    @property
    def shown(self) -> tuple[int, int]:
        """Videos that this start and earlier ones are done with, and how many that will be in the end."""
        before = self.before.done + self.before.failed
        return before + self.ended, before + self.todo


class PaceMeter:
    """How fast videos end: over two minutes, or over the last twenty where those took longer."""

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._latest = _Mark(now_s, Ended())
        self._marks = deque([self._latest])  # at most one a second

    def ended(self, now_s: float, ended: Ended) -> None:
        """Take note of what has ended by now."""
        self._latest = _Mark(now_s, ended)
        if now_s - self._marks[-1].at_s >= 1.0:
            self._marks.append(self._latest)
        while len(self._marks) > 1 and self._is_enough_from(self._marks[1]):
            self._marks.popleft()

    def _is_enough_from(self, mark: _Mark) -> bool:
        videos = self._latest.ended.videos - mark.ended.videos
        return self._latest.at_s - mark.at_s >= WINDOW_S and videos >= FEWEST

    def rates(self, now_s: float) -> Rates:
        """Return how fast videos end.

        Between two videos it is what it was at the end of the last one, until the next one takes longer than
        the others did. So it shows a run that stands still, and does not sway in one that does not.
        """
        first = self._marks[0]
        videos = self._latest.ended.videos - first.ended.videos
        if not videos:
            return Rates()
        each_s = max((self._latest.at_s - first.at_s) / videos, (now_s - first.at_s) / (videos + 1))
        return _rates(first.ended, self._latest.ended, each_s * videos)

    def overall(self) -> Rates:
        """Return how fast videos ended from the beginning to the end of the last one."""
        return _rates(Ended(), self._latest.ended, self._latest.at_s - self._began_s)


def _rates(first: Ended, last: Ended, seconds: float) -> Rates:
    videos, captioned, tokens = (after - before for before, after in zip(first, last, strict=True))
    if not videos or seconds <= 0.0:
        return Rates()
    return Rates(
        seconds / videos,
        3600.0 * captioned / seconds if captioned else None,
        tokens / seconds if tokens else None,
    )


class Meter:
    """Counts what ends, and says how things stand."""

    def __init__(
        self, todo: int, clock: Callable[[], float] = time.monotonic, before: tuple[int, int] = (0, 0)
    ) -> None:
        """`before`: videos that were done, and that had failed, before this start."""
        self._clock = clock
        self._before = Before(*before)
        self._lock = threading.RLock()  # a signal may come while it is held
        self._todo = todo
        self._captioned = 0
        self._failed = 0
        self._tally = Tally()
        self._status: LiveStatus | None = None
        self._last: Last | None = None
        self._started_s = clock()
        self._stopped_s: float | None = None
        self._pace = PaceMeter(self._started_s)

    def captioned(self, claim: Claim, rows: Sequence[Row]) -> None:
        """Count one video that has its captions."""
        with self._lock:
            self._captioned += 1
            for row in rows:
                self._tally.add(row)
            if rows:
                self._last = Last(name_of(claim), rows[-1]["caption"])
            self._video_ended()

    def failed(self, failure: Failure) -> None:
        """Count one video that failed."""
        with self._lock:
            self._failed += 1
            self._tally.fail(failure)
            self._video_ended()

    def _video_ended(self) -> None:
        videos = self._captioned + self._failed
        self._pace.ended(self._clock(), Ended(videos, self._captioned, self._tally.tokens))

    def state(self, status: LiveStatus) -> None:
        """Take note of what is going on."""
        self._status = status

    def stop(self) -> None:
        """Say that the work is over: time stands still, and pace is of all the time that it took."""
        self._status, self._stopped_s = None, self._clock()

    def standing(self) -> Standing:
        """Return how things stand now."""
        with self._lock:
            now_s = self._clock() if self._stopped_s is None else self._stopped_s
            is_over = self._stopped_s is not None
            return Standing(
                todo=self._todo,
                captioned=self._captioned,
                failed=self._failed,
                before=self._before,
                elapsed_s=now_s - self._started_s,
                rates=self._pace.overall() if is_over else self._pace.rates(now_s),
                running=self._tally.running(),
                kinds=tuple(self._tally.failures.most_common()),
                status=self._status,
                last=self._last,
            )


def name_of(claim: Claim) -> str:
    """Return the name of a video's file, or the id of a manifest's row that names none."""
    return fsdecode(claim.item.path.rpartition(b"/")[2]) or claim.item.id


def line(standing: Standing) -> str:
    """Return counts, rates, time left, speedup and state as one line."""
    return " · ".join([*progress(standing), *speed(standing), *state(standing)])


def progress(standing: Standing) -> list[str]:
    """Return how many of how many, how fast, and how long still."""
    ended, todo = standing.shown
    parts = [f"{ended}/{todo}", f"{standing.before.failed + standing.failed} failed"]
    each_s, videos_per_hour, tokens_per_s = standing.rates
    if each_s is None:
        return [*parts, "time left not known yet"] if standing.todo else parts
    if videos_per_hour is not None:
        parts.append(per_hour(videos_per_hour))
    if tokens_per_s is not None:
        parts.append(per_s(tokens_per_s))
    if standing.ended >= standing.todo:
        return parts
    about = "" if standing.ended >= ENOUGH else "about "
    return [*parts, f"{about}{duration(each_s * (standing.todo - standing.ended))} left"]


def speed(standing: Standing) -> list[str]:
    """Return the speedups so far, against what, and what goes into them."""
    running, parts = standing.running, []
    for name, speedup in (("decode", running.decode), ("end to end", running.end_to_end)):
        if speedup is not None:
            parts.append(f"{name} {_ratio(speedup, running.estimated)}")
    known = running.decode or running.end_to_end
    if known is not None:
        estimated = "estimated " if running.estimated else ""
        parts.append(f"{estimated}{over_plain(known.mean_batch_size)}")
    if running.accepted is not None:
        parts.append(f"{running.accepted:.2f} accepted/round")
    return parts


def _ratio(speedup: PlainSpeedup, estimated: bool) -> str:
    return between(*speedup.between) if estimated else f"{speedup.of_totals:.2f}x"


def state(standing: Standing) -> list[str]:
    """Return what is going on."""
    status = standing.status
    if status is None:
        return []
    of = f" of {status.workers}" if status.workers > 1 else ""
    frames = f" ({amount(status.ready_bytes)})" if status.ready else ""
    parts = [
        f"reading {status.reading}",
        f"ready {status.ready}{frames}",
        f"generating {status.generating}{of}",
    ]
    return [*parts, f"{status.retrying} to try again"] if status.retrying else parts
