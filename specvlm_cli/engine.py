"""The one place where the batch tool meets the decoding library. Importing this file imports no torch.

`Engine` is what the runner needs of a captioner; `load` gives the real one, tests give a fake.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import specvlm
from specvlm.records import Caption
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import Item
from specvlm_cli.settings import CaptionSettings, Plain

DEMO_WEIGHTS = Path(specvlm.__file__).parent / "demo" / "weights"

if TYPE_CHECKING:
    from specvlm import Captioner, PreparedVideo

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Models:
    """What the loaded models turned out to be.

    Attributes:
        target: Hub id or folder of the target.
        target_revision: Its commit, where known.
        draft: Hub id or folder of the draft; None: no draft.
        device: The target's device, in words.
        resolved: What captions depend on beyond the settings: revision, number format, processor options.
    """

    target: str
    target_revision: str | None
    draft: str | None
    device: str
    resolved: Plain


class Engine(Protocol):
    """Makes captions with settings fixed beforehand."""

    @property
    def models(self) -> Models:
        """What the loaded models turned out to be."""

    def prepare(self, item: Item) -> Any:
        """Read and preprocess one video; the result may be captioned several times and is never changed.

        Raises:
            VideoError: The video gives no frames.
        """

    def caption(self, prepared: Any, *, speculate: bool) -> Caption:
        """Caption a prepared video, with the draft or plainly."""

    def warm_up(self, prepared: Any) -> None:
        """Generate a few tokens both ways, so that the first video does not pay what first use costs."""


class SpecvlmEngine:
    """The library behind the `Engine` protocol."""

    def __init__(self, captioner: Captioner, settings: CaptionSettings) -> None:
        self._captioner = captioner
        self._settings = settings
        self._options = asdict(settings.generation) | _speculation_options(settings)

    @property
    def models(self) -> Models:
        info = self._captioner.info
        resolved = {
            "target_revision": info.target_revision,
            "dtype": info.dtype,
            "processor_options": dict(info.processor_options),
        }
        draft = None if info.draft is None else public_name(info.draft)
        return Models(self._settings.models.name, info.target_revision, draft, info.device, resolved)

    def prepare(self, item: Item) -> PreparedVideo:
        frames = self._settings.frames
        if item.start_s is not None or item.end_s is not None:
            frames = replace(frames, start_s=item.start_s or 0.0, end_s=item.end_s)
        path = os.fsdecode(item.path)
        return self._captioner.prepare(
            path, self._settings.prompt, system=self._settings.system, frames=frames
        )

    def caption(self, prepared: PreparedVideo, *, speculate: bool) -> Caption:
        return self._captioner.caption(prepared, speculate=speculate, **self._options)

    def warm_up(self, prepared: PreparedVideo) -> None:
        few = min(WARM_UP_TOKENS, self._settings.generation.max_new_tokens)
        for speculate in (False, True):
            self._captioner.caption(
                prepared, speculate=speculate, **(self._options | {"max_new_tokens": few})
            )


def _speculation_options(settings: CaptionSettings) -> dict[str, Any]:
    names = ("pruner", "prune_ratio", "top_p", "tree", "positions", "depth", "nodes")
    return {name: getattr(settings.speculation, name) for name in names}


def public_name(model: str) -> str:
    """Return a model's name for settings and rows; a packaged one's is the same wherever we are installed."""
    folder = Path(model)
    if folder.parent == DEMO_WEIGHTS:
        return f"specvlm-demo/{folder.name}"
    return str(folder.resolve()) if folder.is_dir() else model


def load(settings: CaptionSettings, *, quiet: bool) -> Engine:
    """Load the models; downloads show their progress unless `quiet`. Here torch and transformers are imported."""
    _hush(quiet)
    models = settings.models
    captioner = specvlm.load(
        models.load,
        draft=models.draft,
        revision=models.revision,
        draft_revision=models.draft_revision,
        dtype=models.dtype,
        device_map=models.device_map,
        local_files_only=models.local_files_only,
        trust_remote_code=models.trust_remote_code,
    )
    return SpecvlmEngine(captioner, settings)


def check_device(name: str | None) -> None:
    """Refuse a device that this machine does not have. torch is imported only where one is named.

    Raises:
        UsageError: There is no such device.
    """
    kind, _, number = (name or "").partition(":")
    if kind not in ("cuda", "xpu", "mps"):
        return
    import torch

    count = int(torch.backends.mps.is_available()) if kind == "mps" else getattr(torch, kind).device_count()
    if int(number or 0) >= count:
        there = f"this machine has {count} of that kind" if count else "this machine has none of that kind"
        raise UsageError(f"--device-map {name}: {there}; give another device, auto, or cpu")


def _hush(quiet: bool) -> None:
    """Keep transformers from drawing over our own progress; a download is worth a bar of its own."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not quiet:
        enable_progress_bars()
