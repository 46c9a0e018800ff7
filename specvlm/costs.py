"""What rounds cost on this machine, measured while captions are made.

A round costs the draft's time for its tree, the target's time to check it, and the rest; each depends on how many
sequences are in flight. Rounds that ran have their own times; others follow from a line through those, corrected by
what was measured nearest to them. It knows no models, only names of what was measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np

from specvlm.choosing import RoundReport

_RECENT = 15  # measurements of one thing that count
_NEWS = 12  # reports after which the fits are made again
_NEAR = 0.05  # how much more what was measured for a round counts than what was measured for others

TRIALS = 9  # rounds of set trees that a machine of which nothing is known begins with

Widths = tuple[int, ...]
Check = tuple[int, int]  # sequences, nodes
Drafting = tuple[int, Widths]  # sequences, nodes that the draft runs at each level
K = TypeVar("K", bound=Hashable)


class _Times:
    """The recent times of one thing, in seconds.

    The first time in a process pays what first use costs: it counts only until there is another one.

    Attributes:
        sure: There is another one.
    """

    __slots__ = ("_count", "_recent")

    def __init__(self) -> None:
        self._count = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, seconds: float) -> None:
        self._count += 1
        if self._count == 2:
            self._recent.clear()
        self._recent.append(seconds)

    @property
    def sure(self) -> bool:
        return self._count > 1

    def value(self) -> float:
        return median(self._recent)


def _sure(times: Mapping[K, _Times]) -> dict[K, _Times]:
    """Those that are more than first times, where there are any."""
    return {key: one for key, one in times.items() if one.sure} or dict(times)


class _Surface:
    """Times of things of some size, for any size: a line that never falls, bent to what was measured nearby."""

    def __init__(self, sizes: Sequence[Sequence[float]], seconds: Sequence[float]) -> None:
        """`sizes`: each is what the time grows with; it is a sum of these with factors of at least 0."""
        self._sizes = np.asarray(sizes, dtype=float)
        self._seconds = np.maximum(np.asarray(seconds, dtype=float), 1e-9)
        self._factors = _factors(self._sizes, self._seconds)
        self._off = np.log(self._seconds / self._line(self._sizes))  # by how much the line is off there
        self._logs = np.log2(np.maximum(self._sizes, 1.0))

    def _line(self, sizes: Any) -> Any:
        return np.maximum(sizes @ self._factors, 1e-9)

    def at(self, sizes: Sequence[Sequence[float]]) -> Any:
        """Seconds of things of these sizes, float64 [n]."""
        wanted = np.asarray(sizes, dtype=float)
        logs = np.log2(np.maximum(wanted, 1.0))
        distance = ((logs[:, None] - self._logs) ** 2).sum(axis=2)
        weight = 1.0 / (_NEAR + distance) ** 2
        return self._line(wanted) * np.exp((weight * self._off).sum(axis=1) / weight.sum(axis=1))


def _factors(sizes: Any, seconds: Any) -> Any:
    """Factors of at least 0 whose sums come nearest to the times, in proportion to these."""
    factors = np.zeros(sizes.shape[1])
    used = list(range(sizes.shape[1]))
    while used:
        found = np.linalg.lstsq(sizes[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        if found.min() >= 0.0:
            factors[used] = found
            break
        used.pop(int(found.argmin()))
    return factors


def _check_size(rows: int, nodes: int) -> tuple[float, ...]:
    """What checking a tree grows with: weights are read once, keys and values per sequence, products per node."""
    return 1.0, float(rows), float(rows * nodes)


def _draft_size(rows: int, widths: Widths) -> tuple[float, ...]:
    """The same of drafting, level by level."""
    return float(len(widths)), float(rows * len(widths)), float(rows * sum(widths))


class Prices(NamedTuple):
    """What rounds of some number of sequences cost, at one moment."""

    plain_s: float  # a plain step
    verify_s: tuple[float, ...]  # by nodes
    draft: _Surface
    rows: int
    rest_s: float

    def round_s(self, widths: Widths, nodes: int) -> float:
        """A round of N nodes whose draft runs `widths` nodes level by level."""
        draft_s = float(self.draft.at([_draft_size(self.rows, widths)])[0])
        return max(draft_s + self.verify_s[nodes] + self.rest_s, 1e-9)


class RoundCosts:
    """Seconds of rounds, for one pair of models on one device and prompts of about one length."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._verify: dict[Check, _Times] = {}
        self._draft: dict[Drafting, _Times] = {}
        self._rest: dict[tuple[int, int], _Times] = {}  # by sequences, and 1 where there were guesses
        self.trials = 0
        self._plain: _Surface | None = None
        self._fitted: tuple[_Surface, _Surface, _Surface] | None = None
        self._news = 0  # reports since then

    def hear(self, report: RoundReport) -> float:
        """Learn from a round; return its seconds."""
        times, shape, rows = report.times_s, report.shape, report.rows
        draft_s, verify_s = times.get("draft", 0.0), times.get("verify", 0.0)
        self._verify.setdefault((rows, shape.nodes), _Times()).add(verify_s)
        if shape.depth:
            self._draft.setdefault((rows, shape.widths), _Times()).add(draft_s)
        whole_s = max(times.get("round", 0.0), draft_s + verify_s)
        rest_s = max(0.0, whole_s - verify_s - (draft_s if shape.depth else 0.0))
        self._rest.setdefault((rows, int(shape.depth > 0)), _Times()).add(rest_s)
        if not shape.depth:
            self._plain = None
        self._news += 1
        return whole_s

    def plain_s(self, rows: int) -> float | None:
        """One plain step of so many sequences; None: none was timed, of any number."""
        if self._plain is None:
            steps = {
                count: times
                for (count, nodes), times in self._verify.items()
                if nodes == 1 and (count, 0) in self._rest
            }
            if not steps:
                return None
            known = _sure(steps)
            seconds = [times.value() + self._rest[count, 0].value() for count, times in known.items()]
            self._plain = _Surface([(1.0, float(count)) for count in known], seconds)
        return float(self._plain.at([(1.0, float(rows))])[0])

    @property
    def knows_enough(self) -> bool:
        """Whether there are prices: a plain step and a round with guesses were timed."""
        guessing = any(kind for _, kind in self._rest)
        return guessing and bool(self._draft) and any((rows, 0) in self._rest for rows, _ in self._rest)

    def knows_plain(self, fewest: int, most: int) -> bool:
        """Whether a plain step of some number of sequences in this range was timed, not for the first time."""
        return any(
            nodes == 1 and fewest <= rows <= most and times.sure
            for (rows, nodes), times in self._verify.items()
        )

    def prices(self, rows: int, most_nodes: int) -> Prices | None:
        """What rounds of so many sequences and up to so many nodes cost, by all that is known now; None: too little.

        What others do on the machine only ever adds to a time, and more nodes never cost less: so nothing is believed
        to cost more than what was measured for something larger.
        """
        plain_s, surfaces = self.plain_s(rows), self._surfaces()
        if plain_s is None or surfaces is None:
            return None
        check, draft, rest = surfaces
        sizes = [_check_size(rows, max(nodes, 1)) for nodes in range(most_nodes + 1)]
        rising = tuple(np.maximum.accumulate(check.at(sizes)).tolist())
        rest_s = float(rest.at([(1.0, float(rows))])[0])
        return Prices(min(plain_s, rising[1] + rest_s), rising, draft, rows, rest_s)

    def _surfaces(self) -> tuple[_Surface, _Surface, _Surface] | None:
        """Of checking, of drafting, and of the rest of rounds with guesses; None: too little is known."""
        if self._fitted is not None and self._news < _NEWS:
            return self._fitted
        rests = _sure({count: times for (count, kind), times in self._rest.items() if kind})
        if not self._draft or not rests:
            return None
        checks, drafts = _least(_sure(self._verify), _reach), _least(_sure(self._draft), _draft_reach)
        self._news = 0
        self._fitted = (
            _Surface([_check_size(*key) for key in checks], list(checks.values())),
            _Surface([_draft_size(*key) for key in drafts], list(drafts.values())),
            _Surface([(1.0, float(count)) for count in rests], [times.value() for times in rests.values()]),
        )
        return self._fitted

    @property
    def settled(self) -> bool:
        """Whether all trials were made."""
        return self.trials >= TRIALS


