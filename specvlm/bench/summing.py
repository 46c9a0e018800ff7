"""Samples -> summaries: typical turns, totals, ratios, what the formula predicts, and which term is the limit.

Plain arithmetic over records; knows neither models nor clocks. Imports no torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean, median, quantiles
from typing import NamedTuple, TypeVar

from specvlm.bench.grid import HEAD
from specvlm.bench.records import (
    BASELINES,
    STAGES,
    Configuration,
    MethodName,
    Speedup,
    Spread,
    Stages,
    Summary,
    TimedCaption,
)

_T = TypeVar("_T")
_BEFORE = {  # the stages before the first token, in words
    "read_s": "reading",
    "preprocess_s": "preprocessing",
    "vision_s": "vision",
    "target_prefill_s": "the target's prefill",
    "draft_prefill_s": "the draft's prefill",
    "prefill_s": "vision and prefill",
}
_LEAST_GAIN = 1.1  # what would gain less is no limit
_MOSTLY = 0.5  # from this share of the time on, what comes before the first token is named first


def summarise(
    configurations: Iterable[Configuration],
    samples: Iterable[TimedCaption],
    errors: Mapping[Configuration, str] | None = None,
) -> tuple[Summary, ...]:
    """Sum up each configuration, in the order given.

    Configurations are compared with those of the same frames and batch size, over the videos that both captioned.

    Args:
        configurations: What was asked for.
        samples: Timed captions, in any order.
        errors: Configurations that failed, and why; their samples do not count.
    """
    failed = {} if errors is None else errors
    groups: dict[Configuration, _Group] = {}
    for sample in samples:
        if sample.configuration not in failed:
            groups.setdefault(sample.configuration, _Group(sample.configuration)).add(sample)
    return tuple(
        _summary(groups[one], _peers(one, groups), _alone(one, groups))
        if one in groups
        else Summary(
            one,
            error=failed.get(one, "no video could be captioned"),
            num_frames=_frames_of_others(one, groups),
        )
        for one in configurations
    )


class _Group:
    """The samples of one configuration, by video."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.videos: dict[str, list[TimedCaption]] = defaultdict(list)

    def add(self, sample: TimedCaption) -> None:
        self.videos[sample.video].append(sample)

    def all(self) -> list[TimedCaption]:
        return [sample for turns in self.videos.values() for sample in turns]

    def typical(self) -> dict[str, TimedCaption]:
        """Of each video the turn whose total time is the median, so that all of its figures hang together.

        Videos of a batch share their time: there it is one turn, by the total of all videos.
        """
        if self.configuration.batch_size > 1:
            turns = self.turns()
            return turns[_middle(turns, key=lambda turn: _total_s(turns[turn].values()))]
        return {video: _middle(turns, key=lambda one: one.total_s) for video, turns in self.videos.items()}

    def turns(self) -> dict[int, dict[str, TimedCaption]]:
        """The turns that have all videos: their samples by video."""
        found: dict[int, dict[str, TimedCaption]] = defaultdict(dict)
        for sample in self.all():
            found[sample.turn][sample.video] = sample
        return {turn: samples for turn, samples in found.items() if len(samples) == len(self.videos)}

    def only(self, videos: Iterable[str]) -> _Group:
        """The same, of these videos alone."""
        part = _Group(self.configuration)
        part.videos.update((video, self.videos[video]) for video in videos)
        return part


