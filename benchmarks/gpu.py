"""Everything that a GPU is asked, in one go: parity, exactness, batches, costs of real shapes, choices, profile.

    python benchmarks/gpu.py --out FOLDER --parts batches   many videos in flight alone, under five minutes
    python benchmarks/gpu.py --out FOLDER --parts exactness   bfloat16 and float16 alone, under five minutes
    python benchmarks/gpu.py --out FOLDER             on a machine with CUDA, under ten minutes
    python benchmarks/gpu.py --out FOLDER --cpu-smoke   the same parts in small, on any machine, in half a minute

Needs no checkpoint and no network. Writes gpu.json, anew after every part, and gpu.md with the tables for
docs/benchmarks.md. What does not fit into the time is left out and named, and so is what fails. Figures of pairs
with published shapes are modelled: random weights, and as many accepted tokens as are assumed.

A new choice for the hot path is one row of `CHOICES`: a name and a context manager that switches it on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu_batches import Batches, batch_attention, batch_parity, batch_speed
from gpu_exactness import Exactness, exactness_rows
from gpu_heads import Heads, fresh_head, time_heads
from gpu_held import Held, Times
from gpu_tables import markdown
from modelled import (
    FRAME_SIZE,
    TEXT_AFTER,
    TEXT_BEFORE,
    ModelledCaptioner,
    Pair,
    RandomCaptioner,
    build,
    build_pair,
    find_shape,
    frame_size_of,
    make_pair,
    pass_bytes,
    prompt_tokens,
    reference_depth,
)
from shapes import Load, bench_pair, refuse_without_memory
from torch.nn.attention import SDPBackend, sdpa_kernel

import specvlm
from recipes.demo.clips import render, scene_for, seed_for
from specvlm.bench.grid import Grid
from specvlm.bench.measure import BenchRequest, Measurer
from specvlm.bench.records import BenchReport, Configuration, Summary
from specvlm.bench.stock import stock_attention
from specvlm.bench.suite import BenchStep
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import SpeculationSettings, TreeName
from specvlm.costs import CostStore
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.published import LLAVA, QWEN25, Shape, TextShape, VisionShape
from specvlm.records import Frames
from specvlm.stats import device_words
from specvlm.tree import ROOT, STATIC_PATHS, TreeShape

SCHEMA = 1
ACCEPTED = 3.9  # SpecVLM, arXiv 2508.16201, reports 3.2 to 4.3 for its pairs
TOLERANCE = 2.0**-6  # of the best score: what two orders of adding in bfloat16 may move a logit by
TOP = 15
PROMPT = "Describe the video."  # of the demo pairs
PARTS = ("parity", "exactness", "batches", "shapes", "rounds", "heads")
JSON, MARKDOWN = "gpu.json", "gpu.md"
Subject = tuple[Captioner, list[PreparedVideo], HeadDraft]  # what captions are compared of


# --- what is run ---


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    device: torch.device
    dtype: torch.dtype
    pairs: tuple[tuple[Shape, Shape], ...]
    frames: tuple[int, ...]  # the largest first: what comes later is cheaper
    qwen_frame: tuple[int, int]  # height and width; LLaVA-OneVision's frames have one size
    trees: tuple[TreeName, ...]
    new_tokens: int
    turns: int
    clips: int  # of each demo pair
    seeds: int  # of each random pair
    rounds: int  # timed in a row
    head_tokens: int  # that a head with a trimmed vocabulary guesses from
    exactness: Exactness
    batches: Batches
    batch_pair: tuple[Shape, Shape]
    copy_bytes: int
    budget_s: float
    parts: tuple[str, ...] = PARTS

    def frame_size(self, shape: Shape) -> tuple[int, int]:
        """Of this shape's frames."""
        return frame_size_of(shape) if shape.family == LLAVA else self.qwen_frame


