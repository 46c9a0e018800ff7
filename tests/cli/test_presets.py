"""`specvlm presets`: arithmetic that agrees with the architectures, and what the cache on disk holds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from specvlm.preset import presets
from specvlm_cli import checkpoints
from specvlm_cli.caption.engine import public_name
from tests.cli.conftest import Specvlm

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, model: str, **files: object) -> None:
    """Put files of a model into the cache, as the hub's client lays them out."""
    folder = cache / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("c0ffee")
    snapshot = folder / "snapshots/c0ffee"
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (snapshot / name.replace("__", ".")).write_text(json.dumps(content))


INDEX = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "no"),
        ({"config__json": {}}, "partly"),
        ({"config__json": {}, "model__safetensors": 1}, "yes"),
        ({"config__json": {}, "model__safetensors__index__json": INDEX}, "partly"),
        ({"model__safetensors__index__json": INDEX, "one__safetensors": 1}, "partly"),
        ({"model__safetensors__index__json": INDEX, "one__safetensors": 1, "two__safetensors": 1}, "yes"),
    ],
)
def test_a_model_is_on_disk_when_all_its_weights_are(cache: Path, files: dict[str, Any], state: str) -> None:
    if files:
        put(cache, MODEL, **files)
    assert checkpoints.on_disk(MODEL) == state


def test_a_download_that_broke_off_is_not_on_disk(cache: Path) -> None:
    put(cache, MODEL, model__safetensors__index__json=INDEX, one__safetensors=1)
    snapshot = cache / "models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/c0ffee"
    (snapshot / "two.safetensors").symlink_to("../../blobs/missing.incomplete")
    assert checkpoints.on_disk(MODEL) == "partly"


def test_packaged_pairs_are_always_there_and_others_are_looked_for(specvlm: Specvlm, cache: Path) -> None:
    put(cache, MODEL, model__safetensors=1)
    found = {one["name"]: one for one in specvlm("presets", "--json").json["presets"]}
    assert list(found) == [one.name for one in presets()]
    assert found["demo"]["target_on_disk"] == found["demo-llava"]["draft_on_disk"] == "yes"
    assert (found["qwen2.5-vl-7b"]["target_on_disk"], found["qwen2.5-vl-7b"]["draft_on_disk"]) == (
        "no",
        "yes",
    )
    assert found["demo"]["target"] == "specvlm-demo/qwen-target"
    assert found["demo"]["memory_bytes"] < 100e6


def test_each_has_a_line_and_below_it_its_pair_in_80_columns(specvlm: Specvlm, cache: Path) -> None:
    told = specvlm("presets")
    assert (told.code, told.err) == (0, "")
    assert "\x1b" not in told.out
    assert max(map(len, told.out.splitlines())) <= 80
    blocks = [" ".join(one.split()) for one in re.split(r"\n(?! )", told.out)]
    for block, one in zip(blocks, presets(), strict=False):
        assert block.startswith(f"{one.name} "), block
        assert block.endswith(f"{public_name(one.target)} + {public_name(one.draft)}"), block
    assert any(block.startswith("qwen2.5-vl-7b 25.3 GB not on disk") for block in blocks)


def test_memory_is_weights_and_caches() -> None:
    found = {one.name: one for one in checkpoints.preset_views()}["qwen2.5-vl-7b"]
    tokens = 64 * (360 * 640 // 784)
    assert found.video_tokens == tokens
    assert found.weights_bytes == 2 * (8_292_166_656 + 3_754_622_976)
    target, draft = 2 * 28 * 4 * 128 * 2, 2 * 36 * 2 * 128 * 2
    assert found.caches_bytes == target * (tokens + 1024) + draft * (round(tokens * 0.1) + 1024)


def test_the_docs_say_how_many_gpus_a_preset_takes() -> None:
    told = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    for one in checkpoints.preset_views():
        if one.caches_bytes is None:
            continue
        gpus = [math.ceil(1.2 * one.memory_bytes / (size * 10**9)) for size in (24, 48, 80, 141)]
        sizes = f"{one.weights_bytes / 1e9:.1f} | {one.caches_bytes / 1e9:.1f}"
        row = f"| `{one.name}` | {one.video_tokens:,} | {sizes} | {' | '.join(map(str, gpus))} |"
        assert row in told, row


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [
        (16, None),
        (24, "llava-onevision-7b"),
        (48, "qwen3-vl-8b"),
        (84, "qwen3-vl-30b-a3b"),
        (141, "qwen3-vl-32b"),
    ],
)
def test_the_largest_target_that_fits(gigabytes: int, name: str | None) -> None:
    """Qwen3-VL 32B and Qwen2.5-VL 32B are about as large, and so are their pairs."""
    found = checkpoints.largest_that_fits(gigabytes * 10**9)
    assert (found and found.name) == name
