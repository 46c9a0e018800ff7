"""All methods on the same videos, in one process, in turn; and what of it is a report.

Of each video, one turn warms up and is not kept, and each further turn begins with the next method, so that no
method always runs first, or always after the same one. One video is in memory at a time; in batches all of them are,
and a turn takes all of them. Knows neither files of results nor a terminal; events go to a listener.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from specvlm.bench.batches import SetMeasurer, SetVideo
from specvlm.bench.clips import Clip
from specvlm.bench.grid import Grid
from specvlm.bench.measure import BenchRequest, Measurer, MethodError, conditions, facts_of
from specvlm.bench.records import BenchReport, Conditions, Configuration, Left, TimedCaption
from specvlm.bench.summing import summarise
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import FrameSettings
from specvlm.drafts.head import HeadDraft
from specvlm.errors import ConfigError, PreprocessError, VideoError
from specvlm.records import Frames
from specvlm.video import read_video


class BenchStep(NamedTuple):
    """How far a bench is, before a caption is made."""

    done: int
    total: int
    what: str


class BenchListener(Protocol):
    """Receives events of a bench."""

    def step(self, step: BenchStep) -> None:
        """A caption is about to be made."""

    def left_out(self, left: Left) -> None:
        """A video could not be read, or not be preprocessed."""

    def failed(self, how: Configuration, error: str) -> None:
        """A method failed, and is left out from here on."""


class Measuring(Protocol):
    """What times one caption; `Measurer` is the real one."""

    def measure(self, how: Configuration, video: Any, name: str, turn: int) -> TimedCaption:
        """See `Measurer.measure`."""


class MeasuringSets(Protocol):
    """What times a set of videos; `SetMeasurer` is the real one."""

    def measure_set(self, how: Configuration, videos: Sequence[SetVideo], turn: int) -> list[TimedCaption]:
        """See `SetMeasurer.measure_set`."""


@dataclass
class Measurements:
    """What has been measured so far."""

    samples: list[TimedCaption] = field(default_factory=list)
    errors: dict[Configuration, str] = field(default_factory=dict)
    left_out: dict[str, Left] = field(default_factory=dict)


class StoppedError(KeyboardInterrupt):
    """A bench was interrupted; `report` has what was measured until then, and is marked as stopped."""

    def __init__(self, report: BenchReport) -> None:
        super().__init__()
        self.report = report


class Budget:
    """Time for a quick check: once it is spent, no further video is begun."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins now; None: no end."""
        self._clock, self._end_s = clock, None if seconds is None else clock() + seconds

    def is_spent(self) -> bool:
        return self._end_s is not None and self._clock() > self._end_s


_ENDLESS = Budget(None)


class _Running:
    """What benches of single videos and of sets have in common: what is measured, what failed, how far they are."""

    def __init__(
        self, grid: Grid, captions: int, repeat: int, listener: BenchListener, budget: Budget
    ) -> None:
        """`captions`: of one turn of a configuration."""
        self._grid, self._repeat, self._listener, self._budget = grid, repeat, listener, budget
        self._found = Measurements()
        self._done: Counter[Configuration] = Counter()  # captions, those of videos that were left out too
        self._of_each = captions * (repeat + 1)
        self._total = len(grid.all()) * self._of_each

    @property
    def found(self) -> Measurements:
        """What has been measured so far."""
        return self._found

    def _leave_out(self, left: Left) -> None:
        if left.video not in self._found.left_out:
            self._found.left_out[left.video] = left
            self._listener.left_out(left)

    def _attempt(
        self,
        how: Configuration,
        turn: int,
        what: str,
        captions: int,
        measure: Callable[[], TimedCaption | list[TimedCaption]],
    ) -> None:
        """Have a configuration make so many captions, unless it failed before."""
        if how in self._found.errors:
            return
        self._listener.step(BenchStep(self._done.total(), self._total, what))
        try:
            made = measure()
        except MethodError as error:
            self._found.errors[how] = str(error)
            self._total -= self._of_each - self._done[how]  # its others will not be made
            self._listener.failed(how, str(error))
            return
        self._done[how] += captions
        if turn:
            self._found.samples += made if isinstance(made, list) else [made]


