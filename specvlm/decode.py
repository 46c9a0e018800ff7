"""THE loop: propose, verify, commit, until every row has its caption. Plain decoding is this loop with no guesses.

Inside a round nothing asks the host; at its end one small tensor comes back, which says what was accepted. The loop
knows neither videos nor files nor how a draft guesses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from specvlm.cache import SlabCache
from specvlm.drafts.base import Proposer
from specvlm.errors import NonFiniteLogitsError
from specvlm.model import VideoLM
from specvlm.prefill import Prompt
from specvlm.records import FinishReason
from specvlm.sampling import TokenRule
from specvlm.stats import StageClock
from specvlm.tree import Guesses
from specvlm.verify import Accepted, accept


@dataclass(slots=True)
class RowText:
    """What one row has written, on the host.

    Attributes:
        tokens: Committed tokens; complete once `finish_reason` is set.
        finish_reason: None while the row goes on.
        histogram: Entry k counts the rounds that gave k accepted guesses to the text.
    """

    limit: int
    eos: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    histogram: list[int] = field(default_factory=list)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens up to the first end of sequence or the limit; return what was appended."""
        taken: list[int] = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            taken.append(token)
            if token in self.eos:
                self.finish_reason = "stop"
            elif len(self.tokens) + len(taken) == self.limit:
                self.finish_reason = "length"
        self.tokens += taken
        return taken


class TargetRows(NamedTuple):
    """The target, prefilled for B rows."""

    model: VideoLM
    cache: SlabCache
    prompts: Sequence[Prompt]
    first_logits: torch.Tensor  # float32 [B, 1, C]


class _Heads(NamedTuple):
    """Where each row is: its last token, not yet in any cache, and that token's index in the caption."""

    root: torch.Tensor  # int64 [B]
    step: torch.Tensor  # int64 [B]


def _choose(rule: TokenRule, logits: torch.Tensor, guesses: Guesses) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's choice after each node, int64 [B, N], and whether its logits were finite, bool [B, N]."""
    nodes = guesses.tokens.shape[1]
    below_root = guesses.ancestors[:, :, 1:]  # [B, N, N - 1]
    path = torch.where(below_root, guesses.tokens[:, None, 1:], guesses.tokens[:, :1, None])
    best = rule.scores(logits, guesses.depths, path.expand(-1, nodes, -1)).max(dim=-1)
    return best.indices, best.values.isfinite()


class _Verifier:
    """The target's half of a round."""

    def __init__(self, rows: TargetRows, rule: TokenRule, depth: int) -> None:
        self._rows, self._rule, self._depth = rows, rule, depth
        device = rows.model.device
        self._lengths = torch.tensor([prompt.length for prompt in rows.prompts], device=device)
        self._positions = torch.tensor([prompt.next_position for prompt in rows.prompts], device=device)
        self._longest_prompt = max(prompt.length for prompt in rows.prompts)
        self._levels = torch.arange(depth + 1, device=device)

    def verify(self, heads: _Heads, guesses: Guesses, longest: int) -> tuple[Accepted, torch.Tensor]:
        """One forward over all N nodes; -> what is accepted, and per row whether all its logits were finite."""
        model, cache = self._rows.model, self._rows.cache
        nodes = guesses.tokens.shape[1]
        lengths = self._lengths + heads.step
        visible = self._longest_prompt + longest + nodes
        slots = lengths[:, None] + torch.arange(nodes, device=lengths.device)
        positions = (self._positions + heads.step)[:, None] + guesses.depths
        hidden = model.forward_nodes(
            guesses.tokens, positions[None], cache, slots, guesses.ancestors, lengths, visible
        )
        choices, finite = _choose(self._rule, model.logits(hidden), guesses)
        accepted = accept(guesses, choices, self._depth)
        return accepted, finite.gather(1, accepted.path).all(dim=1)

    def commit(self, accepted: Accepted, heads: _Heads) -> None:
        """Move the accepted path's keys and values behind the committed ones."""
        if self._depth:
            first = (self._lengths + heads.step)[:, None]
            self._rows.cache.commit(first + accepted.path, first + self._levels)


