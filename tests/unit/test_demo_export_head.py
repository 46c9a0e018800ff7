"""A trained head goes into the package with a card, and without what its training left beside it."""

from dataclasses import asdict
from pathlib import Path

import pytest

import specvlm
from recipes.demo.export_head import export_head, main
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.training.objective import ObjectiveSettings
from specvlm.training.settings import TrainingSettings

REACHED = {"step": 1800, "held_out": 60, "mean_accepted_tokens": 6.789, "cross_entropy": 0.03}


def trained(folder: Path, target: str, compressor: CompressorConfig) -> Path:
    """A fresh head, in a folder as `specvlm train` leaves it."""
    loaded = specvlm.load("demo", draft="none")
    config = HeadConfig(
        target,
        loaded.info.target_revision,
        loaded.info.family,
        loaded.target.hidden_size,
        compressor=compressor,
        training={
            **asdict(TrainingSettings(learning_rate=3e-3)),
            **asdict(ObjectiveSettings()),
            "train_samples": 2400,
            "dtype": "float32",
            "reached": REACHED,
        },
    )
    HeadModel.fresh(loaded.target, config, 0).save(folder)
    (folder / ".specvlm").mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    return folder


def test_a_head_is_copied_with_its_card_and_can_be_used(tmp_path: Path) -> None:
    head = trained(tmp_path / "head", "specvlm-demo/qwen-target", CompressorConfig())
    size = export_head(head, "qwen-head", tmp_path / "weights")
    there = tmp_path / "weights" / "qwen-head"
    assert {path.name for path in there.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert size == sum(path.stat().st_size for path in there.iterdir()) < 3_000_000
    told = (there / "README.md").read_text()
    for words in (
        "1,800 steps of 8 samples",
        "**6.79** accepted",
        "2,400 samples",
        "`select` of `prune`",
        "--preset demo-head`",
    ):
        assert words in told, words
    assert "0.1 x cross-entropy" in told, "the weight of the loss, not what it came to"
    assert specvlm.load("demo", draft=str(there)).draft is not None


@pytest.mark.parametrize(
    ("compressor", "words"),
    [
        (CompressorConfig("none", ()), "prefill: none."),
        (CompressorConfig("single", ("pool",), 3.0), "`pool`, ratio 3"),
    ],
)
def test_the_card_says_which_compressor(tmp_path: Path, compressor: CompressorConfig, words: str) -> None:
    head = trained(tmp_path / "head", "specvlm-demo/qwen-target", compressor)
    export_head(head, "qwen-head", tmp_path / "weights")
    assert words in (tmp_path / "weights" / "qwen-head" / "README.md").read_text()


def test_a_head_of_another_target_stays_out(tmp_path: Path) -> None:
    head = trained(tmp_path / "head", "some/other", CompressorConfig())
    with pytest.raises(ValueError, match="some/other"):
        export_head(head, "qwen-head", tmp_path / "weights")
    with pytest.raises(SystemExit, match="cannot be exported"):
        main([str(tmp_path / "nothing"), "qwen-head"])
    assert not (tmp_path / "weights").exists()
