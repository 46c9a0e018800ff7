"""What a caption depends on, as plain values: compared between starts, and hashed into every row.

Speculation settings, the draft and its vocabulary are not here on purpose: they change the speed of a caption,
never its text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from specvlm.config import FrameSettings, GenerationSettings, ModelSettings, SpeculationSettings
from specvlm_cli.exits import FLAG_NAMES

Plain = dict[str, Any]

_FIRST_TOLD = ("target", "revision", "prompt", "system")  # settings that bring others along with them


@dataclass(frozen=True, slots=True)
class ModelChoice(ModelSettings):
    """Which models to load, and the name that captions depend on.

    Attributes:
        name: The target's hub id or folder; a packaged one by its public name.
    """

    name: str = ""


@dataclass(frozen=True, slots=True)
class CaptionSettings:
    """Everything that one run of `specvlm caption` does the same for every video."""

    models: ModelChoice
    prompts: tuple[str, ...]  # asked about every video, one caption each
    system: str | None
    frames: FrameSettings
    generation: GenerationSettings
    speculation: SpeculationSettings

    def fingerprint(self) -> Plain:
        """Return every setting that can change a caption, by the name of its flag."""
        return {
            "target": self.models.name,
            "revision": self.models.revision,
            "dtype": self.models.dtype,
            "prompt": self.prompts[0] if len(self.prompts) == 1 else list(self.prompts),
            "system": self.system,
            **_frames(self.frames),
            **_generation(self.generation),
        }


def _frames(frames: FrameSettings) -> Plain:
    """Leave out what belongs to each video, its start and end, and what a number of frames overrules."""
    unused = {"start_s", "end_s"} | ({"min_frames", "max_frames"} if frames.num_frames else set())
    plain = asdict(frames)
    return {FLAG_NAMES.get(name, name): value for name, value in plain.items() if name not in unused}


def _generation(generation: GenerationSettings) -> Plain:
    """Leave out what only matters when sampling, where it does not, and `exact` where it is as usual."""
    plain = asdict(generation)
    usual = {"exact"} if generation.exact else set()
    unused = usual if generation.temperature > 0 else usual | {"top_k", "seed"}
    return {name: value for name, value in plain.items() if name not in unused}


def config_hash(fingerprint: Plain) -> str:
    """Return 16 hex digits for these settings."""
    text = json.dumps(fingerprint, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Change(NamedTuple):
    """A setting that changed."""

    name: str
    before: object
    now: object

    @property
    def values(self) -> str:
        """Both values, in words."""
        return f"was {_shown(self.before)}, is now {_shown(self.now)}"

    def __str__(self) -> str:
        return f"{self.name} {self.values}"


def differences(before: Plain, now: Plain) -> list[Change]:
    """Return each setting that changed."""
    return [
        Change(name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys(), key=lambda name: (name not in _FIRST_TOLD, name))
        if before.get(name) != now.get(name)
    ]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
