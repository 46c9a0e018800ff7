"""THE loop: propose, verify, commit, for all sequences in flight at once. Plain decoding is this loop with no guesses.

Sequences are admitted between steps and leave in the step in which they end; none waits for another. Inside a round
nothing asks the host; at its end one small tensor comes back, which says what was accepted. The tree may be another one
in every round. The loop knows neither videos nor files nor how a draft guesses.
"""

from __future__ import annotations

import math
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from specvlm.cache import KVCache
from specvlm.choosing import Batch, RoundReport, TreeChooser
from specvlm.drafts.base import Draft, DraftRead, DraftRow, Proposer
from specvlm.errors import NonFiniteLogitsError
from specvlm.families.base import ModelInputs
from specvlm.graphs import Capture, CudaCapture, Rig, Stage, Table
from specvlm.model import Lengths, Nodes, VideoLM
from specvlm.prefill import Begun, PrefillRow, Prompt, ToSee, embed, prefill_target
from specvlm.records import FinishReason
from specvlm.sampling import Choices, TokenRule
from specvlm.settling import Settling, Worth
from specvlm.stats import StageClock, is_out_of_memory
from specvlm.tree import ROOT, Guesses, TreeShape
from specvlm.verify import Accepted, accept, ranks_of

# Batches of graphs shrink in these steps, so that few graphs serve all of them.
GRAPH_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
TOLD_STEP = 128  # slots; see `TextModel.told_step`


@dataclass(slots=True)
class CaptionText:
    """What one sequence has written, on the host.

    Attributes:
        tokens: Committed tokens; complete once `finish_reason` is set.
        finish_reason: None while the sequence runs.
        histogram: Entry k counts the rounds that gave k accepted guesses to the text.
        tries: Entry d - 1 counts the rounds whose guess at depth d was judged: those above it were right, and neither
            tree nor caption ended there.
        guessed: Guesses of all rounds, accepted or not.
        settled: Tokens that a plain step decided, because a round's choice was not settled.
        smallest_margin: The least by which the score of a token led the second best; infinite: not measured.
    """

    limit: int
    eos: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    histogram: list[int] = field(default_factory=list)
    tries: list[int] = field(default_factory=list)
    guessed: int = 0
    settled: int = 0
    smallest_margin: float = math.inf

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


@dataclass(slots=True, eq=False)
class CaptionSequence:
    """One caption in the making.

    Attributes:
        key: The caller's name for it.
        inputs: Its prompt and video.
        text: What is written so far.
        begun: What is known of its video from other prompts, and is to be kept for them; None: it is the only one.
        seconds: Its share of each stage's wall time: of a step, that of one sequence of those that ran; of a prefill,
            by tokens. Sums over sequences are wall time.
        steps: Steps that it took part in.
        shared_steps: The sequences of each of these steps, summed.
        tokens_at: Tokens written by steps of so many sequences; the first token is of the prefill.
        draft: What the draft saw of the video; None: it was not needed.
        error: Why there is no caption; None: nothing went wrong.
    """

    key: Hashable
    inputs: ModelInputs
    text: CaptionText
    begun: Begun | None = None
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    shared_steps: int = 0
    tokens_at: Counter[int] = field(default_factory=Counter)
    draft: DraftRead | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.text.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What all sequences in flight have in common.

    Attributes:
        rule: Makes the token rule, for no sequence yet.
        chooser: Chooses the tree of each round.
        propose: Makes the draft at work, for no sequence yet, given the rule and the target's cache; None: no draft.
        draft: Whose work `propose` makes.
        settling: Decide by plain steps what is not settled; None: take what rounds choose.
    """

    rule: Callable[[], TokenRule]
    chooser: TreeChooser
    propose: Callable[[TokenRule, KVCache], Proposer] | None = None
    draft: Draft | None = None
    settling: Settling | None = None


class _State(NamedTuple):
    """Where each row is, on the device. Rounds change it in place."""

    root: torch.Tensor  # int64 [B], the last token, not yet in any cache
    step: torch.Tensor  # int64 [B], that token's index in the caption
    going: torch.Tensor  # int64 [B], 0 for rows that are done, which stay where they are
    bound: torch.Tensor  # float32 [B], a choice that leads by no more is not settled


def _choose(rule: TokenRule, logits: torch.Tensor, guesses: Guesses, bound: torch.Tensor | None) -> Choices:
    """The target's choice after each node; `bound` [B]: also by how much it leads."""
    nodes = guesses.tokens.shape[1]
    below_root = guesses.ancestors[:, :, 1:]  # [B, N, N - 1]
    path = torch.where(below_root, guesses.tokens[:, None, 1:], guesses.tokens[:, :1, None])
    return rule.choose(logits, guesses.depths, path.expand(-1, nodes, -1), bound)


def _integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


