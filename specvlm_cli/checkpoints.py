"""What the presets' checkpoints need: memory by arithmetic, and whether they are on disk already.

    weights = 2 bytes x (parameters of target + draft)
    cache of a token = 2 (key, value) x layers x key heads x head size x 2 bytes
    caches = target's x (video tokens + text) + draft's x (video tokens it keeps + text)

in bf16, for the longest video that the preset reads, 1024 tokens of prompt and caption, with the times that some
models are given, nine of ten video tokens pruned for the draft. Working memory of the vision towers and of the prefill
comes on top and is not in here. Asks no network and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specvlm.checkpoint import read_json
from specvlm.config import SpeculationSettings
from specvlm.errors import ModelLoadError
from specvlm.preset import Preset, presets
from specvlm.published import shape_of, stamp_tokens, tokens_within
from specvlm_cli.caption.engine import public_name

OnDisk = Literal["yes", "partly", "no"]

_BYTES = 2  # of one number in bf16
_TEXT_TOKENS = 1024
_ROOM = 1.2  # for working memory
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class PresetView:
    """One preset, and what it takes to run it.

    Attributes:
        name: What the user types.
        target: Hub id of the target; of one that ships with the package its public name.
        draft: The same of the draft.
        family: As `model_type` in config.json.
        frames: Which frames are read, in words.
        notes: One line, or nothing.
        video_tokens: Most video tokens of one video; None for the tiny pairs, as is the next one.
        weights_bytes: Weights of both in bf16; of the tiny pairs, as they are on disk.
        caches_bytes: Keys and values of both for that video.
        target_on_disk: All files of the weights are there, some, or none.
        draft_on_disk: The same of the draft.
    """

    name: str
    target: str
    draft: str
    family: str
    frames: str
    notes: str
    video_tokens: int | None
    weights_bytes: int
    caches_bytes: int | None
    target_on_disk: OnDisk
    draft_on_disk: OnDisk

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + (self.caches_bytes or 0)


def largest_that_fits(gpu_bytes: int) -> Preset | None:
    """Return the preset with the largest target whose pair fits a GPU with so much memory; None: there is none.

    Of targets with about as many parameters it is the first in the list, which is the newest.
    """
    shapes = {one: shape for one in presets() if (shape := shape_of(one.target)) is not None}
    fitting = [one for one in shapes if sum(filter(None, _memory(one)[1:])) * _ROOM <= gpu_bytes]
    return max(fitting, key=lambda one: round(shapes[one].parameters / 1e9), default=None)


def preset_views() -> list[PresetView]:
    """Return all presets with what they need."""
    return [_view(one) for one in presets()]


def _view(preset: Preset) -> PresetView:
    tokens, weights_bytes, caches_bytes = _memory(preset)
    return PresetView(
        name=preset.name,
        target=public_name(preset.target),
        draft=public_name(preset.draft),
        family=preset.family,
        frames=_frames(preset),
        notes=preset.notes,
        video_tokens=tokens,
        weights_bytes=weights_bytes,
        caches_bytes=caches_bytes,
        target_on_disk=on_disk(preset.target),
        draft_on_disk=on_disk(preset.draft),
    )


def _memory(preset: Preset) -> tuple[int | None, int, int | None]:
    """Return (video tokens, bytes of the weights, bytes of the caches)."""
    target, draft = shape_of(preset.target), shape_of(preset.draft)
    if target is None or draft is None:
        files = [
            path for model in (preset.target, preset.draft) for path in Path(model).glob("*.safetensors")
        ]
        return None, sum(path.stat().st_size for path in files), None
    frames = preset.frames.num_frames or preset.frames.max_frames
    seen = tokens_within(target, frames, preset.frames.max_pixels)
    text = stamp_tokens(target, frames) + _TEXT_TOKENS
    kept = round(seen * (1.0 - SpeculationSettings().prune_ratio))
    caches = target.text.slot_bytes(_BYTES) * (seen + text) + draft.text.slot_bytes(_BYTES) * (kept + text)
    return seen, _BYTES * (target.parameters + draft.parameters), caches


def _frames(preset: Preset) -> str:
    frames = preset.frames
    if frames.num_frames:
        return f"{frames.num_frames} frames"
    return f"{frames.fps:g} per second, at most {frames.max_frames}"


def on_disk(model: str) -> OnDisk:
    """Say whether a model's weights are on disk: a folder, or in the cache of the hub. Asks no network."""
    if Path(model).is_dir():
        return _of(
            [path.is_file() for path in map(Path(model).joinpath, _needed(_read(Path(model) / _INDEX)))]
        )
    index = _cached(model, _INDEX)
    found = [_cached(model, name) is not None for name in _needed(_read(index) if index else None)]
    return "partly" if not any(found) and _cached(model, "config.json") else _of(found)


def _needed(index: dict[str, Any] | None) -> Sequence[str]:
    """Return the files that hold the weights, from the index of their parts where there is one."""
    found = index.get("weight_map") if index else None
    return sorted(set(map(str, found.values()))) if isinstance(found, dict) else [_WEIGHTS]


def _of(found: list[bool]) -> OnDisk:
    return "yes" if all(found) else "partly" if any(found) else "no"


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(ModelLoadError):
        return read_json(path)
    return None


def _cached(model: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str) else None
