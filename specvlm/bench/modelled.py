"""A pair of published shapes on this machine: random weights, given acceptance, everything else as it really runs.

The prompt's length, the vision towers, both prefills, the pruning and the loop are those of a real caption, so its
costs are measured; how many guesses a round accepts is assumed. Every figure that comes of it is a model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import transformers

from specvlm.bench.batches import SetMeasurer, SetVideo
from specvlm.bench.clips import Clip
from specvlm.bench.grid import HEAD, WITH_DRAFT, Grid
from specvlm.bench.measure import Asked, Measurer, facts_of
from specvlm.bench.records import Report, StepBytes
from specvlm.bench.shapes import build, check_frames, parameter_count, random_inputs, shrunk
from specvlm.bench.suite import Found, Listener, SetSuite, Suite, conditions_of, reported
from specvlm.bench.summing import summarise
from specvlm.bench.words import counted
from specvlm.captioner import Captioner, ModelInfo, PreparedVideo
from specvlm.choosing import TreeChooser
from specvlm.config import FrameSettings, GenerationSettings, SpeculationSettings
from specvlm.drafts.base import Draft
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.errors import ConfigError
from specvlm.model import VideoLM
from specvlm.published import Shape, frame_multiple, prompt_tokens, video_tokens, vision_patches
from specvlm.stats import device_words, free_memory_bytes
from specvlm.tree import STATIC_PATHS, Guesses
from specvlm.verify import Accepted, accept

_STATIC_DEPTH = max(map(len, STATIC_PATHS))
_DRAWS = 1 << 12  # rounds until the draws repeat
_DEEPEST = 64  # guesses; no tree is deeper
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_VIDEO = "random video"
_RESERVE = 1.1  # of what was reckoned, for the allocator's rounding and what is small


# --- acceptance ---


def survival(mean: float, depth: int) -> float:
    """The chance q of one more accepted guess at which a tree of this depth accepts `mean` guesses a round.

    The number of accepted guesses is geometric and cut at the depth: P(at least k) = q^k for k = 1..D, as if each
    guess were right with the same chance. So mean = q + q^2 + ... + q^D.

    Raises:
        ConfigError: No q gives that mean.
    """
    if not 0.0 <= mean <= depth:
        raise ConfigError(
            f"assume_accepted={mean:g} is not what a tree of depth {depth} can give; give 0 to {depth}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if sum(middle**k for k in range(1, depth + 1)) < mean:
            low = middle
        else:
            high = middle
    return high


def _draws(chance: float, seed: int) -> list[int]:
    """Accepted guesses of `_DRAWS` rounds, before any tree cuts them.

    Evenly spread draws (multiples of the golden ratio) rather than independent ones: then a caption of a few dozen
    rounds has the mean that was asked for, too.
    """
    spread = ((seed * math.sqrt(2.0) + 0.5 + i * _GOLDEN) % 1.0 for i in range(_DRAWS))
    if chance <= 0.0:
        return [0] * _DRAWS
    if chance >= 1.0:
        return [_DEEPEST] * _DRAWS
    return [min(_DEEPEST, int(math.log(max(u, 1e-12)) / math.log(chance))) for u in spread]


class ForcedAcceptance:
    """Accepts as many guesses as were drawn beforehand, whatever the target chose; see `specvlm.verify.Accept`.

    Accepted is the path to the first node of the drawn depth: in chains and static trees that of the draft's first
    choices. The target's choices are overwritten along it and handed to the real `accept`, so that a round does all of
    its own work. Draws lie on the device, and so does the count of rounds, which each call moves on in place: nothing
    asks the host, and a captured graph moves on like a run without one.
    """

    def __init__(self, mean: float, depth: int, device: torch.device, seed: int = 0) -> None:
        """`mean`: accepted guesses of a round with a tree of `depth`; other depths follow from the same q.

        Raises:
            ConfigError: A tree of that depth cannot give that mean.
        """
        draws = _draws(survival(mean, depth), seed)
        self._drawn = torch.tensor(draws, device=device)
        self._round = torch.zeros(1, dtype=torch.long, device=device)

    def restart(self) -> None:
        """Begin the draws anew, so that every caption gets the same."""
        self._round.zero_()

    def __call__(self, guesses: Guesses, choices: torch.Tensor, depth: int) -> Accepted:
        """See `specvlm.verify.accept`. A round that guesses nothing takes no draw."""
        if depth == 0:
            return accept(guesses, choices, depth)
        rows, nodes = choices.shape
        row = torch.arange(rows, device=choices.device)
        drawn = self._drawn[(self._round + row * 97) % _DRAWS]  # [B]
        self._round.add_(1)
        wanted = torch.minimum(drawn, guesses.depths.max(dim=1).values)
        last = (guesses.depths == wanted[:, None]).to(torch.uint8).argmax(dim=1)  # [B]
        path = guesses.ancestors.gather(1, last[:, None, None].expand(-1, 1, nodes)).squeeze(1)
        path = path & (guesses.depths > 0)  # [B, N]
        # Each node of the path is what the target writes at its parent. All other nodes are sent to the end's own
        # place, which then gets a token that no guess has, so that nothing below the end is accepted.
        written = torch.where(path, guesses.parents, last[:, None])
        forced = choices.scatter(1, written, guesses.tokens)
        forced = forced.scatter(1, last[:, None], -1)
        accepted = accept(guesses, forced, depth)
        bonus = choices.gather(1, last[:, None])
        return accepted._replace(tokens=torch.where(accepted.tokens < 0, bonus, accepted.tokens))


# --- the pair ---


@dataclass(frozen=True, slots=True)
class Pair:
    """What is modelled.

    Attributes:
        target: Its shape, shrunk or whole.
        draft: The draft's; None: no draft.
        accepted: Mean accepted guesses of a round, the bonus token not counted.
        layers: Layers of the target, where it was shrunk.
    """

    target: Shape
    draft: Shape | None
    accepted: float
    layers: int | None = None

    @property
    def label(self) -> str:
        """What stands beside every figure."""
        depth = "" if self.layers is None else f", shrunk to {counted(self.layers, 'layer')} of the target"
        told = "" if self.draft is None else f", {self.accepted:g} accepted tokens assumed"
        return f"modelled: {'published shapes' if self.draft else 'a published shape'} with random weights{depth}{told}"


def make_pair(target: Shape, draft: Shape | None, accepted: float, layers: int | None = None) -> Pair:
    """The pair, with `layers` layers in the target and all else shrunk in proportion.

    Raises:
        ConfigError: The families differ, the target has not so many layers, or nothing can accept so much.
    """
    if draft is not None and draft.family != target.family:
        raise ConfigError(
            f"draft shape {draft.name} is of the family {draft.family}, {target.name} of {target.family}; "
            "use a draft of the same family"
        )
    if not 0.0 <= accepted <= _DEEPEST:
        raise ConfigError(f"assume_accepted={accepted:g} is out of range; give 0 to the depth of the tree")
    if layers is None:
        return Pair(target, draft, accepted)
    whole = target.text.layers
    if not 1 <= layers <= whole:
        raise ConfigError(f"layers={layers} is not what {target.name} can have; give 1 to {whole}")
    small = None if draft is None else shrunk(draft, layers, whole)
    return Pair(shrunk(target, layers, whole), small, accepted, layers)


class ModelledCaptioner(Captioner):
    """A captioner of random weights whose rounds accept what they are told to. It has no processor or tokenizer."""

    def __init__(self, pair: Pair, target: VideoLM, draft: VideoLM | None) -> None:
        """`target`, `draft`: models of the pair's shapes, as `build` makes them."""
        guess: Draft | None = None
        if draft is not None:
            guess = SmallModelDraft(draft, min(target.vocabulary, draft.vocabulary))
        super().__init__(target, None, guess, _info(pair, target), FrameSettings())
        self.pair = pair
        self.settling = None  # what is accepted is not what random weights choose
        self._forced: dict[int, ForcedAcceptance] = {}

    @property
    def frame_multiple(self) -> int:
        """That of the shape's family."""
        return frame_multiple(self.pair.target)

    def chooser(self, settings: SpeculationSettings, generation: GenerationSettings) -> TreeChooser:
        """As any captioner's; what the trees of this decoder accept starts from the beginning."""
        depth = reference_depth(settings)
        if depth not in self._forced:
            self._forced[depth] = ForcedAcceptance(self.pair.accepted, depth, self.target.device)
        self._forced[depth].restart()
        self.accept = self._forced[depth]
        return super().chooser(settings, generation)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Nothing: random tokens have no text."""
        return ""


def reference_depth(settings: SpeculationSettings) -> int:
    """The depth at which a tree accepts the assumed mean: its own, or the static tree's where depths vary."""
    if settings.tree == "chain":
        return settings.most_depth
    if settings.tree == "dynamic":
        return min(settings.most_depth, settings.most_nodes - 1)
    return _STATIC_DEPTH


