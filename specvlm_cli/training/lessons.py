"""Samples to learn from: read, captioned once by the target, shown to the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from specvlm.captioner import CaptionOptions, PreparedVideo
from specvlm.drafts.head_model import HeadModel
from specvlm.errors import GenerationError, TrainingError
from specvlm.records import Frames
from specvlm.training.example import read_example
from specvlm.training.memory import Sample as Size
from specvlm.training.memory import shortage
from specvlm.training.order import Order, Place
from specvlm.training.progress import Measures
from specvlm.training.ranks import Ranks
from specvlm.training.trainer import Learn
from specvlm_cli.decoding import ReadFailure, ReadJob
from specvlm_cli.failure import Failure
from specvlm_cli.training.asking import Asking, Captioners, Listener
from specvlm_cli.training.captions import Captions, LeftOut, caption_key
from specvlm_cli.training.reading import Reader
from specvlm_cli.training.register import Register, Suspect, UselessError
from specvlm_cli.training.samples import Sample

_MEMORY = (GenerationError, torch.OutOfMemoryError, MemoryError)
_FIXES = (
    "give fewer frames (--num-frames or --max-frames), smaller ones (--max-pixels), a smaller --max-new-tokens, or "
    "another place for the head (--head-device)"
)


@dataclass
class Tally:
    """What a start did, in all processes.

    Attributes:
        captions: Captions that the target wrote.
        tokens: Their tokens.
    """

    captions: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Lesson:
    """One sample on its way to the head.

    Attributes:
        key: What its caption is found by.
        tokens: The caption, once there is one.
    """

    suspect: Suspect
    prepared: PreparedVideo
    key: str
    tokens: tuple[int, ...] | None = None


class Lessons:
    """The samples of one process.

    Attributes:
        tally: What was done.
        head_guesses: Where the target has no draft, the head guesses for its captions.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        order: Order,
        head: HeadModel,
        captioners: Captioners,
        asking: Asking,
        reader: Reader,
        captions: Captions | None,
        register: Register,
        ranks: Ranks,
        listener: Listener,
    ) -> None:
        """`captions`: where they are kept; None: another process keeps them."""
        self.tally, self.head_guesses = Tally(), False
        self._samples, self._order, self._head = samples, order, head
        self._captioners, self._asking, self._reader = captioners, asking, reader
        self._captions, self._register, self._ranks, self._listener = captions, register, ranks, listener
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
                yield job

    def _check_memory(self, first: Sequence[Frames]) -> None:
        """Refuse to begin where there is no room for the longest of the videos that come first."""
        for frames in sorted(first, key=lambda one: one.pixels.nbytes)[-1:]:
            prompt = self._samples[0].video.prompts[0]
            try:
                prepared = self._captioners.teacher.prepare(frames, prompt, system=self._asking.system)
            except Exception:  # it is told in its turn
                return
            missing = self._shortage(prepared, self._asking.generation["max_new_tokens"])
            if missing is not None:
                raise TrainingError(f"the longest of the first {len(first)} videos: {missing}; {_FIXES}")

    def _shortage(self, prepared: PreparedVideo, written: int) -> str | None:
        size = Size(prepared.inputs, written, self._asking.unroll, self._fresh)
        return shortage(self._captioners.teacher.target, self._head, size)

    def visit(self, place: Place | None, learn: Learn) -> Measures | None:
        """See `specvlm.training.trainer.Source`."""
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

    def _met(self, place: Place) -> _Lesson | None:
        """The sample of a place, read and preprocessed; None: it is left out already.

        Raises:
            UselessError: It cannot be.
        """
        sample = self._samples[place.sample]
        if self._register.has(sample, place.position):
            return None
        suspect = Suspect(*sample, place.position)
        job = self._asking.job(place.position, sample.video)
        found = self._reader.take(place.position) if isinstance(job, ReadJob) else job
        if isinstance(found, ReadFailure):
            raise suspect.unread(found)
        prompt = sample.video.prompts[sample.prompt]
        with suspect.blamed("preprocess"):
            prepared = self._captioners.teacher.prepare(found, prompt, system=self._asking.system)
        return _Lesson(suspect, prepared, caption_key(found, prompt, self._asking.settings))

    def _captioned(self, lesson: _Lesson | None) -> list[LeftOut]:
        """Look the captions of all processes up, have ours written where it is new, and keep all new ones at once."""
        keys = self._ranks.share(None if lesson is None else lesson.key)
        found: list[tuple[int, ...] | None] = []
        if self._captions is not None:
            found = [None if key is None else self._captions.tokens(key) for key in keys]
        found = self._ranks.first(found)
        new, left = None, list[LeftOut]()
        if lesson is not None:
            lesson.tokens = found[self._ranks.rank]
            if lesson.tokens is None:
                try:
                    new = lesson.tokens = self._written(lesson)
                except UselessError as error:
                    left.append(error.left)
        self._keep(keys, self._ranks.share(new))
        return left

    def _written(self, lesson: _Lesson) -> tuple[int, ...]:
        """Have the target write a caption.

        Raises:
            UselessError: None came.
        """
        teacher, pupil = self._captioners
        author = pupil if teacher.draft is None and self.head_guesses else teacher
        options: CaptionOptions = {**self._asking.generation, **self._asking.speculation}
        with lesson.suspect.blamed("generate"):
            caption = author.caption(lesson.prepared, **options)
        self._listener.captioned(lesson.suspect.video.name, caption.text)
        return caption.token_ids

    def _keep(self, keys: Sequence[str | None], written: Sequence[tuple[int, ...] | None]) -> None:
        for key, tokens in zip(keys, written, strict=True):
            if key is not None and tokens is not None:
                self.tally.captions += 1
                self.tally.tokens += len(tokens)
                if self._captions is not None:
                    self._captions.add(key, tokens)

    def _taught(self, lesson: _Lesson, learn: Learn) -> Measures:
        """Show the target's view of a captioned video to the head.

        Raises:
            UselessError: There is no room for it, or nothing to be learned.
        """
        assert lesson.tokens is not None
        tokens = lesson.prepared.inputs.prompt_tokens + len(lesson.tokens)
        if tokens > self._longest and (missing := self._shortage(lesson.prepared, len(lesson.tokens))):
            raise lesson.suspect.fails(Failure("learn", "OutOfMemory", missing))
        with lesson.suspect.blamed("learn", _MEMORY):
            target = self._captioners.teacher.target
            measures = learn(read_example(target, lesson.prepared.inputs, lesson.tokens))
        self._longest, self._fresh = max(self._longest, tokens), False
        return measures
