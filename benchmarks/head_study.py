"""What the studies of trained heads share: clips, the target's captions of them, heads that learn, held-out figures.

All heads of a study learn from the very same passes of the target, and are measured in turns in one process. It
knows no tables and no plots.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import specvlm
from recipes.demo.draw import LONGER, SQUARE, WIDE, DrawnSplit, Format, draw_clips
from specvlm.bench.measure import Measurer
from specvlm.bench.records import Configuration
from specvlm.captioner import Captioner, CaptionOptions, PreparedVideo
from specvlm.config import FrameSettings
from specvlm.drafts.base import Draft
from specvlm.drafts.compressor import OPERATORS, CompressorConfig, CompressorMode, OperatorName
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.prefill import Begun
from specvlm.preset import find_preset
from specvlm.records import Caption
from specvlm.training.checkpoint import Checkpoints
from specvlm.training.example import Example, read_example
from specvlm.training.learner import Learner
from specvlm.training.objective import ObjectiveSettings, distillation_loss
from specvlm.training.order import Order, noise_seed
from specvlm.training.ranks import Alone
from specvlm.training.settings import TrainingSettings

LIMIT, WARM_UP = 200, 16  # new tokens of a caption
_KEPT_EXAMPLES = 6000  # of a fifth to one megabyte each


class Kind(NamedTuple):
    """A kind of clips: how they are stored and read."""

    name: str
    stored: Format
    frames: FrameSettings
    limit: int = LIMIT  # tokens of a caption that is measured


SQUARE_CLIPS = Kind("square", SQUARE, FrameSettings(num_frames=8))  # 144 video tokens of the demo target
SHORT = Kind("short", WIDE, FrameSettings(num_frames=8))  # 128
MIDDLE = Kind("middle", WIDE, FrameSettings(num_frames=16))  # 256
LONG = Kind("long", LONGER, FrameSettings(num_frames=64), limit=64)  # 1,024, of which captions ramble


@dataclass(frozen=True, slots=True)
class World:
    """A loaded demo pair, and a folder for all that is made once."""

    captioner: Captioner
    prompt: str
    work: Path

    @classmethod
    def load(cls, preset: str, work: Path) -> World:
        """Load the preset's target with its small draft."""
        chosen = find_preset(preset)
        assert chosen is not None
        work.mkdir(parents=True, exist_ok=True)
        return cls(specvlm.load(preset), chosen.prompt, work)

    def clip(self, split: DrawnSplit, kind: Kind, number: int) -> PreparedVideo:
        """One clip, drawn if it is not there, read and preprocessed."""
        folder = self.work / "clips" / kind.name
        path = folder / f"{split}-{number:06d}.mp4"
        if not path.exists():
            (path,) = draw_clips(folder, split, 1, number, kind.stored)
        return self.captioner.prepare(str(path), self.prompt, frames=kind.frames)

    def head_config(self, compressor: CompressorConfig) -> HeadConfig:
        """For a head of this target."""
        info, target = self.captioner.info, self.captioner.target
        name, revision = info.target, info.target_revision
        return HeadConfig(name, revision, target.family.name, target.hidden_size, compressor=compressor)

    def with_draft(self, draft: Draft | None) -> Captioner:
        """A captioner of the same target with another draft."""
        ours = self.captioner
        return Captioner(ours.target, ours.processor, draft, ours.info, ours.frames)


class Pool:
    """Training clips, what the target wrote of each, kept in SQLite, and what it shows of each, kept in memory."""

    def __init__(self, world: World, kinds: Sequence[Kind]) -> None:
        """`kinds`: of each clip; their number is that in the set `head`."""
        self._world, self._kinds = world, kinds
        self._captions = sqlite3.connect(world.work / "captions.sqlite")
        self._captions.execute(
            "CREATE TABLE IF NOT EXISTS caption (clip TEXT PRIMARY KEY, tokens TEXT NOT NULL)"
        )
        self._examples: OrderedDict[int, Example] = OrderedDict()

    def __len__(self) -> int:
        """Clips."""
        return len(self._kinds)

    def read_all(self) -> float:
        """Have the target caption what it has not yet, by speculation, and show each clip; -> seconds."""
        began = time.perf_counter()
        for number in range(len(self)):
            self.example(number)
        return time.perf_counter() - began

    def example(self, number: int) -> Example:
        """What the target shows of a clip and its caption."""
        found = self._examples.pop(number, None)
        if found is None:
            clip = self._world.clip("head", self._kinds[number], number)
            found = read_example(self._world.captioner.target, clip.inputs, self._tokens(number, clip))
        self._examples[number] = found
        if len(self._examples) > _KEPT_EXAMPLES:
            self._examples.popitem(last=False)
        return found

    def _tokens(self, number: int, clip: PreparedVideo) -> list[int]:
        name = f"{self._kinds[number].name}-{number}"
        row = self._captions.execute("SELECT tokens FROM caption WHERE clip = ?", (name,)).fetchone()
        if row is not None:
            return [int(token) for token in row[0].split()]
        caption = self._world.captioner.caption(clip, max_new_tokens=LIMIT, tree="chain", depth=12)
        with self._captions:
            told = " ".join(map(str, caption.token_ids))
            self._captions.execute("INSERT INTO caption VALUES (?, ?)", (name, told))
        return list(caption.token_ids)