class _Verifier:
    """The target's half of a round.

    Attributes:
        cache: The target's.
    """

    def __init__(self, target: VideoLM) -> None:
        self._target, self.cache = target, target.new_cache()
        self.exact = False
        self._prompts: list[int] = []  # tokens of each row's prompt
        self._next: list[int] = []  # the position behind it
        nothing = _integers([], target.device)
        self._lengths, self._positions = nothing, nothing

    def add(self, prompts: Sequence[Prompt], slots: int, most_rows: int) -> None:
        """Add rows for prompts; each needs `slots` more for its caption and a round."""
        self.cache.add([prompt.length + slots for prompt in prompts], most_rows)
        device = self._lengths.device
        self._prompts += [prompt.length for prompt in prompts]
        self._next += [prompt.next_position for prompt in prompts]
        self._lengths = _integers(self._prompts, device)
        self._positions = _integers(self._next, device)

    def keep(self, rows: Sequence[int]) -> None:
        """From now on the batch is these of its rows, in this order."""
        self.cache.keep(rows)
        self._prompts = [self._prompts[row] for row in rows]
        self._next = [self._next[row] for row in rows]
        self._lengths = _integers(self._prompts, self._lengths.device)
        self._positions = _integers(self._next, self._positions.device)

    def measure(self, settling: Settling, row: int, token: int) -> None:
        """Measure what passes over several rows change, behind the prompt of a row and its first token."""
        length = self._prompts[row]
        settling.measure(self._target, self.cache.copy_out(row, length), length, self._next[row], token)

    def replay(self, row: int, tokens: Sequence[int], first: int) -> torch.Tensor:
        """Run tokens of a row's caption as stock does, from the one with index `first` on; -> logits [1, 1, C]."""
        cache, hidden = self.cache.alone(row), torch.empty(0)
        for index in range(first, len(tokens)):
            position, length = self._next[row] + index, self._prompts[row] + index
            hidden = self._target.step(tokens[index], position, cache, length)
        return self._target.logits(hidden)

    def _committed(self, index: Lengths) -> Lengths:
        """Committed slots of rows whose root has this index."""
        prompts = tuple(self._prompts)
        return Lengths(self._lengths, prompts, prompts).plus(index)

    def host_state(self, index: Lengths) -> Hashable:
        """All that this half depends on besides its tensors and the weights."""
        return self._target.host_state(self._committed(index), self.cache), self.exact

    def verify(
        self, shape: TreeShape, guesses: Guesses, rule: TokenRule, index: Lengths, bound: torch.Tensor
    ) -> _Verified:
        """One forward over all N nodes; -> what is accepted, settled or not."""
        lengths = self._committed(index)
        slots = lengths.slots[:, None] + torch.arange(shape.nodes, device=lengths.slots.device)
        positions = (self._positions + index.slots)[:, None] + guesses.depths
        sees = guesses.ancestors if shape.depth else None
        nodes = Nodes(guesses.tokens, positions[None], slots, sees)
        hidden = self._target.forward_nodes(nodes, self.cache, lengths, shape.nodes)
        choices = _choose(rule, self._target.logits(hidden), guesses, bound if self.exact else None)
        accepted = accept(guesses, choices.tokens, shape.depth)
        finite = choices.finite.gather(1, accepted.path).all(dim=1)
        return _settled(guesses, accepted, finite, choices.margins, bound)

    def forget(self, shape: TreeShape, step: torch.Tensor) -> None:
        """Zero the slots after the committed ones that a round may have written."""
        first = (self._lengths + step)[:, None]
        self.cache.zero(first + torch.arange(2 * shape.nodes, device=first.device))

    def commit(self, shape: TreeShape, accepted: Accepted, step: torch.Tensor) -> None:
        """Move the accepted path's keys and values to the end of the committed ones."""
        if shape.depth:
            first = (self._lengths + step)[:, None]
            levels = torch.arange(shape.depth + 1, device=first.device)
            self.cache.commit(first + accepted.path, first + levels)


def _not_finite() -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        "the target's logits are NaN or infinite; no caption was kept (try another --dtype)"
    )


class _Verified(NamedTuple):
    """Input of a round's commit."""

    guesses: Guesses
    accepted: Accepted  # cut off before what is not settled
    finite: torch.Tensor  # bool [B]
    used: torch.Tensor  # int64 [B], accepted guesses that are settled
    gained: torch.Tensor  # int64 [B], tokens of the caption: these guesses, and a settled bonus token
    margins: torch.Tensor  # float32 [B, D + 1], of accepted guesses and bonus token; infinite: not measured


