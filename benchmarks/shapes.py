"""Measure what a pair of published shapes costs on this machine, without its checkpoints.

    python benchmarks/shapes.py --shape qwen2.5-vl-32b --draft-shape qwen2.5-vl-7b --assume-accepted 3.9
    python benchmarks/shapes.py --shape qwen2.5-vl-7b --layers 2 --num-frames 2 --methods stock,plain --json

Sizes, vocabularies, prompt lengths, vision, both prefills, pruning and the loop are real; weights, pixels and prompts
are random. How many guesses a round accepts is what you assume, so all figures are labelled modelled. The methods
`assisted` and `head` cannot be modelled: `transformers` accepts what random weights give, and a head is trained for its
target. Nothing is read or preprocessed, so end-to-end figures lack that time. `--layers N` builds N of the target's
layers and shrinks the draft and both vision towers in proportion, for a small machine; the LM head keeps its size and
then takes most of a step, so these figures do not carry over to whole models. With several batch sizes, a table lists
what one pass over the batch must read. Tables and progress are those of `specvlm bench`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from modelled import (
    DEEPEST,
    ModelledCaptioner,
    Pair,
    build_pair,
    check_frames,
    find_shape,
    frame_size_of,
    make_pair,
    parameter_count,
    pass_bytes,
    prompt_tokens,
    random_clip,
    reference_depth,
    survival,
)

from specvlm.bench.clips import Clip
from specvlm.bench.grid import HEAD, WITH_DRAFT, Grid
from specvlm.bench.measure import BenchRequest
from specvlm.bench.records import METHODS, BenchReport
from specvlm.bench.suite import BenchListener, BenchSetup, StoppedError, bench
from specvlm.bench.words import stopped_words
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.errors import ConfigError
from specvlm.published import Shape, patch_grid, steps_of, video_tokens
from specvlm.stats import free_memory_bytes
from specvlm.words import amount, percent
from specvlm_cli.console import tables
from specvlm_cli.console.bench import BenchTalk, tell

_VIDEO = "random video"
_RESERVE = 1.1  # of the estimate, for the allocator's rounding and for small tensors
_FEW_ROUNDS = 20  # with fewer, the mean of accepted guesses is not yet the assumed one
_MANY = 1_000_000_000  # parameters that take a CPU minutes


# --- memory ---


@dataclass(frozen=True, slots=True)
class Load:
    """How large a caption is, and how many are made at once. `num_frames`, `batch_size`: the most of any."""

    num_frames: int
    frame_size: tuple[int, int]
    max_new_tokens: int
    batch_size: int = 1


def shapes_of(pair: Pair) -> list[Shape]:
    """The target's, and the draft's if there is one."""
    return [pair.target] if pair.draft is None else [pair.target, pair.draft]


def memory_needed(pair: Pair, load: Load, dtype: torch.dtype) -> int:
    """About how many bytes weights, both caches, and the widest layer of the prefill take."""
    shapes = shapes_of(pair)
    weights = sum(map(parameter_count, shapes)) * dtype.itemsize
    caches = sum(_cache_bytes(shape, load, dtype.itemsize) for shape in shapes)
    return round((weights + caches + max(_working_bytes(s, load, dtype.itemsize) for s in shapes)) * _RESERVE)


def _cache_bytes(shape: Shape, load: Load, element: int) -> int:
    slots = prompt_tokens(shape, load.num_frames, load.frame_size) + load.max_new_tokens + DEEPEST
    return shape.text.slot_bytes(element) * slots * load.batch_size


def _working_bytes(shape: Shape, load: Load, element: int) -> int:
    """What is in memory at once within a layer: a few hidden states, and the MLP's two halves with their product."""
    rows, columns = patch_grid(shape, load.frame_size)
    patches = steps_of(shape, load.num_frames) * rows * columns
    text, vision = shape.text, shape.vision
    in_decoder = prompt_tokens(shape, load.num_frames, load.frame_size) * (
        6 * text.hidden + 3 * text.intermediate
    )
    in_tower = patches * (6 * vision.hidden + 3 * vision.intermediate)
    return max(in_decoder, in_tower) * element


