"""Which tree each round guesses with: the contract, and the trees that never change.

A chooser can make captions slower or faster, never other ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from specvlm.tree import TreeShape


class Batch(NamedTuple):
    """The sequences that the next round is for."""

    rows: int  # sequences in flight
    new: int  # of them, how many the draft has not begun with
    prompt_tokens: int  # of a prompt, on average
    written: float  # tokens of a caption so far, on average


class RoundReport(NamedTuple):
    """What became of one round."""

    shape: TreeShape
    rows: int  # sequences that took part
    # of each whose logits were finite: accepted guesses, tokens [D + 1], and if the shape has them ranks [D + 1];
    # see `ranks_of`
    accepted: Sequence[Sequence[int]]
    times_s: dict[str, float]  # of the stages `draft`, `verify`, `commit`, and of the whole `round`


class TreeChooser(ABC):
    """Chooses the tree of each round, one for all sequences in flight.

    Attributes:
        nodes: Most nodes of any tree that it chooses, root included.
        slots: Most slots that a draft needs for one of them.
    """

    nodes: int
    slots: int

    @abstractmethod
    def choose(self, batch: Batch) -> TreeShape:
        """The tree of the next round."""

    @abstractmethod
    def hear(self, report: RoundReport) -> None:
        """Learn from a round."""

    @abstractmethod
    def draft_began(self, seconds: float, sequences: int) -> None:
        """The draft was prefilled for so many sequences, because a tree was chosen that needs it."""

    @abstractmethod
    def ended(self, tokens: int) -> None:
        """A caption is done, of so many tokens."""

    def plain_s(self, rows: int) -> float | None:
        """Seconds of a plain step of so many sequences, as measured so far; None: not known."""
        return None


class FixedTree(TreeChooser):
    """The same tree in every round."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape = shape
        self.nodes, self.slots = shape.nodes, shape.slots

    def choose(self, batch: Batch) -> TreeShape:
        return self._shape

    def hear(self, report: RoundReport) -> None:
        """Nothing to learn."""

    def draft_began(self, seconds: float, sequences: int) -> None:
        """Nothing to learn."""

    def ended(self, tokens: int) -> None:
        """Nothing to learn."""
