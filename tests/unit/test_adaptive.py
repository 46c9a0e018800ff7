"""Adaptive speculation in made-up worlds, where the best tree is known: does it find it, and what does finding cost?"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from specvlm.adaptive import (
    Acceptance,
    AdaptiveTree,
    Bounds,
    Learned,
    best_tree,
    likeliest_nodes,
    widths_of,
)
from specvlm.choosing import Heard
from specvlm.costs import CostStore, RoundCosts, cost_file
from specvlm.tree import ROOT, STATIC_PATHS, StaticShape, TreeShape

CPU = torch.device("cpu")


@dataclass
class World:
    """A target and a draft that are nothing but times and chances.

    `shares`: chance of each rank at any depth; a plain step takes 1.
    """

    shares: tuple[float, ...]
    level_s: float = 0.1
    level_node_s: float = 0.01
    verify_s: float = 1.0
    node_s: float = 0.03
    noise: float = 0.05
    seed: int = 0
    spent_s: float = 0.0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def seconds(self, widths: tuple[int, ...], nodes: int) -> tuple[float, float]:
        draft_s = sum(self.level_s + self.level_node_s * (width - 1) for width in widths)
        return draft_s, self.verify_s + self.node_s * (nodes - 1)

    def round(self, shape: TreeShape, paths: frozenset[tuple[int, ...]]) -> Heard:
        path: tuple[int, ...] = ()
        ranks = [-1] * (shape.depth + 1)
        while shape.depth:
            rank = self.random.choices(range(5), [*self.shares, 1 - sum(self.shares)])[0]
            if any(len(p) == len(path) + 1 and p[:-1] == path for p in paths):
                ranks[len(path)] = rank
            if (*path, rank) not in paths:
                break
            path = (*path, rank)
        wobble = 1.0 + self.noise * self.random.uniform(-1, 1)
        draft_s, verify_s = (s * wobble for s in self.seconds(shape.widths, shape.nodes))
        self.spent_s += draft_s + verify_s
        times = {"draft": draft_s, "verify": verify_s, "commit": 0.0, "round": draft_s + verify_s}
        return Heard(shape, [[len(path), *[7] * (shape.depth + 1), *ranks]], times)


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
    costs: RoundCosts,
    count: int,
    tokens: int = 80,
    prefill_s: float = 0.5,
) -> int:
    """Caption so many videos of so many tokens; -> tokens written, those beyond the end in the last rounds too."""
    all_written = 0
    for _ in range(count):
        chooser = AdaptiveTree(learned, costs, 256, CPU, Bounds())
        written, begun = 1, False
        while written < tokens:
            shape = chooser.choose()
            if shape.depth and not begun:
                begun = True
                world.spent_s += prefill_s
                chooser.draft_began(prefill_s)
            heard = world.round(shape, paths_of(shape))
            written += heard.rows[0][0] + 1
            chooser.hear(heard)
        chooser.ended(tokens)
        all_written += written - 1
    return all_written


def expected_rate(world: World, paths: frozenset[tuple[int, ...]]) -> float:
    """Tokens per second of a fixed tree."""
    value = {(): 1.0}
    for path in sorted(paths, key=len):
        value[path] = value[path[:-1]] * world.shares[path[-1]]
    return sum(value.values()) / sum(world.seconds(widths_of(sorted(paths)), len(paths) + 1))


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
    learned, costs = Learned(), RoundCosts()
    captions(world, learned, costs, 10, prefill_s=0.0)
    world.spent_s = 0.0
    written = captions(world, learned, costs, 40, prefill_s=0.0)
    assert written / world.spent_s > 0.97 * best


@pytest.mark.parametrize("level_s", [0.05, 0.4])
@pytest.mark.parametrize("tokens", [80, 20])
def test_a_draft_that_is_never_right_costs_no_two_percent(level_s: float, tokens: int) -> None:
    """Learning this included, and on a machine that nothing is known of."""
    world = World((0.0, 0.0, 0.0, 0.0), level_s=level_s)
    captions(world, Learned(), RoundCosts(), 100 * 80 // tokens, tokens)
    plain_s = 100 * 80 // tokens * (tokens - 1)
    assert plain_s / world.spent_s > 0.98


def test_a_busy_machine_does_not_make_a_useless_draft_look_good() -> None:
    """Slow moments come and go, for plain steps and trees alike."""
    world = World((0.0, 0.0, 0.0, 0.0), noise=0.0)
    learned, costs = Learned(), RoundCosts()
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
    learned, costs = Learned(), RoundCosts()
    captions(world, learned, costs, 60)
    assert not learned.pays
    world.shares, world.spent_s = (0.9, 0.05, 0.0, 0.0), 0.0
    captions(world, learned, costs, 60)
    assert learned.pays
    assert 60 * 79 / world.spent_s > 1.5


def test_a_draft_whose_prefill_takes_longer_than_it_saves_is_left_alone() -> None:
    world = World((0.8, 0.1, 0.05, 0.0))
    learned, costs = Learned(), RoundCosts()
    captions(world, learned, costs, 100, tokens=10, prefill_s=30.0)
    assert not learned.pays
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
    prices = costs.prices(64)
    assert prices is not None
    plan = best_tree([world.shares] * 16, prices, Bounds())
    assert plan.seconds == pytest.approx(sum(world.seconds(widths_of(plan.paths), len(plan.paths) + 1)))
    assert plan.rate == pytest.approx(expected_rate(world, frozenset(plan.paths)))
    everything = [expected_rate(world, chain(d)) for d in range(1, 17)]
    assert plan.rate >= max(*everything, expected_rate(world, frozenset(STATIC_PATHS)))


def test_bounds_are_kept() -> None:
    world = World((0.95, 0.02, 0.01, 0.01), node_s=0.001, noise=0.0)
    learned, costs, bounds = Learned(), RoundCosts(), Bounds(depth=3, nodes=4)
    chooser = AdaptiveTree(learned, costs, 256, CPU, bounds)
    assert (chooser.nodes, chooser.slots) == (4, 4)
    for _ in range(60):
        shape = chooser.choose()
        assert shape.depth <= 3
        assert shape.nodes <= 4
        assert shape.slots <= 4
        chooser.hear(world.round(shape, paths_of(shape)))
    assert learned.plan is not None
    assert learned.plan.paths == tuple(sorted(chain(3), key=len))


def test_widths_are_those_of_the_shape() -> None:
    for paths in (STATIC_PATHS, tuple(chain(4)), ((0,), (1,), (0, 0))):
        assert widths_of(paths) == StaticShape(tuple(paths), CPU).widths


def heard(nodes: int, widths: tuple[int, ...], draft_s: float, verify_s: float) -> Heard:
    shape: TreeShape = StaticShape(tuple((0,) * d for d in range(1, nodes)), CPU) if widths else ROOT
    return Heard(shape, [], {"draft": draft_s, "verify": verify_s, "round": draft_s + verify_s + 0.5})


def test_costs_are_medians_and_lines_between_them() -> None:
    costs = RoundCosts()
    assert costs.plain_s() is None
    assert costs.prices(9) is None
    for verify_s in (50.0, 1.0, 1.2, 9.0):  # the first pays what first use costs
        costs.hear(heard(1, (), 0.0, verify_s))
    assert costs.plain_s() == pytest.approx(1.2 + 0.5)
    for _ in range(2):
        costs.hear(heard(5, (1,) * 4, 0.8, 2.0))
    prices = costs.prices(9)
    assert prices is not None
    assert prices.round_s((1,) * 4, 5) == pytest.approx(0.8 + 2.0 + 0.5)
    assert prices.round_s((1,) * 2, 3) == pytest.approx(0.4 + 1.6 + 0.5)  # half way between 1.2 and 2
    assert prices.round_s((1,) * 8, 9) == pytest.approx(1.6 + 2.8 + 0.5)


def test_what_is_larger_says_what_is_smaller_costs_at_most() -> None:
    """Plain steps that were timed in slow moments tell of these moments, not of the machine."""
    costs = RoundCosts()
    for _ in range(2):
        costs.hear(heard(9, (1,) * 8, 0.8, 2.0))
        costs.hear(heard(5, (1,) * 4, 9.0, 70.0))
        costs.hear(heard(1, (), 0.0, 30.0))
    prices = costs.prices(20)
    assert prices is not None
    assert prices.verify_s[1] == prices.verify_s[5] == prices.verify_s[9] == 2.0
    assert prices.plain_s == 2.5
    assert prices.draft_s == {(1,) * 8: 0.8, (1,) * 4: 0.8}


def test_costs_outlive_the_process(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "costs.json"
    store = CostStore(file)
    costs = store.costs(900, 1)
    assert store.costs(600, 1) is costs
    assert store.costs(1025, 1) is not costs
    assert store.costs(900, 2) is not costs
    captions(World((0.8, 0.1, 0.0, 0.0)), Learned(), costs, 3)
    assert file.exists()  # written when the trials were over
    store.write()
    again = CostStore(file).costs(900, 1)
    assert again.as_json() == costs.as_json()
    assert again.settled
    assert not CostStore(file).costs(5000, 1).settled


def kept(**more: str) -> str:
    """A file as it is written, but for some of its JSON."""
    parts = {"verify_s": "{}", "draft_s": "{}", "rest_s": "{}", "trials": "10"} | more
    inner = ", ".join(f'"{name}": {value}' for name, value in parts.items())
    return f'{{"schema": 2, "costs": {{"1x1024": {{{inner}}}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 100_000, '{"schema": 2, "costs": []}', '{"schema": 9, "costs": {}}'),
        kept(verify_s='{"a": 1}'),
        kept(verify_s='{"1": NaN}'),
        kept(verify_s='{"1": -1.0}'),
        kept(verify_s='{"1": %s}' % ("9" * 400)),
        kept(draft_s='{"1,x": 1.0}'),
        kept(trials="Infinity"),
        kept(trials="-1000"),
        kept(trials='"many"'),
    ],
)
def test_a_broken_file_is_no_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    store = CostStore(file)
    assert not store.costs(900, 1).settled
    store.write()
    assert json.loads(file.read_text())["schema"] == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    CostStore(tmp_path / "file" / "costs.json").write()


def test_costs_lie_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_file("x") == tmp_path / "specvlm" / "round-costs-x.json"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cost_file("x") == Path.home() / ".cache" / "specvlm" / "round-costs-x.json"
    monkeypatch.setattr(Path, "home", raise_no_home)
    assert cost_file("x") is None
    assert CostStore(None).costs(9, 1).trials == 0


def raise_no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_processes_that_share_a_file_keep_what_each_has_learned(tmp_path: Path) -> None:
    one, other = CostStore(tmp_path / "costs.json"), CostStore(tmp_path / "costs.json")
    captions(World((0.8, 0.1, 0.0, 0.0)), Learned(), one.costs(100, 1), 3)
    captions(World((0.8, 0.1, 0.0, 0.0)), Learned(), other.costs(8000, 1), 3)
    found = CostStore(tmp_path / "costs.json")
    assert found.costs(100, 1).settled
    assert found.costs(8000, 1).settled


def test_plain_steps_that_are_timed_afterwards_are_no_trials() -> None:
    world, learned, costs = World((0.9, 0.05, 0.0, 0.0)), Learned(), RoundCosts()
    for _ in range(4):
        captions(world, learned, costs, 1, tokens=5)
        for _ in range(8):
            AdaptiveTree(learned, costs, 256, CPU, Bounds()).hear(heard(1, (), 0.0, 1.0))
    assert costs.trials < 10