class Suite(_Running):
    """A bench that is ready to run."""

    def __init__(
        self,
        grid: Grid,
        clips: Sequence[Clip],
        repeat: int,
        prepare: Callable[[Clip, int | None], PreparedVideo],
        measurer: Measuring,
        listener: BenchListener,
        budget: Budget = _ENDLESS,
    ) -> None:
        """`prepare` reads and preprocesses a clip; `repeat` timed turns follow one of warm-up."""
        super().__init__(grid, len(clips), repeat, listener, budget)
        self._clips, self._prepare, self._measurer = clips, prepare, measurer

    def run(self) -> Measurements:
        """Measure everything."""
        for num_frames in dict.fromkeys(self._grid.num_frames):
            configurations = self._grid.configurations(num_frames)
            for clip, video in self._prepared(num_frames, configurations):
                for turn in range(self._repeat + 1):
                    self._turn(rotated(configurations, turn), video, clip.name, turn)
        return self._found

    def _prepared(
        self, num_frames: int | None, configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Clip, PreparedVideo]]:
        """Yield the clips that can be read; the first is read once before, since first use costs more."""
        is_warm = False
        for clip in self._clips:
            if self._found.samples and self._budget.is_spent():
                return
            try:
                if not is_warm:
                    self._prepare(clip, num_frames)
                    is_warm = True
                yield clip, self._prepare(clip, num_frames)
            except (VideoError, PreprocessError) as error:
                self._leave_out(Left(clip.name, str(error)))
                going_on = [how for how in configurations if how not in self._found.errors]
                self._done.update(dict.fromkeys(going_on, self._repeat + 1))

    def _turn(self, order: Sequence[Configuration], video: PreparedVideo, name: str, turn: int) -> None:
        several = len(set(self._grid.num_frames)) > 1
        what = f"{name}, {video.num_frames} frames" if several else name
        for how in order:
            measure = partial(self._measurer.measure, how, video, name, turn)
            self._attempt(how, turn, f"{what}, {how.label}", 1, measure)


class SetSuite(_Running):
    """A bench of batches that is ready to run: each turn takes the whole set of videos with every configuration."""

    def __init__(
        self,
        grid: Grid,
        clips: Sequence[Clip],
        repeat: int,
        read: Callable[[Clip, int | None], SetVideo],
        measurer: MeasuringSets,
        listener: BenchListener,
        budget: Budget = _ENDLESS,
    ) -> None:
        """`read` reads a clip and sees whether it can be preprocessed; `repeat` timed turns follow one of warm-up."""
        self._captions = max(len(clips), *grid.batch_sizes)
        super().__init__(grid, self._captions, repeat, listener, budget)
        self._clips, self._read, self._measurer = clips, read, measurer

    def run(self) -> Measurements:
        """Measure everything."""
        for num_frames in dict.fromkeys(self._grid.num_frames):
            videos = repeated(self._videos(num_frames), self._captions)
            configurations = self._grid.configurations(num_frames)
            for turn in range(self._repeat + 1) if videos else ():
                if turn > 1 and self._budget.is_spent():
                    break
                self._turn(configurations, videos, turn)
        return self._found

    def _videos(self, num_frames: int | None) -> list[SetVideo]:
        """The clips that can be read; the first is read once before, since first use costs more."""
        found: list[SetVideo] = []
        for clip in self._clips:
            try:
                if not found:
                    self._read(clip, num_frames)
                found.append(self._read(clip, num_frames))
            except (VideoError, PreprocessError) as error:
                self._leave_out(Left(clip.name, str(error)))
        return found

    def _turn(self, configurations: Sequence[Configuration], videos: Sequence[SetVideo], turn: int) -> None:
        """All batch sizes, of each all methods; two batches are enough to warm up."""
        several = len(set(self._grid.num_frames)) > 1
        frames = f", {videos[0].facts.num_frames} frames" if several else ""
        for size in dict.fromkeys(self._grid.batch_sizes):
            chosen = videos if turn else videos[: 2 * size]
            for how in rotated([one for one in configurations if one.batch_size == size], turn):
                what = f"turn {turn} of {self._repeat}{frames}, {how.label}, batch {size}"
                measure = partial(self._measurer.measure_set, how, chosen, turn)
                self._attempt(how, turn, what, self._captions, measure)


def repeated(videos: Sequence[SetVideo], count: int) -> list[SetVideo]:
    """At least `count` videos, the given ones over and over; each has a name of its own."""
    found = list(videos)
    while videos and len(found) < count:
        again, place = divmod(len(found), len(videos))
        one = videos[place]
        found.append(one._replace(facts=one.facts._replace(name=f"{one.facts.name} #{again + 1}")))
    return found


def whole_turns(found: Measurements, configurations: Sequence[Configuration]) -> Measurements:
    """What of an interrupted bench can be compared: turns that all methods had, of those that did not fail."""
    had: dict[tuple[int | None, str, int], set[Configuration]] = {}
    for one in found.samples:
        had.setdefault((one.configuration.frames_asked, one.video, one.turn), set()).add(one.configuration)
    needed = [how for how in configurations if how not in found.errors]
    kept = [
        one
        for one in found.samples
        if had[one.configuration.frames_asked, one.video, one.turn].issuperset(
            how for how in needed if how.frames_asked == one.configuration.frames_asked
        )
    ]
    measured = {one.configuration for one in kept}
    untold = {how: "not measured, it was stopped before" for how in needed if how not in measured}
    return Measurements(kept, found.errors | untold, found.left_out)


def rotated(configurations: Sequence[Configuration], turn: int) -> list[Configuration]:
    """The order of one turn: it begins with another configuration each time."""
    first = turn % len(configurations) if configurations else 0
    return [*configurations[first:], *configurations[:first]]


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """What a bench is about.

    Attributes:
        grid: What is compared.
        clips: On which videos.
        frames: Which frames to read where the grid gives no number, and how large; None: the captioner's own.
        asked: The rest, as the conditions tell it.
        budget_s: Begin no further video, in batches no further turn, after this time; None: take them all.
    """

    grid: Grid
    clips: Sequence[Clip]
    frames: FrameSettings | None
    asked: BenchRequest
    budget_s: float | None = None


