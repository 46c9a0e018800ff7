"""Trees grow to the shapes they are named after, from made-up scores."""

from __future__ import annotations

import pytest
import torch

from specvlm.config import SpeculationSettings
from specvlm.tree import STATIC_PATHS, DynamicShape, Frontier, StaticShape, ancestors_of, make_shape

CPU = torch.device("cpu")
VOCABULARY = 50


def path_scores(frontier: Frontier, root: torch.Tensor) -> torch.Tensor:
    """Scores that depend on the whole path and nothing else, so that any mix-up of nodes shows."""
    rows, count = frontier.tokens.shape
    out = torch.empty(rows, count, VOCABULARY)
    for row in range(rows):
        for node in range(count):
            key = hash((int(root[row]), *frontier.path[row, node].tolist())) % (2**31)
            out[row, node] = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(key)) * 3
    return out


def expected_children(root: int, path: tuple[int, ...], count: int) -> list[int]:
    """The `count` best tokens after a path, by the same scores."""
    generator = torch.Generator().manual_seed(hash((root, *path)) % (2**31))
    return torch.randn(VOCABULARY, generator=generator).topk(count).indices.tolist()


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """Each node's tokens from below the root."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in list(zip(tokens, parents, strict=True))[1:]:
        paths.append((*paths[parent], token))
    return paths


def test_the_static_tree_is_the_papers() -> None:
    shape = StaticShape(STATIC_PATHS, CPU)
    assert (shape.nodes, shape.depth) == (26, 5)
    by_depth = [sum(len(path) == depth for path in STATIC_PATHS) for depth in range(1, 6)]
    assert by_depth == [4, 8, 8, 3, 2]
    assert len(set(STATIC_PATHS)) == 25


def test_static_tokens_are_the_ranks_of_their_paths() -> None:
    shape = StaticShape(STATIC_PATHS, CPU)
    root = torch.tensor([7, 8])
    grown = shape.grow(root, lambda frontier: path_scores(frontier, root))
    ranks = [(), *sorted(STATIC_PATHS, key=lambda path: (len(path), path))]
    for row, first in enumerate(root.tolist()):
        paths = paths_of(grown.tokens[row].tolist(), grown.parents[row].tolist())
        for path, rank in zip(paths, ranks, strict=True):
            for depth in range(len(path)):
                assert path[depth] == expected_children(first, path[:depth], 4)[rank[depth]]


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
def test_a_frontier_sees_exactly_its_own_path(tree: str) -> None:
    """Slots are handed out once, and a node looks at the slots of its ancestors and itself."""
    depth = None if tree == "static" else 4
    shape = make_shape(SpeculationSettings(tree=tree, depth=depth), VOCABULARY, CPU)  # type: ignore[arg-type]
    root = torch.tensor([3, 4])
    held: list[dict[int, tuple[int, ...]]] = [{}, {}]

    def expand(frontier: Frontier) -> torch.Tensor:
        for row in range(2):
            for node in range(frontier.tokens.shape[1]):
                path = tuple(frontier.path[row, node].tolist())
                slot = frontier.first_slot + node
                assert slot not in held[row]
                held[row][slot] = path
                slots = (
                    range(slot + 1) if frontier.sees is None else frontier.sees[row, node].nonzero().flatten()
                )
                seen = [held[row][int(i)] for i in slots]
                assert sorted(seen, key=len) == [path[:depth] for depth in range(len(path) + 1)]
                assert int(frontier.tokens[row, node]) == (path[-1] if path else int(root[row]))
        return path_scores(frontier, root)

    grown = shape.grow(root, expand)
    assert max(held[0]) < shape.slots
    for row in range(2):
        paths = paths_of(grown.tokens[row].tolist(), grown.parents[row].tolist())
        for node, path in enumerate(paths):
            has_child = node in grown.parents[row, 1:].tolist()
            if has_child or node == 0:
                assert held[row][int(grown.slots[row, node])] == path


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
def test_a_frontier_knows_its_parents_in_the_frontier_above(tree: str) -> None:
    depth = None if tree == "static" else 4
    shape = make_shape(SpeculationSettings(tree=tree, depth=depth), VOCABULARY, CPU)  # type: ignore[arg-type]
    root = torch.tensor([3, 4])
    frontiers: list[list[list[int]]] = []

    def expand(frontier: Frontier) -> torch.Tensor:
        assert frontier.parents.shape == frontier.tokens.shape
        for row, (paths, parents) in enumerate(zip(frontier.path, frontier.parents, strict=True)):
            for path, parent in zip(paths.tolist(), parents.tolist(), strict=True):
                assert parent == 0 if not frontiers else frontiers[-1][row][parent] == path[:-1]
        frontiers.append(frontier.path.tolist())
        return path_scores(frontier, root)

    shape.grow(root, expand)
    assert [len(paths[0]) for paths in frontiers] == list(shape.widths)


def brute_force(root: int, depth: int, nodes: int, width: int) -> set[tuple[int, ...]]:
    """EAGLE-2's rule in plain Python: expand the best `width` a level, keep the best `nodes`."""
    value: dict[tuple[int, ...], float] = {(): 0.0}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        grown = {}
        for path in frontier:
            generator = torch.Generator().manual_seed(hash((root, *path)) % (2**31))
            steps = (torch.randn(VOCABULARY, generator=generator) * 3).log_softmax(0)
            for token in steps.topk(width).indices.tolist():
                grown[(*path, token)] = value[path] + float(steps[token])
        value |= grown
        frontier = sorted(grown, key=lambda path: -grown[path])[:width]
    best = sorted(value, key=lambda path: -value[path])[:nodes]
    return set(best)


@pytest.mark.parametrize(
    ("depth", "nodes", "width"), [(1, 3, 4), (3, 9, 3), (5, 26, 4), (4, 200, 3), (6, 7, 1)]
)
def test_the_dynamic_tree_keeps_the_likeliest(depth: int, nodes: int, width: int) -> None:
    shape = DynamicShape(depth, nodes, width, CPU)
    root = torch.tensor([5, 6])
    grown = shape.grow(root, lambda frontier: path_scores(frontier, root))
    assert grown.tokens.shape == (2, shape.nodes)
    for row, first in enumerate(root.tolist()):
        paths = paths_of(grown.tokens[row].tolist(), grown.parents[row].tolist())
        assert set(paths) == brute_force(first, shape.depth, shape.nodes, width)
        assert grown.depths[row].tolist() == [len(path) for path in paths]


def test_certain_guesses_keep_their_parents() -> None:
    """With probabilities of 1, child and parent tie; the parent must still come along."""

    def certain(frontier: Frontier) -> torch.Tensor:
        out = torch.full((*frontier.tokens.shape, VOCABULARY), float("-inf"))
        out[..., 9] = 0.0
        return out

    grown = DynamicShape(4, 5, 2, CPU).grow(torch.tensor([1]), certain)
    assert grown.parents.tolist() == [[0, 0, 1, 2, 3]]
    assert grown.tokens.tolist() == [[1, 9, 9, 9, 9]]


def test_ancestors() -> None:
    ancestors = ancestors_of(torch.tensor([[0, 0, 1, 1, 3]]), 3)[0]
    assert [row.nonzero().flatten().tolist() for row in ancestors] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 3],
        [0, 1, 3, 4],
    ]