def _tiny(family: str, layers: int, vocabulary: int) -> Shape:
    text = TextShape(64, 128, layers, 4, 2, vocabulary, tied=False)
    return Shape(f"tiny-{family}", "", family, text, VisionShape(2, 32, 64, 2), 0, 290)


TINY = tuple((_tiny(family, 4, 320), _tiny(family, 1, 300)) for family in (QWEN25, LLAVA))
HALF = (torch.bfloat16, torch.float16)


def full_plan(budget_s: float) -> Plan:
    """On a GPU."""
    pairs = (("qwen2.5-vl-32b", "qwen2.5-vl-7b"), ("qwen2.5-vl-7b", "qwen2.5-vl-3b"))
    return Plan(
        device=torch.device("cuda:0"),
        dtype=torch.bfloat16,
        pairs=tuple((find_shape(target), find_shape(draft)) for target, draft in pairs),
        frames=(128, 64, 16),
        qwen_frame=FRAME_SIZE,
        trees=("static", "chain", "dynamic", "auto"),
        new_tokens=128,
        turns=2,
        clips=16,
        seeds=12,
        rounds=12,
        head_tokens=16_384,
        exactness=Exactness(
            HALF, TINY, ("split", "varlen"), new_tokens=128, seeds=2, videos=4, budget_s=280.0
        ),
        batches=Batches((1, 4, 8, 16, 32), turns=1, new_tokens=128, rows=8, rounds=12),
        batch_pair=(find_shape("qwen2.5-vl-7b"), find_shape("qwen2.5-vl-3b")),
        copy_bytes=4 << 30,
        budget_s=budget_s,
    )


def smoke_plan(budget_s: float) -> Plan:
    """On any machine, in small."""
    return Plan(
        device=torch.device("cpu"),
        dtype=torch.float32,
        pairs=TINY,
        frames=(4, 2),
        qwen_frame=(56, 84),
        trees=("static", "chain", "dynamic", "auto"),
        new_tokens=20,
        turns=1,
        clips=1,
        seeds=1,
        rounds=3,
        head_tokens=100,
        exactness=Exactness(HALF[:1], TINY[:1], ("split",), new_tokens=32, seeds=1, videos=1, budget_s=600.0),
        batches=Batches((1, 2), turns=1, new_tokens=8, rows=3, rounds=2),
        batch_pair=TINY[0],
        copy_bytes=64 << 20,
        budget_s=budget_s,
    )


class Run:
    """One run: its plan, the time that is left, and what was found so far."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self._out, self._start = plan, out, time.perf_counter()
        self.found: dict[str, Any] = {
            "schema": SCHEMA,
            "conditions": _conditions(plan),
            "bandwidth": {},
            "parity": {},
            "exactness": [],
            "shapes": [],
            "choices": [],
            "rounds": [],
            "profiles": [],
            "heads": [],
            "batches": {"parity": [], "speed": [], "attention": []},
            "skipped": [],
            "seconds": 0.0,
        }

    def passed_s(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self._start

    def left_s(self) -> float:
        """Time that is left."""
        return self.plan.budget_s - self.passed_s()

    def skip(self, what: str, why: str) -> None:
        """Note what was left out."""
        print(f"[{self.passed_s():6.1f} s] left out: {what}: {why}", file=sys.stderr, flush=True)
        self.found["skipped"].append({"what": what, "why": why})

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Do a part; if it fails, say so and go on with the others. Everything found is on disk afterwards."""
        print(f"[{self.passed_s():6.1f} s] {what}", file=sys.stderr, flush=True)
        try:
            yield
        except Exception as error:  # one part's failure must not cost the others' figures
            self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        self.write()

    def fits(self, what: str, needed_s: float) -> bool:
        """Whether the time left is enough; if not, note it."""
        left_s = self.left_s()
        if needed_s > left_s:
            self.skip(what, f"needs about {needed_s:.0f} s, {max(left_s, 0.0):.0f} s are left")
        return needed_s <= left_s

    def write(self) -> None:
        """Write what there is."""
        self.found["seconds"] = self.passed_s()
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / JSON).write_text(json.dumps(_plain(self.found), indent=1, allow_nan=False) + "\n")
        (self._out / MARKDOWN).write_text(markdown(self.found))


