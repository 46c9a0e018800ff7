"""Which rows of a run are audited: `--sample 1%|N|all`, the same ones at each start.

Rows are ordered by a hash of their id, and a sample is a beginning of that order. So a larger sample contains a
smaller one, and rows that are added to the run leave the others where they were.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from heapq import nsmallest
from typing import NamedTuple

from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.run.ledger import FileStamp

_ALL = 1 << 64  # places of the order


class RowPlace(NamedTuple):
    """Where a row is in the run, and what the ledger knows of its video; places sort in the order of the ledgers."""

    shard: int  # of the run, whose ledger holds the row
    ordinal: int  # of the video in the ledger
    prompt_index: int
    id: str
    stamp: FileStamp  # of the file that was captioned
    own_prompts: bool  # the video brings its own


@dataclass(frozen=True, slots=True)
class AuditSample:
    """How many rows are audited.

    Attributes:
        text: As it was given.
        share: Share of the ids, 0..1, and at least one id; None: `rows` says how many.
        rows: How many rows; None: `share` says how many.
    """

    text: str
    share: Decimal | None = None
    rows: int | None = None

    def of(self, places: Iterable[RowPlace]) -> list[RowPlace]:
        """Return the rows that are in the sample, in the order of the ledgers."""
        if self.share == 1:
            return sorted(places)
        if self.share is None:
            return sorted(nsmallest(self.rows or 0, places, key=_rank))
        return sorted(_below(places, int(self.share * _ALL)))


def _below(places: Iterable[RowPlace], bound: int) -> Iterator[RowPlace]:
    """Yield the rows of ids whose hash is below a bound; where there is none, those of the id with the smallest."""
    found, first = False, list[RowPlace]()
    for place in places:
        if order_of(place.id) < bound:
            found = True
            yield place
        elif not found:
            first = _first([*first, place])
    if not found:
        yield from first


def _first(places: list[RowPlace]) -> list[RowPlace]:
    """Return those of the id that comes first."""
    least = min(order_of(place.id) for place in places)
    return [place for place in places if order_of(place.id) == least]


def _rank(place: RowPlace) -> tuple[int, str, int]:
    return order_of(place.id), place.id, place.prompt_index


def order_of(identity: str) -> int:
    """Return the place of an id in the order, 0 to 2^64 - 1; it says nothing of the id's shard."""
    digest = hashlib.sha256(b"audit:" + identity.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8])


def parse_sample(text: str) -> AuditSample:
    """Return what `--sample` says.

    Raises:
        UsageError: It is neither a share in percent, nor a number of rows, nor `all`.
    """
    if text == "all":
        return AuditSample(text, share=Decimal(1))
    if found := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text):
        share = Decimal(found[1]) / 100
        if 0 < share <= 1:
            return AuditSample(text, share=share)
    if re.fullmatch(r"[0-9]{1,12}", text) and int(text):
        return AuditSample(text, rows=int(text))
    raise UsageError(
        Flag("sample", repr(text)),
        "is no sample",
        fix="give a share above 0% and up to 100% (1%), a number of rows (500), or all",
    )
