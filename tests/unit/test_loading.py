"""Loading from folders: what fits, what is refused and why."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

import specvlm
from recipes.demo.tokenizer import tokenizer_from
from specvlm.families import FAMILIES
from specvlm.loading import target_fingerprint
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
    assert re.fullmatch("sha256:[0-9a-f]{16}", info.target_revision)
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


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """Change the weights of a checkpoint folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("family", "lacks"),
    [("qwen", "visual.patch_embed.proj.weight"), ("llava", "layers.1.self_attn.v_proj.bias")],
)
def test_a_missing_weight_is_named(family: FamilyName, lacks: str, tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "gap", family, TARGET))
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith(lacks))
    with_weights(folder, lambda weights: weights.pop(name))
    said = refusal(specvlm.ModelLoadError, str(folder))
    assert lacks in said
    assert "and" not in said.split(",")[0].removeprefix(str(folder)), "one weight alone"
    with_weights(folder, lambda weights: [weights.pop(one) for one in list(weights) if "norm" in one])
    assert " more, which its architecture needs" in refusal(specvlm.ModelLoadError, str(folder))


def test_an_untied_head_that_is_missing_is_named_and_a_tied_one_is_not_missing(tmp_path: Path) -> None:
    untied = Path(save(tmp_path / "untied", "qwen", Size(seed=1, vocabulary=320)))
    with_weights(untied, lambda weights: weights.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(specvlm.ModelLoadError, str(untied))
    tied = save(tmp_path / "tied", "qwen", TARGET)
    assert "lm_head.weight" not in load_file(Path(tied) / "model.safetensors")
    assert specvlm.load(tied).draft is None


def test_a_weight_of_another_shape_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    draft = Path(save(tmp_path / "cut", "qwen", DRAFT))

    def cut(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
        weights[name] = weights[name][:-3].contiguous()

    said = refusal(specvlm.ModelLoadError, folders["qwen"], draft=with_weights(draft, cut))
    assert "layers.0.mlp.up_proj.weight has shape (" in said


def test_a_target_needs_a_chat_template_and_a_draft_does_not(folders: dict[str, str], tmp_path: Path) -> None:
    target = Path(save(tmp_path / "silent", "llava", TARGET))
    (target / "chat_template.jinja").unlink()
    assert "chat_template.jinja" in refusal(specvlm.ModelLoadError, str(target))
    draft = Path(save(tmp_path / "draft", "llava", DRAFT))
    (draft / "chat_template.jinja").unlink()
    assert specvlm.load(folders["llava"], draft=str(draft)).draft is not None


@pytest.mark.parametrize("template", ["{{ messages | nonsense }}", "{{ raise_exception('no') }}", "no video"])
def test_a_template_that_cannot_ask_about_a_video(tmp_path: Path, template: str) -> None:
    target = Path(save(tmp_path / "odd", "qwen", TARGET))
    (target / "chat_template.jinja").write_text(template)
    assert "chat template" in refusal(specvlm.ModelLoadError, str(target))


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    for family, kept in (("qwen", True), ("llava", True), ("qwen", False)):
        folder = Path(save(tmp_path / f"{family}{kept}", family, TARGET))
        (folder / "tokenizer.json").unlink()
        if not kept:
            (folder / "tokenizer_config.json").unlink()
        said = refusal(specvlm.ModelLoadError, str(folder))
        assert "tokenizer" in said


def test_a_video_token_that_is_not_the_models(tmp_path: Path) -> None:
    small = save(tmp_path / "small", "qwen", Size(seed=1, vocabulary=260))
    assert "the model has ids 0 to 259" in refusal(specvlm.ModelLoadError, small)
    other = Path(save(tmp_path / "other", "llava", TARGET))
    config = json.loads((other / "config.json").read_text())
    name = next(name for name in config if name.startswith("video_token"))
    (other / "config.json").write_text(json.dumps(config | {name: 5}))
    assert "its config.json as 5" in refusal(specvlm.ModelLoadError, str(other))


def test_what_is_not_one_file_of_safetensors_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    weights = Path(folders["qwen"]) / "model.safetensors"
    assert "a file; give the folder" in refusal(specvlm.ModelLoadError, str(weights))
    assert "GGUF" in refusal(specvlm.ModelLoadError, "org/model-GGUF")
    awq = Path(save(tmp_path / "awq", "qwen", TARGET))
    config = json.loads((awq / "config.json").read_text())
    (awq / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    said = refusal(specvlm.ModelLoadError, folders["qwen"], draft=str(awq))
    assert "AWQ" in said
    assert "preset" not in said
    audio = Path(save(tmp_path / "audio", "llava", TARGET))
    (audio / "audio_tokenizer_config.json").write_text(
        '{"audio_tokenizer_class": "X", "audio_tokenizer_name_or_path": "../x"}'
    )
    assert "'../x'" in refusal(specvlm.ConfigError, str(audio))


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
        assert preset.family in FAMILIES
        assert preset.target != preset.draft


_FROM_HUB = """
import json, sys
import specvlm
from specvlm.loading import target_fingerprint
said = {}
for name in ("org/model", "org/adapter", "org/awq", "org/codec"):
    try:
        info = specvlm.load(name, local_files_only=True).info
        said[name] = [info.target_revision, target_fingerprint(name, info.target_revision)]
    except specvlm.SpecvlmError as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def test_what_is_in_the_cache_of_the_hub_is_looked_at_too(folders: dict[str, str], tmp_path: Path) -> None:
    def put(name: str, commit: str, **changes: Any) -> None:
        root = tmp_path / "hub" / f"models--org--{name}"
        folder = root / "snapshots" / commit
        shutil.copytree(folders["llava"], folder)
        for file, content in changes.items():
            path = folder / f"{file}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(known | content))
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)

    put("model", "b" * 40)
    put("adapter", "c" * 40, adapter_config={"base_model_name_or_path": "org/base"})
    put("awq", "d" * 40, config={"quantization_config": {"quant_method": "awq"}})
    put(
        "codec", "e" * 40, processor_config={"audio_tokenizer": {"audio_tokenizer_name_or_path": "org/codec"}}
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", _FROM_HUB], env=environment, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["org/model"] == ["b" * 40, target_fingerprint(folders["llava"], None)]
    assert said["org/adapter"].startswith("ModelLoadError: org/adapter: a LoRA adapter for org/base")
    assert said["org/awq"].startswith("ModelLoadError: org/awq: quantised as AWQ")
    assert said["org/codec"].startswith("ConfigError: ")


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("config.json", ("vision_config", "patch_size"), "wide"),
        ("config.json", ("text_config",), ["none"]),
        ("config.json", ("video_token_id",), {}),
        ("tokenizer.json", ("post_processor",), 3),
        ("tokenizer.json", ("model", "vocab"), 3),
        ("tokenizer_config.json", ("eos_token",), 4),
        ("generation_config.json", ("pad_token_id",), "last"),
    ],
)
def test_values_of_other_types_are_one_line_that_names_the_checkpoint(
    tmp_path: Path, file: str, keys: tuple[str, ...], value: Any
) -> None:
    folder = Path(save(tmp_path / "odd", "qwen", TARGET))
    found = inner = json.loads((folder / file).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / file).write_text(json.dumps(found))
    said = refusal(specvlm.ModelLoadError, str(folder))
    assert str(folder) in said
