"""The tiny trained model pairs that ship with the package, and where their folders are.

They are real checkpoints of real architectures, trained on drawn clips of moving shapes, so that you can try
every part of the tool on any machine. They know nothing about real videos. `docs/demo-models.md` says how they
were made, with the code in `recipes/demo`.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

DemoName = Literal["qwen-target", "qwen-draft", "llava-target", "llava-draft", "qwen3-target", "qwen3-draft"]
"""The demo checkpoints: a target and a draft in each of the three families."""

HeadName = Literal["qwen-head", "llava-head", "qwen3-head"]
"""Heads that `specvlm train` makes for the demo targets; only folders that are there are presets."""

OWNER = "specvlm-demo"
"""Owner in the names of these checkpoints, as hub ids have one."""

__all__ = ["OWNER", "DemoName", "HeadName", "demo_folder", "local_name"]


def demo_folder(name: DemoName | HeadName) -> Path:
    """Folder of one demo checkpoint, in the Hugging Face layout that `from_pretrained` reads, or of a head."""
    return Path(str(files("specvlm"))) / "demo" / "weights" / name


def local_name(name: str) -> str:
    """The folder of a name like "specvlm-demo/qwen-target"; any other name as it is."""
    owner, _, rest = name.partition("/")
    folder = Path(str(files("specvlm"))) / "demo" / "weights" / rest
    return str(folder) if owner == OWNER and rest and "/" not in rest and folder.is_dir() else name
