"""Input/output that fails, small disks, held and damaged ledgers. Full size: `tests.faults.io`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.drive import Fault
from tests.faults import io
from tests.faults.harness import Driver, Tally, place
from tests.faults.io import Full, Ground, Series, State

pytestmark = pytest.mark.skipif(
    io.compiler() is None, reason="the shim that lets operations fail needs a C compiler"
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with place() as folder:
        yield folder


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    with Driver(LD_PRELOAD=str(io.compiled(folder))) as driver:
        yield driver


@pytest.fixture(scope="module")
def ground(folder: Path, driver: Driver) -> Ground:
    return Ground(folder / "ground", driver)


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        (Series("first", ("write",), errno.ENOSPC), (8, 90)),
        (Series("first", ("write",), errno.ENOSPC, for_ever=True), (60,)),
        (Series("first", ("write",), errno.EDQUOT), (20,)),
        (Series("first", ("sync",), errno.EIO), (2, 12)),
        (Series("first", ("rename",), errno.EACCES), (2, 3)),
        (Series("first", ("create",), errno.EACCES), (1, 6)),
        (Series("again", ("unlink",), errno.EIO), (1,)),
        (Series("overwrite", ("write",), errno.EIO), (10,)),
    ],
    ids=lambda value: value.kind if isinstance(value, Series) else "",
)
def test_nth_operation_fails(what: Series, numbers: tuple[int, ...], ground: Ground) -> None:
    for nth in numbers:
        tally = Tally()
        assert io._one(ground, what, nth, tally), f"there is no {nth}th"
        assert not tally.counts["unnamed"], tally.counts


def test_the_shim_hits_what_it_is_asked_to(ground: Ground) -> None:
    """Without this, a shim that does nothing would make every test here pass."""
    trial = ground.trial()
    report = trial.folder / "report"
    fault = Fault(str(trial.out), ("rename",), errno.EIO, 1, report=str(report))
    assert trial.run(trial.order(fault=fault)) == 1
    assert "Input/output error" in trial.said()
    assert report.read_text() == "1"


def test_full_disk(folder: Path, driver: Driver) -> None:
    if reason := io.can_mount(folder):
        pytest.skip(reason)
    io.run_full(folder, driver, Full(1, 700))


@pytest.mark.parametrize(
    "what",
    [
        *(State(f"ledger {how}", 0) for how in io.DAMAGE),
        State("ledger held, EXCLUSIVE for ever", 0),
        State("ledger held, DEFERRED for 1 s", 0),
        State("run.json torn", 4),
    ],
    ids=lambda what: what.kind,
)
def test_held_or_damaged(what: State, ground: Ground) -> None:
    io.run_state(ground, what)
