"""Adaptive speculation: each round uses the tree that should write the most tokens per second, or none.

Two things are learned while captions are made. `Acceptance`: how often the target writes the draft's first, second,
... choice, by depth. `RoundCosts`: how long the draft takes for a tree, and the target to check it, on this machine.
From both, the best tree is worked out every few rounds (optimal trees from acceptance by rank: Sequoia, arXiv
2402.12374, section 3.1), and plain decoding where no tree beats it. It knows no model and no device; a choice here
changes how fast a caption is made, never its text.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import NamedTuple

import torch

from specvlm.choosing import Heard, TreeChooser
from specvlm.costs import TRIALS, Prices, RoundCosts
from specvlm.tree import ROOT, StaticShape, TreeShape

Path = tuple[int, ...]

RANKS = 4  # choices of the draft that are told apart; the fifth and later ones are never guessed
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
_TRIALS = ((3, 4), (0, 1), (3, 12), (6, 7), (0, 1), (3, 4), (3, 12), (6, 7), (4, 24), (0, 1))
assert len(_TRIALS) == TRIALS
_HOPELESS = 0.3  # of the root's likeliest guesses are right
_PAYS_AGAIN = 1.1
_RETRY_ROUNDS = 3
_RETRY_SHARE = 0.005  # of all time may go into finding out whether guessing pays again


class Acceptance:
    """How often the target writes each of the draft's likeliest tokens, by depth; recent rounds count more."""

    def __init__(self) -> None:
        self._counts = [[0.0] * (RANKS + 1) for _ in range(MOST_DEPTH)]

    def hear(self, ranks: Sequence[int]) -> None:
        """Ranks by depth of one round of one row, as `ranks_of` tells them; -1 is not known."""
        for counts, rank in zip(self._counts, ranks, strict=False):
            if rank >= 0:
                for i in range(RANKS + 1):
                    counts[i] *= _MEMORY
                counts[rank] += 1.0

    def shares(self) -> list[tuple[float, ...]]:
        """For each depth, the shares of ranks 0..RANKS-1 among nodes that were accepted down to there."""
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
    """The nodes that are most likely accepted, the likeliest first: probability, path of ranks. No root.

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


class Bounds(NamedTuple):
    """The largest tree that may be used."""

    depth: int = 16
    nodes: int = 64


class Plan(NamedTuple):
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


def best_tree(shares: Sequence[Sequence[float]], prices: Prices, bounds: Bounds) -> Plan:
    """The tree that promises the most tokens per second."""
    nodes = list(likeliest_nodes(shares[: bounds.depth], bounds.nodes + bounds.nodes // 2))
    deepest = max(len(path) for _, path in nodes)
    depths = [*(depth for depth in _DEPTHS if depth < deepest), deepest]
    found = (
        _best_size([node for node in nodes if len(node[1]) <= depth], prices, bounds) for depth in depths
    )
    return max(found, key=lambda plan: plan.rate)


def _best_size(nodes: Sequence[tuple[float, Path]], prices: Prices, bounds: Bounds) -> Plan:
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
    return Plan(tuple(path for _, path in nodes[: best[3] - 1]), best[1], best[2])


@dataclass(slots=True)
class Learned:
    """What is known over the captions of one captioner.

    Attributes:
        acceptance: By depth and rank.
        spent_s: Time of all rounds and draft prefills so far.
        lost_s: What guessing cost of it beyond plain decoding, less what it gained since.
        prefill_s: Times of recent draft prefills.
        lengths: Tokens of recent captions.
        pays: Guessing was faster than plain decoding when last judged.
        plan: The tree that was best when last judged.
        rounds_to_go: Until the next judgement.
        guessed: Rounds with guesses so far.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    spent_s: float = 0.0
    lost_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    pays: bool = True
    plan: Plan | None = None
    rounds_to_go: int = 0
    guessed: int = 0


@lru_cache(maxsize=128)
def _shape(paths: tuple[Path, ...], device: torch.device) -> StaticShape:
    return StaticShape(paths, device, ranks=RANKS)


