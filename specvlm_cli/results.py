"""What a run came to, as frozen figures; how they are shown is for `talk.py`. Knows no terminal and no clock.

Everything here takes the same memory after ten rows and after ten million.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from specvlm_cli.exits import ExitCode
from specvlm_cli.ledger import Failure, Row

STAGES = ("video_decode_s", "preprocess_s", "vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")
MOST_KINDS = 100  # of failures that are told apart; models and devices likewise
OTHER_KINDS = "other kinds"


@dataclass(frozen=True, slots=True)
class Speedup:
    """One kind of speedup over the captions that have one."""

    of_totals: float  # sum of the plain times / sum of the speculative times
    median: float  # of the speedups of single captions; beyond `Median.EXACT` of them, within 0.1 %
    captions: int = 0  # how many


@dataclass(frozen=True, slots=True)
class Figures:
    """The captions of this start, summed up.

    Attributes:
        captions: Captions made by this start.
        completion_tokens: Their tokens.
        mean_accepted_tokens: Accepted tokens / rounds over all captions, the bonus token not counted.
        mean_acceptance_length: That + 1, tokens per round; None without rounds.
        compared: Captions that were also decoded plainly.
        identical: Of those, how many have the very same tokens.
        decode: Speedup of everything after the first token, measured.
        end_to_end: Speedup from opening the file to the text, measured.
        decode_estimated: The same where the plain time was estimated from a few plain steps.
        end_to_end_estimated: The same where the plain time was estimated from a few plain steps.
        tokens_per_s: Tokens after the first / time of the rounds, over all captions; None without rounds.
        stages_s: Time of each stage over all captions; what the prompts of a video share counts once.
        failures_by_kind: Failed videos by `stage:error_type`, where the tally was told of them.
        targets: The targets whose captions these are.
        drafts: The drafts that guessed.
        devices: Where the target was.
    """

    captions: int = 0
    completion_tokens: int = 0
    mean_accepted_tokens: float | None = None
    mean_acceptance_length: float | None = None
    compared: int = 0
    identical: int = 0
    decode: Speedup | None = None
    end_to_end: Speedup | None = None
    decode_estimated: Speedup | None = None
    end_to_end_estimated: Speedup | None = None
    tokens_per_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    failures_by_kind: dict[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """What of the figures costs nothing to know at any time.

    Attributes:
        accepted: Accepted tokens per round; None without rounds.
        decode: Decode speedup of totals; None: not known yet.
        end_to_end: End-to-end speedup of totals; None: not known yet.
        estimated: These two are estimated, none was measured.
    """

    accepted: float | None = None
    decode: float | None = None
    end_to_end: float | None = None
    estimated: bool = False


class Median:
    """The median of positive numbers in bounded memory.

    The first thousand are kept, and their median is exact. More are counted in steps of 0.2 % between e^-10
    and e^10, so that the median is off by at most 0.1 %, inside that range.
    """

    EXACT = 1000
    _STEP = 0.002  # of the natural logarithm
    _MOST_STEPS = 5000

    def __init__(self) -> None:
        self._kept: list[float] = []
        self._steps: Counter[int] = Counter()

    def add(self, value: float) -> None:
        if self._steps:
            self._steps[self._step(value)] += 1
            return
        self._kept.append(value)
        if len(self._kept) > self.EXACT:
            self._steps.update(map(self._step, self._kept))
            self._kept.clear()

    def _step(self, value: float) -> int:
        step = round(math.log(value) / self._STEP) if value > 0.0 else -self._MOST_STEPS
        return max(-self._MOST_STEPS, min(step, self._MOST_STEPS))

    def value(self) -> float:
        """Return the median.

        Raises:
            ValueError: There is no number yet.
        """
        if not self._steps:
            return median(self._kept)
        count = self._steps.total()
        low, high = (self._at(rank) for rank in ((count - 1) // 2, count // 2))
        return (low + high) / 2.0

    def _at(self, rank: int) -> float:
        """Return the number that `rank` others come before, of those that were counted."""
        for step in sorted(self._steps):
            rank -= self._steps[step]
            if rank < 0:
                return math.exp(step * self._STEP)
        raise IndexError(rank)


class _Ratio:
    """Pairs of a plain and a speculative time of the same work."""

    def __init__(self) -> None:
        self.count = 0
        self._ours_s = 0.0
        self._plain_s = 0.0
        self._median = Median()

    def add(self, ours_s: float, speedup: float) -> None:
        self.count += 1
        self._ours_s += ours_s
        self._plain_s += ours_s * speedup
        self._median.add(speedup)

    @property
    def of_totals(self) -> float | None:
        return self._plain_s / self._ours_s if self._ours_s else None

    def speedup(self) -> Speedup | None:
        ratio = self.of_totals
        return None if ratio is None else Speedup(ratio, self._median.value(), self.count)


class _Speedups:
    """Both kinds of speedup from one source of plain times."""

    def __init__(self) -> None:
        self.decode = _Ratio()
        self.end_to_end = _Ratio()

    def add(self, row: Row) -> None:
        if row["decode_speedup"] is not None:
            self.decode.add(row["decode_s"], row["decode_speedup"])
        if row["e2e_speedup"] is not None:
            self.end_to_end.add(row["total_s"], row["e2e_speedup"])


class Tally:
    """Counts rows and failures as they come; keeps a few sums, never the rows."""

    def __init__(self) -> None:
        self.captions = 0
        self.tokens = 0
        self.failures: Counter[str] = Counter()
        self._drafts = 0
        self._accepted = 0
        self._compared = 0
        self._identical = 0
        self._steps = 0  # tokens after the first
        self._stages_s = dict.fromkeys(STAGES, 0.0)
        self._speedups = {"measured": _Speedups(), "estimated": _Speedups()}
        self._names: dict[str, dict[str, None]] = {"target_model": {}, "draft_model": {}, "device": {}}

    def add(self, row: Row) -> None:
        """Count one caption."""
        self.captions += 1
        self.tokens += row["completion_tokens"]
        self._drafts += row["num_drafts"]
        self._accepted += row["num_accepted_tokens"]
        self._steps += row["completion_tokens"] - 1
        self._add_stages(row)
        for column, names in self._names.items():
            if row[column] is not None and len(names) < MOST_KINDS:
                names[row[column]] = None
        if (source := row["speedup_source"]) is not None:
            self._speedups[source].add(row)
            self._compared += row["exact_match"] is not None
            self._identical += row["exact_match"] is True

    def _add_stages(self, row: Row) -> None:
        for stage in STAGES:
            self._stages_s[stage] += row[stage]

    def fail(self, failure: Failure, videos: int = 1) -> None:
        """Count failed videos of one kind."""
        if not videos:
            return
        kind = f"{failure.stage}:{failure.error_type}"[:100]
        known = kind in self.failures or len(self.failures) < MOST_KINDS
        self.failures[kind if known else OTHER_KINDS] += videos

    def running(self) -> Running:
        """Return what is known at once, however many rows there were."""
        accepted = self._accepted / self._drafts if self._drafts else None
        for source, speedups in self._speedups.items():
            decode, end_to_end = speedups.decode.of_totals, speedups.end_to_end.of_totals
            if decode is not None or end_to_end is not None:
                return Running(accepted, decode, end_to_end, estimated=source == "estimated")
        return Running(accepted)

    def figures(self) -> Figures:
        """Return everything, medians included; for the end."""
        accepted = self._accepted / self._drafts if self._drafts else None
        measured, estimated = self._speedups["measured"], self._speedups["estimated"]
        decode_s = self._stages_s["decode_s"]
        return Figures(
            captions=self.captions,
            completion_tokens=self.tokens,
            mean_accepted_tokens=accepted,
            mean_acceptance_length=None if accepted is None else accepted + 1.0,
            compared=self._compared,
            identical=self._identical,
            decode=measured.decode.speedup(),
            end_to_end=measured.end_to_end.speedup(),
            decode_estimated=estimated.decode.speedup(),
            end_to_end_estimated=estimated.end_to_end.speedup(),
            tokens_per_s=self._steps / decode_s if decode_s else None,
            stages_s=dict(self._stages_s) if self.captions else {},
            failures_by_kind=dict(self.failures.most_common()),
            targets=tuple(self._names["target_model"]),
            drafts=tuple(self._names["draft_model"]),
            devices=tuple(self._names["device"]),
        )


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """What is going on at one moment."""

    reading: int  # videos that are being read
    ready: int  # videos whose frames wait for a worker
    ready_bytes: int  # size of those frames
    generating: int  # workers that are making a caption
    workers: int  # of how many
    retrying: int  # videos that wait for another try


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a start ended.

    Attributes:
        exit_code: See `exits.py`.
        out: The run folder.
        found: Videos that the inputs name.
        done: Of those, how many have a caption now.
        failed: Of those, how many have failed.
        pending: Of those, how many are still to be done.
        failed_now: Videos that failed in this start.
        wall_s: Time of this start, loading included.
        figures: The captions of this start; None where there was nothing to do.
        stopped: Why this start ended early; None where it did not.
        waited_s: Time in which workers had nothing to do but wait for frames, summed over workers; None: not
            measured.
        failures_file: Where the failures are; None: there are none, or it is not known.
    """

    exit_code: ExitCode
    out: str
    found: int
    done: int
    failed: int
    pending: int
    failed_now: int = 0
    wall_s: float = 0.0
    figures: Figures | None = None
    stopped: str | None = None
    waited_s: float | None = None
    failures_file: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        return {"schema": 1, **asdict(self), "exit_code": int(self.exit_code)}