def _plain(value: Any) -> Any:
    """As JSON can hold it: what is not finite is null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _conditions(plan: Plan) -> dict[str, Any]:
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "device": device_words(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "specvlm": specvlm.__version__,
        "assumed_accepted_tokens": ACCEPTED,
        "qwen_frame": list(plan.qwen_frame),
        "new_tokens": plan.new_tokens,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the machine ---


def _timed(device: torch.device, work: Callable[[], object], repeat: int = 5) -> float:
    """Best of several, after one of warm-up."""
    work()
    times = []
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def bandwidth(run: Run) -> None:
    """A large copy (bytes read and written) and a large product of matrices."""
    plan = run.plan
    source = torch.ones(plan.copy_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    copy_s = _timed(plan.device, lambda: target.copy_(source))
    side = 8192 if plan.device.type == "cuda" else 512
    left = torch.randn(side, side, device=plan.device, dtype=plan.dtype)
    product_s = _timed(plan.device, lambda: left @ left)
    run.found["bandwidth"] = {
        "copy_bytes": plan.copy_bytes,
        "bytes_per_s": 2 * plan.copy_bytes / copy_s,
        "flops_per_s": 2 * side**3 / product_s,
    }


# --- parity ---


@dataclass(frozen=True)
class Difference:
    """A caption that leaves stock's."""

    model: str
    way: str
    clip: int
    first_index: int
    margin: float  # between the best and the second score there, stock's own
    best: float
    within_tolerance: bool


def parity(run: Run) -> None:
    """Captions of the demo pairs and of random ones, each way, against stock `generate()`."""
    found = run.found["parity"]
    found |= {"tolerance": TOLERANCE, "captions": [], "differences": []}
    for preset in ("demo", "demo-llava"):
        with run.part(f"parity of the {preset} pair"):
            captioner, clips = _demo(run.plan, preset)
            _compare(run, preset, captioner, [captioner.prepare(clip, PROMPT) for clip in clips])
    for shape, _ in TINY:
        with run.part(f"parity of a random pair, {shape.family}"):
            _compare_random(run, shape)
    total = sum(one["captions"] for one in found["captions"])
    exact = sum(one["exact"] for one in found["captions"])
    found |= {
        "comparisons": total,
        "exact": exact,
        "exact_share": exact / total if total else None,
        "beyond_tolerance": sum(not one["within_tolerance"] for one in found["differences"]),
    }


def _demo(plan: Plan, preset: str) -> tuple[Captioner, list[Frames]]:
    """The pair, and held-out clips of four seconds."""
    captioner = specvlm.load(
        preset, dtype=str(plan.dtype).removeprefix("torch."), device_map={"": str(plan.device)}
    )
    captioner.costs = CostStore()
    count = 8 // captioner.frame_multiple * captioner.frame_multiple
    times = np.array([i * 4.0 / count for i in range(count)])
    scenes = [scene_for(seed_for("held-out", i)) for i in range(plan.clips)]
    return captioner, [Frames(render(scene, times, 96, 96), times) for scene in scenes]


def _compare_random(run: Run, shape: Shape) -> None:
    """A draft that is the target itself, so that whole paths are accepted; another target for each seed."""
    plan = run.plan
    for seed in range(plan.seeds):
        models = [build(shape, plan.device, plan.dtype, seed) for _ in range(2)]
        captioner = RandomCaptioner(Pair(shape, shape, 0.0), *models, plan.frame_size(shape))
        _compare(run, f"random {shape.family}", captioner, [captioner.video(plan.frames[-1], seed)])


