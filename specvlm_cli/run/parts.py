"""Parquet files derived from the ledger: written next to their name, checked, renamed, and only then recorded.

Every part has one schema, declared here. Page checksums and zstd; names that begin with a dot are unfinished
and are ignored by Parquet readers. A crash at any point leaves a file that the ledger does not know; the next
start removes it and writes its rows again, from the ledger. A part whose rows change, or whose file is
damaged, is rewritten under its own name, so that a reader sees the old rows or the new, never both or
neither. It knows files and rows; it decides nothing about videos.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from os.path import lexists
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specvlm.durable import publish
from specvlm_cli.console.safe_text import clean, path_bytes
from specvlm_cli.exits import FatalError
from specvlm_cli.run.ledger import Ledger, Part, Row, refused
from specvlm_cli.run.stored_rows import OddRowError, check_types, checks_of
from specvlm_cli.safe_files import UnsafeFileError, new_file, open_regular, require_folder
from specvlm_cli.stopping import end_if_asked

CAPTIONS = "captions"
FAILURES = "failures"

_TIME = pa.timestamp("us", tz="UTC")


def _declared(**columns: pa.DataType) -> pa.Schema:
    """Return a schema that also carries the feature description that Hugging Face `datasets` looks for."""
    schema = pa.schema(list(columns.items()))
    features = {name: _feature(kind) for name, kind in columns.items()}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    names = {pa.float64(): "float64", _TIME: "timestamp[us, tz=UTC]"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


CAPTION_SCHEMA = _declared(
    id=pa.string(),
    path=pa.string(),
    input_path=pa.string(),
    start=pa.float64(),
    end=pa.float64(),
    prompt_index=pa.int64(),
    caption=pa.string(),
    finish_reason=pa.string(),
    target_model=pa.string(),
    target_revision=pa.string(),
    draft_model=pa.string(),
    method=pa.string(),
    prompt=pa.string(),
    prompt_sha256=pa.string(),
    config_hash=pa.string(),
    specvlm_version=pa.string(),
    run_id=pa.string(),
    created_at=_TIME,
    duration_s=pa.float64(),
    fps=pa.float64(),
    width=pa.int64(),
    height=pa.int64(),
    video_backend=pa.string(),
    flags=pa.list_(pa.field("element", pa.string())),
    num_frames=pa.int64(),
    frame_times_s=pa.list_(pa.field("element", pa.float64())),
    video_tokens=pa.int64(),
    video_tokens_kept=pa.int64(),
    compressor=pa.string(),
    compression_ratio=pa.float64(),
    prompt_tokens=pa.int64(),
    completion_tokens=pa.int64(),
    num_drafts=pa.int64(),
    num_draft_tokens=pa.int64(),
    num_accepted_tokens=pa.int64(),
    mean_accepted_tokens=pa.float64(),
    mean_acceptance_length=pa.float64(),
    acceptance_histogram=pa.list_(pa.field("element", pa.int64())),
    video_decode_s=pa.float64(),
    preprocess_s=pa.float64(),
    vision_s=pa.float64(),
    target_prefill_s=pa.float64(),
    draft_prefill_s=pa.float64(),
    decode_s=pa.float64(),
    total_s=pa.float64(),
    tokens_per_s=pa.float64(),
    baseline_token_s=pa.float64(),
    baseline_decode_s=pa.float64(),
    decode_speedup=pa.float64(),
    e2e_speedup=pa.float64(),
    speedup_source=pa.string(),
    estimated_token_s=pa.float64(),
    mean_batch_size=pa.float64(),
    settled_tokens=pa.int64(),
    smallest_margin=pa.float64(),
    exact_match=pa.bool_(),
    attempts=pa.int64(),
    peak_memory_bytes=pa.int64(),
    device=pa.string(),
)

FAILURE_SCHEMA = _declared(
    id=pa.string(),
    path=pa.string(),
    input_path=pa.string(),
    start=pa.float64(),
    end=pa.float64(),
    stage=pa.string(),
    error_type=pa.string(),
    error=pa.string(),
    attempts=pa.int64(),
    at=_TIME,
)


KEPT_KINDS = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
_NUMBER = "[0-9]{5,15}"
_ANY_PART = re.compile(rf"part-([0-9]{{5}})-{_NUMBER}\.parquet")
_LISTED = re.compile(rf"(?:{CAPTIONS}/part-([0-9]{{5}})-{_NUMBER}|{FAILURES}/part-([0-9]{{5}}))\.parquet")
_SOME_ROWS = 100
_PIECE = 1 << 20  # bytes that are read at once
_MOST_ROWS = {CAPTIONS: 1_000_000, FAILURES: 50_000_000}  # of a file; of captions there are some thousands
_MOST_UNPACKED = 16 << 30  # bytes
_NEVER_NEGATIVE = ("start", "end", "prompt_index", "attempts")
_NEEDED = ("id", "path", "prompt_index", "caption", "created_at")  # without these columns a file is no part


def caption_schema(kept: Mapping[str, str]) -> pa.Schema:
    """Return the schema of a run's parts: ours, and behind it the columns that pass through, by their kind.

    A run that an earlier version began may pass a column through that has one of our newer names: there it stays
    the manifest's.
    """
    ours = {field.name: field.type for field in CAPTION_SCHEMA}
    return (
        _declared(**(ours | {name: KEPT_KINDS[kind] for name, kind in kept.items()}))
        if kept
        else CAPTION_SCHEMA
    )


def failure_schema(kept: Mapping[str, str]) -> pa.Schema:
    """Return the schema of a run's failures: ours, and behind it the columns that pass through, by their kind."""
    if not kept:
        return FAILURE_SCHEMA
    ours = {field.name: field.type for field in FAILURE_SCHEMA}
    names = failure_names(kept)
    return _declared(**(ours | {names[name]: KEPT_KINDS[kind] for name, kind in kept.items()}))


