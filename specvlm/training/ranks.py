"""The processes of one training: alone, or several that accelerate has started, which average their gradients.

All of them hold the same weights and take the same steps. What is decided, rank 0 decides; what is shared is small.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)  # a process may wait for another one that captions a long video


class Ranks(Protocol):
    """The processes of a training, as one of them sees them."""

    @property
    def rank(self) -> int:
        """Which one we are, from 0."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def device(self) -> str | None:
        """Where this process should put its models; None: it is free to choose."""

    def share(self, value: T) -> list[T]:
        """Return what each process gave, in order; every process calls it."""

    def first(self, value: T) -> T:
        """Return what rank 0 gave; every process calls it."""

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor with its sum over all processes; every process calls it."""

    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor with that of rank 0; every process calls it."""


class Alone:
    """One process."""

    rank, count = 0, 1
    device: str | None = None

    def share(self, value: T) -> list[T]:
        return [value]

    def first(self, value: T) -> T:
        return value

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        pass


class Launched:
    """One of several processes that `torchrun`, or `accelerate launch --multi_gpu`, started."""

    def __init__(self) -> None:
        """Meet the others."""
        from accelerate import PartialState  # type: ignore[import-untyped]

        self._state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        self.rank, self.count = int(self._state.process_index), int(self._state.num_processes)
        self.device: str | None = str(self._state.device)

    def share(self, value: T) -> list[T]:
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        shared: list[T] = gather_object([value])
        return shared

    def first(self, value: T) -> T:
        from accelerate.utils import broadcast_object_list

        shared: list[T] = broadcast_object_list([value])
        return shared[0]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        from accelerate.utils import reduce

        for tensor in tensors:
            tensor.copy_(reduce(tensor.to(self.device), "sum"))

    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.to(self.device)))


def ranks_of_this_process() -> Ranks:
    """The processes that this one belongs to, as the launcher's variables say."""
    launched = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return Launched() if launched else Alone()
