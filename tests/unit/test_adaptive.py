"""Adaptive speculation in made-up worlds, where the best tree is known: does it find it, and what does finding cost?"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

from specvlm import adaptive
from specvlm.adaptive import (
    Acceptance,
    AdaptiveTree,
    Learned,
    TreeBounds,
    best_tree,
    likeliest_nodes,
    widths_of,
)
from specvlm.choosing import Batch, RoundReport
from specvlm.costs import _NEWS, TRIALS, CostStore, RoundCosts
from specvlm.tree import ROOT, STATIC_PATHS, StaticShape, TreeShape

CPU = torch.device("cpu")
PROMPT = 900  # tokens


@dataclass
class World:
    """A target and a draft that are nothing but times and chances.

    `shares`: chance of each rank at any depth; a plain step of one sequence takes 1. `row_s`: what each further
    sequence adds to a check; its nodes add as much as those of the first one.
    """

    shares: tuple[float, ...]
    level_s: float = 0.1
    level_node_s: float = 0.01
    verify_s: float = 1.0
    node_s: float = 0.03
    row_s: float = 0.0
    noise: float = 0.05
    seed: int = 0
    spent_s: float = 0.0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def seconds(self, widths: tuple[int, ...], nodes: int, rows: int = 1) -> tuple[float, float]:
        draft_s = sum(self.level_s + self.level_node_s * (rows * width - 1) for width in widths)
        return draft_s, self.verify_s + self.row_s * (rows - 1) + self.node_s * (rows * nodes - 1)

    def round(self, shape: TreeShape, paths: frozenset[tuple[int, ...]], rows: int = 1) -> RoundReport:
        wobble = 1.0 + self.noise * self.random.uniform(-1, 1)
        draft_s, verify_s = (s * wobble for s in self.seconds(shape.widths, shape.nodes, rows))
        self.spent_s += draft_s + verify_s
        times = {"draft": draft_s, "verify": verify_s, "commit": 0.0, "round": draft_s + verify_s}
        return RoundReport(shape, rows, [self._row(shape, paths) for _ in range(rows)], times)

    def _row(self, shape: TreeShape, paths: frozenset[tuple[int, ...]]) -> list[int]:
        """What one sequence tells of a round."""
        path: tuple[int, ...] = ()
        ranks = [-1] * (shape.depth + 1)
        while shape.depth:
            rank = self.random.choices(range(5), [*self.shares, 1 - sum(self.shares)])[0]
            if any(len(p) == len(path) + 1 and p[:-1] == path for p in paths):
                ranks[len(path)] = rank
            if (*path, rank) not in paths:
                break
            path = (*path, rank)
        return [len(path), *[7] * (shape.depth + 1), *ranks]


def paths_of(shape: TreeShape) -> frozenset[tuple[int, ...]]:
    """The paths of a static shape, told by the ranks that it picks."""
    if shape.depth == 0:
        return frozenset()
    guesses = shape.grow(
        torch.zeros(1, dtype=torch.long), lambda f: -torch.arange(8.0).expand(1, f.tokens.shape[1], 8)
    )
    tokens, parents = guesses.tokens[0].tolist(), guesses.parents[0].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        paths.append((*paths[parents[node]], tokens[node]))
    return frozenset(paths[1:])


def captions(
    world: World,
    learned: Learned,
    store: CostStore,
    count: int,
    tokens: int = 80,
    prefill_s: float = 0.5,
    rows: int = 1,
) -> float:
    """Caption so many batches of videos, of so many tokens each.

    -> tokens written by a sequence, on average, those beyond the end in the last rounds too.
    """
    all_written = 0.0
    for _ in range(count):
        chooser = AdaptiveTree(learned, store, 256, CPU, TreeBounds())
        written, begun = 1.0, False
        while written < tokens:
            shape = chooser.choose(Batch(rows, 0 if begun else rows, PROMPT, written))
            if shape.depth and not begun:
                begun = True
                world.spent_s += rows * prefill_s
                chooser.draft_began(rows * prefill_s, rows)
            heard = world.round(shape, paths_of(shape), rows)
            written += sum(row[0] + 1 for row in heard.accepted) / rows
            chooser.hear(heard)
        for _ in range(rows):
            chooser.ended(tokens)
        all_written += written - 1
    return all_written


def nothing_known() -> CostStore:
    return CostStore()


def pays(learned: Learned, rows: int = 1) -> bool:
    """Whether guessing was found to pay for so many sequences."""
    return learned.choices[rows].pays


def expected_rate(world: World, paths: frozenset[tuple[int, ...]], rows: int = 1) -> float:
    """Tokens per second of a sequence with a fixed tree."""
    value = {(): 1.0}
    for path in sorted(paths, key=len):
        value[path] = value[path[:-1]] * world.shares[path[-1]]
    return sum(value.values()) / sum(world.seconds(widths_of(sorted(paths)), len(paths) + 1, rows))


def chain(depth: int) -> frozenset[tuple[int, ...]]:
    return frozenset((0,) * d for d in range(1, depth + 1))


def test_likeliest_nodes_are_those_of_a_full_search() -> None:
    shares = [(0.6, 0.2, 0.1), (0.5, 0.3, 0.05), (0.7, 0.1, 0.02)]
    everything = {
        path: torch.tensor([shares[depth][rank] for depth, rank in enumerate(path)], dtype=torch.float64)
        .prod()
        .item()
        for depth in (1, 2, 3)
        for path in itertools.product(range(3), repeat=depth)
    }
    found = list(likeliest_nodes(shares, 20))
    assert [value for value, _ in found] == pytest.approx(sorted(everything.values(), reverse=True)[:20])
    assert all(value == pytest.approx(everything[path]) for value, path in found)
    for count in range(1, 21):  # any number of them is a tree that can be built
        some = {path for _, path in found[:count]} | {()}
        assert all(path[:-1] in some for path in some if path)
        assert all((*path[:-1], rank) in some for path in some if path for rank in range(path[-1]))


def test_acceptance_follows_what_is_heard() -> None:
    acceptance = Acceptance()
    before = acceptance.shares()
    assert before[0] == before[15] == before[63]
    for _ in range(300):
        acceptance.hear([0, 1, -1])
        acceptance.hear([0, 4, -1])
    shares = acceptance.shares()
    assert shares[0][0] > 0.95
    assert shares[1][1] == pytest.approx(0.5, abs=0.05)
    assert shares[1][0] < 0.05
    assert 0.4 < shares[2][0] < 0.6  # nothing was heard of it: like all depths together
    assert all(0 <= sum(row) <= 1 for row in shares)


WORLDS = {
    "a good draft, cheap checks": World((0.9, 0.05, 0.02, 0.01), node_s=0.005),
    "a good draft, dear checks": World((0.9, 0.05, 0.02, 0.01), node_s=0.2),
    "an unsure draft, cheap checks": World((0.45, 0.2, 0.1, 0.08), node_s=0.002),
    "an unsure, dear draft": World((0.45, 0.2, 0.1, 0.08), level_s=0.25, node_s=0.002),
    "a draft that just pays": World((0.35, 0.1, 0.05, 0.02), level_s=0.12, node_s=0.02),
}


@pytest.mark.parametrize("name", WORLDS)
def test_it_is_as_fast_as_the_best_fixed_tree(name: str) -> None:
    world = WORLDS[name]
    fixed = {f"chain {depth}": chain(depth) for depth in range(1, 17)} | {"static": frozenset(STATIC_PATHS)}
    best = max(1.0, *(expected_rate(world, paths) for paths in fixed.values()))
    learned, costs = Learned(), nothing_known()
    captions(world, learned, costs, 10, prefill_s=0.0)
    world.spent_s = 0.0
    written = captions(world, learned, costs, 40, prefill_s=0.0)
    # Up to 3 % are not worth another tree, and plain steps are timed now and then.
    assert written / world.spent_s > 0.96 * best


@pytest.mark.parametrize("level_s", [0.05, 0.4])
@pytest.mark.parametrize("tokens", [80, 20])
def test_a_draft_that_is_never_right_costs_no_two_percent(level_s: float, tokens: int) -> None:
    """Learning this included, and on a machine that nothing is known of."""
    world = World((0.0, 0.0, 0.0, 0.0), level_s=level_s)
    captions(world, Learned(), nothing_known(), 100 * 80 // tokens, tokens)
    plain_s = 100 * 80 // tokens * (tokens - 1)
    assert plain_s / world.spent_s > 0.98


def test_a_busy_machine_does_not_make_a_useless_draft_look_good() -> None:
    """Slow moments come and go, for plain steps and trees alike."""
    world = World((0.0, 0.0, 0.0, 0.0), noise=0.0)
    learned, costs = Learned(), nothing_known()
    captions(world, learned, costs, 20)
    plain_s = spent_s = 0.0
    for moment in range(200):
        factor = (1.0, 12.0, 3.0)[moment % 3]
        slow = World((0.0,) * 4, 0.1 * factor, 0.01 * factor, factor, 0.03 * factor, 0.5, seed=moment)
        captions(slow, learned, costs, 1)
        plain_s += 79 * factor
        spent_s += slow.spent_s
    assert plain_s / spent_s > 0.98


def test_a_draft_that_gets_better_is_found_again() -> None:
    world = World((0.0, 0.0, 0.0, 0.0))
    learned, costs = Learned(), nothing_known()
    captions(world, learned, costs, 60)
    assert not pays(learned)
    world.shares, world.spent_s = (0.9, 0.05, 0.0, 0.0), 0.0
    captions(world, learned, costs, 60)
    assert pays(learned)
    assert 60 * 79 / world.spent_s > 1.5


def test_a_draft_whose_prefill_takes_longer_than_it_saves_is_left_alone() -> None:
    world = World((0.8, 0.1, 0.05, 0.0))
    learned, costs = Learned(), nothing_known()
    captions(world, learned, costs, 100, tokens=10, prefill_s=30.0)
    assert not pays(learned)
    world.spent_s = 0.0
    captions(world, learned, costs, 100, tokens=10, prefill_s=30.0)
    assert world.spent_s < 100 * 9 * 1.03


def test_a_tree_promises_what_it_gives() -> None:
    world = World((0.6, 0.2, 0.1, 0.05), noise=0.0)
    costs = RoundCosts()
    for paths in (chain(3), chain(6), frozenset(STATIC_PATHS)):
        for _ in range(3):
            shape = StaticShape(tuple(paths), CPU, ranks=4)
            costs.hear(world.round(shape, paths))
            costs.hear(world.round(ROOT, frozenset()))
    prices = costs.prices(1, 64)
    assert prices is not None
    plan = best_tree([world.shares] * 16, prices, TreeBounds())
    assert plan.seconds == pytest.approx(sum(world.seconds(widths_of(plan.paths), len(plan.paths) + 1)))
    assert plan.rate == pytest.approx(expected_rate(world, frozenset(plan.paths)))
    everything = [expected_rate(world, chain(d)) for d in range(1, 17)]
    assert plan.rate >= max(*everything, expected_rate(world, frozenset(STATIC_PATHS)))


def test_bounds_are_kept() -> None:
    world = World((0.95, 0.02, 0.01, 0.01), node_s=0.001, noise=0.0)
    learned, bounds = Learned(), TreeBounds(depth=3, nodes=4)
    chooser = AdaptiveTree(learned, nothing_known(), 256, CPU, bounds)
    assert (chooser.nodes, chooser.slots) == (4, 4)
    for _ in range(60):
        shape = chooser.choose(Batch(1, 0, PROMPT, 5.0))
        assert shape.depth <= 3
        assert shape.nodes <= 4
        assert shape.slots <= 4
        chooser.hear(world.round(shape, paths_of(shape)))
    assert learned.choices[1].plan.paths == tuple(sorted(chain(3), key=len))


def test_widths_are_those_of_the_shape() -> None:
    for paths in (STATIC_PATHS, tuple(chain(4)), ((0,), (1,), (0, 0))):
        assert widths_of(paths) == StaticShape(tuple(paths), CPU).widths


def heard(nodes: int, widths: tuple[int, ...], draft_s: float, verify_s: float, rows: int = 1) -> RoundReport:
    shape: TreeShape = StaticShape(tuple((0,) * d for d in range(1, nodes)), CPU) if widths else ROOT
    times = {"draft": draft_s, "verify": verify_s, "round": draft_s + verify_s + 0.5}
    return RoundReport(shape, rows, [], times)


def test_costs_are_medians_and_lines_through_them() -> None:
    costs = RoundCosts()
    assert costs.plain_s(1) is None
    assert costs.prices(1, 9) is None
    for verify_s in (50.0, 1.0, 1.2, 9.0):  # the first pays what first use costs
        costs.hear(heard(1, (), 0.0, verify_s))
    assert costs.plain_s(1) == pytest.approx(1.2 + 0.5)
    for _ in range(2):
        costs.hear(heard(5, (1,) * 4, 0.8, 2.0))
    prices = costs.prices(1, 9)
    assert prices is not None
    assert prices.round_s((1,) * 4, 5) == pytest.approx(0.8 + 2.0 + 0.5, rel=0.02)
    assert prices.round_s((1,) * 2, 3) == pytest.approx(
        0.4 + 1.6 + 0.5, rel=0.1
    )  # half way between 1.2 and 2
    assert prices.round_s((1,) * 8, 9) == pytest.approx(1.6 + 2.8 + 0.5, rel=0.1)
    assert prices.plain_s == pytest.approx(1.2 + 0.5)
    assert sorted(prices.verify_s) == list(prices.verify_s)


def test_costs_of_more_sequences_follow_from_those_of_fewer() -> None:
    """Weights are read once for all of them, keys and values for each, and products grow with the nodes."""
    world, costs = World((0.5, 0.1, 0.0, 0.0), row_s=0.2, noise=0.0), RoundCosts()
    for rows in (1, 2, 8):
        for paths in (chain(2), chain(6), frozenset(STATIC_PATHS)):
            for _ in range(2):
                costs.hear(world.round(StaticShape(tuple(paths), CPU), paths, rows))
        for _ in range(2):
            costs.hear(world.round(ROOT, frozenset(), rows))
    for rows in (1, 4, 8, 16):
        prices = costs.prices(rows, 64)
        assert prices is not None
        assert prices.plain_s == pytest.approx(world.seconds((), 1, rows)[1], rel=0.05)
        for paths in (chain(4), chain(6), frozenset(STATIC_PATHS)):
            widths = widths_of(sorted(paths))
            expected = sum(world.seconds(widths, len(paths) + 1, rows))
            assert prices.round_s(widths, len(paths) + 1) == pytest.approx(expected, rel=0.15), rows
    assert costs.prices(4, 64).plain_s < costs.prices(16, 64).plain_s  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [4, 16])
def test_a_full_batch_gets_a_tree_that_pays_there(rows: int) -> None:
    """Nodes of all sequences cost time together: the tree that is best for one of them is too large for many."""
    world = World((0.8, 0.08, 0.03, 0.01), node_s=0.02, row_s=0.02, level_node_s=0.002)
    learned, costs = Learned(), nothing_known()
    captions(world, learned, costs, 6, prefill_s=0.0)
    captions(world, learned, costs, 10, prefill_s=0.0, rows=rows)
    world.spent_s = 0.0
    written = captions(world, learned, costs, 20, prefill_s=0.0, rows=rows)
    fixed = [chain(depth) for depth in range(1, 17)] + [frozenset(STATIC_PATHS)]
    plain = 1.0 / world.seconds((), 1, rows)[1]
    best = max(plain, *(expected_rate(world, paths, rows) for paths in fixed))
    assert written / world.spent_s > 0.95 * best
    assert len(learned.choices[rows].plan.paths) < len(learned.choices[1].plan.paths)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_useless_draft_costs_a_full_batch_no_two_percent_either(rows: int) -> None:
    world = World((0.0, 0.0, 0.0, 0.0), row_s=0.05)
    captions(world, Learned(), nothing_known(), 100, rows=rows)
    assert 100 * 79 * world.seconds((), 1, rows)[1] / world.spent_s > 0.98


def test_what_is_larger_says_what_is_smaller_costs_at_most() -> None:
    """Plain steps that were timed in slow moments tell of these moments, not of the machine."""
    costs = RoundCosts()
    for _ in range(2):
        costs.hear(heard(9, (1,) * 8, 0.8, 2.0))
        costs.hear(heard(5, (1,) * 4, 9.0, 70.0))
        costs.hear(heard(1, (), 0.0, 30.0))
    prices = costs.prices(1, 20)
    assert prices is not None
    assert prices.verify_s[1] == pytest.approx(2.0, rel=0.05)
    assert prices.verify_s[5] == pytest.approx(2.0, rel=0.05)
    assert prices.verify_s[9] == pytest.approx(2.0, rel=0.05)
    assert prices.plain_s == pytest.approx(2.5, rel=0.05)
    for levels in (4, 8):
        drafted_s = prices.round_s((1,) * levels, levels + 1) - prices.verify_s[levels + 1] - prices.rest_s
        assert drafted_s == pytest.approx(0.8, rel=0.1)


def test_lengths_within_a_factor_of_two_share_their_costs() -> None:
    store = CostStore()
    assert store.costs(600) is store.costs(900)
    assert store.costs(1025) is not store.costs(900)


def test_rounds_that_nobody_asked_for_are_no_trials() -> None:
    """Plain steps after a round that guesses spoiled, say: they are timed all the same."""
    world, learned, costs = World((0.9, 0.05, 0.0, 0.0)), Learned(), nothing_known()
    for _ in range(4):
        captions(world, learned, costs, 1, tokens=3)
        before = costs.costs(PROMPT).trials
        chooser = AdaptiveTree(learned, costs, 256, CPU, TreeBounds())
        for _ in range(8):
            chooser.hear(heard(1, (), 0.0, 1.0))
        assert costs.costs(PROMPT).trials == before < TRIALS
    assert costs.costs(1).plain_s(1) is not None


def test_prompts_of_other_lengths_have_costs_of_their_own() -> None:
    """A batch is judged by the length of its prompts; what is known of short ones says nothing of long ones."""
    learned, costs = Learned(), nothing_known()
    world = World((0.9, 0.05, 0.0, 0.0))
    captions(world, learned, costs, 3)
    assert costs.costs(PROMPT).settled
    chooser = AdaptiveTree(learned, costs, 256, CPU, TreeBounds())
    for _ in range(TRIALS):
        shape = chooser.choose(Batch(1, 0, 20_000, 5.0))
        chooser.hear(world.round(shape, paths_of(shape)))
    assert costs.costs(20_000).trials == TRIALS


def test_plain_steps_are_timed_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where guessing pays too, two plain steps now and then keep estimates and the choice true."""
    monkeypatch.setattr(adaptive, "_PLAIN_AGAIN", 20)
    learned, costs, world = Learned(), nothing_known(), World((0.9, 0.05, 0.0, 0.0))
    captions(world, learned, costs, 5)
    chooser, shapes = AdaptiveTree(learned, costs, 256, CPU, TreeBounds()), []
    for _ in range(110):
        shape = chooser.choose(Batch(1, 0, PROMPT, 5.0))
        shapes.append(shape.depth)
        chooser.hear(world.round(shape, paths_of(shape)))
    assert 6 <= shapes.count(0) <= 12
    assert max(len(list(run)) for depth, run in itertools.groupby(shapes, key=bool) if not depth) == 2


