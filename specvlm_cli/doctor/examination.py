"""Which checks there are, in which order. Results are reported as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specvlm_cli.doctor import machine, readers, storage
from specvlm_cli.doctor.checks import Check, TimedVerdict, examine
from specvlm_cli.doctor.models import CHECKPOINT_S, DEVICES_S, GENERATION_S, Probe

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Examined:
    """All findings."""

    findings: tuple[TimedVerdict, ...]

    @property
    def ok(self) -> bool:
        """Nothing failed; there may be warnings."""
        return all(finding.status != "fail" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        return {"schema": SCHEMA, "ok": self.ok, "checks": [asdict(finding) for finding in self.findings]}


def examination(
    out: Path,
    preset: str,
    tell: Callable[[TimedVerdict], None],
    *,
    target: str | None = None,
    draft: str | None = None,
) -> Examined:
    """Do all checks, telling each finding as it comes; with a target, its checkpoint is looked at too."""
    found = []
    with ExitStack() as stack:
        for check in _checks(out, stack.enter_context(Probe(preset, target, draft)), target):
            found.append(examine(check))
            tell(found[-1])
    return Examined(tuple(found))


def _checks(out: Path, probe: Probe, target: str | None) -> Iterator[Check]:
    yield Check("python", machine.python)
    yield Check("packages", machine.packages)
    yield Check("processors", machine.processors)
    yield Check("memory", machine.memory)
    yield Check("shared memory", machine.shared_memory)
    yield Check("limits", machine.limits)
    yield Check("job", machine.job)
    yield Check("model hub", storage.hub, 20.0)
    yield Check("model cache", storage.model_cache)
    yield Check("output folder", partial(storage.file_system, out))
    yield Check("writing", partial(storage.writing, out), 30.0)
    yield Check("locks", partial(storage.locking, out), 30.0)
    yield Check("ledger", partial(storage.committing, out), 60.0)
    yield Check("reader pyav", readers.pyav, 60.0)
    yield Check("reader decord", readers.decord, 60.0)
    yield Check("devices", probe.devices, 2 * DEVICES_S)
    if target is not None:
        yield Check("checkpoint", probe.checkpoint, 2 * CHECKPOINT_S)
    yield Check("generation", probe.generation, 2 * GENERATION_S)
