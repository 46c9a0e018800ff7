"""The tiny trained model pairs that ship with the package, and where their folders are.

They are real checkpoints of real architectures, trained on clips of moving shapes that this package
draws itself, so that every part of the tool can be tried on any machine. They know nothing about
real videos. `docs/demo-models.md` tells how they were made.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

DemoName = Literal["qwen-target", "qwen-draft", "llava-target", "llava-draft"]
"""The four demo checkpoints: a target and a draft in each of the two families."""

__all__ = ["DemoName", "demo_folder"]


def demo_folder(name: DemoName) -> Path:
    """Folder of one demo checkpoint, in the Hugging Face layout that `from_pretrained` reads."""
    return Path(str(files(__name__))) / "weights" / name
