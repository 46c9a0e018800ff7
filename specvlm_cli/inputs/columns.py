"""Which column of a manifest means what: by its usual name, or as asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from specvlm_cli.console.safe_text import clean, short, storable
from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.inputs.options import InputOptions

MOST_COLUMNS = 10_000

PATHS = ("video", "path", "video_path", "file", "file_name", "media_path", "clip_path", "url")
IDS = ("id", "clip_id", "video_id", "videoid", "videoID", "key")
TIMES = (
    ("start", "end"),
    ("start_time", "end_time"),
    ("video_start", "video_end"),
    ("start_timestamp", "end_timestamp"),
)
PROMPTS = ("prompt",)

_STARTS, _ENDS = zip(*TIMES, strict=True)
_LIKE_TIMES = re.compile(
    r"(.*[_ ])?(time_?stamps?|times?|spans?|segments?|clips?|intervals?|shots?|scenes?|moments?|starts?|ends?)"
    r"([_ ]?(s|ms|secs?|seconds?))?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ManifestColumns:
    """Names of the columns that are read; None: the manifest has no such column."""

    path: str | None
    id: str | None
    start: str | None
    end: str | None
    prompt: str | None
    kept: tuple[str, ...]

    def used(self) -> list[str]:
        """Return the names, each once."""
        names = (self.path, self.id, self.start, self.end, self.prompt, *self.kept)
        return list(dict.fromkeys(name for name in names if name is not None))


def find_columns(names: Sequence[str], options: InputOptions) -> ManifestColumns:
    """Return what there is of the columns that are asked for, or have usual names."""
    start, end = _times(names)
    return ManifestColumns(
        path=_chosen(names, options.path_column, _usual(names, PATHS)),
        id=_chosen(names, options.id_column, _usual(names, IDS)),
        start=_chosen(names, options.start_column, start),
        end=_chosen(names, options.end_column, end),
        prompt=_chosen(names, options.prompt_column, _usual(names, PROMPTS)),
        kept=tuple(name for name in dict.fromkeys(options.keep_columns) if name in names),
    )


def _chosen(names: Collection[str], asked: str | None, usual: str | None) -> str | None:
    if asked is None:
        return usual
    return asked if asked in names else None


def _usual(names: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the first usual name that is there, letter for letter before regardless of case."""
    for name in known:
        if name in names:
            return name
    small = {name.lower(): name for name in reversed(names)}
    return next((small[name.lower()] for name in known if name.lower() in small), None)


def _times(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the columns of start and end: the first pair that is there whole, else each by itself."""
    pairs = ((_usual(names, (start,)), _usual(names, (end,))) for start, end in TIMES)
    whole = next(((start, end) for start, end in pairs if start and end), None)
    return whole or (_usual(names, _STARTS), _usual(names, _ENDS))


def unused_times(names: Sequence[str], columns: ManifestColumns, options: InputOptions) -> list[str]:
    """Return the columns that seem to say which part of a video is meant, where none was found that does.

    Nothing is returned where the caller said which columns hold times, or that none do.
    """
    if columns.start or columns.end or options.start_column is not None or options.end_column is not None:
        return []
    used = set(columns.used())
    return [name for name in dict.fromkeys(names) if name not in used and _LIKE_TIMES.fullmatch(name)]


def asked_columns(options: InputOptions) -> dict[str, str]:
    """Return column -> flag, for every column that is asked for by name."""
    flags = {
        "--path-column": options.path_column,
        "--id-column": options.id_column,
        "--start-column": options.start_column,
        "--end-column": options.end_column,
        "--prompt-column": options.prompt_column,
    }
    asked = {name: flag for flag, name in flags.items() if name}
    return dict.fromkeys(options.keep_columns, "--keep-columns") | asked


def refuse_pathless(shown: str, names: Sequence[str], options: InputOptions) -> None:
    """Refuse a manifest without a path.

    Raises:
        UsageError: No column has a usual name for one, or the one that was asked for is not there.
    """
    if find_columns(names, options).path is not None:
        return
    if options.path_column is not None:
        raise UsageError(missing(shown, "--path-column", options.path_column, names))
    raise UsageError(
        f"{shown}: no column has a usual name for a path ({', '.join(PATHS)}); give --path-column with one of "
        f"{listed(names)}{_separated(names)}"
    )


def refuse_missing(shown: str, names: Sequence[str], options: InputOptions) -> None:
    """Refuse a manifest that lacks a column that is needed.

    Raises:
        UsageError: A column that was asked for is missing, or there twice, or there is no path.
    """
    for name, flag in asked_columns(options).items():
        if name not in names:
            raise UsageError(missing(shown, flag, name, names))
    refuse_pathless(shown, names, options)
    columns = find_columns(names, options)
    for used in columns.used():
        if names.count(used) > 1:
            raise UsageError(f"{shown}: {names.count(used)} columns are called {clean(used)}; rename them")


def missing(shown: str, flag: str, name: str, names: Sequence[str]) -> str:
    """Return the line that says that a column is not there."""
    return f"{shown} has no column {clean(name)!r}; give {flag} with one of {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """Return the names of columns as a message may show them."""
    return short(", ".join(dict.fromkeys(names[:100])), 300) or "those it has: none"


def _separated(names: Sequence[str]) -> str:
    """Say so where it looks as if cells were not separated by commas."""
    return " (cells must be separated by commas)" if len(names) == 1 and set(names[0]) & set(";\t|") else ""


def row_names(options: InputOptions) -> dict[str, str]:
    """Return column to keep -> its name in a caption's row, which has another column of some names already.

    Raises:
        UsageError: A name is no text.
    """
    if not options.keep_columns:
        return {}
    from specvlm_cli.run.parts import (  # brings pyarrow, which nothing else here needs
        CAPTION_SCHEMA,
        free_name,
    )

    for name in options.keep_columns:
        if not name or storable(name) != name:
            raise UsageError(Flag("keep_columns", repr(name)), "is no name of a column", fix="give another")
    taken = {*CAPTION_SCHEMA.names, *options.keep_columns}
    names: dict[str, str] = {}
    for name in dict.fromkeys(options.keep_columns):
        names[name] = free_name(name, taken) if name in CAPTION_SCHEMA.names else name
        taken.add(names[name])
    return names
