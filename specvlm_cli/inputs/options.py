"""What may be asked of the inputs, and what reading them found besides the videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specvlm_cli.run.shard import Shard

EXTENSIONS = (
    "mp4",
    "m4v",
    "mov",
    "mkv",
    "webm",
    "avi",
    "flv",
    "wmv",
    "mpg",
    "mpeg",
    "ts",
    "mts",
    "m2ts",
    "3gp",
    "ogv",
)

MOST_NAMED = 100  # folders that are reported by name


@dataclass(frozen=True, slots=True)
class InputOptions:
    """How inputs are read.

    Attributes:
        recursive: Enter folders below a folder.
        extensions: Names that count as videos in folders and globs.
        path_column: Manifest column with the path; None: found by its usual names.
        id_column: Manifest column with the id; None: found by its usual names; empty: none.
        start_column: Manifest column with the start of a part; None and empty as above.
        end_column: Manifest column with the end of a part; None and empty as above.
        prompt_column: Manifest column with the prompt or prompts; None: `prompt`; empty: none.
        keep_columns: Manifest columns that pass through to the caption's row.
        min_age_s: Files changed more recently than this are left out.
        shard: Which videos are ours.
    """

    recursive: bool = True
    extensions: tuple[str, ...] = EXTENSIONS
    path_column: str | None = None
    id_column: str | None = None
    start_column: str | None = None
    end_column: str | None = None
    prompt_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    min_age_s: float = 0.0
    shard: Shard = field(default_factory=Shard)


@dataclass(slots=True)
class InputReport:
    """What was seen while the inputs were read.

    Attributes:
        unreadable: Folders that could not be listed, with the reason; the first of them.
        more_unreadable: How many more there are.
        too_young: Videos left out because their file changed too recently.
        other_shards: Videos left out because they are of another shard.
        rows: Rows of manifests.
        unused_times: Manifests with columns that seem to hold times and are not read, and the names of these.
        empty: Arguments that named no video; standard input is none of them.
    """

    unreadable: list[str] = field(default_factory=list)
    more_unreadable: int = 0
    too_young: int = 0
    other_shards: int = 0
    rows: int = 0
    unused_times: Mapping[str, Sequence[str]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)

    def add_unreadable(self, line: str) -> None:
        """Note a folder that could not be listed."""
        if len(self.unreadable) < MOST_NAMED:
            self.unreadable.append(line)
        else:
            self.more_unreadable += 1
