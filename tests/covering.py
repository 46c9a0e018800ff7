"""Tests with many parameters: everyday runs take a sample of the combinations, the rest are marked `slow`.

Put `@pytest.mark.covering` over the `parametrize` marks of a test. The sample contains every pair of values of two
parameters; with `strength=1`, every value. It is the same in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest

Row = tuple[Hashable, ...]  # which value each parameter has


def mark_the_rest(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of `covering` tests that are not in the sample as slow."""
    tests: dict[Any, dict[Row, pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering") is not None:
            tests.setdefault(item.nodeid.partition("[")[0], {})[_row(item)] = item
    for cases in tests.values():
        asked = next(iter(cases.values())).get_closest_marker("covering")
        assert asked is not None
        for row in cases.keys() - sample(list(cases), **asked.kwargs):
            cases[row].add_marker(pytest.mark.slow)


def _row(case: Any) -> Row:
    """Return which values a case has; parameters of one `parametrize` mark count as one."""
    marks = [mark.args[0] for mark in case.iter_markers("parametrize")]
    together = [names.split(",") if isinstance(names, str) else names for names in marks]
    return tuple(tuple(id(case.callspec.params[name.strip()]) for name in names) for names in together)


def sample(rows: Sequence[Row], strength: int = 2) -> list[Row]:
    """Choose rows that contain every combination of `strength` values that occurs in any row.

    Greedy: the next row is the one with the most missing combinations; among equals, the one whose values were chosen
    least often so far, then the first.
    """
    places = list(combinations(range(len(rows[0])), min(strength, len(rows[0]))))
    brought = {row: {(place, *(row[i] for i in place)) for place in places} for row in rows}
    missing = set().union(*brought.values())
    used: Counter[tuple[int, Hashable]] = Counter()
    chosen = []
    while missing:
        best = max(
            brought, key=lambda row: (len(brought[row] & missing), -sum(used[it] for it in enumerate(row)))
        )
        chosen.append(best)
        missing -= brought[best]
        used.update(enumerate(best))
    return chosen
