"""What an export can be asked for. Knows no rows and imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import Flag, UsageError

FormatName = Literal["parquet", "jsonl", "csv", "txt", "srt", "videofolder"]
SidecarName = Literal["txt", "srt"]
FailuresName = Literal["with", "without", "only"]
LinkName = Literal["symlink", "hardlink", "copy"]
PathsName = Literal["relative", "absolute", "input"]

ROWS_PER_FILE = 500_000
_SUFFIXES: dict[str, FormatName] = {".parquet": "parquet", ".jsonl": "jsonl", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is asked for.

    Attributes:
        destination: A file for one table, a folder for everything else.
        format: See `FormatName`.
        overwrite: Replace an earlier export.
        failures: Failures with the captions, without, or only.
        columns: Columns of the captions, in this order; None: those that suit the format.
        rows_per_file: Most rows of one Parquet file of a folder.
        videos: How videos come into a videofolder.
        paths: How videos are named: below their input folder, by their absolute path, or as the input named them.
    """

    destination: Path
    format: FormatName
    overwrite: bool = False
    failures: FailuresName = "without"
    columns: tuple[str, ...] | None = None
    rows_per_file: int = ROWS_PER_FILE
    videos: LinkName = "symlink"
    paths: PathsName = "relative"

    @property
    def one_file(self) -> bool:
        """The destination is a file, not a folder."""
        return self.format in ("jsonl", "csv") or self.destination.suffix.lower() == ".parquet"


# Names of files of other formats, which are never meant as folders.
_NOT_WRITTEN = frozenset(
    ".arrow .db .feather .json .ndjson .ods .orc .sqlite .tar .tsv .xls .xlsx .xml .yaml .zip".split()
)


def format_of(destination: Path, wanted: FormatName | None) -> FormatName:
    """Return the format: what is wanted, else what the destination's name says, else Parquet.

    Raises:
        UsageError: The destination's name says another one than is wanted, or one that there is not.
    """
    if destination.suffix.lower() in _NOT_WRITTEN:
        raise UsageError(
            f"{clean(str(destination))}: {destination.suffix} files are not written; give a folder, or a name that "
            "ends in .jsonl, .csv or .parquet"
        )
    named = _SUFFIXES.get(destination.suffix.lower())
    if wanted is not None and named is not None and named != wanted:
        shown = clean(str(destination))
        raise UsageError(
            Flag("format", wanted), f": {shown} is the name of a {named} file", fix="change one of them"
        )
    return wanted or named or "parquet"
