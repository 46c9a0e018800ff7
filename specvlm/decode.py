"""THE loop: propose, verify, commit, until every row has its caption. Plain decoding is this loop with no guesses.

Inside a round nothing asks the host; at its end one small tensor comes back, which says what was accepted. The tree
may be another one in every round. The loop knows neither videos nor files nor how a draft guesses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from specvlm.cache import SlabCache
from specvlm.choosing import Heard, TreeChooser
from specvlm.drafts.base import Horizon, Proposer
from specvlm.errors import NonFiniteLogitsError
from specvlm.graphs import Stage, index_step
from specvlm.model import Extent, Nodes, VideoLM
from specvlm.prefill import Prompt
from specvlm.records import FinishReason
from specvlm.sampling import TokenRule
from specvlm.stats import StageClock
from specvlm.tree import ROOT, Guesses, TreeShape
from specvlm.verify import Accept, Accepted, accept, ranks_of


@dataclass(slots=True)
class RowText:
    """What one row has written, on the host.

    Attributes:
        tokens: Committed tokens; complete once `finish_reason` is set.
        finish_reason: None while the row goes on.
        histogram: Entry k counts the rounds that gave k accepted guesses to the text.
        tries: Entry d - 1 counts the rounds whose guess at depth d was judged: those above it were right, and neither
            tree nor caption ended there.
        guessed: Guesses of all rounds, accepted or not.
    """

    limit: int
    eos: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    histogram: list[int] = field(default_factory=list)
    tries: list[int] = field(default_factory=list)
    guessed: int = 0

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

    def count(self, shape: TreeShape, accepted: int) -> None:
        """Note a round of guesses, of which the text uses `accepted`."""
        self.histogram += [0] * (shape.depth + 1 - len(self.histogram))
        self.histogram[accepted] += 1
        judged = accepted if self.finish_reason is not None else min(accepted + 1, shape.depth)
        self.tries += [0] * (judged - len(self.tries))
        for depth in range(judged):
            self.tries[depth] += 1
        self.guessed += shape.nodes - 1


class TargetRows(NamedTuple):
    """The target, prefilled for B rows."""

    model: VideoLM
    cache: SlabCache
    prompts: Sequence[Prompt]
    first_logits: torch.Tensor  # float32 [B, 1, C]


class Speculation(NamedTuple):
    """What the loop guesses with."""

    chooser: TreeChooser
    # Prefills the draft, the first time that a tree needs it, told the first token of each row; None: no draft.
    begin: Callable[[Sequence[int]], Proposer] | None
    accept: Accept = accept


class _State(NamedTuple):
    """Where each row is, on the device. Rounds change it in place."""

    root: torch.Tensor  # int64 [B], the last token, not yet in any cache
    step: torch.Tensor  # int64 [B], that token's index in the caption
    going: torch.Tensor  # int64 [B], 0 for rows that are done, which stay where they are


def _choose(rule: TokenRule, logits: torch.Tensor, guesses: Guesses) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's choice after each node, int64 [B, N], and whether its logits were finite, bool [B, N]."""
    nodes = guesses.tokens.shape[1]
    below_root = guesses.ancestors[:, :, 1:]  # [B, N, N - 1]
    path = torch.where(below_root, guesses.tokens[:, None, 1:], guesses.tokens[:, :1, None])
    best = rule.scores(logits, guesses.depths, path.expand(-1, nodes, -1)).max(dim=-1)
    return best.indices, best.values.isfinite()


