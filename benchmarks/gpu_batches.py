"""Many videos in flight on a GPU: one part of benchmarks/gpu.py.

Stock `generate()` left-padded, plain decoding and each tree at several batch sizes: on a demo pair, whose captions are
compared, and on a pair of published shapes, whose time is measured (modelled: random weights, assumed acceptance). Then
the ways in which rounds attend, on one batch of videos of different lengths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from gpu_held import Held
from modelled import ModelledCaptioner, random_clip

from specvlm.attention import RoundAttention
from specvlm.bench.batches import SetMeasurer, SetVideo
from specvlm.bench.measure import MethodError, facts_of
from specvlm.bench.records import Configuration, TimedCaption
from specvlm.captioner import Captioner
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.records import Frames
from specvlm.tree import ROOT

WAYS = (
    Configuration("stock"),
    Configuration("plain"),
    *(Configuration("specvlm", None, "specvlm", 0.9, tree) for tree in ("chain", "static", "auto")),
)
Fits = Callable[[str, float], bool]  # whether so many seconds are left for something


@dataclass(frozen=True)
class Batches:
    """What is asked of batches."""

    sizes: tuple[int, ...]  # rising, from 1
    turns: int  # counted, after one that warms up
    new_tokens: int
    rows: int  # of the batch whose attention is compared
    rounds: int  # timed in a row


def _set_of(captioner: Captioner, clips: Sequence[Frames], prompt: str) -> list[SetVideo]:
    found = []
    for number, clip in enumerate(clips):
        facts = facts_of(str(number), captioner.prepare(clip, prompt))
        found.append(SetVideo(facts._replace(preprocess_s=0.0), clip, prompt))
    return found


def way_of(how: Configuration) -> str:
    """A method's name in the tables."""
    return how.tree or how.method


def batch_parity(
    captioner: Captioner, model: str, clips: Sequence[Frames], prompt: str, asked: Batches
) -> list[dict[str, Any]]:
    """How many captions of each way and batch size equal those that stock `generate()` writes of each video alone."""
    measurer, some = SetMeasurer(captioner, asked.new_tokens), _set_of(captioner, clips, prompt)
    alone = [one.token_ids for one in measurer.measure_set(WAYS[0], some, 1)]
    rows = []
    for size in asked.sizes:
        for how in WAYS:
            samples = measurer.measure_set(replace(how, batch_size=size), some, 1)
            exact = sum(one.token_ids == tokens for one, tokens in zip(samples, alone, strict=True))
            rows.append(
                {
                    "model": model,
                    "batch_size": size,
                    "way": way_of(how),
                    "captions": len(some),
                    "exact": exact,
                }
            )
    return rows


def batch_speed(
    captioner: ModelledCaptioner, frames: int, asked: Batches, fits: Fits
) -> Iterator[dict[str, Any]]:
    """Full batches of videos of one length, from prepared inputs to tokens; figures are medians over turns.

    A batch size is left out where the last one says that the time left is too short for it.
    """
    measurer, last_s = SetMeasurer(captioner, asked.new_tokens), 0.0
    assert captioner.pair.draft is not None
    where = {
        "target": captioner.pair.target.name,
        "draft": captioner.pair.draft.name,
        "frames": frames,
        "modelled": True,
    }
    for size in asked.sizes:
        if not fits(f"batches of {size}", 4 * last_s):
            return
        some = _set_of(captioner, [random_clip(frames, seed) for seed in range(size)], "")
        turns = [_one_turn(measurer, some, size, turn) for turn in range(asked.turns + 1)]
        last_s = sum(sum(one.total_s for one in found) for turn in turns for found, _ in turn)
        yield from _speed_rows(turns[1:], size, where)


def _one_turn(
    measurer: SetMeasurer, some: Sequence[SetVideo], size: int, turn: int
) -> list[tuple[list[TimedCaption], str | None]]:
    """Every way once, each turn beginning with another one; in the order of `WAYS`. Or why there are no samples."""
    found: dict[Configuration, tuple[list[TimedCaption], str | None]] = {}
    first = turn % len(WAYS)
    for how in (*WAYS[first:], *WAYS[:first]):
        try:
            found[how] = measurer.measure_set(replace(how, batch_size=size), some, turn), None
        except MethodError as error:
            found[how] = [], str(error)[:200]
    return [found[how] for how in WAYS]


def _speed_rows(
    turns: Sequence[Sequence[tuple[list[TimedCaption], str | None]]], size: int, where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    walls: dict[str, list[float]] = {}
    for number, how in enumerate(WAYS):
        ran = [turn[number] for turn in turns]
        errors = [error for _, error in ran if error is not None]
        walls[way_of(how)] = [sum(one.total_s for one in samples) for samples, _ in ran]
        yield where | {
            "batch_size": size,
            "way": way_of(how),
            "error": errors[0] if errors else None,
            **({} if errors else _figures([samples for samples, _ in ran])),
            "over_stock": _ratio(walls["stock"], walls[way_of(how)]),
            "over_plain": _ratio(walls.get("plain", []), walls[way_of(how)]),
        }


def _figures(turns: Sequence[Sequence[TimedCaption]]) -> dict[str, float]:
    """Of one way: wall time and decoding, of the whole set."""
    wall_s = statistics.median(sum(one.total_s for one in samples) for samples in turns)
    decode_s = statistics.median(sum(one.decode_s for one in samples) for samples in turns)
    tokens = sum(len(one.token_ids) for one in turns[0])
    rounds = sum(one.num_drafts for one in turns[0])
    return {
        "wall_s": wall_s,
        "decode_s": decode_s,
        "tokens_per_s": tokens / wall_s,
        "videos_per_hour": 3600.0 * len(turns[0]) / wall_s,
        "accepted": sum(one.num_accepted_tokens for one in turns[0]) / rounds if rounds else 0.0,
        "mean_batch_size": statistics.fmean(one.mean_batch_size for one in turns[0]),
    }


def _ratio(base: Sequence[float], mine: Sequence[float]) -> float | None:
    """Median over turns of how many times as fast."""
    pairs = [(one, other) for one, other in zip(base, mine, strict=False) if one and other]
    return statistics.median(one / other for one, other in pairs) if pairs else None


def batch_attention(
    captioner: ModelledCaptioner, frames: Sequence[int], asked: Batches
) -> list[dict[str, Any]]:
    """Each way to attend, on one batch of videos of different lengths: the very same rounds, medians over turns."""
    videos = [captioner.video(frames[number % len(frames)], number) for number in range(asked.rows)]
    held = Held(captioner, videos, "static", asked.rounds)
    assert isinstance(captioner.draft, SmallModelDraft)
    models = (captioner.target, captioner.draft.model)
    before = [model.round_attention for model in models]
    rows = []
    try:
        for tree, shape in (("static", held.tree), ("plain", ROOT)):
            for how in get_args(RoundAttention):
                for model in models:
                    model.round_attention = how
                row: dict[str, Any] = {"rows": asked.rows, "tree": tree, "attention": how, "modelled": True}
                try:
                    times = [asdict(held.time(shape, asked.rounds)) for _ in range(asked.turns)]
                except Exception as error:  # what this machine does not have must not cost the others
                    rows.append(row | {"error": " ".join(str(error).split())[:200]})
                    held = Held(captioner, videos, "static", asked.rounds)
                    continue
                medians = {name: statistics.median(one[name] for one in times) for name in times[0]}
                rows.append(row | medians | {"error": None})
    finally:
        for model, old in zip(models, before, strict=True):
            model.round_attention = old
    return rows
