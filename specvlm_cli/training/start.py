"""One start of `specvlm train`, from the samples to the outcome: see what is left to do, load, train, say how it ended.

What can be known without a model is found out before one is loaded; a start on a finished training touches nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import specvlm
from specvlm.captioner import Captioner
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.loading import target_fingerprint
from specvlm.model import VideoLM
from specvlm.training.folder import STATE, HeadFolder
from specvlm.training.learner import Learner
from specvlm.training.objective import ObjectiveSettings
from specvlm.training.order import Order
from specvlm.training.ranks import Ranks
from specvlm.training.settings import Schedule, TrainingSettings
from specvlm.training.trainer import Ending, Interrupted, Trainer, TrainingParts
from specvlm_cli.caption import engine
from specvlm_cli.caption.settings import CaptionSettings, Plain
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import ExitCode, FatalError, Flag, UsageError
from specvlm_cli.readers import DecodingPool, Limits, ReadJob
from specvlm_cli.run.lock import LockedPolicy, take, when_free
from specvlm_cli.stopping import Stop, listening
from specvlm_cli.training import stored
from specvlm_cli.training.asking import Asking, Captioners
from specvlm_cli.training.captions import LEFT_OUT_NAME, NAME, Captions, LeftOut, LeftOuts
from specvlm_cli.training.exam import Exam
from specvlm_cli.training.frames import ReadLimits, TrainingReader
from specvlm_cli.training.lessons import Lessons, TrainingTally
from specvlm_cli.training.register import Register
from specvlm_cli.training.samples import Samples, Split
from specvlm_cli.training.source import VideoSamples
from specvlm_cli.training.stored import Stored
from specvlm_cli.training.talk import Speaker


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """What one start is asked to do.

    Attributes:
        out: The head's folder.
        samples: What to learn from, and what is held out.
        captions: How the target captions.
        split: How the held-out videos were chosen.
        head: The compressor of the head.
        training: How its weights learn.
        objective: What is minimised.
        schedule: How long, and what is done on the way.
        head_device: Where the head trains; None: where the target's logits come out.
        limits: What reading one video may take.
        decode_workers: Videos that are read at the same time.
        batch_size: Most captions in flight; None: as many as memory holds and as help.
        root: Nothing outside this folder is read; None: anything.
        if_locked: What to do where another start is at work.
        max_runtime_s: Stop after this time; None: never.
        exit_zero: Samples that were left out do not change the exit code.
        unreadable: Folders that could not be listed.
    """

    out: Path
    samples: Samples
    captions: CaptionSettings
    split: Split
    head: CompressorConfig
    training: TrainingSettings
    objective: ObjectiveSettings
    schedule: Schedule
    head_device: str | None = None
    limits: Limits = field(default_factory=Limits)
    decode_workers: int = 1
    batch_size: int | None = None
    root: bytes | None = None
    if_locked: LockedPolicy = "fail"
    max_runtime_s: float | None = None
    exit_zero: bool = False
    unreadable: int = 0

    def order(self) -> Order:
        """In which samples come."""
        return Order(len(self.samples.train), self.training.accumulate, self.training.seed)

    def fingerprint(self) -> Plain:
        """Return all that the head that is kept depends on, by the names of flags."""
        compressor = self.head
        return {
            **self.captions.fingerprint(),
            "compressor": compressor.name,
            "operators": list(compressor.operators),
            "compression_ratio": float(compressor.ratio),
            "queries": compressor.queries,
            "cross_entropy": float(self.objective.cross_entropy),
            "smooth_l1": float(self.objective.smooth_l1),
            "unroll": self.objective.unroll,
            **asdict(self.training),
            "evaluate_every": self.schedule.evaluate_every,
            "held_out": self.split.share,
            "held_out_limit": self.split.most,
            "the list of videos": self.samples.digest(),
        }


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """How a start ended.

    Attributes:
        exit_code: Of the command.
        out: The head's folder.
        steps: Steps taken, over all starts.
        total_steps: Steps of the training.
        samples: Samples that were learned from, over all starts.
        captions: Captions that the target wrote in this start.
        caption_tokens: Their tokens.
        left_out: Samples, and rows of manifests, that could not be used.
        best: Entry of the log of the head that is kept.
        last: The last entry.
        stopped: Why it stopped early; None where it did not.
        wall_s: Time of this start.
    """

    exit_code: ExitCode
    out: str
    steps: int
    total_steps: int
    samples: int = 0
    captions: int = 0
    caption_tokens: int = 0
    left_out: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    stopped: str | None = None
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"exit_code": int(self.exit_code)}


def run(request: TrainingRequest, ranks: Ranks, talk: Speaker, *, quiet: bool) -> TrainingOutcome:
    """Train, and say how it ended; of several processes each calls this, with its own `ranks`.

    Raises:
        CommandError: The start could not be made, or could not continue.
        SpecvlmError: The models cannot be loaded, or the head cannot be trained.
    """
    began_s = time.monotonic()
    with listening() as stop:
        if request.max_runtime_s is not None:
            stop.end_after(request.max_runtime_s)
        outcome = _run(request, ranks, talk, stop, quiet)
    return replace(outcome, wall_s=time.monotonic() - began_s)


def _run(request: TrainingRequest, ranks: Ranks, talk: Speaker, stop: Stop, quiet: bool) -> TrainingOutcome:
    _check_place(request.head_device)
    total = request.order().total_steps(request.schedule)
    with ExitStack() as held:
        standing = ranks.first(_standing(request, total, talk, stop, held) if ranks.rank == 0 else None)
        if isinstance(standing, TrainingOutcome):
            return standing
        return _TrainingStart(request, ranks, talk, stop, held).train(quiet)


def _standing(
    request: TrainingRequest, total: int, talk: Speaker, stop: Stop, held: ExitStack
) -> TrainingOutcome | None:
    """Take the folder; or return the outcome where there is nothing to do, or it cannot be had."""
    if (finished := _finished(request, total, talk)) is not None:
        return finished
    (request.out / STATE).mkdir(parents=True, exist_ok=True)
    lock = request.out / STATE / "lock"
    taken = when_free(
        request.if_locked, stop, talk.note, lambda: held.enter_context(take(lock, uuid.uuid4().hex))
    )
    if taken is None:
        code = ExitCode.OK if stop.reason is None else ExitCode.STOPPED
        return TrainingOutcome(code, str(request.out), 0, total, stopped=stop.reason or "locked")
    return _finished(request, total, talk)  # it may have changed before we had it


def _finished(request: TrainingRequest, total: int, talk: Speaker) -> TrainingOutcome | None:
    """Return the outcome of a training that has nothing left to do; its head may still have to be rewritten."""
    if _known(request) is None or (progress := stored.finished(request.out, total)) is None:
        return None
    if (damage := stored.damage(request.out)) is not None:
        if progress.best is progress.log[-1]:
            return None
        raise FatalError(
            f"{clean(damage)}, and the newest checkpoint is of a later step; train in another folder, where a copy of "
            f"{clean(str(request.out / STATE / NAME))} saves making the captions again"
        )
    done = progress.log[-1]["step"]
    more = "" if done == total else f", and {total:,} were asked for"
    talk.note(f"nothing to do: {done:,} steps are done{more}; give more --epochs to continue")
    return _outcome(request, Ending(done, done, None, progress), _left_out(request), TrainingTally())


def _known(request: TrainingRequest) -> Stored | None:
    known = stored.read(request.out)
    if known is not None:
        stored.agree(request.out, known.settings, request.fingerprint())
    return known


@dataclass(slots=True)
class _TrainingStart:
    """One start that has its folder, and something to do."""

    request: TrainingRequest
    ranks: Ranks
    talk: Speaker
    stop: Stop
    held: ExitStack

    def train(self, quiet: bool) -> TrainingOutcome:
        """Load, train, and say how it ended."""
        request = self.request
        self.talk.note(f"loading {clean(request.captions.models.name)}")
        with self.stop.at_once():
            teacher = engine.load_captioner(request.captions.models, self._device(), quiet=quiet)
        resolved = _resolved(teacher)
        _refuse_float16(teacher.target)
        self._agree(resolved)
        captions, kept = None, None
        if self.ranks.rank == 0:
            captions = self.held.enter_context(Captions.open(request.out / STATE / NAME))
            kept = self.held.enter_context(LeftOuts.open(request.out / STATE / LEFT_OUT_NAME))
        register = Register(kept, self.ranks, self.talk.left_out, len(request.samples.train))
        trainer, lessons = self._trainer(teacher, resolved, captions, register)
        if self.ranks.rank == 0:  # here, where no flag can turn out to be wrong any more
            stored.write(request.out, Stored(request.fingerprint(), resolved))
        with self.talk.working():
            ending = trainer.run()
        return _outcome(request, ending, register.noted, lessons.tally)

    def _device(self) -> str | None:
        """Of several processes each has its own device, unless the flags say where the target goes."""
        return self.ranks.device if self.request.captions.models.device_map is None else None

    def _agree(self, resolved: Plain) -> None:
        known = stored.read(self.request.out) if self.ranks.rank == 0 else None
        if known is not None and known.resolved:
            stored.agree(self.request.out, known.resolved, resolved, flags=False)

    def _trainer(
        self, teacher: Captioner, resolved: Plain, captions: Captions | None, register: Register
    ) -> tuple[Trainer, Lessons]:
        request, ranks, target = self.request, self.ranks, teacher.target
        config = _head_config(request, teacher, ranks.count)
        target.keep_features()
        head = HeadModel.fresh(target, config, request.training.seed).to(*self._place(target)).train()
        in_use = HeadModel.fresh(target, config, request.training.seed).to(target.device, target.dtype)
        in_use.eval().requires_grad_(False)
        captioners = Captioners(teacher, _pupil(teacher, in_use))
        folder = None if captions is None else HeadFolder(request.out, self.talk.warn)
        if folder is not None:
            _mend(folder, in_use, self.talk)
        asking = _asking(request, teacher, resolved)
        check = self._check if ranks.count == 1 else _go_on
        order = request.order()
        lessons = Lessons(
            request.samples.train,
            order,
            head,
            captioners,
            asking,
            self._reader(check),
            captions,
            register,
            ranks,
            self.talk,
            request.batch_size,
        )
        exam = Exam(
            request.samples.held_out,
            captioners,
            asking,
            self._reader(check),
            register,
            ranks,
            self.talk,
            check,
            request.batch_size,
        )
        parts = TrainingParts(
            target,
            Learner(head, request.training, ranks),
            in_use,
            VideoSamples(lessons, exam, register),
            folder,
            ranks,
            self.talk,
        )
        trainer = Trainer(
            parts, order, request.training, request.objective, request.schedule, lambda: self.stop.reason
        )
        return trainer, lessons

    def _place(self, target: VideoLM) -> tuple[torch.device, torch.dtype]:
        """Where the head trains, and in which number format: on a CPU in float32, elsewhere in the target's."""
        device = target.device if self.request.head_device is None else torch.device(self.request.head_device)
        return device, torch.float32 if device.type == "cpu" else target.dtype

    def _reader(self, check: Callable[[], None]) -> TrainingReader:
        workers = self.request.decode_workers
        pool = self.held.enter_context(DecodingPool(workers, self.request.limits))
        return TrainingReader(pool, ReadLimits(workers), check)

    def _check(self) -> None:
        if self.stop.reason is not None:
            raise Interrupted


