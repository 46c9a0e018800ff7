"""Which samples are left out, from when on, and why; the same in all processes, and kept by rank 0.

A sample is left out from the position on at which it failed, not before: what is done over again after a restart is
done with the same samples as the first time. Only a video's own fault is kept: where a machine or a mount fails, the
training stops instead of running through with nothing to learn from, and the next start tries all of it again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from specvlm.errors import ConfigError, ModelError, PreprocessError, PromptError, TrainingError
from specvlm.training.ranks import Ranks
from specvlm_cli.caption.failure import BAD_INPUT, Failure, failure_of
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.readers import ReadFailure
from specvlm_cli.training.captions import ALL_PROMPTS, Blame, LeftOut, LeftOuts
from specvlm_cli.training.samples import TrainingSample, TrainingVideo

MOST_IN_A_ROW = 8  # samples that may fail one after another before that is no matter of single videos
_NOT_FOUND = "VideoNotFoundError"
_OWN_FAULTS = (BAD_INPUT, "NotAVideoError", "PathDeniedError", "VideoDecodeError", "VideoRangeError")
_OF_THE_MACHINE = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
_FOR_ALL = (ConfigError, ModelError, TrainingError)  # no fault of one video


class UselessError(Exception):
    """A sample cannot be used; carries what is noted of it."""

    def __init__(self, left: LeftOut) -> None:
        super().__init__(left.failure.error)
        self.left = left


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample in progress, or all of a video's, which will be left out from `since` on if it fails."""

    video: TrainingVideo
    prompt: int
    since: int

    def fails(self, failure: Failure, blame: Blame = Blame.UNSURE, *, whole: bool = False) -> UselessError:
        """What to raise; `whole`: all samples of its video are of no use."""
        prompt = ALL_PROMPTS if whole else self.prompt
        return UselessError(LeftOut(self.video.id, prompt, self.since, self.video.name, failure, blame))

    def unread(self, found: ReadFailure) -> UselessError:
        """What to raise where its video could not be read."""
        blame = Blame.VIDEO if found.error_type in _OWN_FAULTS else Blame.UNSURE
        if found.transient or found.error_type == _NOT_FOUND:
            blame = Blame.PASSING
        return self.fails(Failure(found.stage, found.error_type, found.error), blame, whole=True)

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
        except Exception as error:
            blame = _blame(error)
            hit = isinstance(error, only) or blame is Blame.MACHINE
            if not hit or (isinstance(error, PromptError) and not self.video.own_prompts):
                raise
            raise self.fails(failure_of(stage, error), blame) from error


def _blame(error: Exception) -> Blame:
    """Whose fault an exception is."""
    if isinstance(error, PromptError | PreprocessError):
        return Blame.VIDEO
    device = isinstance(error, RuntimeError) and any(f"{one} error" in str(error) for one in ("CUDA", "HIP"))
    system = isinstance(error, OSError) and error.errno in _OF_THE_MACHINE
    broken = device or system or isinstance(error, torch.AcceleratorError)
    return Blame.MACHINE if broken else Blame.UNSURE


class Register:
    """The samples that are left out.

    Attributes:
        noted: What is left out in this start, of earlier ones too.
    """

    def __init__(
        self, kept: LeftOuts | None, ranks: Ranks, tell: Callable[[LeftOut], None], samples: int
    ) -> None:
        """`kept`: None where another process keeps it; `tell` hears of each once; `samples`: of the training."""
        self._kept, self._ranks, self._tell = kept, ranks, tell
        self.noted = ranks.first([] if kept is None else kept.left_out())
        self._since = {(one.video, one.prompt): one.since for one in self.noted}
        self._open: list[LeftOut] = []  # failed since a sample could be used
        self._most = max(min(MOST_IN_A_ROW, samples), 1)
        self._folders: set[str] = set()  # in which videos were found

    def has(self, sample: TrainingSample, position: int) -> bool:
        """Say whether a sample is left out at a position."""
        keys = (sample.video.id, sample.prompt), (sample.video.id, ALL_PROMPTS)
        return any(self._since.get(key, position + 1) <= position for key in keys)

    def note(self, found: Sequence[LeftOut], used: Sequence[TrainingVideo]) -> None:
        """Leave these out, and what other processes found; every process calls this, with what could be used, too.

        Raises:
            FatalError: It is no fault of single videos.
        """
        self._folders.update(os.path.dirname(video.name) for video in used)
        shares = self._ranks.share(([self._judged(one) for one in found], bool(used)))
        for one in [one for share, _ in shares for one in share]:
            self._take(one)
        if any(some for _, some in shares):
            self.settle()
        elif len(self._open) >= self._most:
            raise FatalError(
                f"{len(self._open)} samples in a row failed, the last: {_told(self._open[-1])}; fix "
                "that and start again, which tries them again and resumes"
            )

    def _judged(self, one: LeftOut) -> LeftOut:
        """Blame the machine where a folder has vanished that videos were read from."""
        folder = os.path.dirname(one.name)
        gone = one.failure.error_type == _NOT_FOUND and folder in self._folders and not os.path.isdir(folder)
        return one._replace(blame=Blame.MACHINE) if gone else one

    def _take(self, one: LeftOut) -> None:
        if one.blame is Blame.MACHINE:
            raise FatalError(
                f"{_told(one)}: no fault of this video; fix that and start again, which tries it again and resumes"
            )
        key = one.video, one.prompt
        if self._since.get(key, one.since + 1) <= one.since:
            return
        self._since[key] = one.since
        self.noted.append(one)
        self._tell(one)
        if one.blame is not Blame.VIDEO:
            self._open.append(one)
        elif self._kept is not None:
            self._kept.leave_out(one)

    @property
    def settled(self) -> bool:
        """Whether nothing is left out that may have failed for want of the machine."""
        return not self._open

    def settle(self) -> None:
        """Keep what failed while others could be used, but for what may be there again at the next start."""
        for one in self._open:
            if one.blame is Blame.UNSURE and self._kept is not None:
                self._kept.leave_out(one)
        self._open = []


def _told(one: LeftOut) -> str:
    why = one.failure
    return f"{clean(one.name)}: {clean(why.error)} ({why.stage}, {why.error_type})"