class _Verifier:
    """The target's half of a round."""

    def __init__(self, rows: TargetRows, rule: TokenRule, accept: Accept) -> None:
        self._rows, self._rule, self._accept = rows, rule, accept
        device = rows.model.device
        lengths = [prompt.length for prompt in rows.prompts]
        self._lengths = torch.tensor(lengths, device=device)
        self._positions = torch.tensor([prompt.next_position for prompt in rows.prompts], device=device)
        self._extent = Extent.of(lengths, rows.cache)

    @property
    def host_state(self) -> Hashable:
        """All that this half depends on beside its tensors and the weights."""
        rows = self._rows  # their slabs are one model's alone
        return rows.model.round_attention, rows.cache.slabs.name, self._extent, self._accept

    def verify(
        self, shape: TreeShape, guesses: Guesses, step: torch.Tensor, horizon: Horizon
    ) -> tuple[Accepted, torch.Tensor]:
        """One forward over all N nodes; -> what is accepted, and per row whether all its logits were finite."""
        model, cache = self._rows.model, self._rows.cache
        lengths = self._lengths + step
        slots = lengths[:, None] + torch.arange(shape.nodes, device=lengths.device)
        positions = (self._positions + step)[:, None] + guesses.depths
        sees = guesses.ancestors if shape.depth else None
        reach = self._extent.reach(horizon.longest, shape.nodes, exact=horizon.exact)
        hidden = model.forward_nodes(
            Nodes(guesses.tokens, positions[None], slots, sees), cache, lengths, reach
        )
        choices, finite = _choose(self._rule, model.logits(hidden), guesses)
        accepted = self._accept(guesses, choices, shape.depth)
        return accepted, finite.gather(1, accepted.path).all(dim=1)

    def forget(self, shape: TreeShape, step: torch.Tensor) -> None:
        """Zero the slots behind the committed ones that a round may have written."""
        first = (self._lengths + step)[:, None]
        self._rows.cache.zero(first + torch.arange(2 * shape.nodes, device=first.device))

    def commit(self, shape: TreeShape, accepted: Accepted, step: torch.Tensor) -> None:
        """Move the accepted path's keys and values behind the committed ones."""
        if shape.depth:
            first = (self._lengths + step)[:, None]
            levels = torch.arange(shape.depth + 1, device=first.device)
            self._rows.cache.commit(first + accepted.path, first + levels)


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


class _Verified(NamedTuple):
    """What a round's commit is told."""

    guesses: Guesses
    accepted: Accepted
    finite: torch.Tensor  # bool [B]


