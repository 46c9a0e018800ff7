"""What a bench measures: one timed caption, one configuration summed up, and the report of all of them.

Plain data that becomes plain JSON; knows neither models nor how anything was timed. Imports no torch.
Times end in `_s`, sizes in `_bytes`, shares are 0..1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from specvlm.config import PrunerName, TreeName

SCHEMA = 1

MethodName = Literal["stock", "assisted", "plain", "sd", "specvlm", "head"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
BASELINES: tuple[MethodName, ...] = ("stock", "plain")  # what speedups are given against, the first one first


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to caption the videos; one row of the table.

    Attributes:
        method: `stock` and `assisted` are `transformers`' own `generate()`, without and with its
            `assistant_model`; `plain` is our loop without a draft, `sd` with a small model as the draft that sees all
            video tokens, `specvlm` with one that sees the kept ones, `head` with a trained head and its compressor.
        frames_asked: Frames asked of each video; None: the preset's own rule decides.
        pruner: Which video tokens the draft sees; None where there is nothing to prune.
        prune_ratio: Share of video tokens that the draft does not see; None as above.
        tree: Shape of the guesses; None without our rounds.
        draft: Name of the draft; None where there is none, or a captioner's only one.
        draft_label: What the label says of the draft; nothing where it is the only one of its kind.
        batch_size: Most captions in the making at once.
        depth: Of a chain, where it is not the default; else None.
        exact: Near-ties are decided by plain steps, see `GenerationSettings`.
    """

    method: MethodName
    frames_asked: int | None = None
    pruner: PrunerName | None = None
    prune_ratio: float | None = None
    tree: TreeName | None = None
    draft: str | None = None
    draft_label: str = ""
    batch_size: int = 1
    depth: int | None = None
    exact: bool = True

    @property
    def label(self) -> str:
        """The configuration in a few words, frames and batch size left out, e.g. `specvlm 0.9 static` or `sd static`.

        The pruner is named where it is not the one that has the method's name, the draft where there are several.
        """
        if self.method != "specvlm" or self.pruner is None or self.prune_ratio is None:
            words: list[str] = [self.method]
        elif self.pruner == "none":
            words = [self.method, self.pruner]
        else:
            words = [
                self.method,
                *([] if self.pruner == "specvlm" else [self.pruner]),
                f"{self.prune_ratio:g}",
            ]
        words += [self.tree] if self.tree else []
        words += [] if self.depth is None else [str(self.depth)]
        whole = " ".join(words if self.exact else [*words, "no-exact"])
        return f"{whole}, {self.draft_label}" if self.draft_label else whole


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the wall time of a caption went. The stages follow each other, and their sum is the whole.

    What cannot be had apart is 0 here, null in JSON, and its time is in a coarser stage: `generate()` of
    `transformers` reports only when its first token came, so its captions have `prefill_s` and `steps_s` in place of
    what lies between; see `untold`.

    Attributes:
        read_s: Opening the file, choosing and decoding its frames.
        preprocess_s: The processor.
        vision_s: The target's vision tower and the embedding of the prompt.
        target_prefill_s: The target's prefill.
        draft_prefill_s: Pruning, the draft's vision tower and its prefill.
        prefill_s: `transformers`' own methods: all between the processor and the first token.
        draft_s: Rounds: the draft proposes.
        verify_s: Rounds: the target scores the nodes. Of `plain`, its steps.
        commit_s: Rounds: caches keep what was accepted.
        host_s: Rounds: what is none of the three, decode_s - draft_s - verify_s - commit_s.
        steps_s: `transformers`' own methods: all after the first token.
        rest_s: Before, between and after; total_s less all others.
    """

    read_s: float = 0.0
    preprocess_s: float = 0.0
    vision_s: float = 0.0
    target_prefill_s: float = 0.0
    draft_prefill_s: float = 0.0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    commit_s: float = 0.0
    host_s: float = 0.0
    steps_s: float = 0.0
    rest_s: float = 0.0


STAGES: tuple[str, ...] = tuple(f.name for f in fields(Stages))  # in the order in which they happen
_WHOLE = ("prefill_s", "steps_s")  # of `transformers`' own methods, in place of what lies between
_PARTS = ("vision_s", "target_prefill_s", "draft_prefill_s", "draft_s", "verify_s", "commit_s", "host_s")


def untold(method: MethodName) -> tuple[str, ...]:
    """Stages that a method cannot tell apart; in JSON and in rows they are null, not 0."""
    return _PARTS if method in ("stock", "assisted") else _WHOLE


@dataclass(frozen=True, slots=True)
class TimedCaption:
    """One timed caption.

    Attributes:
        configuration: How it was made.
        video: Name of the clip.
        turn: Which of the repeated turns, from 1; the warm-up is turn 0 and is not kept.
        num_frames: F, frames that the model saw; fewer than asked where the video has no more.
        video_tokens: V, video tokens that the target saw.
        video_tokens_kept: Video tokens that the draft saw; 0 without a draft.
        prompt_tokens: S, video tokens included.
        token_ids: The caption, the end-of-sequence token included.
        stages: Where the time went; they sum to `total_s`.
        decode_s: All after the first token; of `assisted`, all after its first round.
        decode_tokens: Tokens that came in that time.
        total_s: From the file to the text, reading and preprocessing included.
        num_drafts: Rounds; 0 without our draft.
        num_draft_tokens: Guesses of all rounds.
        num_accepted_tokens: Guesses that the caption uses.
        acceptance_histogram: Entry k counts the rounds that accepted k guesses; empty without our draft.
        depth_tries: Entry d - 1 counts the rounds whose guess at depth d was judged; see `CaptionStats`.
        peak_memory_bytes: Of the device's allocator for this caption (CUDA), or of the process so far (CPU).
        compressor: What a trained head's compressor did to the video; None without a head.
        mean_batch_size: How many captions shared its steps, the mean over its steps.
        settled_tokens: Tokens that a plain step decided, because a round could not be trusted with a near-tie.
    """

    configuration: Configuration
    video: str
    turn: int
    num_frames: int
    video_tokens: int
    video_tokens_kept: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    stages: Stages
    decode_s: float
    decode_tokens: int
    total_s: float
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_histogram: tuple[int, ...]
    depth_tries: tuple[int, ...]
    peak_memory_bytes: int
    compressor: str | None = None
    mean_batch_size: float = 1.0
    settled_tokens: int = 0

    def as_row(self) -> dict[str, Any]:
        """One flat row: with the fields of the configuration and the stages."""
        row = asdict(self)
        flat = {**row.pop("configuration"), **row, **row["stages"]}
        del flat["stages"], flat["draft_label"]
        return _plain(flat | dict.fromkeys(untold(self.configuration.method)))


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the turns of a bench: its median, and what a tenth of the turns stay below and above."""

    p10: float
    median: float
    p90: float