def _compare(run: Run, model: str, captioner: Captioner, videos: Sequence[PreparedVideo]) -> None:
    plan = run.plan
    measurer = Measurer(captioner, plan.new_tokens)
    for clip, video in enumerate(videos):
        stock = measurer.measure(Configuration("stock"), video, "", 1).token_ids
        trees = [Configuration("specvlm", None, "specvlm", 0.9, tree) for tree in plan.trees]
        for how in (Configuration("plain"), *trees):
            ours, way = measurer.measure(how, video, "", 1).token_ids, how.tree or "plain"
            _note(run, model, way, ours == stock)
            if ours != stock:
                difference = _difference(captioner, video, stock, ours)
                run.found["parity"]["differences"].append(asdict(Difference(model, way, clip, *difference)))


def _note(run: Run, model: str, way: str, exact: bool) -> None:
    captions = run.found["parity"]["captions"]
    for one in captions:
        if (one["model"], one["way"]) == (model, way):
            break
    else:
        one = {"model": model, "way": way, "captions": 0, "exact": 0}
        captions.append(one)
    one["captions"] += 1
    one["exact"] += exact


def _difference(
    captioner: Captioner, video: PreparedVideo, stock: tuple[int, ...], ours: tuple[int, ...]
) -> tuple[int, float, float, bool]:
    """Where they part, and how near the two best tokens are there in stock's own scores."""
    shortest = min(len(stock), len(ours))
    first = next((i for i in range(shortest) if stock[i] != ours[i]), shortest)
    model = captioner.target.model
    tensors = {name: value.to(captioner.target.device) for name, value in video.inputs.tensors.items()}
    with stock_attention([model]), torch.inference_mode():
        out = model.generate(
            **tensors,
            max_new_tokens=first + 1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    best, second = out.scores[first][0].float().topk(2).values.tolist()
    margin = best - second
    return first, margin, best, margin <= TOLERANCE * max(1.0, abs(best))


# --- exactness ---


def of_exactness(run: Run) -> None:
    """Captions in half precision of random models, with and without `exact`, against stock's."""
    asked = run.plan.exactness
    for dtype in asked.dtypes:
        until_s = min(run.plan.budget_s, run.passed_s() + asked.budget_s / len(asked.dtypes))
        plan = replace(run.plan, dtype=dtype)
        subjects = [
            (f"random {shape.family}, seed {seed}", _random(plan, shape, seed))
            for seed in range(asked.seeds)
            for shape, _ in asked.pairs
        ]
        for model, make in subjects:
            _exactness_of(run, model, dtype, until_s, make)


def _random(plan: Plan, shape: Shape, seed: int) -> Callable[[], Subject]:
    """A random target that is its own draft, with a fresh head."""

    def make() -> Subject:
        models = [build(shape, plan.device, plan.dtype, seed) for _ in range(2)]
        captioner = RandomCaptioner(Pair(shape, shape, 0.0), *models, plan.frame_size(shape))
        count = plan.exactness.videos
        videos = [captioner.video(plan.frames[-1], seed + 100 * n) for n in range(count)]
        head = fresh_head(captioner, CompressorConfig("none", ()))
        return captioner, videos, HeadDraft(head, captioner.target, None)

    return make


def _exactness_of(
    run: Run, model: str, dtype: torch.dtype, until_s: float, make: Callable[[], Subject]
) -> None:
    name = str(dtype).removeprefix("torch.")
    what = f"exactness of {model}, {name}"
    if run.passed_s() > until_s:
        run.skip(what, "the time is over")
        return
    with run.part(what):
        captioner, videos, head = make()
        asked = run.plan.exactness
        for attention in asked.attentions:
            where = {"model": model, "dtype": name, "attention": attention}
            for row in exactness_rows(captioner, head, videos, asked, attention):
                run.found["exactness"].append(where | row)
                if run.passed_s() > until_s:
                    run.skip(f"the rest of {what}", "the time is over")
                    return


# --- batches ---


def of_batches(run: Run) -> None:
    """Many videos in flight: captions of a demo pair, times of published shapes, and ways to attend."""
    plan, found = run.plan, run.found["batches"]
    asked = plan.batches
    with run.part("batches of the demo pair"):
        captioner, clips = _demo(plan, "demo")
        many = [clips[number % len(clips)] for number in range(max(asked.sizes))]
        found["parity"] += batch_parity(captioner, "demo", many, PROMPT, asked)
    target, draft = plan.batch_pair
    name, frames, size = f"{target.name} + {draft.name}", plan.frames[-1], plan.frame_size(target)
    with run.part(f"batches of {name}"):
        pair = make_pair(target, draft, ACCEPTED)
        load = Load(frames, size, asked.new_tokens, max(asked.sizes))
        refuse_without_memory(pair, load, plan.dtype, plan.device)
        modelled = build_pair(pair, plan.device, plan.dtype, size)
        for row in batch_speed(modelled, frames, asked, run.fits):
            found["speed"].append(row)
        found["attention"] += batch_attention(modelled, plan.frames[-2:], asked)


# --- pairs of published shapes ---


class _Quiet:
    """Hears of failures alone."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def step(self, step: BenchStep) -> None:
        """Nothing to say."""

    def left_out(self, left: Any) -> None:
        """No modelled video is ever left out."""

    def failed(self, how: Configuration, error: str) -> None:
        """A configuration that cannot go on."""
        self._run.skip(how.label, error)


def expected_s(run: Run, pair: Pair, frames: int) -> float:
    """About what one number of frames takes: prefills at half the product's rate, tokens at half the bandwidth."""
    plan, machine = run.plan, run.found["bandwidth"]
    if not machine or plan.device.type != "cuda":
        return 0.0
    length, element = prompt_tokens(pair.target, frames, plan.frame_size(pair.target)), plan.dtype.itemsize
    prefill_s: float = 2.0 * pair.target.parameters * length / (machine["flops_per_s"] / 2)
    step_s: float = pass_bytes(pair.target.text, length, element) / (machine["bytes_per_s"] / 2)
    captions = (1 + len(plan.trees)) * (1 + plan.turns)
    return captions * (2.0 * prefill_s + 0.6 * plan.new_tokens * step_s)


def shape_bench(run: Run, captioner: ModelledCaptioner, frames: int) -> None:
    """The pair at one number of frames, plain against each tree."""
    plan, pair = run.plan, captioner.pair
    assert pair.draft is not None
    grid = Grid(("plain", "specvlm"), (frames,), trees=plan.trees)
    command = run.found["conditions"]["command"]
    asked = BenchRequest(
        command, pair.target.name, pair.draft.name, "", plan.new_tokens, plan.turns, "random pixels"
    )
    report = bench_pair(captioner, grid, asked, _Quiet(run))
    run.found["shapes"].append(
        {
            "target": pair.target.name,
            "draft": pair.draft.name,
            "frames": frames,
            "modelled": True,
            "label": pair.label,
            "prompt_tokens": prompt_tokens(pair.target, frames, captioner.frame_size),
            "rows": [_row(run, pair, report, one) for one in report.summaries],
        }
    )


def _row(run: Run, pair: Pair, report: BenchReport, one: Summary) -> dict[str, Any]:
    """One configuration, with the share of the roofline that it reaches."""
    speedup = one.speedup("plain")
    samples = [sample for sample in report.samples if sample.configuration == one.configuration]
    rounds = statistics.fmean(sample.num_drafts for sample in samples) if samples else 0.0
    steps = rounds or (one.completion_tokens - one.videos)
    round_s = one.decode_s / steps if steps else None
    row: dict[str, Any] = {
        "configuration": one.configuration.label,
        "tree": one.configuration.tree,
        "error": one.error,
        "video_tokens": one.video_tokens,
        "video_tokens_kept": one.video_tokens_kept,
        "accepted": one.mean_accepted_tokens,
        "nodes": one.mean_nodes,
        "token_s": one.token_s,
        "round_s": round_s,
        "draft_round_s": one.draft_round_s,
        "verify_round_s": one.verify_round_s,
        "target_prefill_s": one.stages.target_prefill_s,
        "draft_prefill_s": one.stages.draft_prefill_s,
        "vision_s": one.stages.vision_s,
        "decode_speedup": speedup.decode if speedup else None,
        "e2e_speedup": speedup.e2e if speedup else None,
        "predicted": one.predicted_decode_speedup,
        "peak_memory_bytes": one.peak_memory_bytes,
        "limit": one.limit,
    }
    return row | roofline(run, pair, one, round_s)


def roofline(run: Run, pair: Pair, one: Summary, round_s: float | None) -> dict[str, Any]:
    """Bytes that a round must read over the bandwidth, as a share of what the round takes; and of its two halves.

    One pass of the target over its weights and all slots; as many of the draft as the tree has levels, each over its
    weights and what pruning left. Of `auto`, whose levels vary, nothing is said.
    """
    tree, element = one.configuration.tree, run.plan.dtype.itemsize
    known = run.found["bandwidth"].get("bytes_per_s")
    nothing = {"round_bytes": None, "roofline": None, "verify_roofline": None, "draft_roofline": None}
    if tree == "auto" or not known or not round_s or one.error:
        return nothing
    text, written = TEXT_BEFORE + TEXT_AFTER, one.completion_tokens / 2
    verify = pass_bytes(pair.target.text, round(text + one.video_tokens + written), element)
    draft = 0
    if tree is not None and pair.draft is not None:
        levels = reference_depth(SpeculationSettings(tree=tree))
        draft = levels * pass_bytes(pair.draft.text, round(text + one.video_tokens_kept + written), element)
    return {
        "round_bytes": verify + draft,
        "roofline": (verify + draft) / known / round_s,
        "verify_roofline": verify / known / one.verify_round_s if one.verify_round_s else None,
        "draft_roofline": draft / known / one.draft_round_s if one.draft_round_s else None,
    }


# --- choices on the hot path ---


Switch = Callable[[ModelledCaptioner], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Choice:
    """One way to do rounds. The first of all is how they are done now, and the others stand beside it."""

    group: str
    name: str
    switch: Switch


def _as_it_is(captioner: ModelledCaptioner) -> AbstractContextManager[Any]:
    return nullcontext()


def _models_with(name: str, value: object) -> Switch:
    """Both models have another value of an attribute."""

    @contextmanager
    def switch(captioner: ModelledCaptioner) -> Iterator[None]:
        assert isinstance(captioner.draft, SmallModelDraft)
        models = (captioner.target, captioner.draft.model)
        before = [getattr(model, name) for model in models]
        for model in models:
            setattr(model, name, value)
        try:
            yield
        finally:
            for model, old in zip(models, before, strict=True):
                setattr(model, name, old)

    return switch


def _together(*switches: Switch) -> Switch:
    """Several switches at once."""

    @contextmanager
    def switch(captioner: ModelledCaptioner) -> Iterator[None]:
        with ExitStack() as stack:
            for one in switches:
                stack.enter_context(one(captioner))
            yield

    return switch


_EAGER, _MASKED = _models_with("captures", False), _models_with("round_attention", "masked")


def _masked_by(*backends: SDPBackend) -> Switch:
    """Rounds under one mask, by one kernel of sdpa; eager, since a graph would keep the kernel it was captured with."""
    return _together(
        _EAGER, _MASKED, lambda captioner: sdpa_kernel(list(backends)) if backends else nullcontext()
    )


CHOICES = (
    Choice("rounds", "as they are", _as_it_is),
    Choice("rounds", "without CUDA graphs", _EAGER),
    Choice("attention", "masked", _MASKED),
    Choice("attention", "split", _models_with("round_attention", "split")),
    Choice("attention", "varlen", _models_with("round_attention", "varlen")),
    Choice("kernel under a mask, without CUDA graphs", "torch's own choice", _masked_by()),
    Choice(
        "kernel under a mask, without CUDA graphs",
        "memory-efficient",
        _masked_by(SDPBackend.EFFICIENT_ATTENTION),
    ),
    Choice("kernel under a mask, without CUDA graphs", "cuDNN", _masked_by(SDPBackend.CUDNN_ATTENTION)),
    Choice("kernel under a mask, without CUDA graphs", "matrix products", _masked_by(SDPBackend.MATH)),
)


def compare_choices(
    run: Run, captioner: ModelledCaptioner, held: Held, tree: str, shape: TreeShape, frames: int
) -> None:
    """All choices in turn on the same state, each turn beginning with another one; medians over turns."""
    times: dict[Choice, list[Times]] = {choice: [] for choice in CHOICES}
    errors: dict[Choice, str] = {}
    for turn in range(run.plan.turns + 1):
        first = turn % len(CHOICES)
        for choice in (*CHOICES[first:], *CHOICES[:first]):
            if choice in errors or run.left_s() <= 0:
                continue
            try:
                with choice.switch(captioner):
                    taken = held.time(shape, run.plan.rounds)
            except Exception as error:  # a choice that this machine does not have must not cost the others
                errors[choice] = " ".join(str(error).split())[:200]
            else:
                times[choice] += [taken] if turn else []
    for choice in CHOICES:
        medians = {
            name: statistics.median(getattr(one, name) for one in times[choice]) if times[choice] else None
            for name in Times.__dataclass_fields__
        }
        run.found["choices"].append(
            {
                **_where(captioner, frames, tree),
                "group": choice.group,
                "choice": choice.name,
                **medians,
                "error": errors.get(choice) or (None if times[choice] else "no time was left"),
            }
        )


def _where(captioner: ModelledCaptioner, frames: int, tree: str) -> dict[str, Any]:
    pair = captioner.pair
    assert pair.draft is not None
    return {
        "target": pair.target.name,
        "draft": pair.draft.name,
        "frames": frames,
        "tree": tree,
        "modelled": True,
    }


def profile(
    run: Run, captioner: ModelledCaptioner, held: Held, tree: str, shape: TreeShape, frames: int
) -> None:
    """Which operations take the device's time, and how long the device waits for the host.

    On CUDA the device's time of a round is that of its kernels, and the host's what is left of the round's wall time,
    without the profiler; on the CPU the stages' own times stand for the kernels'.
    """
    cuda, rounds = run.plan.device.type == "cuda", run.plan.rounds
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    plain = held.time(shape, rounds)
    running = held.rounds(shape)
    next(running)
    next(running)
    _wait(run.plan.device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        counted = sum(1 for _ in zip(range(rounds - 2), running, strict=False))
        _wait(run.plan.device)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = [(event.key, event.count, getattr(event, name) / 1e6) for event in profiler.key_averages()]
    if cuda:  # operators and the kernels that they launch both bear the kernels' time
        kernels = {
            e.key
            for e in profiler.key_averages()
            if "CUDA" in str(e.device_type) and not getattr(e, "is_user_annotation", False)
        }
        spent = [one for one in spent if one[0] in kernels]
    total = sum(seconds for *_, seconds in spent)
    where = _where(captioner, frames, tree)
    busy_s = total / counted if cuda else plain.draft_s + plain.verify_s + plain.commit_s
    run.found["rounds"].append(
        where
        | {
            "round_s": plain.round_s,
            "device_s": busy_s,
            "host_s": max(plain.round_s - busy_s, 0.0),
            "host_over_device": max(plain.round_s - busy_s, 0.0) / busy_s,
        }
    )
    top = sorted(spent, key=lambda one: -one[2])[:TOP]
    run.found["profiles"].append(
        where
        | {
            "rounds": counted,
            "top": [
                {
                    "name": key[:120],
                    "calls": count / counted,
                    "round_s": seconds / counted,
                    "share": seconds / total,
                }
                for key, count, seconds in top
            ],
        }
    )


def of_rounds(run: Run, captioner: ModelledCaptioner, frames: int) -> None:
    """Choices and profile, of the static tree and of plain steps, on one prefilled state."""
    held = Held(captioner, [captioner.video(frames)], "static", run.plan.rounds)
    for tree, shape in (("static", held.tree), ("plain", ROOT)):
        compare_choices(run, captioner, held, tree, shape, frames)
        profile(run, captioner, held, tree, shape, frames)


def of_a_pair(run: Run, target: Shape, draft: Shape) -> None:
    """Everything that is asked of one pair."""
    plan = run.plan
    pair = make_pair(target, draft, ACCEPTED)
    # A state that is held takes rounds of all guesses.
    longest = max(plan.new_tokens, (plan.rounds + 2) * (1 + max(map(len, STATIC_PATHS))))
    refuse_without_memory(
        pair, Load(plan.frames[0], plan.frame_size(target), longest), plan.dtype, plan.device
    )
    start = time.perf_counter()
    captioner = build_pair(pair, plan.device, plan.dtype, plan.frame_size(target))
    _wait(plan.device)
    print(f"built in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    name = f"{target.name} + {draft.name}"
    for frames in plan.frames if "shapes" in plan.parts else ():
        what = f"{name} at {frames} frames"
        if run.fits(what, expected_s(run, pair, frames)):
            with run.part(what):
                shape_bench(run, captioner, frames)
    for frames in sorted({plan.frames[0], plan.frames[-1]}, reverse=True) if "rounds" in plan.parts else ():
        what = f"choices and profile of {name} at {frames} frames"
        if run.fits(what, expected_s(run, pair, frames) / 4):
            with run.part(what):
                of_rounds(run, captioner, frames)
    # Last of a pair: from here on the target keeps features.
    for frames in sorted({plan.frames[0], plan.frames[-1]}, reverse=True) if "heads" in plan.parts else ():
        what = f"a head of {target.name} at {frames} frames"
        if run.fits(what, expected_s(run, pair, frames) / 4):
            with run.part(what):
                asked = Heads(frames, plan.rounds, plan.head_tokens)
                run.found["heads"] += time_heads(captioner, asked, lambda work: _timed(plan.device, work))


def everything(run: Run) -> None:
    """All parts, the most wanted first."""
    with run.part("bandwidth"):
        bandwidth(run)
    if "parity" in run.plan.parts:
        parity(run)
    if "exactness" in run.plan.parts:
        of_exactness(run)
        _free(run.plan.device)
    if "batches" in run.plan.parts:
        of_batches(run)
        _free(run.plan.device)
    for target, draft in run.plan.pairs if {"shapes", "rounds", "heads"} & set(run.plan.parts) else ():
        with run.part(f"{target.name} + {draft.name}"):
            of_a_pair(run, target, draft)
        _free(run.plan.device)
    run.write()


def _free(device: torch.device) -> None:
    """Give back the memory of a pair that is done with, before the next one is made."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--cpu-smoke", action="store_true", help="every part in small, on the CPU")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="default 570")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="pairs whose target's name holds one of these"
    )
    options = parser.parse_args(arguments)
    if not options.cpu_smoke and not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu-smoke runs every part in small on the CPU")
    plan = smoke_plan(options.budget) if options.cpu_smoke else full_plan(options.budget)
    plan = replace(plan, parts=tuple(options.parts))
    if options.only:
        pairs = tuple(pair for pair in plan.pairs if any(name in pair[0].name for name in options.only))
        plan = replace(plan, pairs=pairs)
    run = Run(plan, options.out)
    everything(run)
    print((options.out / MARKDOWN).read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
