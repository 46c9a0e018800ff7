"""A run folder as a bystander may see it: which shards it has, and where their files are. Touches no file.

Where `run.json` is gone or damaged, the names of files tell the shards; what is wrong with it is kept as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError, UsageError
from specvlm_cli.run.layout import LEDGER_NAME, RunFile, RunFolder
from specvlm_cli.run.ledger_view import LedgerView
from specvlm_cli.run.parts import listed
from specvlm_cli.run.resharding import is_unfinished

_DIVIDING = (
    "its shard count is being changed, or that was cut short; the next start of specvlm caption finishes it"
)
_PART = re.compile(r"part-([0-9]{5})(?:-[0-9]{5,})?\.parquet")


@dataclass(frozen=True, slots=True)
class RunView:
    """A run folder.

    Attributes:
        root: The folder.
        shards: How many shards the run has, by `run.json`, or by the files where that is gone.
        settings: What captions depend on; empty where `run.json` is gone.
        config_hash: Hash of the settings.
        kept: Columns that pass through from a manifest, and their kinds.
        problem: What is wrong with `run.json`, or with the folder as a whole; None: nothing.
        dividing: Its shard count is being changed, or that was cut short; ledgers are not complete.
    """

    root: Path
    shards: int
    settings: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    dividing: bool = False

    @property
    def prompts(self) -> int | None:
        """How many prompts a video has that brings none of its own; None: that is not known."""
        prompt = self.settings.get("prompt")
        return len(prompt) if isinstance(prompt, list) else 1 if isinstance(prompt, str) else None

    def ledger(self, shard: int) -> Path:
        """Return where the ledger of a shard is."""
        return self.root / ".specvlm" / f"state-{shard:05d}.db"

    def lock(self, shard: int) -> Path:
        """Return where the lock of a shard is."""
        return self.root / ".specvlm" / f"state-{shard:05d}.lock"

    def open(self, shard: int) -> LedgerView:
        """Open the ledger of a shard; see `LedgerView.open`."""
        return LedgerView.open(self.ledger(shard), self.kept, self.prompts or 1)

    def files(self, folder: str) -> list[Path]:
        """Return what lies in `captions` or `failures`, by name."""
        return listed(self.root / folder)

    def parts(self, shard: int) -> list[Path]:
        """Return the files in `captions` that have the name of a part of this shard."""
        return [path for path in self.files("captions") if shard_of_part(path.name) == shard]


def shard_of_part(name: str) -> int | None:
    """Return the shard that a file's name says it is a part of; None: it is no part's name."""
    found = _PART.fullmatch(name)
    return int(found.group(1)) if found else None


def view(root: Path) -> RunView:
    """Look at a run folder.

    Raises:
        UsageError: It is none, or one of a newer version.
    """
    names = {path.name for path in listed(root / ".specvlm")}
    ledgers = {int(found.group(1)) for name in names if (found := LEDGER_NAME.fullmatch(name))}
    parts = {shard_of_part(path.name) for path in listed(root / "captions")}
    shards = ledgers | {shard for shard in parts if shard is not None}
    if "run.json" not in names and not shards:
        what = "not a run folder" if root.is_dir() else "no such folder"
        raise UsageError(f"{clean(str(root))}: {what}; give the output folder of specvlm caption")
    known, problem = _settings(root)
    by_files = max(shards, default=0) + 1
    if dividing := is_unfinished(root):
        problem = f"{clean(str(root))}: {_DIVIDING}"
    if known is None:
        return RunView(root, by_files, problem=problem, dividing=dividing)
    count = max(known.shards, by_files)
    return RunView(root, count, known.settings, known.config_hash, known.kept, problem, dividing)


def _settings(root: Path) -> tuple[RunFile | None, str | None]:
    try:
        known = RunFolder(root).read()
    except FatalError as error:
        return None, str(error)
    path = clean(str(root / ".specvlm" / "run.json"))
    return known, None if known else f"{path}: is gone; the next start of specvlm caption writes it again"
