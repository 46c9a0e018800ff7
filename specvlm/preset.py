"""Named pairs of target and draft, with the frames and the prompt that suit them. Imports neither torch nor models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from specvlm.config import FrameSettings
from specvlm.drafts.kinds import is_head
from specvlm.packaged import demo_folder

DEFAULT_PROMPT = "Describe the video in detail."


@dataclass(frozen=True, slots=True)
class Preset:
    """One named pair.

    Attributes:
        name: What the user types.
        target: Hub id or folder of the model whose captions these are.
        draft: Hub id or folder of the model that guesses, or folder of a trained head.
        family: As `model_type` in config.json.
        frames: Which frames to read.
        prompt: Used where the user gives none.
        notes: One line for a listing.
    """

    name: str
    target: str
    draft: str
    family: str
    frames: FrameSettings = field(default_factory=FrameSettings)
    prompt: str = DEFAULT_PROMPT
    notes: str = ""


def _demo(name: str, family: str, prefix: str) -> Preset:
    return Preset(
        name,
        str(demo_folder(f"{prefix}-target")),  # type: ignore[arg-type]
        str(demo_folder(f"{prefix}-draft")),  # type: ignore[arg-type]
        family,
        FrameSettings(fps=2.0, max_frames=16),
        notes="tiny pair that ships with the package; knows drawn shapes only",
    )


def _demo_head(name: str, family: str, prefix: str) -> Preset:
    return replace(
        _demo(name, family, prefix),
        draft=str(demo_folder(f"{prefix}-head")),  # type: ignore[arg-type]
        notes="the same tiny target with a trained head; knows drawn shapes only",
    )


def _qwen(name: str, target: str, draft: str) -> Preset:
    return Preset(
        name,
        f"Qwen/Qwen2.5-VL-{target}-Instruct",
        f"Qwen/Qwen2.5-VL-{draft}-Instruct",
        "qwen2_5_vl",
        FrameSettings(fps=2.0, max_frames=128, max_pixels=360 * 640),
    )


def _qwen2(name: str, target: str, draft: str) -> Preset:
    return replace(
        _qwen(name, "", ""),
        target=f"Qwen/Qwen2-VL-{target}-Instruct",
        draft=f"Qwen/Qwen2-VL-{draft}-Instruct",
        family="qwen2_vl",
    )


def _qwen3(name: str, target: str, draft: str) -> Preset:
    return replace(
        _qwen(name, "", ""),
        target=f"Qwen/Qwen3-VL-{target}-Instruct",
        draft=f"Qwen/Qwen3-VL-{draft}-Instruct",
        family="qwen3_vl_moe" if "-A" in target else "qwen3_vl",
    )


def _llava(name: str, target: str, draft: str) -> Preset:
    return Preset(
        name,
        f"llava-hf/llava-onevision-qwen2-{target}-ov-hf",
        f"llava-hf/llava-onevision-qwen2-{draft}-ov-hf",
        "llava_onevision",
        FrameSettings(num_frames=32),
    )


_HEADS = (
    _demo_head("demo-head", "qwen2_5_vl", "qwen"),
    _demo_head("demo-head-llava", "llava_onevision", "llava"),
    _demo_head("demo-head-qwen3-vl", "qwen3_vl", "qwen3"),
)

_PRESETS = (
    _demo("demo", "qwen2_5_vl", "qwen"),
    _demo("demo-llava", "llava_onevision", "llava"),
    _demo("demo-qwen3-vl", "qwen3_vl", "qwen3"),
    *(
        one for one in _HEADS if is_head(one.draft)
    ),  # a head is trained with this package, so it may not be there
    _qwen3("qwen3-vl-8b", "8B", "2B"),
    _qwen3("qwen3-vl-32b", "32B", "4B"),
    _qwen3("qwen3-vl-30b-a3b", "30B-A3B", "2B"),
    _qwen3("qwen3-vl-235b-a22b", "235B-A22B", "4B"),
    _qwen("qwen2.5-vl-7b", "7B", "3B"),
    _qwen("qwen2.5-vl-32b", "32B", "7B"),
    _qwen("qwen2.5-vl-72b", "72B", "7B"),
    _qwen2("qwen2-vl-7b", "7B", "2B"),
    _llava("llava-onevision-7b", "7b", "0.5b"),
    _llava("llava-onevision-72b", "72b", "7b"),
)


def presets() -> tuple[Preset, ...]:
    """All presets, the embedded demo pairs and heads first."""
    return _PRESETS


def head_of(target: str) -> str | None:
    """Folder of the trained head that ships for a preset's target; None: there is none."""
    return next((one.draft for one in _PRESETS if one.target == target and is_head(one.draft)), None)


def find_preset(name: str) -> Preset | None:
    """The preset of this name, or None."""
    return next((preset for preset in _PRESETS if preset.name == name), None)
