"""The one place where the batch tool meets the decoding library. Importing this file imports no torch.

`Engine` is what a worker process needs of a captioner. `EngineFactory` makes it there: `Factory` gives the real
one, tests give a fake.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from specvlm.config import ModelSettings
from specvlm.drafts.kept_tokens import MostUsed
from specvlm.errors import PromptError
from specvlm.host import usable_cores
from specvlm.packaged import OWNER, demo_folder
from specvlm.records import Caption, Frames
from specvlm_cli.caption.gpus import may_have_gpu
from specvlm_cli.caption.settings import CaptionSettings, Plain
from specvlm_cli.exits import Flag, UsageError

DEMO_WEIGHTS = demo_folder("qwen-target").parent

if TYPE_CHECKING:
    from specvlm import Captioner, PromptSession
    from specvlm.batch import Kind
    from specvlm.trimming import Trimming

WARM_UP_TOKENS = 8

_CACHED_BYTES = 32 << 20  # weights that stay in the caches of a CPU while tokens are decoded
_WEIGHTS = (".safetensors", ".bin")


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
        warnings: Why captions may not be those of stock `generate()`.
    """

    target: str
    target_revision: str | None
    draft: str | None
    device: str
    frame_multiple: int = 1
    resolved: Plain = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Session(Protocol):
    """One video, preprocessed with its prompts; its sequences share all that they have in common."""


class FinishedSequence(NamedTuple):
    """One sequence that runs no more: a caption, or the error that belongs to this sequence alone."""

    key: Hashable  # what `add` was given
    caption: Caption | None
    error: Exception | None


class Engine(Protocol):
    """Makes captions with settings fixed beforehand, many sequences at a time.

    One thread calls all methods except `open`, which another one may call at any time.

    Attributes:
        models: What the loaded models turned out to be.
        batch_size: The most sequences in flight. It may shrink when memory runs out.
    """

    @property
    def models(self) -> Models: ...

    @property
    def batch_size(self) -> int: ...

    def open(self, frames: Frames, prompts: Sequence[str]) -> Session:
        """Preprocess frames and prompts; runs no model.

        Raises:
            PromptError: A prompt cannot be used.
            PreprocessError: The processor cannot take these frames.
        """

    def add(
        self, key: Hashable, session: Session, index: int, *, speculate: bool = True, alone: bool = False
    ) -> None:
        """Queue a sequence: the video of `session` with prompt number `index`.

        With `alone`, nothing else runs while it does.
        """

    def step(self) -> list[FinishedSequence]:
        """Admit waiting sequences for which there is room, run one round of all that run; return what finished.

        Raises:
            Exception: Something went wrong that concerns all sequences in flight.
        """

    def abort(self, key: Hashable) -> None:
        """Forget a sequence, waiting or running."""

    def __len__(self) -> int:
        """Return the number of sequences that wait or run."""

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

    def load(self, device: str | None, sharing: int) -> Engine:
        """Load the models.

        Args:
            device: Where to; None: where the settings say.
            sharing: How many workers share the cores, if that is the CPU.
        """


class SpecvlmEngine:
    """The library's captions in flight behind the `Engine` protocol."""

    def __init__(
        self,
        captioner: Captioner,
        settings: CaptionSettings,
        trimming: Trimming | None = None,
        batch_size: int | None = None,
    ) -> None:
        from specvlm.batch import CaptionBatch

        self._captioner, self._trimming = captioner, trimming
        self._settings = settings
        self._batch = CaptionBatch(captioner, batch_size)
        self._refused: list[FinishedSequence] = []  # sequences whose prompts cannot be used
        self._counted: set[Hashable] = set()  # sequences whose tokens trimming counts

    @property
    def batch_size(self) -> int:
        return self._batch.batch_size

    @property
    def models(self) -> Models:
        info = self._captioner.info
        return Models(
            target=self._settings.models.name,
            target_revision=info.target_revision,
            draft=None if info.draft is None else public_name(info.draft),
            device=info.device,
            frame_multiple=self._captioner.frame_multiple,
            resolved=resolved(self._captioner),
            warnings=info.warnings,
        )

    def open(self, frames: Frames, prompts: Sequence[str]) -> PromptSession:
        return self._captioner.session(frames, prompts, system=self._settings.system)

    def _kind(self, speculate: bool, most_tokens: int | None = None) -> Kind:
        generation = self._settings.generation
        if most_tokens is not None:
            generation = replace(generation, max_new_tokens=min(most_tokens, generation.max_new_tokens))
        return self._captioner.kind_of(generation, self._settings.speculation if speculate else None)

    def add(
        self,
        key: Hashable,
        session: Any,  # what `open` returned
        index: int,
        *,
        speculate: bool = True,
        alone: bool = False,
    ) -> None:
        try:
            session.add_to(self._batch, key, index, self._kind(speculate), alone=alone)
        except PromptError as error:
            self._refused.append(FinishedSequence(key, None, error))
            return
        if speculate and not alone:  # what is also decoded in other ways is counted once
            self._counted.add(key)

    def step(self) -> list[FinishedSequence]:
        finished, self._refused = self._refused, []
        for one in self._batch.step():
            if one.key in self._counted:
                self._counted.remove(one.key)
                if self._trimming is not None and one.caption is not None:
                    self._trimming.hear(one.caption.token_ids)
            finished.append(FinishedSequence(*one))
        return finished

    def abort(self, key: Hashable) -> None:
        self._refused = [one for one in self._refused if one.key != key]
        self._counted.discard(key)
        self._batch.abort(key)

    def __len__(self) -> int:
        return len(self._batch) + len(self._refused)

    def warm_up(self, frames: Frames, prompt: str) -> None:
        session = self._captioner.session(frames, [prompt], system=self._settings.system)
        for speculate in (False, True):
            session.add_to(self._batch, "warm-up", 0, self._kind(speculate, WARM_UP_TOKENS))
            while len(self._batch):
                self._batch.step()

    def is_out_of_memory(self, error: Exception) -> bool:
        from specvlm.batch import free_what_can_be_freed
        from specvlm.stats import is_out_of_memory

        if not is_out_of_memory(error):
            return False
        free_what_can_be_freed()
        return True


