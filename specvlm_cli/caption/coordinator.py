"""The work of one start: read ahead, keep the workers' batches full, store what comes; until none is left.

One event loop in one thread. Videos are read by a pool of killable child processes, a bounded number of bytes
ahead; each worker process holds the models and captions many videos at a time, and prepares the next ones meanwhile;
all of them are fed from one queue, so no GPU waits for another. In each turn all that the workers said is stored, and
the next videos are claimed, in one transaction. A video counts as running from the moment it is claimed for a worker.

One bad video never ends the run: whatever goes wrong with it is stored as its failure. Where a worker dies with
several videos, none of them is charged with it: each runs again alone, and one that kills its worker then is to blame.
What goes wrong with the ledger or the output folder does end the run, because then nothing could be kept. It knows no
screen and no settings of models.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from multiprocessing.connection import wait
from typing import Protocol

from specvlm.records import CaptionStats
from specvlm_cli.caption.assigning import Admission, Assigner
from specvlm_cli.caption.engine import EngineFactory, Models
from specvlm_cli.caption.failing import SameFailure
from specvlm_cli.caption.failure import BAD_INPUT, Failure
from specvlm_cli.caption.outcome import Captioning, LiveStatus, Tally
from specvlm_cli.caption.policy import Policy
from specvlm_cli.caption.queue import Queue
from specvlm_cli.exits import FatalError, Flag, UsageError
from specvlm_cli.readers import DecodingPool, ReadFailure
from specvlm_cli.run.ledger import NO_FILE, Claim, FileStamp, Ledger, Row
from specvlm_cli.run.parts import PartFiles
from specvlm_cli.run.rows import BEYOND_CONTEXT, Provenance, caption_row
from specvlm_cli.stopping import Stop
from specvlm_cli.workers.crew import Crew
from specvlm_cli.workers.messages import (
    Broken,
    Failed,
    FromWorker,
    Hello,
    Lost,
    Ready,
    VideoCaptions,
    WorkerReport,
)
from specvlm_cli.workers.worker import Worker

_TOO_MANY = "max-failures"  # why a run stopped, where that was the reason
_LOOK_EVERY_S = 0.5  # at stop requests and limits, where nothing else wakes us
_NOT_FINITE, _NOT_FINITE_IN_A_ROW = "NonFiniteLogitsError", 3
_LOST_IN_A_ROW = (
    3  # deaths while loading, and videos that kill their workers alone, with no caption in between
)


class Reporter(Protocol):
    """Receives events as they happen."""

    def captioned(self, claim: Claim, rows: list[Row]) -> None: ...

    def failed(self, claim: Claim, failure: Failure, trace: str) -> None: ...

    def state(self, status: LiveStatus) -> None: ...

    def child_stderr(self) -> int: ...

    def warn(self, message: str) -> None: ...


class Coordinator:
    """Works through the wanted videos of a ledger.

    Attributes:
        tally: The captions made so far.
        failed: How many videos failed so far.
        stopped: Why it stopped early; None where it did not.
        waited_s: Time in which workers had free slots and nothing to fill them with, summed over workers; before the
            first video, no longer than its reading took.
        captioning: Wall time from loaded models to the last row so far, and what of it was waiting; None: no row yet.
    """

    def __init__(
        self,
        ledger: Ledger,
        parts: PartFiles,
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
        self.captioning: Captioning | None = None
        self._run_began_s = 0.0
        self._begun = False
        self._ledger = ledger
        self._parts = parts
        self._policy = policy
        self._reporter = reporter
        self._crew = Crew(factory, policy, reporter.child_stderr())
        self._queue = Queue(ledger, policy)
        self._readers = ExitStack()
        self._pool: DecodingPool | None = None  # in `_readers`
        self._scheduler = Assigner(self._queue, self._crew, policy)
        self._provenance: Provenance | None = None
        self._not_finite = 0
        self._same_failure = SameFailure()
        self._warned_of_context = False
        self._lost: set[int] = set()  # videos that killed their workers since the last caption
        self._lost_loading = 0
        self._fatal: Exception | None = None  # ends the run once what was heard before is stored
        self._news: list[Callable[[], None]] = []  # reported once it is stored
        self._counted_s: float | None = None  # until when waiting was counted
        self._part_started = time.monotonic()

    def load(self, stop: Stop) -> Models | None:
        """Start all processes and return what the first worker to be ready loaded; None: stopping was asked for.

        Raises:
            Exception: What kept the models from loading.
        """
        self._crew.start()
        self._pool = self._readers.enter_context(
            DecodingPool(self._policy.decode_workers, self._policy.limits)
        )
        while not self._crew.models:
            if stop.reason is not None:
                self.stopped = stop.reason
                return None
            wait(self._crew.waitables(), _LOOK_EVERY_S)
            for worker, message in self._crew.hear():
                self._on_message(worker, message)
            self._raise_fatal()
        return self._crew.models

    def run(self, stop: Stop, provenance: Provenance) -> None:
        """Caption what is pending. All captions are in finished parts when this returns."""
        self._provenance, self._run_began_s = provenance, time.monotonic()
        assert self._crew.models is not None
        assert self._pool is not None
        self._queue.begin(self._pool, self._crew.models.frame_multiple)
        while self._goes_on(stop):
            self._scheduler.size_queue()
            self._queue.read_ahead()
            self._turn(stop)
            if not self._queue and not self._crew.in_flight():
                break
            self._wait(self._pool, stop)
        self._queue.drop()
        self._let_finish(stop)
        self._readers.close()
        self.close_parts()

    def close(self) -> None:
        """End all processes; videos in flight go back, which is no crash."""
        claims = [claim for worker in self._crew for claim in worker.claims]
        with suppress(sqlite3.Error):  # where even this fails, the next start sees that it was no crash
            self._release(claims)
        self._crew.close()
        self._queue.drop()
        self._readers.close()

    def _release(self, claims: Sequence[Claim]) -> None:
        if claims:
            with self._ledger.writing():
                for claim in claims:
                    self._ledger.release(claim)

    def close_parts(self) -> None:
        """Write all captions and failures that are in the ledger alone."""
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
        wait([*self._crew.waitables(), *pool.descriptors()], min(max(soonest, 0.0), _LOOK_EVERY_S))
        self._count_waiting()

    def _count_waiting(self) -> None:
        """Count the time since the last call for each worker that has free slots, though more is to come."""
        now_s = time.monotonic()
        since_s, self._counted_s = self._counted_s, now_s
        if since_s is None:
            return
        more = bool(self._queue)
        for worker in self._crew.ready():
            apart = worker.decodes is not None or (worker.group is not None and not worker.group.unread)
            if (
                not apart
                and worker.running < worker.batch_size
                and (more or worker.running < worker.sequences)
            ):
                self.waited_s += now_s - since_s

    def _status(self, pool: DecodingPool) -> LiveStatus:
        ready, ready_bytes = self._queue.ready()
        return LiveStatus(
            reading=len(pool),
            ready=ready,
            ready_bytes=ready_bytes,
            generating=self._crew.in_flight(),
            workers=len(self._crew),
            retrying=self._queue.retrying(),
        )

    def _turn(self, stop: Stop | None = None) -> None:
        """Store what has come and claim what is next, in one transaction; then tell. No stop: claim nothing."""
        unread = list(self._queue.collect())
        heard = [*((worker, None) for worker in self._scheduler.lost), *self._crew.hear()]
        self._scheduler.lost.clear()
        overdue = self._crew.overdue()
        admissions: list[Admission] = []
        writes = unread or overdue or any(map(_has_outcome, heard))
        with self._ledger.writing() if writes else nullcontext():
            for claim, failure in unread:
                self._on_unread(claim, failure)
            for worker, message in heard:
                self._on_message(worker, message)
            for worker in overdue:
                self._on_overdue(worker)
            if stop is not None and self._goes_on(stop) and self._fatal is None:
                admissions = self._claimed()
        for admission in admissions:
            self._begin(admission)
        for tell in self._news:
            tell()
        self._news.clear()
        self._raise_fatal()
        self._close_part_if_due()

    def _claimed(self) -> list[Admission]:
        """Claim what the scheduler admits, all of it at once."""
        admissions = self._scheduler.admit()
        if admissions:
            with self._ledger.writing():
                for claim in (claim for one in admissions for claim in one.claims):
                    self._ledger.claim(claim)
        return admissions

    def _begin(self, admission: Admission) -> None:
        """Have a worker decode what was claimed for it."""
        if not self._begun:  # until now the readers were started too, which hides behind nothing
            self._begun = True
            self.waited_s = min(self.waited_s, self._queue.first_read_s or 0.0)
        if not admission.worker.give(admission.message):
            self._scheduler.lost.append(admission.worker)

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _on_unread(self, claim: Claim, failure: ReadFailure) -> None:
        if failure.transient and self._queue.try_again(claim):
            return
        self._fail(claim, Failure(failure.stage, failure.error_type, failure.error))

    def _on_message(self, worker: Worker, message: FromWorker | None) -> None:
        if worker not in self._crew:  # it was replaced for what it said before
            return
        match message:
            case None:
                self._on_death(worker)
            case Hello(gpus):
                self._on_hello(gpus)
            case Ready(models):
                self._welcome(worker, models)
            case Broken():
                self._on_broken(worker, message)
            case WorkerReport():
                for ended in message.ended:
                    self._on_ended(worker, ended)
            case Lost():
                self._on_lost(worker, message)

    def _on_hello(self, gpus: int) -> None:
        """Start workers for further GPUs; end the run where GPUs were asked for that are not there."""
        last = max((int(name.removeprefix("cuda:")) for name in self._policy.devices if name), default=-1)
        if last >= gpus:
            there = "no GPU; leave it out" if not gpus else f"{gpus}, counted from 0; name those, or all"
            self._fatal = UsageError(
                Flag("gpus"), f": number {last} is asked for, and this machine has {there}"
            )
        self._crew.grow(gpus)

    def _welcome(self, worker: Worker, models: Models) -> None:
        try:
            self._crew.welcome(worker, models)
        except FatalError as error:
            self._fatal = error

    def _on_broken(self, worker: Worker, broken: Broken) -> None:
        """One GPU of several that cannot hold the models is no reason to stop; anything else is."""
        if worker.models is not None or len(self._crew) == 1 or self._policy.cpu_workers > 1:
            broken.error.__cause__ = RemoteError(broken.trace)
            self._fatal = broken.error
            self._release(worker.claims)
            self._crew.remove(worker)
            return
        self._crew.remove(worker)
        if self._fatal is None:
            self._reporter.warn(f"going on without {worker.device or 'the first worker'}: {broken.error}")

    def _on_ended(self, worker: Worker, ended: VideoCaptions | Failed) -> None:
        claim = worker.drop(ended.key)
        if isinstance(ended, VideoCaptions):
            self._on_made(claim, ended)
        else:
            self._fail(claim, ended.failure, ended.trace)
            self._stop_if_never_finite(ended.failure)

    def _on_made(self, claim: Claim, made: VideoCaptions) -> None:
        assert self._provenance is not None
        prompts = self._policy.prompts_of(claim)
        rows = [
            caption_row(claim, index, prompts[index], caption, comparison, made, self._provenance)
            for index, (caption, comparison) in zip(self._policy.asked(claim), made.captions, strict=True)
        ]
        self._ledger.finish(claim, rows, _stamp(made))
        self._note_row()
        self._queue.settle(claim)
        self._not_finite = self._lost_loading = 0
        self._lost.clear()
        longest = max(
            (caption.stats for caption, _ in made.captions),
            key=lambda one: one.prompt_tokens + one.completion_tokens,
        )
        self._news.append(partial(self._tell_captioned, claim, rows, longest, made.as_alone is False))

    def _tell_captioned(self, claim: Claim, rows: list[Row], stats: CaptionStats, differs: bool) -> None:
        for number, row in enumerate(rows):
            self.tally.add(row, first=number == 0)
        self._reporter.captioned(claim, rows)
        if differs:
            self._reporter.warn(
                f"{rows[0]['path']}: its caption in a batch is not the one that it has alone; captions of this run "
                "may differ from those of single videos: please report it, and use --batch-size 1"
            )
        self._warn_of_context(rows, stats)

    def _warn_of_context(self, rows: list[Row], stats: CaptionStats) -> None:
        """Warn of the first row with more tokens than the target was made for; all of them have a flag."""
        if self._warned_of_context or not stats.beyond_context:
            return
        self._warned_of_context = True
        self._reporter.warn(
            f"{rows[0]['path']}: {stats.prompt_tokens + stats.completion_tokens} tokens, and the target was made for "
            f"{stats.context_tokens}; its caption may be poor. Read fewer or smaller frames (--max-frames, "
            f"--num-frames, --max-pixels). Rows like this have {BEYOND_CONTEXT} in flags"
        )

    def _note_row(self) -> None:
        """Take note of how long this start has captioned up to the row that is being stored."""
        seconds, workers = time.monotonic() - self._run_began_s, len(self._crew)
        self.captioning = Captioning(seconds, workers, self.waited_s)
        self._ledger.note_captioning(seconds, workers, self.waited_s)

    def _on_overdue(self, worker: Worker) -> None:
        """Kill a worker that does not answer; the video is to blame where there is only one."""
        if worker not in self._crew:  # it died meanwhile
            return
        reason = f"not done after {self._policy.timeout_s:g} s; give it more --timeout, or fewer frames"
        failure = Failure("generate", "GenerationTimeout", reason)
        culprit = self._only_one(worker)
        self._recover(worker, culprit, self._crew.replace(worker, hangs=True))
        if culprit is not None:
            self._fail(culprit, failure)

    def _on_lost(self, worker: Worker, lost: Lost) -> None:
        """Something concerned all videos that a worker had running; where that was one, it is to blame."""
        running = [claim for claim in worker.claims if claim.ordinal in lost.keys]
        for claim in [claim for claim in worker.claims if claim.ordinal not in lost.keys]:
            self._ledger.release(worker.drop(claim.ordinal))
            self._queue.put_back(claim)
        for claim in self._had_ahead(worker):
            self._queue.put_back(claim)
        culprit = running[0] if len(running) == 1 else None
        self._crew.replace(worker)
        self._recover(worker, culprit, lost.failure.error)
        if culprit is None or (lost.transient and self._put_back(culprit)):
            return
        self._fail(culprit, lost.failure, lost.trace)
        self._stop_if_never_finite(lost.failure)

    def _on_death(self, worker: Worker) -> None:
        """A worker is gone: the kernel killed it for its memory, or it crashed. One of its videos may be the reason."""
        culprit = self._only_one(worker)
        had_any = bool(worker.claims or self._queue.lent(worker) or (worker.group and worker.group.claims))
        how = self._crew.replace(worker)
        self._recover(worker, culprit, how)
        if culprit is not None:
            self._lost.add(culprit.ordinal)
            if not self._put_back(culprit):
                reason = (
                    f"the process that generated died ({how}); memory may have run out, give fewer frames"
                )
                self._fail(culprit, Failure("generate", "WorkerDied", reason))
        elif not had_any:
            self._lost_loading += 1
            self._reporter.warn(f"a worker process ended by itself ({how}), another one was started")
        self._stop_if_all_is_lost(how)

    def _only_one(self, worker: Worker) -> Claim | None:
        """Return the one video that a worker can have died of; None: there are several, or none."""
        if len(worker.claims) != 1:
            return None
        alone = worker.decodes is not None and worker.decodes.alone
        others = self._queue.lent(worker) or worker.withdrew or (worker.group and worker.group.claims)
        return worker.claims[0] if alone or not others else None

    def _had_ahead(self, worker: Worker) -> list[Claim]:
        """Return what a worker prepared ahead, and take it away."""
        group, worker.group = worker.group, None
        return self._queue.recall(worker) + ([] if group is None else self._queue.lose(group))

    def _recover(self, worker: Worker, culprit: Claim | None, how: str) -> None:
        """Have everything that a lost worker had tried again; several are suspects."""
        suspects = [claim for claim in worker.claims if claim is not culprit]
        for claim in worker.claims:
            worker.drop(claim.ordinal)
            if claim is culprit:
                self._queue.suspect(claim)
            else:
                self._ledger.release(claim)
        suspects += self._had_ahead(worker)
        for claim in sorted(suspects, key=lambda claim: claim.ordinal):
            self._queue.suspect(claim)
            self._queue.put_back(claim)
        if suspects:
            self._reporter.warn(
                f"lost a worker with {len(suspects)} videos ({how}); each is tried again alone, to find the reason"
            )

    def _stop_if_all_is_lost(self, how: str) -> None:
        lost = self._lost_loading + len(self._lost)
        if lost >= _LOST_IN_A_ROW and self._fatal is None:
            self._fatal = FatalError(
                f"lost every worker: {lost} processes in a row died without a caption (the last: "
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
        self._queue.settle(claim)
        self.failed += 1
        self.tally.fail(failure)
        self._news.append(lambda: self._reporter.failed(claim, failure, trace))
        if self.captioning is None:
            self._stop_if_all_fail(claim, failure)

    def _stop_if_all_fail(self, claim: Claim, failure: Failure) -> None:
        if blameless := self._same_failure.add(claim, failure):
            self._reopen(blameless)
            self._fatal = self._fatal or SameFailure.fatal(failure)

    def _reopen(self, claims: Sequence[Claim]) -> None:
        """Make videos pending again whose failure is the model's."""
        self._ledger.reopen_failed(claims)
        self._news.append(lambda: self._parts.write_failures(self._ledger))

    def _stop_if_never_finite(self, failure: Failure) -> None:
        self._not_finite = self._not_finite + 1 if failure.error_type == _NOT_FINITE else 0
        if self._not_finite >= _NOT_FINITE_IN_A_ROW and self._fatal is None:
            if self.captioning is None:
                self._reopen(self._same_failure.claims)
            self._fatal = FatalError(
                f"{self._not_finite} videos in a row gave NaN or infinite logits: the target does not work as it "
                "is loaded; try another --dtype, or check its weights"
            )

    def _close_part_if_due(self) -> None:
        full = self._ledger.count_without_part() >= self._policy.part_rows
        if full or time.monotonic() - self._part_started >= self._policy.part_s:
            self.close_parts()

    def _let_finish(self, stop: Stop) -> None:
        """Wait for the videos in flight, but not longer than the grace; what is not done then goes back."""
        while self._crew.in_flight():
            left_s = self._policy.grace_s - stop.asked_s_ago() if stop.reason is not None else _LOOK_EVERY_S
            if left_s <= 0:
                break
            wait(self._crew.waitables(), min(left_s, _LOOK_EVERY_S))
            self._turn()


def _has_outcome(heard: tuple[Worker, FromWorker | None]) -> bool:
    """Say whether what a worker said is about outcomes of videos, which belong in the ledger."""
    _, message = heard
    return (
        message is None
        or isinstance(message, Lost)
        or (isinstance(message, WorkerReport) and bool(message.ended))
    )


def _stamp(made: VideoCaptions) -> FileStamp:
    source = made.captions[0][0].source
    return NO_FILE if source is None else FileStamp(source.size_bytes, source.mtime_ns)


class RemoteError(Exception):
    """Carries a worker's traceback as the cause of what it raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
