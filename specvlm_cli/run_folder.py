"""The run folder: where its files are, its settings, its lock, and the opening of its ledger.

OUT/captions/part-SSSSS-PPPPP.parquet   captions
OUT/failures/part-SSSSS.parquet         videos without one, and why
OUT/.specvlm/run.json                   settings, their hash, shard count
OUT/.specvlm/state-SSSSS.db             the ledger
OUT/.specvlm/state-SSSSS.lock           its kernel lock, with the holder's name inside
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specvlm_cli import lock
from specvlm_cli.durable import publish
from specvlm_cli.exits import FatalError, UsageError
from specvlm_cli.ledger import Ledger, refused
from specvlm_cli.parts import Parts
from specvlm_cli.text import clean

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunFile:
    """What `run.json` says.

    Attributes:
        settings: Everything that can change a caption, as asked for; see `settings.py`.
        config_hash: Hash of the settings.
        resolved: What the models turned out to be once loaded, e.g. the commit of a branch; empty before
            that.
        shards: Number of shards of this run.
        format: Version of this file's layout.
    """

    settings: dict[str, Any]
    config_hash: str
    resolved: dict[str, Any]
    shards: int = 1
    format: int = _FORMAT

    def check(self) -> None:
        """Raise TypeError where a value has another type than declared."""
        kinds = {"settings": dict, "config_hash": str, "resolved": dict, "shards": int, "format": int}
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"its {name} is no {kind.__name__}")


class RunFolder:
    """The files of one shard of a run."""

    def __init__(self, root: Path, shard: int = 0) -> None:
        self.root = root
        self.parts = Parts(root, shard)
        self._state = root / ".specvlm"
        self._run_file = self._state / "run.json"
        self._ledger = self._state / f"state-{shard:05d}.db"
        self._lock = self._state / f"state-{shard:05d}.lock"

    @contextmanager
    def locked(self, run_id: str) -> Iterator[lock.Lock]:
        """Hold the folder, making it where it does not exist.

        Raises:
            UsageError: The folder cannot be made or written.
            BusyError: Another run holds it.
        """
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            holding = lock.take(self._lock, run_id)
        except OSError as error:
            reason = f"{clean(str(self.root))}: cannot be used as the output folder ({error.strerror})"
            raise UsageError(f"{reason}; give another -o folder") from error
        with holding:
            yield holding

    def read(self) -> RunFile | None:
        """Return the run's settings; None where there is no run yet.

        Raises:
            FatalError: `run.json` is there, but not readable.
        """
        try:
            found = json.loads(self._run_file.read_text(encoding="utf-8"))
            known = RunFile(**{name: found[name] for name in RunFile.__dataclass_fields__})
            known.check()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise FatalError(
                f"{clean(str(self._run_file))}: not readable ({error}); delete it, it will be written again"
            ) from error
        if known.format != _FORMAT or known.shards != 1:
            raise UsageError(
                f"{clean(str(self.root))}: written with format {known.format} and {known.shards} shards, "
                f"this specvlm knows format {_FORMAT} with 1 shard; upgrade specvlm or give another -o folder"
            )
        return known

    def write(self, run: RunFile) -> None:
        """Replace `run.json`, all of it or nothing."""
        if self.read() == run:
            return
        temporary = self._run_file.with_name(".run.json")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(run), file, indent=2, sort_keys=True)
        publish(temporary, self._run_file)

    def peek(self) -> Ledger | None:
        """Open the ledger for reading, touching nothing; None: there is none, or it needs repair."""
        return Ledger.peek(self._ledger) if self._ledger.exists() else None

    def preview(self) -> Ledger:
        """Open the ledger for reading, touching nothing; where it is gone, one made of what the parts say."""
        if self._ledger.exists():
            ledger = self.peek()
            if ledger is None:
                raise FatalError(
                    f"{clean(str(self._ledger))}: cannot be read as it is; a start without -n repairs it, or "
                    "says what is wrong"
                )
            return ledger
        ledger = Ledger.in_memory()
        self.parts.rebuild(ledger)
        return ledger

    def damaged(self, error: sqlite3.Error) -> Exception:
        """Return the error to raise where reading the ledger raised this one."""
        return refused(Path(clean(str(self._ledger))), error)

    def open(self) -> Ledger:
        """Open the ledger for writing, rebuilding it from the parts where it is gone. Needs the lock."""
        if not self._ledger.exists():
            self._make_ledger()
        return Ledger.open(self._ledger)

    def _make_ledger(self) -> None:
        """Make the ledger under another name first: a half-built one must never be taken for the truth.

        A journal that outlived its ledger would be rolled back into the new one, so it goes first.
        """
        temporary = self._ledger.with_name(f".{self._ledger.name}")
        for leftover in (temporary, _journal(temporary), _journal(self._ledger)):
            leftover.unlink(missing_ok=True)
        with Ledger.create(temporary) as ledger:
            self.parts.rebuild(ledger)
        publish(temporary, self._ledger)


def _journal(ledger: Path) -> Path:
    return ledger.with_name(f"{ledger.name}-journal")