def refuse_without_memory(pair: Pair, load: Load, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a pair that does not fit, before anything is made.

    Raises:
        ConfigError: The device has less memory free than the pair needs.
    """
    needed, free = memory_needed(pair, load, dtype), free_memory_bytes(device)
    if free is None or needed <= free:
        return
    names = " with ".join(shape.name for shape in shapes_of(pair))
    raise ConfigError(
        f"{names} in {str(dtype).removeprefix('torch.')} at {load.num_frames} frames needs about "
        f"{needed / 2**30:.0f} GiB, and {device} has {free / 2**30:.0f} GiB free; give fewer --layers, smaller "
        "shapes, --dtype bfloat16 or fewer frames"
    )


# --- the bench ---


def check_setup(pair: Pair, grid: Grid, frame_size: tuple[int, int]) -> None:
    """Refuse what cannot be modelled, before anything is made.

    Raises:
        ConfigError: A method cannot be modelled or needs a draft; a tree cannot accept as many guesses; or the family
            does not take such frames.
    """
    if "assisted" in grid.methods:
        raise ConfigError(
            "method 'assisted' cannot be modelled, transformers' own loop accepts what random weights give; "
            "leave it out"
        )
    if HEAD in grid.methods:
        raise ConfigError(
            f"method {HEAD!r} cannot be modelled, a head is trained for its target; leave it out"
        )
    if pair.draft is None and (method := replace(grid, drafts=()).needs_draft) is not None:
        raise ConfigError(f"method {method!r} needs a draft, and there is none; give a draft shape")
    for tree in grid.trees if pair.draft is not None else ():
        survival(pair.accepted, reference_depth(SpeculationSettings(tree=tree)))
    for frames in grid.num_frames:
        if frames is None:
            raise ConfigError("num_frames is not given; a random video has no length of its own, so give one")
        check_frames(pair.target, frames, frame_size)


def bench_pair(
    captioner: ModelledCaptioner, grid: Grid, asked: BenchRequest, listener: BenchListener
) -> BenchReport:
    """Measure everything that was asked for; `num_frames` of the grid are numbers.

    Captions of assumed acceptance differ from plain ones by design, so nothing is said of exactness.

    Raises:
        ConfigError: Something that was asked for cannot be modelled.
        StoppedError: It was interrupted; the error has the report of what was measured until then.
    """
    check_setup(captioner.pair, grid, captioner.frame_size)
    clip = Clip(_VIDEO, random_clip(max(frames or 0 for frames in grid.num_frames)))
    try:
        return _without_exactness(bench(captioner, BenchSetup(grid, [clip], None, asked), listener))
    except StoppedError as error:
        error.report = _without_exactness(error.report)
        raise


def _without_exactness(report: BenchReport) -> BenchReport:
    summaries = (replace(one, exact_match=None, exact_match_against=None) for one in report.summaries)
    return replace(report, summaries=tuple(summaries))


# --- what a step reads ---


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decoding step of a batch must read, by the shapes alone, halfway through its captions.

    Attributes:
        model: `target`, or `draft` with its prune ratio.
        frames_asked: Frames of each video.
        batch_size: Captions in the batch.
        weight_bytes: Weights of the decoder and the LM head, read once for the whole batch.
        kv_bytes: Keys and values of all captions.
    """

    model: str
    frames_asked: int
    batch_size: int
    weight_bytes: int
    kv_bytes: int

    @property
    def kv_share(self) -> float:
        """Share of keys and values."""
        return self.kv_bytes / (self.weight_bytes + self.kv_bytes)


def step_bytes(
    pair: Pair, grid: Grid, frame_size: tuple[int, int], max_new_tokens: int, element: int
) -> list[StepBytes]:
    """What a step of the target, and one of the draft, must read, at `element` bytes a number.

    A step is one pass over the batch: a plain step, a verification, or one level of the draft's tree. Captions are half
    done: each has its prompt and half of its tokens in the cache.
    """

    def reads(name: str, shape: Shape, frames: int, size: int, ratio: float) -> StepBytes:
        pruned = round(ratio * video_tokens(shape, frames, frame_size))
        slots = prompt_tokens(shape, frames, frame_size) - pruned + max_new_tokens // 2
        weights = pass_bytes(shape.text, 0, element)
        return StepBytes(name, frames, size, weights, size * slots * shape.text.slot_bytes(element))

    ratios = sorted({one.prune_ratio or 0.0 for one in grid.all() if one.method in WITH_DRAFT})
    found = []
    for frames, size in product(dict.fromkeys(grid.num_frames), dict.fromkeys(grid.batch_sizes)):
        assert frames is not None
        found.append(reads("target", pair.target, frames, size, 0.0))
        if pair.draft is not None:
            found += [
                reads(f"draft {ratio:g}" if ratio else "draft", pair.draft, frames, size, ratio)
                for ratio in ratios
            ]
    return found


def _print_reads(reads: Sequence[StepBytes]) -> None:
    lines = [("model", "frames", "batch", "weights", "keys, values", "their share")]
    for one in reads:
        sizes = (amount(one.weight_bytes), amount(one.kv_bytes), percent(one.kv_share))
        lines.append((one.model, str(one.frames_asked), str(one.batch_size), *sizes))
    print("\nWhat a step reads")
    print("\n".join(tables.aligned(lines, {1, 2, 3, 4, 5})))


# --- the command ---


def run(asked: argparse.Namespace) -> int:
    """Build the models, measure them and print what was measured; -> the exit code.

    Raises:
        ConfigError: A shape is unknown, cannot be modelled, or does not fit into memory.
    """
    GenerationSettings(max_new_tokens=asked.max_new_tokens)
    pair, grid = _pair(asked), _grid(asked)
    size = asked.frame_size or frame_size_of(pair.target)
    check_setup(pair, grid, size)
    device = torch.device(asked.device)
    dtype = getattr(torch, asked.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    load = Load(max(asked.num_frames), size, asked.max_new_tokens, max(asked.batch_size))
    refuse_without_memory(pair, load, dtype, device)
    talk = BenchTalk(quiet=False)
    _announce(pair, device, talk)
    report = _measured(build_pair(pair, device, dtype, size), grid, asked, talk)
    reads = step_bytes(pair, grid, size, asked.max_new_tokens, dtype.itemsize) if grid.is_batched else []
    _print(report, pair, reads, asked.json)
    return 130 if report.stopped else 0


def _pair(asked: argparse.Namespace) -> Pair:
    if (asked.draft_shape is None) != (asked.assume_accepted is None):
        raise ConfigError("--draft-shape and --assume-accepted belong together; give both, or neither")
    draft = None if asked.draft_shape is None else find_shape(asked.draft_shape)
    return make_pair(find_shape(asked.shape), draft, asked.assume_accepted or 0.0, asked.layers)


def _announce(pair: Pair, device: torch.device, talk: BenchTalk) -> None:
    talk.note(pair.label)
    count = sum(map(parameter_count, shapes_of(pair)))
    if device.type == "cpu" and pair.layers is None and count >= _MANY:
        talk.note(
            f"building {count / 1e9:.1f} billion parameters on the CPU takes minutes, and so does each caption; "
            "--layers N builds only N of the target's layers"
        )


def _measured(
    captioner: ModelledCaptioner, grid: Grid, asked: argparse.Namespace, talk: BenchTalk
) -> BenchReport:
    """What was measured, until an interrupt if there is one."""
    try:
        with talk.working():
            return bench_pair(captioner, grid, _conditions(captioner, asked), talk)
    except StoppedError as error:
        talk.warn(stopped_words(error.report))
        return error.report


def _grid(asked: argparse.Namespace) -> Grid:
    unfit = ("assisted", HEAD, *(WITH_DRAFT if asked.draft_shape is None else ()))
    return Grid(
        methods=asked.methods or tuple(one for one in METHODS if one not in unfit),
        num_frames=asked.num_frames,
        pruners=asked.pruner,
        prune_ratios=asked.prune_ratio,
        trees=asked.tree,
        batch_sizes=asked.batch_size,
    )


def _conditions(captioner: ModelledCaptioner, asked: argparse.Namespace) -> BenchRequest:
    height, width = captioner.frame_size
    return BenchRequest(
        command=asked.command,
        target=captioner.info.target,
        draft=captioner.info.draft,
        prompt="random tokens",
        max_new_tokens=asked.max_new_tokens,
        repeat=asked.repeat,
        clips=f"random pixels of {height} x {width}",
    )


def _print(report: BenchReport, pair: Pair, reads: Sequence[StepBytes], as_json: bool) -> None:
    if as_json:
        whole = {"modelled": pair.label, **report.as_json(), "reads": [asdict(one) for one in reads]}
        print(json.dumps(whole, allow_nan=False))
        return
    print(pair.label)
    tell(report)
    if reads:
        _print_reads(reads)
    rounds = [one.num_drafts for one in report.summaries if one.num_drafts]
    if rounds and min(rounds) < _FEW_ROUNDS:
        print(
            f"\nA caption had only {min(rounds)} rounds, so the mean of accepted guesses is not yet the assumed one; "
            "give more --max-new-tokens."
        )


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Read values that are separated by commas, each once."""

    def comma_separated(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return comma_separated


def frame_size(text: str) -> tuple[int, int]:
    """Read HxW.

    Raises:
        ArgumentTypeError: The text is not a height and a width.
    """
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not a height and a width; give e.g. 360x640")
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", required=True, metavar="NAME", help="of the target, e.g. qwen2.5-vl-32b")
    add("--draft-shape", metavar="NAME", help="of the draft; default: no draft")
    add("--assume-accepted", type=float, metavar="N", help="accepted guesses of a round, in the mean")
    add("--layers", type=int, metavar="N", help="build N of the target's layers")
    add("--frame-size", type=frame_size, metavar="HxW", help="default 360x640, of LLaVA-OneVision 384x384")
    add("--methods", type=listed(str), metavar="LIST", help="default: all that can be modelled")
    add("--pruner", type=listed(str), default=Grid().pruners, metavar="LIST")
    add("--prune-ratio", type=listed(float), default=Grid().prune_ratios, metavar="LIST")
    add("--tree", type=listed(str), default=Grid().trees, metavar="LIST")
    add("--num-frames", type=listed(int), default=(64,), metavar="LIST")
    add("--batch-size", type=listed(int), default=(1,), metavar="LIST")
    add("--max-new-tokens", type=int, default=GenerationSettings().max_new_tokens, metavar="N")
    add("--repeat", type=int, default=3, metavar="N", help="timed turns, after one of warm-up")
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16"
    )
    add("--json", action="store_true", help="print one JSON object instead of tables")
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(given)
    asked.command = shlex.join(["python", "benchmarks/shapes.py", *given])
    try:
        return run(asked)
    except ConfigError as error:
        print(f"shapes.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
