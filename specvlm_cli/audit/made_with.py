"""What the rows of a run were made with, read back from its `run.json`. Loads no model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from specvlm.checkpoint import can_compare
from specvlm.config import FrameSettings, GenerationSettings
from specvlm.packaged import local_name
from specvlm_cli.caption.settings import ModelChoice, Plain, config_hash, differences
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FLAG_NAMES, FatalError, UsageError
from specvlm_cli.readers import Limits
from specvlm_cli.run.layout import RunFolder
from specvlm_cli.run.view import RunView

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class How:
    """How captions are made again, as far as the run does not say it.

    Attributes:
        device_map: Where the target goes.
        local_files_only: Never ask the hub.
        trust_remote_code: Run code that comes with a checkpoint.
        limits: What reading one video may take.
        quiet: Show no progress of downloads.
    """

    device_map: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    limits: Limits = field(default_factory=Limits)
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class MadeWith:
    """What the rows of a run depend on.

    Attributes:
        target: The target's name in rows.
        prompts: What is asked about videos that bring no prompts of their own.
        system: The system message; None: that of the chat template.
        frames: Which frames are read.
        generation: What the target writes.
        settings: All settings, as plain values.
        resolved: What the models turned out to be.
        hashes: Hashes of the settings, those from before prompts were added included.
    """

    target: str
    prompts: tuple[str, ...]
    system: str | None
    frames: FrameSettings
    generation: GenerationSettings
    settings: Plain
    resolved: Plain
    hashes: frozenset[str]

    def models(self, how: How, *, has_cuda: bool) -> ModelChoice:
        """Return what loads the target alone, at the commit and in the number format of the rows.

        `has_cuda`: this machine has a GPU, where `auto` is the checkpoint's own format; elsewhere it is float32.
        """
        revision = self.resolved.get("target_revision")
        is_commit = isinstance(revision, str) and ":" not in revision
        return ModelChoice(
            name=self.target,
            target=local_name(self.target),
            draft="none",
            revision=revision if is_commit else self.settings.get("revision"),
            dtype=self._dtype(has_cuda),
            device_map=how.device_map,
            local_files_only=how.local_files_only,
            trust_remote_code=how.trust_remote_code,
        )

    def _dtype(self, has_cuda: bool) -> str:
        """Return the number format of the rows, where `auto` would be another one on this machine."""
        asked, found = str(self.settings["dtype"]), self.resolved.get("dtype")
        if asked == "auto" and found in _DTYPES and (found == "float32" or not has_cuda):
            return str(found)
        return asked

    def require_same(self, now: Plain) -> None:
        """Check what the target turned out to be.

        Raises:
            UsageError: It is not that of the rows, although it has its name.
        """
        then = {name: self.resolved.get(name, value) for name, value in now.items()}
        if not can_compare(then.get("target_revision"), now.get("target_revision")):
            then["target_revision"] = now.get("target_revision")
        if changes := differences(then, now):
            raise UsageError(
                f"{clean(self.target)} is not the target of the captions, although it has its name: "
                f"{clean(str(changes[0]))}; put the earlier files back, or caption into another folder"
            )


def made_with(run: RunView) -> MadeWith:
    """Return what the rows of a run were made with.

    Raises:
        FatalError: `run.json` is gone or does not say, or the number of shards is being changed.
    """
    if run.dividing or not run.settings:
        name = clean(str(run.root))
        raise FatalError(run.problem or f"{name}: no start has made a caption; run specvlm caption first")
    known = RunFolder(run.root).read()
    settings = run.settings
    try:
        return MadeWith(
            target=_text(settings, "target"),
            prompts=_prompts(settings["prompt"]),
            system=None if settings["system"] is None else _text(settings, "system"),
            frames=FrameSettings(**_chosen(settings, FrameSettings)),
            generation=GenerationSettings(**_chosen(settings, GenerationSettings)),
            settings=settings,
            resolved={} if known is None else known.resolved,
            hashes=_hashes(run),
        )
    except (KeyError, TypeError, ValueError) as error:
        where = clean(str(run.root / ".specvlm" / "run.json"))
        raise FatalError(
            f"{where}: does not say how captions were made ({type(error).__name__}: {clean(str(error))}); "
            "start specvlm caption with the settings of the run, which writes it again"
        ) from error


def _text(settings: Plain, name: str) -> str:
    if not isinstance(settings[name], str):
        raise TypeError(f"{name} is no text")
    return str(settings[name])


def _prompts(found: Any) -> tuple[str, ...]:
    prompts = [found] if isinstance(found, str) else found
    if not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
        raise TypeError("prompt is no text and no list of texts")
    return tuple(prompts)


def _chosen(settings: Plain, group: type) -> dict[str, Any]:
    """Return the settings that are fields of a dataclass, by the names of the fields."""
    flags = {field.name: FLAG_NAMES.get(field.name, field.name) for field in fields(group)}
    return {name: settings[flag] for name, flag in flags.items() if flag in settings}


def _hashes(run: RunView) -> frozenset[str]:
    """Return the hash of the settings, and those that they had with fewer prompts: prompts are only ever added."""
    prompts = _prompts(run.settings["prompt"])
    before = (prompts[0] if count == 1 else list(prompts[:count]) for count in range(1, len(prompts)))
    return frozenset({run.config_hash, *(config_hash(run.settings | {"prompt": one}) for one in before)})
