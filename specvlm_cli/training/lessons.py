"""Samples to learn from: read, captioned once by the target, shown to the head.

A caption that has to be written is written together with those of the next samples whose videos are read already, so
that the batch stays full. What is learned, and in which order, does not depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from specvlm.captioner import Captioner, PreparedVideo
from specvlm.drafts.head_model import HeadModel
from specvlm.errors import GenerationError, TrainingError
from specvlm.records import Frames
from specvlm.stats import is_out_of_memory
from specvlm.training.example import read_example
from specvlm.training.memory import SampleSize as Size
from specvlm.training.memory import shortage
from specvlm.training.order import Order, SampleTurn
from specvlm.training.progress import Measures
from specvlm.training.ranks import Ranks
from specvlm.training.trainer import Learn
from specvlm_cli.caption.failure import Failure
from specvlm_cli.readers import ReadFailure, ReadJob
from specvlm_cli.training.asking import Asking, Captioners, SampleListener
from specvlm_cli.training.captions import Captions, LeftOut, caption_key
from specvlm_cli.training.frames import TrainingReader
from specvlm_cli.training.register import Register, Suspect, UselessError
from specvlm_cli.training.samples import TrainingSample
from specvlm_cli.training.writing import Lesson, Writer, held_bytes

_AHEAD_BYTES = 1 << 30  # of preprocessed videos whose turn has not come
_MEMORY = (GenerationError, torch.OutOfMemoryError, MemoryError)
_FIXES = (
    "give fewer frames (--num-frames or --max-frames), smaller ones (--max-pixels), a smaller --max-new-tokens, or "
    "another place for the head (--head-device)"
)


@dataclass
class TrainingTally:
    """What a start did, in all processes.

    Attributes:
        captions: Captions that the target wrote.
        tokens: Their tokens.
    """

    captions: int = 0
    tokens: int = 0


class _CaptionQuery(NamedTuple):
    """What one process wants to know of the captions that are kept."""

    now: str | None  # key of the sample whose turn it is
    ahead: list[tuple[int, str]]  # positions and keys of samples to come


class _Found(NamedTuple):
    """What there is of it."""

    now: tuple[int, ...] | None
    ahead: list[bool]


class Lessons:
    """The samples of one process.

    Attributes:
        tally: What was done.
        head_guesses: Where the target has no draft, the head guesses for its captions.
    """

    def __init__(
        self,
        samples: Sequence[TrainingSample],
        order: Order,
        head: HeadModel,
        captioners: Captioners,
        asking: Asking,
        reader: TrainingReader,
        captions: Captions | None,
        register: Register,
        ranks: Ranks,
        listener: SampleListener,
        batch_size: int | None = None,
    ) -> None:
        """Nothing is read yet.

        `captions`: where they are kept; None: another process keeps them. `batch_size`: most captions in the making;
        None: as many as memory holds and as help.
        """
        self.tally, self.head_guesses = TrainingTally(), False
        self._samples, self._order, self._head = samples, order, head
        self._captioners, self._asking, self._reader = captioners, asking, reader
        self._captions, self._register, self._ranks = captions, register, ranks
        self._writer = Writer(batch_size, asking, listener)
        self._announced: dict[int, int] = {}  # samples that the reader was given, by position
        self._ahead: dict[int, Lesson] = {}  # lessons to come whose videos are read, by position
        self._wanted: deque[int] = deque()  # those of them that we are to caption
        self._claims: dict[str, int] = {}  # positions at which some process captions a key
        self._new: list[tuple[str, tuple[int, ...]]] = []  # captions that are not kept yet
        self._longest = 0  # sample that fitted, in tokens
        self._fresh = True  # the optimiser may have no state yet

    def begin(self, steps: range) -> None:
        """Begin to read, and see whether there is memory for what comes first.

        Raises:
            TrainingError: There is none.
        """
        self._fresh = steps.start == 0
        self._reader.begin(self._jobs(steps))
        if steps:
            mine = self._order.places(steps.start)[self._ranks.rank :: self._ranks.count]
            self._check_memory(self._reader.first(len(mine)))

    def _jobs(self, steps: range) -> Iterator[ReadJob]:
        """What is to be read; asked for as late as can be, since samples are left out meanwhile."""
        for place in self._order.places_of(steps, self._ranks.rank, self._ranks.count):
            sample = self._samples[place.sample]
            job = self._asking.job(place.position, sample.video)
            if isinstance(job, ReadJob) and not self._register.has(sample, place.position):
                self._announced[place.position] = place.sample
                yield job

    def _check_memory(self, first: Sequence[Frames]) -> None:
        """Refuse to begin where there is no room for the longest of the videos that come first."""
        for frames in sorted(first, key=lambda one: one.pixels.nbytes)[-1:]:
            prompt = self._samples[0].video.prompts[0]
            try:
                prepared = self._captioners.teacher.prepare(
                    frames, prompt, system=self._asking.captions.system
                )
            except Exception:  # it is reported in its turn
                return
            missing = self._shortage(prepared, self._asking.captions.generation.max_new_tokens)
            if missing is not None:
                raise TrainingError(f"the longest of the first {len(first)} videos: {missing}; {_FIXES}")

    def _shortage(self, prepared: PreparedVideo, written: int) -> str | None:
        size = Size(prepared.inputs, written, self._asking.unroll, self._fresh)
        return shortage(self._captioners.teacher.target, self._head, size)

    def visit(self, place: SampleTurn | None, learn: Learn) -> Measures | None:
        """See `specvlm.training.trainer.SampleSource`."""
        left: list[LeftOut] = []
        lesson, measures = None, None
        try:
            lesson = None if place is None else self._met(place)
        except UselessError as error:
            left.append(error.left)
        left += self._captioned(lesson)
        if lesson is not None and lesson.tokens is not None:
            try:
                measures = self._taught(lesson, learn)
            except UselessError as error:
                left.append(error.left)
        self._register.note(left, [] if lesson is None or measures is None else [lesson.suspect.video])
        return measures

    def _met(self, place: SampleTurn) -> Lesson | None:
        """The sample of a place, read and preprocessed; None: it is left out already.

        Raises:
            UselessError: It cannot be.
        """
        self._forget_passed(place.position)
        sample = self._samples[place.sample]
        if self._register.has(sample, place.position):
            return None
        known = self._ahead.pop(place.position, None)
        if known is not None and known.failed is not None and known.prepared is None:
            self._raise_of(known)
        if known is not None and known.prepared is not None:
            return known
        suspect = Suspect(*sample, place.position)
        job = self._asking.job(place.position, sample.video)
        found = self._reader.take(place.position) if isinstance(job, ReadJob) else job
        if isinstance(found, ReadFailure):
            raise suspect.unread(found)
        prompt = sample.video.prompts[sample.prompt]
        with suspect.blamed("preprocess"):
            prepared = self._captioners.teacher.prepare(found, prompt, system=self._asking.captions.system)
        key = caption_key(found, prompt, self._asking.settings) if known is None else known.key
        return Lesson(suspect, key, prepared)

    def _forget_passed(self, position: int) -> None:
        """Whose turn is over, or who is left out by now, needs no caption and no memory."""
        self._reader.drop_before(position)
        for lesson in list(self._ahead.values()):
            sample = TrainingSample(lesson.suspect.video, lesson.suspect.prompt)
            if lesson.position < position or self._register.has(sample, lesson.position):
                self._writer.forget(lesson.position)
                del self._ahead[lesson.position]
        self._announced = {place: sample for place, sample in self._announced.items() if place >= position}
        self._claims = {key: place for key, place in self._claims.items() if place >= position}

    @staticmethod
    def _raise_of(lesson: Lesson) -> None:
        """Raise what came instead of a caption, now that it is the sample's turn.

        Raises:
            UselessError: It is a fault of this sample.
        """
        assert lesson.failed is not None
        stage, error = lesson.failed
        with lesson.suspect.blamed(stage):
            raise error

    # --- captions ---

    def _captioned(self, lesson: Lesson | None) -> list[LeftOut]:
        """Look the captions of all processes up, have ours written where it is new, and keep all new ones at once."""
        fresh = self._noticed()
        now = None if lesson is None else lesson.key
        asked = self._ranks.share(_CaptionQuery(now, [(one.position, one.key) for one in fresh]))
        found = self._ranks.first([] if self._captions is None else self._looked_up(self._captions, asked))
        self._claim(asked, found)
        left = list[LeftOut]()
        if lesson is not None:
            lesson.tokens = found[self._ranks.rank].now or lesson.tokens
            try:
                self._write(lesson)
            except UselessError as error:
                left.append(error.left)
            self._writer.forget(lesson.position)
        new, self._new = self._new, []
        self._keep([one for share in self._ranks.share(new) for one in share])
        return left

    def _noticed(self) -> list[Lesson]:
        """Samples to come whose videos were read since we looked last."""
        fresh = []
        for position in self._reader.ready():
            if position in self._ahead or position not in self._announced:
                continue
            sample = self._samples[self._announced[position]]
            if self._register.has(sample, position):
                continue
            prompt = sample.video.prompts[sample.prompt]
            key = caption_key(self._reader.peek(position), prompt, self._asking.settings)
            fresh.append(Lesson(Suspect(*sample, position), key))
        self._ahead |= {one.position: one for one in fresh}
        return fresh

    @staticmethod
    def _looked_up(captions: Captions, asked: Sequence[_CaptionQuery]) -> list[_Found]:
        return [
            _Found(
                None if one.now is None else captions.tokens(one.now),
                [captions.tokens(key) is not None for _, key in one.ahead],
            )
            for one in asked
        ]

    def _claim(self, asked: Sequence[_CaptionQuery], found: Sequence[_Found]) -> None:
        """Share out who captions which of the samples to come: each key once, and none that is kept already."""
        self._claims |= {one.now: -1 for one in asked if one.now is not None and one.now not in self._claims}
        missing = [
            (position, rank, key)
            for rank, (one, known) in enumerate(zip(asked, found, strict=True))
            for (position, key), is_kept in zip(one.ahead, known.ahead, strict=True)
            if not is_kept
        ]
        for position, rank, key in sorted(missing):
            if key not in self._claims:
                self._claims[key] = position
                if rank == self._ranks.rank:
                    self._wanted.append(position)

    @property
    def _author(self) -> Captioner:
        """Who writes what is begun from now on."""
        teacher, pupil = self._captioners
        return pupil if teacher.draft is None and self.head_guesses else teacher

    def _write(self, lesson: Lesson) -> None:
        """Have the target write a caption where there is none, and those of samples to come meanwhile.

        Raises:
            UselessError: None came.
        """
        if not lesson.ended and lesson.position not in self._writer:
            self._writer.add(lesson, first=True)
        while not lesson.ended:
            self._fill()
            with lesson.suspect.blamed("generate"):
                ended = self._writer.step(self._author)
            self._hear([(one.key, one.tokens) for one in ended if one.tokens is not None])
        if lesson.tokens is None:
            self._raise_of(lesson)

    def _fill(self) -> None:
        """Take samples to come into the batch, as far as it and memory have room; nothing is waited for."""
        if self._captions is not None and self._ranks.count == 1:  # no other process has to be asked
            asked = [_CaptionQuery(None, [(one.position, one.key) for one in self._noticed()])]
            self._claim(asked, self._looked_up(self._captions, asked))
        room = self._writer.room(self._author)
        while room > 0 and self._wanted and held_bytes(self._ahead.values()) < _AHEAD_BYTES:
            lesson = self._ahead.get(self._wanted.popleft())
            if lesson is not None and self._prepared(lesson):
                self._writer.add(lesson)
                room -= 1

    def _prepared(self, lesson: Lesson) -> bool:
        """Preprocess a sample before its turn; whatever goes wrong is said in its turn."""
        frames = self._reader.take_ahead(lesson.position)
        prompt = lesson.suspect.video.prompts[lesson.suspect.prompt]
        try:
            lesson.prepared = self._captioners.teacher.prepare(
                frames, prompt, system=self._asking.captions.system
            )
        except Exception as error:
            lesson.failed = "preprocess", error
        return lesson.failed is None

    def _hear(self, written: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Keep captions at once, or have them kept by the process that does, at the end of this visit."""
        if self._captions is None:
            self._new += written
        else:
            self._keep(written)

    def _keep(self, written: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        for key, tokens in written:
            self.tally.captions += 1
            self.tally.tokens += len(tokens)
            if self._captions is not None:
                self._captions.add(key, tokens)

    def _taught(self, lesson: Lesson, learn: Learn) -> Measures:
        """Show the target's view of a captioned video to the head.

        Raises:
            UselessError: There is no room for it, or nothing to be learned.
        """
        assert lesson.tokens is not None
        assert lesson.prepared is not None
        self._make_room(lesson, lesson.prepared, len(lesson.tokens))
        with lesson.suspect.blamed("learn", _MEMORY):
            measures = self._shown(lesson.prepared, lesson.tokens, learn)
        tokens = lesson.prepared.inputs.prompt_tokens + len(lesson.tokens)
        self._longest, self._fresh = max(self._longest, tokens), False
        return measures

    def _make_room(self, lesson: Lesson, prepared: PreparedVideo, written: int) -> None:
        """See that there is memory to learn from a sample; captions in the making give back theirs where there is not.

        Raises:
            UselessError: There is too little all the same.
        """
        longer = prepared.inputs.prompt_tokens + written > self._longest
        if not longer and not self._writer.holds_memory:
            return
        missing = self._shortage(prepared, written)
        if missing is not None and self._writer.holds_memory:
            self._writer.release()
            missing = self._shortage(prepared, written)
        if missing is not None and longer:
            raise lesson.suspect.fails(Failure("learn", "OutOfMemory", missing))

    def _shown(self, prepared: PreparedVideo, tokens: Sequence[int], learn: Learn) -> Measures:
        """Learn, a second time where captions in the making may have had the memory that was missing."""
        target = self._captioners.teacher.target
        try:
            return learn(read_example(target, prepared.inputs, tokens))
        except Exception as error:
            if not is_out_of_memory(error) or not self._writer.holds_memory:
                raise
        self._writer.release()
        return learn(read_example(target, prepared.inputs, tokens))