def _mend(folder: HeadFolder, in_use: HeadModel, talk: Speaker) -> None:
    """Where the head that was kept is damaged, write that of the newest checkpoint; `in_use` gets its weights."""
    if (damage := stored.damage(folder.root)) is None or (found := folder.newest()) is None:
        return
    log = found.facts["log"]
    if not log:  # none was kept yet
        return
    with torch.no_grad():
        for name, weight in in_use.named_parameters():
            weight.copy_(found.tensors[f"head.{name}"])
    measured = log[-1]["step"] == found.step
    reached = log[-1] if measured else {"step": found.step, "mean_accepted_tokens": None, "held_out": 0}
    config = in_use.config
    folder.keep(in_use, replace(config, training={**config.training, "reached": reached}))
    talk.warn(
        f"{clean(damage)}; the folder has the head of step {found.step:,} now, until a better one comes"
    )


def _check_place(device: str | None) -> None:
    """Refuse a device for the head that this machine has not."""
    if device is None or device == "cpu":
        return
    kind, _, number = device.partition(":")
    counts = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    count = counts[kind]() if kind in counts else int(torch.backends.mps.is_available())
    if int(number or 0) >= count:
        raise UsageError(
            Flag("head_device", device), ": there is none here", fix=f"this machine has {count} of {kind}"
        )


