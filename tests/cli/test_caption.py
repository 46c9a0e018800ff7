"""`specvlm caption`: what it does, what it leaves on disk, and how it ends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specvlm.errors import ModelLoadError
from specvlm_cli.run.layout import RunFolder
from specvlm_cli.run.ledger import Ledger
from specvlm_cli.run.parts import CAPTION_SCHEMA, FAILURE_SCHEMA
from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows, snapshot


def test_every_video_gets_a_row(specvlm: Specvlm, videos: Path, out: Path) -> None:
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 0
    found = rows(out)
    assert sorted(row["path"] for row in found) == sorted(
        str(videos / name) for name in ("a.mp4", "b.webm", "c.MP4", "more/d.mkv")
    )
    row = next(row for row in found if row["path"].endswith("d.mkv"))
    assert row["id"] == hashlib.sha1(b"more/d.mkv\0\0").hexdigest()
    assert row["caption"] == "a caption of video more/d.mkv"
    assert row["prompt_sha256"] == hashlib.sha256(row["prompt"].encode()).hexdigest()
    assert (row["target_model"], row["draft_model"], row["attempts"]) == ("fake/target", "fake/draft", 1)
    assert row["acceptance_histogram"] == [0, 1, 2, 1]
    assert row["exact_match"] is None  # nothing was decoded plainly
    invariants.check(out, videos)


def test_speedups_are_estimated_where_nothing_was_decoded_plainly(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    specvlm("caption", videos, "-o", out, "--limit", 1)
    row = rows(out)[0]
    assert row["speedup_source"] == "estimated"
    assert row["baseline_decode_s"] == pytest.approx(0.6)
    assert row["decode_speedup"] == pytest.approx(3.0)
    assert row["e2e_speedup"] == pytest.approx((0.1 + 0.1 + 0.6) / (0.1 + 0.1 + 0.1 + 0.2))


def test_columns_are_those_of_the_contract(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "bad.mp4").write_text("text")
    specvlm("caption", videos, "-o", out, "--baseline-sample", "1")
    table = pq.read_table(out / "captions")
    assert table.schema.equals(CAPTION_SCHEMA)
    assert " ".join(table.column_names) == (
        "id path input_path start end prompt_index caption finish_reason target_model target_revision draft_model "
        "method prompt prompt_sha256 config_hash specvlm_version run_id created_at duration_s fps width "
        "height video_backend flags num_frames frame_times_s video_tokens video_tokens_kept compressor "
        "compression_ratio prompt_tokens completion_tokens num_drafts "
        "num_draft_tokens num_accepted_tokens mean_accepted_tokens mean_acceptance_length "
        "acceptance_histogram video_decode_s preprocess_s vision_s target_prefill_s draft_prefill_s "
        "decode_s total_s tokens_per_s baseline_token_s baseline_decode_s decode_speedup e2e_speedup "
        "speedup_source estimated_token_s mean_batch_size settled_tokens smallest_margin exact_match attempts "
        "peak_memory_bytes device"
    )
    assert all(table.column(name).null_count == 0 for name in ("created_at", "decode_s", "exact_match"))
    failures = pq.read_table(out / "failures")
    assert failures.schema.equals(FAILURE_SCHEMA)
    assert (
        " ".join(failures.column_names) == "id path input_path start end stage error_type error attempts at"
    )


def test_parts_describe_themselves_to_hugging_face(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    (part,) = (out / "captions").iterdir()
    features = json.loads(pq.read_schema(part).metadata[b"huggingface"])["info"]["features"]
    assert features["acceptance_histogram"] == [{"dtype": "int64", "_type": "Value"}]
    assert features["decode_s"] == {"dtype": "float64", "_type": "Value"}
    assert features["created_at"]["dtype"] == "timestamp[us, tz=UTC]"


def test_second_start_touches_nothing_and_loads_nothing(specvlm: Specvlm, videos: Path, out: Path) -> None:
    assert specvlm("caption", videos, "-o", out).code == 0
    before = snapshot(out)
    again = specvlm("caption", videos, "-o", out)
    assert again.code == 0
    assert "nothing to do: 4 done" in again.err
    assert snapshot(out) == before
    assert len(specvlm.loads) == 1


def test_new_videos_are_added(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    (videos / "e.mp4").write_text("video e")
    assert specvlm("caption", videos, "-o", out).code == 0
    assert len(specvlm.engine.prepared) == 5
    invariants.check(out, videos)
    assert len(list((out / "captions").iterdir())) == 2


def test_limit_counts_what_is_left(specvlm: Specvlm, videos: Path, out: Path) -> None:
    first = specvlm("caption", videos, "-o", out, "--limit", 3, "--json").json
    assert (first["exit_code"], first["done"], first["pending"]) == (0, 3, 1)
    specvlm("caption", videos, "-o", out, "--limit", 3)
    invariants.check(out, videos)


def test_a_bad_video_never_stops_the_run(specvlm: Specvlm, videos: Path, out: Path) -> None:
    stories = {
        "text": ("open", "NotAVideoError", "not a video"),
        "damaged": ("decode", "VideoDecodeError", "no frame can be decoded"),
        "explodes": ("generate", "GenerationError", "it went off"),
        "empty": ("generate", "EmptyCaption", "the model wrote nothing; try another prompt"),
        "bug": ("generate", "ZeroDivisionError", "no message"),
    }
    for story in stories:
        (videos / f"{story}.mp4").write_text(story)
    (videos / "gone.mp4").symlink_to(videos / "nowhere")
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 3
    found = {
        Path(row["path"]).stem: (row["stage"], row["error_type"], row["error"])
        for row in rows(out, "failures")
    }
    assert found == {**stories, "gone": ("open", "VideoNotFoundError", "no such file")}
    assert result.err.count("failed: ") == 6
    invariants.check(out, videos, failed=6)


def test_failures_are_tried_again_on_request(specvlm: Specvlm, videos: Path, out: Path) -> None:
    bad = videos / "bad.mp4"
    bad.write_text("text")
    assert specvlm("caption", videos, "-o", out).code == 3
    again = specvlm("caption", videos, "-o", out)
    assert again.code == 0
    assert "--retry-failed" in again.err
    assert specvlm("caption", videos, "-o", out, "--retry-failed").code == 3
    assert rows(out, "failures")[0]["attempts"] == 2
    bad.write_text("video")
    assert specvlm("caption", videos, "-o", out, "--retry-failed").code == 0
    assert not list((out / "failures").iterdir())
    assert [row["attempts"] for row in rows(out) if row["path"] == str(bad)] == [3]
    invariants.check(out, videos)


def test_overwrite_makes_the_given_captions_anew(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    runs = {row["id"]: row["run_id"] for row in rows(out)}
    (videos / "a.mp4").write_text("video, new")
    assert specvlm("caption", videos / "a.mp4", "-o", out, "--overwrite").code == 0
    changed = [row for row in rows(out) if row["run_id"] != runs[row["id"]]]
    assert [row["caption"] for row in changed] == ["a caption of video, new"]
    invariants.check(out, videos)


def test_overwrite_keeps_captions_until_others_take_their_place(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    before = rows(out)
    specvlm.behave(error=ModelLoadError("no"))
    for flags in (["--overwrite"], ["--overwrite", "--limit", "1"], ["--overwrite", "--prompt", "Why?"]):
        assert specvlm("caption", videos, "-o", out, *flags).code == 1
        assert rows(out) == before
    specvlm.behave(error=None)
    assert "nothing to do: 4 done" in specvlm("caption", videos, "-o", out).err
    assert specvlm("caption", videos, "-o", out, "--overwrite", "--limit", 1, "--json").json["done"] == 4
    assert sum(row not in before for row in rows(out)) == 1
    invariants.check(out, videos)
    mixed = specvlm("caption", videos, "-o", out, "--overwrite", "--limit", 1, "--prompt", "Why?")
    assert mixed.code == 2
    assert specvlm("caption", videos, "-o", out, "--overwrite", "--prompt", "Why?").code == 0
    assert {row["prompt"] for row in rows(out)} == {"Why?"}
    invariants.check(out, videos)


def test_a_stopped_overwrite_goes_on_without_the_flag(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    before = rows(out)
    (videos / "a.mp4").write_text("text")
    stopped = specvlm("caption", videos, "-o", out, "--overwrite", "--prompt", "Why?", "--fail-fast")
    assert stopped.code == 4
    assert "the same command without --overwrite resumes" in stopped.err
    assert rows(out) == before
    (videos / "a.mp4").write_text("video a")
    again = specvlm("caption", videos, "-o", out, "--prompt", "Why?", "--retry-failed", "--json").json
    assert (again["done"], again["figures"]["captions"]) == (4, 4)
    assert {row["prompt"] for row in rows(out)} == {"Why?"}
    invariants.check(out, videos)


def test_a_caption_that_cannot_be_made_anew_is_kept(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    before = rows(out)
    (videos / "a.mp4").write_text("text")
    assert specvlm("caption", videos / "a.mp4", "-o", out, "--overwrite").code == 3
    assert rows(out) == before
    assert [row["path"] for row in rows(out, "failures")] == [str(videos / "a.mp4")]
    (videos / "a.mp4").write_text("video, mended")
    assert specvlm("caption", videos, "-o", out, "--retry-failed").code == 0
    assert "a caption of video, mended" in [row["caption"] for row in rows(out)]
    invariants.check(out, videos)


def test_a_failed_load_keeps_the_failures(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "a.mp4").write_text("text")
    specvlm("caption", videos, "-o", out)
    specvlm.behave(error=ModelLoadError("no"))
    assert specvlm("caption", videos, "-o", out, "--retry-failed").code == 1
    invariants.check(out, videos, failed=1)


def test_a_part_that_rotted_is_written_again_where_there_is_work(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    part = out / "captions" / "part-00000-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert "nothing to do" in specvlm("caption", videos, "-o", out).err, (
        "a start without work reads sizes only"
    )
    (videos / "e.mp4").write_text("video e")
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 0
    assert "part-00000-00000.parquet was missing or damaged" in result.err
    invariants.check(out, videos)


def test_a_part_of_another_run_is_not_deleted(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    specvlm("caption", videos, "-o", tmp_path / "other")
    part = out / "captions" / "part-00000-00000.parquet"
    foreign = part.with_name("part-00000-00005.parquet")
    foreign.write_bytes((tmp_path / "other" / "captions" / part.name).read_bytes())
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 1
    assert f"{foreign}: holds captions that this run did not make; move it" in result.err
    assert foreign.exists()
    foreign.write_bytes(part.read_bytes())
    assert f"removed {foreign}, left by a crash" in specvlm("caption", videos, "-o", out).err
    invariants.check(out, videos)


@pytest.mark.parametrize("name", ["part-00000-00000.parquet", "part-00000-00007.parquet"])
def test_a_folder_named_like_a_part_is_told(specvlm: Specvlm, videos: Path, out: Path, name: str) -> None:
    specvlm("caption", videos, "-o", out)
    folder = out / "captions" / name
    folder.unlink(missing_ok=True)
    folder.mkdir()
    for _ in range(2):
        result = specvlm("caption", videos, "-o", out)
        assert result.code == 1
        assert f"{folder}: a folder where a part belongs; move it away" in result.err
        (out / ".specvlm" / "state-00000.db").unlink(missing_ok=True)


def test_an_older_ledger_is_brought_up_to_date(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    with sqlite3.connect(out / ".specvlm" / "state-00000.db") as database:
        database.execute("ALTER TABLE part DROP COLUMN outdated")
        for column in ("prompts", "kept", "size_bytes", "mtime_ns", "partly", "input_path"):
            database.execute(f"ALTER TABLE item DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 1")
    database.close()
    assert "nothing to do: 4 done" in specvlm("caption", videos, "-o", out).err
    assert specvlm("caption", videos, "-o", out, "--overwrite").code == 0
    invariants.check(out, videos)


@pytest.mark.parametrize("step", ["finish", "fail"])
def test_what_cannot_be_stored_is_no_crash_of_the_video(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Three times the disk is full, so that not even the claim can be taken back."""
    (videos / "a.mp4").write_text("text" if step == "fail" else "video")

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, step, full)
            patch.setattr(Ledger, "release", full)
            assert specvlm("caption", videos / "a.mp4", "-o", out).code == 1
    (videos / "a.mp4").write_text("video")
    assert specvlm("caption", videos, "-o", out).code == 0
    invariants.check(out, videos)


