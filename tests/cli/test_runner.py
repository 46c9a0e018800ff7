"""The coordinator and its workers: several GPUs, deaths, hangs, memory, NaN, retries, prompts, stopping."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specvlm.errors import ConfigError, ModelLoadError
from specvlm_cli.caption import queue, start
from specvlm_cli.caption.policy import Policy
from specvlm_cli.commands import caption
from specvlm_cli.run import resharding
from specvlm_cli.run.layout import RunFolder
from specvlm_cli.run.resharding import reshard
from specvlm_cli.workers import worker
from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows, snapshot


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(worker, "HARD_LIMIT_S", 0.3)


def many(folder: Path, number: int) -> Path:
    folder.mkdir(exist_ok=True)
    for each in range(number):
        (folder / f"many-{each:02d}.mp4").write_text(f"video {each}")
    return folder


def failure_of(out: Path, name: str) -> dict[str, object]:
    (row,) = [row for row in rows(out, "failures") if str(row["path"]).endswith(name)]
    return row


def test_all_gpus_share_one_queue(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 12)
    specvlm.behave(seen_gpus=3, delay_s=0.4)
    assert specvlm("caption", folder, "-o", out).code == 0
    assert specvlm.engine.devices == {"fake", "cuda:1", "cuda:2"}
    assert len(specvlm.engine.captioned) == 12
    invariants.check(out, folder)


@pytest.mark.parametrize(("number", "loads"), [(31, 1), (32, 2), (48, 3), (60, 3)])
def test_workers_share_a_cpu_where_there_is_enough_to_do(
    specvlm: Specvlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: Path, number: int, loads: int
) -> None:
    monkeypatch.setattr(caption, "_cpu_workers", lambda *_: 3)
    folder = many(tmp_path / "many", number)
    specvlm.behave(delay_s=0.05, holds=4)
    assert specvlm("caption", folder, "-o", out).code == 0
    assert len(specvlm.engine.loads) == loads
    invariants.check(out, folder)


def test_gpus_can_be_chosen(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 6)
    specvlm.behave(seen_gpus=8, delay_s=0.1)
    assert specvlm("caption", folder, "-o", out, "--gpus", "0,3").code == 0
    assert specvlm.engine.devices == {"cuda:0", "cuda:3"}


@pytest.mark.parametrize(("asked", "seen", "last"), [("8", 0, 7), ("8", 4, 7), ("1,", 1, 1), ("0,5", 5, 5)])
def test_gpus_that_are_not_there_end_the_start_with_one_line(
    specvlm: Specvlm, videos: Path, out: Path, asked: str, seen: int, last: int
) -> None:
    specvlm.behave(seen_gpus=seen)
    result = specvlm("caption", videos, "-o", out, "--gpus", asked, "-q")
    assert result.code == 2
    (line,) = result.err.splitlines()
    there = f"{seen}, counted from 0; name those, or all" if seen else "no GPU; leave it out"
    assert line == f"specvlm: error: --gpus: number {last} is asked for, and this machine has {there}"


def test_one_gpu_that_cannot_load_is_left_out(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm.behave(seen_gpus=2, error=ModelLoadError("no room"), only_on="cuda:1", delay_s=0.3)
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 0
    assert "going on without cuda:1: no room" in result.err
    invariants.check(out, videos)


def test_a_setting_that_no_gpu_can_use_ends_the_run(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm.behave(error=ConfigError("dtype is wrong; give another"))
    result = specvlm("caption", videos, "-o", out)
    assert (result.code, result.err.splitlines()[-1]) == (2, "specvlm: error: dtype is wrong; give another")


@pytest.mark.fresh_workers
@pytest.mark.parametrize(("retries", "attempts"), [(2, 3), (0, 1)])
def test_a_video_that_kills_its_worker_fails_and_the_others_do_not(
    specvlm: Specvlm, videos: Path, out: Path, retries: int, attempts: int
) -> None:
    (videos / "b.webm").write_text("dies")
    assert specvlm("caption", videos, "-o", out, "--retries", retries).code == 3
    row = failure_of(out, "b.webm")
    assert (row["stage"], row["error_type"], row["attempts"]) == ("generate", "WorkerDied", attempts)
    assert "Killed" in str(row["error"])
    invariants.check(out, videos, failed=1)


def test_workers_that_die_with_every_video_end_the_run(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 8)
    for path in folder.iterdir():
        path.write_text("dies")
    result = specvlm("caption", folder, "-o", out, "--retries", 0)
    assert result.code == 1
    assert "lost every worker" in result.err
    assert len(rows(out, "failures")) <= 3
    for path in folder.iterdir():
        path.write_text("video")
    assert specvlm("caption", folder, "-o", out, "--retry-failed").code == 0
    invariants.check(out, folder)


def test_workers_that_die_loading_end_the_run(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm.behave(dies_loading=True)
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 1
    assert "lost every worker" in result.err
    specvlm.behave(dies_loading=False)
    assert specvlm("caption", videos, "-o", out).code == 0
    invariants.check(out, videos)


@pytest.mark.parametrize("text", ["hangs", "endless"])
def test_a_video_that_takes_too_long_fails(specvlm: Specvlm, videos: Path, out: Path, text: str) -> None:
    (videos / "b.webm").write_text(text)
    began = time.monotonic()
    assert specvlm("caption", videos, "-o", out, "--timeout", "1s").code == 3
    assert time.monotonic() - began < 20
    assert "Timeout" in str(failure_of(out, "b.webm")["error_type"])
    invariants.check(out, videos, failed=1)


def test_infinite_logits_are_no_caption_and_three_in_a_row_end_the_run(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 6)
    for number in (1, 2, 4):
        (folder / f"many-{number:02d}.mp4").write_text("nan")
    assert specvlm("caption", folder, "-o", out).code == 3
    assert {row["error_type"] for row in rows(out, "failures")} == {"NonFiniteLogitsError"}
    invariants.check(out, folder, failed=3)
    (folder / "many-03.mp4").write_text("nan")
    result = specvlm("caption", folder, "-o", out, "--overwrite")
    assert result.code == 1
    assert "3 videos in a row gave NaN or infinite logits" in result.err


def test_videos_before_the_first_caption_are_not_to_blame_for_infinite_logits(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 5)
    for path in folder.iterdir():
        path.write_text("nan")
    result = specvlm("caption", folder, "-o", out)
    assert result.code == 1
    assert "3 videos in a row gave NaN or infinite logits" in result.err
    for path in folder.iterdir():
        path.write_text(f"video {path.name}")
    assert specvlm("caption", folder, "-o", out).code == 0, "all of them are pending"
    invariants.check(out, folder)


def test_memory_that_runs_out_costs_one_video(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "b.webm").write_text("huge")
    assert specvlm("caption", videos, "-o", out).code == 3
    row = failure_of(out, "b.webm")
    assert row["error_type"] == "MemoryError"
    assert "memory ran out with 8 frames" in str(row["error"])
    assert specvlm.engine.captioned.count(("huge", True)) == 1, "the engine tries alone"
    invariants.check(out, videos, failed=1)


def test_fewer_frames_only_where_that_is_allowed_and_the_row_says_so(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    (videos / "b.webm").write_text("huge")
    assert specvlm("caption", videos, "-o", out, "--on-oom", "reduce").code == 0
    (row,) = [row for row in rows(out) if row["path"].endswith("b.webm")]
    assert (row["flags"], row["num_frames"], row["frame_times_s"]) == (["reduced_frames"], 2, [0.0, 4.0])
    assert all(row["flags"] == [] for row in rows(out) if not row["path"].endswith("b.webm"))


def test_a_device_in_an_undefined_state_is_left(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "b.webm").write_text("poison")
    assert specvlm("caption", videos, "-o", out).code == 3
    row = failure_of(out, "b.webm")
    assert "CUDA error" in str(row["error"])
    assert row["attempts"] == 3
    assert len(specvlm.loads) >= 3, "each time by a fresh process"
    invariants.check(out, videos, failed=1)


def test_a_fault_that_may_pass_is_tried_again(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "b.webm").write_text("stale")
    assert specvlm("caption", videos, "-o", out, "--retries", 4).code == 3
    row = failure_of(out, "b.webm")
    assert (row["stage"], row["error_type"], row["attempts"]) == ("open", "VideoUnavailableError", 5)


def test_a_broken_video_is_not_tried_again(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "b.webm").write_text("damaged")
    assert specvlm("caption", videos, "-o", out).code == 3
    row = failure_of(out, "b.webm")
    assert (row["stage"], row["attempts"]) == ("decode", 1)


def test_several_prompts_give_several_rows(specvlm: Specvlm, videos: Path, out: Path) -> None:
    prompts = ["--prompt", "first question", "--prompt", "second question"]
    assert specvlm("caption", videos, "-o", out, *prompts).code == 0
    found = {(row["path"].rpartition("/")[2], row["prompt_index"]): row for row in rows(out)}
    assert len(found) == 8
    assert found["a.mp4", 0]["caption"] == "a caption of video a.mp4"
    assert found["a.mp4", 1]["caption"] == "a caption of video a.mp4 (second)"
    assert found["a.mp4", 1]["prompt"] == "second question"
    assert len(specvlm.engine.prepared) == 4, "each video once"
    assert [found["a.mp4", index]["video_decode_s"] for index in (0, 1)] == [0.1, 0.0], "read for the first"
    again = specvlm("caption", videos, "-o", out, *prompts)
    assert "nothing to do: 4 done" in again.err
    assert specvlm("caption", videos, "-o", out, *prompts[:2]).code == 2, "another set of prompts is a change"


def test_a_video_is_done_when_all_its_prompts_are(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "a.mp4").write_text("explodes")
    specvlm("caption", videos, "-o", out, "--prompt", "one", "--prompt", "two")
    assert not [row for row in rows(out) if row["path"].endswith("a.mp4")]
    invariants.check_ledger(out, done=3, failed=1)


def test_max_runtime_stops_and_the_next_start_goes_on(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 60)
    specvlm.behave(delay_s=0.2)
    result = specvlm("caption", folder, "-o", out, "--max-runtime", "6s")
    assert result.code == 75
    assert "stopped by max-runtime" in result.err
    assert 0 < len(rows(out)) < 60
    specvlm.behave(delay_s=0.0)
    assert specvlm("caption", folder, "-o", out).code == 0
    invariants.check(out, folder)


def test_a_second_start_fails_skips_or_waits(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, "--limit", 1)
    locked = os.open(out / ".specvlm" / "state-00000.lock", os.O_RDWR)
    fcntl.flock(locked, fcntl.LOCK_EX)
    assert specvlm("caption", videos, "-o", out).code == 75
    skipped = specvlm("caption", videos, "-o", out, "--if-locked", "skip", "-q")
    assert (skipped.code, skipped.out, skipped.err) == (0, "", "")
    waited = specvlm("caption", videos, "-o", out, "--if-locked", "wait", "--max-runtime", "1s")
    assert waited.code == 75
    os.close(locked)
    assert specvlm("caption", videos, "-o", out, "--if-locked", "wait").code == 0
    invariants.check(out, videos)


def test_shards_together_are_the_run(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 12)
    codes = [specvlm("caption", folder, "-o", out, "--shard", f"{index}/3").code for index in range(3)]
    assert codes == [0, 0, 0]
    captions = [row["id"] for row in rows(out)]
    assert len(captions) == len(set(captions)) == 12
    assert {path.name[:10] for path in (out / "captions").iterdir()} == {
        "part-00000",
        "part-00001",
        "part-00002",
    }
    refused = specvlm("caption", folder, "-o", out, "--shard", "0/4")
    assert refused.code == 2
    assert "was begun with 3 shards, this start has 4" in refused.err
    assert specvlm("caption", folder, "-o", out, "--shard", "1/3", "--prompt", "Why?").code == 2
    many(folder, 15)
    assert specvlm("caption", folder, "-o", out, "--shard", "0/3", "--prompt", "Why?").code == 2


def test_a_run_divided_anew_keeps_everything(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 12)
    (folder / "many-05.mp4").write_text("text")
    for index in range(3):
        specvlm("caption", folder, "-o", out, "--shard", f"{index}/3", "--limit", 3)
    before = {row["id"]: row["created_at"] for row in rows(out)}
    made = len(before)
    assert specvlm("caption", folder, "-o", out, "--shard", "1/2", "--reshard", "--limit", 1).code in (0, 3)
    after = {row["id"]: row["created_at"] for row in rows(out)}
    assert before.items() <= after.items()
    assert made <= len(after) <= made + 1
    assert specvlm("caption", folder, "-o", out, "--shard", "1/3").code == 2
    for index in range(2):
        assert specvlm("caption", folder, "-o", out, "--shard", f"{index}/2").code in (0, 3)
    assert len(rows(out)) == len({row["id"] for row in rows(out)}) == 11
    assert len(rows(out, "failures")) == 1
    assert specvlm("caption", folder, "-o", out, "--reshard").code in (0, 3)
    invariants.check(out, folder, failed=1)


def test_flags_can_stand_in_a_file(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "specvlm.toml"
    config.write_text(
        f'out = "{out}"\nprune-ratio = 0.7\ntree = "chain"\nfps = 1.5\nprompt = ["one", "two"]\nquiet = true\n'
    )
    monkeypatch.setenv("SPECVLM_TREE", "dynamic")
    assert specvlm("caption", videos, "--config", config, "--fps", 3).code == 0
    (settings,) = specvlm.loads
    assert (settings.speculation.prune_ratio, settings.speculation.tree) == (0.7, "dynamic")
    assert (settings.frames.fps, settings.prompts) == (3.0, ("one", "two"))
    config.write_text("prune_ratio = 0.7\n")
    refused = specvlm("caption", videos, "--config", config)
    assert refused.code == 2
    assert "'prune_ratio' is no flag" in refused.err


def test_a_start_that_waited_sees_what_changed_meanwhile(
    specvlm: Specvlm, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waited, the run was divided anew: its own number of shards is no longer that of the run."""
    folder = many(tmp_path / "many", 8)
    specvlm("caption", folder, "-o", out, "--shard", "0/2", "--limit", 1)
    before = start._agree

    def divided_behind_our_back(request: start.CaptionRequest, one: RunFolder) -> None:
        before(request, one)
        monkeypatch.setattr(start, "_agree", before)
        reshard(out, 3)

    monkeypatch.setattr(start, "_agree", divided_behind_our_back)
    result = specvlm("caption", folder, "-o", out, "--shard", "0/2")
    assert result.code == 2
    assert "was begun with 3 shards, this start has 2" in result.err
    for index in range(3):
        assert specvlm("caption", folder, "-o", out, "--shard", f"{index}/3").code == 0
    assert len(rows(out)) == len({row["id"] for row in rows(out)}) == 8


