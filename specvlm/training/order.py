"""Which sample is learned from when: a function of seed and position alone. Knows no videos and no weights.

A position counts the samples from the beginning of the training, over all epochs. A step never reaches over the end
of an epoch, so a training of more epochs begins with the same steps as one of fewer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from specvlm.training.settings import Schedule


class SampleTurn(NamedTuple):
    """One sample's turn."""

    position: int  # from the beginning of the training
    sample: int  # which one, 0..count - 1


class Order:
    """The order of `count` samples."""

    def __init__(self, count: int, accumulate: int, seed: int) -> None:
        """`accumulate`: samples of a step."""
        self.count, self._accumulate, self._seed = count, accumulate, seed
        self.steps_per_epoch = -(-count // accumulate)
        self._epoch, self._shuffled = -1, list[int]()

    def total_steps(self, schedule: Schedule) -> int:
        """Steps of a training."""
        steps = schedule.epochs * self.steps_per_epoch
        return steps if schedule.max_steps is None else min(steps, schedule.max_steps)

    def places(self, step: int) -> list[SampleTurn]:
        """The samples of a step, which is counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, shuffled(self.count, self._seed, epoch)
        first = index * self._accumulate
        chosen = self._shuffled[first : first + self._accumulate]
        return [SampleTurn(epoch * self.count + first + i, sample) for i, sample in enumerate(chosen)]

    def places_of(self, steps: range, rank: int, ranks: int) -> Iterator[SampleTurn]:
        """The samples that one of several processes learns from, in order."""
        own = Order(self.count, self._accumulate, self._seed)  # another epoch than ours may be asked for
        for step in steps:
            yield from own.places(step)[rank::ranks]


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..count - 1, by the hash of seed, epoch and number."""
    return sorted(
        range(count), key=lambda number: hashlib.sha256(f"order {seed} {epoch} {number}".encode()).digest()
    )


def noise_seed(seed: int, position: int) -> int:
    """Seed of all random numbers that learning from the sample at a position draws."""
    digest = hashlib.sha256(f"noise {seed} {position}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
