"""The files of a checkpoint: which ones are read, why they cannot be, and a hash of their content.

Imports neither torch nor transformers: a start that has nothing to do asks for the hash too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specvlm.durable import write_whole
from specvlm.errors import ConfigError, ModelLoadError
from specvlm.files import open_plain, read_text, refuse_size

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Everything that `from_pretrained` may read besides the weights, in the folder itself.
_READ = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")
PROCESSOR_CONFIGS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_LFS_POINTER = b"version https://git-lfs"
_KEPT_FROM_BYTES = 1 << 24  # the hash of a file of this size is kept; smaller ones are hashed every time
_SETTLED_S = 2.0  # a file that changed later than this before it was read may change again unseen
_HASH_THREADS = 8
_PIECE = 1 << 20  # bytes that are hashed at once
_MARK = "sha256:"
# Formats of quantised weights that are supported, and the package that transformers needs for each. Not
# compressed-tensors: its version 0.20 breaks stock generate() of LLaVA-OneVision in transformers 5.23.
_QUANTISED = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "fp8": None}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint.

    Raises:
        ModelLoadError: The file cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        if _is_pointer(path):
            raise ModelLoadError(_pointer(path)) from error
        reason = getattr(error, "strerror", None) or error
        raise ModelLoadError(f"{path}: not readable as JSON ({reason}); download it again") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path}: not a JSON object; download it again")
    return found


# --- what is refused ---


def refuse_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a `config.json` whose weights are in a format that is not supported.

    Raises:
        ModelLoadError: They are, or the package that reads them is not installed.
    """
    quantisation = config.get("quantization_config") or {}
    if not quantisation:
        return
    method = quantisation.get("quant_method") or (
        "bitsandbytes" if quantisation.get("load_in_8bit") or quantisation.get("load_in_4bit") else "unknown"
    )
    if method not in _QUANTISED:
        raise ModelLoadError(
            f"{name}: quantised as {str(method).upper()}, which is not supported; give the checkpoint that it was "
            "made from, or one in bitsandbytes, torchao or fp8 format"
        )
    package = _QUANTISED[method]
    if package is not None and find_spec(package) is None:
        raise ModelLoadError(
            f"{name}: quantised with {method}, whose package is not installed; run pip install {package}"
        )


def refuse_adapter(name: str, adapter: Path) -> None:
    """Refuse a checkpoint that has an `adapter_config.json`.

    Raises:
        ModelLoadError: Always.
    """
    base = read_json(adapter).get("base_model_name_or_path") or "its base model"
    raise ModelLoadError(
        f"{name}: a LoRA adapter for {base}, not a whole model; merge it (peft: merge_and_unload(), then "
        "save_pretrained()) and give the merged folder"
    )


def refuse_elsewhere(file: Path) -> None:
    """Refuse a processor's config that has parts loaded from another folder or repository, or from a pickle.

    Raises:
        ConfigError: It does.
    """
    if found := _elsewhere(read_json(file)):
        raise ConfigError(
            f"{file}: names {found!r}, and nothing outside a checkpoint's folder and no pickle is loaded; "
            "remove that entry"
        )


