"""The held-out videos: real speculative decoding with the head as it would be saved now, with its own defaults.

They are decoded together; how many guesses of each are accepted does not depend on the others. Nothing of it touches
the training: the head that decodes is a copy, and no random number is drawn that training uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from specvlm.batch import CaptionBatch, FinishedCaption, Kind
from specvlm.config import SpeculationSettings
from specvlm.training.progress import Held
from specvlm.training.ranks import Ranks
from specvlm_cli.readers import ReadFailure, ReadJob
from specvlm_cli.training.asking import Asking, Captioners, SampleListener
from specvlm_cli.training.captions import Blame, LeftOut
from specvlm_cli.training.frames import TrainingReader
from specvlm_cli.training.register import Register, Suspect, UselessError
from specvlm_cli.training.samples import TrainingSample, TrainingVideo
from specvlm_cli.training.writing import drop_decoder

_AS_IN_USE = SpeculationSettings(tree="dynamic")


@dataclass(slots=True, eq=False)
class _HeldOut:
    """One held-out video, decoded with each of its prompts.

    Attributes:
        suspect: The video.
        job: What reads it, or why it cannot be read.
        held: What was accepted, by prompt.
        left: Why it is left out; None: it is not.
    """

    suspect: Suspect
    job: ReadJob | ReadFailure
    held: dict[int, Held] = field(default_factory=dict)
    left: LeftOut | None = None

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to decode."""
        return self.left is not None or len(self.held) == len(self.suspect.video.prompts)


class Exam:
    """The held-out videos of one process."""

    def __init__(
        self,
        videos: Sequence[TrainingVideo],
        captioners: Captioners,
        asking: Asking,
        reader: TrainingReader,
        register: Register,
        ranks: Ranks,
        listener: SampleListener,
        check: Callable[[], None],
        batch_size: int | None = None,
    ) -> None:
        """Nothing is read yet.

        `check` raises where stopping was asked for. `batch_size`: most captions in flight; None: as many as memory
        holds and as help.
        """
        self._videos, self._pupil, self._asking = videos, captioners.pupil, asking
        self._reader, self._register, self._ranks = reader, register, ranks
        self._listener, self._check, self._batch_size = listener, check, batch_size

    def sit(self, step: int) -> list[Held] | None:
        """See `specvlm.training.trainer.SampleSource.held_out`."""
        if not self._videos:
            return None
        mine = [
            _HeldOut(Suspect(video, 0, step), self._asking.job(number, video))
            for number, video in enumerate(self._videos)
            if number % self._ranks.count == self._ranks.rank
            and not self._register.has(TrainingSample(video, 0), step)
        ]
        self._reader.begin(one.job for one in mine if isinstance(one.job, ReadJob))
        kind = self._pupil.kind_of(replace(self._asking.captions.generation, seed=0), _AS_IN_USE)
        batch = CaptionBatch(self._pupil, self._batch_size)
        try:
            self._decode(mine, batch, kind)
        finally:
            batch.close()
        drop_decoder(self._pupil, kind)  # the training needs the memory
        used = [one for one in mine if one.left is None]
        left = [one.left for one in mine if one.left is not None]
        self._register.note(left, [one.suspect.video for one in used])
        held = [one.held[prompt] for one in used for prompt in sorted(one.held)]
        return [one for share in self._ranks.share(held) for one in share]

    def _decode(self, videos: Sequence[_HeldOut], batch: CaptionBatch, kind: Kind) -> None:
        """Decode videos until each has ended; a video that is still being read is waited for by an empty batch only."""
        coming, running = deque(enumerate(videos)), dict[int, _HeldOut]()
        while coming or running:
            self._check()
            while coming and batch.has_room() and (not running or self._is_read(coming[0][1])):
                number, one = coming.popleft()
                running[number] = one
                self._begin(batch, number, one, kind)
            if len(batch):
                self._step(batch, running)
            for number, one in [*running.items()]:
                if one.ended:
                    del running[number]
                    for prompt in range(len(one.suspect.video.prompts)):
                        batch.abort((number, prompt))
                    self._listener.measured(len(videos) - len(coming) - len(running), len(videos))
                if one.left is not None and one.left.blame is Blame.MACHINE:
                    return

    def _is_read(self, one: _HeldOut) -> bool:
        return not isinstance(one.job, ReadJob) or self._reader.has(one.job.key)

    def _begin(self, batch: CaptionBatch, number: int, one: _HeldOut, kind: Kind) -> None:
        """Put a video with all its prompts into the batch."""
        prompts = one.suspect.video.prompts
        try:
            found = self._reader.take(one.job.key) if isinstance(one.job, ReadJob) else one.job
            if isinstance(found, ReadFailure):
                raise one.suspect.unread(found)
            with one.suspect.blamed("generate"):
                session = self._pupil.session(found, prompts, system=self._asking.captions.system)
                for prompt in range(len(prompts)):
                    session.add_to(batch, (number, prompt), prompt, kind)
        except UselessError as error:
            one.left = error.left

    def _step(self, batch: CaptionBatch, running: dict[int, _HeldOut]) -> None:
        """One round; an error that belongs to no sequence alone is that of the video that has run longest."""
        oldest = next(iter(running.values()))
        try:
            with oldest.suspect.blamed("generate"):
                finished = batch.step()
        except UselessError as error:
            oldest.left = error.left
            return
        for done in finished:
            assert isinstance(done.key, tuple)
            number, prompt = done.key
            self._hear(running[number], prompt, done)

    def _hear(self, one: _HeldOut, prompt: int, done: FinishedCaption) -> None:
        if done.caption is not None:
            stats = done.caption.stats
            one.held[prompt] = Held(stats.num_drafts, stats.num_accepted_tokens)
            return
        assert done.error is not None
        try:
            with one.suspect.blamed("generate"):
                raise done.error
        except UselessError as error:
            one.left = error.left
