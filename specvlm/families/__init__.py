"""Model families: one file each, one row each in this table."""

from __future__ import annotations

from typing import Any

from specvlm.errors import UnknownFamilyError
from specvlm.families.base import Family
from specvlm.families.llava_onevision import LlavaOnevision
from specvlm.families.qwen2_5_vl import Qwen25VL

FAMILIES: dict[str, type[Family]] = {
    "qwen2_5_vl": Qwen25VL,
    "llava_onevision": LlavaOnevision,
}


def family_of(config: Any, name: str) -> Family:
    """The family of a `transformers` config; `name` is the model as the caller knows it.

    Raises:
        UnknownFamilyError: No family speaks this architecture.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnknownFamilyError(
            f"{name}: model type {model_type!r} is not supported; use a model of: {known}"
        )
    return FAMILIES[model_type]()
