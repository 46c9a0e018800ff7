"""Captions that the target writes for samples, many in flight. Knows no store, no reader and no training of heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from specvlm.batch import CaptionBatch, Kind, free_what_can_be_freed
from specvlm.captioner import Captioner, PreparedVideo
from specvlm_cli.training.asking import Asking, SampleListener
from specvlm_cli.training.register import Suspect


@dataclass(slots=True, eq=False)
class Lesson:
    """One sample on its way to the head.

    Attributes:
        suspect: The sample, and its position in the training.
        key: What its caption is found by.
        prepared: Its video and prompt, preprocessed; None: its frames are still with the reader.
        tokens: The caption, once there is one.
        failed: The stage and the error that there is instead of one.
    """

    suspect: Suspect
    key: str
    prepared: PreparedVideo | None = None
    tokens: tuple[int, ...] | None = None
    failed: tuple[str, Exception] | None = None

    @property
    def position(self) -> int:
        """From the beginning of the training."""
        return self.suspect.since

    @property
    def size_bytes(self) -> int:
        """Memory of what the processor made."""
        return (
            0 if self.prepared is None else sum(one.nbytes for one in self.prepared.inputs.tensors.values())
        )

    @property
    def ended(self) -> bool:
        """Whether there is a caption, or an error instead."""
        return self.tokens is not None or self.failed is not None


class Writer:
    """The captions in the making.

    When the author changes, captions that an earlier one has begun are finished by that one first.
    """

    def __init__(self, batch_size: int | None, asking: Asking, listener: SampleListener) -> None:
        """`batch_size`: most captions in flight; None: as many as memory holds and as help."""
        self._most, self._asking, self._listener = batch_size, asking, listener
        self._waiting: dict[int, Lesson] = {}  # by position
        self._running: dict[int, Lesson] = {}  # those that are in the batch
        self._batch: CaptionBatch | None = None
        self._author: Captioner | None = None
        self._kind: Kind | None = None

    def __len__(self) -> int:
        """Lessons without a caption."""
        return len(self._waiting) + len(self._running)

    def __contains__(self, position: int) -> bool:
        return position in self._waiting or position in self._running

    def room(self, author: Captioner) -> int:
        """How many more lessons it takes to fill the batch; `author` writes what comes next."""
        batch = self._batch or CaptionBatch(author, self._most)
        return batch.batch_size - len(self)

    def add(self, lesson: Lesson, *, first: bool = False) -> None:
        """Queue a lesson that is prepared; `first`: before all others that wait."""
        one = {lesson.position: lesson}
        self._waiting = one | self._waiting if first else self._waiting | one

    def forget(self, position: int) -> None:
        """The caption of a lesson is not needed any more."""
        self._waiting.pop(position, None)
        if self._running.pop(position, None) is not None and self._batch is not None:
            self._batch.abort(position)

    def step(self, author: Captioner) -> list[Lesson]:
        """One round of all captions in flight; -> the lessons that have a caption now, or an error instead.

        Raises:
            Exception: It belongs to no lesson alone; all wait again.
        """
        batch = self._filled(author)
        try:
            finished = batch.step()
        except Exception:
            self._stop()
            raise
        ended = []
        for one in finished:
            assert isinstance(one.key, int)
            lesson = self._running.pop(one.key)
            if one.caption is None:
                assert one.error is not None
                lesson.failed = "generate", one.error
            else:
                lesson.tokens = one.caption.token_ids
                self._listener.captioned(lesson.suspect.video.name, one.caption.text)
            ended.append(lesson)
        return ended

    def _filled(self, author: Captioner) -> CaptionBatch:
        """The batch, with those that wait as far as there is room."""
        if self._batch is None or (author is not self._author and not self._running):
            self._batch = CaptionBatch(author, self._most)
            self._author = author
            captions = self._asking.captions
            self._kind = author.kind_of(captions.generation, captions.speculation)
        if author is self._author:
            assert self._kind is not None
            while self._waiting and self._batch.has_room():
                position = next(iter(self._waiting))
                lesson = self._running[position] = self._waiting.pop(position)
                assert lesson.prepared is not None
                self._batch.add(position, lesson.prepared, self._kind)
        return self._batch

    @property
    def holds_memory(self) -> bool:
        """Whether `release` would give any back."""
        return self._batch is not None

    def release(self) -> None:
        """Give back all memory of captions in the making, which are begun again later."""
        author, kind = self._author, self._kind
        self._stop()
        if author is not None and kind is not None:
            drop_decoder(author, kind)

    def _stop(self) -> None:
        """All captions in flight wait to be begun again."""
        self._waiting = self._running | self._waiting
        self._running = {}
        if self._batch is not None:
            self._batch.close()
        self._batch = None


def drop_decoder(author: Captioner, kind: Kind) -> None:
    """Give back the memory that a captioner with nothing in flight has kept for the next captions of a kind."""
    author.take_decoder(kind)
    free_what_can_be_freed()


def held_bytes(lessons: Iterable[Lesson]) -> int:
    """Memory of what the processor made of lessons."""
    return sum(lesson.size_bytes for lesson in lessons)
