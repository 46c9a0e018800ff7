"""Which sequences run: waiting, then running, then finished. A state machine over keys and sizes; knows no tensors.

Sequences are admitted in the order in which they came, as long as there are slots and memory for them. Those of
different kinds (decoded plainly or with the draft, say) never run together. After a fault, what was running goes back
to the front of the queue, in a smaller batch or each sequence alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class QueuedSequence:
    """What the scheduler knows of one sequence.

    Attributes:
        key: The caller's name for it.
        kind: Only sequences of one kind run together.
        size_bytes: Memory that it takes while it runs.
        alone: It runs with no other sequence.
    """

    key: Hashable
    kind: Hashable = None
    size_bytes: int = 0
    alone: bool = False


class Scheduler:
    """Decides who runs.

    Attributes:
        batch_size: Most sequences that run at once.
        memory_bytes: Memory for those that run; None: it is not limited. One sequence may always run.
    """

    def __init__(self, batch_size: int, memory_bytes: int | None = None) -> None:
        """Nothing waits."""
        self.batch_size, self.memory_bytes = batch_size, memory_bytes
        self._waiting: deque[QueuedSequence] = deque()
        self._running: dict[Hashable, QueuedSequence] = {}

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """Those that wait, in order."""
        return tuple(entry.key for entry in self._waiting)

    @property
    def running(self) -> tuple[Hashable, ...]:
        """Those that run, in the order in which they were admitted."""
        return tuple(self._running)

    @property
    def kind(self) -> Hashable:
        """Of those that run, or of the next one."""
        entry = next(iter(self._running.values()), None) or next(iter(self._waiting), None)
        return None if entry is None else entry.kind

    def __len__(self) -> int:
        """Sequences that wait or run."""
        return len(self._waiting) + len(self._running)

    def add(self, entry: QueuedSequence) -> None:
        """A sequence waits from now on."""
        self._waiting.append(entry)

    def admit(self) -> list[Hashable]:
        """Have waiting sequences run as far as there is room; -> their keys, in order."""
        admitted: list[Hashable] = []
        while self._waiting and self._has_room(self._waiting[0]):
            entry = self._waiting.popleft()
            self._running[entry.key] = entry
            admitted.append(entry.key)
        return admitted

    def _has_room(self, entry: QueuedSequence) -> bool:
        if not self._running:
            return True
        others = self._running.values()
        if entry.alone or any(other.alone or other.kind != entry.kind for other in others):
            return False
        if len(self._running) >= self.batch_size:
            return False
        taken = sum(other.size_bytes for other in others)
        return self.memory_bytes is None or taken + entry.size_bytes <= self.memory_bytes

    def remove(self, key: Hashable) -> None:
        """A sequence is finished, or no longer wanted."""
        if self._running.pop(key, None) is None:
            self._waiting = deque(entry for entry in self._waiting if entry.key != key)

    def preempt(self, *, batch_size: int | None = None, alone: bool = False) -> list[Hashable]:
        """What runs goes back to the front of the queue, in its order; -> its keys.

        `batch_size`: of what runs from now on, where it is smaller. `alone`: each of them runs alone next time.
        """
        if batch_size is not None:
            self.batch_size = max(1, min(self.batch_size, batch_size))
        gone = list(self._running.values())
        self._waiting.extendleft(replace(entry, alone=entry.alone or alone) for entry in reversed(gone))
        self._running.clear()
        return [entry.key for entry in gone]
