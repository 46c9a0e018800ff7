"""Settled choices: which tokens of a pass over several rows are those that steps of one row would choose.

Matrix products round differently for different numbers of rows. So a pass over N rows, and a step that reads keys and
values which such passes have written, give slightly other logits than stock `generate()`, which runs one row at a
time. That matters only where the best two logits lie closer together than what it changes. How much it changes is
measured, for each target, dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specvlm.cache import KVCache
from specvlm.model import Lengths, Nodes, VideoLM

STEPS = 48  # tokens of the measurement
ROWS = (6, 16)  # of its passes
LIKELIEST = 8  # logits that are compared: the others are never chosen
SAFETY = 1.5  # the next 48 tokens may change more than the first

FIRST_SPELL, LONGEST_SPELL = 64, 4096  # plain steps in a row
WINDOW, FEWEST_DECIDED = 256, 3  # tokens of a caption that are looked at together
# Plain steps for each token, on top of its round. A pass over a batch saves more than one over a sequence.
MOST_REPLAYED, MOST_REPLAYED_OF_BATCH = 0.4, 0.8


class Settling:
    """What is known of one target.

    Attributes:
        bound: A choice whose logit leads by no more than this is not settled; None: not measured yet.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.bound: float | None = None

    def hear(self, change: float) -> None:
        """A lead was seen to change by this much."""
        if self.bound is not None:
            self.bound = max(self.bound, change)

    @torch.inference_mode()
    def measure(
        self, target: VideoLM, kept: Sequence[torch.Tensor], length: int, position: int, token: int
    ) -> None:
        """Write a caption in steps of one row, then run its tokens in passes over several, and compare the logits.

        Only tokens before the first logits that are not finite count; without any it stays unmeasured.

        Args:
            target: The model.
            kept: Keys and values of a prompt, as `KVCache.copy_out` gives them.
            length: Its tokens.
            position: Of the first token behind it.
            token: That token.
        """
        steps = STEPS if target.most_slots is None else min(STEPS, target.most_slots - length)
        cache = target.new_cache(length + steps)
        cache.copy_in(0, kept)
        tokens, alone = [token], list[torch.Tensor]()
        for index in range(steps):
            logits = target.logits(target.step(tokens[-1], position + index, cache, length + index))
            if not bool(logits.isfinite().all()):
                break
            alone.append(logits[0, 0])
            tokens.append(int(logits.argmax()))
        if not alone:
            return
        expected = torch.stack(alone)  # [steps, C]
        changes = [_change(expected, _together(target, cache, length, position, tokens, n)) for n in ROWS]
        bound = max(SAFETY * max(changes), _step_of(expected.amax(), target.dtype))
        if math.isfinite(sum(changes) + bound):
            self.bound = bound


def _together(
    target: VideoLM, cache: KVCache, length: int, position: int, tokens: Sequence[int], rows: int
) -> torch.Tensor:
    """Logits [steps, C] of the same tokens but the last, so many to a pass."""
    device, found = cache.base.device, list[torch.Tensor]()
    steps = len(tokens) - 1
    for first in range(0, steps, rows):
        count = min(rows, steps - first)
        at = first + torch.arange(count, device=device)[None]
        nodes = Nodes(
            torch.tensor([tokens[first : first + count]], device=device),
            (position + at)[None],
            length + at,
            torch.ones(1, count, count, dtype=torch.bool, device=device).tril(),
        )
        committed = length + first
        lengths = Lengths(torch.tensor([committed], device=device), (committed,), (committed,))
        found.append(target.logits(target.forward_nodes(nodes, cache, lengths, count))[0])
    return torch.cat(found)


def _change(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The most by which the lead of a likely token over another one differs; both [n, C]."""
    likely = expected.topk(min(LIKELIEST, expected.shape[-1]), dim=-1).indices
    change = (found - expected).gather(-1, likely)
    return float((change.amax(-1) - change.amin(-1)).max())


def _step_of(logit: torch.Tensor, dtype: torch.dtype) -> float:
    """From a logit to the next one that the dtype knows, or a little more: nothing changes by less."""
    return float(logit.abs()) * torch.finfo(dtype).eps


class Worth:
    """Whether rounds are worth it, though some of what they write is run again in plain steps.

    Where most of it is, plain steps alone are taken for a while, and for twice as long when that is seen again.
    """

    def __init__(self) -> None:
        """Rounds are tried."""
        self._spell, self._left = FIRST_SPELL, 0
        self._tokens = self._replayed = self._decided = 0

    @property
    def plain(self) -> bool:
        """Whether the next step is plain."""
        return self._left > 0

    def hear_plain(self) -> None:
        """A plain step was taken."""
        self._left -= 1

    def hear(self, rows: int, tokens: int, decided: int, replayed: int) -> None:
        """A round of so many sequences wrote tokens, of which plain steps decided some; how many steps that took."""
        self._tokens, self._replayed = self._tokens + tokens, self._replayed + replayed
        self._decided += decided
        most = MOST_REPLAYED if rows == 1 else MOST_REPLAYED_OF_BATCH
        if self._decided >= FEWEST_DECIDED and self._replayed > most * self._tokens:
            self._left, self._spell = self._spell, min(2 * self._spell, LONGEST_SPELL)
        elif self._tokens < WINDOW * rows:
            return
        else:
            self._spell = FIRST_SPELL
        self._tokens = self._replayed = self._decided = 0