def _settled(
    guesses: Guesses,
    accepted: Accepted,
    finite: torch.Tensor,
    margins: torch.Tensor | None,
    bound: torch.Tensor,
) -> _Verified:
    """Cut the accepted path off before the first choice that is not settled. `margins`: [B, N]; None: all are."""
    count = accepted.guessed + 1
    if margins is None:
        unknown = torch.full_like(accepted.tokens, math.inf, dtype=bound.dtype)
        return _Verified(guesses, accepted, finite, accepted.guessed, count, unknown)
    level = torch.arange(accepted.path.shape[1], device=bound.device)
    on_path = margins.gather(1, accepted.path).masked_fill(level >= count[:, None], math.inf)  # [B, D + 1]
    unsettled = on_path <= bound[:, None]
    cut = torch.where(unsettled.any(dim=1), unsettled.to(torch.uint8).argmax(dim=1), count)
    # The last token of what is left becomes the root, which no cache has yet.
    kept = accepted._replace(guessed=(cut - 1).clamp(min=0))
    return _Verified(guesses, kept, finite, cut.minimum(accepted.guessed), cut, on_path)


class _Rounds:
    """Everything that a round reads and changes.

    A round is three stages, each a function of what the one before gave. They change nothing but tensors, in place,
    and everything else that they depend on is in `_key`; so a rig may run them as graphs.

    Attributes:
        capture_s: What the last round spent on capturing its graphs before it began; later ones of its kind do not.
    """

    def __init__(self, verifier: _Verifier, clock: StageClock, rig: Rig | None) -> None:
        device = verifier.cache.base.device
        self.verifier, self._clock, self._rig = verifier, clock, rig
        self.rule: TokenRule | None = None
        self.proposer: Proposer | None = None
        nothing = _integers([], device)
        self.state = _State(nothing, nothing, nothing, nothing.float())
        self.capture_s = 0.0

    def add(self, first: torch.Tensor) -> None:
        """Rows begin with the tokens first [n]."""
        zero = torch.zeros_like(first)
        more = _State(first, zero, torch.ones_like(first), zero.float())
        self.state = _State(*(torch.cat(pair) for pair in zip(self.state, more, strict=True)))

    def keep(self, rows: Sequence[int]) -> None:
        """From now on the batch is these of its rows, in this order."""
        at = _integers(rows, self.state.root.device)
        self.state = _State(*(value[at] for value in self.state))

    def settle(self) -> None:
        """Put all tensors where graphs expect them, after the batch has changed."""
        if self._rig is None:
            return
        self._rig.forget()
        self.state = _State(*map(self._rig.place, _State._fields, self.state))
        for name in ("rule", "verifier", "proposer"):
            holder = self.verifier if name == "verifier" else getattr(self, name)
            if holder is not None:
                self._rig.adopt(name, holder)

    def decide(self, row: int, tokens: Sequence[int], pure: int) -> _Decided:
        """Choose the next token of a row as stock does, behind keys and values of which the first `pure` are stock's.

        -> the token, whether its logits were finite, by how much it leads.
        """
        assert self.rule is not None
        logits = self.verifier.replay(row, tokens, pure)
        rule, device = self.rule.of_row(row), logits.device
        rule.begin_round(_integers([len(tokens)], device), 0)
        zero = torch.zeros(1, 1, dtype=torch.long, device=device)
        chosen = rule.choose(logits, zero, zero.new_empty(1, 1, 0), torch.zeros(1, device=device))
        assert chosen.margins is not None
        rule.commit(chosen.tokens, torch.ones_like(zero[:, 0]))
        self.state.root[row] = chosen.tokens[0, 0]
        self.state.step[row] = len(tokens)
        finite, margin = chosen.finite.item(), chosen.margins.item()
        return _Decided(int(chosen.tokens.item()), bool(finite), float(margin))

    def stop(self, row: int, index: int) -> None:
        """A row is done, at this index; it may stay in the batch for a while."""
        # A caption may end inside an accepted path: the row waits at its last token, not beyond it.
        self.state.step[row] = index
        self.state.going[row] = 0

    def run(self, shape: TreeShape, index: Lengths) -> list[list[int]]:
        """One round; -> per row what `_Report.of` reads."""
        began = time.perf_counter()
        stages = self._stages(shape, index)
        self.capture_s = time.perf_counter() - began
        value: Any = None
        for name, stage in zip(("draft", "verify", "commit"), stages, strict=True):
            with self._clock.stage(name):
                value = stage(value)
        return value.tolist()  # type: ignore[no-any-return]  # the round's only synchronisation

    def _stages(self, shape: TreeShape, index: Lengths) -> Sequence[Stage]:
        stages = (
            lambda _: self._propose(shape, index),
            lambda guesses: self._verify(shape, guesses, index),
            lambda verified: self._commit(shape, verified, index),
        )
        if self._rig is None:
            return stages
        tables: list[Table] = [self.verifier.cache.tables]
        if shape.depth and self.proposer is not None:
            tables.append(self.proposer.tables)
        return self._rig.stages(self._key(shape, index), stages, tables)

    def _key(self, shape: TreeShape, index: Lengths) -> Hashable:
        assert self.rule is not None
        guessing = self.proposer.host_state(index) if self.proposer is not None and shape.depth else None
        return shape, len(index.most), self.verifier.host_state(index), self.rule.host_state, guessing

    def _propose(self, shape: TreeShape, index: Lengths) -> Guesses:
        assert self.rule is not None
        self.rule.begin_round(self.state.step + 1, shape.depth)
        if shape.depth == 0:
            return ROOT.grow(self.state.root, _never)
        assert self.proposer is not None
        return self.proposer.propose(shape, self.state.root, index)

    def _verify(self, shape: TreeShape, guesses: Guesses, index: Lengths) -> _Verified:
        assert self.rule is not None
        return self.verifier.verify(shape, guesses, self.rule, index, self.state.bound)

    def _commit(self, shape: TreeShape, verified: _Verified, index: Lengths) -> torch.Tensor:
        state, (guesses, accepted, finite, used, found, margins) = self.state, verified
        assert self.rule is not None
        self.verifier.commit(shape, accepted, state.step)
        if shape.depth:
            assert self.proposer is not None
            self.proposer.commit(shape, guesses, accepted, index)
        # A row whose logits were not finite stays where it is: a wrong guess may be the reason.
        count = found * (state.going * finite)
        self.rule.commit(accepted.tokens, count)
        last = accepted.tokens.gather(1, accepted.guessed[:, None]).squeeze(1)
        state.root.copy_(torch.where(count > 0, last, state.root))
        state.step.add_(count)
        bits = margins.view(torch.int32).long()
        told = [torch.stack((finite.long(), found, used), dim=1), bits, accepted.tokens]
        if guesses.likeliest is not None:
            told.append(ranks_of(guesses, accepted))
        return torch.cat(told, dim=1)


