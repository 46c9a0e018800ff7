"""`transformers`' own `generate()` on one prompt or on a batch of them, left-padded as its users do it.

Knows neither captioners nor methods; `benchmarks/throughput.py` runs it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.functional import pad

from specvlm.attention import ATTENTION
from specvlm.families.base import ModelInputs

Clock = Callable[[], float]
Item = TypeVar("Item")
_STOCK = "sdpa"
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")  # [B, S]; all others are of the videos


class Generated(NamedTuple):
    """What one call of `generate()` wrote.

    Attributes:
        token_ids: Of each prompt, up to its end of sequence, which is included.
        prefill_s: Until the first token of all of them.
        steps_s: After it.
        first_tokens: Tokens of a prompt that came first: 1, or those of an assisted round.
    """

    token_ids: list[tuple[int, ...]]
    prefill_s: float
    steps_s: float
    first_tokens: int


def generate(
    model: Any,
    device: torch.device,
    inputs: Sequence[ModelInputs],
    max_new_tokens: int,
    clock: Clock = time.perf_counter,
    **more: Any,
) -> Generated:
    """Run `generate()` once for all inputs: greedy, with its KV cache.

    Args:
        model: The stock model, on stock attention (`stock_attention`).
        device: Where its embeddings are.
        inputs: Prompts whose videos can be stacked (`stackable`).
        max_new_tokens: Most tokens of each caption.
        clock: In seconds.
        **more: Further arguments of `generate()`.
    """
    streamer, began = _FirstTokens(clock), clock()
    ends = _ends(model)
    tensors = left_padded(inputs, next(iter(ends), 0))
    width = tensors["input_ids"].shape[1]
    given = {name: value.to(device) for name, value in tensors.items()}
    out = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer, **more)
    written = [_until_end(row, ends) for row in out[:, width:].tolist()]
    steps_s = clock() - streamer.first_s
    return Generated(written, streamer.first_s - began, steps_s, streamer.first_tokens // len(inputs))


def left_padded(inputs: Sequence[ModelInputs], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """The processors' tensors as one batch: text padded on the left and masked there, videos behind each other."""
    longest = max(one.prompt_tokens for one in inputs)

    def tensor(one: ModelInputs, name: str) -> torch.Tensor:
        found = one.tensors[name]
        if name not in _PER_TOKEN:
            return found
        return pad(found, (longest - found.shape[1], 0), value=pad_id if name == "input_ids" else 0)

    return {name: torch.cat([tensor(one, name) for one in inputs]) for name in inputs[0].tensors}


def batches(items: Iterable[Item], prompt_tokens: Callable[[Item], int], size: int) -> list[list[Item]]:
    """Deal items out to batches of at most `size`, sorted by the length of their prompts, so that little is padded."""
    ordered = sorted(items, key=prompt_tokens)
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def stackable(inputs: Sequence[ModelInputs]) -> Iterator[list[ModelInputs]]:
    """Part a batch where `transformers` takes no mixture: LLaVA-OneVision's videos need the same number of frames."""
    for _, alike in groupby(inputs, key=lambda one: _video_shapes(one.tensors)):
        yield list(alike)


def _video_shapes(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape[1:]) for name, value in tensors.items() if name not in _PER_TOKEN]


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _until_end(tokens: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Cut what `generate()` fills a finished row up with."""
    length = next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tuple(tokens[:length])


class _FirstTokens:
    """A streamer that notes when `generate()` has its first new tokens, and how many they are."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._calls = clock, 0
        self.first_s, self.first_tokens = 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        """The first call is the prompt, the second the first new token, or those of the first round."""
        self._calls += 1
        if self._calls == 2:
            self.first_s, self.first_tokens = self._clock(), value.numel()

    def end(self) -> None:
        """Nothing to flush."""


@contextmanager
def stock_attention(models: list[Any]) -> Iterator[None]:
    """Have loaded models run stock sdpa throughout, and put this library's attention back."""
    for model in models:
        model.set_attn_implementation(_STOCK)
    try:
        yield
    finally:
        for model in models:
            model.set_attn_implementation({"": _STOCK, "text_config": ATTENTION, "vision_config": _STOCK})
