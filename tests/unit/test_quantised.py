"""Quantised checkpoints that `transformers` loads: captions are those of stock `generate()` of the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

import specvlm
from specvlm.drafts.head_model import HeadConfig, HeadModel
from tests.tiny import FamilyName, Size, caption_rows, processor_for, random_frames, stock_ids, tiny_model

TARGET, DRAFT = Size(width=64, seed=4, vocabulary=320), Size(layers=1, seed=2, vocabulary=290)
VISION = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]  # left as they are
_BLOCK, _LARGEST = 32, 448.0  # of float8_e4m3fn


def save_tiny(folder: Path, family: FamilyName, size: Size) -> str:
    tiny_model(family, size).save_pretrained(folder)
    processor_for(family).save_pretrained(folder)
    return str(folder)


def bitsandbytes(**options: Any) -> Callable[[str], None]:
    """Quantise a folder's weights with bitsandbytes, which is to be installed."""

    def quantise(folder: str) -> None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        _save_as(folder, BitsAndBytesConfig(llm_int8_skip_modules=VISION, **options))

    return quantise


def torchao(name: str) -> Callable[[str], None]:
    """The same with a torchao config of this name."""

    def quantise(folder: str) -> None:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        _save_as(folder, TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=VISION))

    return quantise


def _save_as(folder: str, config: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    (Path(folder) / "model.safetensors").unlink()
    model.save_pretrained(folder)


def fp8(folder: str) -> None:
    """Write the decoder's linear layers in float8 with a scale for each block, as published fp8 checkpoints do."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    for name, weight in list(weights.items()):
        if ".layers." in name and "vision" not in name and name.endswith("_proj.weight"):
            rows, columns = (size // _BLOCK for size in weight.shape)
            blocks = weight.reshape(rows, _BLOCK, columns, _BLOCK)
            scale = blocks.abs().amax(dim=(1, 3)) / _LARGEST
            scaled = (blocks / scale[:, None, :, None]).reshape(weight.shape)
            weights[name] = scaled.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
    assert sum(name.endswith("_scale_inv") for name in weights) == 7 * TARGET.layers
    save_file(weights, file, {"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
        "modules_to_not_convert": VISION,
    }
    (Path(folder) / "config.json").write_text(json.dumps(config))


KINDS: dict[str, Callable[[str], None]] = {
    "bitsandbytes 8 bit": bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
    "bitsandbytes 4 bit": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "fp8": fp8,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_captions_are_those_of_the_quantised_checkpoint(
    tmp_path: Path, family: FamilyName, kind: str
) -> None:
    target = save_tiny(tmp_path / "target", family, TARGET)
    full = specvlm.load(target)
    KINDS[kind](target)
    captioner = specvlm.load(target, draft=save_tiny(tmp_path / "draft", family, DRAFT))
    assert captioner.info.target_revision != full.info.target_revision
    stock = AutoModelForImageTextToText.from_pretrained(
        target, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    videos = [
        captioner.prepare(random_frames(seed, frames), "Hi.") for seed, frames in ((1, 4), (2, 2), (3, 6))
    ]
    expected = [stock_ids(stock, video.inputs.tensors, 12) for video in videos]
    assert len(set(expected)) > 1
    plain = [captioner.caption(video, speculate=False, max_new_tokens=12) for video in videos]
    assert [one.token_ids for one in plain] == expected
    drafted = caption_rows(captioner, videos, tree="static", max_new_tokens=12)
    assert [one.token_ids for one in drafted] == expected
    assert all(one.stats.num_drafts for one in drafted)
    assert captioner.info.warnings == ()


def test_eight_bits_with_outliers_come_with_a_warning(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target", "llava", TARGET)
    bitsandbytes(load_in_8bit=True)(target)
    (warning,) = specvlm.load(target).info.warnings
    assert "some captions differ from stock generate()" in warning


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_no_head_is_trained_for_quantised_weights(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target", "qwen", TARGET)
    torchao("Int8WeightOnlyConfig")(target)
    captioner = specvlm.load(target)
    with pytest.raises(specvlm.IncompatibleDraftError, match="quantised weights"):
        HeadModel.fresh(captioner.target, HeadConfig("x", None, "qwen2_5_vl", TARGET.width), 0)
