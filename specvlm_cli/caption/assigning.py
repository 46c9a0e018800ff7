"""Which worker decodes which video: pass it on to be prepared, admit it while there are slots, keep groups apart.

A video that is read is lent to a worker, which prepares it; it is admitted, and claimed in the ledger, when the worker
has a slot for it, or nearly so. For a group, a sampled set or a suspect alone, a worker first finishes what it has in
flight. It knows no ledger: what it admits is to be claimed before the workers hear of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from specvlm_cli.caption.policy import Policy
from specvlm_cli.caption.queue import Queue, Read, VideoGroup
from specvlm_cli.run.ledger import Claim
from specvlm_cli.workers.crew import Crew
from specvlm_cli.workers.messages import Admit, Compare, Task, Withdraw
from specvlm_cli.workers.worker import Worker

_AHEAD = (
    4  # a quarter of a batch is claimed ahead of its slots, so that a free one does not wait for the ledger
)
_PREPARED = 2  # half a batch is prepared ahead of that
_PREPARED_BYTES = 4  # but no more than a quarter of the frames that may wait


class Admission(NamedTuple):
    """Videos that a worker decodes from now on, and what it is to hear once they are claimed."""

    worker: Worker
    claims: list[Claim]
    message: Admit | Compare


class Assigner:
    """Decides what the workers do.

    Attributes:
        lost: Workers that did not take what they were given: they are dead, or stopped.
    """

    def __init__(self, queue: Queue, crew: Crew, policy: Policy) -> None:
        self.lost: list[Worker] = []
        self._queue = queue
        self._crew = crew
        self._policy = policy
        self._sets = 0

    def admit(self) -> list[Admission]:
        """Return what is to be decoded from now on; it counts as in flight already."""
        ready = self._crew.ready()
        self._assign(ready)
        admissions = [found for worker in self._emptiest(ready) if (found := self._for(worker)) is not None]
        self._lend_ahead(ready)
        return admissions

    def size_queue(self) -> None:
        """Tell the queue how much the workers hold; to be called before it reads ahead."""
        ready = self._crew.ready()
        self._queue.workers = max(len(ready), 1)
        self._queue.batch_size = max((worker.batch_size for worker in ready), default=1)

    def _emptiest(self, workers: list[Worker]) -> list[Worker]:
        return sorted(workers, key=self._load)

    def _load(self, worker: Worker) -> int:
        """Return the sequences that a worker has in flight or prepares."""
        return worker.sequences + self._lent(worker)

    # Groups

    def _assign(self, ready: list[Worker]) -> None:
        """Find a worker for each group, and send the videos of sets ahead."""
        taken = {id(worker.group) for worker in self._crew}
        for group in [group for group in self._queue.groups if id(group) not in taken]:
            worker = self._alone_for(ready) if group.alone and not group.unread else None
            if not group.alone:
                worker = next((one for one in self._emptiest(ready) if one.group is None), None)
            if worker is not None:
                worker.group = group
        for worker in ready:
            if worker.group is not None and worker.group not in self._queue.groups:  # none could be read
                worker.group = None
            if worker.group is not None and not worker.group.alone and not _is_alone(worker):
                self._send_all(worker, worker.group)

    def _alone_for(self, ready: list[Worker]) -> Worker | None:
        """Return the worker that is to run a suspect next; one that is busy is only taken where no other comes."""
        if self._queue.has_charged and any(worker.claims or worker.group for worker in self._crew):
            return None
        free = [worker for worker in ready if worker.group is None]
        idle = next((one for one in free if not one.claims and not self._queue.lent(one)), None)
        if idle is not None:
            return idle
        comes = len(ready) < len(self._crew) or any(
            _is_alone(one) or (one.group is not None and one.group.alone) for one in ready
        )
        return None if comes else next(iter(self._emptiest(free)), None)

    def _send_all(self, worker: Worker, group: VideoGroup) -> None:
        while group.read:
            self._send(worker, group.read.popleft())

    def _begin(self, worker: Worker, group: VideoGroup) -> Admission:
        """Have a worker decode a group, now that it has nothing else."""
        self._queue.groups.remove(group)
        worker.group, worker.decodes = None, group
        self._send_all(worker, group)
        for claim in group.claims:
            worker.hold(claim)
        keys = tuple(claim.ordinal for claim in group.claims)
        if not self._queue.is_sampled(group.claims[0]):
            return Admission(worker, group.claims, Admit(keys, alone=True))
        self._sets += 1
        return Admission(worker, group.claims, Compare(keys, plain_first=self._sets % 2 == 0))

    # The others

    def _for(self, worker: Worker) -> Admission | None:
        """Return what a worker gets now."""
        if worker.decodes is not None or (self._queue.has_charged and worker.group is None):
            return None
        group = worker.group
        if group is None or group.unread:
            claims = list(self._filled(worker))
        elif not worker.claims and not self._queue.lent(worker):
            return self._begin(worker, group)
        else:
            claims = list(self._drained(worker))
        return Admission(worker, claims, Admit(tuple(claim.ordinal for claim in claims))) if claims else None

    def _filled(self, worker: Worker) -> Iterator[Claim]:
        """Admit videos while there is room, those that the worker prepares first."""
        while True:
            if not self._queue.lent(worker) and not self._lend(worker):
                if not worker.claims:
                    self._withdraw_for()
                return
            if not self._has_room(worker, self._queue.lent(worker)[0]):
                return
            yield self._admitted(worker)

    def _drained(self, worker: Worker) -> Iterator[Claim]:
        """Admit what a worker prepares; nothing else comes before its group."""
        while (lent := self._queue.lent(worker)) and self._has_room(worker, lent[0]):
            yield self._admitted(worker)

    def _has_room(self, worker: Worker, claim: Claim) -> bool:
        most = worker.batch_size + worker.batch_size // _AHEAD
        return not worker.claims or worker.sequences + self._policy.sequences(claim) <= most

    def _admitted(self, worker: Worker) -> Claim:
        claim = self._queue.take(worker)
        worker.hold(claim)
        return claim

    # Lending

    def _lend_ahead(self, ready: list[Worker]) -> None:
        """Have workers prepare what they will need next, so that all have about as much to do."""
        while able := [worker for worker in ready if self._may_lend(worker)]:
            if not self._lend(min(able, key=self._load)):
                return

    def _may_lend(self, worker: Worker) -> bool:
        """Say whether a worker is to prepare one more; not next to a suspect, nor before a group."""
        if self._queue.has_charged or _is_alone(worker):
            return False
        if worker.group is not None and not worker.group.unread:
            return False
        few = self._lent(worker) < max(1, worker.batch_size // _PREPARED)
        return few and self._queue.lent_bytes(worker) < self._policy.ahead_bytes // _PREPARED_BYTES

    def _lent(self, worker: Worker) -> int:
        """Return how many sequences a worker prepares ahead."""
        return sum(self._policy.sequences(claim) for claim in self._queue.lent(worker))

    def _lend(self, worker: Worker) -> bool:
        """Have a worker prepare the next video that is read; False: there is none."""
        if not self._queue.has_read():
            return False
        self._send(worker, self._queue.lend(worker))
        return True

    def _send(self, worker: Worker, read: Read) -> None:
        descriptor, frames = read.video.handle()
        prompts = self._policy.prompts_of(read.claim)
        task = Task(
            key=read.claim.ordinal,
            prompts=tuple(prompts[index] for index in self._policy.asked(read.claim)),
            own_prompts=read.claim.item.prompts is not None,
            frames=frames,
        )
        if not worker.prepare(task, descriptor) and worker not in self.lost:
            self.lost.append(worker)
        read.video.close()

    def _withdraw_for(self) -> None:
        """At the end of the input, have a worker without work get what waits for a slot of another."""
        if not self._queue.is_over():
            return
        found = self._queue.withdraw()
        if found is None:
            return
        holder, claim = found
        assert isinstance(holder, Worker)
        holder.withdrew = True
        if not holder.give(Withdraw(claim.ordinal)) and holder not in self.lost:
            self.lost.append(holder)


def _is_alone(worker: Worker) -> bool:
    """Say whether a worker decodes a suspect, next to which nothing is even prepared."""
    return worker.decodes is not None and worker.decodes.alone