def bench(
    captioner: Captioner,
    setup: BenchSetup,
    listener: BenchListener,
    others: Mapping[str, Captioner] | None = None,
) -> BenchReport:
    """Measure everything that was asked for.

    A video that cannot be read is left out; a method that fails is left out from there on, and its summary says
    why. A report without samples means that nothing could be measured.

    Args:
        captioner: With the target of all, and the draft of all methods but those of `others`.
        setup: What is compared, and on what.
        listener: Receives events.
        others: The same target with other drafts (`specvlm.loading.with_draft`), by the names that the grid gives them.

    Raises:
        ConfigError: A method needs a draft, and there is none of its kind; or a setting makes no sense.
        PromptError: The prompt cannot be used.
        StoppedError: It was interrupted; it has the report of what was measured until then.
    """
    grid, asked = setup.grid, setup.asked
    _refuse_unfit_drafts(grid, captioner, others or {})
    base = captioner.frames if setup.frames is None else setup.frames

    def prepare(clip: Clip, num_frames: int | None) -> PreparedVideo:
        prompt = asked.prompt if clip.prompt is None else clip.prompt
        if isinstance(clip.video, Frames):
            return captioner.prepare(_spread(clip.video, num_frames), prompt)
        return captioner.prepare(clip.video, prompt, frames=clip.frame_settings(base, num_frames))

    def read(clip: Clip, num_frames: int | None) -> SetVideo:
        prompt, frames = asked.prompt if clip.prompt is None else clip.prompt, clip.video
        if isinstance(frames, Frames):
            frames = _spread(frames, num_frames)
        else:
            settings = clip.frame_settings(base, num_frames)
            frames = read_video(frames, settings, frame_multiple=captioner.frame_multiple)
        seen = captioner.prepare(frames, prompt)
        return SetVideo(facts_of(clip.name, seen)._replace(preprocess_s=0.0), frames, prompt)

    limit, budget = asked.max_new_tokens, Budget(setup.budget_s)
    suite: Suite | SetSuite
    if grid.is_batched:
        sets = SetMeasurer(captioner, limit, others=others)
        suite = SetSuite(grid, setup.clips, asked.repeat, read, sets, listener, budget)
    else:
        measurer = Measurer(captioner, limit, others=others)
        suite = Suite(grid, setup.clips, asked.repeat, prepare, measurer, listener, budget)
    return reported(suite, grid, lambda found: _report(captioner, setup, found))


def _refuse_unfit_drafts(grid: Grid, captioner: Captioner, others: Mapping[str, Captioner]) -> None:
    """Hold what the grid says of its drafts against what is loaded.

    Raises:
        ConfigError: They differ.
    """
    if grid.needs_draft is not None:
        raise ConfigError(f"method {grid.needs_draft!r} needs a draft, and there is none; give one")
    for one in grid.used():
        draft = others.get(one.name or "", captioner).draft
        if draft is None or isinstance(draft, HeadDraft) != one.is_head:
            method = next(method for method in grid.methods if one in grid.suiting(method))
            kind = "that is a trained head" if one.is_head else "that is a small model"
            raise ConfigError(f"method {method!r} needs a draft {kind}, and there is none; give one")


def reported(
    suite: Suite | SetSuite, grid: Grid, report: Callable[[Measurements], BenchReport]
) -> BenchReport:
    """Run a suite and make its report.

    Raises:
        StoppedError: It was interrupted.
    """
    try:
        found = suite.run()
    except KeyboardInterrupt as error:
        raise StoppedError(replace(report(whole_turns(suite.found, grid.all())), stopped=True)) from error
    return report(found)


def _report(captioner: Captioner, setup: BenchSetup, found: Measurements) -> BenchReport:
    kept = tuple(one for one in found.samples if one.configuration not in found.errors)
    return BenchReport(
        conditions_of(captioner, setup.asked, kept, (clip.name for clip in setup.clips)),
        summarise(setup.grid.all(), kept, found.errors),
        kept,
        tuple(found.left_out.values()),
    )


def conditions_of(
    captioner: Captioner, asked: BenchRequest, samples: Sequence[TimedCaption], names: Iterable[str]
) -> Conditions:
    """The conditions of samples: which of the named videos they are of, and whether these are repeated."""
    made = {one.video for one in samples}
    videos = tuple(name for name in names if name in made)
    found = conditions(captioner, asked, videos)
    return replace(found, repeated_to=len(made)) if len(made) > len(videos) else found


def _spread(frames: Frames, num_frames: int | None) -> Frames:
    """Frames that the caller read: as many of them as asked for, evenly spread."""
    if num_frames is None or num_frames >= len(frames.pixels):
        return frames
    chosen = [round(i * (len(frames.pixels) - 1) / max(num_frames - 1, 1)) for i in range(num_frames)]
    return Frames(frames.pixels[chosen], frames.times_s[chosen], frames.source)
