"""Which samples are left out, from when on, and why; the same in all processes, and kept by rank 0.

A sample is left out from the position on at which it failed, not before: what is done over again after a restart is
done with the very samples of the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from specvlm.errors import ConfigError, ModelError, PromptError, TrainingError
from specvlm.training.ranks import Ranks
from specvlm_cli.failure import Failure, failure_of
from specvlm_cli.training.captions import ALL_PROMPTS, Captions, LeftOut
from specvlm_cli.training.samples import Sample, Video

_FOR_ALL = (ConfigError, ModelError, TrainingError)  # no fault of one video


class UselessError(Exception):
    """A sample cannot be used; carries what is noted of it."""

    def __init__(self, left: LeftOut) -> None:
        super().__init__(left.failure.error)
        self.left = left


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample in hand, or all of a video's, which will be left out from `since` on if it fails."""

    video: Video
    prompt: int
    since: int

    def fails(self, failure: Failure, *, whole: bool = False) -> UselessError:
        """What to raise; `whole`: all samples of its video are of no use."""
        prompt = ALL_PROMPTS if whole else self.prompt
        return UselessError(LeftOut(self.video.id, prompt, self.since, self.video.name, failure))

    @contextmanager
    def blamed(self, stage: str, only: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
        """Take what goes wrong in the block for a fault of this sample, where it may be one.

        Raises:
            UselessError: It was.
            PromptError: The prompt, which is that of all videos, cannot be used.
        """
        try:
            yield
        except (*_FOR_ALL, UselessError):
            raise
        except only as error:
            if isinstance(error, PromptError) and not self.video.own_prompts:
                raise
            raise self.fails(failure_of(stage, error)) from error


class Register:
    """The samples that are left out."""

    def __init__(self, captions: Captions | None, ranks: Ranks, tell: Callable[[LeftOut], None]) -> None:
        """`captions`: None where another process keeps them; `tell` hears of each once."""
        self._captions, self._ranks, self._tell = captions, ranks, tell
        known = ranks.first([] if captions is None else captions.left_out())
        self._since = {(one.video, one.prompt): one.since for one in known}

    def has(self, sample: Sample, position: int) -> bool:
        """Say whether a sample is left out at a position."""
        keys = (sample.video.id, sample.prompt), (sample.video.id, ALL_PROMPTS)
        return any(self._since.get(key, position + 1) <= position for key in keys)

    def note(self, found: Sequence[LeftOut]) -> None:
        """Leave these out, and what other processes found; every process calls this."""
        for share in self._ranks.share(list(found)):
            for one in share:
                key = one.video, one.prompt
                if self._since.get(key, one.since + 1) > one.since:
                    self._since[key] = one.since
                    if self._captions is not None:
                        self._captions.leave_out(one)
                    self._tell(one)
