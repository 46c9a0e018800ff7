"""Which guesses are accepted, in cases that read `draft [1, 2, 3], target [1, 5] -> [1, 5]`."""

from __future__ import annotations

import itertools

import pytest
import torch

from specvlm.tree import Guesses, ancestors_of
from specvlm.verify import accept, ranks_of


def guesses_of(tokens: list[int], parents: list[int]) -> Guesses:
    """A tree from its nodes' tokens and parents; node 0 is the root."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    above = torch.tensor([parents])
    return Guesses(
        torch.tensor([tokens]),
        above,
        torch.tensor([depths]),
        ancestors_of(above, max(depths)),
        torch.zeros(1, len(tokens), dtype=torch.long),
    )


def accepted_tokens(guesses: Guesses, choices: list[int]) -> list[int]:
    """What the caption gains."""
    depth = int(guesses.depths.max())
    result = accept(guesses, torch.tensor([choices]), depth)
    return result.tokens[0, : int(result.guessed) + 1].tolist()


@pytest.mark.parametrize(
    ("draft", "target", "gained"),
    [
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [1, 5, 3, 4], [1, 5]),
        ([1, 2, 3], [9, 2, 3, 4], [9]),
        ([1, 2, 3], [1, 2, 7, 4], [1, 2, 7]),
        ([5], [6, 7], [6]),
        ([5], [5, 7], [5, 7]),
    ],
)
def test_chains(draft: list[int], target: list[int], gained: list[int]) -> None:
    nodes = len(draft) + 1
    chain = guesses_of([0, *draft], [max(i - 1, 0) for i in range(nodes)])
    assert accepted_tokens(chain, target) == gained


def test_a_tree_takes_the_branch_that_the_target_takes() -> None:
    #        0
    #      1   2
    #    3  4    5
    tree = guesses_of([0, 10, 20, 30, 40, 30], [0, 0, 0, 1, 1, 2])
    assert accepted_tokens(tree, [20, 99, 30, 99, 99, 7]) == [20, 30, 7]
    assert accepted_tokens(tree, [10, 40, 99, 99, 8, 99]) == [10, 40, 8]
    assert accepted_tokens(tree, [10, 50, 99, 30, 40, 30]) == [10, 50]
    assert accepted_tokens(tree, [99, 30, 30, 1, 1, 1]) == [99]


def test_a_match_below_a_refused_node_does_not_count() -> None:
    tree = guesses_of([0, 10, 20, 30], [0, 0, 1, 2])
    assert accepted_tokens(tree, [11, 20, 30, 40]) == [11]


def test_paths_name_nodes_in_order_and_rows_are_independent() -> None:
    one = guesses_of([0, 10, 20, 30, 40, 30], [0, 0, 0, 1, 1, 2])
    both = Guesses(*(torch.cat((field, field)) for field in one if field is not None))
    result = accept(both, torch.tensor([[20, 99, 30, 99, 99, 7], [10, 40, 99, 99, 8, 99]]), 2)
    assert result.path.tolist() == [[0, 2, 5], [0, 1, 4]]
    assert result.guessed.tolist() == [2, 2]


def test_against_walking_the_tree_one_token_at_a_time() -> None:
    """All trees of 5 nodes with distinct siblings, against a plain walk."""
    for parents in itertools.product([0], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]):
        tokens = [0, *range(11, 15)]
        tree = guesses_of(tokens, list(parents))
        for choices in itertools.product([11, 12, 13], [12, 13], [13, 14], [14, 9], [9]):
            gained, node = [], 0
            while True:
                gained.append(choices[node])
                below = [i for i in range(1, 5) if parents[i] == node and tokens[i] == choices[node]]
                if not below:
                    break
                node = below[0]
            assert accepted_tokens(tree, list(choices)) == gained


def test_ranks_are_those_of_the_draft_where_a_node_was_expanded() -> None:
    #      0
    #      1 (10)   2 (20)
    #    3 (30), a leaf
    tree = guesses_of([0, 10, 20, 30], [0, 0, 0, 1])
    tree = tree._replace(
        slots=torch.tensor([[0, 1, 0, 0]]), likeliest=torch.tensor([[[10, 20, 5], [30, 6, 7]]])
    )

    def ranks(choices: list[int]) -> list[int]:
        told: list[int] = ranks_of(tree, accept(tree, torch.tensor([choices]), 2))[0].tolist()
        return told

    assert ranks([10, 30, 9, 9]) == [0, 0, -1]  # the leaf was not expanded
    assert ranks([10, 7, 9, 9]) == [0, 2, -1]
    assert ranks([10, 99, 9, 9]) == [0, 3, -1]  # none of the three likeliest
    assert ranks([20, 9, 9, 9]) == [1, -1, -1]  # accepted, but never expanded
    assert ranks([5, 9, 9, 9]) == [2, -1, -1]
