"""The worker processes of one start. Knows no ledger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specvlm_cli.caption.engine import EngineFactory, Models
from specvlm_cli.caption.policy import Policy
from specvlm_cli.exits import FatalError
from specvlm_cli.workers.messages import FromWorker
from specvlm_cli.workers.worker import Worker


class Crew:
    """The worker processes.

    Attributes:
        models: What the first worker that was ready has loaded; None before that.
    """

    def __init__(self, factory: EngineFactory, policy: Policy, stderr: int) -> None:
        self.models: Models | None = None
        self._factory = factory
        self._policy = policy
        self._stderr = stderr
        self._workers: list[Worker] = []
        self._grown = False

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def start(self) -> None:
        """Start the workers that are known to be needed."""
        first, *others = self._policy.devices
        for device in (*[first] * self._policy.cpu_workers, *others):
            self._workers.append(self._new(device))

    def grow(self, gpus: int) -> None:
        """Start one worker for each further GPU, where all are to be used."""
        if self._policy.all_gpus and not self._grown:
            self._grown = True
            for number in range(1, gpus):
                self._workers.append(self._new(f"cuda:{number}"))

    def _new(self, device: str | None) -> Worker:
        return Worker(self._factory, device, self._policy, self._stderr)

    def welcome(self, worker: Worker, models: Models) -> None:
        """Take in a worker that has loaded its models.

        Raises:
            FatalError: They are not those of the others.
        """
        if self.models is None:
            self.models = models
        elif (self.models.target_revision, self.models.resolved) != (models.target_revision, models.resolved):
            which = worker.device or "another worker"
            raise FatalError(
                f"{which} loaded another version of the target than the first worker; its files changed meanwhile, "
                "start again"
            )

    def waitables(self) -> list[Any]:
        """Return what becomes readable when a worker says something or dies."""
        return [worker.connection for worker in self._workers]

    def hear(self) -> Iterator[tuple[Worker, FromWorker | None]]:
        """Yield what workers have to say, all of it; None: that one is dead."""
        for worker in list(self._workers):
            while not worker.connection.closed and worker.connection.poll():
                message = worker.hear()
                yield worker, message
                if message is None:
                    break

    def ready(self) -> list[Worker]:
        """Return the workers that have loaded their models."""
        return [worker for worker in self._workers if worker.models is not None]

    def in_flight(self) -> int:
        """Return how many videos are in flight."""
        return sum(len(worker.claims) for worker in self._workers)

    def overdue_in_s(self) -> float | None:
        """Return in how many seconds a worker will have to be killed; None: never."""
        return min(
            (left for worker in self._workers if (left := worker.overdue_in_s()) is not None), default=None
        )

    def overdue(self) -> list[Worker]:
        """Return the workers that do not answer though their time is over."""
        return [
            worker for worker in self._workers if (left := worker.overdue_in_s()) is not None and left <= 0
        ]

    def replace(self, worker: Worker, *, hangs: bool = False) -> str:
        """Put a fresh worker in the place of one that is dead or has to go; say how that one ended."""
        if hangs:
            worker.kill()
        how = "killed" if hangs else worker.bury()
        self._workers[self._workers.index(worker)] = self._new(worker.device)
        return how

    def remove(self, worker: Worker) -> None:
        """Continue without a worker that is of no use."""
        worker.kill()
        self._workers.remove(worker)

    def close(self) -> None:
        """End all workers: those at work at once, the others by hanging up."""
        for worker in self._workers:
            if worker.claims or worker.models is None:
                worker.kill()
            else:
                worker.bury()
        self._workers.clear()
