"""How far a run is, from its ledgers and locks. Read-only; knows no terminal.

rate = videos that ended / time, over the last 15 minutes or the last 1,000 videos, whichever is shorter
time left = videos still to do / rate, of the slowest shard, where every shard with work left is being run
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from specvlm_cli.caption.outcome import Captioning, Figures, Tally
from specvlm_cli.console.safe_text import path_text
from specvlm_cli.run.holder import Holder, holder_of
from specvlm_cli.run.ledger_view import Counts, ErrorKind, LedgerProblemError, LedgerView
from specvlm_cli.run.view import RunView

SCHEMA = 1
MOST_FINISHES = 1000
WINDOW_S = 900.0
MOST_ROWS = 20_000  # captions whose figures are summed up, over all shards
MOST_ERRORS = 10  # kinds of failure that are shown
NOTHING = Counts()


@dataclass(frozen=True, slots=True)
class RunPace:
    """How fast videos come to an end.

    Attributes:
        per_s: Videos per second; None: fewer than two ended, or all at one moment.
        videos: How many videos that is from.
        over_s: Time that it is from.
        since: When the first of them ended; ISO 8601.
        last_at: When the last one ended; ISO 8601.
    """

    per_s: float | None = None
    videos: int = 0
    over_s: float = 0.0
    last_at: str | None = None
    since: str | None = None


UNKNOWN = RunPace()


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One shard.

    Attributes:
        shard: Its number, from 0.
        counts: Its videos by state.
        captions: Its captions.
        problem: Why nothing is known of it; None: the ledger was read.
        unfinished: A start would find something to do.
        holder: Who works on it, or died over it; None: no process.
        pace: How fast it goes, or went.
        tokens_per_s: Tokens of captions per second of wall time, at this pace; None: not known.
        captioning: How long its latest start has captioned, and how its workers were fed; None: not known.
        last_caption_at: When its latest caption was made; ISO 8601.
        eta_s: Time left at this pace; None: not known, or no process is known to work on it.
    """

    shard: int
    counts: Counts = NOTHING
    captions: int = 0
    problem: str | None = None
    unfinished: bool = True
    holder: Holder | None = None
    pace: RunPace = UNKNOWN
    tokens_per_s: float | None = None
    captioning: Captioning | None = None
    last_caption_at: str | None = None
    eta_s: float | None = None

    @property
    def to_do(self) -> int:
        return self.counts.pending + self.counts.running

    @property
    def running(self) -> bool:
        """Somebody holds it, or may do so on another machine."""
        return _works(self.holder)


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run folder.

    Attributes:
        out: The folder, as text.
        at: When this was read; ISO 8601.
        shards: Each of its shards.
        counts: Videos by state, over all shards.
        captions: Captions, over all shards.
        per_s: Videos per second, summed over the shards that are being run; over all where none is.
        videos_per_hour: The same per hour.
        tokens_per_s: Tokens of captions per second of wall time, summed over the same shards.
        waited_share: Share of the captioning time in which the decoders of these shards waited for input.
        eta_s: Time left; None: not known.
        figures: Accepted tokens and speedups of the latest captions, `figures.captions` of them.
        errors: The commonest failures.
        last_caption_at: When the latest caption was made; ISO 8601.
        free_bytes: Space left on the file system of the folder.
        problem: What is wrong with `run.json`; None: nothing.
    """

    out: str
    at: str
    shards: tuple[ShardStatus, ...]
    counts: Counts
    captions: int
    per_s: float | None
    videos_per_hour: float | None
    tokens_per_s: float | None
    waited_share: float | None
    eta_s: float | None
    figures: Figures
    errors: tuple[ErrorKind, ...]
    last_caption_at: str | None
    free_bytes: int
    problem: str | None

    @property
    def missing(self) -> tuple[int, ...]:
        """The shards in which a start would find something to do."""
        return tuple(one.shard for one in self.shards if one.unfinished)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        plain = asdict(self)
        errors = [error | {"path": path_text(error["path"])} for error in plain["errors"]]
        missing = {"missing_shards": list(self.missing)}
        return {"schema": SCHEMA, **plain, "counts": _counts(self.counts), "errors": errors, **missing}


def _counts(counts: Counts) -> dict[str, int]:
    return {**asdict(counts), "total": counts.total}


class _Sums:
    """What is summed up over the shards while each ledger is open."""

    def __init__(self, shards: int) -> None:
        self.tally = Tally()
        self._rows = max(1, MOST_ROWS // shards)
        self._errors: dict[tuple[str, str], ErrorKind] = {}

    def add(self, ledger: LedgerView, pace: RunPace) -> float | None:
        """Sum up one shard; return its tokens per second at this pace."""
        tokens = 0
        for row in ledger.latest_rows(self._rows):
            self.tally.add(row)
            if pace.since is not None and row["created_at"] > pace.since:
                tokens += row["completion_tokens"]
        for kind in ledger.errors(MOST_ERRORS):
            key = (kind.stage, kind.error_type)
            seen = self._errors.get(key)
            self._errors[key] = replace(seen, count=seen.count + kind.count) if seen else kind
        return tokens / pace.over_s if tokens else None

    def errors(self) -> tuple[ErrorKind, ...]:
        ranked = sorted(self._errors.values(), key=lambda kind: (-kind.count, kind.stage, kind.error_type))
        return tuple(ranked[:MOST_ERRORS])


def status(run: RunView, now: datetime | None = None) -> RunStatus:
    """Read how far a run is."""
    now = now or datetime.now(UTC)
    sums = _Sums(run.shards)
    shards = tuple(_shard(run, shard, now, sums) for shard in range(run.shards))
    active = [one for one in shards if one.running] or shards
    per_s = _sum(one.pace.per_s for one in active)
    return RunStatus(
        out=path_text(os.path.abspath(bytes(run.root))),
        at=now.isoformat(timespec="seconds"),
        shards=shards,
        counts=sum((one.counts for one in shards), NOTHING),
        captions=sum(one.captions for one in shards),
        per_s=per_s,
        videos_per_hour=None if per_s is None else 3600.0 * per_s,
        tokens_per_s=_sum(one.tokens_per_s for one in active),
        waited_share=_waited_share(active),
        eta_s=_eta(shards),
        figures=sums.tally.figures(),
        errors=sums.errors(),
        last_caption_at=max((one.last_caption_at for one in shards if one.last_caption_at), default=None),
        free_bytes=shutil.disk_usage(run.root).free,
        problem=run.problem,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _waited_share(shards: Sequence[ShardStatus]) -> float | None:
    found = [one.captioning for one in shards if one.captioning is not None]
    worker_s = sum(one.workers * one.seconds for one in found)
    return Captioning(worker_s, 1, sum(one.waited_s for one in found)).waited_share


def missing_shards(run: RunView) -> tuple[int, ...]:
    """Return the shards in which a start would find something to do, without summing up any figures."""
    now = datetime.now(UTC)
    return tuple(shard for shard in range(run.shards) if _shard(run, shard, now, None).unfinished)


def _shard(run: RunView, shard: int, now: datetime, sums: _Sums | None) -> ShardStatus:
    holder = holder_of(run.lock(shard))
    try:
        with run.open(shard) as ledger, ledger.reading():
            with ledger.moment():
                found = _read(ledger, shard, holder, now, dividing=run.dividing)
            return found if sums is None else replace(found, tokens_per_s=sums.add(ledger, found.pace))
    except FileNotFoundError:
        gone = "its ledger is gone; the next start rebuilds it from the parts" if run.parts(shard) else None
        return ShardStatus(shard, problem=gone or "not started", holder=holder)
    except LedgerProblemError as error:
        return ShardStatus(shard, problem=str(error), holder=holder)


def _read(
    ledger: LedgerView, shard: int, holder: Holder | None, now: datetime, *, dividing: bool
) -> ShardStatus:
    counts = ledger.counts()
    found = pace(ledger.finishes(MOST_FINISHES), holder, now)
    to_do = counts.pending + counts.running
    captioning = ledger.captioning()
    return ShardStatus(
        shard,
        counts,
        ledger.captions(),
        unfinished=dividing or bool(to_do) or not ledger.is_registered() or _unwritten(ledger),
        holder=holder,
        pace=found,
        captioning=None if captioning is None else Captioning(*captioning),
        last_caption_at=ledger.last_caption(),
        eta_s=to_do / found.per_s if _works(holder) and found.per_s else None,
    )


def _unwritten(ledger: LedgerView) -> bool:
    """Say whether a start would have files to write, although no video is left to do."""
    return bool(ledger.unwritten() or ledger.unreported() or any(part.outdated for part in ledger.parts()))


def _works(holder: Holder | None) -> bool:
    """Say whether somebody holds a shard, or may do so on another machine."""
    return holder is not None and holder.alive is not False


def pace(finishes: Sequence[str], holder: Holder | None, now: datetime) -> RunPace:
    """Return how fast videos came to an end, from when the latest ones did, the latest first.

    While somebody works on it, time counts on until now, and what was before this start does not count.
    """
    if not finishes:
        return RunPace()
    last_at = finishes[0]
    ended = [_time(at) for at in finishes]
    running = _works(holder)
    end = max(now, ended[0]) if running else ended[0]
    if running and holder is not None and holder.since is not None:
        ended = [at for at in ended if at >= _time(holder.since)]
    recent = [at for at in ended if (end - at).total_seconds() <= WINDOW_S]
    chosen = recent if len(recent) > 1 else ended
    over_s = (end - chosen[-1]).total_seconds() if chosen else 0.0
    since = chosen[-1].isoformat(timespec="microseconds") if chosen else None
    if len(chosen) < 2 or over_s <= 0.0:
        return RunPace(last_at=last_at)
    return RunPace((len(chosen) - 1) / over_s, len(chosen), over_s, last_at, since)


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _eta(shards: Sequence[ShardStatus]) -> float | None:
    """Return the time that the slowest shard still takes; None where one with work left has no known pace."""
    left = [one.eta_s for one in shards if one.problem is not None or one.to_do]
    known = [eta_s for eta_s in left if eta_s is not None]
    return max(known) if known and len(known) == len(left) else None


def array_expression(shards: Sequence[int]) -> str:
    """Return shard numbers as Slurm's `--array` takes them: 0,3-5; nothing where there are none."""
    runs: list[list[int]] = []
    for shard in sorted(shards):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