def test_the_first_start_fixes_the_shards_before_it_loads(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm.behave(error=ModelLoadError("no"))
    assert specvlm("caption", videos, "-o", out, "--shard", "0/2").code == 1
    specvlm.behave(error=None)
    assert specvlm("caption", videos, "-o", out, "--shard", "0/3").code == 2
    assert specvlm("caption", videos, "-o", out, "--shard", "0/2", "--prompt", "Another?").code == 0


def test_a_run_without_its_settings_file_knows_its_shards(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 12)
    for index in range(3):
        specvlm("caption", folder, "-o", out, "--shard", f"{index}/3")
    (out / ".specvlm" / "run.json").unlink()
    refused = specvlm("caption", folder, "-o", out, "--shard", "0/2")
    assert (refused.code, "its run.json is gone, and what is there is not of 2 shards" in refused.err) == (
        2,
        True,
    )
    assert specvlm("caption", folder, "-o", out).code == 2
    for path in (out / ".specvlm").glob("state-*.db"):
        path.unlink()
    assert specvlm("caption", folder, "-o", out, "--shard", "0/2").code == 2, "the parts tell it too"
    for index in range(3):
        assert specvlm("caption", folder, "-o", out, "--shard", f"{index}/3").code == 0
    assert len(rows(out)) == 12


def test_dividing_anew_deletes_nobody_elses_parts(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 6)
    specvlm("caption", folder, "-o", out)
    specvlm("caption", many(tmp_path / "others", 2), "-o", tmp_path / "other", "--prompt", "Another?")
    (part,) = (tmp_path / "other" / "captions").iterdir()
    foreign, unlike = (
        out / "captions" / "part-00000-00077.parquet",
        out / "captions" / "counterpart-1.parquet",
    )
    for path in (foreign, unlike):
        path.write_bytes(part.read_bytes())
    refused = specvlm("caption", folder, "-o", out, "--reshard", "--shard", "0/2")
    assert refused.code == 1
    assert "holds captions that this run did not make" in refused.err
    foreign.unlink()
    assert specvlm("caption", folder, "-o", out, "--reshard", "--shard", "0/2").code == 0
    assert unlike.exists()


def test_a_division_that_was_cut_short_is_finished_but_not_by_looking(
    specvlm: Specvlm, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = many(tmp_path / "many", 8)
    for index in range(2):
        specvlm("caption", folder, "-o", out, "--shard", f"{index}/2")
    with monkeypatch.context() as patch:
        patch.setattr(resharding, "_take_over", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reshard(out, 4)
    before = snapshot(out)
    assert specvlm("caption", folder, "-o", out, "-n", "--shard", "0/4").code == 2
    assert snapshot(out) == before
    refused = specvlm("caption", folder, "-o", out, "--shard", "0/2")
    assert (refused.code, "was begun with 4 shards" in refused.err) == (2, True)
    for index in range(4):
        assert specvlm("caption", folder, "-o", out, "--shard", f"{index}/4").code == 0
    assert len(rows(out)) == len({row["id"] for row in rows(out)}) == 8


def test_captions_of_one_video_stay_in_one_part_and_a_lost_part_is_made_anew(
    specvlm: Specvlm, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = many(tmp_path / "many", 4)
    monkeypatch.setattr("specvlm_cli.commands.caption.Policy", partial(Policy, part_rows=3))
    prompts = ["--prompt", "one", "--prompt", "two"]
    specvlm("caption", folder, "-o", out, *prompts)
    parts = sorted((out / "captions").iterdir())
    assert [pq.read_metadata(path).num_rows for path in parts] == [4, 4]
    row = pq.read_table(parts[1]).slice(0, 3)
    pq.write_table(row, parts[1])
    (out / ".specvlm" / "state-00000.db").unlink()
    assert specvlm("caption", folder, "-o", out, *prompts).code == 0
    assert len({(row["id"], row["prompt_index"]) for row in rows(out)}) == len(rows(out)) == 8


def test_each_gpu_gets_one_worker_also_where_one_is_left_out(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 12)
    specvlm.behave(seen_gpus=4, error=ModelLoadError("no room"), only_on="cuda:1", delay_s=0.3)
    assert specvlm("caption", folder, "-o", out).code == 0
    assert len(specvlm.engine.loads) == 4
    assert specvlm.engine.devices <= {"fake", "cuda:2", "cuda:3"}


def order(specvlm: Specvlm, *events: str) -> None:
    """Require that these happened, in this order."""
    rest = iter(specvlm.engine.events)
    for event in events:
        assert event in rest, f"{event!r} is not in its place: {specvlm.engine.events}"


def attempts(out: Path) -> dict[str, tuple[str, int]]:
    """Return the state and the tries of each video, by name, as the ledger has them."""
    with closing(sqlite3.connect(out / ".specvlm" / "state-00000.db")) as ledger:
        found = ledger.execute("SELECT path, state, attempts FROM item").fetchall()
    return {os.fsdecode(path).rpartition("/")[2]: (state, tries) for path, state, tries in found}


def when_told(specvlm: Specvlm, event: str) -> threading.Thread:
    """Send SIGTERM to this process once the engines have noted an event."""

    def watch() -> None:
        end_s = time.monotonic() + 20
        while event not in specvlm.engine.events and time.monotonic() < end_s:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_next_video_is_prepared_while_one_is_captioned(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 4)
    specvlm.behave(delay_s=0.4, prepare_s=0.1)
    assert specvlm("caption", folder, "-o", out).code == 0
    order(specvlm, "prepared video 0", "prepared video 1", "captioned video 0", "prepared video 2")
    order(specvlm, "captioned video 1", "prepared video 3", "captioned video 2", "captioned video 3")
    assert len(specvlm.engine.prepared) == 4, "each once"
    invariants.check(out, folder)


@pytest.mark.parametrize(
    ("text", "error", "tries"),
    [("dies", "WorkerDied", 3), ("hangs", "GenerationTimeout", 1), ("poison", "RuntimeError", 3)],
)
def test_a_worker_that_ends_with_a_video_ahead_costs_that_one_nothing(
    specvlm: Specvlm, tmp_path: Path, out: Path, text: str, error: str, tries: int
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-00.mp4").write_text(text)
    specvlm.behave(delay_s=0.4)
    assert specvlm("caption", folder, "-o", out, "--timeout", "1s").code == 3
    assert "prepared video 1" in specvlm.engine.events
    row = failure_of(out, "many-00.mp4")
    assert (row["error_type"], row["attempts"]) == (error, tries)
    assert {row["attempts"] for row in rows(out)} == {1}
    assert specvlm.engine.captioned.count(("video 1", True)) == 1
    invariants.check(out, folder, failed=1)


@pytest.mark.parametrize(("retries", "tries"), [(2, 3), (0, 1)])
def test_a_video_that_kills_its_worker_while_it_is_prepared_is_found(
    specvlm: Specvlm, tmp_path: Path, out: Path, retries: int, tries: int
) -> None:
    folder = many(tmp_path / "many", 5)
    (folder / "many-01.mp4").write_text("dies preparing")
    specvlm.behave(delay_s=0.3)
    assert specvlm("caption", folder, "-o", out, "--retries", retries).code == 3
    row = failure_of(out, "many-01.mp4")
    assert (row["error_type"], row["attempts"]) == ("WorkerDied", tries)
    assert [row["attempts"] for row in rows(out)] == [1, 1, 1, 1]
    invariants.check(out, folder, failed=1)


@pytest.mark.parametrize(("text", "error"), [("unfit", "PreprocessError"), ("breaks", "ZeroDivisionError")])
def test_what_cannot_be_prepared_fails_alone(
    specvlm: Specvlm, tmp_path: Path, out: Path, text: str, error: str
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-01.mp4").write_text(text)
    specvlm.behave(delay_s=0.3)
    assert specvlm("caption", folder, "-o", out).code == 3
    order(specvlm, f"preparing {text}", "captioned video 0")
    row = failure_of(out, "many-01.mp4")
    assert (row["stage"], row["error_type"], row["attempts"]) == ("preprocess", error, 1)
    invariants.check(out, folder, failed=1)


def test_a_prompt_that_no_video_can_take_ends_the_run_in_its_turn(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-01.mp4").write_text("prompt, says the processor")
    specvlm.behave(delay_s=0.3)
    result = specvlm("caption", folder, "-o", out)
    assert result.code == 2
    assert "the prompt has no place for a video" in result.err
    assert attempts(out)["many-00.mp4"] == ("done", 1)


@pytest.mark.parametrize("ahead", ["video 1", "unfit"])
def test_a_stop_leaves_the_video_ahead_as_it_was(
    specvlm: Specvlm, tmp_path: Path, out: Path, ahead: str
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-01.mp4").write_text(ahead)
    specvlm.behave(delay_s=1.2)
    watching = when_told(specvlm, f"preparing {ahead}")
    result = specvlm("caption", folder, "-o", out)
    watching.join()
    assert result.code == 75
    assert attempts(out) == {
        "many-00.mp4": ("done", 1),
        "many-01.mp4": ("pending", 0),
        "many-02.mp4": ("pending", 0),
    }
    specvlm.behave(delay_s=0.0)
    (folder / "many-01.mp4").write_text("video 1")
    assert specvlm("caption", folder, "-o", out).code == 0
    invariants.check(out, folder)


def test_an_idle_worker_takes_what_waits_behind_a_busy_one(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-00.mp4").write_text("patient, until two others have their captions")
    specvlm.behave(seen_gpus=2)
    assert specvlm("caption", folder, "-o", out).code == 0
    by = specvlm.engine.device_of
    first = by.pop("patient, until two others have their captions")
    assert first not in by.values()
    assert len(by) == 2
    invariants.check(out, folder)


def test_nothing_is_prepared_beyond_the_limit(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 4)
    specvlm.behave(delay_s=0.3)
    assert specvlm("caption", folder, "-o", out, "--limit", 2).code == 0
    assert specvlm.engine.prepared == ["video 0", "video 1"]
    assert attempts(out)["many-02.mp4"] == ("pending", 0)


def test_too_many_failures_leave_the_video_ahead_as_it_was(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-00.mp4").write_text("explodes")
    specvlm.behave(delay_s=0.5)
    assert specvlm("caption", folder, "-o", out, "--fail-fast").code == 4
    order(specvlm, "prepared video 1", "captioned explodes")
    assert attempts(out)["many-01.mp4"] == ("pending", 0)


def test_the_time_limit_counts_from_the_go_ahead(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = many(tmp_path / "many", 2)
    specvlm.behave(delay_s=1.2)
    assert specvlm("caption", folder, "-o", out, "--timeout", "1.7s").code == 0
    order(specvlm, "prepared video 1", "captioned video 0", "captioned video 1")


def test_memory_that_ran_out_while_preparing_ahead_is_tried_for_again(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = many(tmp_path / "many", 3)
    (folder / "many-01.mp4").write_text("crowded")
    specvlm.behave(delay_s=0.4)
    assert specvlm("caption", folder, "-o", out).code == 0
    order(specvlm, "preparing crowded", "captioned video 0", "prepared crowded", "captioned crowded")
    assert {row["attempts"] for row in rows(out)} == {1}