class Trainee:
    """One head that learns, in its own order."""

    def __init__(
        self, name: str, head: HeadModel, pool: Pool, training: TrainingSettings, objective: ObjectiveSettings
    ) -> None:
        """Nothing is learned yet."""
        self.name, self.learner = name, Learner(head.train(), training, Alone())
        self._objective, self._seed = objective, training.seed
        self._order = Order(len(pool), training.accumulate, training.seed)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.seconds = 0.0  # without the target's share

    def step(self, world: World, pool: Pool, number: int) -> dict[str, float]:
        """Take step `number`, counted from 0; -> means of the losses."""
        target, told = world.captioner.target, []
        places = self._order.places(number)
        for place in places:
            example = pool.example(place.sample)
            began = time.perf_counter()
            noise = torch.Generator().manual_seed(noise_seed(self._seed, place.position))
            losses = distillation_loss(self.learner.head, target, example, self._objective, noise)
            self.learner.add(self.learner.gradient(losses.total))
            told.append([float(losses.cross_entropy), float(losses.smooth_l1), float(losses.right)])
            self.seconds += time.perf_counter() - began
        self.learner.step(len(places))
        means = (sum(column) / len(told) for column in zip(*told, strict=True))
        return dict(zip(("cross_entropy", "smooth_l1", "right"), means, strict=True))


def learn(
    world: World,
    pool: Pool,
    trainees: Sequence[Trainee],
    steps: int,
    study: Mapping[str, Any],
    each_step: Callable[[int, Mapping[str, dict[str, float]]], None],
    checkpoint_s: float = 180.0,
) -> None:
    """Take all heads to step `steps`, from the newest checkpoint on; `each_step` hears how many steps are taken.

    `study`: plain values that the weights depend on.

    Raises:
        SystemExit: The checkpoint is of another study.
    """
    folder = world.work / "checkpoints"
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder)
    taken = _restore(checkpoints, trainees, study)
    saved = time.monotonic()
    for number in range(taken, steps):
        told = {one.name: one.step(world, pool, number) for one in trainees}
        each_step(number + 1, told)
        if time.monotonic() - saved > checkpoint_s or number + 1 == steps:
            tensors = {
                f"{one.name}/{key}": value for one in trainees for key, value in one.learner.state().items()
            }
            facts = {"study": study, "seconds": {one.name: one.seconds for one in trainees}}
            checkpoints.save(number + 1, facts, tensors)
            saved = time.monotonic()


def _restore(checkpoints: Checkpoints, trainees: Sequence[Trainee], study: Mapping[str, Any]) -> int:
    found = checkpoints.newest().checkpoint
    if found is None:
        return 0
    if found.facts["study"] != study:
        raise SystemExit("the work folder holds a study with other settings; give another --work")
    for one in trainees:
        mine = f"{one.name}/"
        state = {
            key.removeprefix(mine): value for key, value in found.tensors.items() if key.startswith(mine)
        }
        one.learner.restore(state, found.step)
        one.seconds = found.facts["seconds"][one.name]
    return found.step


class Method(NamedTuple):
    """One way to caption; without a captioner it is stock `generate()`."""

    name: str
    captioner: Captioner | None = None
    options: CaptionOptions = {}  # noqa: RUF012, never written to


class Run(NamedTuple):
    """One caption."""

    method: str
    clip: int
    decode_s: float
    caption: Caption | None = None  # None: stock


def look(world: World, kind: Kind, count: int, methods: Sequence[Method], turns: int = 1) -> list[Run]:
    """All methods on the first held-out clips of a kind, behind a warm-up.

    Raises:
        SystemExit: Some captions of a clip differ.
    """
    measure(world, [(-1, world.clip("held-out", kind, 299))], methods, 1, WARM_UP)
    clips = ((number, world.clip("held-out", kind, number)) for number in range(count))
    return measure(world, clips, methods, turns, kind.limit)


