"""Which kind of draft a folder holds, by its files. Imports neither torch nor models."""

from __future__ import annotations

import json
import os
from pathlib import Path

from specvlm.files import open_plain, read_text
from specvlm.packaged import local_name

HEAD_TYPE = "specvlm_head"
_MOST_HEADER = 1 << 20  # bytes; a head has some twenty tensors


def is_head(draft: str | os.PathLike[str]) -> bool:
    """Whether a draft is the folder of a trained head; hub ids and all other folders are not."""
    try:
        found = json.loads(read_text(Path(local_name(os.fspath(draft))) / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("model_type") == HEAD_TYPE


def has_head_weights(draft: str | os.PathLike[str]) -> bool:
    """Whether a folder has the weights of a head, whatever its config.json says; for those whose config is damaged."""
    try:
        with open_plain(Path(local_name(os.fspath(draft))) / "model.safetensors") as stream:
            size = int.from_bytes(stream.read(8), "little")
            return size <= _MOST_HEADER and "join.weight" in json.loads(stream.read(size))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