class _Rounds:
    """Everything that a round reads and changes.

    A round is three stages, each a function of what the one before gave. They change nothing but tensors, in place,
    and everything else that they depend on is in `_key`; so a rig may run them as graphs.

    Attributes:
        capture_s: What the last round spent on capturing its graphs before it began; later ones of its kind do not.
    """

    def __init__(self, rows: TargetRows, rule: TokenRule, clock: StageClock, accept: Accept) -> None:
        self._verifier = _Verifier(rows, rule, accept)
        self._rule, self._clock = rule, clock
        self._state: _State | None = None
        self._proposer: Proposer | None = None
        self.capture_s = 0.0
        graphs = rows.model.graphs
        self._rig = None if graphs is None else graphs.rig(rows.cache)
        if self._rig is not None:
            self._rig.adopt("rule", rule)
            self._rig.adopt("verifier", self._verifier)

    @property
    def proposer(self) -> Proposer | None:
        """The draft at work; None: none yet."""
        return self._proposer

    @proposer.setter
    def proposer(self, proposer: Proposer | None) -> None:
        if self._rig is not None and proposer is not None:
            self._rig.adopt("proposer", proposer)
        self._proposer = proposer

    def start(self, first: torch.Tensor) -> None:
        """The rows begin with the tokens first [B]."""
        state = _State(first, torch.zeros_like(first), torch.ones_like(first))
        if self._rig is not None:
            state = _State(*map(self._rig.place, _State._fields, state))
        self._state = state

    @torch.inference_mode()
    def only(self, active: Sequence[bool], written: Sequence[int]) -> None:
        """From now on these rows go on; `written`: tokens of each row."""
        # A caption may end inside an accepted path: a row that is done waits at its last token, not beyond it.
        state = self._state
        assert state is not None
        state.step.copy_(torch.minimum(state.step, torch.tensor(written, device=state.step.device) - 1))
        state.going.copy_(torch.tensor(active, dtype=torch.long, device=state.step.device))

    @torch.inference_mode()
    def forget_round(self, shape: TreeShape) -> None:
        """Overwrite what the last round left behind the committed tokens: NaN behind a mask is NaN all the same."""
        assert self._state is not None
        self._verifier.forget(shape, self._state.step)

    @torch.inference_mode()
    def rewind(self, root: Sequence[int], step: Sequence[int]) -> None:
        """Put the rows back to earlier tokens, to run them again."""
        state = self._state
        assert state is not None
        state.root.copy_(torch.tensor(root, device=state.root.device))
        state.step.copy_(torch.tensor(step, device=state.step.device))
        state.going.fill_(1)

    @torch.inference_mode()
    def run(self, shape: TreeShape, horizon: Horizon) -> list[list[int]]:
        """One round; -> per row [finite, accepted, tokens [D + 1]..., ranks [D + 1] if they are told...]."""
        began = time.perf_counter()
        stages = self._stages(shape, horizon)
        self.capture_s = time.perf_counter() - began
        value: Any = None
        for name, stage in zip(("draft", "verify", "commit"), stages, strict=True):
            with self._clock.stage(name):
                value = stage(value)
        return value.tolist()  # type: ignore[no-any-return]  # the round's only synchronisation

    def _stages(self, shape: TreeShape, horizon: Horizon) -> Sequence[Stage]:
        if self._rig is not None:
            horizon = Horizon(index_step(horizon.longest), exact=False)
        stages = (
            lambda _: self._propose(shape, horizon),
            lambda guesses: self._verify(shape, guesses, horizon),
            lambda verified: self._commit(shape, verified, horizon),
        )
        return stages if self._rig is None else self._rig.stages(self._key(shape, horizon), stages)

    def _key(self, shape: TreeShape, horizon: Horizon) -> Hashable:
        guessing = self._proposer.host_state if self._proposer is not None and shape.depth else None
        return shape, horizon, self._verifier.host_state, self._rule.host_state, guessing

    def _propose(self, shape: TreeShape, horizon: Horizon) -> Guesses:
        state = self._state
        assert state is not None
        self._rule.begin_round(state.step + 1, shape.depth)
        if shape.depth == 0:
            return ROOT.grow(state.root, _never)
        assert self._proposer is not None
        return self._proposer.propose(shape, state.root, state.step, horizon)

    def _verify(self, shape: TreeShape, guesses: Guesses, horizon: Horizon) -> _Verified:
        assert self._state is not None
        return _Verified(guesses, *self._verifier.verify(shape, guesses, self._state.step, horizon))

    def _commit(self, shape: TreeShape, verified: _Verified, horizon: Horizon) -> torch.Tensor:
        state, (guesses, accepted, finite) = self._state, verified
        assert state is not None
        self._verifier.commit(shape, accepted, state.step)
        if shape.depth:
            assert self._proposer is not None
            self._proposer.commit(shape, guesses, accepted, state.step, horizon)
        # A row whose logits were not finite stays where it is: a wrong guess may be the reason.
        count = (accepted.guessed + 1) * (state.going * finite)
        self._rule.commit(accepted.tokens, count)
        bonus = accepted.tokens.gather(1, accepted.guessed[:, None]).squeeze(1)
        state.root.copy_(torch.where(count > 0, bonus, state.root))
        state.step.add_(count)
        told = [finite.long()[:, None], accepted.guessed[:, None], accepted.tokens]
        if guesses.likeliest is not None:
            told.append(ranks_of(guesses, accepted))
        return torch.cat(told, dim=1)


def _never(*_: object) -> torch.Tensor:
    raise AssertionError("the root alone is never expanded")