def measure(
    world: World,
    clips: Iterable[tuple[int, PreparedVideo]],
    methods: Sequence[Method],
    turns: int = 1,
    limit: int = LIMIT,
) -> list[Run]:
    """All methods on each clip in turns, another one first every time; what the target sees is prefilled once.

    Raises:
        SystemExit: Some captions of a clip differ.
    """
    runs: list[Run] = []
    for place, (clip, video) in enumerate(clips):
        begun = Begun()
        for turn in range(turns):
            shift = (place + turn * len(methods) // turns) % len(methods)
            some = [*methods[shift:], *methods[:shift]]
            made = [_run(world, one, clip, video, begun, limit) for one in some]
            runs += [run for run, _ in made]
            if len({tokens for _, tokens in made}) > 1:
                raise SystemExit(
                    f"clip {clip}: captions differ between {', '.join(one.name for one in some)}"
                )
    return runs


def _run(
    world: World, method: Method, clip: int, video: PreparedVideo, begun: Begun, limit: int
) -> tuple[Run, tuple[int, ...]]:
    if method.captioner is None:
        sample = Measurer(world.captioner, limit).measure(Configuration("stock"), video, str(clip), 1)
        return Run(method.name, clip, sample.decode_s), sample.token_ids
    speculate = method.captioner.draft is not None
    kind = method.captioner.kind(speculate, {**method.options, "max_new_tokens": limit})
    caption = method.captioner.caption_one(video, kind, begun=begun)
    return Run(method.name, clip, caption.stats.decode_s, caption), caption.token_ids


def captions_of(runs: Iterable[Run], method: str) -> list[Caption]:
    """Those of one method."""
    return [run.caption for run in runs if run.method == method and run.caption is not None]


def accepted(runs: Iterable[Run], method: str) -> float:
    """Mean accepted tokens per round: all accepted over all rounds, the bonus not counted."""
    stats = [caption.stats for caption in captions_of(runs, method)]
    return sum(one.num_accepted_tokens for one in stats) / max(1, sum(one.num_drafts for one in stats))


def decode_speedup(runs: Sequence[Run], method: str, base: str = "stock") -> float:
    """Median over clips of the base's decoding time over the method's, both medians of their turns."""
    return statistics.median(
        times[base] / times[method] for times in (_times(runs, clip) for clip in {run.clip for run in runs})
    )


def _times(runs: Sequence[Run], clip: int) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in runs:
        if run.clip == clip:
            found.setdefault(run.method, []).append(run.decode_s)
    return {method: statistics.median(times) for method, times in found.items()}


def head_draft(world: World, learner: Learner) -> HeadDraft:
    """A copy of a head as it is now, ready to guess."""
    head = HeadModel.fresh(world.captioner.target, learner.head.config, 0)
    learner.copy_to(head)
    return HeadDraft(head.eval().requires_grad_(False), world.captioner.target)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What both studies take."""
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for clips, captions, checkpoints and heads"
    )
    parser.add_argument("--figures", type=Path, required=True, help="folder for the plot")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--accumulate", type=int, default=4, help="clips of a step")
    parser.add_argument("--unroll", type=int, default=1, help="passes over the head's own features")
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads; torch's own choice if absent"
    )


def training_of(options: argparse.Namespace, seed: int) -> TrainingSettings:
    """The training that was asked for."""
    return TrainingSettings(options.learning_rate, options.accumulate, seed=seed)


def objective_of(options: argparse.Namespace) -> ObjectiveSettings:
    """The loss that was asked for."""
    return ObjectiveSettings(unroll=options.unroll)


def compressor_named(name: str, ratio: float) -> CompressorConfig:
    """A mode with its default operators, or one operator alone."""
    modes: tuple[CompressorMode, ...] = ("select", "weighted", "concat")
    for mode in modes:
        if name == mode:
            return CompressorConfig(mode, ratio=ratio)
    operators: dict[str, OperatorName] = {operator: operator for operator in OPERATORS}
    return (
        CompressorConfig("none", ())
        if name == "none"
        else CompressorConfig("single", (operators[name],), ratio)
    )


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, but for where things are kept."""
    return {name: value for name, value in vars(options).items() if not isinstance(value, Path)}


def study_of(options: argparse.Namespace) -> dict[str, Any]:
    """What of it the weights at a step depend on."""
    beside = ("threads", "turns", "held_out", "held_out_long", "epochs")
    return {name: value for name, value in asked(options).items() if name not in beside}
