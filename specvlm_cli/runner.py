"""The work of one start: read ahead, give videos to the workers, store what comes; until none is left.

One event loop in one thread. Videos are read by a pool of killable child processes, a bounded number of bytes
ahead; each worker process holds the models and captions one video at a time, and prepares the next one meanwhile;
all of them are fed from one queue, so no GPU waits for another. A video counts as running, and so as suspect in a
crash, only from the moment a worker is told to caption it.

One bad video never ends the run: whatever goes wrong with it is stored as its failure. What goes wrong with
the ledger or the output folder does end it, because then nothing could be kept. It knows no screen and no
settings of models.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Protocol

from specvlm_cli import baseline
from specvlm_cli.decoding import DecodingPool, ReadFailure, ReadVideo
from specvlm_cli.engine import EngineFactory, Models
from specvlm_cli.exits import FatalError
from specvlm_cli.failure import Failure
from specvlm_cli.generating.crew import Crew
from specvlm_cli.generating.messages import Broken, Failed, FromWorker, Hello, Made, Ready, Task
from specvlm_cli.generating.worker import Worker
from specvlm_cli.ledger import BAD_INPUT, NO_FILE, Claim, FileStamp, Ledger, Row
from specvlm_cli.parts import Parts
from specvlm_cli.policy import Policy
from specvlm_cli.read_ahead import Queue, Taken
from specvlm_cli.results import LiveStatus, Tally
from specvlm_cli.rows import Provenance, caption_row
from specvlm_cli.stopping import Stop

_TOO_MANY = "max-failures"  # why a run stopped, where that was the reason
_LOOK_EVERY_S = 0.5  # at stop requests and limits, where nothing else wakes us
_NOT_FINITE, _NOT_FINITE_IN_A_ROW = "NonFiniteLogitsError", 3
_LOST_IN_A_ROW = 3  # deaths while loading, or videos that kill their workers, with no caption in between


class Reporter(Protocol):
    """Told what happens, as it happens."""

    def captioned(self, claim: Claim, rows: list[Row]) -> None: ...

    def failed(self, claim: Claim, failure: Failure, trace: str) -> None: ...

    def state(self, status: LiveStatus) -> None: ...

    def child_stderr(self) -> int: ...

    def warn(self, message: str) -> None: ...


class Runner:
    """Works through the wanted videos of a ledger.

    Attributes:
        tally: The captions made so far.
        failed: How many videos failed so far.
        stopped: Why it stopped early; None where it did not.
        waited_s: Time in which workers waited for frames, summed over workers; for the first video, no longer than
            its reading took.
    """

    def __init__(
        self,
        ledger: Ledger,
        parts: Parts,
        factory: EngineFactory,
        policy: Policy,
        reporter: Reporter,
        *,
        refused: int = 0,
    ) -> None:
        """`refused`: rows that failed in this start before, because they name no video."""
        self.tally = Tally()
        self.failed = refused
        self.tally.fail(Failure("open", BAD_INPUT, ""), refused)
        self.stopped: str | None = None
        self.waited_s = 0.0
        self._begun = False
        self._ledger = ledger
        self._parts = parts
        self._policy = policy
        self._reporter = reporter
        self._crew = Crew(factory, policy, reporter.child_stderr())
        self._queue = Queue(ledger, policy)
        self._provenance: Provenance | None = None
        self._not_finite = 0
        self._lost_in_a_row = 0
        self._part_started = time.monotonic()

    def load(self, stop: Stop) -> Models | None:
        """Start the workers and return what the first one to be ready loaded; None: stopping was asked for.

        Raises:
            Exception: What kept the models from loading.
        """
        self._crew.start()
        while not self._crew.models:
            if stop.reason is not None:
                self.stopped = stop.reason
                return None
            wait(self._crew.waitables(), _LOOK_EVERY_S)
            for worker, message in self._crew.hear():
                self._on_message(worker, message)
        return self._crew.models

    def run(self, stop: Stop, provenance: Provenance) -> None:
        """Caption what is pending. What was made stands in finished parts when this returns."""
        self._provenance = provenance
        assert self._crew.models is not None
        with DecodingPool(self._policy.decode_workers, self._policy.limits) as pool:
            self._queue.begin(pool, self._crew.models.frame_multiple)
            while self._goes_on(stop):
                self._queue.read_ahead()
                for worker in self._crew.idle():
                    self._hand(worker, self._claim_next(worker))
                self._send_ahead()
                if not self._queue and not self._crew.busy():
                    break
                self._wait(pool, stop)
                self._hear()
            self._queue.drop()
            self._let_finish(stop)
        self.close_parts()

    def close(self) -> None:
        """End all processes; a video in hand goes back, which is no crash."""
        for worker in self._crew.busy():
            with suppress(sqlite3.Error):  # where even this fails, the next start sees that it was no crash
                self._ledger.release(self._crew.claim_of(worker))
        self._crew.close()
        self._queue.drop()

    def close_parts(self) -> None:
        """Write all captions and failures that stand in the ledger alone."""
        self._parts.close_part(self._ledger, self._policy.part_rows)
        self._parts.write_failures(self._ledger)
        self._part_started = time.monotonic()

    def _goes_on(self, stop: Stop) -> bool:
        if stop.reason is not None:
            self.stopped = stop.reason
        elif self.too_many_failed():
            self.stopped = _TOO_MANY
        return self.stopped is None

    def too_many_failed(self) -> bool:
        """Say whether as many videos have failed as may fail."""
        most = self._policy.max_failures
        return most is not None and self.failed >= most

    def _wait(self, pool: DecodingPool, stop: Stop) -> None:
        self._reporter.state(self._status(pool))
        limits = (pool.next_deadline_s(), self._crew.overdue_in_s(), self._queue.due_in_s(), stop.due_in_s())
        soonest = min((limit for limit in limits if limit is not None), default=_LOOK_EVERY_S)
        began = time.monotonic()
        wait([*self._crew.waitables(), *pool.descriptors()], min(max(soonest, 0.0), _LOOK_EVERY_S))
        if len(pool):
            self.waited_s += len(self._crew.idle()) * (time.monotonic() - began)

    def _status(self, pool: DecodingPool) -> LiveStatus:
        ready, ready_bytes = self._queue.ready()
        return LiveStatus(
            reading=len(pool),
            ready=ready,
            ready_bytes=ready_bytes,
            generating=len(self._crew.busy()),
            workers=len(self._crew),
            retrying=self._queue.retrying(),
        )

    def _claim_next(self, worker: Worker) -> Taken | None:
        found = self._queue.take(worker)
        if found is not None:
            self._ledger.claim(found.claim)
        return found

    def _hand(self, worker: Worker, claimed: Taken | None) -> None:
        """Give a video that is read and claimed to a worker that waits for one."""
        if claimed is not None:
            accepted = self._crew.give(worker, claimed, self._task(claimed.claim, claimed.video))
            if not self._begun:  # until now the readers were started too, which hides behind nothing
                self._begun = True
                self.waited_s = min(self.waited_s, claimed.video.handle()[1].source.decode_s)
            claimed.video.close()
            if not accepted:
                self._on_death(worker)

    def _send_ahead(self) -> None:
        """Have workers that have something to do prepare the next video meanwhile; it stays unclaimed."""
        for worker in self._crew.busy():
            if not self._crew.may_prepare(worker) or self._queue.has_lent(worker):
                continue
            lent = self._queue.lend(worker)
            if lent is None:
                return
            if not worker.prepare(self._task(*lent), lent[1].handle()[0]):
                self._on_death(worker)

    def _task(self, claim: Claim, video: ReadVideo) -> Task:
        own = claim.item.prompts
        return Task(
            prompts=own or self._policy.prompts,
            own_prompts=own is not None,
            frames=video.handle()[1],
            compare=baseline.sampled(claim.item.id, self._policy.baseline_sample),
            estimate=self._policy.estimate,
            plain_first=baseline.plain_first(claim.item.id),
            time_limit_s=self._policy.timeout_s,
            on_oom=self._policy.on_oom,
        )

    def _hear(self) -> None:
        for claim, failure in self._queue.collect():
            self._on_unread(claim, failure)
        for worker, message in self._crew.hear():
            self._on_message(worker, message)
        for worker in self._crew.overdue():
            reason = f"not done after {self._policy.timeout_s:g} s; give it more --timeout, or fewer frames"
            self._fail(self._crew.claim_of(worker), Failure("generate", "GenerationTimeout", reason))
            self._replace(worker)
        self._close_part_if_due()

    def _on_unread(self, claim: Claim, failure: ReadFailure) -> None:
        if failure.transient and self._queue.try_again(claim):
            return
        self._fail(claim, Failure(failure.stage, failure.error_type, failure.error))

    def _on_message(self, worker: Worker, message: FromWorker | None) -> None:
        match message:
            case None:
                self._on_death(worker)
            case Hello(gpus):
                self._crew.grow(gpus)
            case Ready(models):
                self._crew.welcome(worker, models)
            case Broken():
                self._on_broken(worker, message)
            case Made():
                self._on_made(worker, message)
            case Failed():
                self._on_failed(worker, message)

    def _on_broken(self, worker: Worker, broken: Broken) -> None:
        """One GPU of several that cannot hold the models is no reason to stop; anything else is."""
        if worker.models is not None or len(self._crew) == 1:
            raise broken.error from RemoteError(broken.trace)
        self._crew.remove(worker)
        self._reporter.warn(f"going on without {worker.device or 'the first worker'}: {broken.error}")

    def _on_made(self, worker: Worker, made: Made) -> None:
        """Store the captions and give the worker its next video: one commit for both."""
        assert self._provenance is not None
        claim = self._crew.claim_done(worker)
        rows = [
            caption_row(claim, index, caption, comparison, made, self._provenance)
            for index, (caption, comparison) in enumerate(made.captions)
        ]
        with self._ledger.writing():
            self._ledger.finish(claim, rows, _stamp(made))
            upcoming = self._claim_next(worker)
        self._hand(worker, upcoming)
        self._not_finite = self._lost_in_a_row = 0
        for row in rows:
            self.tally.add(row)
        self._reporter.captioned(claim, rows)

    def _on_failed(self, worker: Worker, failed: Failed) -> None:
        claim = self._crew.claim_done(worker)
        if failed.poisoned:
            self._replace(worker)
        if failed.transient and self._put_back(claim):
            return
        self._fail(claim, failed.failure, failed.trace)
        self._stop_if_never_finite(failed.failure)

    def _on_death(self, worker: Worker) -> None:
        """A worker is gone: the kernel killed it for its memory, or it crashed. The video may be the reason."""
        claim = self._crew.claim_done(worker) if worker.task is not None else None
        how = self._replace(worker)
        if claim is not None and self._put_back(claim):
            return
        if claim is not None:
            reason = f"the process that generated died ({how}); memory may have run out, give fewer frames"
            self._fail(claim, Failure("generate", "WorkerDied", reason))
        else:
            self._reporter.warn(f"a worker process ended by itself ({how}), another one was started")
        self._stop_if_all_is_lost(how)

    def _replace(self, worker: Worker) -> str:
        """Put a fresh worker in the place of one that has to go; say how that one ended. Its next video waits on."""
        self._queue.give_back(worker)
        return self._crew.replace(worker)

    def _stop_if_all_is_lost(self, how: str) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= _LOST_IN_A_ROW:
            raise FatalError(
                f"lost every worker: {self._lost_in_a_row} processes in a row died without a caption (the last: "
                f"{how}); memory may be too small for the models, see specvlm doctor"
            )

    def _put_back(self, claim: Claim) -> bool:
        """Have a claimed video tried again, where that is allowed."""
        if not self._queue.try_again(claim):
            return False
        self._ledger.release(claim)
        return True

    def _fail(self, claim: Claim, failure: Failure, trace: str = "") -> None:
        self._ledger.fail(claim, failure)
        self.failed += 1
        self.tally.fail(failure)
        self._reporter.failed(claim, failure, trace)

    def _stop_if_never_finite(self, failure: Failure) -> None:
        self._not_finite = self._not_finite + 1 if failure.error_type == _NOT_FINITE else 0
        if self._not_finite >= _NOT_FINITE_IN_A_ROW:
            raise FatalError(
                f"{self._not_finite} videos in a row gave NaN or infinite logits: the target does not work as it "
                "is loaded; try another --dtype, or check its weights"
            )

    def _close_part_if_due(self) -> None:
        full = self._ledger.count_without_part() >= self._policy.part_rows
        if full or time.monotonic() - self._part_started >= self._policy.part_s:
            self.close_parts()

    def _let_finish(self, stop: Stop) -> None:
        """Wait for the videos in hand, but not longer than the grace; what is not done then goes back."""
        while self._crew.busy():
            left_s = self._policy.grace_s - stop.asked_s_ago() if stop.reason is not None else _LOOK_EVERY_S
            if left_s <= 0:
                break
            wait(self._crew.waitables(), min(left_s, _LOOK_EVERY_S))
            self._hear()


def _stamp(made: Made) -> FileStamp:
    source = made.captions[0][0].source
    return NO_FILE if source is None else FileStamp(source.size_bytes, source.mtime_ns)


class RemoteError(Exception):
    """Carries a worker's traceback as the cause of what it raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
