"""What the ledger makes of videos that were running when a whole start was killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from specvlm_cli.inputs import Inputs
from specvlm_cli.run.ledger import MOST_CRASHES, Ledger
from specvlm_cli.run.wanted import WantedVideos


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger in which ten videos are to be done."""
    for number in range(10):
        (tmp_path / f"{number}.mp4").write_text("video")
    with WantedVideos.gather(Inputs([str(tmp_path)])) as wanted, Ledger.in_memory() as made:
        made.want(wanted)
        made.register()
        yield made


def crash(ledger: Ledger, *running: int) -> None:
    """Claim videos, by their place, and have the process killed."""
    claims = {claim.ordinal: claim for claim in [*ledger.pending(-1, 10), *ledger.suspects(None)]}
    for ordinal in running:
        ledger.claim(claims[ordinal])
    ledger.recover(crashed=True)


def test_of_many_that_were_running_none_fails(ledger: Ledger) -> None:
    for _ in range(5 * MOST_CRASHES):
        crash(ledger, *range(1, 9))
    assert ledger.counts() == {"pending": 10, "running": 0, "done": 0, "failed": 0}


def test_who_was_there_twice_runs_alone_and_fails_by_a_crash_then(ledger: Ledger) -> None:
    crash(ledger, 1, 2, 3)
    assert ledger.suspects(None) == []
    crash(ledger, 2, 3, 4)
    assert [claim.ordinal for claim in ledger.suspects(None)] == [2, 3]
    assert [claim.ordinal for claim in ledger.suspects(1)] == [2]
    assert 2 not in {claim.ordinal for claim in ledger.pending(-1, 10)}
    ledger.finish(ledger.suspects(1)[0], [])
    crash(ledger, 3)
    assert ledger.counts()["failed"] == 1
    (failure,) = ledger.failures()
    assert failure["error_type"] == "crash_suspect"
    assert "died 3 times" in failure["error"]


def test_one_that_is_always_alone_fails_after_three_crashes(ledger: Ledger) -> None:
    for _ in range(MOST_CRASHES):
        crash(ledger, 1)
    assert ledger.counts()["failed"] == 1


def test_an_orderly_end_suspects_nobody(ledger: Ledger) -> None:
    for claim in ledger.pending(-1, 1):
        for _ in range(2 * MOST_CRASHES):
            ledger.claim(claim)
            ledger.recover(crashed=False)
    assert (ledger.suspects(None), ledger.counts()["failed"]) == ([], 0)
