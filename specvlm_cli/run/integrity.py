"""Ledgers and files of a run folder held against each other. Read-only, also while a run writes.

What a live run is about to put right by itself (a file that is renamed but not recorded yet, captions that wait
for their part) is looked at again, and is no finding. It knows files and ledgers, no terminal.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from specvlm_cli.console.safe_text import clean
from specvlm_cli.run.holder import holder_of
from specvlm_cli.run.ledger_view import LedgerProblemError, LedgerView, Page, PartView
from specvlm_cli.run.parts import CAPTIONS, FAILURES, names_part, require_size
from specvlm_cli.run.view import RunView, shard_of_part
from specvlm_cli.safe_files import UnsafeFileError, open_regular

LIVE_CHECK_S = 20.0  # a longer check of a ledger would hold up the run that writes to it
_LOOKS = 4  # at what a live run may be about to put right
_BETWEEN_LOOKS_S = 0.25
_BATCH = 4096
_MOST_NAMED = 5  # videos named one by one

Content = dict[tuple[str, int], str]  # (id, prompt index) -> caption; of a failure (id, 0) -> nothing


@dataclass(frozen=True, slots=True)
class RunProblem:
    """One line of the verdict."""

    text: str
    wrong: bool = True  # false: worth knowing, and in order


def verify(run: RunView) -> Iterator[RunProblem]:
    """Yield what is wrong with a run folder, and what is worth knowing."""
    if run.problem is not None:
        yield RunProblem(run.problem)
    if run.dividing:  # until that is done, ledgers and parts cannot agree
        return
    listed: set[str] = set()
    ids = _Ids() if run.shards > 1 else None
    for shard in range(run.shards):
        yield from _Shard(run, shard).findings(listed, ids)
    yield from _files(run, listed)
    if ids is not None:
        ids.close()


class _Ids:
    """The ids of all shards, in a temporary file of SQLite's own."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, shard INTEGER) WITHOUT ROWID")

    def close(self) -> None:
        self._db.close()

    def add(self, shard: int, page: Page) -> Iterator[RunProblem]:
        """Take in the videos of a page; yield those that another shard has too."""
        self._db.execute("BEGIN")
        for item in page.items:
            sql = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
            if not self._db.execute(sql, (item.id, shard)).rowcount:
                ((other,),) = self._db.execute("SELECT shard FROM seen WHERE id = ?", (item.id,)).fetchall()
                yield RunProblem(f"video {clean(item.id)} is in shard {other} and in shard {shard}")
        self._db.execute("COMMIT")


class _Shard:
    """One shard: its ledger, and the files that the ledger lists."""

    def __init__(self, run: RunView, shard: int) -> None:
        self._run = run
        self._shard = shard
        self._name = clean(str(run.ledger(shard)))
        holder = holder_of(run.lock(shard))
        self._live = holder is not None and holder.alive is not False

    def findings(self, listed: set[str], ids: _Ids | None) -> Iterator[RunProblem]:
        """Yield the findings, and add to `listed` the files that the ledger knows."""
        try:
            with self._run.open(self._shard) as ledger:
                yield from self._ledger(ledger)
                yield from self._videos(ledger, ids)
                for part in ledger.parts():
                    if names_part(part.name, self._shard):
                        listed.add(part.name)
                        yield from self._part(ledger, part)
                    else:
                        text = f"lists {clean(part.name)}, which is not the name of a part of shard {self._shard}"
                        yield RunProblem(f"{self._name}: {text}; delete it to have it rebuilt from captions/")
        except FileNotFoundError:
            parts = self._take_for_listed(listed)
            gone = f"is gone, {parts} of its parts are there; the next start rebuilds it from them"
            text = f"{self._name}: {gone}" if parts else f"shard {self._shard}: not started"
            yield RunProblem(text, wrong=bool(parts))
        except LedgerProblemError as error:
            self._take_for_listed(listed)
            yield RunProblem(str(error))

    def _take_for_listed(self, listed: set[str]) -> int:
        """Without a ledger nothing can be said of its parts one by one; return how many there are."""
        parts = self._run.parts(self._shard)
        listed.update(f"captions/{path.name}" for path in parts)
        listed.add(f"failures/part-{self._shard:05d}.parquet")
        return len(parts)

    def _ledger(self, ledger: LedgerView) -> Iterator[RunProblem]:
        damage = ledger.damage(LIVE_CHECK_S if self._live else None)
        if damage is None:
            text = "not checked to the end, it would have held up the run; verify again once that has ended"
            yield RunProblem(f"{self._name}: {text}", wrong=False)
        for line in damage or ():
            yield RunProblem(f"{self._name}: damaged: {clean(line)}")
        for part, captions in ledger.unlisted_parts():
            text = f"{captions} captions are recorded in {clean(part)}, which it does not list"
            yield RunProblem(f"{self._name}: {text}")
        if self._live:
            return
        if orphans := ledger.captions_without_video():
            yield RunProblem(f"{self._name}: {orphans} captions belong to no video")
        if waiting := ledger.unwritten():
            text = f"{waiting} captions are in no part yet; the next start writes them"
            yield RunProblem(f"shard {self._shard}: {text}", wrong=False)

    def _videos(self, ledger: LedgerView, ids: _Ids | None) -> Iterator[RunProblem]:
        named = 0
        for page in ledger.pages():
            if ids is not None:
                yield from ids.add(self._shard, page)
            for finding in self._captions(page):
                named += 1
                if named <= _MOST_NAMED:
                    yield finding
        if named > _MOST_NAMED:
            yield RunProblem(f"{self._name}: {named - _MOST_NAMED} more videos lack captions")

    def _captions(self, page: Page) -> Iterator[RunProblem]:
        """Yield the videos of a page that are done and lack captions."""
        found: dict[int, list[int]] = {}
        current: set[int] = set()
        for caption in page.captions:
            found.setdefault(caption.ordinal, []).append(caption.prompt_index)
            if caption.config_hash == self._run.config_hash:
                current.add(caption.ordinal)
        for item in page.items:
            have = found.get(item.ordinal, [])
            asked = (
                item.prompts or (self._run.prompts if item.ordinal in current else None) or max(len(have), 1)
            )
            if item.state == "done" and not set(range(asked)) <= set(have):
                text = (
                    f"video {clean(item.id)} is done with captions {have or 'none'}, {asked} were asked for"
                )
                yield RunProblem(f"{self._name}: {text}")

    def _part(self, ledger: LedgerView, part: PartView) -> Iterator[RunProblem]:
        """Look at a part; where something is wrong while a run is at work, look again at what is listed then."""
        findings = self._file(ledger, part)
        for _ in range(_LOOKS if self._live and findings else 0):
            time.sleep(_BETWEEN_LOOKS_S)
            now = ledger.part(part.name)
            findings = [] if now is None or now.outdated else self._file(ledger, now)
            if not findings:
                break
        yield from findings

    def _file(self, ledger: LedgerView, part: PartView) -> list[RunProblem]:
        path = self._run.root / part.name
        name = clean(str(path))
        if part.outdated:
            text = "its rows have changed since it was written; the next start rewrites it"
            return [RunProblem(f"{name}: {text}", wrong=not self._live)]
        try:
            if path.lstat().st_size != part.size_bytes:  # before a file is read that may have any size
                return [RunProblem(f"{name}: size differs from the ledger's; the next start rewrites it")]
            if _sha256(path) != part.sha256:
                return [RunProblem(f"{name}: sha256 differs from the ledger's; the next start rewrites it")]
            return self._content(ledger, part, path)
        except FileNotFoundError:
            return [RunProblem(f"{name}: is gone; the next start rewrites it")]
        except UnsafeFileError as error:
            return [RunProblem(str(error))]
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            reason = clean(" ".join(str(error).split()))
            return [RunProblem(f"{name}: not readable ({reason}); the next start rewrites it")]

    def _content(self, ledger: LedgerView, part: PartView, path: Path) -> list[RunProblem]:
        name = clean(str(path))
        captions = path.parent.name == "captions"
        rows, found = _read(path, captions=captions)
        if not captions and ledger.unreported():
            text = "some failures are newer than it; the next start rewrites it"
            return [] if self._live else [RunProblem(f"{name}: {text}", wrong=False)]
        wanted = ledger.captions_of_part(part.name) if captions else _failures(ledger)
        return [RunProblem(f"{name}: {text}") for text in _differences(rows, part.rows, found, wanted)]