def _elsewhere(value: Any, key: str = "") -> str | None:
    """Return the first path or repository that a config names, at any depth."""
    if isinstance(value, dict):
        return next(filter(None, (_elsewhere(inner, str(name)) for name, inner in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (_elsewhere(inner, key) for inner in value)), None)
    if not isinstance(value, str) or key in ("name_or_path", "_name_or_path"):  # where it was saved from
        return None
    is_name = key.endswith(("name_or_path", "pretrained_model")) and bool(value)
    is_pickle = value.endswith((".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"))
    return value if is_name or is_pickle else None


def refuse_folder(folder: Path) -> None:
    """Refuse a local folder that holds no model of its own in a supported format; say what it holds instead.

    Raises:
        ModelLoadError: It does not.
    """
    if (folder / "adapter_config.json").exists():
        refuse_adapter(str(folder), folder / "adapter_config.json")
    _require_config(folder)
    refuse_config(str(folder), read_json(folder / "config.json"))


def _require_config(folder: Path) -> None:
    if not os.path.lexists(folder / "config.json"):
        raise ModelLoadError(f"{folder}: {_without(folder, 'config.json')}")


def refuse_files(folder: Path) -> None:
    """Refuse a local checkpoint with files that are missing, or are not what their names say.

    Raises:
        ModelLoadError: A file is missing, pickled, or a Git LFS pointer.
        ConfigError: Its index names a file outside the folder.
    """
    for file in files_read(folder):
        if _is_pointer(file):
            raise ModelLoadError(_pointer(file))
    if (folder / "vocab.json").exists() and not any(
        (folder / other).exists() for other in ("merges.txt", "tokenizer.json")
    ):
        raise ModelLoadError(
            f"{folder}: has vocab.json but no merges.txt; copy the tokenizer's files from the original checkpoint"
        )


def refuse_gguf(name: str) -> None:
    """Refuse the name of a GGUF file or repository.

    Raises:
        ModelLoadError: It is one.
    """
    if name.lower().endswith("gguf"):
        raise ModelLoadError(f"{name}: {_GGUF}")


_GGUF = "GGUF, which is not supported; give the safetensors checkpoint that it was converted from"


def _without(folder: Path, missing: str) -> str:
    """Say what a folder without a necessary file is."""
    if any(folder.glob("*.gguf")):
        return _GGUF
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles and missing == WEIGHTS:
        return (
            f"its weights are pickled ({pickles[0]}), and only safetensors are read; convert them with "
            "save_pretrained()"
        )
    return f"has no {missing}; give the folder of a checkpoint with safetensors, or a hub id"


def _is_pointer(file: Path) -> bool:
    with suppress(OSError), open_plain(file) as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    return False


def _pointer(file: Path) -> str:
    return f"{file}: a Git LFS pointer, not the file itself; run git lfs pull in {file.parent}"


# --- what is read ---


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that `from_pretrained` reads in a local folder.

    Raises:
        ModelLoadError: There are none, or one that the index names is missing.
        ConfigError: The index names a file outside the folder.
    """
    _require_config(folder)
    first = str(read_json(folder / "config.json").get("transformers_weights") or WEIGHTS)
    if (folder / first).is_file() and not first.endswith(".index.json"):
        return _inside(folder, "config.json", [first])
    index = first if first.endswith(".index.json") else INDEX
    if not (folder / index).exists():
        raise ModelLoadError(f"{folder}: {_without(folder, first)}")
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelLoadError(f"{folder / index}: has no weight_map; download it again")
    return _inside(folder, index, sorted(set(weight_map.values())))


def _inside(folder: Path, index: str, names: Sequence[str]) -> list[Path]:
    for name in names:
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise ConfigError(
                f"{folder / index}: names {name!r}, which is outside the folder; move that file into the folder and "
                "name it there"
            )
        if not name.endswith(".safetensors"):
            raise ModelLoadError(
                f"{folder / index}: names {name!r}, and only safetensors are read; convert the weights with "
                "save_pretrained()"
            )
        if not (folder / name).is_file():
            raise ModelLoadError(f"{folder}: has no {name}, which {index} names; download it again")
    return [folder / name for name in names]


def files_read(folder: Path) -> list[Path]:
    """Return all files that loading a local checkpoint may read, in order.

    Raises:
        ModelLoadError, ConfigError: As `weight_files`, or a file that is read whole is too large for that.
    """
    small = {file for pattern in _READ for file in folder.glob(pattern) if file.is_file()}
    try:
        for file in sorted(small):
            refuse_size(file, file.stat().st_size)
    except OSError as error:
        raise ModelLoadError(f"{error.filename}: {error.strerror}; download it again") from error
    return sorted(small | set(weight_files(folder)))


# --- hashes ---


def fingerprint(
    folder: Path, *, at_once: bool = False, between_pieces: Callable[[], None] = lambda: None
) -> str | None:
    """Return `sha256:` and 16 hex digits for the content of every file that loading reads.

    Large files are hashed once: their hashes are kept in the user's cache folder, as long as size, inode and times
    of the file stay the same.

    Args:
        folder: A local checkpoint, or the folder of a trained head.
        at_once: Return None rather than read a large file whose hash is not kept.
        between_pieces: Called while a file is read; may raise, to end it.

    Raises:
        ModelLoadError, ConfigError: As `weight_files`, or a file cannot be read.
    """
    return _hash_of(folder, files_read(folder), at_once=at_once, between_pieces=between_pieces)


def model_fingerprint(folder: Path) -> str:
    """Return the same of a model's weights and `config.json` alone: what a trained head is made for.

    Raises:
        ModelLoadError, ConfigError: As `fingerprint`.
    """
    found = _hash_of(folder, [folder / "config.json", *weight_files(folder)])
    assert found is not None
    return found


def _hash_of(
    folder: Path,
    files: Sequence[Path],
    *,
    at_once: bool = False,
    between_pieces: Callable[[], None] = lambda: None,
) -> str | None:
    kept = _Kept(folder, between_pieces)
    try:
        if at_once and not all(map(kept.knows, files)):
            return None
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            hashes = list(pool.map(kept.sha256, files))
    except OSError as error:
        raise ModelLoadError(f"{folder}: cannot be read ({error})") from error
    kept.write()
    digest = hashlib.sha256()
    for file, found in zip(files, hashes, strict=True):
        digest.update(f"{file.relative_to(folder)} {found}\n".encode(errors="surrogateescape"))
    return _MARK + digest.hexdigest()[:16]


def can_compare(one: str | None, other: str | None) -> bool:
    """Say whether two revisions say the same of a checkpoint: a commit of the hub, or a hash of all files.

    Before version 0.1, that of a hub model was not known, and that of a folder said little of the weights.
    """
    return None not in (one, other) and str(one).startswith(_MARK) == str(other).startswith(_MARK)


class _Kept:
    """Hashes of the large files of one folder, kept in the user's cache folder where that can be written."""

    def __init__(self, folder: Path, between_pieces: Callable[[], None]) -> None:
        self._between_pieces = between_pieces
        self._hashes: dict[str, list[Any]] = {}  # path -> its stamp and its hash
        self._path: Path | None = None
        self._is_new = False
        with suppress(OSError, ValueError, RuntimeError):  # no home, no cache yet, or a damaged one
            place = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
            self._path = Path(place) / "specvlm" / "hashes" / f"{name}.json"
            found = json.loads(self._path.read_text(encoding="utf-8"))
            self._hashes = found if isinstance(found, dict) else {}

    def _found(self, file: Path) -> tuple[list[int], str | None]:
        """Return a file's stamp, and its hash where that is kept."""
        about = file.stat()
        stamp = [about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
        known = self._hashes.get(os.fspath(file.resolve()))
        same = isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str)
        return stamp, known[-1] if known and same else None

    def knows(self, file: Path) -> bool:
        """Whether the hash of a file takes no time."""
        return file.stat().st_size < _KEPT_FROM_BYTES or self._found(file)[1] is not None

    def sha256(self, file: Path) -> str:
        """Return the hash of a file's content."""
        stamp, known = self._found(file)
        if known is not None:
            return known
        began_s = time.time()
        digest = hashlib.sha256()
        with open_plain(file) as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
                self._between_pieces()
        found = digest.hexdigest()
        is_settled = began_s - max(stamp[2:]) / 1e9 > _SETTLED_S
        if stamp[0] >= _KEPT_FROM_BYTES and is_settled and self._found(file)[0] == stamp:
            self._hashes[os.fspath(file.resolve())] = [*stamp, found]
            self._is_new = True
        return found

    def write(self) -> None:
        """Keep what was hashed."""
        if self._path is not None and self._is_new:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, json.dumps(self._hashes).encode())
