"""Shapes of one round's guesses: chains and static trees from paths of draft ranks, and EAGLE-2's dynamic tree.

A shape grows by asking a draft to score frontiers, level by level, with tensor operations of fixed shape only. It
knows neither models nor caches; slots are numbers that a draft may use to place its keys and values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from specvlm.config import SpeculationSettings

# SpecVLM's static tree (arXiv 2508.16201, appendix; that of EAGLE, arXiv 2401.15077): paths of draft ranks.
STATIC_PATHS = (
    *((0,), (1,), (2,), (3,)),
    *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2)),
    *((0, 0, 0, 0, 0), (0, 0, 0, 0, 1)),
)


class Guesses(NamedTuple):
    """A tree of guessed tokens. Node 0 is the root: the last token that the target wrote."""

    tokens: torch.Tensor  # int64 [B, N]
    parents: torch.Tensor  # int64 [B, N], node index; the root is its own parent
    depths: torch.Tensor  # int64 [B, N], the root has 0
    ancestors: torch.Tensor  # bool [B, N, N]: [b, i, j] is True when j is i or above it
    slots: (
        torch.Tensor
    )  # int64 [B, N], the slot that an expanded node took while the tree grew; leaves have 0
    likeliest: torch.Tensor | None = (
        None  # int64 [B, slots, K], the draft's K most likely tokens after each slot
    )


class Frontier(NamedTuple):
    """Nodes whose children are wanted next."""

    tokens: torch.Tensor  # int64 [B, k]
    path: torch.Tensor  # int64 [B, k, depth], tokens from below the root down to the node itself
    depth: int
    first_slot: int  # the k nodes take slots first_slot.., counted from the root's, which is 0
    # bool [B, k, slots], which slots of this round a node may look at, its own included; None: all taken so far
    sees: torch.Tensor | None
    parents: (
        torch.Tensor
    )  # int64 [B, k], index of a node's parent in the frontier one level above; the root: 0


# Scores of the next token after each frontier node: float32 [B, k, tokens that may be guessed], higher is likelier.
Expand = Callable[[Frontier], torch.Tensor]


def _root_frontier(root: torch.Tensor) -> Frontier:
    """The root tokens [B] alone."""
    tokens = root[:, None]
    return Frontier(tokens, root.new_empty(*tokens.shape, 0), 0, 0, None, torch.zeros_like(tokens))


class TreeShape(ABC):
    """How one round's guesses are arranged."""

    nodes: int  # N, root included
    depth: int  # D
    slots: int  # slots that a draft needs for the nodes it expands, root included
    widths: tuple[int, ...]  # nodes that are expanded at each level, the root's first

    @abstractmethod
    def grow(self, root: torch.Tensor, expand: Expand, ids: torch.Tensor | None = None) -> Guesses:
        """Grow to N nodes.

        Args:
            root: int64 [B], tokens.
            expand: Called once per level, never for leaves.
            ids: int64, the token of each column of the scores; None: a column's number is its token.
        """


class RootShape(TreeShape):
    """The tree of plain decoding: the root alone, nothing guessed."""

    nodes, depth, slots, widths = 1, 0, 1, ()

    def grow(self, root: torch.Tensor, expand: Expand, ids: torch.Tensor | None = None) -> Guesses:
        """The root tokens [B]; nothing is expanded."""
        rows = root.shape[0]
        zeros = torch.zeros(rows, 1, dtype=torch.long, device=root.device)
        itself = torch.ones(rows, 1, 1, dtype=torch.bool, device=root.device)
        return Guesses(root[:, None], zeros, zeros, itself, zeros)


ROOT = RootShape()  # the only one: what is kept by shape is kept once


class _Level(NamedTuple):
    """One level of a static shape; indices count within the level, but for `pick`."""

    width: int  # most children of one node above
    pick: torch.Tensor  # [n], into the flattened [expanded nodes above, width] top tokens
    parent: torch.Tensor  # [n], which expanded node above
    expand: torch.Tensor  # [k], which of the n are expanded
    above: torch.Tensor  # [k], which expanded node above is their parent
    sees: torch.Tensor | None  # bool [k, slots]; None: all slots so far
    first_slot: int


