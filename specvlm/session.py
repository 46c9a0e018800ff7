"""One video, several prompts: read, preprocessed, seen by the vision towers and prefilled once.

Each caption is what it would be alone, token for token. Only time is shared, and this file keeps account of it; it
knows nothing of files, models or the loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

from specvlm.captioner import Captioner, CaptionOptions, Job, PreparedVideo, Seen
from specvlm.errors import ConfigError, NonFiniteLogitsError, PromptError
from specvlm.families.base import ModelInputs
from specvlm.records import Caption, CaptionStats, Frames
from specvlm.stats import StageClock

# Stages whose result outlives the caption that ran them, and the statistics that they are part of.
_KEPT = {"tower": "vision_s", "read_video": "target_prefill_s", "read_text": "target_prefill_s"}


@dataclass(slots=True)
class _Work:
    """Work that several captions use.

    Attributes:
        column: The statistics that it is part of.
        seconds: What it took.
        counted: The ways of decoding, True with the draft, that have counted it. A sum over the captions of either
            way is then what this way alone would have taken.
    """

    column: str
    seconds: float
    counted: set[bool] = field(default_factory=set)


class _Account:
    """What of the shared work a caption has to count."""

    def __init__(self, reading_s: float) -> None:
        """`reading_s`: the video's own reading."""
        self._works = {"reading": _Work("video_decode_s", reading_s)}

    def note(self, name: str, column: str, seconds: float) -> None:
        """Some work was done, perhaps anew."""
        self._works[name] = _Work(column, seconds)

    def note_stages(self, clock: StageClock) -> list[str]:
        """Note what a caption did that is kept; -> its names."""
        done = [stage for stage in _KEPT if clock.seconds(stage) > 0.0]
        for stage in done:
            self.note(stage, _KEPT[stage], clock.seconds(stage))
        return done

    def settle(self, stats: CaptionStats, text: str, done: list[str], speculate: bool) -> CaptionStats:
        """Add work that was done before this caption, and that its way of decoding has not counted yet.

        `done` are the works that the caption did itself, and has in its times; `text` is that on its prompt.
        """
        times: dict[str, Any] = {"total_s": stats.total_s}
        for name in ("reading", "pixels", text, *_KEPT):
            work = self._works[name]
            if speculate not in work.counted and name not in done:
                times[work.column] = times.get(work.column, getattr(stats, work.column)) + work.seconds
                times["total_s"] += work.seconds
            work.counted.add(speculate)
        return replace(stats, **times)


class PromptSession:
    """One video to be captioned with any of several prompts; made by `Captioner.session`.

    It holds the video's features and the target's cache, which go when it goes.
    """

    def __init__(
        self,
        captioner: Captioner,
        frames: Frames,
        prompts: Sequence[str],
        system: str | None,
        reading_s: float,
    ) -> None:
        """Preprocess the video with the first prompt that can be used, and only the text of all others.

        Raises:
            PreprocessError: The processor refuses these frames.
        """
        self._captioner = captioner
        self._num_frames, self._source = len(frames.pixels), frames.source
        self._account = _Account(reading_s)
        self._inputs: list[ModelInputs | str] = []  # or why the prompt cannot be used
        first: ModelInputs | None = None
        for index, prompt in enumerate(prompts):
            made = self._prepare(index, frames, prompt, system, first)
            first = first or (made if isinstance(made, ModelInputs) else None)
            self._inputs.append(made)
        longest = max(
            (made.prompt_tokens for made in self._inputs if isinstance(made, ModelInputs)), default=0
        )
        self._seen = Seen(captioner.target, longest)

    def _prepare(
        self, index: int, frames: Frames, prompt: str, system: str | None, first: ModelInputs | None
    ) -> ModelInputs | str:
        family, processor = self._captioner.target.family, self._captioner.processor
        start = time.perf_counter()
        try:
            if first is None:
                made = family.prepare(processor, frames, prompt, system)
            else:
                made = family.prepare_again(processor, first, prompt, system)
        except PromptError as error:
            return str(error)
        elapsed_s = time.perf_counter() - start
        if first is None:
            self._account.note("pixels", "preprocess_s", elapsed_s)
        self._account.note(_text(index), "preprocess_s", elapsed_s if first is not None else 0.0)
        return made

    def caption(
        self,
        index: int,
        *,
        speculate: bool = True,
        time_limit_s: float | None = None,
        estimate: bool = False,
        **options: Unpack[CaptionOptions],
    ) -> Caption:
        """Caption the video with one of the prompts; any of them, in any order, any number of times.

        What several captions use counts in the statistics of the first one that uses it with the draft, and of the
        first one that uses it without, and is 0 in those of all others.

        Args:
            index: Of the prompt, from 0.
            speculate: False decodes plainly: same caption, slower.
            time_limit_s: Give up between two rounds once this much time has passed.
            estimate: Time a few plain steps when the caption is done; see `Captioner.caption`.
            **options: Fields of GenerationSettings and SpeculationSettings.

        Raises:
            ConfigError: There is no such prompt, or an option is unknown or out of range.
            PromptError: The prompt cannot be used.
            GenerationError: No caption came of it. The session goes on.
            GenerationTimeoutError: Not within the time limit. The session goes on.
        """
        began = time.monotonic()
        video = PreparedVideo(self._input(index), self._num_frames, self._source, 0.0, 0.0)
        speculate = speculate and self._captioner.draft is not None
        job = Job(self._captioner, [video], speculate, options, self._seen)
        done: list[str] = []
        try:
            job.finish(began, time_limit_s)
        except NonFiniteLogitsError:
            self._seen.reader.forget()  # NaN behind a mask is NaN all the same
            raise
        finally:
            done = self._account.note_stages(job.clock)
        if estimate:
            job.estimate_plain()
        caption = job.caption(0)
        stats = self._account.settle(caption.stats, _text(index), done, speculate)
        return replace(caption, stats=stats)

    def _input(self, index: int) -> ModelInputs:
        if not 0 <= index < len(self._inputs):
            raise ConfigError(
                f"prompt {index} of a session with {len(self._inputs)}: give 0 to {len(self._inputs) - 1}"
            )
        made = self._inputs[index]
        if isinstance(made, str):
            raise PromptError(made)
        return made


def _text(index: int) -> str:
    return f"text {index}"
