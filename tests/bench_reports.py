"""Reports of benches that never ran, with figures that hang together, for what shows reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specvlm.bench.grid import Grid
from specvlm.bench.records import (
    BenchReport,
    Conditions,
    Configuration,
    Left,
    Speedup,
    Spread,
    Stages,
    Summary,
)

CONDITIONS = Conditions(
    started_at="2030-01-02T03:04:05Z",
    command="specvlm bench clips --prune-ratio 0,0.5,0.9",
    machine="x86_64 Linux",
    processor="A processor",
    device="cpu",
    cores=2,
    threads=2,
    python_version="3.11.2",
    torch_version="2.15.0",
    transformers_version="5.23.0",
    specvlm_version="0.1.0",
    dtype="float32",
    target="some/target-32B",
    draft="some/draft-7B",
    family="qwen2_5_vl",
    prompt="Describe the video in detail.",
    max_new_tokens=256,
    repeat=3,
    clips="eight clips",
    videos=tuple(f"clip-{number}.mp4" for number in range(8)),
    peak_memory_of="process",
)
VIDEOS, TOKENS = 8, 100


def _times(how: Configuration, frames: int) -> tuple[Stages, float, tuple[float, ...]]:
    """Stage times of all videos, accepted tokens, and acceptance per depth; a batch shares its steps."""
    read, vision, prefill = 0.004 * frames, 0.006 * frames, 0.02 * frames
    step = (0.03 + 0.0001 * frames) / how.batch_size**0.7
    if how.method in ("stock", "assisted"):
        steps = TOKENS * step * (1.0 if how.method == "stock" else 0.8)
        return Stages(read_s=read, preprocess_s=0.02, prefill_s=vision + prefill, steps_s=steps), 0.0, ()
    base = Stages(read_s=read, preprocess_s=0.02, vision_s=vision, target_prefill_s=prefill)
    if how.method == "plain":
        return replace(base, verify_s=0.95 * TOKENS * step, host_s=0.02), 0.0, ()
    ratio = how.prune_ratio or 0.0
    accepted = 3.4 - 1.1 * ratio - (0.4 if how.pruner == "uniform" else 0.0) + 0.002 * frames
    rounds = TOKENS / (accepted + 1.0)
    draft = rounds * (0.012 + 0.0003 * frames * (1.0 - ratio))
    verify = rounds * step * 1.15
    depths = tuple(max(0.2, 0.9 - 0.07 * depth - 0.1 * ratio) for depth in range(5))
    whole = replace(
        base, draft_prefill_s=0.2 * prefill * (1.0 - ratio) + vision * 0.3, draft_s=draft, verify_s=verify,
        commit_s=0.03, host_s=0.08, rest_s=0.01,
    )  # fmt: skip
    return whole, accepted, depths


def _summary(how: Configuration, plain: tuple[float, float], baseline: str) -> Summary:
    frames = how.frames_asked or 16
    stages, accepted, depths = _times(how, frames)
    values = {name: getattr(stages, name) for name in Stages.__dataclass_fields__}
    decode = sum(values[name] for name in ("draft_s", "verify_s", "commit_s", "host_s", "steps_s"))
    total = sum(values.values())
    decode_x, e2e_x = plain[0] / decode, plain[1] / total
    pair = Speedup(baseline, decode_x, e2e_x, decode_x, e2e_x, _around(decode_x), _around(e2e_x))  # type: ignore[arg-type]
    rounds = bool(depths)
    return Summary(
        configuration=how,
        videos=VIDEOS,
        turns=3,
        num_frames=frames - 0.5,
        video_tokens=18.0 * frames,
        video_tokens_kept=18.0 * frames * (1.0 - (how.prune_ratio or 0.0)) if rounds else 0.0,
        completion_tokens=VIDEOS * TOKENS,
        stages=Stages(**{name: VIDEOS * value for name, value in values.items()}),
        decode_s=VIDEOS * decode,
        total_s=VIDEOS * total,
        token_s=decode / TOKENS,
        speedups=() if how.method == baseline else (pair,),
        num_drafts=1000 if rounds else 0,
        mean_nodes=26.0 if rounds else None,
        mean_accepted_tokens=accepted if rounds else None,
        acceptance_per_depth=depths,
        exact_match=None if how.method == baseline else 1.0,
        exact_match_against=None if how.method == baseline else baseline,  # type: ignore[arg-type]
        plain_token_s=plain[0] / TOKENS,
        draft_round_s=0.014 if rounds else None,
        verify_round_s=0.036 if rounds else None,
        predicted_decode_speedup=2.4 if rounds else None,
        measured_over_predicted=0.93 if rounds else None,
        host_share=0.06 if rounds else None,
        limit="drafting costs 0.5 plain steps a round" if rounds else "",
        peak_memory_bytes=2_340_000_000,
        videos_per_hour=3600.0 / total,
        videos_per_hour_turns=_around(3600.0 / total),
        tokens_per_s=TOKENS / total,
        mean_batch_size=float(how.batch_size),
    )


def _around(value: float) -> Spread:
    return Spread(0.96 * value, value, 1.03 * value)


def made(grid: Grid | None = None, **more: Any) -> BenchReport:
    """A report of a grid; the first of stock and plain in it is the baseline."""
    grid = Grid(trees=("static",)) if grid is None else grid
    baseline = next((one for one in ("stock", "plain") if one in grid.methods), "stock")
    summaries = []
    for how in grid.all():
        stages, _, _ = _times(Configuration("stock", batch_size=how.batch_size), how.frames_asked or 16)
        before = stages.read_s + stages.preprocess_s + stages.prefill_s
        summaries.append(_summary(how, (stages.steps_s, stages.steps_s + before), baseline))
    if baseline not in grid.methods:
        summaries = [replace(one, speedups=()) for one in summaries]
    return replace(BenchReport(CONDITIONS, tuple(summaries), ()), **more)


FULL = Grid(
    num_frames=(16, 64, 128),
    pruners=("specvlm", "uniform"),
    prune_ratios=(0.0, 0.5, 0.9),
    trees=("static",),
)
BATCHED = Grid(("stock", "plain", "sd", "specvlm"), trees=("auto",), batch_sizes=(1, 4, 8, 16, 32))
HOSTILE = '<script>fetch("https://example.invalid/x")</script>\x1b[31m\u202e&"\'\n\ud800'


def hostile() -> BenchReport:
    """A report with markup wherever text comes from outside."""
    texts = dict.fromkeys(
        "started_at command machine processor device python_version torch_version transformers_version "
        "specvlm_version dtype target draft family prompt clips".split(),
        HOSTILE,
    )
    report = made(Grid(prune_ratios=(0.5, 0.9)))
    failed = Summary(Configuration("assisted"), error=HOSTILE)
    summaries = [
        failed if one.configuration.method == "assisted" else replace(one, limit=HOSTILE)
        for one in report.summaries
    ]
    return replace(
        report,
        conditions=replace(CONDITIONS, videos=(HOSTILE,), **texts),
        summaries=tuple(summaries),
        left_out=(Left(HOSTILE, HOSTILE),),
    )
