"""Which tree each round guesses with: the contract, and the trees that never change.

A chooser can make a caption slower or faster, never another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from specvlm.tree import TreeShape


class Heard(NamedTuple):
    """What became of one round."""

    shape: TreeShape
    # per row that goes on: accepted guesses, tokens [D + 1], and if the shape tells them ranks [D + 1]; see `ranks_of`
    rows: Sequence[Sequence[int]]
    times_s: dict[str, float]  # of the stages `draft`, `verify`, `commit`, and of the whole `round`


class TreeChooser(ABC):
    """Chooses the tree of each round of one job.

    Attributes:
        nodes: Most nodes of any tree that it chooses, root included.
        slots: Most slots that a draft needs for one of them.
    """

    nodes: int
    slots: int

    @abstractmethod
    def choose(self) -> TreeShape:
        """The tree of the next round."""

    @abstractmethod
    def hear(self, heard: Heard) -> None:
        """Learn from a round."""

    @abstractmethod
    def draft_began(self, seconds: float) -> None:
        """The draft was prefilled, because a tree was chosen that needs it."""

    @abstractmethod
    def ended(self, tokens: int) -> None:
        """The captions are done, of so many tokens each on average."""


class FixedTree(TreeChooser):
    """The same tree in every round."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape = shape
        self.nodes, self.slots = shape.nodes, shape.slots

    def choose(self) -> TreeShape:
        return self._shape

    def hear(self, heard: Heard) -> None:
        """There is nothing to learn."""

    def draft_began(self, seconds: float) -> None:
        """There is nothing to learn."""

    def ended(self, tokens: int) -> None:
        """There is nothing to learn."""