def _middle(values: Iterable[_T], key: Callable[[_T], float]) -> _T:
    """The value in the middle; of two, the smaller one."""
    ordered = sorted(values, key=key)
    return ordered[(len(ordered) - 1) // 2]


def _total_s(samples: Iterable[TimedCaption]) -> float:
    return sum(one.total_s for one in samples)


def _spread(values: Sequence[float]) -> Spread | None:
    """Over turns; None where there is only one."""
    if len(values) < 2:
        return None
    tenths = quantiles(values, n=10, method="inclusive")
    return Spread(tenths[0], median(values), tenths[-1])


def _frames_of_others(failed: Configuration, groups: Mapping[Configuration, _Group]) -> float:
    """Frames that others read where a configuration failed that was asked for as many."""
    others = (group for one, group in groups.items() if one.frames_asked == failed.frames_asked)
    return next((fmean(one.num_frames for one in group.typical().values()) for group in others), 0.0)


def _token_s(samples: Iterable[TimedCaption]) -> float | None:
    """Time per token of all of them together."""
    samples = list(samples)
    return _over(sum(one.decode_s for one in samples), sum(one.decode_tokens for one in samples))


@dataclass(frozen=True, slots=True)
class _RoundTerms:
    """The terms of the formula (see docs/bench.md), each None where it was not measured."""

    plain_steps: int = 0
    accepted: float | None = None
    draft_s: float | None = None
    verify_s: float | None = None


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _peers(own: Configuration, groups: Mapping[Configuration, _Group]) -> dict[MethodName, _Group]:
    """The baselines that ran with the same frames and batch size."""
    return {
        one.method: group
        for method in BASELINES
        for one, group in groups.items()
        if (one.method, one.frames_asked, one.batch_size) == (method, own.frames_asked, own.batch_size)
    }


def _alone(own: Configuration, groups: Mapping[Configuration, _Group]) -> _Group | None:
    """The same configuration with a batch size of 1; None: it did not run, or this is it."""
    alone = replace(own, batch_size=1)
    return None if alone == own else groups.get(alone)


def _summary(group: _Group, peers: Mapping[MethodName, _Group], alone: _Group | None) -> Summary:
    samples, plain = list(group.typical().values()), peers.get("plain")
    others = [peer for peer in peers.values() if peer is not group]
    reference = _reference(group.configuration.method, peers) or alone
    total_s, tokens = _total_s(samples), sum(len(one.token_ids) for one in samples)
    turns_s = [_total_s(turn.values()) for turn in group.turns().values()]
    stages = _stages(samples)
    plain_token_s = None if plain is None else _token_s(plain.typical().values())
    terms = _rounds(samples, stages, plain_token_s)
    summary = Summary(
        configuration=group.configuration,
        videos=len(group.videos),
        turns=min(map(len, group.videos.values())),
        num_frames=fmean(one.num_frames for one in samples),
        video_tokens=fmean(one.video_tokens for one in samples),
        video_tokens_kept=fmean(one.video_tokens_kept for one in samples),
        completion_tokens=tokens,
        stages=stages,
        decode_s=sum(one.decode_s for one in samples),
        decode_tokens=sum(one.decode_tokens for one in samples),
        total_s=total_s,
        token_s=_token_s(samples),
        speedups=tuple(found for peer in others if (found := _speedup(group, peer))),
        num_drafts=sum(one.num_drafts for one in samples),
        num_draft_tokens=sum(one.num_draft_tokens for one in samples),
        num_accepted_tokens=sum(one.num_accepted_tokens for one in samples),
        plain_steps=terms.plain_steps,
        mean_nodes=_mean_nodes(samples),
        mean_accepted_tokens=terms.accepted,
        acceptance_per_depth=acceptance_per_depth(
            (one.acceptance_histogram for one in samples), (one.depth_tries for one in samples)
        ),
        exact_match=None if reference is None else _exact(group, reference),
        exact_match_against=None if reference is None else reference.configuration.method,
        plain_token_s=plain_token_s,
        draft_round_s=terms.draft_s,
        verify_round_s=terms.verify_s,
        peak_memory_bytes=max(one.peak_memory_bytes for one in group.all()),
        compressors=_commonest(one.compressor for one in samples),
        videos_per_hour=_over(3600.0 * len(samples), total_s),
        videos_per_hour_turns=_spread([3600.0 * len(samples) / one for one in turns_s]),
        tokens_per_s=_over(tokens, total_s),
        mean_batch_size=fmean(one.mean_batch_size for one in samples),
        settled_share=_settled_share(samples),
    )
    return _judged(summary)


def _settled_share(samples: Sequence[TimedCaption]) -> float | None:
    if samples[0].configuration.method in ("stock", "assisted"):
        return None
    return sum(one.settled_tokens for one in samples) / sum(len(one.token_ids) for one in samples)


def _commonest(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(name for name, _ in Counter(filter(None, names)).most_common())


def _reference(method: MethodName, peers: Mapping[MethodName, _Group]) -> _Group | None:
    """Whose captions are the right ones: the first baseline there is; a baseline itself looks at those before."""
    before = BASELINES[: BASELINES.index(method)] if method in BASELINES else BASELINES
    return next((peers[one] for one in before if one in peers), None)


def _stages(samples: Sequence[TimedCaption]) -> Stages:
    return Stages(**{name: sum(getattr(one.stages, name) for one in samples) for name in STAGES})


def _judged(summary: Summary) -> Summary:
    """Add what follows from the other figures."""
    host_share = None
    if summary.num_drafts or summary.configuration.method == "plain":
        host_share = _over(summary.stages.host_s, summary.decode_s)
    predicted = predicted_speedup(summary)
    measured = summary.speedup("plain")
    over = measured.decode / predicted if predicted and measured and measured.decode else None
    summary = replace(
        summary,
        predicted_decode_speedup=predicted,
        measured_over_predicted=over,
        host_share=host_share,
    )
    return replace(summary, limit=limit(summary))


def _rounds(samples: Sequence[TimedCaption], stages: Stages, plain_token_s: float | None) -> _RoundTerms:
    rounds = sum(one.num_drafts for one in samples)
    if not rounds:
        return _RoundTerms()
    steps = sum(map(_plain_steps, samples))
    verify_s = None if steps and plain_token_s is None else stages.verify_s - steps * (plain_token_s or 0.0)
    return _RoundTerms(
        plain_steps=steps,
        accepted=sum(one.num_accepted_tokens for one in samples) / rounds,
        draft_s=_drafting_s(samples[0].configuration, stages) / rounds,
        verify_s=None if verify_s is None else max(verify_s, 0.0) / rounds,
    )


def _drafting_s(how: Configuration, stages: Stages) -> float:
    """Time in which the draft is at work; a head reads what was accepted while caches are committed."""
    return stages.draft_s + (stages.commit_s if how.method == HEAD else 0.0)


def _other_s(how: Configuration, stages: Stages) -> float:
    """Time of rounds in which neither draft nor target is at work."""
    return stages.host_s + (0.0 if how.method == HEAD else stages.commit_s)


def _plain_steps(sample: TimedCaption) -> int:
    """Tokens that came neither from a guess nor as a round's bonus; a caption's last round may have no bonus."""
    if not sample.num_drafts:
        return 0
    return max(sample.decode_tokens - sample.num_accepted_tokens - sample.num_drafts, 0)


def _mean_nodes(samples: Sequence[TimedCaption]) -> float | None:
    rounds = sum(one.num_drafts for one in samples)
    return 1.0 + sum(one.num_draft_tokens for one in samples) / rounds if rounds else None


def _speedup(group: _Group, baseline: _Group) -> Speedup | None:
    """Compare over the videos that both captioned; None where there is none."""
    shared = [video for video in group.videos if video in baseline.videos]
    if not shared:
        return None
    group, baseline = group.only(shared), baseline.only(shared)
    ours, theirs = group.typical(), baseline.typical()
    decode = [_ratio(_token_s([theirs[video]]), _token_s([ours[video]])) for video in shared]
    whole = [(theirs[video].total_s, ours[video].total_s) for video in shared]
    known = [one for one in decode if one is not None]
    mine, base = group.turns(), baseline.turns()
    turns = [(base[turn].values(), mine[turn].values()) for turn in mine if turn in base]
    of_turns = [_ratio(_token_s(before), _token_s(after)) for before, after in turns]
    return Speedup(
        baseline=baseline.configuration.method,
        decode=_ratio(_token_s(theirs.values()), _token_s(ours.values())),
        e2e=_total_s(theirs[video] for video in shared) / _total_s(ours[video] for video in shared),
        decode_median=median(known) if known else None,
        e2e_median=median(before / after for before, after in whole),
        decode_turns=_spread([one for one in of_turns if one is not None]),
        e2e_turns=_spread([_total_s(before) / _total_s(after) for before, after in turns]),
    )


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def _exact(group: _Group, reference: _Group) -> float | None:
    same = [
        one.token_ids == reference.videos[one.video][0].token_ids
        for one in group.all()
        if one.video in reference.videos
    ]
    return fmean(same) if same else None


def acceptance_per_depth(
    histograms: Iterable[Sequence[int]], tries: Iterable[Sequence[int]]
) -> tuple[float | None, ...]:
    """P(the guess at depth d accepted | that at depth d - 1 accepted), d = 1, 2, ...

    Args:
        histograms: Per caption, rounds by accepted guesses.
        tries: Per caption, rounds by depths at which a guess was judged. A round whose tree or caption ended above
            a depth says nothing of it.
    """
    counts, judged = _sums(histograms), _sums(tries)
    accepted = [sum(counts[depth:]) for depth in range(1, len(counts))]
    return tuple(_over(right, tried) for right, tried in zip_longest(accepted, judged, fillvalue=0))


def _sums(columns: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*columns, fillvalue=0)]


def predicted_speedup(summary: Summary) -> float | None:
    """(mean_accepted_tokens + 1) x T_plain / (T_draft + T_verify), of one round; None where a term is missing.

    T_draft is the drafting of all levels. What commits, and what the host does between, is left out: what was
    measured stays below by that much. Plain steps give one token each and cost T_plain.
    """
    accepted, plain = summary.mean_accepted_tokens, summary.plain_token_s
    if accepted is None or plain is None or summary.draft_round_s is None or summary.verify_round_s is None:
        return None
    steps_a_round = summary.plain_steps / summary.num_drafts
    round_s = summary.draft_round_s + summary.verify_round_s + steps_a_round * plain
    return (accepted + 1.0 + steps_a_round) * plain / round_s if round_s else None


# --- in words ---


def limit(summary: Summary) -> str:
    """Say which term is the limit: the one whose ideal would gain most."""
    before = {name: getattr(summary.stages, name) for name in _BEFORE}
    share = sum(before.values()) / summary.total_s if summary.total_s else 0.0
    decoding = _limit_of_rounds(summary) if summary.num_drafts else ""
    if not summary.num_drafts and summary.configuration.tree == "auto":
        decoding = "nothing was guessed: by what rounds cost here and now, plain decoding promised more"
    if share <= _MOSTLY:
        return decoding or f"decoding, token by token, takes {_percent(1.0 - share)} of the time"
    largest = max(before, key=lambda name: before[name])
    first = f"{_percent(share)} of the time passes before the first token, most of it in {_BEFORE[largest]}"
    return f"{first}; then {decoding}" if decoding else first


class _Ideal(NamedTuple):
    """A term of a round, and how many times as fast decoding would be at its best."""

    cost: str
    ideal: str
    gain: float


def _limit_of_rounds(summary: Summary) -> str:
    if summary.plain_token_s is None or summary.draft_round_s is None or summary.verify_round_s is None:
        return _largest_share(summary)
    step_s = summary.plain_token_s
    draft, verify = summary.draft_round_s / step_s, summary.verify_round_s / step_s
    other = _other_s(summary.configuration, summary.stages) / summary.num_drafts / step_s
    whole = draft + verify + other
    accepted, nodes = summary.mean_accepted_tokens or 0.0, summary.mean_nodes or 1.0
    deepest = min(len(summary.acceptance_per_depth), nodes - 1.0)
    ideals = [
        _Ideal(
            f"drafting costs {draft:.1f} plain steps a round",
            "if it were free",
            whole / max(whole - draft, 1e-9),
        ),
        _Ideal(
            f"verifying {nodes:.0f} nodes costs {verify:.1f} plain steps",
            "at the cost of one",
            whole / (whole - max(verify - 1.0, 0.0)),
        ),
        _Ideal(
            f"all but drafting and verifying costs {other:.1f} plain steps a round",
            "without that",
            whole / max(whole - other, 1e-9),
        ),
        _Ideal(
            f"{accepted:.1f} of {deepest:.0f} guesses in a row are accepted",
            "if all were",
            (deepest + 1.0) / (accepted + 1.0),
        ),
    ]
    best = max(ideals, key=lambda one: one.gain)
    if best.gain < _LEAST_GAIN:
        return (
            f"no term stands out: a round costs {whole:.1f} plain steps and gives {accepted + 1.0:.1f} tokens"
        )
    return f"{best.cost}; {best.ideal}, decoding would be {best.gain:.1f} x as fast"


def _largest_share(summary: Summary) -> str:
    """Without plain steps to compare with, the largest share of a round."""
    how, stages = summary.configuration, summary.stages
    parts = {
        "drafting": _drafting_s(how, stages),
        "verifying": stages.verify_s,
        "all but drafting and verifying": _other_s(how, stages),
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name} takes {_percent(parts[name] / summary.decode_s)} of a round" if summary.decode_s else ""


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %"
