"""Loading from folders: what fits, what is refused and why."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

import specvlm
from specvlm.demo.tokenizer import tokenizer_from
from tests.tiny import FamilyName, Size, processor_for, random_frames, stock_ids, tiny_model

TARGET, DRAFT = Size(seed=1, vocabulary=320, tied=True), Size(layers=1, seed=2, vocabulary=290)


def save(folder: Path, family: FamilyName, size: Size, processor: Any = None) -> str:
    """A checkpoint folder as `save_pretrained` writes it."""
    model = tiny_model(family, size)
    model.save_pretrained(folder)
    (processor or processor_for(family)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen": save(root / "qwen", "qwen", TARGET),
        "qwen-draft": save(root / "qwen-draft", "qwen", DRAFT),
        "llava": save(root / "llava", "llava", TARGET),
        "llava-draft": save(root / "llava-draft", "llava", DRAFT),
    }


@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_a_loaded_pair_is_stock(folders: dict[str, str], family: FamilyName, device_map: Any) -> None:
    captioner = specvlm.load(folders[family], draft=folders[f"{family}-draft"], device_map=device_map)
    video = captioner.prepare(random_frames(1), "Hi there.")
    stock = stock_ids(tiny_model(family, TARGET), video.inputs.tensors, 16)
    caption = captioner.caption(video, tree="static", max_new_tokens=16)
    assert caption.token_ids == stock
    assert caption.stats.num_drafts > 0
    info = captioner.info
    assert (info.target, info.draft) == (folders[family], folders[f"{family}-draft"])
    assert (info.family, info.dtype, info.device) == (captioner.target.family.name, "float32", "cpu")
    assert info.target_revision is not None
    assert len(info.target_revision) == 16
    assert info.target_revision != info.draft_revision
    expected = {"cap_pixels_per_frame": True} if family == "qwen" else {}
    assert info.processor_options == expected


def test_without_a_draft_decoding_is_plain(folders: dict[str, str]) -> None:
    for draft in (None, "none"):
        captioner = specvlm.load(folders["qwen"], draft=draft)
        assert captioner.info.draft is None
        assert captioner.caption(random_frames(1), max_new_tokens=4).stats.method == "plain"


def test_other_dtypes(folders: dict[str, str]) -> None:
    captioner = specvlm.load(folders["qwen"], draft=folders["qwen-draft"], dtype="bfloat16")
    assert captioner.info.dtype == "bfloat16"
    assert captioner.target.dtype == torch.bfloat16
    assert captioner.caption(random_frames(1), max_new_tokens=8).stats.completion_tokens == 8


def test_fingerprint_follows_the_weights(folders: dict[str, str], tmp_path: Path) -> None:
    again = specvlm.load(save(tmp_path / "same", "qwen", TARGET)).info.target_revision
    other = specvlm.load(save(tmp_path / "other", "qwen", Size(seed=3, vocabulary=320, tied=True)))
    assert again == specvlm.load(folders["qwen"]).info.target_revision
    assert again != other.info.target_revision


def refusal(error: type[Exception], target: str, **options: Any) -> str:
    with pytest.raises(error) as caught:
        specvlm.load(target, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_draft_of_another_family_is_refused(folders: dict[str, str]) -> None:
    said = refusal(specvlm.IncompatibleDraftError, folders["qwen"], draft=folders["llava-draft"])
    assert "llava_onevision" in said
    assert "qwen2_5_vl" in said


def test_a_draft_with_another_tokenizer_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    alphabet = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet(), reverse=True))}
    processor = copy.deepcopy(processor_for("qwen"))
    processor.tokenizer = tokenizer_from(alphabet, [], "qwen")
    draft = save(tmp_path / "draft", "qwen", DRAFT, processor)
    assert "tokenizer differs" in refusal(specvlm.IncompatibleDraftError, folders["qwen"], draft=draft)


def test_a_draft_that_sees_other_video_tokens_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    draft = Path(save(tmp_path / "draft", "qwen", DRAFT))
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        if (draft / name).exists():
            text = json.loads((draft / name).read_text())
            part = text.get("video_processor", text)
            part["image_mean"] = [0.1, 0.2, 0.3]
            (draft / name).write_text(json.dumps(text))
    assert "image_mean" in refusal(specvlm.IncompatibleDraftError, folders["qwen"], draft=str(draft))


def test_what_cannot_be_loaded(folders: dict[str, str], tmp_path: Path) -> None:
    missing = refusal(specvlm.ModelLoadError, str(tmp_path / "nothing"), local_files_only=True)
    assert str(tmp_path / "nothing") in missing
    assert "preset" in missing
    assert "no such preset" in refusal(specvlm.ModelLoadError, "demoo")
    assert "no such preset" in refusal(specvlm.ModelLoadError, "demo", draft="demo-draft")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(specvlm.ModelLoadError, str(tmp_path / "empty"))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "pickled", "qwen", TARGET))
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("qwen", TARGET).state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refusal(specvlm.ModelLoadError, str(folder))


def test_broken_weights(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "broken", "qwen", TARGET))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights" in refusal(specvlm.ModelLoadError, str(folder))


def test_another_architecture_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    said = refusal(specvlm.UnknownFamilyError, str(tmp_path))
    assert "bert" in said
    assert "llava_onevision, qwen2_5_vl" in said


def test_unknown_dtype(folders: dict[str, str]) -> None:
    assert "dtype='float8'" in refusal(specvlm.ConfigError, folders["qwen"], dtype="float8")


def test_presets_name_what_they_load() -> None:
    names = [preset.name for preset in specvlm.presets()]
    assert names[:2] == ["demo", "demo-llava"]
    assert len(set(names)) == len(names)
    for preset in specvlm.presets():
        assert preset.family in ("qwen2_5_vl", "llava_onevision")
        assert preset.target != preset.draft
