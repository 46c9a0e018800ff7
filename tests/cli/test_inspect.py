"""`specvlm inspect`: one video in, one PNG and its numbers out; errors are one line and leave no file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from numpy.typing import NDArray
from PIL import Image

from specvlm.inspection.drawing import FIRST_COLOUR, SECOND_COLOUR
from specvlm_cli import app
from tests.video_files import write_video

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "examples/videos/two-meet.mp4"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder; return its exit code, its output and its messages."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = app.main(["inspect", *map(str, arguments)])
        return code, *capfd.readouterr()

    return command


def pixels(sheet: Path) -> NDArray[np.uint8]:
    """Return a PNG, [height, width, 3]."""
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def colours(sheet: Path) -> tuple[bool, bool]:
    """Say whether the two stages' colours are on a sheet."""
    picture = pixels(sheet)
    first, second = ((picture == colour).all(axis=-1).any() for colour in (FIRST_COLOUR, SECOND_COLOUR))
    return bool(first), bool(second)


def numbers(out: str) -> dict[str, Any]:
    """Read the one JSON object on stdout."""
    said: dict[str, Any] = json.loads(out)
    return said


@pytest.mark.parametrize(("preset", "steps", "beyond"), [("demo", 4, 0), ("demo-llava", 8, 1)])
def test_a_sheet_and_its_numbers(run: Run, tmp_path: Path, preset: str, steps: int, beyond: int) -> None:
    code, out, err = run(CLIP, "--preset", preset, "--top-p", 0.02, "--json", "-o", "sheet.png")
    assert (code, err) == (0, "")
    said = numbers(out)
    assert (said["schema"], said["sheet"], said["video"]) == (1, "sheet.png", str(CLIP))
    assert said["target"] == f"specvlm-demo/{'llava' if beyond else 'qwen'}-target"
    assert (len(said["steps"]), said["no_cells"]["video_tokens"]) == (steps, beyond)
    assert said["video_tokens_kept"] == round(0.1 * said["video_tokens"])
    assert said["kept_first"] > 0
    assert said["kept_second"] > 0
    assert (said["pruner"], said["prune_ratio"], said["top_p"]) == ("specvlm", 0.9, 0.02)
    assert colours(tmp_path / "sheet.png") == (True, True)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_for_a_person_the_numbers_are_lines_and_the_sheet_has_the_video_s_name(
    run: Run, tmp_path: Path
) -> None:
    code, out, err = run(CLIP, "--pruner", "uniform", "--prune-ratio", 0.5, "--num-frames", 4)
    assert code == 0
    assert "using the tiny demo pair" in err
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert told["sheet"] == "two-meet-inspect.png"
    assert told["pruner"] == "uniform, prune ratio 0.5"
    assert told["frames"] == "4, 2 steps of 6 x 6 cells"
    assert "evenly over the video  36" in out
    assert colours(tmp_path / "two-meet-inspect.png") == (False, True)


def test_every_kept_token_is_on_some_line(run: Run) -> None:
    """LLaVA-OneVision's newline is of no step; a seventh frame of eight tokens shows the rest."""
    code, out, _ = run(CLIP, "--preset", "demo-llava", "--pruner", "window", "--num-frames", 7)
    assert code == 0
    told = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if not line.startswith(" "))
    assert told["of no step"] == "1 of 1 newline token behind the video"
    assert sum(map(int, told["kept by step"].split())) + 1 == int(told["kept"].split()[0])
    assert told["video tokens"].startswith("113, ")
    assert re.search(r"\(\d+\.\d %\)", told["kept"])


def test_other_frames_than_asked_for_are_told_once(run: Run) -> None:
    code, out, err = run(CLIP, "--preset", "demo", "--num-frames", 3)
    assert (code, err) == (0, "3 frames asked, 2 read: this model takes multiples of 2\n")
    assert dict(line.split(maxsplit=1) for line in out.splitlines())["frames"] == "2, 1 step of 6 x 6 cells"