def _failures(ledger: LedgerView) -> Content:
    return dict.fromkeys(((identity, 0) for identity in ledger.reported_ids()), "")


def _read(path: Path, *, captions: bool) -> tuple[int, Content]:
    """Return a file's number of rows, and its content, every page of it checked."""
    found: Content = {}
    with open_regular(path) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
        require_size(file, CAPTIONS if captions else FAILURES)
        for batch in file.iter_batches(_BATCH):
            ids = batch.column("id").to_pylist()
            indexes = batch.column("prompt_index").to_pylist() if captions else [0] * len(ids)
            texts = batch.column("caption").to_pylist() if captions else [""] * len(ids)
            found.update(zip(zip(ids, indexes, strict=True), texts, strict=True))
        return file.metadata.num_rows, found


def _differences(rows: int, recorded: int, found: Content, wanted: Content) -> Iterator[str]:
    if rows != recorded:
        yield f"holds {rows} rows, the ledger recorded {recorded}"
    if rows != len(found):
        yield f"holds {rows - len(found)} rows twice"
    if missing := wanted.keys() - found.keys():
        yield f"lacks {len(missing)} rows, one of them of video {clean(min(missing)[0])}"
    if foreign := found.keys() - wanted.keys():
        yield f"holds {len(foreign)} rows that do not belong there, one of them of video {clean(min(foreign)[0])}"
    if other := [key for key in wanted.keys() & found.keys() if wanted[key] != found[key]]:
        yield f"says something else than the ledger in {len(other)} rows, one of them of video {clean(min(other)[0])}"


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(run: RunView, listed: set[str]) -> Iterator[RunProblem]:
    """Yield what lies in `captions` and `failures` and is no part that a ledger lists."""
    for folder in ("captions", "failures"):
        for path in run.files(folder):
            name = f"{folder}/{path.name}"
            if (
                name not in listed
                and not path.name.startswith((".", "_"))
                and not _listed_now(run, path, name)
            ):
                ours = "no ledger lists this part; if a crash left it, the next start removes it, else move it away"
                other = "no part of this run, but readers take it for one; move it away"
                text = other if shard_of_part(path.name) is None else ours
                yield RunProblem(f"{clean(str(path))}: {text}")


def _listed_now(run: RunView, path: Path, name: str) -> bool:
    """Say whether a file has come to be listed, or has gone, since the ledgers were read."""
    shard = shard_of_part(path.name)
    if shard is None:
        return not path.exists()
    holder = holder_of(run.lock(shard))
    live = holder is not None and holder.alive is not False
    for look in range(_LOOKS if live else 1):
        time.sleep(_BETWEEN_LOOKS_S if look else 0.0)
        try:
            with run.open(shard) as ledger:
                if not path.exists() or ledger.part(name) is not None:
                    return True
        except (FileNotFoundError, LedgerProblemError):
            return False
    return False
