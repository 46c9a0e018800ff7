"""The sample of a `covering` test contains every pair of values, and the rest is marked slow."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.covering import sample

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sizes", [(2, 3, 4), (2, 4, 4, 3, 4), (5, 5), (1, 3, 1), (3,)])
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_its_strength_is_in_the_sample(sizes: tuple[int, ...], strength: int) -> None:
    rows = list(product(*map(range, sizes)))
    chosen = sample(rows, strength)
    assert len(chosen) == len(set(chosen))
    for places in combinations(range(len(sizes)), min(strength, len(sizes))):
        covered = {tuple(row[place] for place in places) for row in chosen}
        assert covered == set(product(*(range(sizes[place]) for place in places)))
    assert sample(rows, strength) == chosen, "the same each time"


def test_a_sample_is_much_smaller_than_all() -> None:
    rows = list(product(*map(range, (2, 4, 4, 3, 4))))
    assert len(sample(rows)) <= 24  # of 384; 16 is the least there can be
    assert len(sample(rows, 1)) == 4
    assert [row[0] for row in sample(rows, 1)].count(0) == 2, "values get turns"


def test_only_combinations_that_occur_count() -> None:
    assert sample([(0, 1), (1, 0)]) == [(0, 1), (1, 0)]
    assert sample([(2, 2)]) == [(2, 2)]


TESTS = """
import pytest

@pytest.mark.covering
@pytest.mark.parametrize(("a", "b"), [(0, "x"), (1, "y")])
@pytest.mark.parametrize("c", range(3))
@pytest.mark.parametrize("d", [True, False])
def test_sampled(a, b, c, d): pass

@pytest.mark.parametrize("c", range(5))
def test_other(c): pass
"""


def collected(folder: Path, *arguments: str) -> list[str]:
    """Return the names of the tests that would run."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_cases_outside_the_sample_are_slow(tmp_path: Path) -> None:
    """Parameters of one `parametrize` count as one; a case selected by its id always runs."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    covering: sampled\n    slow: long\n")
    (tmp_path / "conftest.py").write_text(
        "import pytest\nfrom tests.covering import mark_the_rest\n"
        "@pytest.hookimpl(tryfirst=True)\ndef pytest_collection_modifyitems(items): mark_the_rest(items)\n"
    )
    (tmp_path / "test_it.py").write_text(TESTS)
    everyday, rest = collected(tmp_path, "-m", "not slow"), collected(tmp_path, "-m", "slow")
    assert len([name for name in everyday if "sampled" in name]) == 6
    assert (len(rest), len(everyday)) == (6, 11)
    assert {*everyday, *rest} == set(collected(tmp_path))
    assert collected(tmp_path, "-m", "not slow", rest[0]) == [rest[0]]
