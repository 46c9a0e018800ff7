"""A prompt added to a run: the videos that lack its caption are pending, and nothing that is there is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Specvlm, rows, snapshot
from tests.cli.drive import Kill
from tests.faults.harness import Driver, Trial, make_videos, place

ONE = ("--prompt", "first question")
BOTH = (*ONE, "--prompt", "second question")
REUSE = ("--on-config-change", "reuse")


def asked(out: Path) -> dict[tuple[str, int], str]:
    """Return which prompt each caption is for, by (name, prompt index)."""
    found = rows(out)
    assert len({(row["id"], row["prompt_index"]) for row in found}) == len(found)
    return {(row["path"].rpartition("/")[2], row["prompt_index"]): row["prompt"] for row in found}


def made_at(out: Path) -> dict[tuple[str, int], Any]:
    return {(row["id"], row["prompt_index"]): row["created_at"] for row in rows(out)}


def all_of(names: list[str]) -> dict[tuple[str, int], str]:
    return {(name, index): text for name in names for index, text in enumerate(BOTH[1::2])}


NAMES = ["a.mp4", "b.webm", "c.MP4", "d.mkv"]


def test_only_the_new_prompt_is_asked(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    before = made_at(out)
    refused = specvlm("caption", videos, "-o", out, *BOTH)
    assert refused.code == 2
    assert "--on-config-change reuse (keep them, ask only what is new, about all videos)" in refused.err
    shown = specvlm("caption", videos, "-o", out, *BOTH, *REUSE, "-n")
    assert (shown.out.count("\n"), "0 are done" in shown.err) == (4, True)
    specvlm.engine.lines()
    result = specvlm("caption", videos, "-o", out, *BOTH, *REUSE, "--json")
    assert (result.code, result.json["done"], result.json["pending"]) == (0, 4, 0)
    assert (result.json["figures"]["captions"], result.json["figures"]["videos"]) == (4, 4)
    assert result.json["videos_per_hour"] > 0
    assert asked(out) == all_of(NAMES)
    assert before.items() <= made_at(out).items()
    assert len(specvlm.engine.captioned) == 8
    assert specvlm("status", out, "--verify").code == 0
    at_rest = snapshot(out)
    assert "nothing to do: 4 done" in specvlm("caption", videos, "-o", out, *BOTH).err
    assert snapshot(out) == at_rest


def test_with_a_limit_the_others_stay_pending(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    result = specvlm("caption", videos, "-o", out, *BOTH, *REUSE, "--limit", 1, "--json").json
    assert (result["done"], result["pending"], len(rows(out))) == (1, 3, 5)
    assert specvlm("status", out, "--json").json["counts"]["pending"] == 3
    assert specvlm("caption", videos, "-o", out, *BOTH, "--json").json["done"] == 4
    assert asked(out) == all_of(NAMES)
    assert len(specvlm.engine.captioned) == 8


def test_a_video_that_fails_the_new_prompt_keeps_its_caption(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    before = made_at(out)
    (videos / "a.mp4").write_text("explodes")
    assert specvlm("caption", videos, "-o", out, *BOTH, *REUSE).code == 3
    (failed,) = rows(out, "failures")
    assert failed["path"].endswith("a.mp4")
    assert asked(out) == {key: text for key, text in all_of(NAMES).items() if key != ("a.mp4", 1)}
    found = specvlm("export", out, tmp_path / "dest", "--json").json
    assert (found["captions"], found["failures"]) == (7, 1)
    assert found["videos"] == {"captioned": 3, "failed": 1, "pending": 0}
    (videos / "a.mp4").write_text("video a.mp4")
    assert "3 done, 1 failed, 0 to do" in specvlm("caption", videos, "-o", out, *BOTH).err
    assert specvlm("caption", videos, "-o", out, *BOTH, "--retry-failed").code == 0
    assert asked(out) == all_of(NAMES)
    assert before.items() <= made_at(out).items()
    assert not rows(out, "failures")


def test_a_video_that_failed_before_gets_both(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "a.mp4").write_text("explodes")
    assert specvlm("caption", videos, "-o", out, *ONE).code == 3
    (videos / "a.mp4").write_text("video a.mp4")
    assert specvlm("caption", videos, "-o", out, *BOTH, *REUSE).code == 3
    assert ("a.mp4", 0) not in asked(out)
    assert specvlm("caption", videos, "-o", out, *BOTH, "--retry-failed").code == 0
    assert asked(out) == all_of(NAMES)


def test_back_to_one_prompt_what_waited_for_the_other_is_done(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    for name in ("a.mp4", "b.webm"):
        (videos / name).write_text("explodes")
    assert specvlm("caption", videos, "-o", out, *BOTH, *REUSE, "--max-failures", 1).code == 4
    result = specvlm("caption", videos, "-o", out, *ONE, *REUSE, "--json").json
    assert (result["done"], result["failed"], result["pending"]) == (4, 0, 0)
    assert not rows(out, "failures")
    assert len(specvlm.engine.loads) == 2
    assert specvlm("status", out, "--verify").code == 0


def test_shards_that_come_later_need_no_flag(specvlm: Specvlm, videos: Path, out: Path) -> None:
    for shard in ("0/2", "1/2"):
        specvlm("caption", videos, "-o", out, "--shard", shard, *ONE)
    before = made_at(out)
    specvlm("caption", videos, "-o", out, "--shard", "0/2", *BOTH, *REUSE)
    left = specvlm("status", out, "--only-missing").out.strip()
    assert left == "1"
    assert specvlm("caption", videos, "-o", out, "--shard", "1/2", *BOTH).code == 0
    assert asked(out) == all_of(NAMES)
    assert before.items() <= made_at(out).items()
    for shard in ("0/1",):
        assert specvlm("caption", videos, "-o", out, "--shard", shard, "--reshard", *BOTH).code == 0
    assert asked(out) == all_of(NAMES)
    assert len(specvlm.engine.captioned) == 8


def test_half_done_and_divided_anew(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    before = made_at(out)
    (videos / "a.mp4").write_text("explodes")
    assert specvlm("caption", videos, "-o", out, *BOTH, *REUSE, "--fail-fast").code == 4
    (videos / "a.mp4").write_text("video a.mp4")
    for shard in ("0/2", "1/2"):
        flags = ("--shard", shard, "--reshard", "--retry-failed")
        assert specvlm("caption", videos, "-o", out, *BOTH, *flags).code == 0
    assert asked(out) == all_of(NAMES)
    assert before.items() <= made_at(out).items()


@pytest.mark.parametrize("point", ["reopen", "run_file", "claim", "finish", "write", "add_part"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_half_way(point: str, when: Any) -> None:
    with place() as folder, Driver() as driver:
        trial = Trial(driver, folder, make_videos(folder / "videos", 4, bad=False))
        assert driver.wait(driver.start(trial.order(*ONE))) == 0
        before = made_at(trial.out)
        nth = 2 if point in ("claim", "finish") else 1
        kill = Kill(point, when, nth)
        assert driver.wait(driver.start(trial.order(*BOTH, *REUSE, kill=kill))) == -9
        assert before.items() <= made_at(trial.out).items()
        assert driver.wait(driver.start(trial.order(*BOTH, *REUSE))) == 0
        assert asked(trial.out) == all_of([f"{number:03d}.mp4" for number in range(4)])
        assert before.items() <= made_at(trial.out).items()


def test_a_deleted_ledger(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    before = made_at(out)
    (out / ".specvlm/state-00000.db").unlink()
    assert specvlm("caption", videos, "-o", out, *BOTH, *REUSE).code == 0
    assert asked(out) == all_of(NAMES)
    assert before.items() <= made_at(out).items()


def test_overwriting_makes_all_of_them(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    before = made_at(out)
    assert specvlm("caption", videos, "-o", out, *BOTH, "--overwrite").code == 0
    assert asked(out) == all_of(NAMES)
    assert not before.items() & made_at(out).items()


def test_one_that_was_to_be_overwritten_is_made_whole(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, *ONE)
    before = made_at(out)
    (videos / "a.mp4").write_text("explodes")
    specvlm("caption", videos, "-o", out, *BOTH, *REUSE, "--fail-fast")
    assert specvlm("caption", videos, "-o", out, *BOTH, "--overwrite", "--fail-fast").code == 4
    (videos / "a.mp4").write_text("video a.mp4")
    assert specvlm("caption", videos, "-o", out, *BOTH, "--retry-failed").code == 0
    assert asked(out) == all_of(NAMES)
    assert not before.items() & made_at(out).items()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["B"], ["A", "B"]),
        (["A"], ["B", "A"]),
        (["A", "B"], ["B", "C"]),
        (["A", "B"], ["B", "A"]),
    ],
)
def test_prompts_in_another_place_are_refused(
    specvlm: Specvlm, videos: Path, out: Path, first: list[str], then: list[str]
) -> None:
    specvlm("caption", videos, "-o", out, *(word for text in first for word in ("--prompt", text)))
    before = snapshot(out)
    refused = specvlm(
        "caption", videos, "-o", out, *REUSE, *(word for text in then for word in ("--prompt", text))
    )
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "prompt_index" in refused.err
    assert "in their order, and new ones after them" in refused.err
    assert snapshot(out) == before


def test_a_prompt_in_place_of_another_keeps_old_captions(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, "--prompt", "A")
    assert specvlm("caption", videos, "-o", out, "--prompt", "X", *REUSE).code == 0
    assert len(specvlm.engine.captioned) == 4
    assert specvlm("caption", videos, "-o", out, "--prompt", "X", "--prompt", "Y", *REUSE).code == 0
    assert {text for (_, index), text in asked(out).items() if index == 0} == {"A"}
    assert {text for (_, index), text in asked(out).items() if index == 1} == {"Y"}


def test_the_prompts_of_a_manifest(specvlm: Specvlm, videos: Path, out: Path) -> None:
    manifest = videos / "clips.jsonl"

    def write(prompts: list[str]) -> None:
        lines = [{"video": "a.mp4", "prompt": prompts}, {"video": "b.webm", "prompt": ["first question"]}]
        manifest.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    write(["first question"])
    specvlm("caption", manifest, "-o", out)
    before = made_at(out)
    write(["first question", "second question"])
    assert specvlm("caption", manifest, "-o", out).code == 2
    assert specvlm("caption", manifest, "-o", out, *REUSE).code == 0
    assert asked(out) == all_of(["a.mp4"]) | {("b.webm", 0): "first question"}
    assert before.items() <= made_at(out).items()
    write(["third question", "first question", "second question"])
    refused = specvlm("caption", manifest, "-o", out, *REUSE)
    assert (refused.code, "a.mp4 has a caption for the prompt" in refused.err) == (2, True)
    assert len(specvlm.engine.captioned) == 3


def test_a_run_that_the_version_before_went_on_with(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    """It asked an added prompt about new videos alone, and took the old ones for done."""
    shutil.move(videos / "a.mp4", tmp_path)
    specvlm("caption", videos, "-o", out, *ONE)
    shutil.move(tmp_path / "a.mp4", videos)
    run = json.loads((out / ".specvlm/run.json").read_text())
    run["settings"]["prompt"] = list(BOTH[1::2])
    (out / ".specvlm/run.json").write_text(json.dumps(run))
    assert specvlm("status", out, "--json").json["counts"]["pending"] == 3
    assert specvlm("caption", videos, "-o", out, *BOTH).code == 0
    assert asked(out) == all_of(NAMES)
