"""Settings: frozen dataclasses with their defaults and range checks.

Defaults live here and nowhere else; the command line reads them from these classes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from specvlm.errors import ConfigError, Setting

if TYPE_CHECKING:
    from specvlm.drafts.kept_tokens import DraftVocab

PrunerName = Literal["specvlm", "uniform", "attention", "random", "window", "none"]
TreeName = Literal["auto", "static", "dynamic", "chain"]
PositionsName = Literal["keep", "compact"]
BackendName = Literal["auto", "decord", "pyav"]

PRUNERS: tuple[PrunerName, ...] = get_args(PrunerName)
TREES: tuple[TreeName, ...] = get_args(TreeName)
POSITIONS: tuple[PositionsName, ...] = get_args(PositionsName)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


def one_of(name: str, value: object, known: Collection[str]) -> None:
    """Refuse what is not one of these words."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(Setting(name, value), "is unknown", fix=f"choose one of {', '.join(known)}")


def of_type(name: str, value: object, kinds: type | tuple[type, ...], fix: str) -> None:
    """Refuse what is of none of these types; `fix` says what to give."""
    if not isinstance(value, kinds):
        raise ConfigError(Setting(name, value), f"is of type {type(value).__name__}", fix=fix)


def whole(name: str, value: object) -> None:
    """Refuse what is no whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(Setting(name, value), "is not a whole number", fix="give one")


def number(name: str, value: object, fix: str) -> None:
    """Refuse what is no number; `fix` says what to give."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(Setting(name, value), "is not a number", fix=fix)


