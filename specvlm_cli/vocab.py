"""Which tokens a draft may guess: what `--draft-vocab` says, and the file that `specvlm vocab` writes.

Captions are read from ledgers read-only, also during a run. Imports no torch; the
tokenizer is an argument.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specvlm import durable
from specvlm.drafts.kept_tokens import (
    KeptTokens,
    MostUsed,
    count_tokens,
    covering,
    filled,
    fingerprint,
    in_order,
    read_kept,
)
from specvlm.errors import ConfigError
from specvlm_cli.console.safe_text import clean, storable
from specvlm_cli.exits import CommandError, Flag, UsageError
from specvlm_cli.run.view import RunView, view
from specvlm_cli.safe_files import new_file

# Captions that `--draft-vocab N` is counted in, the latest ones: two million tokens or so, within a second.
MOST_CAPTIONS = 10_000
_BLOCK = 1 << 16  # characters of a text file that are tokenized in one piece, about


def parse(given: str) -> int | KeptTokens:
    """Return what N or FILE of `--draft-vocab` says.

    Raises:
        UsageError: It is neither.
        ConfigError: FILE is not what `specvlm vocab` writes.
    """
    if re.fullmatch(r"[0-9]{1,9}", given):
        if not int(given):
            raise UsageError(
                Flag("draft_vocab", 0), "leaves nothing to guess", fix="give more tokens, e.g. 16000"
            )
        return int(given)
    if not given:
        raise UsageError(
            Flag("draft_vocab"), "is empty", fix="give a number of tokens, e.g. 16000, or a file"
        )
    try:
        return read_kept(given)
    except ConfigError as error:
        raise UsageError(Flag("draft_vocab"), clean(str(error))) from error


def most_used(size: int, out: Path) -> MostUsed:
    """Return the tokens that the latest captions of a run use most; of all shards, as far as they can be read."""
    try:
        texts = list(captions(view(out), MOST_CAPTIONS))
    except (CommandError, OSError):  # no captions yet, or what the start itself will tell
        texts = []
    return MostUsed(size, texts)


def origin(wanted: MostUsed) -> str:
    """Return the tokens that a number means, in `caption`."""
    number = len(wanted.texts)
    if not number:
        return "counted in the captions to come; until they tell enough, the draft guesses from every token"
    return f"counted in {'one earlier caption' if number == 1 else f'{number} earlier captions'} and those to come"


def captions(run: RunView, most: int = sys.maxsize) -> Iterator[str]:
    """Yield the text of captions, of each shard the latest first, about as many of each.

    Raises:
        LedgerProblemError: A ledger cannot be read as it is.
    """
    ledgers = [shard for shard in range(run.shards) if run.ledger(shard).exists()]
    for shard in ledgers:
        with run.open(shard) as ledger:
            for row in ledger.latest_rows(-(-most // len(ledgers))):
                yield row["caption"]


def blocks(path: Path) -> Iterator[str]:
    """Yield a text file in pieces that end where a paragraph ends, with its line ends, which are tokens too.

    Raises:
        UsageError: It cannot be read, or is not text.
    """
    lines: list[str] = []
    length = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if length > _BLOCK and line.strip():
                    yield "".join(lines)
                    lines, length = [], 0
                lines.append(line)
                length += len(line)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(Flag("text", path), f": {reason}", fix="give a text file") from error
    if "".join(lines).strip():
        yield "".join(lines)


@dataclass(frozen=True, slots=True)
class VocabularyRequest:
    """What is counted, and how much of it is kept.

    Attributes:
        run: Whose captions; None: none.
        texts: Text files.
        size: Tokens to keep; None: as `coverage` says.
        coverage: Share of the counted tokens that those kept make up.
    """

    run: RunView | None
    texts: tuple[Path, ...]
    size: int | None = None
    coverage: float = 1.0


@dataclass(frozen=True, slots=True)
class WrittenVocabulary:
    """The result.

    Attributes:
        kept: Content of the file.
        captions: Captions counted.
        files: Text files counted.
        vocabulary: Tokens of the tokenizer, those added to it left out.
    """

    kept: KeptTokens
    captions: int
    files: int
    vocabulary: int


def make(wanted: VocabularyRequest, tokenizer: Any) -> WrittenVocabulary:
    """Count and choose.

    Raises:
        UsageError: There is nothing to count, or there are not as many tokens.
    """
    vocabulary = len(in_order(tokenizer))
    if wanted.size is not None and wanted.size > vocabulary:
        raise UsageError(
            Flag("size", wanted.size), f": the tokenizer has {vocabulary} tokens", fix="give fewer"
        )
    counts, number = count_tokens(tokenizer, captions(wanted.run) if wanted.run is not None else ())
    for path in wanted.texts:
        counts += count_tokens(tokenizer, blocks(path))[0]
    for token in set(counts) & set(tokenizer.added_tokens_decoder):
        del counts[token]
    if not counts:
        raise UsageError(f"{_sources(wanted)}: no captions there; give some, e.g. with --text FILE")
    chosen = (
        covering(counts, wanted.coverage) if wanted.size is None else filled(counts, tokenizer, wanted.size)
    )
    kept = KeptTokens(
        tokenizer=fingerprint(tokenizer),
        counts=tuple(chosen),
        tokens=counts.total(),
        distinct=len(counts),
        texts=number + len(wanted.texts),
        sources=tuple(_names(wanted)),
    )
    return WrittenVocabulary(kept, number, len(wanted.texts), vocabulary)


def _names(wanted: VocabularyRequest) -> list[str]:
    run = [] if wanted.run is None else [wanted.run.root]
    return [storable(str(path)) for path in (*run, *wanted.texts)]


def _sources(wanted: VocabularyRequest) -> str:
    return ", ".join(clean(name) for name in _names(wanted))


def check_place(path: Path) -> None:
    """Refuse to write over anything but an earlier vocabulary file.

    Raises:
        UsageError: Something else is there, or nothing can be.
    """
    shown = f"--out {clean(str(path))}"
    if not path.parent.is_dir():
        raise UsageError(f"{shown}: there is no folder {clean(str(path.parent))}; make it, or give another")
    if path.is_dir():
        raise UsageError(f"{shown}: a folder is there; give the name of a file")
    if path.exists():
        try:
            read_kept(path)
        except ConfigError as error:
            raise UsageError(
                f"{shown} exists and is not a vocabulary file; choose another name or delete it"
            ) from error


def write(kept: KeptTokens, path: Path, version: str) -> None:
    """Write a vocabulary file; it appears when all of it is on disk, or not at all."""
    plain = {"specvlm_version": version, **kept.as_json()}
    text = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in plain.items())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new_file(temporary) as file:
            file.write(f"{text}\n}}\n".encode())
        durable.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
