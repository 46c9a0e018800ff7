"""Model families: one file each, one row each in this table, and those that other packages bring.

A package brings a family with an entry point of the group `specvlm.families`, whose name is the `model_type` and whose
object is the subclass of `Family`; a program can also `register` one.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from specvlm.errors import UnknownFamilyError
from specvlm.families.base import Family
from specvlm.families.llava_onevision import LlavaOnevision
from specvlm.families.qwen2_5_vl import Qwen25VL
from specvlm.families.qwen2_vl import Qwen2VL
from specvlm.families.qwen3_vl import Qwen3VL, Qwen3VLMoe

ENTRY_POINTS = "specvlm.families"
FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Qwen2VL, Qwen25VL, Qwen3VL, Qwen3VLMoe, LlavaOnevision)
}


def register(family: type[Family]) -> None:
    """Add a family of another package, or put it in the place of the one with its name."""
    FAMILIES[family.name] = family


def family_of(config: Any, name: str) -> Family:
    """The family of a `transformers` config; `name` is the model as the caller knows it.

    Raises:
        UnknownFamilyError: No family speaks this architecture.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        for found in entry_points(group=ENTRY_POINTS, name=str(model_type)):
            register(found.load())
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnknownFamilyError(
            f"{name}: model type {model_type!r} is not supported; use a model of: {known}"
        )
    return FAMILIES[model_type]()
