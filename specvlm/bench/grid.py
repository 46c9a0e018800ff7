"""What a bench compares: methods, and of `specvlm` each combination. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from specvlm.bench.records import METHODS, Configuration, MethodName
from specvlm.config import FrameSettings, PrunerName, SpeculationSettings, TreeName, within
from specvlm.errors import ConfigError, Setting

HEAD: MethodName = "head"
MOST_BATCH = 1024
WITH_SMALL_MODEL: tuple[MethodName, ...] = ("assisted", "sd", "specvlm")
WITH_DRAFT: tuple[MethodName, ...] = (*WITH_SMALL_MODEL, HEAD)
_OF_A_PAIR = tuple(method for method in METHODS if method != HEAD)
_SPECULATION = SpeculationSettings()


def _shown(name: str) -> str:
    """A draft's name, which comes from outside, as a table may show it: no control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


class GridDraft(NamedTuple):
    """One draft of a bench."""

    name: str | None = None  # None: that of the captioner which is given
    is_head: bool = False  # a trained head, which has a compressor of its own; else a small model


@dataclass(frozen=True, slots=True)
class Grid:
    """Each method with each draft that suits it, and of `specvlm` each combination, at each number of frames.

    Attributes:
        methods: In the order in which they are shown.
        num_frames: Frames of each video; None: as the bench's frame settings say.
        pruners: Of `specvlm`.
        prune_ratios: Of `specvlm`.
        trees: Of `specvlm`, `sd` and `head`.
        drafts: Small models, for `assisted`, `sd` and `specvlm`, and trained heads, for `head`.
        batch_sizes: Captions in the making at once, each number for itself.
        chain_depth: Depth of chains; None: the default.
        exact: Whether near-ties are decided by plain steps; with both, each method with a draft runs both ways.
    """

    methods: tuple[MethodName, ...] = _OF_A_PAIR
    num_frames: tuple[int | None, ...] = (None,)
    pruners: tuple[PrunerName, ...] = (_SPECULATION.pruner,)
    prune_ratios: tuple[float, ...] = (_SPECULATION.prune_ratio,)
    trees: tuple[TreeName, ...] = (_SPECULATION.tree,)
    drafts: tuple[GridDraft, ...] = (GridDraft(),)
    batch_sizes: tuple[int, ...] = (1,)
    chain_depth: int | None = None
    exact: tuple[bool, ...] = (True,)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(
                    Setting("methods", method), "is unknown", fix=f"choose from {', '.join(METHODS)}"
                )
        for pruner, ratio, tree in product(self.pruners, self.prune_ratios, self.trees):
            SpeculationSettings(pruner=pruner, prune_ratio=ratio, tree=tree)  # refuses what is out of range
        for number in self.num_frames:
            FrameSettings(num_frames=number)
        for size in self.batch_sizes:
            within("batch_size", size, 1, MOST_BATCH, f"give 1 to {MOST_BATCH}")

    @property
    def is_batched(self) -> bool:
        """Whether captions are made several at once."""
        return self.batch_sizes != (1,)

    def configurations(self, num_frames: int | None) -> list[Configuration]:
        """Those of one number of frames, each once, one batch size after the other.

        Where nothing is pruned, `specvlm` has one for each tree.
        """
        alone = self._alone(num_frames)
        return [replace(one, batch_size=size) for size in dict.fromkeys(self.batch_sizes) for one in alone]

    def _alone(self, num_frames: int | None) -> list[Configuration]:
        """Those of a batch size of 1."""
        found: list[Configuration] = []
        for method in self.methods:
            if method in WITH_DRAFT:
                for draft in self.suiting(method):
                    found += self._drafted(method, num_frames, draft)
            else:
                exact = method == "stock" or self.exact[0]
                found.append(Configuration(method, num_frames, exact=exact))
        return list(dict.fromkeys(found))

    def _drafted(
        self, method: MethodName, num_frames: int | None, draft: GridDraft
    ) -> Iterator[Configuration]:
        """Those of one method with one draft."""
        label = self._label(draft)
        for one in self._of_method(method, num_frames):
            depth = self.chain_depth if one.tree == "chain" else None
            for exact in (True,) if method == "assisted" else self.exact:
                yield replace(one, draft=draft.name, draft_label=label, depth=depth, exact=exact)

    def _of_method(self, method: MethodName, num_frames: int | None) -> list[Configuration]:
        if method == "specvlm":
            return self._pruned(num_frames)
        if method == "sd":
            return [Configuration(method, num_frames, "none", 0.0, tree) for tree in self.trees]
        if method == HEAD:
            return [Configuration(method, num_frames, tree=tree) for tree in self.trees]
        return [Configuration(method, num_frames)]

    def _label(self, draft: GridDraft) -> str:
        """Name a draft that is not the only one of its kind, without folders if the short name is unique."""
        kin = [str(one.name) for one in self.drafts if one.is_head == draft.is_head]
        if len(kin) == 1:
            return ""
        short = str(draft.name).rpartition("/")[2]
        alike = sum(name.rpartition("/")[2] == short for name in kin)
        return _shown(short if alike == 1 else str(draft.name))

    def all(self) -> list[Configuration]:
        """Those of all numbers of frames."""
        return [one for number in dict.fromkeys(self.num_frames) for one in self.configurations(number)]

    def _pruned(self, num_frames: int | None) -> list[Configuration]:
        """At a ratio of 0 all pruners are the same computation: only the first is run."""
        found: dict[tuple[str, float, TreeName], Configuration] = {}
        for pruner, asked, tree in product(self.pruners, self.prune_ratios, self.trees):
            ratio = 0.0 if pruner == "none" else asked
            one = Configuration("specvlm", num_frames, pruner, ratio, tree)
            found.setdefault((pruner if ratio else "none", ratio, tree), one)
        return list(found.values())

    def suiting(self, method: MethodName) -> tuple[GridDraft, ...]:
        """The drafts that a method can use."""
        if method not in WITH_DRAFT:
            return ()
        return tuple(one for one in self.drafts if one.is_head == (method == HEAD))

    @property
    def needs_draft(self) -> MethodName | None:
        """The first method that needs a draft and has none of its kind; None: all can run."""
        lacking = (method for method in self.methods if method in WITH_DRAFT and not self.suiting(method))
        return next(lacking, None)

    def used(self) -> tuple[GridDraft, ...]:
        """The drafts that some method uses."""
        used = {one for method in self.methods for one in self.suiting(method)}
        return tuple(one for one in self.drafts if one in used)
