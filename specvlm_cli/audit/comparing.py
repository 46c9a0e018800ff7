"""A row against what stock `generate()` wrote for it: whether they are equal, what differs, and where.

Imports no torch. Names of what differs are names of columns.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specvlm.checkpoint import can_compare
from specvlm_cli.audit.made_with import MadeWith
from specvlm_cli.console.safe_text import storable
from specvlm_cli.run.stored_rows import Row

if TYPE_CHECKING:
    from specvlm.bench.reference import StockCaption

Outcome = Literal["equal", "different", "changed", "missing", "unreadable", "failed"]
_UNFINISHED = "\ufffd"  # half a character, at the end of tokens


@dataclass(frozen=True, slots=True)
class RowVerdict:
    """What came of one row.

    Attributes:
        outcome: `equal` or `different`, or why it was not compared: the file is `changed`, `missing` or `unreadable`,
            or `generate()` has `failed`.
        differs: Names of the columns that differ.
        token_index: Of the first of stock's tokens whose text is not in the row; None: the texts are equal.
        margin: Stock's best score minus its second best at that token; None: there is no such token.
        stock_text: What stock wrote; None: it wrote nothing.
        error: Why the row was not compared, on one line; None: it was.
    """

    outcome: Outcome
    differs: tuple[str, ...] = ()
    token_index: int | None = None
    margin: float | None = None
    stock_text: str | None = None
    error: str | None = None

    @property
    def is_final(self) -> bool:
        """Say whether another start would only find the same; what kept a row from being compared may be over then."""
        return self.outcome in ("equal", "different")


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What a row should have been made of.

    Attributes:
        made_with: The settings of the run.
        target_revision: Of the target that is loaded.
        prompt: The run's prompt of the row's index; None: the video brings its own.
        times_s: [F] of the frames that were read, in seconds.
    """

    made_with: MadeWith
    target_revision: str | None
    prompt: str | None
    times_s: Sequence[float]


def compare(
    row: Row, stock: StockCaption, asked: RowInputs, decode: Callable[[Sequence[int]], str]
) -> RowVerdict:
    """Return what came of a row; `decode`: tokens -> text, as captions have it."""
    text = storable(stock.text)
    differs = (*_of_caption(row, stock, text), *_of_input(row, stock, asked), *_of_settings(row, asked))
    if not differs:
        return RowVerdict("equal")
    index = _first_difference(row, stock, lambda tokens: storable(decode(tokens)), text)
    margin = stock.margins[index] if index is not None and index < len(stock.margins) else None
    return RowVerdict("different", differs, index, margin, text)


def _of_caption(row: Row, stock: StockCaption, text: str) -> tuple[str, ...]:
    made = {
        "caption": text,
        "completion_tokens": len(stock.token_ids),
        "finish_reason": stock.finish_reason,
    }
    return _unequal(row, made)


def _of_input(row: Row, stock: StockCaption, asked: RowInputs) -> tuple[str, ...]:
    made = {
        "prompt": row["prompt"] if asked.prompt is None else asked.prompt,
        "prompt_sha256": hashlib.sha256(row["prompt"].encode()).hexdigest(),
        "num_frames": len(asked.times_s),
        "frame_times_s": list(asked.times_s),
        "prompt_tokens": stock.prompt_tokens,
        "video_tokens": stock.video_tokens,
    }
    return _unequal(row, made)


def _of_settings(row: Row, asked: RowInputs) -> tuple[str, ...]:
    found = ["target_model"] if row.get("target_model") != asked.made_with.target else []
    revision = row.get("target_revision")
    if can_compare(revision, asked.target_revision) and revision != asked.target_revision:
        found.append("target_revision")
    if row.get("config_hash") not in asked.made_with.hashes:
        found.append("config_hash")
    return tuple(found)


def _unequal(row: Row, made: Row) -> tuple[str, ...]:
    """Return the columns that are not equal; those that an earlier version did not write are not compared."""
    return tuple(name for name, value in made.items() if row.get(name) is not None and row[name] != value)


def _first_difference(
    row: Row, stock: StockCaption, decode: Callable[[Sequence[int]], str], text: str
) -> int | None:
    """Return the index of the first of stock's tokens whose text is not in the row, which holds no tokens."""
    caption = str(row["caption"])
    if caption == text:
        return None

    def leaves(count: int) -> bool:
        return not caption.startswith(decode(stock.token_ids[:count]).rstrip(_UNFINISHED))

    length = len(stock.token_ids)
    index = bisect_left(range(1, length + 1), True, key=leaves)
    # If the caption continues after all that stock wrote, stock's end of sequence is what differs.
    return length - 1 if index == length and stock.finish_reason == "stop" else index