class Decoding:
    """The captions of B rows in the making."""

    def __init__(
        self,
        rows: TargetRows,
        speculation: Speculation,
        rule: TokenRule,
        texts: Sequence[RowText],
        clock: StageClock,
    ) -> None:
        """`texts` are written into; `clock` gets the stages `decode`, and within it `draft`, `verify`, `commit`."""
        self._rows, self._speculation, self._rule = rows, speculation, rule
        self._texts, self._clock = texts, clock
        self._rounds = _Rounds(rows, rule, clock, speculation.accept)
        self._alone = False  # the next round is to be plain, because guesses spoiled the last one
        self._draft_knows = [1] * len(texts)  # tokens of each row that the draft has heard of

    @property
    def proposer(self) -> Proposer | None:
        """The draft at work; None: no round has needed it."""
        return self._rounds.proposer

    def run(self) -> Iterator[list[list[int]]]:
        """Decode; yield, after the prefill and after each round, each row's new tokens.

        Raises:
            NonFiniteLogitsError: The target gave NaN or infinite logits.
        """
        yield self._first()
        active: list[bool] = []
        while any(now := [text.finish_reason is None for text in self._texts]):
            if now != active:
                active = now
                self._rounds.only(active, [len(text.tokens) for text in self._texts])
            with self._clock.host_stage("decode"):
                shape = ROOT if self._alone else self._speculation.chooser.choose()
            if shape.depth:
                self._ready_draft()
            with self._clock.host_stage("decode"):
                reports, times = self._round(shape, self._horizon())
            yield self._hear(shape, reports, active, times)
        self._speculation.chooser.ended(sum(len(text.tokens) for text in self._texts) // len(self._texts))

    def time_plain_steps(self, count: int) -> list[float]:
        """Time plain steps on these rows' own caches, once their captions are done; nothing of them changes.

        The last `count` tokens are run once more (fewer where captions are shorter).

        Returns:
            Seconds of each step.
        """
        written = [len(text.tokens) for text in self._texts]
        seconds = []
        for back in range(min(count, min(written) - 1), 0, -1):
            at = [length - 1 - back for length in written]
            root = [text.tokens[index] for text, index in zip(self._texts, at, strict=True)]
            self._rounds.rewind(root, at)
            _, times = self._round(ROOT, Horizon(max(at), exact=len(written) == 1))
            seconds.append(times["round"])
            self._speculation.chooser.hear(Heard(ROOT, (), times))
        return seconds

    def _round(self, shape: TreeShape, horizon: Horizon) -> tuple[list[list[int]], dict[str, float]]:
        began = time.perf_counter()
        reports = self._rounds.run(shape, horizon)
        times = self._clock.settle()
        return reports, times | {"round": time.perf_counter() - began - self._rounds.capture_s}

    def _first(self) -> list[list[int]]:
        with torch.inference_mode():
            first, finite = _first_tokens(self._rows, self._rule)
            self._rounds.start(first[:, 0].clone())
        _refuse_non_finite(finite)
        return [text.take(tokens) for text, tokens in zip(self._texts, first.tolist(), strict=True)]

    def _horizon(self) -> Horizon:
        longest = max(len(text.tokens) for text in self._texts) - 1
        return Horizon(longest, exact=len(self._texts) == 1)

    def _ready_draft(self) -> None:
        """Prefill the draft if no round has needed it yet; tell it the tokens of rounds that went without it."""
        with torch.inference_mode():
            if self._rounds.proposer is None:
                assert self._speculation.begin is not None
                self._rounds.proposer = self._speculation.begin([text.tokens[0] for text in self._texts])
            written = [len(text.tokens) for text in self._texts]
            if written != self._draft_knows:
                with self._clock.host_stage("decode"):
                    self._rounds.proposer.catch_up([text.tokens for text in self._texts], self._draft_knows)

    def _hear(
        self, shape: TreeShape, reports: list[list[int]], active: Sequence[bool], times: dict[str, float]
    ) -> list[list[int]]:
        """Give every row what its round wrote."""
        written: list[list[int]] = []
        spoiled = False
        for row, (text, report, goes) in enumerate(zip(self._texts, reports, active, strict=True)):
            finite, accepted, *rest = report
            if not goes or not finite:
                _refuse_non_finite(not goes or shape.depth > 0)
                spoiled = spoiled or goes
                written.append([])
                continue
            written.append(text.take(rest[: accepted + 1]))
            if shape.depth:
                text.count(shape, min(len(written[-1]), accepted))
                self._draft_knows[row] = len(text.tokens)
        self._alone = spoiled
        if spoiled:  # by a guess, perhaps: what a plain round gives is the target's own
            self._rounds.forget_round(shape)
        going = [report[1:] for report, goes in zip(reports, active, strict=True) if goes and report[0]]
        self._speculation.chooser.hear(Heard(shape, going, times))
        return written