class StaticShape(TreeShape):
    """A fixed tree given as paths of draft ranks; a chain is the tree of the paths 0, 00, 000, ..."""

    def __init__(self, paths: tuple[tuple[int, ...], ...], device: torch.device, ranks: int = 0) -> None:
        """`paths` holds every node but the root.

        With `ranks`, guesses hold that many of the draft's most likely tokens after each node that was expanded.
        """
        self._device, self._ranks = device, ranks
        index = {(): 0} | {path: i + 1 for i, path in enumerate(sorted(paths, key=lambda p: (len(p), p)))}
        inner = {path[:-1] for path in index if path}
        slot = {path: i for i, path in enumerate(p for p in index if p in inner)}
        self.nodes, self.depth, self.slots = len(index), max(map(len, index)), len(slot)
        self.widths = tuple(sum(len(path) == depth for path in inner) for depth in range(self.depth))
        self._levels = [self._level(index, slot, depth) for depth in range(1, self.depth + 1)]
        ancestors = torch.zeros(self.nodes, self.nodes, dtype=torch.bool)
        for path, i in index.items():
            ancestors[i, [index[path[:d]] for d in range(len(path) + 1)]] = True
        self._ancestors = ancestors.to(device)
        self._parents = self._tensor([index[path[:-1]] for path in index])
        self._depths = self._tensor([len(path) for path in index])
        self._slots = self._tensor([slot.get(path, 0) for path in index])

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _level(
        self, index: dict[tuple[int, ...], int], slot: dict[tuple[int, ...], int], depth: int
    ) -> _Level:
        above = [path for path in slot if len(path) == depth - 1]
        here = [path for path in index if len(path) == depth]
        inner = [path for path in slot if len(path) == depth]
        width = max(path[-1] for path in here) + 1
        sees = torch.zeros(len(inner), len(slot), dtype=torch.bool)
        for i, path in enumerate(inner):
            sees[i, [slot[path[:d]] for d in range(depth + 1)]] = True
        return _Level(
            width,
            self._tensor([above.index(path[:-1]) * width + path[-1] for path in here]),
            self._tensor([above.index(path[:-1]) for path in here]),
            self._tensor([here.index(path) for path in inner]),
            self._tensor([above.index(path[:-1]) for path in inner]),
            None if len(inner) == 1 and bool(sees[0, : slot[inner[0]] + 1].all()) else sees.to(self._device),
            slot[inner[0]] if inner else len(slot),
        )

    def grow(self, root: torch.Tensor, expand: Expand, ids: torch.Tensor | None = None) -> Guesses:
        """Grow from root tokens [B] to N nodes."""
        rows = root.shape[0]
        tokens, path = [root[:, None]], root.new_empty(rows, 1, 0)
        likeliest = []
        scores = expand(_root_frontier(root))
        for depth, level in enumerate(self._levels, start=1):
            top = _likeliest(scores, max(level.width, self._ranks), ids)
            likeliest.append(top[..., : self._ranks])
            here = top[..., : level.width].flatten(1)[:, level.pick]  # [B, n]
            tokens.append(here)
            if level.expand.numel():
                path = torch.cat((path[:, level.parent], here[..., None]), dim=-1)[:, level.expand]
                sees = None if level.sees is None else level.sees.expand(rows, -1, -1)
                parents = level.above.expand(rows, -1)
                scores = expand(Frontier(here[:, level.expand], path, depth, level.first_slot, sees, parents))
        return Guesses(
            torch.cat(tokens, dim=1),
            self._parents.expand(rows, -1),
            self._depths.expand(rows, -1),
            self._ancestors.expand(rows, -1, -1),
            self._slots.expand(rows, -1),
            torch.cat(likeliest, dim=1) if self._ranks else None,
        )


