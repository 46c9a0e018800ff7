"""Adaptive speculation: each round uses the tree that should write the most tokens per second, or none.

Two things are learned while captions are made. `Acceptance`: how often the target writes the draft's first, second,
... choice, by depth. `RoundCosts`: how long the draft takes for a tree, and the target to check it, on this machine.
From both, the best tree is worked out every few rounds (optimal trees from acceptance by rank: Sequoia, arXiv
2402.12374, section 3.1), and plain decoding where no tree beats it. It knows no model and no device; a choice here
changes how fast a caption is made, never its text.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import NamedTuple

import torch

from specvlm.choosing import Batch, RoundReport, TreeChooser
from specvlm.costs import TRIALS, CostStore, Prices, RoundCosts
from specvlm.tree import ROOT, StaticShape, TreeShape

Path = tuple[int, ...]

RANKS = 4  # choices of the draft that are counted apart; the fifth and later ones are never guessed
MOST_DEPTH = 64  # of any tree that is asked for
_PRIOR = (0.6, 0.12, 0.05, 0.03)  # before anything was seen
_PRIOR_WEIGHT = 2.0
_POOL_WEIGHT = 12.0  # all depths together weigh as much as this many rounds at one depth
_MEMORY = 0.995  # of one round; about two hundred rounds count
_JUDGE_EVERY, _JUDGE_PLAIN_EVERY = 24, 1000  # rounds; nothing new is heard of guesses where there are none
_BETTER = 1.03  # another tree has to promise this much, so that trees do not change all the time
_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)
_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64)
# Trees that are tried first on a machine that nothing is known of: they tell the costs of depth, width and nodes.
_TRIALS = ((3, 4), (3, 4), (0, 1), (0, 1), (6, 7), (6, 7), (3, 12), (3, 12), (0, 1))
assert len(_TRIALS) == TRIALS
_HOPELESS = 0.3  # of the root's most likely guesses are right
_PAYS_AGAIN = 1.1
_RETRY_ROUNDS = 3
_RETRY_SHARE = 0.005  # of all time may go into finding out whether guessing pays again
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of sequences that are judged apart
_PLAIN_FIRST = 20  # rounds with guesses of so many sequences after which a plain step of as many is timed
_PLAIN_AGAIN = 150  # rounds with guesses after which a plain step is timed, for estimates and for the choice


class Acceptance:
    """How often the target writes each of the draft's most likely tokens, by depth; recent rounds count more."""

    def __init__(self) -> None:
        self._counts = [[0.0] * (RANKS + 1) for _ in range(MOST_DEPTH)]
        self._shares: list[tuple[float, ...]] | None = None  # of these counts

    def hear(self, ranks: Sequence[int]) -> None:
        """Ranks by depth of one round of one row, as `ranks_of` gives them; -1 is not known."""
        self._shares = None
        for counts, rank in zip(self._counts, ranks, strict=False):
            if rank >= 0:
                for i in range(RANKS + 1):
                    counts[i] *= _MEMORY
                counts[rank] += 1.0

    def shares(self) -> list[tuple[float, ...]]:
        """For each depth, the shares of ranks 0..RANKS-1 among nodes that were accepted down to there."""
        if self._shares is None:
            self._shares = self._worked_out()
        return self._shares

    def _worked_out(self) -> list[tuple[float, ...]]:
        seen = [sum(column) for column in zip(*self._counts, strict=True)]
        total = sum(seen) + _PRIOR_WEIGHT
        pool = [(seen[rank] + _PRIOR_WEIGHT * _PRIOR[rank]) / total for rank in range(RANKS)]
        return [
            tuple(
                (counts[rank] + _POOL_WEIGHT * pool[rank]) / (sum(counts) + _POOL_WEIGHT)
                for rank in range(RANKS)
            )
            for counts in self._counts
        ]


