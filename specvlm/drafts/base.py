"""The contract of a draft: guess the next tokens of B rows, then hear what became of the guesses.

A draft may be wrong as often as it likes; it can cost time but never change a caption. It shares the target's token
rule, so that it guesses under the same logits processors and noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from specvlm.cache import SlabCache
from specvlm.config import SpeculationSettings
from specvlm.prefill import Features, Prompt
from specvlm.sampling import TokenRule
from specvlm.tree import Guesses, TreeShape
from specvlm.verify import Accepted


class DraftRow(NamedTuple):
    """What a draft is told of one video."""

    prompt: Prompt  # as the target reads it
    scores: torch.Tensor  # float32 [V], the target's attention to each video token
    features: Features | None = None  # of its video, to be used and kept for its further prompts


class DraftJob(NamedTuple):
    """What a draft is to do."""

    rows: Sequence[DraftRow]
    settings: SpeculationSettings
    rule: TokenRule  # the target's
    slots: int  # captions and the nodes of a round take at most so many
    cache: SlabCache  # the target's, which has read the prompts, with the features that were asked for


class Horizon(NamedTuple):
    """How far a round may look, known on the host."""

    longest: int  # index in the caption of the last token, the largest of all rows, or more
    exact: bool  # there is one row, and `longest` is the index of its last token


class Proposer(ABC):
    """A draft at work on the B rows of one job."""

    kept: tuple[int, ...]  # [B], video tokens that it sees
    compressors: tuple[str, ...] | None = None  # [B], what made them of the target's; None: nothing did

    @property
    @abstractmethod
    def host_state(self) -> Hashable:
        """All that `propose` and `commit` depend on beside their arguments, weights, and tensors among the attributes.

        They change nothing but tensors, in place; a round may be recorded and repeated where this is the same.
        """

    @abstractmethod
    def propose(self, shape: TreeShape, root: torch.Tensor, index: torch.Tensor, horizon: Horizon) -> Guesses:
        """Guess what follows.

        Args:
            shape: The tree to fill.
            root: int64 [B], the last token that the target wrote; not yet in any cache.
            index: int64 [B], its index in the caption.
            horizon: How far to look.

        The tree is valid until the next call. Nothing is committed.
        """

    @abstractmethod
    def commit(
        self, shape: TreeShape, guesses: Guesses, accepted: Accepted, index: torch.Tensor, horizon: Horizon
    ) -> None:
        """Keep what the target accepted of `guesses`, whose root has `index` [B]; forget the rest.

        The target's cache, with the features that it keeps, has committed the accepted path before.
        """

    @abstractmethod
    def catch_up(self, captions: Sequence[Sequence[int]], known: Sequence[int]) -> None:
        """Hear of the tokens that the target wrote alone.

        Args:
            captions: Per row, all tokens so far.
            known: Per row, how many of them this draft has heard of, through `commit` or here; 1 at the beginning.
        """


class Draft(ABC):
    """A loaded draft.

    Attributes:
        vocabulary: Tokens that it may guess.
    """

    vocabulary: int

    @abstractmethod
    def method(self, settings: SpeculationSettings) -> str:
        """What captions that are made with it call their method."""

    def settings(self, settings: SpeculationSettings) -> SpeculationSettings:
        """What settings mean for this draft, which may have defaults of its own."""
        return settings

    @abstractmethod
    def begin(self, job: DraftJob, first: Sequence[int]) -> Proposer:
        """Prune, prefill, and be ready to propose. `first`: per row, the first token of its caption."""
