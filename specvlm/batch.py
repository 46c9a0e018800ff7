"""Captions in flight: the scheduler and the decoder together, and what happens when memory runs out or a step fails.

`add` sequences, call `step` until none is left. A sequence that fails takes no other one with it.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.decode import CaptionSequence, CaptionText, Decoder
from specvlm.prefill import Begun
from specvlm.pruning import budget_for
from specvlm.records import Caption
from specvlm.scheduler import QueuedSequence, Scheduler
from specvlm.stats import free_memory_bytes, is_out_of_memory, reset_peak_memory

if TYPE_CHECKING:
    from specvlm.captioner import Captioner, PreparedVideo

# Share of the free memory that caches may take; the rest is for the work itself, and on a CPU for everyone else.
MEMORY_SHARE_CPU, MEMORY_SHARE = 0.5, 0.8


def usual_batch_size(device: str) -> int:
    """Most sequences in flight where the caller does not say: more at once have not been seen to help.

    Args:
        device: Kind of the target's device, such as `"cpu"`.
    """
    return 32 if device == "cpu" else 64


class Kind(NamedTuple):
    """What sequences that run together have in common."""

    generation: GenerationSettings
    speculation: SpeculationSettings | None  # None: decoded plainly


class FinishedCaption(NamedTuple):
    """What became of one sequence: a caption, or why there is none."""

    key: Hashable
    caption: Caption | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class _Request:
    """A sequence that waits or runs."""

    video: PreparedVideo
    kind: Kind
    begun: Begun | None
    first: bool  # reading and preprocessing of the video count in this caption


class CaptionBatch:
    """Sequences in flight on one captioner.

    Attributes:
        batch_size: Most sequences in flight; it is lowered for good when memory runs out.
    """

    def __init__(self, captioner: Captioner, batch_size: int | None = None) -> None:
        """`batch_size`: None: as many as memory holds and as help."""
        self._captioner = captioner
        device = captioner.target.device.type
        self._share = MEMORY_SHARE_CPU if device == "cpu" else MEMORY_SHARE
        self._scheduler = Scheduler(usual_batch_size(device) if batch_size is None else batch_size)
        self._requests: dict[Hashable, _Request] = {}
        self._decoder: Decoder | None = None
        self._kind: Kind | None = None

    @property
    def batch_size(self) -> int:
        """Most sequences in flight."""
        return self._scheduler.batch_size

    @property
    def running(self) -> int:
        """Sequences in flight."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for room."""
        return len(self._scheduler.waiting)

    def __len__(self) -> int:
        """Sequences that wait or are in flight."""
        return len(self._scheduler)

    def has_room(self) -> bool:
        """Whether another sequence is needed to fill the batch."""
        return len(self) < self._scheduler.batch_size

    def add(
        self,
        key: Hashable,
        video: PreparedVideo,
        kind: Kind,
        *,
        begun: Begun | None = None,
        first: bool = True,
        alone: bool = False,
    ) -> None:
        """Queue a sequence.

        Args:
            key: Comes back with the caption; no other sequence here has it.
            video: With its prompt.
            kind: How to decode it.
            begun: What is known of the video, shared with its further prompts; None: there are none.
            first: The time of reading and preprocessing counts in this caption.
            alone: No other sequence runs with it.
        """
        assert key not in self._requests
        self._requests[key] = _Request(video, kind, begun, first)
        self._scheduler.add(QueuedSequence(key, kind, self._size_bytes(video, kind), alone))

    def _size_bytes(self, video: PreparedVideo, kind: Kind) -> int:
        """Memory of a sequence's caches, about."""
        captioner, inputs = self._captioner, video.inputs
        slots = kind.generation.max_new_tokens + captioner.nodes(kind)
        size = captioner.target.cache_bytes(inputs.prompt_tokens + slots)
        if kind.speculation is None or captioner.draft is None:
            return size
        dropped = 0
        if kind.speculation.pruner != "none":
            dropped = inputs.video_tokens - budget_for(inputs.video_tokens, kind.speculation.prune_ratio)
        return size + captioner.draft.slot_bytes * (inputs.prompt_tokens - dropped + slots)

    def abort(self, key: Hashable) -> None:
        """Forget a sequence, whether it waits or runs; what it has written is lost."""
        if self._requests.pop(key, None) is None:
            return
        running = key in self._scheduler.running
        self._scheduler.remove(key)
        if running and self._decoder is not None:
            self._decoder.drop([key])
        self._settle()

    def close(self) -> None:
        """Forget all sequences."""
        for key in list(self._requests):
            self.abort(key)

    def text_of(self, key: Hashable) -> Sequence[int]:
        """The tokens that a running sequence has written so far."""
        return () if self._decoder is None else self._decoder.written(key)

    def step(self) -> list[FinishedCaption]:
        """Admit what has room, then one round of all sequences; -> those that have ended, with a caption or an error.

        Raises:
            Exception: The device cannot be used any more, or the step was interrupted; all sequences are lost.
        """
        if not len(self):
            return []
        try:
            ended = self._step()
        except Exception as error:
            ended = self._after_fault(error)
        except BaseException:
            self._lose_all()
            raise
        finished = [self._finished(one) for one in ended]
        self._settle()
        return finished

    def _step(self) -> list[CaptionSequence]:
        self._take_decoder()
        assert self._decoder is not None
        if not self._scheduler.running:
            self._measure_memory()
        admitted = self._scheduler.admit()
        for wave in self._waves(admitted):
            self._decoder.admit([self._sequence(key) for key in wave], self._scheduler.batch_size)
        return self._decoder.step()

    def _take_decoder(self) -> None:
        """The decoder for what runs, or is to run next."""
        kind = self._scheduler.kind
        assert isinstance(kind, Kind)
        if self._decoder is None or kind != self._kind:
            self._give_back()
            self._decoder, self._kind = self._captioner.take_decoder(kind), kind
            reset_peak_memory(self._captioner.target.device)
        self._captioner.refresh(self._decoder, kind)

    def _measure_memory(self) -> None:
        """Nothing runs: see how much memory there is for caches."""
        assert self._decoder is not None
        free = free_memory_bytes(self._captioner.target.device)
        if free is not None:
            self._scheduler.memory_bytes = int(self._share * free) + self._decoder.size_bytes

    def _waves(self, keys: Sequence[Hashable]) -> list[list[Hashable]]:
        """Prompts of one video one after the other, so that the later ones find what the first one left."""
        waves: list[list[Hashable]] = []
        met: dict[int, int] = {}  # how many prompts of a video there were
        for key in keys:
            begun = self._requests[key].begun
            wave = 0 if begun is None else met.get(id(begun), 0)
            if begun is not None:
                met[id(begun)] = wave if begun.complete else wave + 1
            while len(waves) <= wave:
                waves.append([])
            waves[wave].append(key)
        return waves

    def _sequence(self, key: Hashable) -> CaptionSequence:
        request = self._requests[key]
        eos = frozenset(self._captioner.end_tokens(request.kind.generation))
        text = CaptionText(request.kind.generation.max_new_tokens, eos)
        return CaptionSequence(key, request.video.inputs, text, request.begun)

    def _finished(self, sequence: CaptionSequence) -> FinishedCaption:
        request = self._requests.pop(sequence.key)
        self._scheduler.remove(sequence.key)
        if sequence.error is not None:
            return FinishedCaption(sequence.key, None, sequence.error)
        assert self._decoder is not None
        try:
            caption = self._captioner.finished(
                sequence, request.video, request.kind, self._decoder, first=request.first
            )
        except Exception as error:  # those that ended in the same step are not lost with it
            return FinishedCaption(sequence.key, None, error)
        return FinishedCaption(sequence.key, caption, None)

    def _settle(self) -> None:
        """Where nothing is left, let others have the decoder."""
        if not len(self):
            self._give_back()

    def _give_back(self) -> None:
        if self._decoder is not None and self._kind is not None:
            self._captioner.give_back(self._decoder, self._kind)
        self._decoder = self._kind = None

    # --- faults ---

    def _after_fault(self, error: Exception) -> list[CaptionSequence]:
        """A step failed: try those that ran again, fewer at once, or each alone; -> the one to blame, if it is known.

        Raises:
            Exception: `error`, where the device cannot be used any more.
        """
        traceback.clear_frames(error.__traceback__)  # which hold the tensors that are in the way
        if is_poisoned(error):
            self._lose_all()
            raise error
        running = self._scheduler.running
        if self._decoder is not None:
            self._decoder.reset()
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            free_what_can_be_freed()
        if len(running) == 1:
            sequence = self._sequence(running[0])
            sequence.error = error
            return [sequence]
        if not running:
            raise error
        if out_of_memory:
            self._scheduler.preempt(batch_size=len(running) // 2)
            return []
        self._scheduler.preempt(alone=True)
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"a step of {len(running)} sequences failed ({type(error).__name__}: {reason}); each of them is tried "
            "again alone",
            RuntimeWarning,
            stacklevel=2,
        )
        return []

    def _lose_all(self) -> None:
        if self._decoder is not None:
            self._decoder.reset()
        self._scheduler = Scheduler(self._scheduler.batch_size)
        self._requests.clear()
        self._decoder = self._kind = None


def is_poisoned(error: BaseException) -> bool:
    """Whether the device cannot be used any more by this process, as after a failed CUDA kernel."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def free_what_can_be_freed() -> None:
    """Give memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
