"""Trained heads on the command line, told by their folder alone: presets, rows, and flags that mean nothing to them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specvlm import preset
from specvlm.bench.grid import Grid, GridDraft
from specvlm.bench.records import Stages, TimedCaption
from specvlm_cli import bench_files, checkpoints
from specvlm_cli.console.bench import tell
from specvlm_cli.doctor.models import _missing
from tests.bench_reports import made
from tests.cli.conftest import Specvlm, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A folder that says that it holds a head."""
    folder = tmp_path / "my-head"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "specvlm_head", "format": 1}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.fixture
def with_preset(head: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a preset with that head."""
    demo = next(one for one in preset.presets() if one.name == "demo")
    mine = replace(demo, name="my-head", draft=str(head))
    monkeypatch.setattr(preset, "_PRESETS", (demo, mine))
    monkeypatch.setattr(checkpoints, "presets", preset.presets)
    return mine.name


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--pruner", "specvlm"), ("--prune-ratio", "0.9"), ("--top-p", "0.4"), ("--positions", "keep")],
)
def test_a_flag_without_effect_on_a_head_is_refused(
    specvlm: Specvlm, videos: Path, out: Path, head: Path, flag: str, value: str
) -> None:
    """Even with its default: it was asked for."""
    refused = specvlm("caption", videos, "-o", out, "--preset", "demo", "--draft", head, flag, value)
    assert (refused.code, refused.err.count("\n"), out.exists()) == (2, 1, False)
    assert refused.err.startswith(f"specvlm: error: {flag} {value} has no effect on {head}, a trained head: ")


def test_neither_is_one_that_comes_from_the_environment(
    specvlm: Specvlm, videos: Path, out: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECVLM_PRUNE_RATIO", "0.5")
    refused = specvlm("caption", videos, "-o", out, "--preset", "demo", "--draft", head)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--prune-ratio 0.5 has no effect" in refused.err
    assert specvlm("caption", videos, "-o", out, "--preset", "demo").code == 0, "a small model heeds it"
    assert specvlm.loads[0].speculation.prune_ratio == 0.5


def test_a_head_has_no_revision(specvlm: Specvlm, videos: Path, out: Path, head: Path) -> None:
    refused = specvlm(
        "caption", videos, "-o", out, "--preset", "demo", "--draft", head, "--draft-revision", "v1"
    )
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--draft-revision v1: a trained head is a folder" in refused.err


def test_a_head_captions_with_its_trees_and_the_row_says_so(
    specvlm: Specvlm, videos: Path, out: Path, head: Path
) -> None:
    flags = ("--preset", "demo", "--draft", head, "--tree", "dynamic", "--depth", 3, "--nodes", 20)
    (videos / "a.mp4").write_text("headed a")
    assert specvlm("caption", videos, "-o", out, *flags).code == 0
    (settings,) = specvlm.loads
    assert settings.models.draft == str(head)
    assert (settings.speculation.tree, settings.speculation.depth, settings.speculation.nodes) == (
        "dynamic",
        3,
        20,
    )
    found = {row["path"].rpartition("/")[2]: row for row in rows(out)}
    headed, other = found["a.mp4"], found["b.webm"]
    assert (headed["method"], headed["compressor"], headed["compression_ratio"]) == (
        *("specvlm-head/select/static", "pool"),
        5.0,
    )
    assert (other["method"], other["compressor"], other["compression_ratio"]) == (
        "specvlm/specvlm/static",
        None,
        None,
    )


def test_a_preset_with_a_head_is_listed_and_on_disk(specvlm: Specvlm, with_preset: str, head: Path) -> None:
    listed = specvlm("presets")
    assert (listed.code, listed.err) == (0, "")
    assert with_preset in listed.out
    found = {one["name"]: one for one in specvlm("presets", "--json").json["presets"]}[with_preset]
    assert (found["target"], found["draft"]) == ("specvlm-demo/qwen-target", str(head))
    assert (found["target_on_disk"], found["draft_on_disk"]) == ("yes", "yes")
    weights = Path(preset.presets()[0].target) / "model.safetensors"
    assert found["memory_bytes"] == weights.stat().st_size + 1000
    assert _missing(with_preset) == ""
    assert preset.head_of(preset.presets()[0].target) == str(head)


def test_a_head_without_its_weights_is_not_on_disk(with_preset: str, head: Path) -> None:
    (head / "model.safetensors").unlink()
    assert {one.name: one.draft_on_disk for one in checkpoints.preset_views()}[with_preset] == "no"
    assert _missing(with_preset) == str(head)


def test_a_draft_whose_name_is_no_text_is_written_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafts = tuple(GridDraft(name, is_head=True) for name in ("/work/a\x1b[31m", "/work/\udcff"))
    report = made(Grid(("stock", "head"), trees=("auto",), drafts=drafts))
    samples = tuple(
        TimedCaption(
            how, "a.mp4", 1, 8, 100, 20, 120, (1, 2), Stages(), 1.0, 1, 2.0, 0, 0, 0, (), (), 7, "pool"
        )
        for how in Grid(("head",), trees=("auto",), drafts=drafts).all()
    )
    bench_files.write(replace(report, samples=samples), tmp_path)
    found = pq.read_table(tmp_path / "bench.parquet").to_pylist()
    assert [(row["draft"], row["compressor"]) for row in found] == [
        ("/work/a\x1b[31m", "pool"),
        ("/work/\\xff", "pool"),
    ]
    tell(report)
    said = capsys.readouterr().out
    assert "head auto, a\ufffd[31m" in said
    assert "\x1b" not in said


def test_a_flag_is_refused_without_torch(head: Path) -> None:
    program = f"""
import sys
from specvlm_cli.app import main
assert main(["caption", ".", "--preset", "demo", "--draft", {str(head)!r}, "--top-p", "0.4"]) == 2
print({{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"