@dataclass(frozen=True, slots=True)
class Speedup:
    """How much faster a configuration is than a baseline on the same videos, in the same process.

    Attributes:
        baseline: The baseline's method.
        decode: Ratio of totals: the baseline's time per token after the first / this one's. None where captions
            have a single token.
        e2e: Ratio of totals: the baseline's total_s / this one's total_s.
        decode_median: Median over videos of each video's own ratio; None as above.
        e2e_median: The same, end to end.
        decode_turns: Over turns of each turn's ratio of totals; None with a single turn.
        e2e_turns: The same, end to end.
    """

    baseline: MethodName
    decode: float | None
    e2e: float
    decode_median: float | None
    e2e_median: float
    decode_turns: Spread | None = None
    e2e_turns: Spread | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """One configuration summed up: of each video the typical turn, of these the total over videos.

    The typical turn of a video is the one whose total_s is the median, with an even number of turns the faster of
    the two in the middle. All times and counts are of it, so they hang together: the stages sum to `total_s`. In
    batches videos share their time, so it is one turn for all videos, by the total of all of them.

    Attributes:
        configuration: What is summed up.
        error: Why there are no figures, in one line; None: there are. With an error all figures are 0 or None here,
            and null in JSON.
        videos: Videos that it captioned.
        turns: Timed captions of each video.
        num_frames: Mean F over videos; with an error, that of another configuration with the same frames asked.
        video_tokens: Mean V over videos.
        video_tokens_kept: Mean over videos of what the draft saw; 0 without a draft.
        completion_tokens: Total over videos.
        stages: Total over videos; they sum to `total_s`.
        decode_s: Total over videos.
        decode_tokens: Tokens that came in that time.
        total_s: Total over videos.
        token_s: decode_s / decode_tokens; None where captions have a single token.
        speedups: Against each of `BASELINES` that ran with the same frames, itself left out.
        num_drafts: Rounds, total over videos.
        num_draft_tokens: Guesses of these rounds.
        num_accepted_tokens: Guesses of these rounds that captions use.
        plain_steps: Steps in which the draft was left out, as `--tree auto` does where guessing would not pay;
            total over videos, 0 without our draft.
        mean_nodes: num_draft_tokens / num_drafts + 1, nodes of a round with the root; None without rounds.
        mean_accepted_tokens: num_accepted_tokens / num_drafts, without the bonus token; None without rounds.
        acceptance_per_depth: Entry d - 1 is P(the guess at depth d accepted | that at depth d - 1 accepted);
            None where no round came that far.
        exact_match: Share of captions, of all turns, equal, token for token, to the reference's of the same video;
            None where there is no reference, or this is it.
        exact_match_against: `stock`, or `plain` where stock did not run; None as above.
        plain_token_s: T_plain of the formula, of `plain` in the same process; None where it did not run.
        draft_round_s: T_draft of a round: stages.draft_s / num_drafts, of a head with commit_s, in which it reads what
            was accepted; None without rounds.
        verify_round_s: T_verify of a round: stages.verify_s, less T_plain for each plain step, likewise.
        predicted_decode_speedup: (mean_accepted_tokens + 1) x T_plain / (draft_round_s + verify_round_s), against
            plain, plain steps counting as such; None where a term is missing.
        measured_over_predicted: Measured decode speedup against plain / the predicted one.
        host_share: host_s / decode_s; None without our rounds.
        limit: Which term is the limit, in words; empty where nothing can be said.
        peak_memory_bytes: Largest of all turns. Of a process it holds what ran before, so that JSON has null
            here, and `BenchReport.process_peak_bytes` for all.
        compressors: What a trained head's compressor did to the videos, the commonest first; empty without a head.
        videos_per_hour: 3600 x videos / total_s.
        videos_per_hour_turns: The same over turns; None with a single turn.
        tokens_per_s: completion_tokens / total_s: of wall time, all that comes before the first token included.
        mean_batch_size: Mean over videos of how many captions shared their steps.
        settled_share: Share of `completion_tokens` that a plain step decided; None of `transformers`' own methods.
    """

    configuration: Configuration
    error: str | None = None
    videos: int = 0
    turns: int = 0
    num_frames: float = 0.0
    video_tokens: float = 0.0
    video_tokens_kept: float = 0.0
    completion_tokens: int = 0
    stages: Stages = field(default_factory=Stages)
    decode_s: float = 0.0
    decode_tokens: int = 0
    total_s: float = 0.0
    token_s: float | None = None
    speedups: tuple[Speedup, ...] = ()
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    plain_steps: int = 0
    mean_nodes: float | None = None
    mean_accepted_tokens: float | None = None
    acceptance_per_depth: tuple[float | None, ...] = ()
    exact_match: float | None = None
    exact_match_against: MethodName | None = None
    plain_token_s: float | None = None
    draft_round_s: float | None = None
    verify_round_s: float | None = None
    predicted_decode_speedup: float | None = None
    measured_over_predicted: float | None = None
    host_share: float | None = None
    limit: str = ""
    peak_memory_bytes: int = 0
    compressors: tuple[str, ...] = ()
    videos_per_hour: float | None = None
    videos_per_hour_turns: Spread | None = None
    tokens_per_s: float | None = None
    mean_batch_size: float = 0.0
    settled_share: float | None = None

    def speedup(self, baseline: MethodName) -> Speedup | None:
        """The speedup against one baseline; None where it did not run, or this is it."""
        return next((one for one in self.speedups if one.baseline == baseline), None)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, the configuration's fields and its label first; what was not measured is null."""
        whole = asdict(self)
        configuration = whole.pop("configuration")
        del configuration["draft_label"]
        if self.error is not None:
            whole |= dict.fromkeys(name for name in whole if name not in _WITHOUT_FIGURES)
            whole["stages"] = dict.fromkeys(STAGES)
        whole["stages"] |= dict.fromkeys(untold(self.configuration.method))
        return _plain({"label": self.configuration.label, **configuration, **whole})


