"""A whole set of videos by one method, up to a batch of them at once; and who pays for which part of that time.

A set is read once for all methods. Each method then takes it from frames to text by itself, preprocessing included, so
that what it does at the same time counts. Knows no order of methods and no tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import NamedTuple

import torch

from specvlm.bench.measure import (
    Generate,
    Measured,
    Measurer,
    MethodError,
    VideoFacts,
    of_stats,
    one_line,
    options_of,
    sample_of,
)
from specvlm.bench.records import Configuration, Stages, TimedCaption
from specvlm.bench.stock import batches, stackable
from specvlm.captioner import Captioner, CaptionOptions
from specvlm.errors import ConfigError, SpecvlmError
from specvlm.records import Caption, Frames
from specvlm.stats import peak_memory_bytes, reset_peak_memory


class SetVideo(NamedTuple):
    """One video of a set.

    Attributes:
        facts: Its name is unique in the set.
        frames: What was read of it.
        prompt: What to ask about it.
    """

    facts: VideoFacts
    frames: Frames
    prompt: str


class SetMeasurer(Measurer):
    """Captions whole sets of videos by any method, and times them."""

    def measure_set(self, how: Configuration, videos: Sequence[SetVideo], turn: int) -> list[TimedCaption]:
        """Caption all videos once.

        Raises:
            MethodError: This method cannot.
        """
        reset_peak_memory(self._device)
        by = self._stock_set if how.method in ("stock", "assisted") else self._our_set
        found = by(how, videos, self._of(how))
        peak = peak_memory_bytes(self._device)
        return [sample_of(how, one.facts, turn, made, peak) for one, made in zip(videos, found, strict=True)]

    def _our_set(
        self, how: Configuration, videos: Sequence[SetVideo], captioner: Captioner
    ) -> list[Measured]:
        """`caption_many`, whose stage times are shares already."""
        options: CaptionOptions = {**options_of(how), "max_new_tokens": self._limit}
        captions: dict[int, Caption] = {}
        began = self._clock()
        try:
            for done in captioner.caption_many(
                ((one.frames, one.prompt) for one in videos),
                batch_size=how.batch_size,
                speculate=how.method != "plain",
                **options,
            ):
                if done.error is not None:
                    raise done.error
                assert done.caption is not None
                captions[done.index] = done.caption
        except ConfigError:
            raise  # what was asked for is wrong, not these videos
        except (SpecvlmError, torch.OutOfMemoryError) as error:
            raise MethodError(one_line(error)) from error
        wall_s = self._clock() - began
        return _shared([_of_caption(captions[index]) for index in range(len(videos))], wall_s)

    def _stock_set(
        self, how: Configuration, videos: Sequence[SetVideo], captioner: Captioner
    ) -> list[Measured]:
        """`generate()` on batches sorted by the length of the prompts."""
        found: dict[str, Measured] = {}
        with self._stock(how, captioner) as generate:
            began = self._clock()
            for batch in batches(videos, lambda one: one.facts.prompt_tokens, how.batch_size):
                found |= self._stock_batch(batch, generate, captioner)
            wall_s = self._clock() - began
        return _shared([found[one.facts.name] for one in videos], wall_s)

    def _stock_batch(
        self, batch: Sequence[SetVideo], generate: Generate, captioner: Captioner
    ) -> dict[str, Measured]:
        """One batch; each video with its share of the time that all of it took."""
        began = self._clock()
        inputs = [captioner.prepare(one.frames, one.prompt).inputs for one in batch]
        preprocess_s = (self._clock() - began) / len(batch)
        found: list[Measured] = []
        for part in stackable(inputs):
            written = generate(part)
            steps_s, share = written.steps_s / len(part), written.prefill_s / len(part)
            stages = Stages(preprocess_s=preprocess_s, prefill_s=share, steps_s=steps_s)
            for tokens in written.token_ids:
                captioner.detokenize(tokens)
                count = len(tokens) - written.first_tokens
                found.append(Measured(tokens, stages, steps_s, count, 0.0, mean_batch_size=len(part)))
        return {one.facts.name: made for one, made in zip(batch, found, strict=True)}


def _of_caption(caption: Caption) -> Measured:
    made = of_stats(caption.token_ids, caption.stats, 0.0)
    return replace(made, stages=replace(made.stages, preprocess_s=caption.stats.preprocess_s))


def _shared(found: Sequence[Measured], wall_s: float) -> list[Measured]:
    """Give each caption its part of the wall time: its shares of the stages, and as much of the rest as all others.

    Preprocessing that passed behind other stages took no wall time: so much of it is left out.
    """
    known_s = sum(sum(astuple(one.stages)) for one in found)
    preprocess_s = sum(one.stages.preprocess_s for one in found)
    hidden_s = min(max(known_s - wall_s, 0.0), preprocess_s)
    seen = 1.0 - hidden_s / preprocess_s if hidden_s else 1.0
    rest_s = max(wall_s - known_s, 0.0) / len(found)
    told = []
    for one in found:
        stages = replace(one.stages, preprocess_s=seen * one.stages.preprocess_s)
        told.append(replace(one, stages=stages, wall_s=sum(astuple(stages)) + rest_s))
    return told
