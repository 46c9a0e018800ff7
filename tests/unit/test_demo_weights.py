"""The shipped checkpoints load as stock classes load them, fit together, and caption the example files."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recipes.demo.evaluate import load_processor, prepared
from recipes.demo.examples import EXAMPLES
from recipes.demo.models import CHECKPOINTS, Role
from recipes.demo.tokenizer import Family
from recipes.demo.train import load_model
from specvlm.packaged import DemoName, demo_folder

VIDEOS = Path(__file__).parents[2] / "examples" / "videos"
NAMES: tuple[DemoName, ...] = get_args(DemoName)
FAMILIES: tuple[Family, ...] = get_args(Family)


def frames_of(path: Path) -> NDArray[np.uint8]:
    """Eight upright frames, the last shown at or before every half second."""
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    times = np.asarray([picture.time for picture in pictures])
    chosen = [int(np.searchsorted(times, second + 1e-3, side="right")) - 1 for second in np.arange(8) / 2]
    turns = round(pictures[0].rotation / 90)
    return np.stack([np.rot90(pictures[i].to_ndarray(format="rgb24"), turns) for i in chosen])


def folder_of(family: Family, role: Role) -> Path:
    return demo_folder(next(name for name in NAMES if name == f"{family}-{role}"))


def config_of(family: Family, role: Role) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder_of(family, role) / "config.json").read_text())
    return config


def true_captions() -> dict[str, str]:
    lines = (VIDEOS / "README.md").read_text().splitlines()
    found = (re.match(r"\*\*(.+?)\*\*.*?: (.+)", line) for line in lines)
    return {m.group(1): m.group(2) for m in found if m}


@pytest.mark.parametrize("name", NAMES)
def test_folders_are_small_and_complete(name: DemoName) -> None:
    folder = demo_folder(name)
    files = {file.name for file in folder.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert needed <= files
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6_000_000


def test_padded_vocabularies_of_target_and_draft_differ_and_tying_too() -> None:
    assert {f"{family}-{role}" for family, role in CHECKPOINTS} == set(NAMES)
    for family in FAMILIES:
        target, draft = (config_of(family, role) for role in get_args(Role))
        assert target["text_config"]["vocab_size"] > draft["text_config"]["vocab_size"]
        assert {c["tie_word_embeddings"] for c in (target, draft)} == {family != "llava"}


def test_the_newest_pair_has_what_is_new_in_its_architecture() -> None:
    for role in get_args(Role):
        config = config_of("qwen3", role)
        deepstack = config["vision_config"]["deepstack_visual_indexes"]
        assert 1 <= len(deepstack) <= config["text_config"]["num_hidden_layers"]
        assert config["text_config"]["rope_parameters"]["mrope_interleaved"]


def test_example_files_are_all_there_and_small() -> None:
    assert set(true_captions()) == {example.name for example in EXAMPLES}
    for example in EXAMPLES:
        assert 0 < (VIDEOS / example.name).stat().st_size < 60_000


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_caption_the_rotated_and_the_uneven_example(family: Family) -> None:
    folder = folder_of(family, "target")
    model, processor = load_model(folder), load_processor(folder)
    for file in ("one-sinks-rotated.mp4", "one-slides-right-variable-rate.mp4"):
        inputs = prepared(processor, frames_of(VIDEOS / file), "Describe the video in detail.")
        assert int((inputs["input_ids"] == model.config.video_token_id).sum()) >= 128
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=150)[0, inputs["input_ids"].shape[1] :]  # type: ignore[operator]
        assert processor.tokenizer.decode(made, skip_special_tokens=True) == true_captions()[file]


def test_the_weights_are_data_of_a_package() -> None:
    """Scripts find them next to `specvlm.demo`, from a checkout and from a wheel."""
    import specvlm.demo

    assert specvlm.demo.__file__ is not None
    assert demo_folder("qwen-target") == Path(specvlm.demo.__file__).parent / "weights" / "qwen-target"
