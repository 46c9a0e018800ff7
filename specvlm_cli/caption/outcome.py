"""What a run came to, as frozen figures; how they are shown is for `console`. Knows no terminal and no clock.

Everything here takes the same memory after ten rows and after ten million.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from specvlm_cli.exits import ExitCode
from specvlm_cli.run.ledger import Failure, Row

STAGES = ("video_decode_s", "preprocess_s", "vision_s", "target_prefill_s", "draft_prefill_s", "decode_s")
MOST_KINDS = 100  # of failures that are counted apart; models and devices likewise
OTHER_KINDS = "other kinds"


@dataclass(frozen=True, slots=True)
class CaptionSpread:
    """How a figure of single captions varies.

    Attributes:
        captions: How many captions this is from.
        median: Half of them are below; beyond `Quantiles.EXACT` captions within 0.1 %, as are the others.
        p10: One in ten is below.
        p90: Nine in ten are below.
    """

    captions: int
    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True)
class PlainSpeedup(CaptionSpread):
    """One kind of speedup over plain decoding at the same batch size, over the captions that have one.

    Attributes:
        of_totals: Sum of the plain times / sum of the speculative times; what a run gains.
        mean_batch_size: Sequences that shared the steps, on average over the time of the rounds; None: not known.
    """

    of_totals: float
    mean_batch_size: float | None = None

    @property
    def between(self) -> tuple[float, float]:
        """The range to report of an estimate: p10 to p90 of single captions, the ratio of totals included."""
        return min(self.p10, self.of_totals), max(self.p90, self.of_totals)


@dataclass(frozen=True, slots=True)
class Figures:
    """The captions of this start, summed up.

    Attributes:
        captions: Captions made by this start.
        videos: Videos that these are of.
        completion_tokens: Their tokens.
        mean_accepted_tokens: Accepted tokens / rounds over all captions, the bonus token not counted.
        mean_acceptance_length: That + 1, tokens per round; None without rounds.
        compared: Captions that were also decoded plainly.
        identical: Of those, how many have the same tokens.
        decode: Speedup of everything after the first token, measured.
        end_to_end: Speedup from opening the file to the text, measured.
        decode_estimated: The first where the plain time was estimated.
        end_to_end_estimated: The second where the plain time was estimated.
        estimate_over_measured: Plain time as estimated / as measured, where a caption has both; None: none has.
        mean_batch_size: Sequences that shared the steps, on average over the time of the rounds; None: not known.
        tokens_per_s: Tokens after the first / time of the rounds, over all captions; None without rounds.
        stages_s: Time of each stage over all captions; what the prompts of a video share counts once.
        failures_by_kind: Failed videos by `stage:error_type`, if the tally received them.
        targets: The targets whose captions these are.
        drafts: The drafts that guessed.
        devices: Where the target was.
    """

    captions: int = 0
    videos: int = 0
    completion_tokens: int = 0
    mean_accepted_tokens: float | None = None
    mean_acceptance_length: float | None = None
    compared: int = 0
    identical: int = 0
    decode: PlainSpeedup | None = None
    end_to_end: PlainSpeedup | None = None
    decode_estimated: PlainSpeedup | None = None
    end_to_end_estimated: PlainSpeedup | None = None
    estimate_over_measured: CaptionSpread | None = None
    mean_batch_size: float | None = None
    tokens_per_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    failures_by_kind: dict[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """What of the figures is shown while a start is at work.

    Attributes:
        accepted: Accepted tokens per round; None without rounds.
        decode: Decode speedup; None: not known yet.
        end_to_end: End-to-end speedup; None: not known yet.
        estimated: These two are estimated, none was measured.
    """

    accepted: float | None = None
    decode: PlainSpeedup | None = None
    end_to_end: PlainSpeedup | None = None
    estimated: bool = False


class Quantiles:
    """The spread of positive numbers in bounded memory.

    The first thousand are kept, and their quantiles are exact. More are counted in steps of 0.2 % between e^-10
    and e^10, so that a quantile is off by at most 0.1 %, inside that range.
    """

    EXACT = 1000
    _STEP = 0.002  # of the natural logarithm
    _MOST_STEPS = 5000

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[float] = []
        self._steps: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self.count += 1
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

    def spread(self) -> CaptionSpread | None:
        """Return median, p10 and p90; None: there is no number yet."""
        if not self.count:
            return None
        steps = sorted(self._steps)
        values = [math.exp(step * self._STEP) for step in steps] if steps else sorted(self._kept)
        ends = list(accumulate(self._steps[step] for step in steps)) if steps else range(1, self.count + 1)
        return CaptionSpread(self.count, *(self._at(share, values, ends) for share in (0.5, 0.1, 0.9)))

    def _at(self, share: float, values: Sequence[float], ends: Sequence[int]) -> float:
        """Return the number that this share is below, between its two neighbours; value k ends at rank ends[k]."""
        rank = share * (self.count - 1)
        below, above = (values[bisect_right(ends, place)] for place in (math.floor(rank), math.ceil(rank)))
        return below + (above - below) * (rank - math.floor(rank))


class _Ratio:
    """Pairs of a plain and a speculative time of the same work."""

    def __init__(self) -> None:
        self._ours_s = 0.0
        self._plain_s = 0.0
        self._quantiles = Quantiles()

    def add(self, ours_s: float, speedup: float) -> None:
        self._ours_s += ours_s
        self._plain_s += ours_s * speedup
        self._quantiles.add(speedup)

    def speedup(self, mean_batch_size: float | None) -> PlainSpeedup | None:
        spread = self._quantiles.spread()
        if spread is None or not self._ours_s:
            return None
        of_totals = self._plain_s / self._ours_s
        return PlainSpeedup(**asdict(spread), of_totals=of_totals, mean_batch_size=mean_batch_size)


class _BatchSize:
    """The mean batch size over the time of the rounds.

    A row's `decode_s` is its share of the steps that it was in, so that shares weigh each step by its time.
    """

    def __init__(self) -> None:
        self._decode_s = 0.0
        self._weighted = 0.0

    def add(self, row: Row) -> None:
        if (size := row.get("mean_batch_size")) is not None:  # an earlier version wrote none
            self._decode_s += row["decode_s"]
            self._weighted += row["decode_s"] * size

    def mean(self) -> float | None:
        return self._weighted / self._decode_s if self._decode_s else None


class _Speedups:
    """Both kinds of speedup from one source of plain times."""

    def __init__(self) -> None:
        self._decode = _Ratio()
        self._end_to_end = _Ratio()
        self._batch_size = _BatchSize()

    def add(self, row: Row) -> None:
        self._batch_size.add(row)
        if row["decode_speedup"] is not None:
            self._decode.add(row["decode_s"], row["decode_speedup"])
        if row["e2e_speedup"] is not None:
            self._end_to_end.add(row["total_s"], row["e2e_speedup"])

    def decode(self) -> PlainSpeedup | None:
        return self._decode.speedup(self._batch_size.mean())

    def end_to_end(self) -> PlainSpeedup | None:
        return self._end_to_end.speedup(self._batch_size.mean())


def estimate_over_measured(row: Row) -> float | None:
    """Return a caption's plain time as estimated / as measured; None where it does not have both."""
    estimated, measured = row.get("estimated_token_s"), row.get("baseline_token_s")
    if row["speedup_source"] != "measured" or not estimated or not measured:
        return None
    return float(estimated / measured)