def _first_tokens(rows: TargetRows, rule: TokenRule) -> tuple[torch.Tensor, bool]:
    """The token that the prefill's logits choose, int64 [B, 1], and whether all logits were finite."""
    zero = torch.zeros(rows.first_logits.shape[0], dtype=torch.long, device=rows.first_logits.device)
    rule.begin_round(zero, 0)
    path = torch.empty(zero.shape[0], 1, 0, dtype=torch.long, device=zero.device)
    best = rule.scores(rows.first_logits, zero[:, None], path).max(dim=-1)
    rule.commit(best.indices, zero + 1)
    return best.indices, bool(best.values.isfinite().all())


def _refuse_non_finite(finite: bool) -> None:
    if not finite:
        raise NonFiniteLogitsError(
            "the target's logits are NaN or infinite; no caption was kept (try another --dtype)"
        )


@torch.inference_mode()
def _round(
    verifier: _Verifier,
    proposer: Proposer,
    rule: TokenRule,
    heads: _Heads,
    going: torch.Tensor,
    longest: int,
    clock: StageClock,
) -> tuple[_Heads, list[list[int]]]:
    """One round; `going` int64 [B] is 0 for rows that are done, which stay where they are.

    Returns the next heads, and per row [finite, accepted, tokens...] on the host.
    """
    rule.begin_round(heads.step + 1, proposer.depth)
    with clock.stage("draft"):
        guesses = proposer.propose(heads.root, heads.step, longest)
    with clock.stage("verify"):
        accepted, finite = verifier.verify(heads, guesses, longest)
    with clock.stage("commit"):
        verifier.commit(accepted, heads)
        proposer.commit(guesses, accepted, heads.step)
        rule.commit(accepted.tokens, (accepted.guessed + 1) * going)
        bonus = accepted.tokens.gather(1, accepted.guessed[:, None]).squeeze(1)
        root = torch.where(going.bool(), bonus, heads.root)
        step = heads.step + (accepted.guessed + 1) * going
    report = torch.cat((finite.long()[:, None], accepted.guessed[:, None], accepted.tokens), dim=1)
    return _Heads(root, step), report.tolist()  # the round's only synchronisation


def decode(
    rows: TargetRows, proposer: Proposer, rule: TokenRule, texts: Sequence[RowText], clock: StageClock
) -> Iterator[list[list[int]]]:
    """Write the captions of B rows into `texts`; yield, after the prefill and after each round, each row's new tokens.

    Raises:
        NonFiniteLogitsError: The target gave NaN or infinite logits.
    """
    with torch.inference_mode():
        first, finite = _first_tokens(rows, rule)
        heads = _Heads(first[:, 0], torch.zeros_like(first[:, 0]))
        verifier = _Verifier(rows, rule, proposer.depth)
    _refuse_non_finite(finite)
    yield [text.take(tokens) for text, tokens in zip(texts, first.tolist(), strict=True)]
    for text in texts:
        text.histogram = [0] * (proposer.depth + 1)
    active: list[bool] = []
    while any(now := [text.finish_reason is None for text in texts]):
        if now != active:
            active = now
            going = torch.tensor(active, dtype=torch.long, device=heads.step.device)
            # A caption may end inside an accepted path: a row that is done waits at its last token, not beyond it.
            written = torch.tensor([len(text.tokens) - 1 for text in texts], device=heads.step.device)
            heads = heads._replace(step=torch.minimum(heads.step, written))
        longest = max(len(text.tokens) for text in texts) - 1
        with clock.host_stage("decode"):
            heads, reports = _round(verifier, proposer, rule, heads, going, longest, clock)
        yield [_take(*item) for item in zip(texts, reports, active, strict=True)]


def _take(text: RowText, report: list[int], active: bool) -> list[int]:
    """Give one row what its round wrote."""
    if not active:
        return []
    finite, accepted, *tokens = report
    _refuse_non_finite(bool(finite))
    taken = text.take(tokens[: accepted + 1])
    text.histogram[min(len(taken), accepted)] += 1
    return taken
