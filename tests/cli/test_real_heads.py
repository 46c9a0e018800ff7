"""An untrained head for the demo target: `caption` and `bench` with it, beside the small model, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import specvlm
from specvlm import preset
from specvlm.config import ModelSettings
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm_cli import app
from tests.cli.conftest import rows

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "examples" / "videos" / "two-meet.mp4"
Run = Callable[..., tuple[int, str, str]]
QUICK = ("--limit", 1, "--repeat", 1, "--max-new-tokens", 12, "--tree", "dynamic", "--json", "-q")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained head for the demo target."""
    captioner = specvlm.load("demo", draft="none")
    target, revision = captioner.target, captioner.info.target_revision
    compressor = CompressorConfig("single", ("pool",), ratio=4.0)
    config = HeadConfig("demo", revision, target.family.name, target.hidden_size, compressor=compressor)
    folder = tmp_path_factory.mktemp("heads") / "my-head"
    HeadModel.fresh(target, config, 0).save(folder)
    return folder


@pytest.fixture
def run(forked: None, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return its exit code, stdout and stderr."""

    def runs(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = app.main(list(map(str, arguments)))
        return code, *capfd.readouterr()

    return runs


@pytest.fixture
def shipped(head: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset `demo-head` with that head, as if it shipped."""
    demo = next(one for one in preset.presets() if one.name == "demo")
    mine = replace(demo, name="demo-head", draft=str(head))
    monkeypatch.setattr(preset, "_PRESETS", (demo, mine))
    return mine.name


def test_captions_with_a_head_are_those_without_and_say_what_it_saw(
    run: Run, head: Path, tmp_path: Path
) -> None:
    flags = ("--preset", "demo", "--tree", "dynamic", "--max-new-tokens", 12, "-q")
    for name, draft in (("plain", "none"), ("headed", head)):
        assert run("caption", CLIP, "-o", tmp_path / name, "--draft", draft, *flags)[0] == 0
    ((plain,), (headed,)) = (rows(tmp_path / name) for name in ("plain", "headed"))
    assert headed["caption"] == plain["caption"]
    assert headed["config_hash"] == plain["config_hash"], "a draft changes no caption"
    assert (headed["method"], headed["draft_model"]) == ("specvlm-head/pool/dynamic", str(head))
    assert (headed["compressor"], plain["compressor"], plain["compression_ratio"]) == ("pool", None, None)
    assert headed["video_tokens_kept"] == round(headed["video_tokens"] / 4)
    assert headed["compression_ratio"] == headed["video_tokens"] / headed["video_tokens_kept"]
    assert headed["num_drafts"] > 0


def test_the_demo_bench_has_the_head_that_ships_beside_the_small_model(
    run: Run, shipped: str, head: Path, tmp_path: Path
) -> None:
    code, said, told = run("bench", *QUICK, "-o", tmp_path)
    assert (code, told) == (0, "")
    found = json.loads(said)
    assert found["conditions"]["draft"] == f"specvlm-demo/qwen-draft, {head}"
    summaries = {one["label"]: one for one in found["summaries"]}
    assert list(summaries) == [
        *("stock", "assisted", "plain", "sd dynamic", "specvlm 0.9 dynamic", "head dynamic")
    ]
    for label, one in summaries.items():
        if label not in ("stock", "assisted"):
            assert one["exact_match"] == 1.0, label
    small, ours = summaries["specvlm 0.9 dynamic"], summaries["head dynamic"]
    assert (small["draft"], ours["draft"]) == ("specvlm-demo/qwen-draft", str(head))
    assert (small["compressors"], ours["compressors"]) == ([], ["pool"])
    assert (ours["pruner"], ours["prune_ratio"], ours["tree"]) == (None, None, "dynamic")
    assert ours["limit"]
    written = pq.read_table(tmp_path / "bench.parquet").to_pylist()
    made = {(row["method"], row["draft"], row["compressor"]) for row in written}
    assert made == {
        ("stock", None, None),
        ("plain", None, None),
        ("sd", "specvlm-demo/qwen-draft", None),
        ("specvlm", "specvlm-demo/qwen-draft", None),
        ("head", str(head), "pool"),
    }
    assert "What the draft saw of" in (tmp_path / "bench.html").read_text(), "of the small model, pruned"


def test_two_heads_are_named_and_need_no_small_model(run: Run, head: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-head"
    other.symlink_to(head)
    linked = tmp_path / "copied"
    linked.mkdir()
    for file in head.iterdir():
        (linked / file.name).write_bytes(file.read_bytes())
    flags = ("--preset", "demo", "--draft", head, "--draft", linked)
    code, said, _ = run("bench", *QUICK, *flags)
    assert code == 0
    found = json.loads(said)
    assert [one["label"] for one in found["summaries"]] == [
        *("stock", "plain", "head dynamic, my-head", "head dynamic, copied")
    ]
    assert found["conditions"]["command"].endswith(f"--draft {head} --draft {linked}")
    code, _, told = run("bench", *QUICK, "--preset", "demo", "--draft", head, "--draft", other)
    assert (code, told) == (
        2,
        "specvlm: error: --draft was given twice with the same draft; give each once\n",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draft", "HEAD", "--methods", "sd"], "--methods sd needs a small model as its draft"),
        (
            ["--draft", "specvlm-demo/qwen-draft", "--methods", "head"],
            "--methods head needs the folder of a trained head",
        ),
        (["--draft", "none", "--methods", "head"], "--methods head needs a draft, and there is none"),
        (["--draft", "HEAD", "--draft", "none"], "--draft none goes with no other draft"),
        (["--draft", "HEAD", "--methods", "plain"], "is used by none of --methods plain; leave it out"),
        (["--draft", "HEAD", "--prune-ratio", "0.9"], "--prune-ratio 0.9 has no effect on "),
        (["--draft", "HEAD", "--pruner", "specvlm"], "--pruner specvlm has no effect on "),
        (["--draft", "HEAD", "--draft-revision", "v1"], "a trained head is a folder, without revisions"),
        (
            ["--draft", "HEAD", "--draft", "a/b", "--draft-revision", "v1"],
            "does not say of which of 2 drafts",
        ),
    ],
)
def test_what_a_bench_refuses_of_heads(run: Run, head: Path, arguments: list[str], words: str) -> None:
    code, said, told = run("bench", *(str(head) if one == "HEAD" else one for one in arguments))
    assert (code, said) == (2, "")
    assert words in told.splitlines()[-1]


def test_the_variable_names_one_draft(run: Run, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECVLM_DRAFT", str(head))
    code, said, _ = run("bench", *QUICK, "--preset", "demo")
    assert code == 0
    assert [one["method"] for one in json.loads(said)["summaries"]] == ["stock", "plain", "head"]


def test_inspect_says_what_the_head_was_given(run: Run, shipped: str, head: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    code, said, told = run("inspect", CLIP, "--preset", shipped, "-o", sheet, "--json")
    assert (code, told) == (0, "")
    found = json.loads(said)
    assert (found["draft"], found["compressor"], found["pruner"]) == (str(head), "pool", None)
    assert (found["video_tokens"], found["video_tokens_kept"], found["kept_first"]) == (144, 36, None)
    assert sheet.stat().st_size > 1000
    code, said, _ = run("inspect", CLIP, "--preset", "demo", "--draft", head, "-o", sheet, "--overwrite")
    assert code == 0
    lines = dict(line.split("  ", 1) for line in said.splitlines())
    assert lines["compressor"].strip() == "pool, 4.0 video tokens to one"
    assert lines["the head sees"].strip() == "36 (25.0 %), made of all cells"
    code, _, told = run("inspect", CLIP, "--preset", shipped, "--prune-ratio", 0.5, "-o", tmp_path / "no.png")
    assert (code, told.count("\n")) == (2, 1)
    assert f"--prune-ratio 0.5 has no effect on {head}, a trained head: " in told


def test_doctor_generates_with_a_head(shipped: str) -> None:
    from specvlm_cli.doctor import probe

    found = probe.generation(shipped)
    assert found["same"]
    assert found["tokens"] == probe.TOKENS


def test_a_head_of_another_target_is_refused_in_one_line(run: Run, head: Path) -> None:
    code, said, told = run("bench", CLIP, *QUICK, "--preset", "demo-llava", "--draft", head)
    assert (code, said) == (2, "")
    assert told.count("\n") == 1
    assert "this head was made for demo" in told


def test_a_draft_that_shares_the_target_is_checked_like_any_other() -> None:
    from specvlm.loading import with_draft

    captioner = specvlm.load("demo", draft="none")
    other = with_draft(captioner, ModelSettings("demo", preset.presets()[0].draft))
    assert other.target is captioner.target
    assert captioner.draft is None
    assert other.info == replace(
        captioner.info, draft=preset.presets()[0].draft, draft_revision=other.info.draft_revision
    )
    assert other.costs is not captioner.costs
    llava = str(Path(preset.presets()[0].draft).with_name("llava-draft"))
    with pytest.raises(specvlm.IncompatibleDraftError, match="its family is llava_onevision"):
        with_draft(captioner, ModelSettings("demo", llava))
    with pytest.raises(specvlm.ModelLoadError, match="no such preset or folder"):
        with_draft(captioner, ModelSettings("demo", "nowhere"))