def _least(times: Mapping[K, _Times], reach: Callable[[K], Sequence[int]]) -> dict[K, float]:
    """For each thing, the least of what was measured for it and for all that it is a part of.

    `reach`: one thing is part of another where none of its numbers is larger.
    """
    seconds = np.array([one.value() for one in times.values()])
    reaches = [list(reach(key)) for key in times]
    numbers = np.zeros((len(reaches), max(map(len, reaches))))
    for row, numbers_of in zip(numbers, reaches, strict=True):
        row[: len(numbers_of)] = numbers_of
    part = (numbers[:, None] <= numbers[None]).all(axis=2)  # [one, other]
    return dict(zip(times, np.where(part, seconds, np.inf).min(axis=1).tolist(), strict=True))


def _reach(check: Check) -> Sequence[int]:
    return check


def _draft_reach(drafting: Drafting) -> Sequence[int]:
    rows, widths = drafting
    return (rows, *widths)


class CostStore:
    """The costs of one pair of models on one device, learned in this process."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._costs: dict[int, RoundCosts] = {}

    def costs(self, prompt_tokens: int) -> RoundCosts:
        """The costs for prompts of about this length: lengths within a factor of two share them."""
        return self._costs.setdefault((prompt_tokens - 1).bit_length(), RoundCosts())