def test_news_are_in_prices_soon() -> None:
    """Fits are made anew after some reports, not with each of them."""
    world, costs = World((0.5, 0.1, 0.0, 0.0), noise=0.0), RoundCosts()
    for _ in range(3):
        costs.hear(world.round(ROOT, frozenset()))
        costs.hear(world.round(StaticShape(tuple(chain(4)), CPU), chain(4)))
    before = costs.prices(1, 9)
    world.verify_s, world.level_s = 5.0, 1.0
    for _ in range(4 * _NEWS):
        costs.hear(world.round(StaticShape(tuple(chain(4)), CPU), chain(4)))
        costs.hear(world.round(ROOT, frozenset()))
    after = costs.prices(1, 9)
    assert before is not None
    assert after is not None
    assert after.round_s((1,) * 4, 5) == pytest.approx(sum(world.seconds((1,) * 4, 5)), rel=0.1)
    assert after.round_s((1,) * 4, 5) > 2 * before.round_s((1,) * 4, 5)


def test_times_that_add_up_to_the_round_leave_nothing_below_nothing() -> None:
    """Rounding may not make the rest of a round negative."""
    costs = CostStore().costs(900)
    for part in range(1, 40):
        times = {"draft": 0.1 * part, "verify": 1.0 / part, "round": 0.0}
        costs.hear(RoundReport(StaticShape(((0,),), CPU), part, [], times))
        costs.hear(RoundReport(ROOT, part, [], times))
    assert min(rest.value() for rest in costs._rest.values()) >= 0.0
