"""The loop: steps, looks at the held-out videos, checkpoints, stopping. Knows no videos and no command line.

What the weights are after a step depends on settings, samples and seed alone: not on where a training was cut, nor
on when it was looked at or written down. The random numbers of a sample are those of its position, so there is no
generator to be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import torch

from specvlm.drafts.head_model import HeadModel
from specvlm.errors import TrainingError
from specvlm.model import VideoLM
from specvlm.training.example import Example
from specvlm.training.folder import HeadFolder
from specvlm.training.learner import Learner
from specvlm.training.objective import ObjectiveSettings, distillation_loss
from specvlm.training.order import Order, SampleTurn, noise_seed
from specvlm.training.progress import Held, Measures, Progress, mean_accepted_tokens
from specvlm.training.ranks import Ranks
from specvlm.training.settings import Schedule, TrainingSettings

Learn = Callable[[Example], Measures]


class Interrupted(Exception):  # noqa: N818  it is no fault
    """Stopping was asked for while a sample was waited for; the step is not taken."""


class SampleSource(Protocol):
    """Where samples come from: videos, captioned by the target. Every process has one."""

    def begin(self, steps: range) -> None:
        """These steps are to come."""

    def visit(self, place: SampleTurn | None, learn: Learn) -> Measures | None:
        """Show `learn` the sample of a place; every process calls this, those that have none left with None.

        Returns:
            What `learn` returned; None: there is no place, or its sample is left out.

        Raises:
            Interrupted: Stopping was asked for.
        """

    def held_out(self, step: int) -> list[Held] | None:
        """Decode the held-out samples with the head in use, as it is after `step`; every process calls this.

        None: there are none.

        Raises:
            Interrupted: Stopping was asked for.
        """

    def settled(self) -> bool:
        """Whether the samples that failed so far did so for good; else no checkpoint may build on it.

        The same in every process.
        """

    def end(self) -> None:
        """The last step was taken: what failed is settled."""


class Watcher(Protocol):
    """Receives the progress of a training."""

    def began(self, step: int, total: int, progress: Progress) -> None: ...

    def learned(self, one: Measures | None) -> None: ...

    def stepped(self, step: int, progress: Progress) -> None: ...

    def evaluating(self) -> None: ...

    def evaluated(self, entry: dict[str, Any]) -> None: ...


class TrainingParts(NamedTuple):
    """What a training is made of."""

    target: VideoLM
    learner: Learner
    in_use: HeadModel  # where its weights are put to decode with, and to be saved
    source: SampleSource
    folder: HeadFolder | None  # None: another process writes
    ranks: Ranks
    watcher: Watcher


@dataclass(frozen=True, slots=True)
class Ending:
    """How a training ended.

    Attributes:
        steps: Steps taken, over all starts, and kept.
        total: Steps to take.
        stopped: Why it stopped early; None where it did not.
        progress: Its log.
    """

    steps: int
    total: int
    stopped: str | None
    progress: Progress


class Trainer:
    """One training."""

    def __init__(
        self,
        parts: TrainingParts,
        order: Order,
        settings: TrainingSettings,
        objective: ObjectiveSettings,
        schedule: Schedule,
        stop: Callable[[], str | None],
    ) -> None:
        """`stop` says why to stop; None: continue."""
        self._parts, self._order, self._settings = parts, order, settings
        self._objective, self._schedule, self._stop = objective, schedule, stop
        self._total = order.total_steps(schedule)
        self._progress = Progress()
        self._stopped: str | None = None
        self._written_step = -1  # of the newest checkpoint
        self._written_s = self._clock_s = time.monotonic()

    def run(self) -> Ending:
        """Train to the end, or until stopping is asked for; the last state is then in a checkpoint.

        Raises:
            TrainingError: Loss, gradient or weights are not finite, or every checkpoint is damaged.
            OSError: The folder cannot be written.
        """
        learner, watcher = self._parts.learner, self._parts.watcher
        self._resume()
        watcher.began(learner.steps, self._total, self._progress)
        try:
            self._parts.source.begin(range(learner.steps, max(self._total, learner.steps)))
            while self._go_on():
                pass
        except Interrupted:
            self._stopped = self._stop() or "interrupted"
        if self._stopped is None:
            self._parts.source.end()
        if self._written_step != learner.steps:
            self._write()
        return Ending(max(self._written_step, 0), self._total, self._stopped, self._progress)

    def _go_on(self) -> bool:
        """Do what is due next; False: nothing is."""
        step = self._parts.learner.steps
        if self._evaluation_is_due(step):
            self._evaluate(step)
        if step >= self._total or self._asked_to_stop():
            return False
        if not self._step(step):
            return False
        if self._checkpoint_is_due():
            self._write()
        return True

    def _evaluation_is_due(self, step: int) -> bool:
        due = step % self._schedule.evaluate_every == 0 or step >= self._total
        return due and not self._progress.evaluated_at(step)

    def _asked_to_stop(self) -> bool:
        """Whether any of the processes was asked to stop."""
        reasons = [reason for reason in self._parts.ranks.share(self._stop()) if reason is not None]
        self._stopped = reasons[0] if reasons else None
        return bool(reasons)

    def _step(self, step: int) -> bool:
        """Learn from the samples of a step, and take it; False: stopping was asked for, and it was not taken."""
        parts, places = self._parts, self._order.places(step)
        ranks, seen = parts.ranks, list[Measures]()
        for first in range(0, len(places), ranks.count):
            mine = places[first : first + ranks.count][ranks.rank : ranks.rank + 1]
            measures = parts.source.visit(mine[0], self._learn(mine[0])) if mine else None
            if not mine:
                parts.source.visit(None, _nothing)
            for one in ranks.share(measures):
                parts.watcher.learned(one)
                seen += [] if one is None else [one]
            if first + ranks.count < len(places) and self._asked_to_stop():
                parts.learner.forget()
                return False
        parts.learner.step(len(seen))
        for one in seen:
            self._progress.window.add(one)
        self._progress.samples += len(seen)
        parts.watcher.stepped(parts.learner.steps, self._progress)
        return True

    def _learn(self, place: SampleTurn) -> Learn:
        """What is done with the sample of a place."""
        parts = self._parts

        def learn(example: Example) -> Measures:
            head = parts.learner.head
            generator = torch.Generator().manual_seed(noise_seed(self._settings.seed, place.position))
            losses = distillation_loss(
                head, parts.target, example.to(head.device), self._objective, generator
            )
            loss = float(losses.total.detach())
            if not math.isfinite(loss):
                raise TrainingError(
                    f"step {parts.learner.steps + 1}: the loss is {loss}; give a lower --learning-rate, or "
                    "--clip-norm 0.5, in another folder"
                )
            parts.learner.add(parts.learner.gradient(losses.total))
            return Measures(
                loss,
                float(losses.cross_entropy),
                float(losses.smooth_l1),
                float(losses.right),
                losses.operator,
            )

        return learn

    def _evaluate(self, step: int) -> None:
        """Measure the head as it is now on the held-out samples, log it, keep it where it is the best, checkpoint."""
        parts, progress = self._parts, self._progress
        parts.watcher.evaluating()
        parts.learner.copy_to(parts.in_use)
        held = parts.source.held_out(step)
        entry = self._entry(step, held)
        progress.log.append(entry)
        progress.window = type(progress.window)()
        if parts.folder is not None:
            if progress.best is entry:
                config = parts.in_use.config
                parts.folder.keep(
                    parts.in_use, replace(config, training={**config.training, "reached": entry})
                )
            parts.folder.tell(progress.log)
        self._write()
        parts.watcher.evaluated(entry)

    def _entry(self, step: int, held: list[Held] | None) -> dict[str, Any]:
        self._tick()
        return {
            "step": step,
            "epoch": step / self._order.steps_per_epoch,
            "samples": self._progress.samples,
            "mean_accepted_tokens": mean_accepted_tokens(held or []),
            "num_drafts": sum(one.num_drafts for one in held or []),
            "num_accepted_tokens": sum(one.num_accepted_tokens for one in held or []),
            "held_out": len(held or []),
            **self._progress.window.means(),
            "trained_s": round(self._progress.trained_s, 3),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _tick(self) -> None:
        """Count the time up to now."""
        now_s = time.monotonic()
        self._progress.trained_s += now_s - self._clock_s
        self._clock_s = now_s

    def _checkpoint_is_due(self) -> bool:
        steps = self._schedule.checkpoint_steps
        if steps is not None:
            return self._parts.learner.steps % steps == 0
        return time.monotonic() - self._written_s >= self._schedule.checkpoint_s

    def _write(self) -> None:
        """Write a checkpoint, unless samples before it may be tried again."""
        learner = self._parts.learner
        if not self._parts.source.settled():
            return
        if self._parts.folder is not None:
            self._tick()
            self._parts.folder.checkpoints.save(learner.steps, self._progress.facts(), learner.state())
        self._written_step, self._written_s = learner.steps, time.monotonic()

    def _resume(self) -> None:
        """Resume from the newest checkpoint, if there is one; rank 0 reads it."""
        ranks, learner, folder = self._parts.ranks, self._parts.learner, self._parts.folder
        found = None if folder is None else folder.newest()
        state = learner.state() if found is None else found.tensors
        step, facts = ranks.first((found.step, dict(found.facts)) if found else (0, None))
        if facts is None:
            return
        ranks.copy([state[name] for name in sorted(state)])
        learner.restore(state, step)
        self._progress, self._written_step = Progress.of(facts), step


def _nothing(_: Example) -> Measures:
    raise AssertionError("there is no sample")
