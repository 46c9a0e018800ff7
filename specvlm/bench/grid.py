"""What a bench compares: methods, and of `specvlm` each combination. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from specvlm.bench.records import METHODS, Configuration, MethodName
from specvlm.config import FrameSettings, PrunerName, SpeculationSettings, TreeName
from specvlm.errors import ConfigError

WITH_DRAFT: tuple[MethodName, ...] = ("assisted", "sd", "specvlm")
_SPECULATION = SpeculationSettings()


@dataclass(frozen=True, slots=True)
class Grid:
    """Each method, and of `specvlm` each combination, at each number of frames.

    Attributes:
        methods: In the order in which they are shown.
        num_frames: Frames of each video; None: as the bench's frame settings say.
        pruners: Of `specvlm`.
        prune_ratios: Of `specvlm`.
        trees: Of `specvlm` and of `sd`.
    """

    methods: tuple[MethodName, ...] = METHODS
    num_frames: tuple[int | None, ...] = (None,)
    pruners: tuple[PrunerName, ...] = (_SPECULATION.pruner,)
    prune_ratios: tuple[float, ...] = (_SPECULATION.prune_ratio,)
    trees: tuple[TreeName, ...] = (_SPECULATION.tree,)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"methods={method!r} is unknown; choose from {', '.join(METHODS)}")
        for pruner, ratio, tree in product(self.pruners, self.prune_ratios, self.trees):
            SpeculationSettings(pruner=pruner, prune_ratio=ratio, tree=tree)  # refuses what is out of range
        for number in self.num_frames:
            FrameSettings(num_frames=number)

    def configurations(self, num_frames: int | None) -> list[Configuration]:
        """Those of one number of frames, each once; where nothing is pruned, `specvlm` has one for each tree."""
        found: list[Configuration] = []
        for method in self.methods:
            if method == "specvlm":
                found += self._pruned(num_frames)
            elif method == "sd":
                found += [Configuration("sd", num_frames, "none", 0.0, tree) for tree in self.trees]
            else:
                found.append(Configuration(method, num_frames))
        return list(dict.fromkeys(found))

    def all(self) -> list[Configuration]:
        """Those of all numbers of frames."""
        return [one for number in dict.fromkeys(self.num_frames) for one in self.configurations(number)]

    def _pruned(self, num_frames: int | None) -> list[Configuration]:
        """At a ratio of 0 all pruners are the same computation: the first stands for them."""
        found: dict[tuple[str, float, TreeName], Configuration] = {}
        for pruner, asked, tree in product(self.pruners, self.prune_ratios, self.trees):
            ratio = 0.0 if pruner == "none" else asked
            one = Configuration("specvlm", num_frames, pruner, ratio, tree)
            found.setdefault((pruner if ratio else "none", ratio, tree), one)
        return list(found.values())

    @property
    def needs_draft(self) -> MethodName | None:
        """The first method that cannot run without a draft; None: all can."""
        return next((method for method in self.methods if method in WITH_DRAFT), None)
