"""The work of one start: claim a video, caption it, store the caption; until none is left.

One bad video never ends the run: whatever goes wrong with it is stored as its failure. What goes wrong with
the ledger or the output folder does end it, because then nothing could be kept. It knows no screen and no
settings.
"""

from __future__ import annotations

import sqlite3
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from specvlm.errors import ConfigError, ModelError, PromptError, VideoError
from specvlm.records import Caption
from specvlm_cli import baseline
from specvlm_cli.baseline import Comparison
from specvlm_cli.engine import Engine
from specvlm_cli.ledger import Claim, Failure, Ledger, Row
from specvlm_cli.parts import Parts
from specvlm_cli.results import Tally
from specvlm_cli.rows import Provenance, caption_row
from specvlm_cli.stopping import Stop
from specvlm_cli.text import storable

_FOR_ALL = (
    ConfigError,
    ModelError,
    PromptError,
)  # no fault of one video: every other would fail the same way


class Reporter(Protocol):
    """Told what happens, as it happens."""

    def captioned(self, claim: Claim, row: Row) -> None: ...

    def failed(self, claim: Claim, failure: Failure, trace: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """How a start works through its videos.

    Attributes:
        baseline_sample: Share of videos that are also decoded plainly, 0..1.
        limit: Most videos to work on; None: all.
        max_failures: Stop once this many videos have failed in this start; None: never.
        part_rows: Captions in a part.
        part_s: Close a part at the latest after this time.
    """

    baseline_sample: float = 0.0
    limit: int | None = None
    max_failures: int | None = None
    part_rows: int = 1000
    part_s: float = 600.0


class _VideoError(Exception):
    """Carries why one video has no caption."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error)
        self.failure = failure


class Runner:
    """Works through the wanted videos of a ledger.

    Attributes:
        tally: The captions made so far.
        failed: How many videos failed so far.
        stopped: Why it stopped early; None where it did not.
    """

    def __init__(
        self,
        ledger: Ledger,
        parts: Parts,
        engine: Engine,
        policy: Policy,
        provenance: Provenance,
        reporter: Reporter,
    ) -> None:
        self.tally = Tally()
        self.failed = 0
        self.stopped: str | None = None
        self._ledger = ledger
        self._parts = parts
        self._engine = engine
        self._policy = policy
        self._provenance = provenance
        self._reporter = reporter
        self._cold = policy.baseline_sample > 0.0
        self._part_started = time.monotonic()

    def run(self, stop: Stop) -> None:
        """Caption what is pending. What was made stands in finished parts when this returns."""
        last = -1
        while not self._should_stop(stop) and (claim := self._ledger.claim(after=last)):
            last = claim.ordinal
            self._work(claim)
            self._close_part_if_due()
        self.close_parts()

    def close_parts(self) -> None:
        """Write all captions and failures that stand in the ledger alone."""
        self._parts.close_part(self._ledger, self._policy.part_rows)
        self._parts.write_failures(self._ledger)
        self._part_started = time.monotonic()

    def _should_stop(self, stop: Stop) -> bool:
        limit, most = self._policy.limit, self._policy.max_failures
        if stop.reason is not None:
            self.stopped = stop.reason
        elif most is not None and self.failed >= most:
            self.stopped = "max-failures"
        return self.stopped is not None or (limit is not None and self.tally.captions + self.failed >= limit)

    def _close_part_if_due(self) -> None:
        full = self._ledger.count_without_part() >= self._policy.part_rows
        if full or time.monotonic() - self._part_started >= self._policy.part_s:
            self.close_parts()

    def _work(self, claim: Claim) -> None:
        try:
            self._caption_and_store(claim)
        except BaseException:
            with suppress(sqlite3.Error):  # where even this fails, the next start sees that it was no crash
                self._ledger.release(claim)
            raise

    def _caption_and_store(self, claim: Claim) -> None:
        try:
            row = self._caption(claim)
        except _VideoError as failed:
            self._ledger.fail(claim, failed.failure)
            self.failed += 1
            self._reporter.failed(
                claim, failed.failure, "".join(traceback.format_exception(failed.__cause__ or failed))
            )
        else:
            self._ledger.finish(claim, [row])
            self.tally.add(row)
            self._reporter.captioned(claim, row)

    def _caption(self, claim: Claim) -> Row:
        prepared = self._prepare(claim)
        try:
            self._warm_up(prepared)
            caption, comparison = self._generate(claim, prepared)
        except _FOR_ALL:
            raise
        except Exception as error:
            raise _VideoError(_failure("generate", error)) from error
        if not caption.text.strip():
            raise _VideoError(
                Failure("generate", "EmptyCaption", "the model wrote nothing; try another prompt")
            )
        return caption_row(claim, caption, comparison, self._provenance)

    def _prepare(self, claim: Claim) -> Any:
        try:
            return self._engine.prepare(claim.item)
        except _FOR_ALL:
            raise
        except VideoError as error:
            raise _VideoError(_failure(error.stage, error)) from error
        except Exception as error:
            raise _VideoError(_failure("preprocess", error)) from error

    def _warm_up(self, prepared: Any) -> None:
        if self._cold:
            self._engine.warm_up(prepared)
            self._cold = False

    def _generate(self, claim: Claim, prepared: Any) -> tuple[Caption, Comparison | None]:
        identity = claim.item.id
        if not baseline.sampled(identity, self._policy.baseline_sample):
            return self._engine.caption(prepared, speculate=True), None
        order = (False, True) if baseline.plain_first(identity) else (True, False)
        made = {speculate: self._engine.caption(prepared, speculate=speculate) for speculate in order}
        return made[True], baseline.compare(made[True], made[False])


def _failure(stage: str, error: Exception) -> Failure:
    text = error.reason if isinstance(error, VideoError) else str(error)
    line = " ".join(storable(text).split()) or "no message"
    return Failure(stage, type(error).__name__, line[:2000])
