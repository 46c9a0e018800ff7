"""Benchmarks of batches, throughput and pruning in small: they run, and their tables hold what was measured."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specvlm.packaged import demo_folder
from specvlm_cli.caption import coordinator
from tests.cli.conftest import forked, forked_readers

__all__ = ["forked", "forked_readers"]  # fixtures

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("batches", "throughput", "pruning", "pruning_shapes")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_batches_compares_every_method_and_a_useless_draft(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--clips 2 --batch-sizes 1,2 --repeat 2 --max-new-tokens 4".split()
    monkeypatch.setattr(sys, "argv", ["batches.py", *flags])
    scripts.batches.main()
    said = capsys.readouterr().out
    assert "Preset `demo`, 2 example clips from frames to text, 2 turns" in said
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")
    ]
    assert rows[0] == ["", "", "1", "2"]
    assert [row[:2] for row in rows[2:]] == [
        ["stock", "videos per hour"],
        *(["plain", name] for name in ("videos per hour", "x stock")),
        *(
            [f"specvlm 0.9 {how}", name]
            for how in ("auto, qwen-draft", "chain 6, qwen-draft", "auto, random weights")
            for name in ("videos per hour", "x stock", "x plain")
        ),
    ]
    assert all(row[2] and row[3] for row in rows[1:])
    assert "All captions are the same, token for token." in said


def test_the_command_and_the_loop_caption_the_same_files(
    scripts: Any, forked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.Coordinator, "run", coordinator.Coordinator.run)  # put back afterwards
    for name in ("two-meet.mp4", "one-grows.mp4"):
        shutil.copyfile(ROOT / "examples" / "videos" / name, tmp_path / name)
    stock = scripts.throughput.stock(tmp_path, "demo", 2)
    ours = scripts.throughput.ours(tmp_path, "demo", ["--max-new-tokens", "256"])
    assert stock.captions == ours.captions
    assert set(ours.captions) == {"two-meet.mp4", "one-grows.mp4"}
    assert all(ours.captions.values())
    assert min(stock.seconds, ours.seconds) > 0.0


def test_the_fastest_batch_of_each_turn_counts(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    timed = scripts.throughput.Timed
    texts = {"a.mp4": "A circle.", "b.mp4": "A square."}
    found = {
        "transformers, batches of 8": [timed(4.0, texts), timed(2.0, texts)],
        "transformers, batches of 16": [timed(2.0, texts), timed(4.0, texts)],
        "specvlm caption": [timed(1.0, texts | {"b.mp4": "A cube."}), timed(2.0, texts)],
    }
    options = argparse.Namespace(preset="demo", repeat=2, threads=torch.get_num_threads(), caption_flags="")
    scripts.throughput.report(found, options)
    said = capsys.readouterr().out
    assert "2 files, preset `demo`, `specvlm caption`, OMP_NUM_THREADS=1, 2 turns" in said
    assert "| transformers, batches of 8 | 2,700 | 1,980 to 3,420 |" in said
    assert "| ratio to the fastest of the others | 1.50 | 1.10 to 1.90 |" in said
    assert "1 of 2 captions are the same as those of transformers, batches of 8." in said


def test_clips_are_copied_under_other_names(scripts: Any, tmp_path: Path) -> None:
    scripts.throughput.copies(tmp_path, 3)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 24
    assert {"00-two-meet.mp4", "02-two-meet.mp4"} <= set(names)


def test_pruning_compares_every_ratio_and_reports_the_drafts_shares(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--target", str(demo_folder("qwen-target")), "--draft", str(demo_folder("qwen-draft"))]
    flags = "--frames 16 --clips 1 --batch-sizes 1 2 --ratios 0.9 --trees chain --repeat 1 --max-new-tokens 6"
    written = tmp_path / "pruning.json"
    monkeypatch.setattr(sys, "argv", ["pruning.py", *pair, *flags.split(), "--json", str(written)])
    scripts.pruning.main()
    said = capsys.readouterr().out
    assert "1 of 1 captions equal stock's" in said
    assert "288 video tokens, batch size 1:" in said
    assert "288 video tokens, batch size 2:" in said
    tables = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")
    ]
    labels = ["none, chain of 6", "specvlm 0.9, chain of 6", "uniform 0.9, chain of 6"]
    assert [row[0] for row in tables if row[0] and row[0] != "---"] == 2 * labels
    assert all(all(row) for row in tables if row[0] in labels)
    rows = json.loads(written.read_text())["rows"]
    turns = {(row["batch_size"], row["label"]): row["turns"][0] for row in rows}
    assert len(turns) == 2 * (len(labels) + 1) + 1  # plain at both batch sizes, stock at one
    for size in (1, 2):
        unpruned, pruned, plain = (turns[size, label] for label in (labels[0], labels[1], "plain"))
        assert unpruned["tokens"] == pruned["tokens"] == plain["tokens"] == size * 5
        assert plain["draft_bytes"] == plain["draft_s"] == 0
        assert 0 < pruned["draft_bytes"] < unpruned["draft_bytes"] < plain["kv_bytes"]
        assert unpruned["draft_decode_s"] < unpruned["draft_s"] < unpruned["e2e_s"]


def test_rounds_of_published_shapes_read_less_with_a_pruned_draft(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_shape, pass_bytes = scripts.pruning_shapes.find_shape, scripts.pruning_shapes.pass_bytes
    target, draft = find_shape("qwen2.5-vl-7b"), find_shape("qwen2.5-vl-3b")
    found = scripts.pruning_shapes.round_of(target, draft, 2000, 200, 100, 8, 6)
    assert (
        found.target_kv == 8 * 2100 * 28 * 2 * 4 * 128 * 2
    )  # rows, tokens, layers, K and V, heads, width, bytes
    assert found.draft_kv == 8 * 300 * 36 * 2 * 2 * 128 * 2
    assert found.draft == 6 * pass_bytes(draft.text, 8 * 300, 2)
    monkeypatch.setattr(sys, "argv", ["pruning_shapes.py"])
    scripts.pruning_shapes.main()
    said = capsys.readouterr().out
    assert "llava-onevision-7b with llava-onevision-0.5b, a chain of 6:" in said
    assert "| 8,000 | 32 | 0.9 |" in said
