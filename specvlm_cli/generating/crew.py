"""The worker processes of one start, and who works on what. Knows no ledger."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from specvlm_cli.engine import EngineFactory, Models
from specvlm_cli.exits import FatalError
from specvlm_cli.generating.messages import FromWorker, Task
from specvlm_cli.generating.worker import Worker
from specvlm_cli.ledger import Claim
from specvlm_cli.policy import Policy
from specvlm_cli.read_ahead import Taken


class Crew:
    """The worker processes, and who works on what.

    Attributes:
        models: What the first worker that was ready has loaded; None before that.
    """

    def __init__(self, factory: EngineFactory, policy: Policy, stderr: int) -> None:
        self.models: Models | None = None
        self._factory = factory
        self._policy = policy
        self._stderr = stderr
        self._workers: list[Worker] = []
        self._claims: dict[Worker, Claim] = {}
        self._grown = False

    def __len__(self) -> int:
        return len(self._workers)

    def start(self) -> None:
        """Start the workers that are known to be needed."""
        for device in self._policy.devices:
            self._workers.append(self._new(device))

    def grow(self, gpus: int) -> None:
        """Start one worker for each further GPU, where all are to be used."""
        if self._policy.all_gpus and not self._grown:
            self._grown = True
            for number in range(1, gpus):
                self._workers.append(self._new(f"cuda:{number}"))

    def _new(self, device: str | None) -> Worker:
        return Worker(self._factory, device, self._stderr)

    def welcome(self, worker: Worker, models: Models) -> None:
        """Take in a worker that has loaded its models.

        Raises:
            FatalError: They are not those of the others.
        """
        if self.models is None:
            self.models = models
        elif (self.models.target_revision, self.models.resolved) != (models.target_revision, models.resolved):
            raise FatalError(
                f"{worker.device} loaded another version of the target than the first worker; its files changed "
                "meanwhile, start again"
            )

    def waitables(self) -> list[Any]:
        """Return what becomes readable when a worker says something or dies."""
        return [worker.connection for worker in self._workers]

    def hear(self) -> Iterator[tuple[Worker, FromWorker | None]]:
        """Yield what workers have to say; None: that one is dead."""
        for worker in list(self._workers):
            if worker.connection.closed or not worker.connection.poll():
                continue
            yield worker, worker.hear()

    def idle(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.is_idle()]

    def busy(self) -> list[Worker]:
        return list(self._claims)

    def may_prepare(self, worker: Worker) -> bool:
        """Say whether a worker may prepare a video besides the one that it works on.

        Not besides one that is tried again, nor where no further try is allowed: if the worker dies, it must be
        plain which of the two is to blame before one of them has failed.
        """
        claim = self._claims.get(worker)
        if claim is None or worker.models is None:
            return False
        return self._policy.retries > 0 and claim.attempts == 1 and _is_worth_it(worker.models)

    def give(self, worker: Worker, taken: Taken, task: Task) -> bool:
        """Have a worker caption a video; False: it does not take it."""
        self._claims[worker] = taken.claim
        return worker.give(task, None if taken.prepared else taken.video.handle()[0])

    def claim_of(self, worker: Worker) -> Claim:
        """Return what a worker works on."""
        return self._claims[worker]

    def claim_done(self, worker: Worker) -> Claim:
        """Return what a worker worked on, and forget it."""
        return self._claims.pop(worker)

    def overdue_in_s(self) -> float | None:
        """Return in how many seconds a worker will have to be killed; None: never."""
        return min(
            (left for worker in self._claims if (left := worker.overdue_in_s()) is not None), default=None
        )

    def overdue(self) -> list[Worker]:
        """Return the workers that do not answer though their time is over."""
        return [worker for worker in self.busy() if (left := worker.overdue_in_s()) is not None and left <= 0]

    def replace(self, worker: Worker) -> str:
        """Put a fresh worker in the place of one that is dead or has to go; say how that one ended."""
        overdue = (left := worker.overdue_in_s()) is not None and left <= 0
        if overdue:
            worker.kill()
        how = "killed" if overdue else worker.bury()
        self._claims.pop(worker, None)
        self._workers[self._workers.index(worker)] = self._new(worker.device)
        return how

    def remove(self, worker: Worker) -> None:
        """Go on without a worker that is of no use."""
        worker.kill()
        self._workers.remove(worker)

    def close(self) -> None:
        """End all workers: those at work at once, the others by hanging up."""
        for worker in self._workers:
            if worker in self._claims or worker.models is None:
                worker.kill()
            else:
                worker.bury()
        self._workers.clear()
        self._claims.clear()


def _is_worth_it(models: Models) -> bool:
    """Say whether preparing the next video takes nothing from this one: torch generates with all cores of a CPU.

    Elsewhere than on Linux, a descriptor is only passed to a process that has nothing else to say meanwhile.
    """
    return sys.platform == "linux" and models.device != "cpu"