class _Decided(NamedTuple):
    """A token that a plain step chose."""

    token: int
    finite: bool
    margin: float


class _Report(NamedTuple):
    """What became of a row in a round."""

    finite: bool
    settled: bool  # all of it; else a plain step gives what takes the bonus token's place
    used: int  # guesses
    written: list[int]
    margins: list[float]  # of the tokens written
    next_token: int  # that would have followed, if it had been settled; else meaningless
    next_margin: float  # of that token
    told: list[int]  # for the chooser, see `RoundReport`

    @classmethod
    def of(cls, numbers: list[int], depth: int) -> _Report:
        """Read what `_Rounds.run` gives of a row.

        `numbers`: finite, count, used, bits of the margins [D + 1], tokens [D + 1], ranks [D + 1] if the shape has
        them. `depth`: D.
        """
        finite, count, used, *rest = numbers
        bits, rest = rest[: depth + 1], rest[depth + 1 :]
        margins = struct.unpack(f"{depth + 1}f", struct.pack(f"{depth + 1}i", *bits))
        following = min(count, depth)
        return cls(
            bool(finite),
            count > used,
            used,
            rest[:count],
            list(margins[:count]),
            rest[following],
            margins[following],
            [used, *rest],
        )


def _never(*_: object) -> torch.Tensor:
    raise AssertionError("the root alone is never expanded")


class _Row:
    """A row of the batch: a sequence, or one that is done and stays for a while.

    Attributes:
        sequence: The sequence; None: it is done.
        index: In its caption, of its last token.
        drafted: Tokens of its caption that the draft has read; 0: the draft has not begun with it.
        prompt: As the target read it, until the draft has begun with it.
        scores: The target's attention to its video, until then.
        text: What it has written.
        pure: Tokens of its caption whose keys and values steps of one row have written, the first ones.
    """

    def __init__(self, sequence: CaptionSequence, prompt: Prompt, scores: torch.Tensor) -> None:
        self.sequence: CaptionSequence | None = sequence
        self.index = len(sequence.text.tokens) - 1
        self.drafted = 0
        self.text = sequence.text
        self.pure = 0
        self.prompt, self.scores = prompt, scores