def likeliest_nodes(shares: Sequence[Sequence[float]], count: int) -> Iterator[tuple[float, Path]]:
    """The nodes that are most likely accepted, most likely first: probability, path of ranks. No root.

    Parents come before their children, and first choices before second ones, so that any number of them is a tree.
    """
    heap: list[tuple[float, int, Path]] = [(-shares[0][0], 1, (0,))]
    for _ in range(count):
        if not heap:
            return
        value, depth, path = heapq.heappop(heap)
        yield -value, path
        last = path[-1]
        if last + 1 < len(shares[depth - 1]) and shares[depth - 1][last] > 0:
            sibling = value * shares[depth - 1][last + 1] / shares[depth - 1][last]
            heapq.heappush(heap, (sibling, depth, (*path[:-1], last + 1)))
        if depth < len(shares):
            heapq.heappush(heap, (value * shares[depth][0], depth + 1, (*path, 0)))


class TreeBounds(NamedTuple):
    """The largest tree that may be used."""

    depth: int = 16
    nodes: int = 64


class TreePlan(NamedTuple):
    """A tree, and what it promises."""

    paths: tuple[Path, ...]
    tokens: float  # expected of a round, the bonus token included
    seconds: float  # expected of a round

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


def widths_of(paths: Sequence[Path]) -> tuple[int, ...]:
    """How many nodes the draft runs at each level of a tree: 1 for the root, then those that have children."""
    inner = {path[:-1] for path in paths}
    depth = max((len(path) for path in inner), default=-1)
    return tuple(sum(len(path) == level for path in inner) for level in range(depth + 1))


