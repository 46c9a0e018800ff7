"""The one place where the batch tool meets the decoding library. Importing this file imports no torch.

`Engine` is what a worker process needs of a captioner. `EngineFactory` makes it there: `Factory` gives the real
one, tests give a fake.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import specvlm
from specvlm.demo import OWNER, demo_folder
from specvlm.drafts.kept_tokens import MostUsed
from specvlm.records import Caption, Frames
from specvlm_cli.exits import UsageError
from specvlm_cli.settings import CaptionSettings, ModelChoice, Plain

DEMO_WEIGHTS = demo_folder("qwen-target").parent

if TYPE_CHECKING:
    from specvlm import Captioner, PromptSession
    from specvlm.trimming import Trimming

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Models:
    """What the loaded models turned out to be.

    Attributes:
        target: Hub id or folder of the target.
        target_revision: Its commit, where known.
        draft: Hub id or folder of the draft; None: no draft.
        device: The target's device, in words.
        frame_multiple: The number of frames that the target takes is a multiple of this.
        resolved: What captions depend on beyond the settings: revision, number format, processor options.
    """

    target: str
    target_revision: str | None
    draft: str | None
    device: str
    frame_multiple: int = 1
    resolved: Plain = field(default_factory=dict)


class Session(Protocol):
    """One video with its prompts, which share all that they have in common."""

    def caption(
        self, index: int, *, speculate: bool, time_limit_s: float | None = None, estimate: bool = False
    ) -> Caption:
        """Caption the video with prompt number `index`, with the draft or plainly.

        With `estimate`, a few plain steps are timed afterwards.

        Raises:
            PromptError: The prompt cannot be used.
            GenerationTimeoutError: Not within the time limit.
        """


class Engine(Protocol):
    """Makes captions with settings fixed beforehand."""

    @property
    def models(self) -> Models:
        """What the loaded models turned out to be."""

    def open(self, frames: Frames, prompts: Sequence[str]) -> Session:
        """Preprocess frames and prompts."""

    def warm_up(self, frames: Frames, prompt: str) -> None:
        """Generate a few tokens both ways, so that the first video does not pay what first use costs.

        Raises:
            PromptError: The prompt cannot be used.
        """

    def is_out_of_memory(self, error: Exception) -> bool:
        """Say whether an error means that memory ran out, and give back what can be given back."""


class EngineFactory(Protocol):
    """Makes an engine in a worker process; it is pickled on its way there."""

    def gpus(self) -> int:
        """Return how many GPUs this process sees."""

    def load(self, device: str | None) -> Engine:
        """Load the models onto a device; None: where the settings say."""


class _SpecvlmSession:
    """The library's session behind the `Session` protocol."""

    def __init__(self, session: PromptSession, options: dict[str, Any], trimming: Trimming | None) -> None:
        self._session, self._options, self._trimming = session, options, trimming

    def caption(
        self, index: int, *, speculate: bool, time_limit_s: float | None = None, estimate: bool = False
    ) -> Caption:
        caption = self._session.caption(
            index, speculate=speculate, time_limit_s=time_limit_s, estimate=estimate, **self._options
        )
        if self._trimming is not None and speculate:  # what is also decoded plainly is counted once
            self._trimming.hear(caption.token_ids)
        return caption


class SpecvlmEngine:
    """The library behind the `Engine` protocol."""

    def __init__(
        self, captioner: Captioner, settings: CaptionSettings, trimming: Trimming | None = None
    ) -> None:
        self._captioner, self._trimming = captioner, trimming
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
        return Models(
            target=self._settings.models.name,
            target_revision=info.target_revision,
            draft=None if info.draft is None else public_name(info.draft),
            device=info.device,
            frame_multiple=self._captioner.frame_multiple,
            resolved=resolved,
        )

    def open(self, frames: Frames, prompts: Sequence[str]) -> Session:
        session = self._captioner.session(frames, prompts, system=self._settings.system)
        return _SpecvlmSession(session, self._options, self._trimming)

    def warm_up(self, frames: Frames, prompt: str) -> None:
        few = min(WARM_UP_TOKENS, self._settings.generation.max_new_tokens)
        session = self._captioner.session(frames, [prompt], system=self._settings.system)
        for speculate in (False, True):
            session.caption(0, speculate=speculate, **(self._options | {"max_new_tokens": few}))

    def is_out_of_memory(self, error: Exception) -> bool:
        import torch

        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return False
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True


def _speculation_options(settings: CaptionSettings) -> dict[str, Any]:
    names = ("pruner", "prune_ratio", "top_p", "tree", "positions", "depth", "nodes")
    return {name: getattr(settings.speculation, name) for name in names}


def public_name(model: str) -> str:
    """Return a model's name for settings and rows; a packaged one's is the same wherever we are installed."""
    folder = Path(model)
    if folder.parent == DEMO_WEIGHTS:
        return f"{OWNER}/{folder.name}"
    return str(folder.resolve()) if folder.is_dir() else model


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes the real engine; downloads show their progress unless `quiet`."""

    settings: CaptionSettings
    quiet: bool

    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    def load(self, device: str | None) -> Engine:
        """Load the models. Here transformers is imported."""
        models = self.settings.models
        if not isinstance(models.draft_vocab, MostUsed):
            return SpecvlmEngine(load_captioner(models, device, quiet=self.quiet), self.settings)
        captioner = load_captioner(replace(models, draft_vocab=None), device, quiet=self.quiet)

        from specvlm.trimming import Trimming

        return SpecvlmEngine(captioner, self.settings, Trimming(captioner, models.draft_vocab))


def load_captioner(models: ModelChoice, device: str | None = None, *, quiet: bool) -> Captioner:
    """Load what was chosen, onto a device where one is given; downloads show their progress unless `quiet`.

    Raises:
        UsageError: This machine has no such device.
        SpecvlmError: The models cannot be loaded, or do not fit together.
    """
    device_map = device or models.device_map
    _check_device(device_map)
    _hush(quiet)
    return specvlm.load(
        models.load,
        draft=models.draft,
        draft_vocab=models.draft_vocab,
        revision=models.revision,
        draft_revision=models.draft_revision,
        dtype=models.dtype,
        device_map=device_map,
        local_files_only=models.local_files_only,
        trust_remote_code=models.trust_remote_code,
    )


def with_draft(captioner: Captioner, draft: str, models: ModelChoice) -> Captioner:
    """Return another captioner with the same loaded target and another draft.

    Raises:
        SpecvlmError: The draft cannot be loaded, or does not fit the target.
    """
    from specvlm import loading

    return loading.with_draft(
        captioner,
        draft,
        draft_vocab=models.draft_vocab,
        local_files_only=models.local_files_only,
        trust_remote_code=models.trust_remote_code,
    )


def load_tokenizer(models: ModelChoice, *, quiet: bool) -> Any:
    """Load the target's tokenizer alone.

    Raises:
        ModelLoadError: There is none.
    """
    _hush(quiet)

    from specvlm.loading import load_tokenizer as load

    return load(
        models.load,
        revision=models.revision,
        local_files_only=models.local_files_only,
        trust_remote_code=models.trust_remote_code,
    )


def _check_device(name: str | None) -> None:
    """Refuse a device that this machine does not have.

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
