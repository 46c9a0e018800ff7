"""One video, several prompts: read, preprocessed, seen by the vision towers and prefilled once.

Each caption is what it would be alone, token for token. Captions made with the draft and captions made plainly share
nothing with each other, so that either way's times are its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from specvlm.batch import CaptionBatch, Kind
from specvlm.captioner import Captioner, CaptionOptions, PreparedVideo
from specvlm.config import whole
from specvlm.errors import ConfigError, PromptError
from specvlm.families.base import ModelInputs
from specvlm.prefill import Begun
from specvlm.records import Caption, Frames


class PromptSession:
    """One video to be captioned with any of several prompts; made by `Captioner.session`.

    It holds what the models know of the video, which goes when it goes.
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
        self._num_frames, self._reading_s = len(frames.pixels), reading_s
        self._prompts: list[PreparedVideo | str] = []  # or why the prompt cannot be used
        self._begun: dict[bool, Begun | None] = {}
        self._pixels_s = 0.0  # of preprocessing the video, with the first prompt that can be used
        # Ways of decoding whose captions have counted what all share; and, with an index, what a prompt has for itself.
        self._counted: set[bool | tuple[bool, int]] = set()
        first: ModelInputs | None = None
        for prompt in prompts:
            made = self._prepare(frames, prompt, system, first)
            first = first or (made.inputs if isinstance(made, PreparedVideo) else None)
            self._prompts.append(made)

    def _prepare(
        self, frames: Frames, prompt: str, system: str | None, first: ModelInputs | None
    ) -> PreparedVideo | str:
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
            self._pixels_s, elapsed_s = elapsed_s, 0.0
        return PreparedVideo(made, self._num_frames, frames.source, self._reading_s, elapsed_s)

    def add_to(
        self, batch: CaptionBatch, key: object, index: int, kind: Kind, *, alone: bool = False
    ) -> None:
        """Queue the sequence of one prompt in a batch; see `CaptionBatch.add`.

        Raises:
            ConfigError: There is no such prompt.
            PromptError: The prompt cannot be used.
        """
        video, begun, first = self._sequence(index, kind)
        batch.add(key, video, kind, begun=begun, first=first, alone=alone)

    def caption(
        self,
        index: int,
        *,
        speculate: bool = True,
        time_limit_s: float | None = None,
        **options: Unpack[CaptionOptions],
    ) -> Caption:
        """Caption the video with one of the prompts; any of them, in any order, any number of times.

        What several captions use counts in the statistics of the first one that is made with the draft, and of the
        first one that is made without; it is 0 in those of all others.

        Args:
            index: Of the prompt, from 0.
            speculate: False decodes plainly: same caption, slower.
            time_limit_s: Give up between two rounds once this much time has passed.
            **options: Fields of GenerationSettings and SpeculationSettings.

        Raises:
            ConfigError: There is no such prompt, or an option is unknown or out of range.
            PromptError: The prompt cannot be used.
            GenerationError: There is no caption. The session can be used further.
            GenerationTimeoutError: Not within the time limit. The session can be used further.
        """
        return self.caption_as(self._captioner.kind(speculate, options), index, time_limit_s)

    def caption_as(self, kind: Kind, index: int, time_limit_s: float | None = None) -> Caption:
        """Caption the video with one of the prompts; see `caption`."""
        began = time.monotonic()
        video, begun, first = self._sequence(index, kind)
        return self._captioner.caption_one(
            video, kind, begun=begun, first=first, began=began, time_limit_s=time_limit_s
        )

    def _sequence(self, index: int, kind: Kind) -> tuple[PreparedVideo, Begun | None, bool]:
        """A prompt with its video, what is known of the video, and whether its reading is still to be counted."""
        whole("index", index)
        if not 0 <= index < len(self._prompts):
            raise ConfigError(
                f"prompt {index} of a session with {len(self._prompts)}: give 0 to {len(self._prompts) - 1}"
            )
        made = self._prompts[index]
        if isinstance(made, str):
            raise PromptError(made)
        way = kind.speculation is not None
        begun = self._begun.setdefault(way, Begun() if len(self._prompts) > 1 else None)
        first, new = way not in self._counted, (way, index) not in self._counted
        self._counted |= {way, (way, index)}
        preprocess_s = first * self._pixels_s + new * made.preprocess_s
        return replace(made, preprocess_s=preprocess_s), begun, first
