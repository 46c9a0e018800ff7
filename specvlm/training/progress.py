"""How far a training is, as plain values that a checkpoint holds: the log of evaluations, and sums since the last one.

Nothing of it changes the weights. Knows no files and no videos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Measures(NamedTuple):
    """What learning from one sample showed."""

    loss: float
    cross_entropy: float
    smooth_l1: float
    right: float  # share of the caption's tokens whose most likely guess is the target's
    operator: str  # of the compressor


class Held(NamedTuple):
    """What real decoding with the head showed on one held-out sample."""

    num_drafts: int
    num_accepted_tokens: int


@dataclass
class Window:
    """Sums over samples."""

    samples: int = 0
    loss: float = 0.0
    cross_entropy: float = 0.0
    smooth_l1: float = 0.0
    right: float = 0.0
    operators: Counter[str] = field(default_factory=Counter)

    def add(self, one: Measures) -> None:
        """Count a sample."""
        self.samples += 1
        self.loss += one.loss
        self.cross_entropy += one.cross_entropy
        self.smooth_l1 += one.smooth_l1
        self.right += one.right
        self.operators[one.operator] += 1

    def means(self) -> dict[str, Any]:
        """Means over the samples, None without any; shares of operators."""
        count = self.samples
        names = ("loss", "cross_entropy", "smooth_l1", "right")
        found: dict[str, Any] = {name: getattr(self, name) / count if count else None for name in names}
        return found | {"operators": {name: n / count for name, n in sorted(self.operators.items())}}


@dataclass
class Progress:
    """Of one training.

    Attributes:
        samples: Samples that were learned from, those of further epochs too.
        log: One entry for each evaluation, in order.
        window: Since the last evaluation.
        trained_s: Time spent, over all starts.
    """

    samples: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    window: Window = field(default_factory=Window)
    trained_s: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For a checkpoint."""
        window = vars(self.window) | {"operators": dict(self.window.operators)}
        return {
            "samples": self.samples,
            "log": list(self.log),
            "window": window,
            "trained_s": self.trained_s,
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Progress:
        """Undo `facts`."""
        window = dict(facts["window"])
        window["operators"] = Counter(window["operators"])
        return cls(facts["samples"], list(facts["log"]), Window(**window), facts["trained_s"])

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry of the head that is kept: the last with the highest figure, or the last where none has any."""
        told = [entry for entry in self.log if entry["mean_accepted_tokens"] is not None]
        if not told:
            return self.log[-1] if self.log else None
        # Of equals the last: easy videos are all guessed to the tree's end long before a head has learned all it can.
        best: dict[str, Any] = max(reversed(told), key=lambda entry: entry["mean_accepted_tokens"])
        return best

    def evaluated_at(self, step: int) -> bool:
        """Whether the log has an entry of this step, its last one."""
        return bool(self.log) and self.log[-1]["step"] == step


def mean_accepted_tokens(held: list[Held]) -> float | None:
    """Accepted guesses per round, bonus tokens not counted, over all rounds of all samples; None without rounds."""
    rounds = sum(one.num_drafts for one in held)
    return sum(one.num_accepted_tokens for one in held) / rounds if rounds else None
