"""One audit, from request to result. Knows no terminal.

Ledgers are opened read-only, as by every other reader, also while a run writes to them. What is written is in
OUT/audit: verdicts, as they are made, and the file of differences, at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

from specvlm_cli.audit import differences
from specvlm_cli.audit.comparing import Outcome
from specvlm_cli.audit.differences import Difference
from specvlm_cli.audit.made_with import How, made_with
from specvlm_cli.audit.rows import Counted, RunRows, places
from specvlm_cli.audit.sample import AuditSample
from specvlm_cli.audit.verdicts import Verdicts
from specvlm_cli.audit.work import Tick, Work
from specvlm_cli.caption.settings import Plain
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import BusyError, ExitCode, FatalError, UsageError
from specvlm_cli.run import lock
from specvlm_cli.run.shard import Shard
from specvlm_cli.run.view import RunView
from specvlm_cli.safe_files import require_folder
from specvlm_cli.stopping import listening

SCHEMA = 1
FOLDER = "audit"
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MOST_SHOWN = 10  # differences that a person sees


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """What is asked for.

    Attributes:
        sample: Which rows of the run.
        shard: Which part of them.
        how: How captions are made again.
        again: Forget what was compared before.
    """

    sample: AuditSample
    shard: Shard
    how: How
    again: bool = False


@dataclass(frozen=True, slots=True)
class Audited:
    """What came of an audit.

    Attributes:
        out: The run folder.
        target: The target's name in rows.
        sample: The sample, as it was given.
        captions: Captions of the run.
        chosen: Those of the sample and of this shard.
        counts: How many of them have each outcome.
        made_now: How many this start looked at.
        stopped: Why it stopped early; None: it did not.
        differences_file: Where all that are not equal are listed.
        shown: The first of these.
    """

    out: str
    target: str
    sample: str
    captions: int
    chosen: int
    counts: dict[Outcome, int]
    made_now: int
    stopped: str | None
    differences_file: str
    shown: tuple[Difference, ...]

    @property
    def compared(self) -> int:
        return self.counts["equal"] + self.counts["different"]

    @property
    def left(self) -> int:
        """How many were not looked at: a signal came, or the run has taken them out meanwhile."""
        return self.chosen - sum(self.counts.values())

    @property
    def exit_code(self) -> ExitCode:
        if self.left:
            return ExitCode.STOPPED
        return ExitCode.OK if self.counts["equal"] == sum(self.counts.values()) else ExitCode.SOME_FAILED

    def as_json(self) -> Plain:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        return {
            "schema": SCHEMA,
            "exit_code": int(self.exit_code),
            "out": self.out,
            "target": self.target,
            "sample": self.sample,
            "captions": self.captions,
            "chosen": self.chosen,
            "compared": self.compared,
            **{str(outcome): count for outcome, count in self.counts.items()},
            "left": self.left,
            "made_now": self.made_now,
            "stopped": self.stopped,
            "differences_file": self.differences_file,
            "differences": [one.plain() for one in self.shown],
        }


def audit(run: RunView, request: AuditRequest, tick: Tick = lambda done, of, odd: None) -> Audited:
    """Make captions of a run again, and compare; what an earlier audit compared is not made again.

    Args:
        run: The run.
        request: Which captions, and how.
        tick: Called as captions are looked at.

    Raises:
        UsageError: There is nothing to audit, or the target is another one now.
        FatalError: A ledger, the model or the audit's own files cannot be used.
        BusyError: Another audit of the same shard is at work.
    """
    known = made_with(run)
    found = Counted(places(run))
    chosen = [place for place in request.sample.of(found) if request.shard.holds(place.id)]
    if not found.count:
        raise UsageError(f"{clean(str(run.root))}: no caption is finished yet; run specvlm caption first")
    name = f"{request.shard.index:05d}-of-{request.shard.count:05d}"
    with (
        _held(run.root / FOLDER, name) as folder,
        listening() as stop,
        Verdicts.open(folder / f"verdicts-{name}.db") as verdicts,
        RunRows(run) as rows,
    ):
        if request.again:
            verdicts.forget()
        work = Work(known, request.how, chosen, rows, verdicts, stop, tick)
        work.do()
        file = folder / f"differences-{name}.parquet"
        differences.write(file, _differences(work))
        counts = Counter(work.outcomes.values())
        return Audited(
            out=str(run.root),
            target=known.target,
            sample=request.sample.text,
            captions=found.count,
            chosen=len(chosen),
            counts={outcome: counts[outcome] for outcome in OUTCOMES},
            made_now=work.made_now,
            stopped=stop.reason,
            differences_file=str(file),
            shown=tuple(islice(_differences(work), MOST_SHOWN)),
        )


def _differences(work: Work) -> Iterator[Difference]:
    """Yield the rows that are not equal, in the order of the ledgers; one that has gone since is left out."""
    odd = (place for place in work.chosen if work.outcomes.get(place, "equal") != "equal")
    for place, row in work.rows.all_of(odd):
        if (verdict := work.verdict(place)) is not None:
            yield Difference(row, verdict)


@contextmanager
def _held(folder: Path, name: str) -> Iterator[Path]:
    """Make the audit's folder where there is none, and hold one shard of it.

    Raises:
        FatalError: It cannot be written, or is a link.
        BusyError: Another audit holds it.
    """
    require_folder(folder)
    shown = clean(str(folder))
    try:
        folder.mkdir(exist_ok=True)
        held = lock.share(folder / f"verdicts-{name}.lock", alone=True)
    except OSError as error:
        raise FatalError(
            f"{shown}: cannot be written ({error.strerror}); make it writable, then start again"
        ) from error
    except BusyError:
        raise BusyError(f"{shown}: another audit of this shard is at work; wait for that to end") from None
    with held:
        yield folder
