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
from itertools import groupby
from pathlib import Path

from specvlm_cli.exits import UsageError
from specvlm_cli.export.lines import write_jsonl
from specvlm_cli.export.manifest import Entry, Manifest, described
from specvlm_cli.export.merge import Place
from specvlm_cli.export.names import Names
from specvlm_cli.export.request import LinkName
from specvlm_cli.ledger_view import Row
from specvlm_cli.text import clean, path_text

METADATA = "metadata.jsonl"
VIDEOS = "videos"
FILE_NAME = "file_name"
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

    def __init__(self, root: Path, how: LinkName, names: Names, manifest: Manifest) -> None:
        self.captions = 0
        self.missing = 0
        self.example: str | None = None
        self._root = root
        self._how = how
        self._names = names
        self._manifest = manifest
        (root / VIDEOS).mkdir()

    def write(self, columns: Sequence[str], captions: Iterator[tuple[Place, Row]]) -> None:
        """Link the videos and write the metadata."""
        path = self._root / METADATA
        self.captions = write_jsonl(path, [FILE_NAME, *columns], self._rows(captions))
        self._manifest.add(described(self._root, METADATA, self.captions))

    def _rows(self, captions: Iterator[tuple[Place, Row]]) -> Iterator[Row]:
        for path, group in groupby(captions, key=lambda one: one[0].path):
            name = self._place(path)
            for _, row in group:
                if name is not None:
                    yield row | {FILE_NAME: name}

    def _place(self, path: bytes) -> str | None:
        """Put a video into the folder; return its name there, None where there is no such video any more."""
        try:
            there = os.path.isabs(path) and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):
            there = False
        if not there:
            self.missing += 1
            self.example = self.example or path_text(path)
            return None
        name = f"{VIDEOS}/{self._names.take(path, b'').decode()}"
        target = os.path.join(self._root, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self._manifest.add(_put(path, target, name, self._how))
        return name


def _put(path: bytes, target: str, name: str, how: LinkName) -> Entry:
    if how == "symlink":
        os.symlink(path, os.fsencode(target))
        return Entry(name, 0, link=os.fsdecode(path))
    source = os.path.realpath(path)
    if how == "copy":
        shutil.copyfile(source, os.fsencode(target))
    else:
        _link(source, target)
    return Entry(name, os.path.getsize(target))


def _link(source: bytes, target: str) -> None:
    try:
        os.link(source, os.fsencode(target))
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        where = f"{clean(path_text(source))}: cannot be hard-linked from DEST ({error.strerror})"
        raise UsageError(f"{where}; use --videos symlink or --videos copy") from error