def test_config_change_names_the_setting(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, "--prompt", "What is red?")
    before = snapshot(out)
    for flag, value, named in [
        ("--prompt", "What is blue?", 'prompt was "What is red?", is now "What is blue?"'),
        ("--fps", "1", "fps was 2.0, is now 1.0"),
        ("--max-new-tokens", "9", "max_new_tokens was 256, is now 9"),
        ("--preset", "qwen2.5-vl-7b", "target was "),
        ("--system", "Be short.", 'system was null, is now "Be short."'),
    ]:
        arguments = {"--prompt": "What is red?", flag: value}
        flags = [part for pair in arguments.items() for part in pair]
        result = specvlm("caption", videos, "-o", out, *flags)
        assert result.code == 2
        assert named in result.err
        assert "--on-config-change" in result.err
    assert snapshot(out) == before


def test_near_ties_that_fall_as_they_come_are_another_setting(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    """As usual it is no setting, so that runs from before there was a choice go on."""
    specvlm("caption", videos, "-o", out)
    assert "exact" not in json.loads((out / ".specvlm/run.json").read_text())["settings"]
    assert specvlm("caption", videos, "-o", out, "--exact").code == 0
    refused = specvlm("caption", videos, "-o", out, "--no-exact")
    assert refused.code == 2
    assert "exact was null, is now false" in refused.err


@pytest.mark.parametrize(
    "flags",
    [
        ["--pruner", "uniform", "--prune-ratio", "0.5", "--top-p", "0.2"],
        ["--tree", "dynamic", "--depth", "3", "--nodes", "8", "--positions", "compact"],
        ["--draft", "none"],
        ["--seed", "7", "--top-k", "3"],  # greedy: neither is used
    ],
)
def test_what_cannot_change_a_caption_is_no_change(
    specvlm: Specvlm, videos: Path, out: Path, flags: list[str]
) -> None:
    specvlm("caption", videos, "-o", out)
    (videos / "e.mp4").write_text("video e")
    assert specvlm("caption", videos, "-o", out, *flags).code == 0
    assert len(specvlm.loads) == 2


def test_config_change_reuse_keeps_old_captions(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    (videos / "e.mp4").write_text("video e")
    changed = ["--prompt", "Why?", "--on-config-change", "reuse"]
    assert specvlm("caption", videos, "-o", out, *changed).code == 0
    assert sorted(row["prompt"] for row in rows(out)) == ["Describe the video in detail."] * 4 + ["Why?"]
    assert len({row["config_hash"] for row in rows(out)}) == 2
    assert specvlm("caption", videos, "-o", out, "--prompt", "Why?").code == 0


def test_config_change_new_goes_to_a_folder_beside(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    before = snapshot(out)
    changed = ["--prompt", "Why?", "--on-config-change", "new"]
    result = specvlm("caption", videos, "-o", out, *changed, "--json")
    other = Path(result.json["out"])
    assert other.parent == out.parent
    assert other.name.startswith("out-")
    assert snapshot(out) == before
    invariants.check(other, videos)
    assert "nothing to do" in specvlm("caption", videos, "-o", out, *changed).err


def test_config_may_change_while_there_is_no_caption(specvlm: Specvlm, videos: Path, out: Path) -> None:
    for path in videos.rglob("*.*"):
        path.write_text("text")
    assert specvlm("caption", videos, "-o", out).code == 3
    assert specvlm("caption", videos, "-o", out, "--prompt", "Why?", "--retry-failed").code == 3


def test_a_target_that_changed_under_its_name_is_a_change(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    (videos / "e.mp4").write_text("video e")
    specvlm.behave(revision="r2")
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 2
    assert 'target_revision was "r1", is now "r2"' in result.err
    assert specvlm("caption", videos, "-o", out, "--on-config-change", "reuse").code == 0
    invariants.check(out, videos)


def test_settings_that_were_deleted_are_told_by_their_hash(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    (out / ".specvlm" / "run.json").unlink()
    result = specvlm("caption", videos, "-o", out, "--prompt", "Why?")
    assert result.code == 2
    assert "run.json is gone" in result.err
    assert specvlm("caption", videos, "-o", out).code == 0


def test_baseline_is_compared_and_timed(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "differs.mp4").write_text("differs")
    result = specvlm("caption", videos, "-o", out, "--baseline-sample", 1, "--json")
    assert result.code == 0
    figures = result.json["figures"]
    assert (figures["compared"], figures["identical"]) == (5, 4)
    assert (figures["decode"]["of_totals"], figures["decode"]["captions"]) == (pytest.approx(3.0), 5)
    assert (figures["end_to_end"]["of_totals"], figures["end_to_end"]["captions"]) == (pytest.approx(1.6), 5)
    assert figures["mean_accepted_tokens"] == 2.0
    assert "4/5" in result.err
    row = rows(out)[0]
    assert (row["baseline_decode_s"], row["baseline_token_s"]) == (0.6, pytest.approx(0.05))
    assert (row["decode_speedup"], row["e2e_speedup"]) == (pytest.approx(3.0), pytest.approx(1.6))
    assert row["speedup_source"] == "measured"
    assert len(specvlm.engine.prepared) == 5, "a video is read once for both"
    assert specvlm.engine.warm_ups == 1


def test_every_other_set_is_decoded_plainly_first(specvlm: Specvlm, videos: Path, out: Path) -> None:
    assert specvlm("caption", videos, "-o", out, "--baseline-sample", 1).code == 0
    order = iter(specvlm.engine.captioned)
    plain_first = [not speculate for (_, speculate), _ in zip(order, order, strict=True)]
    assert plain_first == [False, True, False, True]


def test_baseline_sample_is_a_stable_share(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.mp4").write_text("video")
    specvlm("caption", folder, "-o", out, "--baseline-sample", 0.3)
    sampled = {row["id"] for row in rows(out) if row["exact_match"] is not None}
    assert 8 <= len(sampled) <= 30
    specvlm("caption", folder, "-o", out, "--baseline-sample", 0.3, "--overwrite")
    assert {row["id"] for row in rows(out) if row["exact_match"] is not None} == sampled


def test_failures_can_end_a_run(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.mp4").write_text("text")
    fast = specvlm("caption", folder, "-o", out, "--fail-fast", "--json")
    assert (fast.code, fast.json["failed_now"], fast.json["stopped"]) == (4, 1, "max-failures")
    assert specvlm("caption", folder, "-o", out, "--max-failures", 3, "--json").json["failed_now"] == 3
    share = specvlm("caption", folder, "-o", out, "--max-failures", "50%", "--json")
    assert (share.code, share.json["failed_now"]) == (4, 3)
    assert specvlm("caption", folder, "-o", out, "--exit-zero").code == 0
    invariants.check(out, folder, failed=10) if (out / "captions").exists() else None


def test_dry_run_names_the_videos_and_touches_nothing(specvlm: Specvlm, videos: Path, out: Path) -> None:
    result = specvlm("caption", videos, "-o", out, "-n")
    assert result.out.splitlines() == [
        str(videos / name) for name in ("a.mp4", "b.webm", "c.MP4", "more/d.mkv")
    ]
    assert not out.exists()
    specvlm("caption", videos, "-o", out, "--limit", 3)
    before = snapshot(out)
    assert specvlm("caption", videos, "-o", out, "-n").out == f"{videos}/more/d.mkv\n"
    assert specvlm("caption", videos, "-o", out, "-n", "--json").json["would_caption"] == [
        f"{videos}/more/d.mkv"
    ]
    assert specvlm("caption", videos, "-o", out, "-n", "--overwrite").out.count("\n") == 4
    assert snapshot(out) == before
    assert len(specvlm.loads) == 1


def test_a_deleted_ledger_is_rebuilt_from_the_parts(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "bad.mp4").write_text("text")
    specvlm("caption", videos, "-o", out, "--limit", 2)
    specvlm("caption", videos, "-o", out, "--limit", 2)
    (out / ".specvlm" / "state-00000.db").unlink()
    before = rows(out), rows(out, "failures")
    assert specvlm("caption", videos, "-o", out, "-n").out == f"{videos}/more/d.mkv\n"
    assert specvlm("caption", videos, "-o", out).code == 3
    assert [row for row in rows(out) if not row["path"].endswith("d.mkv")] == before[0]
    assert rows(out, "failures") == before[1]
    invariants.check(out, videos, failed=1)


def test_a_part_that_holds_a_caption_twice_is_written_anew(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    part = out / "captions" / "part-00000-00000.parquet"
    (out / "captions" / "part-00000-00007.parquet").write_bytes(part.read_bytes())
    (out / ".specvlm" / "state-00000.db").unlink()
    assert specvlm("caption", videos, "-o", out).code == 0
    invariants.check(out, videos)


@pytest.mark.parametrize("damage", ["gone", "short", "stray", "temporary"])
def test_damaged_parts_are_repaired_from_the_ledger(
    specvlm: Specvlm, videos: Path, out: Path, damage: str
) -> None:
    specvlm("caption", videos, "-o", out)
    before = rows(out)
    part = out / "captions" / "part-00000-00000.parquet"
    if damage == "gone":
        part.unlink()
    elif damage == "short":
        part.write_bytes(part.read_bytes()[:-10])
    else:
        name = "part-00000-00009.parquet" if damage == "stray" else ".part-00000-00009.parquet"
        part.with_name(name).write_bytes(part.read_bytes()[:100])
    assert specvlm("caption", videos, "-o", out).code == 0
    assert rows(out) == before
    assert len(specvlm.loads) == 1
    invariants.check(out, videos)


def test_an_unreadable_part_without_a_ledger_is_no_fresh_start(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    (out / ".specvlm" / "state-00000.db").unlink()
    part = out / "captions" / "part-00000-00000.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 1
    assert str(part) in result.err
    assert part.exists()


def test_a_damaged_ledger_is_refused(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    ledger = out / ".specvlm" / "state-00000.db"
    content = bytearray(ledger.read_bytes())
    content[5000:9000] = os.urandom(4000)
    for broken in (b"", b"not a database at all" * 100, bytes(content[:20000])):
        ledger.write_bytes(broken)
        result = specvlm("caption", videos, "-o", out, "--overwrite")
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert "delete it" in result.err
    ledger.unlink()
    assert specvlm("caption", videos, "-o", out).code == 0
    invariants.check(out, videos)


def test_a_ledger_damaged_behind_its_header_is_told_the_same(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    ledger = out / ".specvlm" / "state-00000.db"
    content = bytearray(ledger.read_bytes())
    content[4096:] = b"Z" * (len(content) - 4096)
    ledger.write_bytes(content)
    for flags in ([], ["-n"], ["--overwrite"]):
        result = specvlm("caption", videos, "-o", out, *flags)
        assert result.code == 1
        line = result.err.splitlines()[-1]
        assert f"{ledger}: the ledger is damaged" in line
        assert "delete it to have it rebuilt" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", None),
        ("settings", []),
        ("resolved", None),
        ("shards", "1"),
        ("format", True),
        ("config_hash", 3),
    ],
)
def test_run_settings_of_a_wrong_type_are_told(
    specvlm: Specvlm, videos: Path, out: Path, name: str, value: object
) -> None:
    specvlm("caption", videos, "-o", out)
    file = out / ".specvlm" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 1
    assert f"run.json: not readable (its {name} is no " in result.err
    assert "delete it, it will be written again" in result.err


def test_a_newer_ledger_is_refused(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out)
    with sqlite3.connect(out / ".specvlm" / "state-00000.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 1
    assert "schema 99 is newer" in result.err


def test_a_second_run_is_told_who_holds_the_folder(specvlm: Specvlm, videos: Path, out: Path) -> None:
    with RunFolder(out).locked("other"):
        before = snapshot(out)
        result = specvlm("caption", videos, "-o", out)
        assert result.code == 75
        assert f"process {os.getpid()} on {os.uname().nodename}" in result.err
        assert snapshot(out) == before
    assert specvlm("caption", videos, "-o", out).code == 0


def test_a_ledger_that_another_program_holds_is_busy(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specvlm_cli.run.ledger.BUSY_TIMEOUT_S", 0.1)
    specvlm("caption", videos, "-o", out, "--limit", 1)
    browser = sqlite3.connect(out / ".specvlm" / "state-00000.db")
    browser.execute("BEGIN IMMEDIATE")
    assert specvlm("caption", videos, "-o", out).code == 75
    browser.close()
    assert specvlm("caption", videos, "-o", out).code == 0


def test_a_video_that_moved_keeps_its_caption(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    elsewhere = videos.rename(tmp_path / "elsewhere")
    assert "nothing to do" in specvlm("caption", elsewhere, "-o", out).err


def test_another_video_with_the_same_id_is_refused(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    specvlm("caption", videos, "-o", out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.mp4").write_text("another video")
    result = specvlm("caption", other, "-o", out)
    assert result.code == 2
    assert str(videos / "a.mp4") in result.err


def test_an_error_of_all_videos_ends_the_run(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "a.mp4").write_text("prompt")
    result = specvlm("caption", videos, "-o", out)
    assert result.code == 2
    assert "the prompt has no place for a video" in result.err
    assert not rows(out, "failures")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_cannot_be_written(specvlm: Specvlm, videos: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert specvlm("caption", videos, "-o", locked / "out").code == 2


def test_an_output_folder_that_is_a_file(specvlm: Specvlm, videos: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        result = specvlm("caption", videos, "-o", out)
        assert result.code == 2
        assert "give another -o folder" in result.err
    assert not specvlm.loads


def test_no_videos_is_nothing_to_do(specvlm: Specvlm, tmp_path: Path, out: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused = specvlm("caption", empty, "-o", out)
    assert refused.code == 2
    assert refused.err.splitlines()[-1] == (
        f"specvlm: error: {empty}: no video is there; check the path and what is mounted there, or give --allow-empty"
    )
    result = specvlm("caption", empty, "-o", out, "--allow-empty")
    assert result.code == 0
    assert "no videos found" in result.err
    assert not out.exists()


def test_one_empty_input_among_others_is_told_before_models_load(
    specvlm: Specvlm, videos: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unmounted", "also"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows.csv").write_text("path\n")
    (tmp_path / "list.txt").write_text("\n")
    given = (videos, tmp_path / "unmounted", tmp_path / "also", tmp_path / "rows.csv", tmp_path / "list.txt")
    refused = specvlm("caption", *given, "-o", out)
    assert refused.code == 2
    assert f"{tmp_path}/unmounted: no video is there, like 3 more inputs;" in refused.err
    assert not specvlm.loads
    assert specvlm("caption", *given, "-o", out, "--allow-empty").code == 0
    assert len(rows(out)) == 4
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert specvlm("caption", "-", "-o", tmp_path / "none").code == 0, "an hour without new files"


def test_a_folder_that_cannot_be_listed_is_no_success(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def scandir(folder: Any) -> Any:
        if not isinstance(folder, int) and os.fsdecode(folder).endswith("more"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr("os.scandir", scandir)
    for _ in range(2):
        result = specvlm("caption", videos, "-o", out, "-q")
        assert result.code == 3
        assert f"left out, not readable: {videos}/more: Permission denied" in result.err
    assert specvlm("caption", videos, "-o", out, "--exit-zero").code == 0
    assert len(rows(out)) == 3


def test_of_many_starts_at_once_one_runs(videos: Path, out: Path) -> None:
    """Three starts find the folder locked, or, coming late, nothing left to do; no video is captioned twice."""
    command = [
        sys.executable,
        "-m",
        "tests.cli.drive",
        "run",
        "caption",
        str(videos),
        "-o",
        str(out),
        "-q",
        "--json",
    ]
    root = Path(__file__).parents[2]
    starts = [
        subprocess.Popen(
            command,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"DRIVE_FORK": "1"},
        )
        for _ in range(4)
    ]
    ended = [(*start.communicate(timeout=60), start.returncode) for start in starts]
    assert {code for *_, code in ended} <= {0, 75}
    made = [json.loads(said)["figures"] for said, _, code in ended if code == 0]
    assert sum(figures is not None for figures in made) == 1
    assert all("is in use by process" in err for _, err, code in ended if code == 75)
    invariants.check(out, videos)


def test_a_known_video_given_through_another_folder_is_not_captioned_again(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    assert specvlm("caption", videos / "more", "-o", out).code == 0
    (first,) = rows(out)
    assert specvlm("caption", videos, "-o", out).code == 0
    found = rows(out)
    assert len(found) == 4
    assert [row["id"] for row in found if row["path"] == first["path"]] == [first["id"]]
    before = snapshot(out)
    for given in (videos, videos / "more", videos / "more" / "d.mkv"):
        assert specvlm("caption", given, "-o", out).code == 0
        assert snapshot(out) == before


def test_progress_after_a_resume_counts_from_what_was_done(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "a.mp4").write_text("text")
    specvlm("caption", videos, "-o", out, "--limit", 2)
    said = specvlm("caption", videos, "-o", out, "--progress", "log").err
    assert re.search(r"^4/4 · 1 failed · ", said, re.MULTILINE)
    anew = specvlm("caption", videos, "-o", out, "--overwrite", "--progress", "log").err
    assert re.search(r"^4/4 · 1 failed · ", anew, re.MULTILINE)