def test_a_sheet_is_replaced_only_on_request(run: Run, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"mine")
    flags = (CLIP, "--preset", "demo", "--num-frames", 2, "-o", sheet)
    code, _, err = run(*flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "exists; give --overwrite" in err
    assert sheet.read_bytes() == b"mine"
    assert run(*flags, "--overwrite")[0] == 0
    assert pixels(sheet).shape[1] >= 1000
    assert list(tmp_path.iterdir()) == [sheet]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to inspect: give a video"),
        (["nowhere.mp4"], "nowhere.mp4: no such file; give a video"),
        (["."], ". is a folder; give one video of it"),
        ([CLIP, "-o", "sheet.jpg"], "--out 'sheet.jpg' is no PNG; give a name that ends with .png"),
        ([CLIP, "-o", "no/sheet.png"], "its folder does not exist"),
        ([CLIP, "--prune-ratio", "1.5"], "--prune-ratio 1.5 is out of range"),
        ([CLIP, "--pruner", "best"], "'best' is not one of"),
        ([CLIP, "--preset", "demo", "--target", "x"], "exclude each other"),
        ([CLIP, "--preset", "nothing"], "--preset nothing is unknown"),
        ([CLIP, "--prompt", " "], "--prompt is empty"),
        ([CLIP, "--fps", "1", "--num-frames", "3"], "exclude each other"),
        ([CLIP, "--decode-timeout", "0s"], "leaves no time"),
        ([CLIP, "--pictures", "0"], "--pictures 0 is out of range; give 1 to 400"),
        ([CLIP, CLIP], "inspect takes one video at a time, and 2 were given; give one"),
        (
            [CLIP, "--prompt", "a", "--prompt", "b"],
            "--prompt was given 2 times, and inspect asks one question",
        ),
        ([CLIP, "-o", "/nonexistent/sheet.png"], "its folder does not exist"),
        ([CLIP, "--draft", "x"], "--draft x is no folder of a trained head, and what a small model is given"),
        ([CLIP, "--device-map", "moon"], "'moon' is unknown"),
        ([CLIP, "--preset", "demo", "--prompt", "a <|im_end|> b"], "special token <|im_end|>"),
    ],
)
def test_wrong_flags_are_one_line(run: Run, tmp_path: Path, arguments: list[object], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("specvlm: error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_video_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text\x1b[31m.mp4").write_text("not a video at all\n" * 50)
    code, out, err = run("text\x1b[31m.mp4", "--preset", "demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert r"text\x1b[31m.mp4: " in err
    assert "NotAVideoError" in err
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


def test_a_folder_that_takes_no_file_is_one_line(run: Run) -> None:
    code, _, err = run(CLIP, "--preset", "demo", "--num-frames", 2, "-o", "/proc/self/sheet.png")
    assert (code, err.count("\n")) == (1, 1)
    assert "/proc/self/sheet.png: cannot be written" in err


def test_many_frames_in_few_pictures(run: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "long.mp4", frames=120)
    flags = ("long.mp4", "--preset", "demo-llava", "--num-frames", 60)
    code, out, _ = run(*flags, "--pictures", 4)
    assert code == 0
    assert "--json has all" in out
    few = len(pixels(tmp_path / "long-inspect.png"))
    assert run(*flags, "--pictures", 60, "-o", "all.png")[0] == 0
    assert len(pixels(tmp_path / "all.png")) > 3 * few


def test_wrong_flags_cost_no_model_library() -> None:
    program = """
import sys
from specvlm_cli.app import main
assert main(["inspect", "nowhere.mp4"]) == 2
print({"torch", "transformers", "PIL", "matplotlib", "av"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"


def test_every_flag_and_number_is_documented(run: Run) -> None:
    text = (ROOT / "docs" / "inspect.md").read_text()
    group: Any = typer.main.get_command(app.app)
    flags = {spelling for one in group.commands["inspect"].params for spelling in one.opts} - {"video"}
    assert {flag for flag in flags if f"`{flag}" not in text} == set()
    said = numbers(run(CLIP, "--preset", "demo", "--num-frames", 2, "--json")[1])
    names = {*said, *said["grid"], *said["no_cells"], *said["steps"][0]}
    assert {name for name in names if f"`{name}`" not in text} == set()