def _left_out(request: TrainingRequest) -> list[LeftOut]:
    """What earlier starts left out; nothing is made."""
    path = request.out / STATE / LEFT_OUT_NAME
    if not path.exists():
        return []
    with LeftOuts.open(path) as kept:
        return kept.left_out()


def _outcome(
    request: TrainingRequest, ending: Ending, noted: list[LeftOut], tally: TrainingTally
) -> TrainingOutcome:
    """How a start ended; `noted`: what was left out, `tally`: what the target wrote in this start."""
    progress, left = ending.progress, len(noted) + len(request.samples.problems)
    if not progress.samples and ending.stopped is None and ending.total:
        why = f"; the first: {noted[0].name}: {noted[0].failure.error}" if noted else ""
        raise FatalError(f"none of the videos could be learned from{why}")
    failed = bool(left or request.unreadable) and not request.exit_zero
    code = ExitCode.SOME_FAILED if failed else ExitCode.OK
    return TrainingOutcome(
        exit_code=code if ending.stopped is None else ExitCode.STOPPED,
        out=str(request.out),
        steps=ending.steps,
        total_steps=ending.total,
        samples=progress.samples,
        captions=tally.captions,
        caption_tokens=tally.tokens,
        left_out=left,
        best=progress.best,
        last=progress.log[-1] if progress.log else None,
        stopped=ending.stopped,
    )