def best_tree(shares: Sequence[Sequence[float]], prices: Prices, bounds: TreeBounds) -> TreePlan:
    """The tree that promises the most tokens per second."""
    nodes = list(likeliest_nodes(shares[: bounds.depth], bounds.nodes + bounds.nodes // 2))
    deepest = max(len(path) for _, path in nodes)
    depths = [*(depth for depth in _DEPTHS if depth < deepest), deepest]
    found = (
        _best_size([node for node in nodes if len(node[1]) <= depth], prices, bounds) for depth in depths
    )
    return max(found, key=lambda plan: plan.rate)


def _best_size(nodes: Sequence[tuple[float, Path]], prices: Prices, bounds: TreeBounds) -> TreePlan:
    """The best tree of the first nodes, however many of them."""
    tokens, best, inner = 1.0, (0.0, 1.0, 1.0, 0), set()
    widths = [0] * bounds.depth
    most = min(len(nodes) + 1, bounds.nodes)
    for count, (value, path) in enumerate(nodes[: most - 1], start=2):
        tokens += value
        if path[:-1] not in inner:
            inner.add(path[:-1])
            widths[len(path) - 1] += 1
        if count in _SIZES or count == most:
            seconds = prices.round_s(tuple(width for width in widths if width), count)
            best = max(best, (tokens / seconds, tokens, seconds, count))
    return TreePlan(tuple(path for _, path in nodes[: best[3] - 1]), best[1], best[2])


@dataclass(slots=True)
class Choice:
    """What was found best for some number of sequences in flight.

    Attributes:
        plan: The best tree.
        prices: What it was judged by.
        rounds_to_go: Until it is judged again.
        pays: It was faster than plain decoding.
    """

    plan: TreePlan
    prices: Prices
    rounds_to_go: int
    pays: bool


@dataclass(slots=True)
class Learned:
    """What is known over the captions of one captioner.

    Attributes:
        acceptance: By depth and rank.
        spent_s: Time of all rounds and draft prefills so far.
        lost_s: What guessing cost of it beyond plain decoding, less what it gained since.
        prefill_s: Times of recent draft prefills, of one sequence.
        lengths: Tokens of recent captions.
        choices: What was found best, by sequences in flight.
        guessed: Rounds with guesses so far.
        since_plain: Of these, those since the last plain step.
        rounds_at: Of these, those of so many sequences.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    spent_s: float = 0.0
    lost_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    guessed: int = 0
    since_plain: int = 0
    rounds_at: Counter[int] = field(default_factory=Counter)

    def usual_tokens(self, most: int) -> float:
        """Tokens of a caption, as recent ones have them, but not more than `most`."""
        return min(median(self.lengths), most) if self.lengths else most


@lru_cache(maxsize=128)
def _shape(paths: tuple[Path, ...], device: torch.device) -> StaticShape:
    return StaticShape(paths, device, ranks=RANKS)


class AdaptiveTree(TreeChooser):
    """Chooses for the sequences of one decoder, with what was learned from those before.

    One tree serves all sequences of a round: what differs between sequences is how much of it is accepted.
    """

    def __init__(
        self, learned: Learned, costs: CostStore, most_tokens: int, device: torch.device, bounds: TreeBounds
    ) -> None:
        """`most_tokens`: of a caption."""
        self.nodes = self.slots = bounds.nodes
        self._bounds, self._device = bounds, device
        self._learned, self._store = learned, costs
        self._most_tokens = most_tokens
        self._costs: RoundCosts = costs.costs(1)
        self._retries = 0  # rounds left of a retry
        self._trying = False

    def choose(self, batch: Batch) -> TreeShape:
        """The tree of the next round."""
        self._costs = self._store.costs(batch.prompt_tokens)
        if (trial := self._trial()) is not None:
            return trial
        choice = self._choice(batch)
        if choice is None:
            return _shape(self._first(3, 4), self._device)
        if choice.pays and self._plain_is_due(batch.rows):
            return ROOT
        return _shape(choice.plan.paths, self._device) if choice.pays or self._retry(choice, batch) else ROOT

    def _plain_is_due(self, rows: int) -> bool:
        """Whether to time a plain step, though guessing pays: two at a time, as the first one may be a first use."""
        learned, number = self._learned, _told_apart(rows)
        if learned.since_plain >= _PLAIN_AGAIN:
            return True
        return learned.rounds_at[number] >= _PLAIN_FIRST and not self._costs.knows_plain(number, rows)

    def _trial(self) -> TreeShape | None:
        """A tree whose costs are not known yet, but are needed to know any other's."""
        if self._costs.settled or self._looks_hopeless():
            return None
        self._trying = True
        depth, count = _TRIALS[self._costs.trials]
        return ROOT if depth == 0 else _shape(self._first(depth, count), self._device)

    def _looks_hopeless(self) -> bool:
        """Whether so few guesses were right that further trials would only cost time."""
        if not self._costs.knows_enough:
            return False
        return sum(self._learned.acceptance.shares()[0]) < _HOPELESS

    def _first(self, depth: int, count: int) -> tuple[Path, ...]:
        depth, count = min(depth, self._bounds.depth), min(count, self._bounds.nodes)
        nodes = likeliest_nodes(self._learned.acceptance.shares()[:depth], count - 1)
        return tuple(path for _, path in nodes)

    def _choice(self, batch: Batch) -> Choice | None:
        """What is best for this batch; None: too little is known to say."""
        choice = self._learned.choices.get(_told_apart(batch.rows))
        if choice is not None and choice.rounds_to_go > 0:
            choice.rounds_to_go -= 1
            if batch.new:  # a draft has to be prefilled first
                choice.pays = self._pays(choice, batch, was=choice.pays)
            return choice
        prices = self._costs.prices(batch.rows, self._bounds.nodes)
        if prices is None:
            return None
        shares = self._learned.acceptance.shares()
        best = best_tree(shares, prices, self._bounds)
        held = best if choice is None else _worth(choice.plan, shares, prices)
        judged = Choice(best if best.rate > held.rate * _BETTER else held, prices, 0, True)
        judged.pays = self._pays(judged, batch, was=choice is None or choice.pays)
        soon = 2 + self._learned.guessed // 4  # the first guesses say the most
        judged.rounds_to_go = min(_JUDGE_EVERY, soon) if judged.pays else _JUDGE_PLAIN_EVERY
        self._learned.choices[_told_apart(batch.rows)] = judged
        return judged

    def _pays(self, choice: Choice, batch: Batch, *, was: bool) -> bool:
        """Whether a tree pays in what is to come of these captions."""
        # Plain steps and trees are timed at different moments: what did not pay has to promise more than a trifle.
        usual_s = choice.prices.plain_s / (1.0 if was else _PAYS_AGAIN)
        saved_s = usual_s - choice.plan.seconds / choice.plan.tokens  # by each token of all sequences
        to_come = max(self._learned.usual_tokens(self._most_tokens) - batch.written, 1.0)
        return saved_s * to_come > self._prefill_to_come_s(batch)

    def _prefill_to_come_s(self, batch: Batch) -> float:
        """What the draft's prefill of the sequences that it has not begun with will take."""
        return batch.new * median(self._learned.prefill_s) if self._learned.prefill_s else 0.0

    def _retry(self, choice: Choice, batch: Batch) -> bool:
        """Whether to guess for a few rounds though it did not pay when last tried."""
        learned = self._learned
        if self._retries:
            return True
        cost_s = _RETRY_ROUNDS * choice.plan.seconds + self._prefill_to_come_s(batch)
        if learned.lost_s + cost_s > _RETRY_SHARE * learned.spent_s:
            return False
        self._retries = _RETRY_ROUNDS
        return True

    def hear(self, report: RoundReport) -> None:
        """Learn from a round."""
        learned, depth = self._learned, report.shape.depth
        seconds = self._costs.hear(report)
        self._costs.trials += self._trying
        self._trying = False
        learned.spent_s += seconds
        learned.since_plain = learned.since_plain + 1 if depth or learned.since_plain == _PLAIN_AGAIN else 0
        if depth and report.accepted:
            learned.guessed += 1
            learned.rounds_at[_told_apart(report.rows)] += 1
            for row in report.accepted:
                learned.acceptance.hear(row[depth + 2 :])
            tokens = sum(row[0] + 1 for row in report.accepted) / len(report.accepted)
            self._count_loss(report, seconds - tokens * self._plain_meanwhile_s(report, seconds))

    def _plain_meanwhile_s(self, report: RoundReport, seconds: float) -> float:
        """What a plain step would have taken just when a round of this shape took so long."""
        choice, shape = self._learned.choices.get(_told_apart(report.rows)), report.shape
        if choice is None:
            return self._costs.plain_s(report.rows) or seconds
        return seconds * choice.prices.plain_s / choice.prices.round_s(shape.widths, shape.nodes)

    def _count_loss(self, report: RoundReport, over_s: float) -> None:
        """A round took this much longer than plain decoding of its tokens; what is gained pays for what was lost."""
        self._learned.lost_s = max(0.0, self._learned.lost_s + over_s)
        if self._retries:
            self._retries -= 1
            choice = self._learned.choices.get(_told_apart(report.rows))
            if not self._retries and choice is not None:
                choice.rounds_to_go = 0

    def draft_began(self, seconds: float, sequences: int) -> None:
        """The draft was prefilled for so many sequences."""
        learned = self._learned
        learned.prefill_s = [*learned.prefill_s, seconds / sequences][-9:]
        learned.spent_s += seconds
        learned.lost_s += seconds

    def ended(self, tokens: int) -> None:
        """A caption is done, of so many tokens."""
        self._learned.lengths = [*self._learned.lengths, tokens][-25:]

    def plain_s(self, rows: int) -> float | None:
        """Seconds of a plain step of so many sequences."""
        return self._costs.plain_s(rows)


def _told_apart(rows: int) -> int:
    """The number of sequences whose choice serves so many."""
    return max(number for number in _ROWS if number <= rows)


def _worth(plan: TreePlan, shares: Sequence[Sequence[float]], prices: Prices) -> TreePlan:
    """An older plan by what is known now."""
    chances = (_product(shares[depth][rank] for depth, rank in enumerate(path)) for path in plan.paths)
    return TreePlan(
        plan.paths, 1.0 + sum(chances), prices.round_s(widths_of(plan.paths), len(plan.paths) + 1)
    )


def _product(values: Iterator[float]) -> float:
    out = 1.0
    for value in values:
        out *= value
    return out