def failure_names(kept: Iterable[str]) -> dict[str, str]:
    """Return column that passes through to captions -> its name in failures, which have names that captions lack."""
    taken = {*FAILURE_SCHEMA.names, *kept}
    return {name: free_name(name, taken) if name in FAILURE_SCHEMA.names else name for name in kept}


def free_name(name: str, taken: Collection[str]) -> str:
    """Return the name for a manifest's column in a row that has one of its name: `input_` in front, until it is new."""
    while name in taken:
        name = f"input_{name}"
    return name


class PartFiles:
    """The Parquet files of one shard of a run folder.

    Attributes:
        kept: The columns that pass through from a manifest, and their kinds: bool, int64, float64, string.
    """

    def __init__(self, root: Path, shard: int) -> None:
        self.kept: Mapping[str, str] = {}
        self._root = root
        self._name = re.compile(rf"part-{shard:05d}-({_NUMBER})\.parquet")
        self._temporary = re.compile(rf"\.part-{shard:05d}\b.*\.parquet")
        self._shard = shard
        self.failures_name = f"{FAILURES}/part-{shard:05d}.parquet"

    def _listed(self, ledger: Ledger) -> list[Part]:
        """Return the parts that the ledger lists, all of them files of this shard.

        Raises:
            FatalError: It lists another name, which only another program can have written.
        """
        parts = ledger.parts()
        for part in parts:
            if not names_part(part.name, self._shard):
                raise self._refused(OddRowError(f"a part of the name {str(part.name)[:200]!r}"))
        return parts

    def _refused(self, error: Exception) -> Exception:
        """Return the error to raise where this one shows that the ledger is not as we write it."""
        return refused(self._root / ".specvlm" / f"state-{self._shard:05d}.db", error)

    def _write(self, name: str, rows: Sequence[Row], schema: pa.Schema) -> Part:
        """Write one file so that its name exists only when all of it is on disk."""
        try:
            table = pa.Table.from_pylist([_typed(row, schema) for row in rows], schema=schema)
        except (pa.ArrowException, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._refused(error) from error
        return _write(self._root, name, table)

    def close_part(self, ledger: Ledger, most_rows: int) -> None:
        """Write the captions that are in no part yet, at most `most_rows` to a part, and renew old parts."""
        self._renew(ledger)
        while rows := ledger.rows_without_part(most_rows):
            name = f"{CAPTIONS}/part-{self._shard:05d}-{ledger.take_part_number():05d}.parquet"
            part = self._write(name, [row for *_, row in rows], caption_schema(self.kept))
            ledger.add_part(part, ((item, index) for item, index, _ in rows))

    def _renew(self, ledger: Ledger) -> None:
        self._listed(ledger)
        for name in ledger.outdated_parts():
            if rows := ledger.rows_of_part(name):
                ledger.renew_part(self._write(name, rows, caption_schema(self.kept)))
            else:
                (self._root / name).unlink(missing_ok=True)
                ledger.drop_part(name)

    def write_failures(self, ledger: Ledger) -> None:
        """Make the failures file say what the ledger says; no failures, no file."""
        name = self.failures_name
        if not ledger.failures_stale(name):
            return
        names = failure_names(self.kept)
        rows = [
            row | {names[column]: value for column, value in row["kept"].items() if column in names}
            for row in ledger.failures()
        ]
        if rows:
            ledger.mark_failures(name, self._write(name, rows, failure_schema(self.kept)))
        else:
            (self._root / name).unlink(missing_ok=True)
            ledger.mark_failures(name, None)

    def in_order(self, ledger: Ledger) -> bool:
        """Say whether files and ledger agree and nothing is left to write. Reads only names and sizes."""
        if (
            not ledger.is_current
            or ledger.count_without_part()
            or ledger.outdated_parts()
            or ledger.failures_stale(self.failures_name)
        ):
            return False
        return not any(self._strays(ledger)) and all(self._whole(part) for part in self._listed(ledger))

    def repair(self, ledger: Ledger) -> list[str]:
        """Remove what a crash left behind, and write parts again that are gone or damaged; say what was done.

        Raises:
            FatalError: A file with a part's name is none of ours.
        """
        ledger.match_parts()
        strays = list(self._strays(ledger))
        for path in strays:
            self._refuse_foreign(path, ledger)
        for path in strays:
            path.unlink(missing_ok=True)
        done = [f"removed {path}, left by a crash" for path in strays if not path.name.startswith(".")]
        outdated = set(ledger.outdated_parts())  # rewritten in any case
        for part in self._listed(ledger):
            if part.name not in outdated and not self._whole(part, content=True):
                done.append(f"{self._root / part.name} was missing or damaged, written again from the ledger")
                self._forget(part.name, ledger)
        self._renew(ledger)
        return done

    def _forget(self, name: str, ledger: Ledger) -> None:
        if name == self.failures_name:
            ledger.drop_part(name)
        else:
            ledger.outdate(name)

    def _whole(self, part: Part, *, content: bool = False) -> bool:
        """Say whether a recorded file is there with its size, and, where asked, with its content."""
        path = self._root / part.name
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != part.size_bytes:
                return False
            return not content or _described(self._root, part.name, part.rows, interruptible=True) == part
        except (FileNotFoundError, UnsafeFileError):
            return False

    def _refuse_foreign(self, path: Path, ledger: Ledger) -> None:
        """Refuse a readable part with rows that the ledger does not hold; ours, left by a crash, has none."""
        if not self._name.fullmatch(path.name):
            return
        try:
            rows = _read(path, caption_schema(self.kept))
        except _TooLargeError:
            raise
        except FatalError:  # it cannot be read, so nothing is lost with it
            return
        if not all(ledger.holds(row) for row in rows):
            raise FatalError(
                f"{path}: holds captions that this run did not make; move it out of this folder, or delete "
                "the ledger to have all parts taken in"
            )

    def _strays(self, ledger: Ledger) -> Iterator[Path]:
        """Yield unfinished and unrecorded files of this shard; a file with any other name is not ours."""
        known = {part.name for part in self._listed(ledger)}
        for folder in (CAPTIONS, FAILURES):
            for path in listed(self._root / folder):
                name = f"{folder}/{path.name}"
                ours = self._name.fullmatch(path.name) or name == self.failures_name
                unfinished = self._temporary.fullmatch(path.name)
                if (ours or unfinished) and path.is_dir() and not path.is_symlink():
                    raise FatalError(f"{path}: a folder where a part belongs; move it away, then start again")
                if unfinished or (ours and name not in known):
                    yield path

    def exist(self) -> bool:
        """Say whether there is any finished part or failures file of this shard."""
        return any(True for _ in self._numbered()) or (self._root / self.failures_name).exists()

    def _numbered(self) -> Iterator[tuple[int, Path]]:
        for path in listed(self._root / CAPTIONS):
            if found := self._name.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    raise FatalError(f"{path}: a folder where a part belongs; move it away, then start again")
                yield int(found.group(1)), path

    def rebuild(self, ledger: Ledger) -> None:
        """Fill an empty ledger from the parts on disk.

        Raises:
            FatalError: A part is not readable, so its captions are not to be had from it.
        """
        for number, path in self._numbered():
            schema = caption_schema(self.kept)
            rows = _read(path, schema)
            part = _described(self._root, f"{CAPTIONS}/{path.name}", len(rows))
            with _adopted(path):
                _check_values(rows, schema)
                ledger.adopt(part, number, rows, [path_bytes(row["path"]) for row in rows])
            if not set(CAPTION_SCHEMA.names) <= set(_schema_of(path).names):  # an earlier version wrote it
                ledger.outdate(part.name)
        require_folder(self._root / FAILURES)
        failures = self._root / self.failures_name
        if lexists(failures):
            names, schema = failure_names(self.kept), failure_schema(self.kept)
            found = _read(failures, schema)
            with _adopted(failures):
                _check_values(found, schema)
                kept = [{column: row[name] for column, name in names.items()} for row in found]
                rows = [
                    row | {"kept": json.dumps(one) if names else None}
                    for row, one in zip(found, kept, strict=True)
                ]
                ledger.adopt_failures(rows, [path_bytes(row["path"]) for row in rows])


def names_part(name: object, shard: int) -> bool:
    """Say whether a path inside the run folder is one that a shard gives to its files."""
    found = _LISTED.fullmatch(name) if isinstance(name, str) else None
    return found is not None and int(found.group(1) or found.group(2)) == shard


class _TooLargeError(FatalError):
    """A file may be readable, but cannot be one of ours."""


def _refuse_size(path: Path, file: pq.ParquetFile, folder: str) -> None:
    try:
        require_size(file, folder)
    except ValueError as error:
        raise _TooLargeError(f"{clean(str(path))}: {error}; move it out of this folder") from error


def require_size(file: pq.ParquetFile, folder: str) -> None:
    """Check that a file can be one of a folder of ours before it is read: a small one may unpack to terabytes.

    Raises:
        ValueError: It has more rows, or more bytes when they are unpacked.
    """
    unpacked = sum(file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
    if file.metadata.num_rows > _MOST_ROWS[folder] or unpacked > _MOST_UNPACKED:
        raise ValueError(f"{file.metadata.num_rows} rows of {unpacked} bytes are more than a run writes")


def ids_in_parts(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (shard, some of its ids) of one readable part of each shard."""
    told: set[int] = set()
    for path in listed(root / CAPTIONS):
        found = _ANY_PART.fullmatch(path.name)
        if found and int(found.group(1)) not in told:
            with (
                suppress(pa.ArrowException, OSError, KeyError, ValueError, StopIteration, UnsafeFileError),
                open_regular(path) as opened,
                pq.ParquetFile(opened) as file,
            ):
                batch = next(file.iter_batches(batch_size=_SOME_ROWS, columns=["id"]))
                told.add(int(found.group(1)))
                yield int(found.group(1)), [str(identity) for identity in batch.column("id").to_pylist()]


def kept_in_parts(root: Path) -> dict[str, str]:
    """Return the columns that pass through, and their kinds, as a readable part has them."""
    kinds = {kind: name for name, kind in KEPT_KINDS.items()}
    for path in listed(root / CAPTIONS):
        if _ANY_PART.fullmatch(path.name):
            with suppress(pa.ArrowException, OSError, UnsafeFileError):
                schema = _schema_of(path)
                ours = set(CAPTION_SCHEMA.names)
                return {
                    one.name: kinds[one.type] for one in schema if one.name not in ours and one.type in kinds
                }
    return {}


def listed(folder: Path) -> list[Path]:
    """Return what lies in a folder of a run, by name; nothing where there is no such folder.

    Raises:
        UnsafeFileError: The folder is a link.
    """
    require_folder(folder)
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _write(root: Path, name: str, table: pa.Table) -> Part:
    final = root / name
    require_folder(final.parent)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}")
    with new_file(temporary) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    _check(temporary, table.num_rows, table.schema)
    publish(temporary, final)
    return _described(root, name, table.num_rows)


def _typed(row: Mapping[str, Any], schema: pa.Schema) -> Row:
    return {
        field.name: _time(row.get(field.name)) if field.type == _TIME else row.get(field.name)
        for field in schema
    }


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _schema_of(path: Path) -> pa.Schema:
    with open_regular(path) as file:
        return pq.read_schema(file)


@contextmanager
def _adopted(path: Path) -> Iterator[None]:
    """Name the part whose rows no run has written.

    Raises:
        FatalError: The block found that they are such.
    """
    try:
        yield
    except (sqlite3.IntegrityError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FatalError:
    reason = clean(" ".join(str(error).split()))
    return FatalError(
        f"{clean(str(path))}: not a readable part ({reason}); delete it to have its videos captioned again"
    )


def _check(path: Path, rows: int, schema: pa.Schema) -> None:
    with open_regular(path) as opened, pq.ParquetFile(opened) as file:
        if file.metadata.num_rows != rows or not file.schema_arrow.equals(schema, check_metadata=True):
            raise FatalError(f"{path}: what was written does not read back; check the disk, then start again")


def _described(root: Path, name: str, rows: int, *, interruptible: bool = False) -> Part:
    """Describe a file as it is.

    Raises:
        NotBegunError: A signal came meanwhile, and that is to end it.
    """
    digest = hashlib.sha256()
    with open_regular(root / name) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if interruptible:
                end_if_asked()
        return Part(name, digest.hexdigest(), rows, file.tell())


def _read(path: Path, schema: pa.Schema) -> list[Row]:
    """Return a file's rows; columns of `schema` that an earlier version did not write yet are null."""
    try:
        with open_regular(path) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            _refuse_size(path, file, CAPTIONS if "caption" in schema.names else FAILURES)
            table = file.read()
        table = table.cast(_like(table.schema, schema))
        for name in _NEEDED:
            if name in schema.names and table.column(name).null_count:
                raise ValueError(f"a row without {name}")
        rows = table.to_pylist()  # a time may lie past the year 9999, a text be no UTF-8
    except (pa.ArrowException, ArithmeticError, KeyError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    missing = dict.fromkeys(set(schema.names) - set(table.schema.names))
    return [_plain(row) | missing for row in rows]


def _check_values(rows: Iterable[Row], schema: pa.Schema) -> None:
    """Check that a ledger may take rows over: that a run writes such values.

    Raises:
        OddRowError: One does not.
    """
    fits = checks_of(schema)
    for row in rows:
        check_types(row, fits)
        for name in _NEVER_NEGATIVE:
            if (row.get(name) or 0) < 0:
                raise OddRowError(f"a row whose {name!r} is {row[name]}")


def _like(found: pa.Schema, schema: pa.Schema) -> pa.Schema:
    """Return the declared types of the columns that are there; those that passed through keep theirs."""
    return pa.schema([schema.field(one.name) if one.name in schema.names else one for one in found])


def _plain(row: Row) -> Row:
    return {
        key: value.isoformat(timespec="microseconds") if isinstance(value, datetime) else value
        for key, value in row.items()
    }
