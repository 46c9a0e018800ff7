"""Which kind of draft a folder holds, told from its config.json alone. Imports neither torch nor models."""

from __future__ import annotations

import json
import os
from pathlib import Path

from specvlm.demo import local_name

HEAD_TYPE = "specvlm_head"


def is_head(draft: str | os.PathLike[str]) -> bool:
    """Whether a draft is the folder of a trained head; hub ids and all other folders are not."""
    try:
        found = json.loads((Path(local_name(os.fspath(draft))) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") == HEAD_TYPE