def _info(pair: Pair, target: VideoLM) -> ModelInfo:
    def named(shape: Shape) -> str:
        return f"{shape.name} (modelled, {counted(shape.text.layers, 'layer')})"

    return ModelInfo(
        target=named(pair.target),
        target_revision=None,
        draft=None if pair.draft is None else named(pair.draft),
        draft_revision=None,
        family=pair.target.family,
        dtype=str(target.dtype).removeprefix("torch."),
        device=device_words(target.device),
        transformers_version=transformers.__version__,
        processor_options={},
    )


def build_pair(pair: Pair, device: torch.device, dtype: torch.dtype, seed: int = 0) -> ModelledCaptioner:
    """Make both models on the device."""
    target = build(pair.target, device, dtype, seed)
    draft = None if pair.draft is None else build(pair.draft, device, dtype, seed + 1)
    return ModelledCaptioner(pair, target, draft)


def modelled_video(
    captioner: ModelledCaptioner, num_frames: int, size: tuple[int, int], seed: int = 0
) -> PreparedVideo:
    """A prompt with a video of random pixels, on the target's device.

    Raises:
        ConfigError: The family does not take such frames.
    """
    inputs = random_inputs(captioner.pair.target, num_frames, size, captioner.target.device, seed)
    return PreparedVideo(inputs, num_frames, None, 0.0, 0.0)


