"""What is read of a checkpoint folder, its hash, and what is refused; without loading a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specvlm import checkpoint
from specvlm.errors import ConfigError, ModelLoadError, SpecvlmError

SMALL = {
    "config.json": {"model_type": "llava_onevision"},
    "generation_config.json": {"temperature": 0.3},
    "preprocessor_config.json": {"image_mean": [0.5]},
    "video_preprocessor_config.json": {"size": 384},
    "tokenizer.json": {"version": "1.0"},
    "tokenizer_config.json": {"model_max_length": 99},
    "special_tokens_map.json": {"eos_token": "<end>"},
    "added_tokens.json": {"<video>": 7},
    "vocab.json": {"a": 1},
    "chat_template.json": {"chat_template": "{{ 1 }}"},
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in two parts, one of them in a folder below; hashes of weights are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "_KEPT_FROM_BYTES", 1000)
    monkeypatch.setattr(checkpoint, "_SETTLED_S", -1.0)
    made = tmp_path / "model"
    for name, content in SMALL.items():
        write(made / name, content)
    for name in ("merges.txt", "chat_template.jinja", "additional_chat_templates/rag.jinja", "modeling.py"):
        write(made / name, f"content of {name}")
    for name in ("one.safetensors", "below/two.safetensors"):
        write(made / name, "0" * 5000)
    weight_map = {"a": "one.safetensors", "b": "below/two.safetensors", "c": "one.safetensors"}
    write(made / checkpoint.INDEX, {"weight_map": weight_map})
    return made


def change(path: Path) -> None:
    """Change one byte in the middle; size and time of change stay."""
    about = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_a_changed_byte_in_any_file_that_is_read_changes_the_fingerprint(folder: Path) -> None:
    files = checkpoint.files_read(folder)
    assert len(files) == len(SMALL) + 4 + 1 + 2
    for file in files:
        before = checkpoint.fingerprint(folder)
        if file.name in ("config.json", checkpoint.INDEX):  # which have to stay readable
            write(file, json.loads(file.read_text()) | {"note": 1})
        else:
            change(file)
        assert checkpoint.fingerprint(folder) != before, file


def test_other_files_do_not_count(folder: Path) -> None:
    before = checkpoint.fingerprint(folder)
    write(folder / "README.md", "words")
    write(folder / "other.safetensors", "no part of the index")
    assert checkpoint.fingerprint(folder) == before
    write(folder / "preprocessor_config.json", {"image_mean": [0.25]})
    assert checkpoint.fingerprint(folder) != before


def test_a_copy_has_the_same_fingerprint_and_renamed_weights_do_not(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, copy], check=True)
    assert checkpoint.fingerprint(copy) == checkpoint.fingerprint(folder)
    assert checkpoint.model_fingerprint(copy) == checkpoint.model_fingerprint(folder)
    (copy / "one.safetensors").rename(copy / checkpoint.WEIGHTS)  # now the index is not read
    assert checkpoint.model_fingerprint(copy) != checkpoint.model_fingerprint(folder)


def test_a_head_is_made_for_weights_and_config_alone(folder: Path) -> None:
    before = checkpoint.model_fingerprint(folder)
    change(folder / "generation_config.json")
    change(folder / "merges.txt")
    assert checkpoint.model_fingerprint(folder) == before
    change(folder / "below" / "two.safetensors")
    assert checkpoint.model_fingerprint(folder) != before


def test_weights_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.fingerprint(folder, at_once=True) is None
    first = checkpoint.fingerprint(folder)
    read = []
    opened = checkpoint.open_plain
    monkeypatch.setattr(checkpoint, "open_plain", lambda file: read.append(file.name) or opened(file))
    assert checkpoint.fingerprint(folder, at_once=True) == first
    assert "tokenizer.json" in read
    assert not [name for name in read if name.endswith(".safetensors")]
    os.utime(folder / "one.safetensors")
    assert checkpoint.fingerprint(folder, at_once=True) is None
    assert checkpoint.fingerprint(folder) == first
    assert [name for name in read if name.endswith(".safetensors")] == ["one.safetensors"]


def test_a_file_that_has_just_changed_is_hashed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SETTLED_S", 3600.0)
    checkpoint.fingerprint(folder)
    assert checkpoint.fingerprint(folder, at_once=True) is None


@pytest.mark.parametrize("cache", ["file", "damaged"])
def test_without_a_cache_folder_everything_is_hashed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    first = checkpoint.fingerprint(folder)
    if cache == "damaged":
        (kept,) = (tmp_path / "cache").rglob("*.json")
        kept.write_text('{"a": 1, "' + str(folder / "one.safetensors") + '": ["x"]}')
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    assert checkpoint.fingerprint(folder) == first


def test_hashing_takes_no_torch() -> None:
    code = "import sys, specvlm.checkpoint; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_start_on_a_finished_run_is_quick(folder: Path) -> None:
    checkpoint.fingerprint(folder)
    began_s = time.process_time()
    checkpoint.fingerprint(folder, at_once=True)
    assert time.process_time() - began_s < 0.5


def look_at(folder: Path) -> None:
    """What loading refuses before `transformers` sees the folder."""
    checkpoint.refuse_folder(folder)
    checkpoint.refuse_files(folder)


def refusal(kind: type[SpecvlmError], folder: Path) -> str:
    """Return the one line with which a folder is refused."""
    with pytest.raises(kind) as caught:
        look_at(folder)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_sound_folder_is_not_refused(folder: Path) -> None:
    look_at(folder)


@pytest.mark.parametrize(
    "name", ["../beside.safetensors", "below/../../beside.safetensors", "/etc/x.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    write(folder.parent / "beside.safetensors", "0" * 10)
    write(folder / checkpoint.INDEX, {"weight_map": {"a": "one.safetensors", "b": name}})
    said = refusal(ConfigError, folder)
    assert repr(name) in said
    assert "outside the folder" in said
    with pytest.raises(ConfigError):
        checkpoint.fingerprint(folder)


def test_what_an_index_can_lack(folder: Path) -> None:
    (folder / "one.safetensors").unlink()
    assert "has no one.safetensors" in refusal(ModelLoadError, folder)
    write(folder / checkpoint.INDEX, {"weight_map": {"a": "pytorch_model-1.bin"}})
    assert "only safetensors" in refusal(ModelLoadError, folder)
    write(folder / checkpoint.INDEX, {"metadata": {}})
    assert "has no weight_map" in refusal(ModelLoadError, folder)
    write(folder / checkpoint.INDEX, "{")
    assert "not readable as JSON" in refusal(ModelLoadError, folder)


def test_other_weights_by_name_are_read_and_hashed(folder: Path) -> None:
    write(folder / "config.json", {"transformers_weights": "tuned.safetensors"})
    write(folder / "tuned.safetensors", "1" * 5000)
    assert checkpoint.weight_files(folder) == [folder / "tuned.safetensors"]
    write(folder.parent / "out.safetensors", "1")
    write(folder / "config.json", {"transformers_weights": "../out.safetensors"})
    assert "outside the folder" in refusal(ConfigError, folder)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        (
            "processor_config.json",
            {"audio_tokenizer": {"audio_tokenizer_name_or_path": "../codec"}},
            "../codec",
        ),
        ("processor_config.json", {"parts": [{"weights": "speaker.pkl"}]}, "speaker.pkl"),
        ("preprocessor_config.json", {"detector": "net.pth"}, "net.pth"),
        ("audio_tokenizer_config.json", {"audio_tokenizer_name_or_path": "some/repo"}, "some/repo"),
    ],
)
def test_a_processor_that_names_another_folder_or_a_pickle_is_refused(
    folder: Path, name: str, content: Any, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        checkpoint.refuse_elsewhere(write(folder / name, content))
    assert repr(named) in str(caught.value)


def test_where_a_processor_was_saved_from_is_not_read(folder: Path) -> None:
    for content in ({"_name_or_path": "/home/me/base"}, {"a": {"name_or_path": "x/y"}, "b": [1, None, True]}):
        checkpoint.refuse_elsewhere(write(folder / "processor_config.json", content))


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_other_quantised_weights_are_named(folder: Path, method: str) -> None:
    write(folder / "config.json", {"quantization_config": {"quant_method": method, "bits": 4}})
    said = refusal(ModelLoadError, folder)
    assert f"quantised as {method.upper()}" in said
    assert "give the checkpoint that it was made from" in said
    assert "preset" not in said


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    write(folder / "config.json", {"quantization_config": {"quant_method": "torchao"}})
    assert "pip install torchao" in refusal(ModelLoadError, folder)
    write(folder / "config.json", {"quantization_config": {"load_in_4bit": True}})
    assert "pip install bitsandbytes" in refusal(ModelLoadError, folder)
    write(folder / "config.json", {"quantization_config": {"quant_method": "fp8"}})
    checkpoint.refuse_folder(folder)


def test_an_adapter_names_its_base(folder: Path) -> None:
    write(folder / "adapter_config.json", {"base_model_name_or_path": "org/base-7b", "peft_type": "LORA"})
    said = refusal(ModelLoadError, folder)
    assert "LoRA adapter for org/base-7b" in said
    assert "merge" in said


@pytest.mark.parametrize("name", ["below/two.safetensors", "tokenizer.json", "config.json", checkpoint.INDEX])
def test_a_pointer_of_git_lfs_is_named(folder: Path, name: str) -> None:
    write(folder / name, "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9000000\n")
    said = refusal(ModelLoadError, folder)
    assert f"{folder / name}: a Git LFS pointer" in said
    assert "git lfs pull" in said


def test_gguf_and_pickles_are_named(tmp_path: Path) -> None:
    write(tmp_path / "gguf" / "model-q4_0.gguf", "GGUF")
    assert "GGUF, which is not supported" in refusal(ModelLoadError, tmp_path / "gguf")
    with pytest.raises(ModelLoadError, match="GGUF"):
        checkpoint.refuse_gguf("someone/Model-7B-GGUF")
    write(tmp_path / "old" / "config.json", {})
    write(tmp_path / "old" / "pytorch_model.bin", "")
    assert "pickled (pytorch_model.bin)" in refusal(ModelLoadError, tmp_path / "old")
    write(tmp_path / "bare" / "config.json", {})
    assert "has no model.safetensors" in refusal(ModelLoadError, tmp_path / "bare")


def test_half_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "merges.txt").unlink()
    checkpoint.refuse_files(folder)  # tokenizer.json has it all
    (folder / "tokenizer.json").unlink()
    assert "no merges.txt" in refusal(ModelLoadError, folder)


@pytest.mark.parametrize(
    ("then", "now", "comparable"),
    [
        ("sha256:0123456789abcdef", "sha256:fedcba9876543210", True),
        ("a" * 40, "b" * 40, True),
        ("0123456789abcdef", "sha256:0123456789abcdef", False),  # a folder, by an earlier version
        (None, "a" * 40, False),  # a hub model, by an earlier version
        (None, None, False),
    ],
)
def test_revisions_of_earlier_versions_say_nothing(
    then: str | None, now: str | None, comparable: bool
) -> None:
    assert checkpoint.can_compare(then, now) == checkpoint.can_compare(now, then) == comparable


def test_a_config_that_could_block_or_never_ends_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(ModelLoadError, folder)
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        checkpoint.fingerprint(folder)
    os.mkfifo(folder / "config.json")
    assert "config.json: not readable as JSON (not a regular file)" in refusal(ModelLoadError, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(ModelLoadError, folder)
    (folder / "config.json").unlink()
    write(folder / "config.json", 200_000 * "[")
    assert "config.json: not readable as JSON" in refusal(ModelLoadError, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "additional_chat_templates/rag.jinja"])
def test_a_file_that_would_fill_the_memory_is_refused(folder: Path, name: str) -> None:
    os.truncate(folder / name, 1 << 40)
    assert f"{folder / name}: larger than 256 MiB" in refusal(ModelLoadError, folder)
    with pytest.raises(ModelLoadError, match="larger than"):
        checkpoint.fingerprint(folder, at_once=True)


def test_hashing_can_be_ended(folder: Path) -> None:
    class EndedError(BaseException):
        pass

    def end() -> None:
        raise EndedError

    os.truncate(folder / "one.safetensors", 1 << 40)
    with pytest.raises(EndedError):
        checkpoint.fingerprint(folder, between_pieces=end)
