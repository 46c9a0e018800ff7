"""The contract of a draft: guess the next tokens of B sequences, then receive what became of the guesses.

A draft may be wrong as often as it likes; it can cost time but never change a caption. It shares the target's token
rule, so that it guesses under the same logits processors and noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from specvlm.cache import KVCache, Tables
from specvlm.config import SpeculationSettings
from specvlm.model import Lengths, TextModel
from specvlm.prefill import Features, Prompt
from specvlm.sampling import TokenRule
from specvlm.tree import Guesses, TreeShape
from specvlm.verify import Accepted


class DraftRow(NamedTuple):
    """What a draft needs of one sequence to begin."""

    row: int  # of the batch, in the target's cache
    prompt: Prompt  # as the target reads it
    scores: torch.Tensor  # float32 [V], the target's attention to each video token
    first: int  # the first token of its caption
    slots: int  # its caption and the nodes of a round take at most so many
    features: Features | None = None  # of its video, to be used and kept for its further prompts


class DraftRead(NamedTuple):
    """What a draft sees of one sequence's video."""

    kept: int  # video tokens
    compressor: str | None = None  # what made them of the target's; None: nothing did


class Proposer(ABC):
    """A draft at work on the sequences of a batch. Its rows are numbered as the batch's.

    Attributes:
        cache: The draft's own.
    """

    cache: KVCache

    @property
    @abstractmethod
    def rows(self) -> int:
        """B: sequences that it has begun."""

    @abstractmethod
    def add(self, rows: Sequence[DraftRow], most_rows: int = 0) -> list[DraftRead]:
        """Prune, prefill, and be ready to propose for further sequences, whose rows follow those that are there.

        `most_rows`: the most rows that the batch is going to have.
        """

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """From now on the batch is these of its rows, in this order."""

    @abstractmethod
    def follow(self, draft: Draft, rule: TokenRule) -> None:
        """Guess from now on by `rule` what `draft` may guess: what this came of, perhaps with another vocabulary."""

    @property
    def size_bytes(self) -> int:
        """Memory of the draft's cache."""
        return self.cache.size_bytes

    def release(self) -> None:
        """Give back memory that no sequence needs."""
        self.cache.release()

    @property
    def tables(self) -> Tables:
        """What holds the tensors, besides its attributes, that `propose` and `commit` read."""
        return self.cache.tables

    @abstractmethod
    def host_state(self, index: Lengths) -> Hashable:
        """All that `propose` and `commit` depend on besides their tensors, weights, and tensors among the attributes.

        They change nothing but tensors, in place; a round may be recorded and repeated where this is the same.
        """

    @abstractmethod
    def propose(self, shape: TreeShape, root: torch.Tensor, index: Lengths) -> Guesses:
        """Guess what follows.

        Args:
            shape: The tree to fill.
            root: int64 [B], the last token that the target wrote; not yet in any cache.
            index: Its index in each caption.

        The tree is valid until the next call. Nothing is committed.
        """

    @abstractmethod
    def commit(self, shape: TreeShape, guesses: Guesses, accepted: Accepted, index: Lengths) -> None:
        """Keep what the target accepted of `guesses`, whose root has this index in each caption; forget the rest.

        The target's cache, with the features that it keeps, has committed the accepted path before.
        """

    @abstractmethod
    def catch_up(self, captions: Sequence[Sequence[int]], known: Sequence[int]) -> None:
        """Read the tokens that the target wrote alone.

        Args:
            captions: Of each row, all tokens so far.
            known: Of each row, how many of them this draft has read, through `commit` or here; 1 at the beginning.
        """


class Draft(ABC):
    """A loaded draft.

    Attributes:
        vocabulary: Tokens that it may guess.
        text: The decoder that it runs.
    """

    vocabulary: int
    text: TextModel

    @abstractmethod
    def method(self, settings: SpeculationSettings) -> str:
        """What captions that are made with it call their method."""

    def settings(self, settings: SpeculationSettings) -> SpeculationSettings:
        """What settings mean for this draft, which may have defaults of its own."""
        return settings

    @abstractmethod
    def proposer(self, settings: SpeculationSettings, rule: TokenRule, cache: KVCache) -> Proposer:
        """A draft at work, with no sequence yet.

        Args:
            settings: How it guesses.
            rule: The target's.
            cache: The target's, with the features that were asked for.
        """

    @property
    @abstractmethod
    def slot_bytes(self) -> int:
        """Memory that the draft's cache takes for one token."""