def _tokens(columns: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    return columns if ids is None else ids[columns]


def _likeliest(scores: torch.Tensor, count: int, ids: torch.Tensor | None) -> torch.Tensor:
    """The most likely tokens [B, k, count], the best first; where there are not as many, the last one again."""
    there = min(count, scores.shape[-1])
    tokens = _tokens(scores.topk(there, dim=-1).indices, ids)
    if there == count:
        return tokens
    return torch.cat((tokens, tokens[..., -1:].expand(-1, -1, count - there)), dim=-1)


def _likelihood(scores: torch.Tensor) -> torch.Tensor:
    """Log-probabilities; a draft's NaN counts as impossible, since it would sort before the root."""
    return scores.log_softmax(dim=-1).nan_to_num(nan=float("-inf"), neginf=float("-inf"))


class _Grown(NamedTuple):
    """Candidates of the dynamic tree so far, and the frontier."""

    tokens: torch.Tensor  # [B, candidates]
    parents: torch.Tensor  # [B, candidates], candidate index
    value: torch.Tensor  # [B, candidates], cumulative draft log-probability
    slots: torch.Tensor  # [B, candidates], 0 where not expanded
    frontier: torch.Tensor  # [B, k], candidate index
    above: torch.Tensor  # [B, k], the parent's index in the frontier before
    path: torch.Tensor  # [B, k, depth]
    sees: torch.Tensor  # bool [B, k, slots]


class DynamicShape(TreeShape):
    """EAGLE-2 (arXiv 2406.16858, section 4): expand the most likely frontier, then keep the most likely nodes."""

    def __init__(self, depth: int, nodes: int, width: int, device: torch.device) -> None:
        """Expand `width` nodes a level for `depth` levels; keep the best `nodes`, root included.

        A path of `nodes` holds `nodes - 1` guesses at most, so no deeper level is ever grown.
        """
        depth = min(depth, nodes - 1)
        self.depth, self._width, self._device = depth, width, device
        candidates = 1 + width + (depth - 1) * width * width
        self.nodes = min(nodes, candidates)
        self.slots = 1 + (depth - 1) * width
        self.widths = (1, *(width,) * (depth - 1))
        level_of = [0] + [1] * width + [d for d in range(2, depth + 1) for _ in range(width * width)]
        self._candidate_depths = torch.tensor(level_of, dtype=torch.long, device=device)

    def grow(self, root: torch.Tensor, expand: Expand, ids: torch.Tensor | None = None) -> Guesses:
        """Grow from root tokens [B] to N nodes."""
        grown = self._first_level(root, expand, ids)
        for depth in range(2, self.depth + 1):
            grown = self._next_level(grown, depth, expand, ids)
        return self._best(grown)

    def _first_level(self, root: torch.Tensor, expand: Expand, ids: torch.Tensor | None) -> _Grown:
        rows, k = root.shape[0], self._width
        sees = torch.zeros(rows, 1, self.slots, dtype=torch.bool, device=root.device)
        sees[..., 0].fill_(True)
        scores = expand(_root_frontier(root))
        value, columns = _likelihood(scores).topk(k, dim=-1)  # [B, 1, k]
        tokens, value = _tokens(columns, ids).flatten(1), value.flatten(1)
        return _Grown(
            torch.cat((root[:, None], tokens), dim=1),
            torch.zeros(rows, k + 1, dtype=torch.long, device=root.device),
            torch.cat((value.new_full((rows, 1), float("inf")), value), dim=1),
            torch.zeros(rows, k + 1, dtype=torch.long, device=root.device),
            torch.arange(1, k + 1, device=root.device).expand(rows, k),
            torch.zeros_like(tokens),
            tokens[..., None],
            sees.expand(rows, k, self.slots),
        )

    def _next_level(self, grown: _Grown, depth: int, expand: Expand, ids: torch.Tensor | None) -> _Grown:
        k, rows = self._width, grown.tokens.shape[0]
        first_slot = 1 + (depth - 2) * k
        taken = torch.arange(first_slot, first_slot + k, device=self._device)
        sees = grown.sees | (torch.arange(self.slots, device=self._device) == taken[:, None])
        slots = grown.slots.scatter(1, grown.frontier, taken.expand(rows, k))
        tokens = grown.tokens.gather(1, grown.frontier)  # [B, k]
        scores = expand(Frontier(tokens, grown.path, depth - 1, first_slot, sees, grown.above))
        step, columns = _likelihood(scores).topk(k, dim=-1)  # [B, k, k]
        value = (grown.value.gather(1, grown.frontier)[..., None] + step).flatten(1)  # [B, k * k]
        children = _tokens(columns, ids).flatten(1)
        best = value.topk(k, dim=1).indices  # [B, k], the next frontier within this level
        parent = best // k  # [B, k], which frontier node
        path = grown.path.gather(1, parent[..., None].expand(-1, -1, depth - 1))
        return _Grown(
            torch.cat((grown.tokens, children), dim=1),
            torch.cat((grown.parents, grown.frontier.repeat_interleave(k, dim=1)), dim=1),
            torch.cat((grown.value, value), dim=1),
            torch.cat((slots, torch.zeros_like(children)), dim=1),
            best + grown.tokens.shape[1],
            parent,
            torch.cat((path, children.gather(1, best)[..., None]), dim=-1),
            sees.gather(1, parent[..., None].expand(rows, k, self.slots)),
        )

    def _best(self, grown: _Grown) -> Guesses:
        """The N most likely candidates.

        A child is never likelier than its parent, so parents come along: the sort is stable, parents stand first.
        """
        rows, count = grown.tokens.shape
        order = grown.value.sort(dim=1, descending=True, stable=True).indices[:, : self.nodes]
        chosen = order.sort(dim=1).values  # [B, N], parents before children, the root first
        node_of = torch.zeros(rows, count, dtype=torch.long, device=self._device)
        node_of.scatter_(1, chosen, torch.arange(self.nodes, device=self._device).expand(rows, -1))
        parents = node_of.gather(1, grown.parents.gather(1, chosen))
        return Guesses(
            grown.tokens.gather(1, chosen),
            parents,
            self._candidate_depths[chosen],
            ancestors_of(parents, self.depth),
            grown.slots.gather(1, chosen),
        )


def ancestors_of(parents: torch.Tensor, depth: int) -> torch.Tensor:
    """Parents [B, N] (the root its own) -> bool [B, N, N], True where column is row or above it."""
    rows, nodes = parents.shape
    itself = torch.eye(nodes, dtype=torch.bool, device=parents.device).expand(rows, -1, -1)
    ancestors = itself
    for _ in range(depth):
        ancestors = itself | ancestors.gather(1, parents[..., None].expand(-1, -1, nodes))
    return ancestors


@lru_cache(maxsize=32)
def make_shape(settings: SpeculationSettings, vocabulary: int, device: torch.device) -> TreeShape:
    """The shape that settings ask for, built once; no wider than the `vocabulary` that is to choose from."""
    if settings.tree == "chain":
        return StaticShape(tuple((0,) * d for d in range(1, settings.most_depth + 1)), device)
    if settings.tree == "static":
        return StaticShape(STATIC_PATHS, device)
    return DynamicShape(
        settings.most_depth, settings.most_nodes, min(settings.most_width, vocabulary), device
    )