def within(name: str, value: float, low: float, high: float, fix: str) -> None:
    """Refuse what is no number from `low` to `high`; `fix` says what to give."""
    number(name, value, fix)
    if not low <= value <= high:  # also refuses NaN
        raise ConfigError(Setting(name, value), "is out of range", fix=fix)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which models to load, and how; the arguments of `specvlm.load`, where they are explained.

    Attributes:
        target: A preset's name, a hub id, or a folder.
        draft: A hub id or a folder; "none": no draft; None: the preset's own, or none.
        draft_vocab: What the draft may guess; None: every token.
        revision: Branch, tag or commit of the target.
        draft_revision: The same for the draft.
        dtype: Number format of the weights.
        device_map: Where the target goes.
        local_files_only: Never ask the hub.
        trust_remote_code: Run code that comes with a checkpoint.
    """

    target: str
    draft: str | None = None
    draft_vocab: DraftVocab | None = None
    revision: str | None = None
    draft_revision: str | None = None
    dtype: str = "auto"
    device_map: str | dict[str, Any] | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    """How the draft guesses. Nothing here can change a caption, only its speed.

    Attributes:
        pruner: Which video tokens the draft sees (SpecVLM, arXiv 2508.16201, section 3.2).
        prune_ratio: Share of video tokens that the draft does NOT see, 0..1. At least one is kept.
        top_p: Stage I of the `specvlm` pruner: share of the attention mass to take first, 0..1.
        tree: Shape of one round's guesses; `auto` learns which is fastest, or that none is.
        positions: `keep`: kept video tokens keep their positions; `compact`: renumbered without gaps.
        depth: Depth of `chain` and `dynamic` trees in tokens, 5 if None (a dynamic tree of a trained head: 7); most
            depth of `auto`, 16 if None. The static tree has depth 5.
        nodes: Most nodes of a `dynamic` tree, root included, 26 if None (of a trained head: 60); of `auto`, 64 if
            None. The static tree has 26, a chain depth + 1.
        width: Frontier of the `dynamic` tree: how many nodes each level expands, 4 if None (of a trained head: 10).
        seed: Seed of the `random` pruner.
    """

    pruner: PrunerName = "specvlm"
    prune_ratio: float = 0.9
    top_p: float = 0.4
    tree: TreeName = "auto"
    positions: PositionsName = "keep"
    depth: int | None = None
    nodes: int | None = None
    width: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "nodes", "width", "seed"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        one_of("pruner", self.pruner, PRUNERS)
        one_of("tree", self.tree, TREES)
        one_of("positions", self.positions, POSITIONS)
        within("prune_ratio", self.prune_ratio, 0.0, 1.0, "give a share between 0 (see all) and 1 (see one)")
        within("top_p", self.top_p, 0.0, 1.0, "give a share of the attention between 0 and 1")
        if self.depth is not None:
            within("depth", self.depth, 1, 64, "give 1 to 64 tokens")
            self._refuse_without_effect("depth", self.depth, ("auto", "dynamic", "chain"))
        if self.nodes is not None:
            within("nodes", self.nodes, 2, 1024, "give 2 to 1024 nodes, root included")
            self._refuse_without_effect("nodes", self.nodes, ("auto", "dynamic"))
        if self.width is not None:
            within("width", self.width, 1, 64, "give 1 to 64 nodes a level")

    def _refuse_without_effect(self, name: str, value: int, trees: Collection[TreeName]) -> None:
        if self.tree not in trees:
            raise ConfigError(
                Setting(name, value),
                "has no effect on",
                Setting("tree", self.tree),
                fix=f"it is for {', '.join(trees)}",
            )

    @property
    def most_depth(self) -> int:
        """Depth of the deepest tree, in tokens."""
        if self.tree == "static":
            return 5
        return self.depth or (16 if self.tree == "auto" else 5)

    @property
    def most_nodes(self) -> int:
        """Nodes of the largest tree, root included."""
        if self.tree == "static":
            return 26
        if self.tree == "chain":
            return self.most_depth + 1
        return self.nodes or (64 if self.tree == "auto" else 26)

    @property
    def most_width(self) -> int:
        """Nodes that a level of a dynamic tree expands."""
        return self.width or 4


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What the target writes.

    Attributes:
        max_new_tokens: Most tokens of a caption, the end-of-sequence token included.
        temperature: 0 is greedy, whatever `do_sample` the checkpoint ships; above 0 samples.
        top_k: Sample from the k most likely tokens; None takes the checkpoint's own, 0 is off.
        seed: Seed of the sampling noise. The same seed gives the same caption.
        exact: Decide near-ties as stock `generate()` would for the video alone, by plain steps. Without it, bfloat16
            and float16 may choose otherwise where two tokens are about equally likely.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        of_type("exact", self.exact, bool, "give True or False")
        for name in ("max_new_tokens", "seed"):
            whole(name, getattr(self, name))
        within("max_new_tokens", self.max_new_tokens, 1, 1 << 20, "give 1 to 1048576 tokens")
        within("temperature", self.temperature, 0.0, 100.0, "give 0 (greedy) to 100")
        if 0 < self.temperature < 1e-6:
            fix = "give 0 (greedy), or 1e-6 to 100"
            raise ConfigError(Setting("temperature", self.temperature), "is too small", fix=fix)
        within("seed", self.seed, 0, (1 << 63) - 1, "give 0 to 2**63 - 1")
        if self.top_k is not None:
            whole("top_k", self.top_k)
            within("top_k", self.top_k, 0, 1 << 31, "give the number of most likely tokens, or 0 for all")


@dataclass(frozen=True, slots=True)
class FrameSettings:
    """Which frames of a video are read, and how large.

    Attributes:
        fps: Frames per second to read. Exclusive with `num_frames`; 2.0 when both are None.
        num_frames: Frames to read, spread evenly.
        min_frames: Fewest frames when `fps` decides (a shorter video gives all it has).
        max_frames: Most frames when `fps` decides.
        max_pixels: Most pixels (height x width) of a frame; larger ones are scaled down while decoding.
            None: the processor's own limit.
        total_pixels: Most pixels of all frames of a video together; None: no such limit.
        start_s: Start of the part to read, in seconds from the video's first frame.
        end_s: End of that part in seconds, exclusive; None: the end of the video.
        backend: `auto` is PyAV; `decord` refuses files that it cannot be trusted with.
        min_decoded: Share of the chosen frames that must be intact in a damaged video, 0..1; the others are
            left out.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    max_pixels: int | None = None
    total_pixels: int | None = None
    start_s: float = 0.0
    end_s: float | None = None
    backend: BackendName = "auto"
    min_decoded: float = 0.5

    def __post_init__(self) -> None:
        one_of("backend", self.backend, BACKENDS)
        if self.fps is not None and self.num_frames is not None:
            both = (Setting("fps", self.fps), "and", Setting("num_frames", self.num_frames))
            raise ConfigError(*both, "exclude each other", fix="give one")
        for name in ("num_frames", "min_frames", "max_frames", "max_pixels", "total_pixels"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if self.fps is not None:
            within("fps", self.fps, 1e-3, 1000.0, "give 0.001 to 1000 frames per second")
        if self.num_frames is not None:
            within("num_frames", self.num_frames, 1, 100_000, "give 1 to 100000 frames")
        within("min_frames", self.min_frames, 1, 100_000, "give 1 to 100000 frames")
        within("max_frames", self.max_frames, self.min_frames, 100_000, "give min_frames to 100000 frames")
        if self.max_pixels is not None:
            within("max_pixels", self.max_pixels, 16, 1 << 28, "give 16 to 268435456 pixels a frame")
        if self.total_pixels is not None:
            within("total_pixels", self.total_pixels, 16, 1 << 40, "give at least 16 pixels a video")
        within("start_s", self.start_s, 0.0, 1e9, "give seconds from the start of the video")
        within("min_decoded", self.min_decoded, 0.0, 1.0, "give a share of the frames between 0 and 1")
        if self.end_s is not None:
            number("end_s", self.end_s, "give seconds from the start of the video")
            if not self.end_s > self.start_s:
                both = (Setting("end_s", self.end_s), "is not after", Setting("start_s", self.start_s))
                raise ConfigError(*both, fix="give a later end")
