"""The command with the real library: random tiny models, real video files, files that are none, and a wrong draft."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

import specvlm
from recipes.demo.tokenizer import tokenizer_from
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm_cli import app
from tests.cli import invariants
from tests.cli.conftest import rows
from tests.tiny import FamilyName, Size, processor_for, tiny_model
from tests.video_files import cut, write_audio, write_video

Run = Callable[..., tuple[int, dict[str, Any], str]]


def save(folder: Path, family: FamilyName, size: Size) -> Path:
    """Write a checkpoint folder."""
    tiny_model(family, size).save_pretrained(folder)
    processor_for(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("qwen", "llava"):
        save(root / family, family, Size(seed=1, vocabulary=320))
        save(root / f"{family}-draft", family, Size(layers=1, seed=2, vocabulary=290))
    other = save(root / "other-tokenizer", "qwen", Size(layers=1, seed=2))
    symbols = sorted(ByteLevel.alphabet(), reverse=True)
    tokenizer_from({symbol: number for number, symbol in enumerate(symbols)}, [], "qwen").save_pretrained(
        other
    )
    heads(root)
    return root


def heads(root: Path) -> None:
    """A head of the target `qwen`, and what may become of it."""
    captioner = specvlm.load(str(root / "qwen"))
    target, revision = captioner.target, captioner.info.target_revision
    config = HeadConfig("qwen", revision, target.family.name, target.hidden_size)
    HeadModel.fresh(target, config, 0).save(root / "head")
    for name in ("stale", "later"):
        shutil.copytree(root / "head", root / f"{name}-head")
    for name, said in (("stale", {"target_revision": f"sha256:{16 * '0'}"}), ("later", {"format": 9})):
        file = root / f"{name}-head" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | said))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good videos and five files that are none."""
    folder = tmp_path_factory.mktemp("films")
    good = write_video(folder / "good.mp4", frames=40)
    write_video(folder / "vp9.webm", codec="libvpx-vp9", frames=30)
    (folder / "text.mp4").write_text("not a video at all\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    write_audio(folder / "audio.mp4")
    cut(good, folder / "cut.mp4", 0.3)
    (folder / "gone.mp4").symlink_to("nowhere")
    return folder


@pytest.fixture
def run(forked: None, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command; return its exit code, its JSON and its messages."""

    def command(*arguments: object) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        code = app.main(["caption", *map(str, arguments), "--json", "--max-new-tokens", "24"])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out else {}, err

    return command


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_good_videos_are_captioned_and_bad_files_explained(
    run: Run, models: Path, films: Path, out: Path, family: str
) -> None:
    pair = ("--target", models / family, "--draft", models / f"{family}-draft")
    pair = (*pair, "--tree", "static")
    code, said, err = run(films, "-o", out, *pair, "--baseline-sample", 1, "--num-frames", 4)
    assert code == 3
    assert (said["done"], said["failed"]) == (2, 5)
    assert (said["figures"]["identical"], said["figures"]["compared"]) == (2, 2)
    invariants.check(out, films, failed=5)
    for row in rows(out):
        assert row["exact_match"] is True
        assert row["decode_speedup"] > 0
        assert row["e2e_speedup"] > 0
        assert row["target_model"] == str(models / family)
        assert re.fullmatch("sha256:[0-9a-f]{16}", row["target_revision"])
        assert row["num_frames"] == 4
        assert row["duration_s"] > 0.9
        assert 0 < row["video_tokens_kept"] < row["video_tokens"] < row["prompt_tokens"]
        assert sum(row["acceptance_histogram"]) == row["num_drafts"] > 0
        assert row["method"] == "specvlm/specvlm/static"
        assert row["total_s"] > row["decode_s"] + row["video_decode_s"] + row["preprocess_s"]
    failures = {Path(row["path"]).stem: row for row in rows(out, "failures")}
    assert {name: row["error_type"] for name, row in failures.items()} == {
        "text": "NotAVideoError",
        "empty": "NotAVideoError",
        "audio": "NotAVideoError",
        "cut": failures["cut"]["error_type"],
        "gone": "VideoNotFoundError",
    }
    assert {row["stage"] for row in failures.values()} <= {"open", "decode"}
    assert all(row["error"] and "\n" not in row["error"] for row in failures.values())
    assert err.count("failed: ") == 5


def test_prompts_of_one_video_share_what_comes_before_them(
    run: Run, models: Path, films: Path, out: Path
) -> None:
    """Rows are as if each prompt were alone; what is shared stands in the first row, with a baseline too."""
    film, target, draft = films / "good.mp4", models / "llava", models / "llava-draft"
    prompts = ("What is it?", "And <video> here?", "What is it, said at length? " * 9)
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    pair = ("--target", target, "--draft", draft, "--num-frames", 4)
    code, said, _ = run(film, "-o", out, *pair, *asked, "--baseline-sample", 1)
    assert (code, said["figures"]["identical"], said["figures"]["compared"]) == (0, 3, 3)
    together = sorted(rows(out), key=lambda row: row["prompt_index"])
    captioner = specvlm.load(str(target), draft=str(draft))
    few = specvlm.FrameSettings(num_frames=4)
    for row, prompt in zip(together, prompts, strict=True):
        alone = captioner.caption(film, prompt, frames=few, max_new_tokens=24)
        assert (row["prompt"], row["caption"]) == (prompt, alone.text)
        assert row["prompt_tokens"] == alone.stats.prompt_tokens
    assert [row["video_decode_s"] > 0 for row in together] == [True, False, False]
    assert all(row["total_s"] > row["decode_s"] + row["target_prefill_s"] > 0 for row in together)
    for stage, total_s in said["figures"]["stages_s"].items():
        assert total_s == pytest.approx(sum(row[stage] for row in together)), stage


def test_the_draft_cannot_change_a_caption(run: Run, models: Path, films: Path, tmp_path: Path) -> None:
    target = ("--target", models / "qwen", "--num-frames", 4, "--prompt", "What is it?")
    draft = ("--draft", models / "qwen-draft")
    captions = []
    for number, flags in enumerate(
        [
            (),
            (*draft, "--pruner", "uniform", "--prune-ratio", 0.5, "--tree", "chain", "--depth", 3),
            (*draft, "--tree", "dynamic", "--nodes", 12, "--positions", "compact", "--pruner", "random"),
        ]
    ):
        out = tmp_path / str(number)
        assert run(films / "good.mp4", "-o", out, *target, *flags)[0] == 0
        captions.append([(row["id"], row["caption"]) for row in rows(out)])
    assert captions[0] == captions[1] == captions[2]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--target", "qwen", "--draft", "other-tokenizer"], 2, "other-tokenizer: its tokenizer differs"),
        (["--target", "qwen", "--draft", "llava-draft"], 2, "llava-draft: its family is llava_onevision"),
        (
            ["--target", "qwen", "--draft", "stale-head"],
            2,
            "made for qwen (content sha256:0000000000000000), and qwen",
        ),
        (["--target", "qwen", "--draft", "later-head"], 1, "config.json (its format is 9, not 1); train it"),
        (["--target", "nowhere"], 1, "nowhere: no such preset or folder"),
        (["--target", "qwen", "--dtype", "int3"], 2, "--dtype': 'int3' is not one of"),
        (["--target", "qwen", "--prompt", "a <|im_end|> b"], 2, "special token <|im_end|>"),
    ],
)
def test_wrong_models_and_prompts_are_one_line(
    run: Run,
    models: Path,
    films: Path,
    out: Path,
    flags: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    ended, _, err = run(films / "good.mp4", "-o", out, *flags, "--local-files-only", "-q")
    assert ended == code
    (line,) = err.splitlines()
    assert line.startswith("specvlm: error: ")
    assert words in line