def resolved(captioner: Captioner) -> Plain:
    """Return what captions depend on beyond the settings."""
    info = captioner.info
    return {
        "target_revision": info.target_revision,
        "dtype": info.dtype,
        "processor_options": dict(info.processor_options),
    }


def public_name(model: str) -> str:
    """Return a model's name for settings and rows; a packaged one's is the same wherever we are installed."""
    folder = Path(model)
    if folder.parent == DEMO_WEIGHTS:
        return f"{OWNER}/{folder.name}"
    return str(folder.resolve()) if folder.is_dir() else model


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes the real engine; downloads show their progress unless `quiet`.

    Attributes:
        settings: What captions depend on, and how they are made.
        quiet: Show no progress of downloads.
        batch_size: The most sequences in flight; None: as many as memory holds and as help.
        readers: Processes that read videos at the same time, for which a worker on the CPU leaves cores.
    """

    settings: CaptionSettings
    quiet: bool
    batch_size: int | None = None
    readers: int = 0

    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    def load(self, device: str | None, sharing: int) -> Engine:
        """Load the models. Here transformers is imported."""
        models, trimming = self.settings.models, None
        if not isinstance(models.draft_vocab, MostUsed):
            captioner = load_captioner(models, device, quiet=self.quiet)
        else:
            from specvlm.trimming import Trimming

            captioner = load_captioner(replace(models, draft_vocab=None), device, quiet=self.quiet)
            trimming = Trimming(captioner, models.draft_vocab)
        if captioner.info.device == "cpu":
            self._share_cores(sharing)
        return SpecvlmEngine(captioner, self.settings, trimming, self.batch_size)

    def _share_cores(self, sharing: int) -> None:
        """Have torch leave cores to the other workers, or to the readers, unless OMP_NUM_THREADS says how many."""
        if "OMP_NUM_THREADS" in os.environ:
            return
        import torch

        cores = usable_cores() // sharing
        if sharing == 1:
            cores -= max(1, self.readers // 2)  # they wait half of the time
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores)))


def cpu_workers(models: Sequence[str], device_map: str | None) -> int:
    """Return how many workers make the most of this machine's CPU; 1 where there may be a GPU.

    Where all weights stay in the caches, a worker for each core is faster than one on all cores. Else reading them
    is what decoding costs, and one worker reads them once for all its sequences.

    Args:
        models: Hub ids or folders of the target and the draft.
        device_map: Where they go; None: to a GPU, if there is one.
    """
    if device_map not in (None, "auto", "cpu") or (device_map != "cpu" and may_have_gpu()):
        return 1
    sizes = [_weight_bytes(Path(model)) for model in models]
    return usable_cores() if all(sizes) and sum(sizes) <= _CACHED_BYTES else 1


def _weight_bytes(folder: Path) -> int:
    """Return the size of a local checkpoint's weights; 0: it is none."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
    except OSError:
        return 0


def load_captioner(models: ModelSettings, device: str | None = None, *, quiet: bool) -> Captioner:
    """Load what was chosen, onto a device where one is given; downloads show their progress unless `quiet`.

    Raises:
        UsageError: This machine has no such device.
        SpecvlmError: The models cannot be loaded, or do not fit together.
    """
    device_map = device or models.device_map
    _check_device(device_map)
    _hush(quiet)

    from specvlm import loading

    return loading.load_models(replace(models, device_map=device_map))


def with_draft(captioner: Captioner, draft: str, models: ModelSettings) -> Captioner:
    """Return another captioner with the same loaded target and another draft.

    Raises:
        SpecvlmError: The draft cannot be loaded, or does not fit the target.
    """
    from specvlm import loading

    return loading.with_draft(captioner, replace(models, draft=draft))


def load_tokenizer(models: ModelSettings, *, quiet: bool) -> Any:
    """Load the target's tokenizer alone.

    Raises:
        ModelLoadError: There is none.
    """
    _hush(quiet)

    from specvlm import loading

    return loading.load_tokenizer(models)


def _check_device(name: object) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UsageError: There is no such device.
    """
    kind, _, number = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in ("cuda", "xpu", "mps"):
        return
    import torch

    count = int(torch.backends.mps.is_available()) if kind == "mps" else getattr(torch, kind).device_count()
    if int(number or 0) >= count:
        there = f"this machine has {count} of that kind" if count else "this machine has none of that kind"
        raise UsageError(Flag("device_map", name), f": {there}", fix="give another device, auto, or cpu")


def _hush(quiet: bool) -> None:
    """Keep transformers from drawing over our own progress; a download is worth a bar of its own."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(
        ERROR
    )  # it says on each call that it casts, thousands of times a video
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not quiet:
        enable_progress_bars()
