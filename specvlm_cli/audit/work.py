"""The rows of a sample in turn: their videos read again, stock's captions made, verdicts kept.

Files that are gone or changed are found before the model is loaded; with nothing else to do it is not loaded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from specvlm.errors import ConfigError
from specvlm_cli.audit.comparing import Outcome, RowInputs, RowVerdict, compare
from specvlm_cli.audit.made_with import How, MadeWith
from specvlm_cli.audit.rows import RunRows
from specvlm_cli.audit.sample import RowPlace
from specvlm_cli.audit.verdicts import Verdicts, digest_of
from specvlm_cli.caption import engine
from specvlm_cli.console.safe_text import clean, path_bytes
from specvlm_cli.exits import FatalError
from specvlm_cli.readers import DecodingPool, ReadFailure, ReadJob
from specvlm_cli.run.ledger import NO_FILE, FileStamp
from specvlm_cli.run.stored_rows import Row
from specvlm_cli.stopping import NotBegunError, Stop
from specvlm_cli.training.frames import ReadLimits, TrainingReader
from specvlm_cli.workers.messages import REDUCED

if TYPE_CHECKING:
    from specvlm.bench.reference import Reference, StockCaption
    from specvlm.records import Frames

Tick = Callable[[int, int, int], None]  # (looked at, chosen, not equal)

_READERS = 2
_MOST_FAILED = 5  # captions in a row on which `generate()` fails, before it is taken to fail on all
_NOT_FOUND = "VideoNotFoundError"


class _StoppedError(Exception):
    """A signal has asked to stop."""


class _Video(NamedTuple):
    """A video with those of its rows that are to be compared."""

    rows: list[tuple[RowPlace, Row]]
    job: ReadJob | ReadFailure


@dataclass(slots=True)
class Work:
    """An audit under way.

    Attributes:
        outcomes: What is known of the chosen rows, from before or from now.
        passing: Verdicts of this start that the next one may find otherwise; the others are on disk.
        made_now: How many verdicts are of this start.
    """

    made_with: MadeWith
    how: How
    chosen: Sequence[RowPlace]
    rows: RunRows
    verdicts: Verdicts
    stop: Stop
    tick: Tick
    outcomes: dict[RowPlace, Outcome] = field(default_factory=dict)
    passing: dict[RowPlace, RowVerdict] = field(default_factory=dict)
    made_now: int = 0
    _odd: int = 0  # that are not equal
    _failed_in_a_row: int = 0

    def do(self) -> None:
        """Look at all chosen rows that no verdict settles; after a signal, what is not looked at is left.

        Raises:
            UsageError: The target is not that of the rows any more.
            FatalError: The target cannot be loaded, or `generate()` fails on every row.
        """
        with suppress(_StoppedError), ExitStack() as held:
            todo = [place for place, row in self.rows.all_of(self.chosen) if not self._is_settled(place, row)]
            if todo:
                self._compare_all(todo, held)

    def verdict(self, place: RowPlace) -> RowVerdict | None:
        """Return the verdict on a row that was looked at."""
        return self.passing.get(place) or self.verdicts.get(place)

    def _is_settled(self, place: RowPlace, row: Row) -> bool:
        """Take note of a row that was compared before, or that cannot be compared."""
        self._check()
        known = self.verdicts.get(place, digest_of(row, place, self.made_with))
        if known is not None:
            self._note(place, known)
            return True
        if (verdict := _of_file(path_bytes(row["path"]), place.stamp)) is not None:
            self._settle(place, row, verdict)
            return True
        return False

    def _compare_all(self, todo: Sequence[RowPlace], held: ExitStack) -> None:
        try:
            with self.stop.at_once():
                stock = open_stock(self.made_with, self.how)
        except NotBegunError:
            raise _StoppedError from None
        pool = held.enter_context(DecodingPool(_READERS, self.how.limits))
        reader = TrainingReader(pool, ReadLimits(_READERS), self._check)
        like = ReadJob(0, b"", self.made_with.frames, stock.captioner.frame_multiple)
        announced: deque[_Video] = deque()
        reader.begin(_announce(self._videos(todo, like), announced))
        while reader.ready() or announced:  # asking what is ready reads ahead
            video = announced.popleft()
            read = video.job if isinstance(video.job, ReadFailure) else reader.take(video.job.key)
            for place, row in video.rows:
                self._settle(place, row, self._verdict(place, row, read, stock))

    def _videos(self, todo: Sequence[RowPlace], like: ReadJob) -> Iterator[_Video]:
        """Yield videos with their rows as they are now; `like`: how videos are read."""
        for number, (_, group) in enumerate(groupby(todo, key=lambda place: place[:2])):
            if rows := self.rows.of(list(group)):
                row = rows[0][1]
                job = like.for_video(number, path_bytes(row["path"]), row.get("start"), row.get("end"))
                yield _Video(rows, job)

    def _verdict(self, place: RowPlace, row: Row, read: Frames | ReadFailure, stock: Reference) -> RowVerdict:
        if isinstance(read, ReadFailure):
            outcome: Outcome = "missing" if read.error_type == _NOT_FOUND else "unreadable"
            return RowVerdict(outcome, error=clean(f"{read.error} ({read.error_type})"))
        source = read.source
        if source is not None and _is_other(place.stamp, FileStamp(source.size_bytes, source.mtime_ns)):
            return _CHANGED
        prompt = row.get("prompt")
        if prompt is None:
            return _NO_PROMPT
        frames = _as_captioned(read, row)
        try:
            made = stock.caption(frames, prompt, lambda: self.stop.reason is not None)
        except ConfigError:
            raise  # every other row would fail in the same way
        except Exception as error:
            self._check()
            return self._failed(error)
        self._check()  # a caption that a signal cut short is none
        self._failed_in_a_row = 0
        return self._compared(place, row, frames, made, stock)

    def _compared(
        self, place: RowPlace, row: Row, frames: Frames, made: StockCaption, stock: Reference
    ) -> RowVerdict:
        revision = stock.captioner.info.target_revision
        asked = RowInputs(self.made_with, revision, self._prompt(place), frames.times_s.tolist())
        return compare(row, made, asked, stock.captioner.detokenize)

    def _prompt(self, place: RowPlace) -> str | None:
        """Return the run's prompt of a row; None: its video has its own.

        A ledger that was rebuilt from parts knows no prompts of videos, and no stamps of files either.
        """
        prompts = self.made_with.prompts
        if place.own_prompts or place.stamp == NO_FILE or place.prompt_index >= len(prompts):
            return None
        return prompts[place.prompt_index]

    def _failed(self, error: Exception) -> RowVerdict:
        reason = clean(" ".join(f"{type(error).__name__}: {error}".split()))[:1000]
        self._failed_in_a_row += 1
        if self._failed_in_a_row == _MOST_FAILED:
            raise FatalError(
                f"stock generate() failed on {_MOST_FAILED} captions in a row (last: {reason}); fix the cause, "
                "or give another --device-map, and start again: the audit resumes"
            ) from error
        return RowVerdict("failed", error=reason)

    def _settle(self, place: RowPlace, row: Row, verdict: RowVerdict) -> None:
        if verdict.is_final:
            self.verdicts.add(place, digest_of(row, place, self.made_with), verdict)
        else:
            self.passing[place] = verdict
        self.made_now += 1
        self._note(place, verdict)

    def _note(self, place: RowPlace, verdict: RowVerdict) -> None:
        self.outcomes[place] = verdict.outcome
        self._odd += verdict.outcome != "equal"
        self.tick(len(self.outcomes), len(self.chosen), self._odd)

    def _check(self) -> None:
        if self.stop.reason is not None:
            raise _StoppedError


def _announce(videos: Iterator[_Video], announced: deque[_Video]) -> Iterator[ReadJob]:
    """Yield the jobs of videos as they are to be read; each video is kept, with its rows of that moment."""
    for video in videos:
        announced.append(video)
        if isinstance(video.job, ReadJob):
            yield video.job


_NO_PROMPT = RowVerdict("different", ("prompt",), error="the row holds no prompt")
_CHANGED = RowVerdict("changed", error="its size or time is not that of the file that was captioned")


def open_stock(made_with: MadeWith, how: How) -> Reference:
    """Load the target of the rows alone, to run stock `generate()` on it. Here torch is imported.

    Raises:
        UsageError: It is not that of the rows any more, or this machine has no such device.
        SpecvlmError: It cannot be loaded.
    """
    import torch

    from specvlm.bench.reference import Reference

    models = made_with.models(how, has_cuda=torch.cuda.is_available())
    captioner = engine.load_captioner(models, quiet=how.quiet)
    made_with.require_same(engine.resolved(captioner))
    return Reference(captioner, made_with.generation, made_with.system)


def _of_file(path: bytes, stamp: FileStamp) -> RowVerdict | None:
    """Return why a file cannot be compared, without reading it; None: it may be the one that was captioned."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return RowVerdict("missing", error="no such file")
    except (OSError, ValueError) as error:
        return RowVerdict("unreadable", error=clean(str(getattr(error, "strerror", None) or error)))
    return _CHANGED if _is_other(stamp, FileStamp(found.st_size, found.st_mtime_ns)) else None


def _is_other(then: FileStamp, now: FileStamp) -> bool:
    """Say whether a file is another one than before, as far as both are known."""
    return any(None not in pair and pair[0] != pair[1] for pair in zip(then, now, strict=True))


def _as_captioned(frames: Frames, row: Row) -> Frames:
    """Leave out the frames that a run left out for want of memory."""
    if REDUCED not in (row.get("flags") or []):
        return frames
    used = set(row.get("frame_times_s") or [])
    kept = [number for number, time_s in enumerate(frames.times_s.tolist()) if time_s in used]
    return frames._replace(pixels=frames.pixels[kept], times_s=frames.times_s[kept]) if kept else frames
