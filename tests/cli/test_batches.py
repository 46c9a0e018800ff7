"""Many videos in flight: refill, neighbours of what crashes, hangs or runs out of memory, sets that are compared."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from specvlm_cli.caption import queue
from specvlm_cli.run.ledger import Ledger
from specvlm_cli.workers import worker
from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows

READERS = ("--decode-workers", 4)
BATCH = ("--batch-size", 8, *READERS)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(worker, "HARD_LIMIT_S", 0.3)


def many(folder: Path, number: int, **others: str) -> Path:
    """Make so many videos; `others` say what some are, e.g. `v03="dies"`."""
    folder.mkdir()
    for each in range(number):
        name = f"v{each:02d}"
        (folder / f"{name}.mp4").write_text(others.get(name, f"video {each:02d}"))
    return folder


def failures(out: Path) -> dict[str, tuple[object, object]]:
    """Return the error and the tries of each failed video, by name."""
    return {Path(row["path"]).stem: (row["error_type"], row["attempts"]) for row in rows(out, "failures")}


def sizes(specvlm: Specvlm) -> list[int]:
    """Return how many sequences each step had."""
    return [len(texts) for texts in specvlm.engine.steps]


def test_a_batch_is_kept_full(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 40)
    specvlm.behave(delay_s=0.2, steps=5)
    assert specvlm("caption", folder, "-o", out, *BATCH).code == 0
    found = sizes(specvlm)
    assert max(found) == 8
    full = found[found.index(8) : len(found) - found[::-1].index(8)]
    assert sum(full) / len(full) > 6.5, f"slots stayed free: {found}"
    assert len(specvlm.engine.captioned) == len(specvlm.engine.prepared) == 40
    assert {row["attempts"] for row in rows(out)} == {1}
    assert max(row["num_drafts"] for row in rows(out)) > 0
    invariants.check(out, folder)


def test_what_ends_together_is_stored_together(
    specvlm: Specvlm, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = 0
    stored_in: list[int] = []
    commit, finish = Database.commit, Ledger.finish

    def counting(self: Database) -> None:
        nonlocal commits
        commits += 1
        commit(self)

    def noting(self: Ledger, *given: Any) -> None:
        stored_in.append(commits)
        finish(self, *given)

    monkeypatch.setattr(Database, "commit", counting)
    monkeypatch.setattr(Ledger, "finish", noting)
    folder = many(tmp_path / "many", 32)
    specvlm.behave(delay_s=0.3)
    assert specvlm("caption", folder, "-o", out, *BATCH).code == 0
    assert len(stored_in) == 32
    assert len(set(stored_in)) <= len(specvlm.engine.steps), "one transaction for what ended in a step"


def test_two_workers_each_hold_a_batch(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 32)
    specvlm.behave(seen_gpus=2, delay_s=0.2, steps=3)
    assert specvlm("caption", folder, "-o", out, "--batch-size", 4, *READERS).code == 0
    assert specvlm.engine.devices == {"fake", "cuda:1"}
    assert max(sizes(specvlm)) == 4
    invariants.check(out, folder)


@pytest.mark.fresh_workers
def test_one_of_eight_that_crashes_is_found_and_its_neighbours_are_captioned(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 12, v03="dies", v05="video five")
    specvlm.behave(delay_s=0.2)
    result = specvlm("caption", folder, "-o", out, *BATCH)
    assert result.code == 3
    assert "each is tried again alone, to find the reason" in result.err
    assert failures(out) == {"v03": ("WorkerDied", 3)}
    assert {row["attempts"] for row in rows(out)} == {1}, "its neighbours lose no try"
    company = [line[2] for line in specvlm.engine.lines() if line[0] == "died"]
    assert company[-3:] == [1, 1, 1], "only alone it is charged"
    assert len(company) <= 4
    invariants.check(out, folder, failed=1)


def test_two_that_crash_in_one_batch_are_both_found(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 10, v02="dies first", v04="dies second")
    specvlm.behave(delay_s=0.2)
    assert specvlm("caption", folder, "-o", out, *BATCH, "--retries", 1).code == 3
    assert failures(out) == {"v02": ("WorkerDied", 2), "v04": ("WorkerDied", 2)}
    assert {row["attempts"] for row in rows(out)} == {1}
    invariants.check(out, folder, failed=2)


def test_what_crashes_only_in_company_is_captioned_alone(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 10, v03="together dies")
    specvlm.behave(delay_s=0.2)
    assert specvlm("caption", folder, "-o", out, *BATCH).code == 0
    assert {row["attempts"] for row in rows(out)} == {1}
    invariants.check(out, folder)


def test_a_suspect_runs_with_nothing_else(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 16, v02="dies")
    specvlm.behave(delay_s=0.1)
    assert specvlm("caption", folder, "-o", out, *BATCH, "--retries", 0).code == 3
    events = specvlm.engine.events
    last = len(events) - 1 - events[::-1].index("died dies")
    beside = events[events.index("preparing dies", events.index("died dies")) : last]
    assert not [event for event in beside if event.startswith("preparing") and "dies" not in event]
    invariants.check(out, folder, failed=1)


@pytest.mark.parametrize(
    ("text", "error", "tries"),
    [("hangs", "GenerationTimeout", 1), ("poison", "RuntimeError", 3), ("dies preparing", "WorkerDied", 3)],
)
def test_neighbours_of_what_costs_the_worker_lose_nothing(
    specvlm: Specvlm, tmp_path: Path, out: Path, text: str, error: str, tries: int
) -> None:
    folder = many(tmp_path / "many", 9, v03=text)
    specvlm.behave(delay_s=0.05)
    assert specvlm("caption", folder, "-o", out, *BATCH, "--timeout", "1s").code == 3
    assert failures(out) == {"v03": (error, tries)}
    assert {row["attempts"] for row in rows(out)} == {1}
    invariants.check(out, folder, failed=1)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("endless", "GenerationTimeoutError"),
        ("huge", "MemoryError"),
        ("explodes", "GenerationError"),
        ("bug", "ZeroDivisionError"),
        ("nan", "NonFiniteLogitsError"),
        ("empty", "EmptyCaption"),
        ("unfit", "PreprocessError"),
    ],
)
def test_what_goes_wrong_with_one_costs_that_one_alone(
    specvlm: Specvlm, tmp_path: Path, out: Path, text: str, error: str
) -> None:
    folder = many(tmp_path / "many", 9, v03=text)
    specvlm.behave(delay_s=0.05, steps=3)
    assert specvlm("caption", folder, "-o", out, *BATCH, "--timeout", "2s").code == 3
    assert failures(out) == {"v03": (error, 1)}
    assert len(specvlm.loads) == 1, "by the same worker"
    assert len(specvlm.engine.captioned) == 9 - (text in ("endless", "unfit"))
    invariants.check(out, folder, failed=1)


def test_fewer_frames_for_the_one_that_memory_cannot_hold(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 9, v03="huge")
    specvlm.behave(delay_s=0.05, steps=2)
    assert specvlm("caption", folder, "-o", out, *BATCH, "--on-oom", "reduce").code == 0
    flagged = {Path(row["path"]).stem: row["num_frames"] for row in rows(out) if row["flags"]}
    assert flagged == {"v03": 2}
    invariants.check(out, folder)


def test_several_prompts_of_a_video_are_sequences_of_the_batch(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 7, v02="explodes")
    prompts = [word for name in ("one", "second", "three") for word in ("--prompt", name)]
    specvlm.behave(delay_s=0.05, steps=3)
    assert specvlm("caption", folder, "-o", out, "--batch-size", 6, *prompts).code == 3
    found = {(Path(row["path"]).stem, row["prompt_index"]): row for row in rows(out)}
    assert len(found) == 18
    assert found["v00", 1]["caption"] == "a caption of video 00 (second)"
    assert max(sizes(specvlm)) == 6
    assert len(specvlm.engine.prepared) == 7, "each video once"
    assert failures(out) == {"v02": ("GenerationError", 1)}


def test_more_prompts_than_slots(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 3)
    prompts = [word for name in ("one", "two", "three") for word in ("--prompt", name)]
    assert specvlm("caption", folder, "-o", out, "--batch-size", 2, *prompts).code == 0
    assert len(rows(out)) == 9


# Sets that are decoded both ways


def both_ways(specvlm: Specvlm) -> Iterator[tuple[bool, int]]:
    """Yield for each run of captions of one way: with the draft or not, and how many."""
    last, number = None, 0
    for _, speculate in specvlm.engine.captioned:
        if last is not None and speculate is not last:
            yield bool(last), number
            number = 0
        last, number = speculate, number + 1
    yield bool(last), number


def test_sampled_videos_are_compared_in_sets_of_the_batch_size(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 10, v02="differs")
    specvlm.behave(steps=3)
    result = specvlm("caption", folder, "-o", out, "--batch-size", 4, "--baseline-sample", 1, "--json")
    assert result.code == 0
    assert max(sizes(specvlm)) == 4
    assert len(specvlm.engine.captioned) == 2 * 10 + 3, "both ways, and one of each set alone"
    figures = result.json["figures"]
    assert (figures["compared"], figures["identical"]) == (10, 9)
    assert {row["speedup_source"] for row in rows(out)} == {"measured"}
    assert specvlm.engine.warm_ups == 1
    # with the draft 4 and plainly 4, one alone; plainly 4 and with the draft 4 and one alone; the last two
    assert list(both_ways(specvlm)) == [
        (True, 4),
        (False, 4),
        (True, 1),
        (False, 4),
        (True, 7),
        (False, 2),
        (True, 1),
    ]
    invariants.check(out, folder)


def test_a_share_is_compared_and_the_others_are_estimated(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 40)
    specvlm.behave(steps=2)
    assert specvlm("caption", folder, "-o", out, "--batch-size", 4, "--baseline-sample", 0.3).code == 0
    sources = [row["speedup_source"] for row in rows(out)]
    assert 4 <= sources.count("measured") <= 24
    assert sources.count("measured") + sources.count("estimated") == 40
    plain = [text for text, speculate in specvlm.engine.captioned if not speculate]
    assert len(plain) == sources.count("measured")
    invariants.check(out, folder)


def test_a_caption_that_depends_on_its_neighbours_is_a_loud_warning(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 4, v00="leans on others")
    result = specvlm("caption", folder, "-o", out, "--batch-size", 4, "--baseline-sample", 1, "-q")
    assert result.code == 0
    assert "v00.mp4: its caption in a batch is not the one that it has alone" in result.err
    assert {Path(row["path"]).stem for row in rows(out) if row["exact_match"] is False} == {"v00"}


@pytest.mark.parametrize("text", ["explodes", "huge", "dies", "endless", "unfit", "text", "hangs"])
def test_a_set_goes_on_without_what_fails(specvlm: Specvlm, tmp_path: Path, out: Path, text: str) -> None:
    folder = many(tmp_path / "many", 6, v01=text)
    specvlm.behave(delay_s=0.05)
    flags = ("--batch-size", 4, "--baseline-sample", 1, "--timeout", "1s")
    assert specvlm("caption", folder, "-o", out, *flags).code == 3
    assert set(failures(out)) == {"v01"}
    assert [row["exact_match"] for row in rows(out)] == [True] * 5
    assert {row["attempts"] for row in rows(out)} == {1}
    invariants.check(out, folder, failed=1)


def test_a_sampled_video_that_needs_fewer_frames_is_captioned_without_its_set(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 4, v01="huge")
    flags = ("--batch-size", 4, "--baseline-sample", 1, "--on-oom", "reduce")
    assert specvlm("caption", folder, "-o", out, *flags).code == 0
    found = {Path(row["path"]).stem: (row["exact_match"], row["flags"]) for row in rows(out)}
    assert found.pop("v01") == (None, ["reduced_frames"])
    assert set(map(str, found.values())) == {"(True, [])"}


# Stopping


@pytest.mark.parametrize("grace", ["60s", "0s"])
def test_a_signal_with_eight_in_flight(specvlm: Specvlm, tmp_path: Path, out: Path, grace: str) -> None:
    folder = many(tmp_path / "many", 30)
    specvlm.behave(delay_s=0.2, steps=3)

    def when_some_are_made() -> None:
        end_s = time.monotonic() + 20
        while len(specvlm.engine.captioned) < 4 and time.monotonic() < end_s:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=when_some_are_made)
    thread.start()
    assert specvlm("caption", folder, "-o", out, *BATCH, "--grace", grace).code == 75
    thread.join()
    made = len(specvlm.engine.captioned)
    stored = len(rows(out)) if (out / "captions").exists() else 0
    assert stored == made if grace == "60s" else made - stored <= 8
    assert not any(invariants.known(out).crashes.values())
    specvlm.behave(delay_s=0.0)
    assert specvlm("caption", folder, "-o", out, *BATCH).code == 0
    invariants.check(out, folder)


def test_fail_fast_claims_nothing_more(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 30, v01="explodes")
    specvlm.behave(delay_s=0.3)
    assert specvlm("caption", folder, "-o", out, *BATCH, "--fail-fast").code == 4
    assert len(specvlm.engine.captioned) <= 20, "those in flight are finished"
    assert list(invariants.known(out).states.values()).count("failed") == 1


# The flag


@pytest.mark.parametrize("value", ["0", "-1", "1025", "many", "1.5", "", "99999999999999999999"])
def test_a_batch_size_that_is_none_is_one_line(specvlm: Specvlm, videos: Path, out: Path, value: str) -> None:
    refused = specvlm("caption", videos, "-o", out, f"--batch-size={value}")
    assert refused.code == 2
    assert refused.err == (
        f"specvlm: error: invalid --batch-size {value!r}; use auto, or a number from 1 to 1024\n"
    )
    assert not out.exists()


def test_the_batch_size_comes_from_flag_environment_or_file_and_is_no_change(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specvlm.behave(delay_s=0.3, holds=2, steps=4)
    assert specvlm("caption", videos, "-o", out, *READERS).code == 0
    assert max(sizes(specvlm)) == 2, "auto: what the engine found"
    config = tmp_path / "specvlm.toml"
    for index, given in enumerate(("file", "environment", "flag")):
        flags: tuple[object, ...] = ()
        if given == "file":
            config.write_text("batch-size = 3\n")
            flags = ("--config", config)
        elif given == "environment":
            monkeypatch.setenv("SPECVLM_BATCH_SIZE", "3")
        else:
            flags = ("--batch-size", "3")
        Path(specvlm.engine.factory.journal).unlink()
        assert specvlm("caption", videos, "-o", out, "--overwrite", *READERS, *flags).code == 0, given
        assert max(sizes(specvlm)) == 3, f"{index}: {given}"
    invariants.check(out, videos)