class AdaptiveTree(TreeChooser):
    """Chooses for one job, with what was learned from those before."""

    def __init__(
        self, learned: Learned, costs: RoundCosts, most_tokens: int, device: torch.device, bounds: Bounds
    ) -> None:
        """`costs` are those of prompts of about this length; `most_tokens` of a caption."""
        self.nodes = self.slots = bounds.nodes
        self._bounds = bounds
        self._learned, self._costs, self._device = learned, costs, device
        self._most_tokens = most_tokens
        self._written = 1
        self._begun = False
        self._retries = 0  # rounds left of a retry
        self._weighed = False
        self._trying = False
        self._prices: Prices | None = None

    def choose(self) -> TreeShape:
        """The tree of the next round."""
        if (trial := self._trial()) is not None:
            return trial
        if self._learned.rounds_to_go <= 0:
            self._judge()
        elif not self._weighed:
            self._weigh_anew()
        return self._guessing() if self._learned.pays or self._retry() else ROOT

    def _trial(self) -> TreeShape | None:
        """A tree whose costs are not known yet, but are needed to know any other's."""
        if not self._learned.pays:
            return None
        if self._costs.settled or self._looks_hopeless():
            return None
        self._trying = True
        depth, count = _TRIALS[self._costs.trials]
        return ROOT if depth == 0 else _shape(self._first(depth, count), self._device)

    def _looks_hopeless(self) -> bool:
        """Whether so few guesses were right that further trials would only cost time."""
        right = sum(self._learned.acceptance.shares()[0])
        return right < _HOPELESS and self._costs.prices(self._bounds.nodes) is not None

    def _first(self, depth: int, count: int) -> tuple[Path, ...]:
        depth, count = min(depth, self._bounds.depth), min(count, self._bounds.nodes)
        nodes = likeliest_nodes(self._learned.acceptance.shares()[:depth], count - 1)
        return tuple(path for _, path in nodes)

    def _judge(self) -> None:
        """Work out the best tree, and whether it beats plain decoding."""
        learned, prices = self._learned, self._costs.prices(self._bounds.nodes)
        if prices is None:
            return
        shares = learned.acceptance.shares()
        best = best_tree(shares, prices, self._bounds)
        held = best if learned.plan is None else _worth(learned.plan, shares, prices)
        learned.plan = best if best.rate > held.rate * _BETTER else held
        self._weigh(prices, learned.plan)
        soon = 2 + learned.guessed // 4  # the first guesses say the most
        learned.rounds_to_go = min(_JUDGE_EVERY, soon) if learned.pays else _JUDGE_PLAIN_EVERY

    def _weigh_anew(self) -> None:
        """Weigh an earlier caption's tree by what is known now."""
        self._weighed = True
        learned, prices = self._learned, self._costs.prices(self._bounds.nodes)
        if learned.plan is not None and prices is not None:
            learned.plan = _worth(learned.plan, learned.acceptance.shares(), prices)
            self._weigh(prices, learned.plan)

    def _weigh(self, prices: Prices, plan: Plan) -> None:
        """Whether a tree pays in what is to come of this caption."""
        self._weighed = True
        self._prices, learned = prices, self._learned
        # Plain steps and trees are timed at different moments: what did not pay has to promise more than a trifle.
        usual_s = prices.plain_s if learned.pays else prices.plain_s / _PAYS_AGAIN
        saved_s = usual_s - plan.seconds / plan.tokens  # of a token
        learned.pays = saved_s * self._tokens_to_come() > self._prefill_to_come_s()

    def _tokens_to_come(self) -> float:
        usual = median(self._learned.lengths) if self._learned.lengths else self._most_tokens
        return max(min(usual, self._most_tokens) - self._written, 1.0)

    def _prefill_to_come_s(self) -> float:
        """What the draft's prefill will take, or 0 where it is done."""
        if self._begun or not self._learned.prefill_s:
            return 0.0
        return median(self._learned.prefill_s)

    def _guessing(self) -> TreeShape:
        plan = self._learned.plan
        if plan is None:
            return _shape(self._first(3, 4), self._device)
        return _shape(plan.paths, self._device)

    def _retry(self) -> bool:
        """Whether to guess for a few rounds though it did not pay when last tried."""
        learned = self._learned
        if self._retries:
            return True
        assert learned.plan is not None
        cost_s = _RETRY_ROUNDS * learned.plan.seconds + self._prefill_to_come_s()
        if learned.lost_s + cost_s > _RETRY_SHARE * learned.spent_s:
            return False
        self._retries = _RETRY_ROUNDS
        return True

    def hear(self, heard: Heard) -> None:
        """Learn from a round."""
        self._learned.rounds_to_go -= 1
        learned, depth = self._learned, heard.shape.depth
        seconds = self._costs.hear(heard)
        self._costs.trials += self._trying
        self._trying = False
        learned.spent_s += seconds
        tokens = 1.0
        if heard.rows:
            tokens = sum(row[0] + 1 for row in heard.rows) / len(heard.rows)
            self._written += round(tokens)
        if depth:
            learned.guessed += 1
            for row in heard.rows:
                learned.acceptance.hear(row[depth + 2 :])
            self._count_loss(seconds - tokens * self._plain_meanwhile_s(heard.shape, seconds))

    def _plain_meanwhile_s(self, shape: TreeShape, seconds: float) -> float:
        """What a plain step would have taken just when a round of this shape took so long."""
        if self._prices is None:
            return self._costs.plain_s() or seconds
        return seconds * self._prices.plain_s / self._prices.round_s(shape.widths, shape.nodes)

    def _count_loss(self, over_s: float) -> None:
        """A round took this much longer than plain decoding of its tokens; what is gained pays for what was lost."""
        self._learned.lost_s = max(0.0, self._learned.lost_s + over_s)
        if self._retries:
            self._retries -= 1
            if not self._retries:
                self._learned.rounds_to_go = 0

    def draft_began(self, seconds: float) -> None:
        """The draft was prefilled, in so many seconds."""
        self._begun = True
        learned = self._learned
        learned.prefill_s = [*learned.prefill_s, seconds][-9:]
        learned.spent_s += seconds
        learned.lost_s += seconds

    def ended(self, tokens: int) -> None:
        """The captions are done, of so many tokens on average."""
        self._learned.lengths = [*self._learned.lengths, tokens][-25:]
        self._costs.keep()


def _worth(plan: Plan, shares: Sequence[Sequence[float]], prices: Prices) -> Plan:
    """An older plan by what is known now."""
    chances = (_product(shares[depth][rank] for depth, rank in enumerate(path)) for path in plan.paths)
    return Plan(plan.paths, 1.0 + sum(chances), prices.round_s(widths_of(plan.paths), len(plan.paths) + 1))


def _product(values: Iterator[float]) -> float:
    out = 1.0
    for value in values:
        out *= value
    return out