# --- memory ---


@dataclass(frozen=True, slots=True)
class Load:
    """How large a caption is, and how many are made at once. `num_frames`, `batch_size`: the most of any."""

    num_frames: int
    frame_size: tuple[int, int]
    max_new_tokens: int
    batch_size: int = 1


def memory_needed(pair: Pair, load: Load, dtype: torch.dtype) -> int:
    """Bytes for weights, both caches, and the widest layer of the prefill, about."""
    shapes = [pair.target] if pair.draft is None else [pair.target, pair.draft]
    weights = sum(map(parameter_count, shapes)) * dtype.itemsize
    caches = sum(_cache_bytes(shape, load, dtype.itemsize) for shape in shapes)
    return round((weights + caches + max(_working_bytes(s, load, dtype.itemsize) for s in shapes)) * _RESERVE)


def _cache_bytes(shape: Shape, load: Load, element: int) -> int:
    slots = prompt_tokens(shape, load.num_frames, load.frame_size) + load.max_new_tokens + _DEEPEST
    return shape.text.slot_bytes(element) * slots * load.batch_size


def _working_bytes(shape: Shape, load: Load, element: int) -> int:
    """What stands in memory at once within a layer: a few hidden states and the MLP's two halves with their product."""
    patches = vision_patches(shape, load.num_frames, load.frame_size)
    text, vision = shape.text, shape.vision
    in_decoder = prompt_tokens(shape, load.num_frames, load.frame_size) * (
        6 * text.hidden + 3 * text.intermediate
    )
    in_tower = patches * (6 * vision.hidden + 3 * vision.intermediate)
    return max(in_decoder, in_tower) * element


def parameters_of(pair: Pair) -> int:
    """Parameters of both models."""
    return sum(map(parameter_count, [pair.target] if pair.draft is None else [pair.target, pair.draft]))


