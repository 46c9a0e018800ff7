"""The held-out videos: real speculative decoding with the head as it would be saved now, with its own defaults.

Nothing of it touches the training: the head that decodes is a copy, and no random number is drawn that training uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specvlm.captioner import CaptionOptions
from specvlm.training.progress import Held
from specvlm.training.ranks import Ranks
from specvlm_cli.decoding import ReadFailure, ReadJob
from specvlm_cli.training.asking import Asking, Captioners, Listener
from specvlm_cli.training.captions import LeftOut
from specvlm_cli.training.reading import Reader
from specvlm_cli.training.register import Register, Suspect, UselessError
from specvlm_cli.training.samples import Sample, Video

_AS_IN_USE: CaptionOptions = {"tree": "dynamic", "seed": 0}


class Exam:
    """The held-out videos of one process."""

    def __init__(
        self,
        videos: Sequence[Video],
        captioners: Captioners,
        asking: Asking,
        reader: Reader,
        register: Register,
        ranks: Ranks,
        listener: Listener,
        check: Callable[[], None],
    ) -> None:
        """`check` raises where stopping was asked for."""
        self._videos, self._pupil, self._asking = videos, captioners.pupil, asking
        self._reader, self._register, self._ranks = reader, register, ranks
        self._listener, self._check = listener, check

    def sit(self, step: int) -> list[Held] | None:
        """See `specvlm.training.trainer.Source.held_out`."""
        if not self._videos:
            return None
        mine = [
            (number, video)
            for number, video in enumerate(self._videos)
            if number % self._ranks.count == self._ranks.rank
            and not self._register.has(Sample(video, 0), step)
        ]
        jobs = [self._asking.job(number, video) for number, video in mine]
        self._reader.begin(job for job in jobs if isinstance(job, ReadJob))
        held, left, used = list[Held](), list[LeftOut](), list[Video]()
        for done, ((_, video), job) in enumerate(zip(mine, jobs, strict=True), 1):
            self._check()
            try:
                held += self._decoded(Suspect(video, 0, step), job)
                used.append(video)
            except UselessError as error:
                left.append(error.left)
            self._listener.measured(done, len(mine))
        self._register.note(left, used)
        return [one for share in self._ranks.share(held) for one in share]

    def _decoded(self, suspect: Suspect, job: ReadJob | ReadFailure) -> list[Held]:
        """Decode a video with each of its prompts.

        Raises:
            UselessError: One of them gives no caption.
        """
        found = self._reader.take(job.key) if isinstance(job, ReadJob) else job
        if isinstance(found, ReadFailure):
            raise suspect.unread(found)
        prompts = suspect.video.prompts
        held: list[Held] = []
        options: CaptionOptions = {**self._asking.generation, **_AS_IN_USE}
        with suspect.blamed("generate"):
            session = self._pupil.session(found, prompts, system=self._asking.system)
            for index in range(len(prompts)):
                stats = session.caption(index, **options).stats
                held.append(Held(stats.num_drafts, stats.num_accepted_tokens))
        return held
