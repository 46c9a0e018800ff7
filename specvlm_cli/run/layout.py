"""The run folder: where its files are, its settings, its locks, and the opening of its ledgers.

OUT/captions/part-SSSSS-PPPPP.parquet   captions
OUT/failures/part-SSSSS.parquet         videos without one, and why
OUT/.specvlm/run.json                   settings, their hash, shard count
OUT/.specvlm/run.lock                   held by every start together, by a change of the shard count alone
OUT/.specvlm/state-SSSSS.db             the ledger of one shard
OUT/.specvlm/state-SSSSS.lock           its kernel lock, with the holder's name inside
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from os.path import lexists
from pathlib import Path
from typing import Any

from specvlm.durable import publish
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError, UsageError
from specvlm_cli.run import lock
from specvlm_cli.run.ledger import Ledger, refused
from specvlm_cli.run.parts import (
    CAPTIONS,
    FAILURES,
    KEPT_KINDS,
    PartFiles,
    ids_in_parts,
    kept_in_parts,
    listed,
)
from specvlm_cli.run.shard import MOST_SHARDS, Shard, shard_of
from specvlm_cli.safe_files import new_file, read_whole, require_folder

LEDGER_NAME = re.compile(r"state-([0-9]{5})\.db")
_FORMAT = 1
_MOST_DEPTH = 20
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what was asked for is not to blame


@dataclass(frozen=True, slots=True)
class RunFile:
    """What `run.json` says.

    Attributes:
        settings: Everything that can change a caption, as asked for; see `settings.py`.
        config_hash: Hash of the settings.
        resolved: What the models turned out to be once loaded, e.g. the commit of a branch; empty before
            that.
        shards: Number of shards of this run.
        kept: Columns that pass through from a manifest, and their kinds.
        format: Version of this file's layout.
    """

    settings: dict[str, Any]
    config_hash: str
    resolved: dict[str, Any]
    shards: int = 1
    kept: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RunFile:
        """Return what was read; TypeError, KeyError or ValueError where it is no such thing."""
        kinds = {"settings": dict, "config_hash": str, "resolved": dict, "shards": int, "format": int}
        if _is_deeper(found, _MOST_DEPTH):
            raise ValueError(f"nested more than {_MOST_DEPTH} deep")
        known = {name: found[name] for name in kinds} | {"kept": found.get("kept", {})}
        for name, kind in (kinds | {"kept": dict}).items():
            if type(known[name]) is not kind:
                raise TypeError(f"its {name} is no {kind.__name__}")
        if not 1 <= known["shards"] <= MOST_SHARDS:
            raise ValueError(f"its shards are {str(known['shards'])[:20]}, not 1 to {MOST_SHARDS}")
        if unknown := [name for name, kind in known["kept"].items() if str(kind) not in KEPT_KINDS]:
            raise ValueError(
                f"its kept column {unknown[0][:60]!r} has none of the kinds {', '.join(KEPT_KINDS)}"
            )
        return cls(**known)


class RunFolder:
    """The files of one shard of a run."""

    def __init__(self, root: Path, shard: Shard = Shard()) -> None:  # noqa: B008  frozen
        self.root = root
        self.shard = shard
        self.parts = PartFiles(root, shard.index)
        self._state = root / ".specvlm"
        self._run_file = self._state / "run.json"
        self._ledger = self.ledger_path(shard.index)

    def ledger_path(self, shard: int) -> Path:
        """Return where the ledger of a shard is."""
        return self._state / f"state-{shard:05d}.db"

    @contextmanager
    def locked(self, run_id: str) -> Iterator[lock.Lock]:
        """Hold this shard of the folder, making the folder where it does not exist.

        Raises:
            UsageError: The folder cannot be made or written.
            FatalError: Its disk is full or does not work.
            BusyError: Another run holds it.
        """
        with ExitStack() as held:
            try:
                self._require_own_folders()
                self._state.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock.share(self._state / "run.lock"))
                ours = held.enter_context(lock.take(self._ledger.with_suffix(".lock"), run_id))
            except OSError as error:
                reason = f"{clean(str(self.root))}: cannot be used as the output folder ({error.strerror})"
                if error.errno in _OF_THE_DISK:
                    raise FatalError(f"{reason}; start again once this is fixed") from error
                raise UsageError(f"{reason}; give another -o folder") from error
            yield ours

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the whole folder, all shards of it.

        Raises:
            BusyError: A run holds a part of it.
        """
        self._require_own_folders()
        with lock.share(self._state / "run.lock", alone=True):
            yield

    def _require_own_folders(self) -> None:
        """Refuse folders of the run that are links: files outside of the run folder would be written or removed.

        Raises:
            FatalError: One is.
        """
        for folder in (self._state, self.root / CAPTIONS, self.root / FAILURES):
            require_folder(folder)

    def read(self) -> RunFile | None:
        """Return the run's settings; None where there is no run yet.

        Raises:
            FatalError: `run.json` is there, but not readable.
        """
        try:
            require_folder(self._state)
            known = RunFile.from_json(json.loads(read_whole(self._run_file)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FatalError(
                f"{clean(str(self._run_file))}: not readable ({error}); delete it, it will be written again"
            ) from error
        if known.format != _FORMAT:
            raise UsageError(
                f"{clean(str(self.root))}: written with format {known.format}, this specvlm knows format "
                f"{_FORMAT}; upgrade specvlm or give another -o folder"
            )
        return known

    def recall(self) -> RunFile | None:
        """Return what ledgers and parts tell of a run whose `run.json` is gone; None where there are none.

        Raises:
            UsageError: They are not those of as many shards as this start has.
        """
        in_ledgers = [(shard, ledger.some_ids()) for shard, ledger in self._peeked()]
        seen = [found for found in (*in_ledgers, *ids_in_parts(self.root)) if found[1]]
        count = self.shard.count
        for shard, ids in seen:
            if shard >= count or any(shard_of(identity, count) != shard for identity in ids):
                raise UsageError(
                    f"{clean(str(self.root))}: its run.json is gone, and what is there is not of {count} shards; "
                    "give --shard I/N with the number that the run had"
                )
        return RunFile({}, "", {}, count, kept_in_parts(self.root)) if seen else None

    def _peeked(self) -> Iterator[tuple[int, Ledger]]:
        """Yield (shard, its ledger) where that can be read as it is; each is open until the next."""
        for path in listed(self._state):
            found = LEDGER_NAME.fullmatch(path.name)
            if found and (ledger := Ledger.peek(path)) is not None:
                with ledger:
                    yield int(found.group(1)), ledger

    def write(self, run: RunFile) -> None:
        """Replace `run.json`, all of it or nothing."""
        if self.read() == run:
            return
        temporary = self._run_file.with_name(f".run-{self.shard.index:05d}.json")
        with new_file(temporary) as file:
            file.write(json.dumps(asdict(run), indent=2).encode())
        publish(temporary, self._run_file)

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Hold the right to compare and write `run.json`, for a moment, among the shards that start together."""
        with lock.share(self._state / "run.json.lock", alone=True, patient=True):
            yield

    def other_ledgers(self) -> Iterator[Ledger]:
        """Yield the ledgers of the other shards that can be read as they are, each open until the next."""
        return (ledger for shard, ledger in self._peeked() if shard != self.shard.index)

    def peek(self) -> Ledger | None:
        """Open the ledger for reading, touching nothing; None: there is none, or it needs repair."""
        return Ledger.peek(self._ledger) if lexists(self._ledger) else None

    def preview(self) -> Ledger:
        """Open the ledger for reading, touching nothing; where it is gone, one made of what the parts say."""
        if lexists(self._ledger):
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

    def damaged(self, error: Exception) -> Exception:
        """Return the error to raise where reading the ledger raised this one."""
        return refused(self._ledger, error)

    def open(self) -> Ledger:
        """Open the ledger for writing, rebuilding it from the parts where it is gone. Needs the lock."""
        if not lexists(self._ledger):
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


def _is_deeper(value: Any, depth: int) -> bool:
    """Say whether JSON is nested more than `depth` levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(depth == 0 or _is_deeper(one, depth - 1) for one in inner)


def _journal(ledger: Path) -> Path:
    return ledger.with_name(f"{ledger.name}-journal")