def refuse_without_memory(pair: Pair, load: Load, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what will not fit, before anything is made.

    Raises:
        ConfigError: It does not fit.
    """
    needed, free = memory_needed(pair, load, dtype), free_memory_bytes(device)
    if free is None or needed <= free:
        return
    names = pair.target.name if pair.draft is None else f"{pair.target.name} with {pair.draft.name}"
    raise ConfigError(
        f"{names} in {str(dtype).removeprefix('torch.')} at {load.num_frames} frames needs about "
        f"{needed / 2**30:.0f} GiB, and {device} has {free / 2**30:.0f} GiB free; give fewer --layers, smaller "
        "shapes, --dtype bfloat16 or fewer frames"
    )


# --- the bench ---


@dataclass(frozen=True, slots=True)
class ModelledSetup:
    """What a shape bench is about.

    Attributes:
        grid: What is compared; its `num_frames` are numbers.
        frame_size: Height and width of a frame.
        asked: The rest, as the conditions tell it.
        seed: Of pixels and tokens.
    """

    grid: Grid
    frame_size: tuple[int, int]
    asked: Asked
    seed: int = 0


def check_setup(pair: Pair, grid: Grid, frame_size: tuple[int, int]) -> None:
    """Refuse what cannot be modelled, before anything is made.

    Raises:
        ConfigError: A method's acceptance cannot be given; a method needs a draft; a tree cannot accept so much; the
            family does not take such frames.
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
            raise ConfigError(
                "num_frames is not given; a modelled video has no length of its own, so give a number"
            )
        check_frames(pair.target, frames, frame_size)


def bench_modelled(captioner: ModelledCaptioner, setup: ModelledSetup, listener: Listener) -> Report:
    """Measure everything that was asked for.

    Captions of forced acceptance differ from plain ones by design, so nothing is said of exactness.

    Raises:
        ConfigError: What was asked for cannot be modelled.
        StoppedError: It was interrupted; it has the report of what was measured until then.
    """
    grid, asked = setup.grid, setup.asked
    check_setup(captioner.pair, grid, setup.frame_size)

    def prepare(clip: Clip, num_frames: int | None) -> PreparedVideo:
        assert num_frames is not None
        return modelled_video(captioner, num_frames, setup.frame_size, setup.seed)

    def read(clip: Clip, num_frames: int | None) -> SetVideo:
        video = prepare(clip, num_frames)
        return SetVideo(facts_of(clip.name, video), video)

    clips, limit = [Clip(_VIDEO, b"")], asked.max_new_tokens
    suite: Suite | SetSuite
    if grid.is_batched:
        suite = SetSuite(grid, clips, asked.repeat, read, SetMeasurer(captioner, limit), listener)
    else:
        suite = Suite(grid, clips, asked.repeat, prepare, Measurer(captioner, limit), listener)
    return reported(suite, grid, lambda found: _report(captioner, setup, found))


def step_bytes(
    pair: Pair, grid: Grid, frame_size: tuple[int, int], max_new_tokens: int, element: int
) -> tuple[StepBytes, ...]:
    """What a step of the target, and one of the draft, must read of weights, keys and values, at `element` bytes each.

    A step is one pass over the batch: a plain step, a verification, or one level of the draft's tree. Captions are half
    done, so that each has S + half its tokens behind it. Unpruned and pruned drafts stand next to each other.
    """

    def reads(name: str, shape: Shape, frames: int, size: int, ratio: float) -> StepBytes:
        seen = video_tokens(shape, frames, frame_size)
        slots = prompt_tokens(shape, frames, frame_size) - round(ratio * seen) + max_new_tokens // 2
        weights = shape.text.pass_bytes(0, element)
        return StepBytes(name, frames, size, weights, size * slots * shape.text.slot_bytes(element))

    drafted = {one.prune_ratio or 0.0 for one in grid.all() if one.method in WITH_DRAFT}
    found = []
    for frames, size in product(dict.fromkeys(grid.num_frames), dict.fromkeys(grid.batch_sizes)):
        assert frames is not None
        found.append(reads("target", pair.target, frames, size, 0.0))
        if pair.draft is not None:
            found += [
                reads(f"draft {ratio:g}" if ratio else "draft", pair.draft, frames, size, ratio)
                for ratio in sorted(drafted)
            ]
    return tuple(found)


def _report(captioner: ModelledCaptioner, setup: ModelledSetup, found: Found) -> Report:
    grid, asked = setup.grid, setup.asked
    kept = tuple(one for one in found.samples if one.configuration not in found.errors)
    summaries = summarise(grid.all(), kept, found.errors)
    pair, element = captioner.pair, captioner.target.dtype.itemsize
    reads = step_bytes(pair, grid, setup.frame_size, asked.max_new_tokens, element) if grid.is_batched else ()
    return Report(
        conditions_of(captioner, asked, kept, [_VIDEO]),
        tuple(replace(one, exact_match=None, exact_match_against=None) for one in summaries),
        kept,
        modelled=True,
        label=pair.label,
        reads=reads,
    )
