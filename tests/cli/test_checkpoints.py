"""A model's fault ends a start in one line: changed files, failures on every video, too long a prompt."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from specvlm_cli import app
from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows, snapshot
from tests.tiny import Size, processor_for, tiny_model
from tests.video_files import write_video

Run = Callable[..., tuple[int, str]]
Change = Callable[[Path], object]


def failing(folder: Path, *texts: str) -> Path:
    """Videos that behave as these texts say, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.mp4").write_text(text)
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_fails_on_every_video_ends_the_run(
    specvlm: Specvlm, tmp_path: Path, out: Path, batch_size: int
) -> None:
    folder = failing(tmp_path / "videos", *(f"explodes {number}" for number in range(12)))
    result = specvlm("caption", folder, "-o", out, "--batch-size", batch_size)
    assert result.code == 1
    *_, line = result.err.splitlines()
    assert line.startswith(
        "specvlm: error: the first 5 videos all failed in generate with GenerationError: it went off;"
    )
    counts = specvlm("status", out, "--json").json["counts"]
    assert (counts["failed"], counts["pending"]) == (0, 12)
    assert rows(out, "failures") == []
    for number in range(12):
        (folder / f"{number:02d}.mp4").write_text(f"video {number}")
    assert specvlm("caption", folder, "-o", out).code == 0
    invariants.check(out, folder)


def test_numbers_in_the_error_and_unreadable_videos_in_between_do_not_matter(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = failing(
        tmp_path / "videos", "huge 1", "huge 2", "damaged", "huge 3", "huge 4", "text", "huge 5", "huge 6"
    )
    result = specvlm("caption", folder, "-o", out)
    assert (result.code, "all failed in generate with MemoryError" in result.err) == (1, True)
    assert {Path(str(row["path"])).name for row in rows(out, "failures")} == {"02.mp4", "05.mp4"}


@pytest.mark.parametrize(
    "texts",
    [
        ["video", *["explodes"] * 8],  # there is a caption
        ["explodes"] * 4 + ["video"] + ["explodes"] * 4,
        ["explodes", "explodes", "bug", "bug"] * 2,  # one error and another
        ["unfit"] * 8,  # not of the model
    ],
)
def test_videos_that_are_to_blame_fail(specvlm: Specvlm, tmp_path: Path, out: Path, texts: list[str]) -> None:
    folder = failing(tmp_path / "videos", *texts)
    assert specvlm("caption", folder, "-o", out).code == 3
    assert len(rows(out, "failures")) == len(texts) - texts.count("video")


def test_more_tokens_than_the_target_was_made_for_are_said_once_and_flagged(
    specvlm: Specvlm, tmp_path: Path, out: Path
) -> None:
    folder = failing(tmp_path / "videos", "video 0", "long 1", "long 2")
    result = specvlm("caption", folder, "-o", out, "-q")
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert "01.mp4: " in line
    assert "--max-frames, --num-frames, --max-pixels" in line
    found = {Path(str(row["path"])).name: row for row in rows(out)}
    tokens = found["01.mp4"]["prompt_tokens"] + found["01.mp4"]["completion_tokens"]
    assert f" {tokens} tokens, and the target was made for {tokens - 1};" in line
    assert [found[name]["flags"] for name in sorted(found)] == [[], ["beyond_context"], ["beyond_context"]]


# With real checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny_model("llava", Size(seed=1, vocabulary=320)).save_pretrained(folder)
    processor_for("llava").save_pretrained(folder)
    return folder


@pytest.fixture
def target(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "target"))


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    write_video(folder / "a.mp4", frames=20)
    return folder


@pytest.fixture
def run(forked: None, capfd: pytest.CaptureFixture[str], films: Path, out: Path, target: Path) -> Run:
    """Caption the films with the target, as it is; return the exit code and what was said."""

    def command(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        how = ("--target", target, "--max-new-tokens", 4, "--num-frames", 4, "--progress", "none")
        code = app.main(["caption", *map(str, (films, "-o", out, *how, *arguments))])
        return code, capfd.readouterr().err

    return command


def in_json(name: str, **more: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))

    return change


def negate(folder: Path) -> None:
    """Change the sign of one weight in the middle; size and time of change of the file stay."""
    file = folder / "model.safetensors"
    about, weights = file.stat(), load_file(file)
    weights[sorted(weights)[len(weights) // 2]] *= -1
    save_file(weights, file, {"format": "pt"})
    assert file.stat().st_size == about.st_size
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def add_line(name: str) -> Change:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write("\n")

    return change


CHANGES: dict[str, Change] = {
    "generation_config.json": in_json("generation_config.json", repetition_penalty=1.3),
    "processor_config.json": in_json("processor_config.json", note="other"),
    "tokenizer_config.json": in_json("tokenizer_config.json", clean_up_tokenization_spaces=True),
    "tokenizer.json": add_line("tokenizer.json"),
    "chat_template.jinja": add_line("chat_template.jinja"),
    "model.safetensors": negate,
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_in_a_local_target_is_noticed(
    run: Run, target: Path, films: Path, out: Path, name: str
) -> None:
    assert run()[0] == 0
    before = snapshot(out)
    assert run()[0] == 0
    CHANGES[name](target)
    for new in (False, True):  # with nothing to do, and with a video more
        if new:
            write_video(films / "b.mp4", frames=20)
        code, said = run()
        assert (code, "although it has its name: target_revision was" in said) == (2, True)
        assert "loading" in said or not new
    assert {path: seen for path, seen in snapshot(out).items() if path.endswith(".parquet")} == {
        path: seen for path, seen in before.items() if path.endswith(".parquet")
    }
    assert run("--on-config-change", "reuse")[0] == 0
    assert len({row["target_revision"] for row in rows(out)}) == 2


def test_a_finished_run_needs_no_weights(run: Run, target: Path, films: Path) -> None:
    assert run()[0] == 0
    (target / "model.safetensors").unlink()
    assert run()[0] == 0
    write_video(films / "b.mp4", frames=20)
    code, said = run()
    assert (code, "has no model.safetensors" in said) == (1, True)


def test_a_dry_run_notices_too(run: Run, target: Path) -> None:
    assert run()[0] == 0
    CHANGES["chat_template.jinja"](target)
    assert run("-n")[0] == 2


def leave_out(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("1.self_attn.o_proj.weight"))]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lose_a_weight, 1, "has no weight"),
        (leave_out("chat_template.jinja"), 1, "chat template"),
        (leave_out("tokenizer.json"), 1, "tokenizer"),
        (in_json("config.json", quantization_config={"quant_method": "gptq"}), 1, "quantised as GPTQ"),
        (in_json("processor_config.json", vocoder="net.pkl"), 2, "'net.pkl'"),
    ],
)
def test_a_fault_of_the_model_is_one_line_and_no_row(
    run: Run, target: Path, out: Path, change: Change, code: int, words: str
) -> None:
    change(target)
    ended, said = run("-q")
    (line,) = said.splitlines()
    assert (ended, line.startswith(f"specvlm: error: {target}")) == (code, True)
    assert words in line
    assert rows(out, "failures") == []
