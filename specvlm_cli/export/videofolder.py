"""The videofolder layout of Hugging Face `datasets`: videos/ with the videos, metadata.jsonl with a row for each.

Videos are linked, or copied where that is asked for. A video that is no longer where it was captioned is left out
with its rows, because a loader would stop at it; how many those are is counted.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain, groupby
from pathlib import Path

from specvlm_cli.console.safe_text import clean, path_text
from specvlm_cli.exits import UsageError
from specvlm_cli.export.lines import write_jsonl
from specvlm_cli.export.manifest import ExportedFile, ExportManifest, described
from specvlm_cli.export.merge import CaptionPlace
from specvlm_cli.export.names import Names
from specvlm_cli.export.request import LinkName
from specvlm_cli.run.ledger_view import Row
from specvlm_cli.safe_files import UnsafeFileError, new_file, open_regular

METADATA = "metadata.jsonl"
VIDEOS = "videos"
FILE_NAME = "file_name"
_PIECE = 1 << 20  # bytes that are copied at once
# Columns without null, so that a loader which takes the types from the first rows takes the right ones.
COLUMNS = (
    "id path prompt_index caption finish_reason target_model prompt duration_s fps width height completion_tokens"
).split()


class VideoFolder:
    """Writes one videofolder.

    Attributes:
        captions: Rows written.
        missing: Videos that are not there any more, and were left out.
        example: One of those; None: there are none.
    """

    def __init__(
        self, root: Path, how: LinkName, names: Names, manifest: ExportManifest, *, name_targets: bool
    ) -> None:
        """`name_targets`: the manifest says what symbolic links point to."""
        self.captions = 0
        self.missing = 0
        self.example: str | None = None
        self._root = root
        self._how = how
        self._names = names
        self._manifest = manifest
        self._name_targets = name_targets
        (root / VIDEOS).mkdir()

    def write(self, columns: Sequence[str], captions: Iterator[tuple[CaptionPlace, Row]]) -> None:
        """Link the videos and write the metadata."""
        path = self._root / METADATA
        self.captions = write_jsonl(path, [FILE_NAME, *columns], self._rows(captions))
        self._manifest.add(described(self._root, METADATA, self.captions))

    def _rows(self, captions: Iterator[tuple[CaptionPlace, Row]]) -> Iterator[Row]:
        for path, group in groupby(captions, key=lambda one: one[0].path):
            place, first = next(group)
            name = self._place(path, place)
            for row in chain([first], (row for _, row in group)):
                if name is not None:
                    yield row | {FILE_NAME: name}

    def _place(self, path: bytes, place: CaptionPlace) -> str | None:
        """Put a video into the folder; return its name there, None where there is no such video any more.

        `place` is of its first caption.
        """
        try:
            there = os.path.isabs(path) and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):
            there = False
        if not there:
            self._leave_out(path)
            return None
        name = f"{VIDEOS}/{self._names.take(path, b'').decode()}"
        target = os.path.join(self._root, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if self._how == "symlink":
            os.symlink(path, os.fsencode(target))
            self._manifest.add(ExportedFile(name, 0, link=os.fsdecode(path) if self._name_targets else ""))
        elif (size := _put(path, Path(target), self._how, place)) is not None:
            self._manifest.add(ExportedFile(name, size))
        else:
            self._leave_out(path)
            return None
        return name

    def _leave_out(self, path: bytes) -> None:
        self.missing += 1
        self.example = self.example or path_text(path)


def _put(path: bytes, target: Path, how: LinkName, place: CaptionPlace) -> int | None:
    """Copy or link a video that is still the file that was captioned; return its size, None where it is not.

    What was opened or linked is compared, not what the path named before.
    """
    source = Path(os.fsdecode(path))
    if source.is_symlink():
        if not _is_older(source, place):
            return None
        source = Path(os.path.realpath(source))
    try:
        if how == "hardlink":
            _link(source, target)
            found = target.lstat()
        else:
            with open_regular(source) as opened, new_file(target) as copy:
                found = os.fstat(opened.fileno())
                if _is_same(found, place):
                    shutil.copyfileobj(opened, copy, _PIECE)
    except (FileNotFoundError, UnsafeFileError):
        return None
    if _is_same(found, place):
        return target.stat().st_size
    target.unlink()
    return None


def _is_same(found: os.stat_result, place: CaptionPlace) -> bool:
    """Say whether a file is a regular one that has the size and time that the ledger has, where it has them."""
    size_bytes, mtime_ns = place.file
    same = size_bytes in (None, found.st_size) and mtime_ns in (None, found.st_mtime_ns)
    return same and stat.S_ISREG(found.st_mode)


def _is_older(link: Path, place: CaptionPlace) -> bool:
    """Say whether a link was there when its video was captioned: size and time alone can be made to agree."""
    if place.ended_at is None or None in place.file:
        return False
    return link.lstat().st_ctime < datetime.fromisoformat(place.ended_at).timestamp()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        where = f"{clean(path_text(bytes(source)))}: cannot be hard-linked from DEST ({error.strerror})"
        raise UsageError(f"{where}; use --videos symlink or --videos copy") from error
