"""Many starts at once on one run folder. Full size: `tests.faults.starts`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import io, kills, signals, starts
from tests.faults.harness import Driver, Tally, place
from tests.faults.starts import Ground


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with place() as folder, Driver() as driver:
        yield Ground(folder, driver, 5)


@pytest.mark.parametrize("kind", starts.ROUNDS)
def test_at_the_same_moment(kind: str, ground: Ground) -> None:
    starts.ROUNDS[kind](ground, Tally())


def test_tables_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """They come at the end of long runs."""
    for module in (io, kills, signals):
        module.show({"a kind": Tally(violations=["broken"])})
        assert "a kind" in capsys.readouterr().out