_WITHOUT_FIGURES = (
    "error",
    "videos",
    "turns",
    "speedups",
    "acceptance_per_depth",
    "limit",
    "compressors",
)  # said of a failure too


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the figures hold for.

    Attributes:
        started_at: ISO 8601, UTC.
        command: The command line that gives them again.
        machine: Architecture and system, e.g. `x86_64 Linux`.
        processor: Name of the CPU; empty where the system does not tell.
        device: Where the target ran, e.g. `cpu` or `NVIDIA H200`.
        cores: Cores that this process may use.
        threads: torch's threads.
        python_version: Python's.
        torch_version: torch's.
        transformers_version: transformers'.
        specvlm_version: This package's.
        dtype: Of weights and caches.
        target: As the user named it; a preset's by its own name.
        draft: As the target; of several, their names after each other, with commas; None: none.
        family: As `model_type` in config.json.
        prompt: What was asked.
        max_new_tokens: Most tokens of a caption.
        repeat: Timed turns, after one of warm-up.
        clips: Which clips, in words.
        videos: Their names, in order.
        peak_memory_of: `device`: of each caption; `process`: the process's peak so far, which cannot be reset, so
            that a method's figure holds all that ran before it.
        frame_multiple: The target takes multiples of so many frames.
        repeated_to: Captions of a turn, where a batch needs more videos than there are, so that they are repeated;
            None: each video once.
    """

    started_at: str
    command: str
    machine: str
    processor: str
    device: str
    cores: int
    threads: int
    python_version: str
    torch_version: str
    transformers_version: str
    specvlm_version: str
    dtype: str
    target: str
    draft: str | None
    family: str
    prompt: str
    max_new_tokens: int
    repeat: int
    clips: str
    videos: tuple[str, ...]
    peak_memory_of: Literal["device", "process"]
    frame_multiple: int = 1
    repeated_to: int | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """A video that was left out, and why, in one line."""

    video: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All of it.

    Attributes:
        conditions: What the figures hold for.
        summaries: One for each configuration, in the order asked for, frames outermost.
        samples: Every timed caption.
        left_out: Videos that could not be read.
        stopped: It was stopped early; of each video the whole turns until then are kept.
    """

    conditions: Conditions
    summaries: tuple[Summary, ...]
    samples: tuple[TimedCaption, ...]
    left_out: tuple[Left, ...] = ()
    stopped: bool = False

    @property
    def is_batched(self) -> bool:
        """Whether captions were made several at once."""
        return any(one.configuration.batch_size > 1 for one in self.summaries)

    @property
    def process_peak_bytes(self) -> int | None:
        """The process's peak with all methods; None if the device reports each caption's, or nothing was measured."""
        if self.conditions.peak_memory_of == "device":
            return None
        return max((one.peak_memory_bytes for one in self.summaries), default=0) or None

    def as_json(self, samples: bool = False) -> dict[str, Any]:
        """Plain JSON; `schema` grows when a name in it changes its meaning."""
        whole = {
            "schema": SCHEMA,
            "conditions": _plain(asdict(self.conditions)),
            "process_peak_bytes": self.process_peak_bytes,
            "summaries": [self._summary_json(one) for one in self.summaries],
            "left_out": [asdict(one) for one in self.left_out],
            "stopped": self.stopped,
        }
        return whole | ({"samples": rows_of(self.samples)} if samples else {})

    def _summary_json(self, one: Summary) -> dict[str, Any]:
        told = one.as_json()
        return told | {"peak_memory_bytes": None} if self.conditions.peak_memory_of == "process" else told


def rows_of(samples: Iterable[TimedCaption]) -> list[dict[str, Any]]:
    """Samples as flat rows."""
    return [one.as_row() for one in samples]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, all the way down."""
    plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return plain
