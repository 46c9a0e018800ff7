"""The contract of a draft: guess the next tokens of B rows, then hear what became of the guesses.

A draft may be wrong as often as it likes; it can cost time but never change a caption. It shares the target's token
rule, so that it guesses under the same logits processors and noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from specvlm.config import SpeculationSettings
from specvlm.families.base import ModelInputs
from specvlm.sampling import TokenRule
from specvlm.tree import Guesses, root_only
from specvlm.verify import Accepted


class DraftRow(NamedTuple):
    """What a draft is told of one video."""

    inputs: ModelInputs
    scores: torch.Tensor  # float32 [V], the target's attention to each video token


class Proposer(ABC):
    """A draft at work on the B rows of one job."""

    nodes: int  # N of every tree it proposes, root included
    depth: int  # D
    kept: tuple[int, ...]  # [B], video tokens that it sees

    @abstractmethod
    def propose(self, root: torch.Tensor, index: torch.Tensor, longest: int) -> Guesses:
        """Guess what follows.

        Args:
            root: int64 [B], the last token that the target wrote; not yet in any cache.
            index: int64 [B], its index in the caption.
            longest: The largest index of all rows, known on the host.

        The tree is valid until the next call. Nothing is committed.
        """

    @abstractmethod
    def commit(self, guesses: Guesses, accepted: Accepted, index: torch.Tensor) -> None:
        """Keep what the target accepted of `guesses`, whose root has `index` [B]; forget the rest."""


class Draft(ABC):
    """A loaded draft."""

    @abstractmethod
    def begin(
        self,
        rows: Sequence[DraftRow],
        settings: SpeculationSettings,
        rule: TokenRule,
        max_new_tokens: int,
    ) -> Proposer:
        """Prune, prefill, and be ready to propose for captions of at most `max_new_tokens`."""


class PlainProposer(Proposer):
    """Proposes nothing: the loop then is plain decoding."""

    nodes = 1
    depth = 0

    def __init__(self, rows: int) -> None:
        """For `rows` videos."""
        self.kept = (0,) * rows

    def propose(self, root: torch.Tensor, index: torch.Tensor, longest: int) -> Guesses:
        """The root alone."""
        return root_only(root)

    def commit(self, guesses: Guesses, accepted: Accepted, index: torch.Tensor) -> None:
        """Nothing to keep."""
