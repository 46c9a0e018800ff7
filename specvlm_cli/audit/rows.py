"""The captions of a run, by the places where ledgers hold them. Read-only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from typing import Self

from specvlm_cli.audit.sample import RowPlace
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.run.ledger import FileStamp
from specvlm_cli.run.ledger_view import ItemView, LedgerView
from specvlm_cli.run.stored_rows import Row
from specvlm_cli.run.view import RunView

_AT_ONCE = 500  # rows of a ledger that are read together


def places(run: RunView) -> Iterator[RowPlace]:
    """Yield where each caption of a run is.

    Raises:
        FatalError: A ledger cannot be read, or is gone.
    """
    for shard in range(run.shards):
        try:
            ledger = run.open(shard)
        except FileNotFoundError:
            _require_not_begun(run, shard)
            continue
        with ledger:
            for page in ledger.pages():
                items = {item.ordinal: item for item in page.items}
                found = (one for one in page.captions if one.ordinal in items)
                yield from (_place(shard, items[one.ordinal], one.prompt_index) for one in found)


def _require_not_begun(run: RunView, shard: int) -> None:
    if run.parts(shard):
        name = clean(str(run.ledger(shard)))
        raise FatalError(f"{name}: is gone; start specvlm caption again, which makes it from captions/")


def _place(shard: int, item: ItemView, prompt_index: int) -> RowPlace:
    stamp = FileStamp(item.size_bytes, item.mtime_ns)
    return RowPlace(shard, item.ordinal, prompt_index, item.id, stamp, item.prompts is not None)


class Counted:
    """Passes places on, and counts them."""

    def __init__(self, found: Iterator[RowPlace]) -> None:
        self._found, self.count = found, 0

    def __iter__(self) -> Iterator[RowPlace]:
        for place in self._found:
            self.count += 1
            yield place


class RunRows:
    """The rows of a run. One ledger is open at a time: places come in the order of the ledgers."""

    def __init__(self, run: RunView) -> None:
        self._run, self._shard = run, -1
        self._ledger: LedgerView | None = None
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def of(self, found: Sequence[RowPlace]) -> list[tuple[RowPlace, Row]]:
        """Return the rows of places of one shard, in their order; those that have gone since are left out."""
        ledger = self._of_shard(found[0].shard)
        rows = ledger.rows(list(dict.fromkeys(place.ordinal for place in found)))
        pairs = ((place, rows.get((place.ordinal, place.prompt_index))) for place in found)
        return [(place, row) for place, row in pairs if row is not None]

    def all_of(self, found: Iterable[RowPlace]) -> Iterator[tuple[RowPlace, Row]]:
        """Yield the rows of any number of places, in their order."""
        for _, group in groupby(found, key=lambda place: place.shard):
            while part := list(islice(group, _AT_ONCE)):
                yield from self.of(part)

    def _of_shard(self, shard: int) -> LedgerView:
        if self._ledger is None or shard != self._shard:
            self._held.close()
            self._ledger = self._held.enter_context(self._run.open(shard))
            self._shard = shard
        return self._ledger
