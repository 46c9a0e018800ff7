"""Many starts at once on one run folder. Full size: `tests.faults.starts`."""

from __future__ import annotations

import pytest

from tests.faults import io, kills, signals, starts
from tests.faults.harness import Driver, Tally, place
from tests.faults.starts import Ground


@pytest.mark.parametrize("kind", starts.ROUNDS)
def test_at_the_same_moment(kind: str) -> None:
    with place() as folder, Driver() as driver:
        starts.ROUNDS[kind](Ground(folder, driver, 8), Tally())


def test_tables_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """They come at the end of long runs."""
    for module in (io, kills, signals):
        module.show({"a kind": Tally(violations=["broken"])})
        assert "a kind" in capsys.readouterr().out
