"""One export, from request to result. Knows the formats by name, and no terminal."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import pyarrow as pa

from specvlm.words import counted
from specvlm_cli.console.safe_text import clean, path_bytes, path_text
from specvlm_cli.exits import FatalError, Flag, UsageError
from specvlm_cli.export import parquet
from specvlm_cli.export.card import Config, Facts, card
from specvlm_cli.export.columns import TableColumns, caption_columns, failure_columns
from specvlm_cli.export.lines import write_csv, write_jsonl
from specvlm_cli.export.manifest import CARD, ExportManifest, described, foreign, foreign_file
from specvlm_cli.export.merge import CaptionPlace, Index, Merged
from specvlm_cli.export.names import Names
from specvlm_cli.export.paths import Paths
from specvlm_cli.export.request import ExportRequest, FormatName, SidecarName
from specvlm_cli.export.sidecars import write_sidecars
from specvlm_cli.export.staging import Staging, staged
from specvlm_cli.export.videofolder import COLUMNS, FILE_NAME, METADATA, VIDEOS, VideoFolder
from specvlm_cli.run.ledger import Ledger
from specvlm_cli.run.ledger_view import LedgerView, Row
from specvlm_cli.run.parts import PartFiles, failure_names
from specvlm_cli.run.view import RunView, view

SCHEMA = 1
FAILURES = "_failures.jsonl"
_Captions = Iterator[tuple[CaptionPlace, Row]]


@dataclass(frozen=True, slots=True)
class Exported:
    """What came of an export.

    Attributes:
        destination: Where it is.
        format: Its format.
        captions: Captions written.
        failures: Failures written.
        videos: Videos of the run by what is known of them: captioned, failed, pending.
        doubles: Captions left out because an earlier one of the same video and prompt is there.
        files: Files written, the manifest not counted.
        size_bytes: Their size; linked videos not counted.
        missing_videos: Videos that are not where they were, and are left out of a videofolder.
        notes: What a person should know.
    """

    destination: str
    format: FormatName
    captions: int
    failures: int
    videos: dict[str, int]
    doubles: int
    files: int
    size_bytes: int
    missing_videos: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        return {"schema": SCHEMA, **asdict(self), "notes": list(self.notes)}


def export(
    run: RunView, request: ExportRequest, tick: Callable[[int, int], None] = lambda done, of: None
) -> Exported:
    """Write one export: all of it, or nothing.

    Args:
        run: Where from.
        request: What, and where to.
        tick: Called with (captions so far, captions in all).

    Raises:
        UsageError: What is asked for does not fit, or the destination is taken.
        FatalError: A ledger cannot be read, or the destination not be written.
    """
    _check(run, request)
    _require_whole(run)
    with _explained(request.destination), staged(request.destination, _refusal(run, request)) as staging:
        sources, notes = _sources(run, staging.work)
        with Index(
            staging.work / "index.db",
            lambda shard: LedgerView.open(sources[shard], run.kept),
            run.prompts or 1,
        ) as index:
            for shard in sources:
                index.add(shard)
            _require_whole(run)
            return _Export(run, request, index, staging, tick).write(notes)


def _require_whole(run: RunView) -> None:
    """Refuse a run whose ledgers are being changed into those of another number of shards."""
    now = view(run.root)
    if now.dividing or now.shards != run.shards:
        reason = now.problem or f"{clean(str(run.root))}: its shard count has just changed; export it again"
        raise FatalError(reason)


def _check(run: RunView, request: ExportRequest) -> None:
    name = clean(str(request.destination))
    inside = os.path.realpath(request.destination.parent / request.destination.name)
    for folder in ("captions", "failures", ".specvlm"):
        own = os.path.realpath(run.root / folder)
        if inside == own or inside.startswith(own + os.sep):
            raise UsageError(f"{name}: is inside the run folder's own {folder}; give another DEST")
    if request.failures == "with" and request.one_file:
        raise UsageError(
            Flag("failures", "with"),
            f": {name} is one file and holds one table",
            fix="use --failures only for another one",
        )
    if request.failures == "only" and request.format in ("txt", "srt", "videofolder"):
        raise UsageError(
            Flag("failures", "only"),
            f": {request.format} has no place for them",
            fix="use parquet, jsonl or csv",
        )
    if request.columns is not None and (request.format in ("txt", "srt") or request.failures == "only"):
        raise UsageError(
            Flag("columns"),
            "chooses among the columns of captions, and there are none here",
            fix="leave it out",
        )
    if request.columns is not None and request.format == "videofolder" and FILE_NAME in request.columns:
        raise UsageError(Flag("columns"), f": {FILE_NAME} is written for every video", fix="leave it out")
    caption_columns(run.kept, request.columns)


def _refusal(run: RunView, request: ExportRequest) -> Callable[[Path], str | None] | None:
    """Return the question whether what stands at a path may be replaced; None where nothing may."""
    if not request.overwrite:
        return None
    known = [*caption_columns(run.kept, None).names, *failure_columns(run.kept).names]

    def reason(path: Path) -> str | None:
        if path.is_symlink():
            return "this is a link"
        if request.one_file:
            return foreign_file(path, request.format, known)
        return foreign(path) if path.is_dir() else "this is a file"

    return reason


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """Say in one line why nothing was written."""
    try:
        yield
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        text = f"{clean(str(destination))}: {clean(reason)}; nothing was exported, fix that and start again"
        raise FatalError(text) from error


def _sources(run: RunView, work: Path) -> tuple[dict[int, Path], list[str]]:
    """Return the ledger of each shard, rebuilt from its parts where it is gone, and what to say about that."""
    found: dict[int, Path] = {}
    notes: list[str] = []
    absent = 0
    if run.problem is not None:  # of run.json, which also names the columns of a manifest
        notes.append(run.problem)
    for shard in range(run.shards):
        if lexists(run.ledger(shard)):
            found[shard] = run.ledger(shard)
        elif run.parts(shard):
            found[shard] = _rebuilt(run, shard, work / f"state-{shard:05d}.db")
            notes.append(f"the ledger of shard {shard} is gone; its captions are taken from its parts")
        else:
            absent += 1
    if absent:
        notes.append(f"{absent} of {run.shards} shards have not started, nothing of them is exported")
    return found, notes


def _rebuilt(run: RunView, shard: int, path: Path) -> Path:
    parts = PartFiles(run.root, shard)
    parts.kept = run.kept
    with Ledger.create(path) as ledger:
        parts.rebuild(ledger)
    return path


class _Export:
    """One export under way."""

    def __init__(
        self,
        run: RunView,
        request: ExportRequest,
        index: Index,
        staging: Staging,
        tick: Callable[[int, int], None],
    ) -> None:
        self._run = run
        self._request = request
        self._index = index
        self._staging = staging
        self._tick = tick
        self._facts = Facts()
        self._merged = index.merged()
        self._paths = Paths(index.db, request.paths)

    def write(self, notes: list[str]) -> Exported:
        """Write it, and return the result; `notes` are added to its own."""
        request = self._request
        captions = failures = missing = 0
        if request.one_file:
            rows = self._file()
            captions, failures = (0, rows) if request.failures == "only" else (rows, 0)
            files, size = 1, self._staging.data.stat().st_size
        else:
            with self._folder() as manifest:
                captions, missing, example = self._captions(manifest)
                failures = self._failures(manifest)
                self._card(manifest, captions, failures)
                manifest.counts = self._counts(captions, failures)
            files, size = manifest.files, manifest.size_bytes
            if missing:
                gone = counted(missing, "video")
                notes.append(f"{gone} left out, gone or changed since captioned, e.g. {example}")
        return self._exported(captions, failures, files, size, missing, notes)

    def _exported(
        self, captions: int, failures: int, files: int, size_bytes: int, missing: int, notes: list[str]
    ) -> Exported:
        merged = self._merged
        if merged.pending:
            notes.append(f"{counted(merged.pending, 'video')} still to do")
        return Exported(
            destination=path_text(os.path.abspath(bytes(self._request.destination))),
            format=self._request.format,
            captions=captions,
            failures=failures,
            videos=_by_state(merged),
            doubles=merged.doubles,
            files=files,
            size_bytes=size_bytes,
            missing_videos=missing,
            notes=tuple(notes),
        )

    @contextmanager
    def _folder(self) -> Iterator[ExportManifest]:
        self._staging.data.mkdir()
        with ExportManifest(self._staging.data, self._request.format) as manifest:
            yield manifest

    def _watched(self) -> _Captions:
        total = self._merged.captions
        found = (
            (place, self._paths.row(row, place.path, place.times)) for place, row in self._index.captions()
        )
        for number, caption in enumerate(self._facts.watch(found), start=1):
            if number % 1000 == 0:
                self._tick(number, total)
            yield caption
        self._tick(total, total)

    def _failed(self) -> Iterator[Row]:
        names = failure_names(self._run.kept)
        for row in self._index.failures():
            kept = {names[column]: value for column, value in row.pop("kept").items() if column in names}
            yield self._paths.row(row, path_bytes(row["path"]), (row["start"], row["end"])) | kept

    def _columns(self) -> TableColumns:
        return caption_columns(self._run.kept, self._request.columns)

    # Formats of one file

    def _file(self) -> int:
        only = self._request.failures == "only"
        columns = failure_columns(self._run.kept) if only else self._columns()
        rows = self._failed() if only else (row for _, row in self._watched())
        path = self._staging.data
        if self._request.format == "parquet":
            return parquet.write_file(path, columns, rows)
        write = write_jsonl if self._request.format == "jsonl" else write_csv
        return write(path, columns.names, rows)

    # Formats of a folder

    def _captions(self, manifest: ExportManifest) -> tuple[int, int, str | None]:
        """Write the captions; return how many, how many videos are missing, and one of those."""
        request = self._request
        root = self._staging.data
        if request.failures == "only":
            return 0, 0, None
        if request.format == "videofolder":
            names = Names(self._index.db, readable=True, keep_extension=True)
            folder = VideoFolder(
                root, request.videos, names, manifest, name_targets=request.paths == "absolute"
            )
            folder.write(self._metadata_columns(), self._watched())
            return folder.captions, folder.missing, folder.example
        if request.format != "parquet":
            kind: SidecarName = "txt" if request.format == "txt" else "srt"
            return write_sidecars(root, kind, self._watched(), Names(self._index.db), manifest), 0, None
        files = max(1, -(-self._merged.captions // request.rows_per_file))
        rows = (row for _, row in self._watched())
        most = request.rows_per_file
        return parquet.write_split(root, "data", self._columns(), rows, files, most, manifest), 0, None

    def _metadata_columns(self) -> Sequence[str]:
        if self._request.columns is not None:
            return self._request.columns
        parts = ("start", "end") if self._merged.segments else ()
        return [*COLUMNS, *parts, *(name for name in self._run.kept if name != FILE_NAME)]

    def _failures(self, manifest: ExportManifest) -> int:
        if self._request.failures == "without":
            return 0
        root = self._staging.data
        columns, rows = failure_columns(self._run.kept), self._failed()
        if self._request.format == "parquet":  # also without a row, so that the table can be loaded
            return parquet.write_split(root, "failures", columns, rows, 1, self._merged.failed, manifest)
        if not self._merged.failed:
            return 0
        written = write_jsonl(root / FAILURES, columns.names, rows)
        manifest.add(described(root, FAILURES, written))
        return written

    def _card(self, manifest: ExportManifest, captions: int, failures: int) -> None:
        request = self._request
        if request.format not in ("parquet", "videofolder"):
            return
        configs = []
        if request.format == "videofolder":
            configs.append(Config("default", (METADATA, f"{VIDEOS}/**")))
        elif request.failures != "only":
            configs.append(Config("default", ("data/train-*",), is_empty=not captions))
        if request.format == "parquet" and request.failures != "without":
            configs.append(Config("failures", ("failures/train-*",), is_empty=not failures))
        counts = self._counts(captions, failures)
        settings = self._paths.settings(self._run.settings)
        text = card("Video captions", configs, self._facts, counts, settings)
        (self._staging.data / CARD).write_text(text, encoding="utf-8", newline="\n")
        manifest.add(described(self._staging.data, CARD))

    def _counts(self, captions: int, failures: int) -> dict[str, int]:
        videos = {f"videos_{state}": number for state, number in _by_state(self._merged).items()}
        return {"captions": captions, "failures": failures, **videos}


def _by_state(merged: Merged) -> dict[str, int]:
    return {"captioned": merged.captioned, "failed": merged.failed, "pending": merged.pending}