class Tally:
    """Counts rows and failures as they come; keeps a few sums, never the rows."""

    def __init__(self) -> None:
        self.captions = 0
        self.videos = 0
        self.tokens = 0
        self.failures: Counter[str] = Counter()
        self._drafts = 0
        self._accepted = 0
        self._compared = 0
        self._identical = 0
        self._steps = 0  # tokens after the first
        self._stages_s = dict.fromkeys(STAGES, 0.0)
        self._batch_size = _BatchSize()
        self._speedups = {"measured": _Speedups(), "estimated": _Speedups()}
        self._estimates = Quantiles()  # plain time as estimated / as measured
        self._names: dict[str, dict[str, None]] = {"target_model": {}, "draft_model": {}, "device": {}}

    def add(self, row: Row, *, first: bool | None = None) -> None:
        """Count one caption; `first`: of its video in this start, so that videos are counted too."""
        self.captions += 1
        self.videos += row["prompt_index"] == 0 if first is None else first
        self.tokens += row["completion_tokens"]
        self._drafts += row["num_drafts"]
        self._accepted += row["num_accepted_tokens"]
        self._steps += row["completion_tokens"] - 1
        self._add_stages(row)
        self._batch_size.add(row)
        for column, names in self._names.items():
            if row[column] is not None and len(names) < MOST_KINDS:
                names[row[column]] = None
        if (source := row["speedup_source"]) is not None:
            self._speedups[source].add(row)
            self._compared += row["exact_match"] is not None
            self._identical += row["exact_match"] is True
        if (error := estimate_over_measured(row)) is not None:
            self._estimates.add(error)

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
        """Return what is shown during the work; it takes no longer the more rows there were."""
        accepted = self._accepted / self._drafts if self._drafts else None
        for source, speedups in self._speedups.items():
            decode, end_to_end = speedups.decode(), speedups.end_to_end()
            if decode is not None or end_to_end is not None:
                return Running(accepted, decode, end_to_end, estimated=source == "estimated")
        return Running(accepted)

    def figures(self) -> Figures:
        """Return everything; for the end."""
        accepted = self._accepted / self._drafts if self._drafts else None
        measured, estimated = self._speedups["measured"], self._speedups["estimated"]
        decode_s = self._stages_s["decode_s"]
        return Figures(
            captions=self.captions,
            videos=self.videos,
            completion_tokens=self.tokens,
            mean_accepted_tokens=accepted,
            mean_acceptance_length=None if accepted is None else accepted + 1.0,
            compared=self._compared,
            identical=self._identical,
            decode=measured.decode(),
            end_to_end=measured.end_to_end(),
            decode_estimated=estimated.decode(),
            end_to_end_estimated=estimated.end_to_end(),
            estimate_over_measured=self._estimates.spread(),
            mean_batch_size=self._batch_size.mean(),
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
class Captioning:
    """How long a start captioned, and how well its decoders were fed.

    Attributes:
        seconds: Wall time of captioning: from the moment that the models were loaded to the last row.
        workers: Processes that decoded, each with its own models.
        waited_s: Time in which a worker had free slots and nothing to fill them with, summed over workers.
    """

    seconds: float = 0.0
    workers: int = 1
    waited_s: float = 0.0

    @property
    def waited_share(self) -> float | None:
        """Share of the captioning time in which the decoders waited for input; None: there was no such time."""
        whole_s = self.workers * self.seconds
        return min(self.waited_s / whole_s, 1.0) if whole_s else None


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
        captioning: How long it captioned; None where no caption was made.
        figures: The captions of this start; None where there was nothing to do.
        stopped: Why this start ended early; None where it did not.
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
    captioning: Captioning | None = None
    figures: Figures | None = None
    stopped: str | None = None
    failures_file: str | None = None

    @property
    def videos_per_hour(self) -> float | None:
        """Videos that got their captions / wall time of captioning; None: there were none."""
        per_s = self._per_s(self.figures.videos if self.figures else 0)
        return None if per_s is None else 3600.0 * per_s

    @property
    def caption_tokens_per_s(self) -> float | None:
        """Tokens of captions / wall time of captioning; None: there were none."""
        return self._per_s(self.figures.completion_tokens if self.figures else 0)

    def _per_s(self, number: int) -> float | None:
        seconds = self.captioning.seconds if self.captioning else 0.0
        return number / seconds if number and seconds else None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        plain = asdict(self)
        captioning = plain.pop("captioning")
        return {
            "schema": 1,
            **plain,
            "exit_code": int(self.exit_code),
            "videos_per_hour": self.videos_per_hour,
            "caption_tokens_per_s": self.caption_tokens_per_s,
            "captioning_s": captioning and captioning["seconds"],
            "workers": captioning and captioning["workers"],
            "waited_s": captioning and captioning["waited_s"],
            "waited_share": self.captioning and self.captioning.waited_share,
        }