def _go_on() -> None:
    """Several processes stop together, between two samples."""


def _resolved(teacher: Captioner) -> Plain:
    info = teacher.info
    return {
        "target_revision": info.target_revision,
        "number format": info.dtype,
        "processor_options": dict(info.processor_options),
    }


def _refuse_float16(target: VideoLM) -> None:
    if target.dtype == torch.float16:
        raise UsageError(
            Flag("dtype", "float16"), "overflows in training", fix="give --dtype bfloat16 or float32"
        )


def _head_config(request: TrainingRequest, teacher: Captioner, processes: int) -> HeadConfig:
    """What the head is made for, and how it is trained, for the record."""
    target = teacher.target
    training = {
        **asdict(request.training),
        **asdict(request.objective),
        "train_samples": len(request.samples.train),
        "held_out_videos": len(request.samples.held_out),
        "prompts": list(request.captions.prompts),
        "max_new_tokens": request.captions.generation.max_new_tokens,
        "processes": processes,
        "dtype": teacher.info.dtype,
        "specvlm_version": specvlm.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }
    return HeadConfig(
        target=request.captions.models.name,
        target_revision=teacher.info.target_revision,
        family=target.family.name,
        hidden_size=target.hidden_size,
        compressor=request.head,
        training=training,
        target_fingerprint=target_fingerprint(teacher.info.target, teacher.info.target_revision),
    )


def _pupil(teacher: Captioner, head: HeadModel) -> Captioner:
    """The target with the head in use as its draft."""
    draft = HeadDraft(head, teacher.target)
    return Captioner(teacher.target, teacher.processor, draft, teacher.info, teacher.frames)


def _asking(request: TrainingRequest, teacher: Captioner, resolved: Plain) -> Asking:
    settings = request.captions
    fingerprint = {name: value for name, value in settings.fingerprint().items() if name != "prompt"}
    read = ReadJob(0, b"", settings.frames, teacher.frame_multiple, request.root)
    return Asking(settings, fingerprint | resolved, read, request.objective.unroll)
