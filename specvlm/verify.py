"""Which guesses the target accepts. Pure functions of tensors: no model, clock or cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specvlm.tree import Guesses


class Accepted(NamedTuple):
    """The longest path on which every node is the target's own choice."""

    path: (
        torch.Tensor
    )  # int64 [B, D + 1], node index at each depth, the root first; past `guessed` meaningless
    guessed: torch.Tensor  # int64 [B], accepted guesses on it, 0..D
    tokens: torch.Tensor  # int64 [B, D + 1], what the caption gains: accepted guesses, then the bonus token


def accept(guesses: Guesses, choices: torch.Tensor, depth: int) -> Accepted:
    """Accept the nodes that equal the target's choice at their parent, and all of whose ancestors do.

    Args:
        guesses: A tree of N nodes; the children of a node are distinct tokens.
        choices: int64 [B, N], the token that the target writes after each node.
        depth: D.
    """
    if depth == 0:  # nothing was guessed: the root's choice is all there is
        root = torch.zeros_like(choices[:, 0])
        return Accepted(root[:, None], root, choices)
    match = guesses.tokens == choices.gather(1, guesses.parents)
    match[:, 0].fill_(True)
    accepted = ~(guesses.ancestors & ~match[:, None, :]).any(dim=-1)  # [B, N]
    count, last = (guesses.depths * accepted).max(dim=1)
    above = guesses.ancestors.gather(1, last[:, None, None].expand(-1, 1, guesses.tokens.shape[1])).squeeze(1)
    levels = torch.arange(depth + 1, device=choices.device)
    on_path = above[:, None, :] & (guesses.depths[:, None, :] == levels[:, None])  # [B, D + 1, N]
    path = on_path.to(torch.uint8).argmax(dim=-1)
    bonus = choices.gather(1, last[:, None])
    following = guesses.tokens.gather(1, path.roll(-1, dims=1))
    tokens = torch.where(levels < count[:, None], following, bonus)
    return Accepted(path, count, tokens)


def ranks_of(guesses: Guesses, accepted: Accepted) -> torch.Tensor:
    """Where the draft ranked each token that the target wrote, int64 [B, D + 1].

    0 is the draft's first choice at the node that the token follows, K: none of its K most likely; -1: not known,
    because the node was not expanded, or the round ended above it.
    """
    assert guesses.likeliest is not None
    slots = guesses.slots.gather(1, accepted.path)  # [B, D + 1]
    likeliest = guesses.likeliest.gather(1, slots[..., None].expand(-1, -1, guesses.likeliest.shape[-1]))
    hit = likeliest == accepted.tokens[..., None]  # [B, D + 1, K]
    rank = torch.where(hit.any(dim=-1), hit.to(torch.uint8).argmax(dim=-1), hit.shape[-1])
    level = torch.arange(slots.shape[1], device=slots.device)
    known = (level <= accepted.guessed[:, None]) & ((slots > 0) | (level == 0))
    return torch.where(known, rank, -1)