class Decoder:
    """The target, its cache, and the sequences in flight. `admit`, `step` and `drop` alone change what runs."""

    def __init__(
        self,
        target: VideoLM,
        clock: StageClock,
        make_capture: Callable[[torch.device], Capture] = CudaCapture,
    ) -> None:
        """No sequence is in flight; `configure` first.

        `clock` gets the stages `vision`, `target_prefill`, `draft_prefill`, and those of rounds: `draft`, `verify`,
        `commit`. `make_capture`: device -> what captures rounds there, where the target's can be captured.
        """
        self._target, self._clock = target, clock
        self._rig = Rig(make_capture(target.device)) if target.captures else None
        self._verifier = _Verifier(target)
        self._rounds = _Rounds(self._verifier, clock, self._rig)
        self._settings: DecodeSettings | None = None
        self._rows: list[_Row] = []
        self._finished: list[CaptionSequence] = []
        self._plain_next = False  # because guesses spoiled the last round
        self._worth = Worth()
        # Of the last step: tokens that plain steps decided, and those steps.
        self._decided = self._replayed = 0

    # --- what runs ---

    @property
    def settings(self) -> DecodeSettings:
        """How it decodes."""
        assert self._settings is not None
        return self._settings

    def configure(self, settings: DecodeSettings) -> None:
        """From now on, decode so; nothing may be in flight. The same draft stays, with its memory and graphs."""
        assert not len(self)
        self._select([])
        if self._settings is not None and self._settings.draft is not settings.draft:
            self._rounds.proposer = None
        self._verifier.exact = settings.settling is not None
        self._rounds.rule = settings.rule()
        self.follow(settings)
        for model in (self._target, *([] if settings.draft is None else [settings.draft.text])):
            model.told_step = 1 if self._rig is None else TOLD_STEP

    def follow(self, settings: DecodeSettings) -> None:
        """Continue with the same draft, whose vocabulary may have changed."""
        self._settings = settings
        if self._rounds.proposer is not None and settings.draft is not None:
            assert self._rounds.rule is not None
            self._rounds.proposer.follow(settings.draft, self._rounds.rule)

    def written(self, key: Hashable) -> Sequence[int]:
        """The tokens of a sequence so far."""
        found = (row.text.tokens for row in self._rows if row.sequence and row.sequence.key == key)
        return next(found, ())

    def plain_token_s(self, sequence: CaptionSequence) -> float | None:
        """Estimated time of each token after the first, had the steps of this sequence been plain.

        Plain steps of as many sequences as each of its steps had, as measured so far; None: none were measured.
        """
        total_s, tokens = 0.0, 0
        for rows, count in sequence.tokens_at.items():
            step_s = self.settings.chooser.plain_s(rows)
            if step_s is None:
                return None
            total_s, tokens = total_s + count * step_s / rows, tokens + count
        return total_s / tokens if tokens else None

    def __len__(self) -> int:
        """Sequences in flight."""
        return sum(row.sequence is not None for row in self._rows)

    @property
    def size_bytes(self) -> int:
        """Memory of all caches."""
        proposer = self._rounds.proposer
        return self._verifier.cache.size_bytes + (0 if proposer is None else proposer.size_bytes)

    @torch.inference_mode()
    def admit(self, sequences: Sequence[CaptionSequence], most_rows: int = 0) -> None:
        """Begin with further sequences: see their videos, read their prompts, write the first token of each.

        `most_rows`: the most that are going to be in flight; see `KVCache.add`.

        Raises:
            GenerationError: A sequence is too long for the model; nothing has begun then.
        """
        settings = self.settings
        assert self._rounds.rule is not None
        prompts = self._embed(sequences)
        slots = [settings.chooser.nodes + sequence.text.limit for sequence in sequences]
        for prompt, count in zip(prompts, slots, strict=True):
            self._target.check_length(prompt.length + count)
        self._select([row for row, one in enumerate(self._rows) if one.sequence is not None])
        first = len(self._rows)
        with self._timed("target_prefill", [(one, one.inputs.prompt_tokens) for one in sequences]):
            self._verifier.add(prompts, max(slots), most_rows)
            readings = [
                self._reading(one, prompt, row)
                for row, (one, prompt) in enumerate(zip(sequences, prompts, strict=True), first)
            ]
            scored = settings.propose is not None
            read = prefill_target(
                self._target, self._verifier.cache, readings, scored=scored, alone=self._alone
            )
            for sequence, reading in zip(sequences, readings, strict=True):
                if sequence.begun is not None and not self._alone:
                    sequence.begun.keep(reading.prompt, self._verifier.cache, reading.row)
            self._rounds.rule.add([one.inputs.token_ids[0] for one in sequences])
            tokens, finite = self._first_tokens(torch.cat([one.logits for one in read]), first)
        for sequence, prompt, one, token, good in zip(sequences, prompts, read, tokens, finite, strict=True):
            if good:
                sequence.text.take([token])
            else:
                sequence.error = _not_finite()
            self._rows.append(_Row(sequence, prompt, one.scores))
        self._measure(most_rows)
        self._rounds.settle()
        self._retire()

    def _measure(self, most_rows: int) -> None:
        """Measure what makes choices unsettled, once, after the shortest prompt whose caption is not done."""
        settling = self.settings.settling
        if settling is None or settling.bound is not None:
            return
        if self.settings.propose is None and max(most_rows, len(self._rows)) < 2:
            return  # steps of one row settle everything
        going = [number for number, row in enumerate(self._rows) if row.sequence and not row.sequence.done]
        if not going:
            return
        row = min(going, key=lambda number: self._rows[number].prompt.length)
        try:
            self._verifier.measure(settling, row, self._rows[row].text.tokens[0])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Nothing is settled until there is room to measure.

    def _embed(self, sequences: Sequence[CaptionSequence]) -> list[Prompt]:
        shares = [(one, one.inputs.video_tokens if self._is_new(one) else 1) for one in sequences]
        with self._timed("vision", shares):
            features = [None if one.begun is None else one.begun.features for one in sequences]
            videos = [ToSee(one.inputs, known) for one, known in zip(sequences, features, strict=True)]
            return embed(self._target, videos, alone=self._alone)

    @property
    def _alone(self) -> bool:
        """Whether a prompt that shares a pass with others, or another prompt's keys and values, may be told apart."""
        return self.settings.settling is not None and self._target.dtype != torch.float32

    def _is_new(self, sequence: CaptionSequence) -> bool:
        return sequence.begun is None or self._target not in sequence.begun.features.of

    def _reading(self, sequence: CaptionSequence, prompt: Prompt, row: int) -> PrefillRow:
        known = 0
        if sequence.begun is not None and not self._alone:
            known = sequence.begun.give(prompt, self._verifier.cache, row)
        return PrefillRow(prompt, row, known)

    def _first_tokens(self, logits: torch.Tensor, first: int) -> tuple[list[int], list[bool]]:
        """The token that each prefill's logits [n, 1, C] choose, and whether they were finite."""
        rule = self._rounds.rule
        assert rule is not None
        device = logits.device
        count = logits.shape[0]
        rule.begin_round(torch.zeros(first + count, dtype=torch.long, device=device), 0)
        zero = torch.zeros(first + count, 1, dtype=torch.long, device=device)
        # The rule is for the whole batch: rows that are there already take part with logits that choose nothing.
        padded = torch.cat((logits.new_zeros(first, *logits.shape[1:]), logits))
        chosen = rule.choose(padded, zero, zero.new_empty(first + count, 1, 0), None)
        new = (torch.arange(first + count, device=device) >= first).long()
        rule.commit(chosen.tokens, new)
        self._rounds.add(chosen.tokens[first:, 0])
        finite: list[bool] = chosen.finite[first:, 0].tolist()
        tokens: list[int] = chosen.tokens[first:, 0].tolist()
        return tokens, finite

    @torch.inference_mode()
    def drop(self, keys: Sequence[Hashable]) -> None:
        """Forget sequences; what they have written is lost."""
        gone = set(keys)
        self._select(
            [
                row
                for row, one in enumerate(self._rows)
                if one.sequence is not None and one.sequence.key not in gone
            ]
        )

    def reset(self) -> None:
        """Forget everything, the memory of all caches included: after an error nothing in it is to be trusted."""
        self._rows, self._finished = [], []
        self._verifier = _Verifier(self._target)
        self._rig = None if self._rig is None else self._rig.fresh()
        self._rounds = _Rounds(self._verifier, self._clock, self._rig)
        if self._settings is not None:
            self.configure(self._settings)

    def release(self) -> None:
        """Give back memory that no sequence needs."""
        self._verifier.cache.release()
        if self._rounds.proposer is not None:
            self._rounds.proposer.release()

    @torch.inference_mode()
    def step(self) -> list[CaptionSequence]:
        """One round of all sequences; -> those that have ended, since the last step, with a caption or an error."""
        if len(self):
            began, spent_s = time.perf_counter(), self._clock.seconds("draft_prefill")
            running = [row.sequence for row in self._rows if row.sequence is not None]
            before = sum(len(one.text.tokens) for one in running)
            times = self._round()
            elapsed_s = time.perf_counter() - began - (self._clock.seconds("draft_prefill") - spent_s)
            self._weigh(sum(len(one.text.tokens) for one in running) - before)
            self._share(running, elapsed_s, times)
            self._retire()
        ended, self._finished = self._finished, []
        return ended

    # --- one step ---

    def _shape(self) -> TreeShape:
        if self._plain_next or self._worth.plain:
            return ROOT
        live = [(row, row.sequence) for row in self._rows if row.sequence is not None]
        batch = Batch(
            rows=len(live),
            new=sum(not row.drafted for row, _ in live),
            prompt_tokens=sum(one.inputs.prompt_tokens for _, one in live) // len(live),
            written=sum(len(one.text.tokens) for _, one in live) / len(live),
        )
        return self.settings.chooser.choose(batch)

    def _index(self) -> Lengths:
        index = tuple(row.index for row in self._rows)
        return Lengths(self._rounds.state.step, index, index)

    def _round(self) -> dict[str, float]:
        """One round, then plain steps for what is not settled; or plain steps alone. -> the times of its stages."""
        shape = self._shape()
        if self._steps_alone(shape):
            undecided: dict[int, _Report | None] = {
                number: None for number, row in enumerate(self._rows) if row.sequence is not None
            }
            times = dict[str, float]()
        else:
            if shape.depth:
                self._ready_draft()
            self._bind(shape)
            began = time.perf_counter()
            numbers = self._rounds.run(shape, self._index())
            times = self._clock.settle()
            whole_s = time.perf_counter() - began - self._rounds.capture_s
            undecided = self._hear(
                shape, [_Report.of(one, shape.depth) for one in numbers], times | {"round": whole_s}
            )
        self._decided, self._replayed = len(undecided), 0
        if undecided:
            with self._clock.stage("verify"):
                self._decide(undecided)
            times["verify"] = times.get("verify", 0.0) + self._clock.settle()["verify"]
        return times

    def _steps_alone(self, shape: TreeShape) -> bool:
        """Whether this step is one of stock `generate()` for each sequence, instead of a round."""
        if self.settings.settling is None:
            return False
        if self._worth.plain:
            return True
        # A graph of a plain step does not run what stock runs.
        return shape.depth == 0 and len(self) == 1 and self._rig is not None and self._alone

    def _bind(self, shape: TreeShape) -> None:
        """Say what is settled in the next round: everything, if it is a step of stock `generate()`."""
        settling = self.settings.settling
        if settling is None:
            return
        assert self._rounds.rule is not None
        bound = math.inf if settling.bound is None else settling.bound * self._rounds.rule.sharpness
        self._rounds.state.bound.fill_(-1.0 if self._is_step(shape) else bound)

    def _is_step(self, shape: TreeShape) -> bool:
        """Whether a round is a step of stock `generate()`: one row, whose keys and values steps have written."""
        return shape.depth == 0 and len(self._rows) == 1 and self._rows[0].pure == self._rows[0].index

    def _decide(self, undecided: Mapping[int, _Report | None]) -> None:
        """Give rows their next token by plain steps, from where their keys and values are stock's.

        `undecided`: also what a round said of the row, if there was one.
        """
        running = len(self)
        for number, report in undecided.items():
            row = self._rows[number]
            sequence, tokens = row.sequence, row.text.tokens
            assert sequence is not None
            decided = self._rounds.decide(number, tokens, row.pure)
            self._replayed += len(tokens) - row.pure
            row.pure = len(tokens)
            if not decided.finite:
                sequence.error = _not_finite()
                continue
            if report is not None:
                self._learn(report, decided)
            sequence.text.take([decided.token])
            sequence.text.smallest_margin = min(sequence.text.smallest_margin, decided.margin)
            sequence.tokens_at[running] += 1
            row.index = len(tokens) - 1

    def _learn(self, report: _Report, decided: _Decided) -> None:
        """Learn from a token that was not settled how much a round had changed its lead."""
        rule, settling = self._rounds.rule, self.settings.settling
        assert rule is not None
        assert settling is not None
        if rule.leaves_out:  # then the margin is not always a lead
            return
        same = report.next_token == decided.token
        then, now = report.next_margin, decided.margin
        change = abs(then - now) if same else then + now
        settling.hear(change / rule.sharpness)

    def _weigh(self, tokens: int) -> None:
        """See whether rounds are worth what is decided again."""
        if self._worth.plain:
            self._worth.hear_plain()
        elif self.settings.settling is not None:
            self._worth.hear(len(self._rows), tokens, self._decided, self._replayed)

    def _ready_draft(self) -> None:
        """Have the draft begin with the sequences that no round with guesses has met yet, and catch up with all."""
        settings = self.settings
        assert settings.propose is not None
        assert self._rounds.rule is not None
        if self._rounds.proposer is None:
            self._rounds.proposer = settings.propose(self._rounds.rule, self._verifier.cache)
        if any(row.sequence is None and not row.drafted for row in self._rows):
            self._select([number for number, row in enumerate(self._rows) if row.sequence is not None])
        new = [number for number, row in enumerate(self._rows) if not row.drafted]
        if new:
            self._begin_draft(new)
        captions = [row.text.tokens for row in self._rows]
        known = [row.drafted for row in self._rows]
        if any(len(caption) > heard for caption, heard in zip(captions, known, strict=True)):
            self._rounds.proposer.catch_up(captions, known)
            for row, caption in zip(self._rows, captions, strict=True):
                row.drafted = max(row.drafted, len(caption))

    def _begin_draft(self, new: Sequence[int]) -> None:
        proposer, settings = self._rounds.proposer, self.settings
        assert proposer is not None
        sequences = [self._rows[row].sequence for row in new]
        told = [self._draft_row(row) for row in new]
        before = self._clock.seconds("draft_prefill")
        with self._timed("draft_prefill", [(one, 1) for one in sequences if one is not None]):
            read = proposer.add(told, len(self._rows))
        settings.chooser.draft_began(self._clock.seconds("draft_prefill") - before, len(new))
        for row, one in zip(new, read, strict=True):
            sequence = self._rows[row].sequence
            assert sequence is not None
            sequence.draft, self._rows[row].drafted = one, 1
        order = [row for row in range(len(self._rows)) if row not in set(new)] + list(new)
        if order != sorted(order):
            proposer.keep([order.index(row) for row in range(len(order))])
        self._rounds.settle()

    def _draft_row(self, row: int) -> DraftRow:
        one, settings = self._rows[row], self.settings
        assert one.sequence is not None
        text = one.sequence.text
        features = None if one.sequence.begun is None else one.sequence.begun.features
        slots = text.limit + settings.chooser.slots
        return DraftRow(row, one.prompt, one.scores, text.tokens[0], slots, features)

    def _hear(
        self, shape: TreeShape, reports: Sequence[_Report], times: dict[str, float]
    ) -> dict[int, _Report | None]:
        """Give every sequence what the round wrote; -> the rows whose next token is not settled."""
        settings, step = self.settings, self._is_step(shape)
        spoiled, told, running = False, list[list[int]](), len(self)
        undecided: dict[int, _Report | None] = {}
        for number, (row, report) in enumerate(zip(self._rows, reports, strict=True)):
            sequence = row.sequence
            if sequence is None:
                continue
            if not report.finite:
                # A guess may be the reason: what a plain round gives is the target's own.
                spoiled = spoiled or shape.depth > 0
                sequence.error = None if shape.depth else _not_finite()
                continue
            told.append(report.told)
            written = sequence.text.take(report.written)
            sequence.tokens_at[running] += len(written)
            row.index = len(sequence.text.tokens) - 1
            row.pure += step
            margins = report.margins[: len(written)]
            sequence.text.smallest_margin = min([sequence.text.smallest_margin, *margins])
            if shape.depth:
                sequence.text.count(shape, min(len(written), report.used))
                row.drafted = len(sequence.text.tokens)
            if not report.settled and not sequence.done:
                sequence.text.settled += 1
                undecided[number] = report
        self._plain_next = spoiled
        if spoiled:
            self._verifier.forget(shape, self._rounds.state.step)
        settings.chooser.hear(RoundReport(shape, running, told, times))
        return undecided

    def _share(self, running: Sequence[CaptionSequence], elapsed_s: float, times: dict[str, float]) -> None:
        """Give each sequence its share of a step's time."""
        for sequence in running:
            sequence.seconds["decode"] += elapsed_s / len(running)
            for stage in ("draft", "verify", "commit"):
                sequence.seconds[stage] += times.get(stage, 0.0) / len(running)
            sequence.steps += 1
            sequence.shared_steps += len(running)

    # --- rows ---

    def _retire(self) -> None:
        """Take those that have ended out of the batch."""
        settings = self.settings
        for number, row in enumerate(self._rows):
            sequence = row.sequence
            if sequence is None or not sequence.done:
                continue
            self._finished.append(sequence)
            if sequence.error is None:
                settings.chooser.ended(len(sequence.text.tokens))
            row.sequence, row.drafted = None, min(row.drafted, len(sequence.text.tokens))
            self._rounds.stop(number, row.index)
        live = [number for number, row in enumerate(self._rows) if row.sequence is not None]
        if self._rig is None:
            self._select(live)
        elif (size := _graph_rows(len(live))) < len(self._rows):
            done = [number for number in range(len(self._rows)) if number not in set(live)]
            self._select(live + done[: size - len(live)])

    def _select(self, rows: Sequence[int]) -> None:
        """From now on the batch is these of its rows, in the order in which the cache holds them."""
        if list(rows) == list(range(len(self._rows))):
            if self._rows:
                self._rounds.settle()
            return
        self._verifier.keep(rows)
        order = self._verifier.cache.in_order()
        if order != list(range(len(order))):
            self._verifier.keep(order)
        rows = [rows[number] for number in order]
        if (rule := self._rounds.rule) is not None:
            rule.keep(_integers(rows, self._rounds.state.root.device))
        if (proposer := self._rounds.proposer) is not None:
            drafted = [number for number, row in enumerate(self._rows) if row.drafted]
            proposer.keep([drafted.index(row) for row in rows if self._rows[row].drafted])
        self._rounds.keep(rows)
        self._rows = [self._rows[row] for row in rows]
        self._rounds.settle()

    def _timed(self, stage: str, shares: Sequence[tuple[CaptionSequence, int]]) -> _Shared:
        return _Shared(self._clock, stage, shares)


def _graph_rows(live: int) -> int:
    """Rows of a batch with so many sequences, where graphs are kept: some are done."""
    return min((size for size in GRAPH_ROWS if size >= live), default=live) if live else 0


class _Shared:
    """Times a stage to its very end, and gives each sequence its share."""

    def __init__(self, clock: StageClock, stage: str, shares: Sequence[tuple[CaptionSequence, int]]) -> None:
        self._clock, self._stage, self._shares = clock, stage, shares

    def __enter__(self) -> None:
        self._before = self._clock.seconds(self._stage)
        self._context = self._clock.awaited_stage(self._stage)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        seconds = self._clock.seconds(self._stage) - self._before
        total = sum(share for _, share in self._shares)
        for sequence, share in self._shares:
            sequence.seconds[self._stage] += seconds * share / total
