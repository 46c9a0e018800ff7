"""Where the loop's samples come from: lessons of the training videos, exams of those held out.

Whatever is wrong with one video costs the training that video: it is noted once, with the reason, and left out from
there on, after a restart too; what may pass is tried again then. Of several processes each reads and captions its own
samples; rank 0 alone keeps the result.
"""

from __future__ import annotations

from specvlm.training.order import SampleTurn
from specvlm.training.progress import Held, Measures, mean_accepted_tokens
from specvlm.training.trainer import Learn
from specvlm_cli.training.exam import Exam
from specvlm_cli.training.lessons import Lessons
from specvlm_cli.training.register import Register

GUESSES_FROM = 0.5  # accepted tokens a round from which on the head in training may guess for the target


class VideoSamples:
    """The source of one process."""

    def __init__(self, lessons: Lessons, exam: Exam, register: Register) -> None:
        self._lessons, self._exam, self._register = lessons, exam, register

    def begin(self, steps: range) -> None:
        """See `specvlm.training.trainer.SampleSource`."""
        self._lessons.begin(steps)

    def visit(self, place: SampleTurn | None, learn: Learn) -> Measures | None:
        """See `specvlm.training.trainer.SampleSource`."""
        return self._lessons.visit(place, learn)

    def held_out(self, step: int) -> list[Held] | None:
        """See `specvlm.training.trainer.SampleSource`."""
        held = self._exam.sit(step)
        self._lessons.head_guesses = (mean_accepted_tokens(held or []) or 0.0) >= GUESSES_FROM
        return held

    def settled(self) -> bool:
        """See `specvlm.training.trainer.SampleSource`."""
        return self._register.settled

    def end(self) -> None:
        """See `specvlm.training.trainer.SampleSource`."""
        self._register.settle()
