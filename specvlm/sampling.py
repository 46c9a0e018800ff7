"""The token rule: one plain function from a model's logits to the token that it writes.

Greedy takes the argmax. Sampling takes argmax(logits / T + g_i) with Gumbel noise g_i drawn from (seed, output
index i) alone, so a caption depends on the target and the seed, never on draft, tree or pruning. Before either
come the logits processors of the checkpoint's generation config, applied node by node, since what a node has seen
depends on its path. It knows nothing of models or caches.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from specvlm.config import GenerationSettings
from specvlm.errors import ConfigError

_REFUSED = {
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1, 1.0),
    "forced_bos_token_id": (None,),
    "remove_invalid_values": (None, False),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
}
_REFUSED_WHEN_SAMPLING = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
}


class LogitsRules(NamedTuple):
    """What the checkpoint's generation config asks of every token."""

    repetition_penalty: float
    suppress: tuple[int, ...]  # never written
    suppress_first: tuple[int, ...]  # never written as the first token
    min_tokens: int  # no end-of-sequence before this many new tokens
    min_length: int  # nor before prompt and new tokens are this many; as in stock, min_tokens goes before it
    forced_eos: tuple[int, ...]  # written as the last of max_new_tokens
    eos: tuple[int, ...]
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off


def _refuse(config: Any, table: dict[str, tuple[Any, ...]]) -> None:
    for name, harmless in table.items():
        value = getattr(config, name, None)
        if value not in harmless:
            raise ConfigError(
                f"the checkpoint's generation config sets {name}={value!r}, which cannot be honoured token by token "
                f"in a tree; remove it from generation_config.json to caption without it"
            )


def id_list(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids as a generation config gives them: one, several, or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(token) for token in value)


def logits_rules(config: Any, settings: GenerationSettings) -> LogitsRules:
    """Read a `transformers` GenerationConfig: honour or refuse, never ignore.

    Raises:
        ConfigError: It sets a logits processor that cannot be honoured; the message names it.
    """
    sampling = settings.temperature > 0
    _refuse(config, _REFUSED)
    if sampling:
        _refuse(config, _REFUSED_WHEN_SAMPLING)
    top_k = settings.top_k if settings.top_k is not None else getattr(config, "top_k", None)
    least = getattr(config, "min_new_tokens", None)
    top_p, min_p = getattr(config, "top_p", None), getattr(config, "min_p", None)
    return LogitsRules(
        repetition_penalty=float(getattr(config, "repetition_penalty", None) or 1.0),
        suppress=id_list(getattr(config, "suppress_tokens", None)),
        suppress_first=id_list(getattr(config, "begin_suppress_tokens", None)),
        min_tokens=least or 0,
        min_length=(getattr(config, "min_length", None) or 0) if least is None else 0,
        forced_eos=id_list(getattr(config, "forced_eos_token_id", None)),
        eos=id_list(config.eos_token_id),
        temperature=settings.temperature,
        top_k=(top_k or 0) if sampling else 0,
        top_p=(1.0 if top_p is None else top_p) if sampling else 1.0,
        min_p=(min_p or 0.0) if sampling else 0.0,
    )


def gumbel_noise(seed: int, index: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [*index.shape, vocabulary], a function of (seed, index, token) alone.

    The same on every device: a counter-based integer hash (the finaliser of MurmurHash3, twice), no generator state.
    """
    state = _mix(_mix(_mix(index) ^ (seed & 0xFFFFFFFF)) ^ (seed >> 32))
    token = _mix(torch.arange(vocabulary, device=index.device))
    bits = _mix(_mix(state[..., None] ^ token) ^ token)
    uniform = (bits.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform)).float()


def _mix(value: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser on int64 tensors that hold unsigned 32-bit values."""
    value = value & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)


@dataclass(slots=True)
class _NoisyRound:
    """What holds for all nodes of one round."""

    first_index: torch.Tensor  # int64 [B], output index of the token that the root's logits choose
    noise: torch.Tensor | None  # [B, D + 1, C], Gumbel noise by depth


class Choices(NamedTuple):
    """What logits choose at n nodes."""

    tokens: torch.Tensor  # int64 [B, n]
    finite: torch.Tensor  # bool [B, n], whether the logits were
    margins: (
        torch.Tensor | None
    )  # float32 [B, n], by how much the score of the token leads; None: not asked for


class _Columns(NamedTuple):
    """Which tokens the columns of scores are."""

    width: int
    ids: torch.Tensor | None  # int64 [width], ascending; None: tokens 0 to width - 1

    def of(self, told: torch.Tensor) -> torch.Tensor:
        """Values of all tokens, [..., C or more], for these alone: [..., width]."""
        return told[..., : self.width] if self.ids is None else told[..., self.ids]

    def of_nodes(self, told: torch.Tensor, row: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """The same of [B, D + 1, C], at the depths [B, n] of nodes: [B, n, width]."""
        if self.ids is None:
            return told[row, depths, : self.width]
        return told[row[..., None], depths[..., None], self.ids]

    def find(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of tokens, and whether they have one; the column of others is any."""
        if self.ids is None:
            return tokens.clamp(max=self.width - 1), tokens < self.width
        at = torch.searchsorted(self.ids, tokens.contiguous()).clamp(max=self.width - 1)
        return at, self.ids[at] == tokens


class TokenRule:
    """The rule for the B rows of a batch. Target and draft share it, so that the draft guesses under the same rules."""

    def __init__(
        self, rules: LogitsRules, settings: GenerationSettings, vocabulary: int, device: torch.device
    ) -> None:
        """No rows yet; see `add`."""
        self._rules, self._settings = rules, settings
        self._vocabulary, self._device = vocabulary, device
        self._penalised = rules.repetition_penalty != 1.0
        self._ends_late = bool(rules.min_tokens or rules.min_length)
        self._indexed = bool(rules.suppress_first or self._ends_late or rules.forced_eos)
        self._least = torch.zeros(0, 1, 1, dtype=torch.long, device=device)  # [B, 1, 1], tokens before an end
        # One column more than tokens, where marks that are not to count go.
        self._seen = torch.zeros(0, vocabulary + 1, dtype=torch.bool, device=device)
        self._round = _NoisyRound(torch.zeros(0, dtype=torch.long, device=device), None)
        self._suppress = self._column(rules.suppress)
        self._suppress_first = self._column(rules.suppress_first)
        self._no_eos = self._column(rules.eos)
        self._not_forced = ~self._column(rules.forced_eos)

    def add(self, prompts: Sequence[torch.Tensor]) -> None:
        """Add rows; `prompts`: int64 [S_b] of each, whose tokens count as seen for the repetition penalty."""
        rules = self._rules
        least = [max(rules.min_tokens, rules.min_length - len(prompt)) for prompt in prompts]
        self._least = torch.cat((self._least, torch.tensor(least, device=self._device)[:, None, None]))
        seen = torch.zeros(len(prompts), self._seen.shape[1], dtype=torch.bool, device=self._device)
        if self._penalised:
            for row, prompt in enumerate(prompts):
                seen[row, prompt.to(self._device)] = True
        self._seen = torch.cat((self._seen, seen))

    def keep(self, rows: torch.Tensor) -> None:
        """From now on the batch is these of its rows, int64 [B], in this order."""
        self._least, self._seen = self._least.index_select(0, rows), self._seen.index_select(0, rows)

    def of_row(self, row: int) -> TokenRule:
        """The rule for one row alone, which shares what is known of it."""
        rule = copy.copy(self)
        rule._least, rule._seen = self._least[row : row + 1], self._seen[row : row + 1]
        return rule

    @property
    def sharpness(self) -> float:
        """The most by which the difference of two scores grows when that of their logits does."""
        penalty, temperature = self._rules.repetition_penalty, self._rules.temperature
        return max(penalty, 1 / penalty) / (temperature or 1.0)

    @property
    def host_state(self) -> Hashable:
        """All that scores depend on besides their arguments and the tensors among the attributes."""
        return self._rules, self._settings, self._vocabulary

    def _column(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids -> bool [C]; ids beyond the vocabulary cannot be written anyway."""
        column = torch.zeros(self._vocabulary, dtype=torch.bool, device=self._device)
        column[[token for token in tokens if 0 <= token < self._vocabulary]] = True
        return column

    def begin_round(self, first_index: torch.Tensor, depth: int) -> None:
        """Start a round whose root's logits choose the output tokens `first_index` [B]."""
        noise = None
        if self._rules.temperature > 0:
            index = first_index[:, None] + torch.arange(depth + 1, device=self._device)
            noise = gumbel_noise(self._settings.seed, index, self._vocabulary)
        self._round = _NoisyRound(first_index, noise)

    def scores(
        self,
        logits: torch.Tensor,
        depths: torch.Tensor,
        path: torch.Tensor,
        ids: torch.Tensor | None = None,
        slack: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, n, c] -> scores float32 [B, n, c] whose argmax is the column of the token.

        A draft may have fewer columns than the target; top-k, top-p and min-p then choose among those.

        Args:
            logits: Of n nodes.
            depths: int64 [B, n] below the root.
            path: int64 [B, n, m], tokens that a node has seen beyond the committed ones. Repeats are harmless, and so
                are committed tokens; that is how paths of different length fit one tensor.
            ids: int64 [c], the columns' tokens, ascending; None: tokens 0 to c - 1.
            slack: [B], top-k, top-p and min-p leave what they would leave if scores were this much higher.
        """
        out, columns = logits.float(), _Columns(logits.shape[-1], ids)
        if self._penalised:
            out = self._penalise(out, path, columns)
        if self._indexed:
            out = self._by_index(out, self._round.first_index[:, None] + depths, columns)
        if self._rules.suppress:
            out = out.masked_fill(columns.of(self._suppress), float("-inf"))
        if self._round.noise is not None:
            out = self._warp(out, slack)
            row = torch.arange(out.shape[0], device=out.device)[:, None]
            out = out + columns.of_nodes(self._round.noise, row, depths)
        return out

    def choose(
        self, logits: torch.Tensor, depths: torch.Tensor, path: torch.Tensor, bound: torch.Tensor | None
    ) -> Choices:
        """The token at each of n nodes; see `scores`.

        `bound`: [B], by how much scores may be off; margins are then computed, 0 if that may decide what top-k, top-p
        and min-p leave. None: no margins.
        """
        scores = self.scores(logits, depths, path)
        best = scores.max(dim=-1)
        margins = None
        if bound is not None:
            slack = bound.clamp(min=0.0)
            # Of two that are best, either may come first here: the margin is 0 then.
            rivals = self.scores(logits, depths, path, slack=slack) if self.leaves_out else scores
            top = rivals.topk(2, dim=-1).values
            margins = top[..., 0] - top[..., 1]
            if self.leaves_out:
                surely = self.scores(logits, depths, path, slack=-slack).gather(-1, best.indices[..., None])
                same = (top[..., 0] == best.values) & (surely[..., 0] == best.values)
                margins = margins.where(same, 0.0)
        return Choices(best.indices, best.values.isfinite(), margins)

    @property
    def leaves_out(self) -> bool:
        """Whether the rule leaves tokens out by how their scores stand to each other: top-k, top-p, min-p."""
        rules = self._rules
        return self._round.noise is not None and bool(rules.top_k or rules.top_p < 1.0 or rules.min_p)

    def _penalise(self, logits: torch.Tensor, path: torch.Tensor, columns: _Columns) -> torch.Tensor:
        """Divide positive and multiply negative logits of seen tokens (CTRL, arXiv 1909.05858), as stock does."""
        penalty = self._rules.repetition_penalty
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        seen = columns.of(self._seen)[:, None].expand_as(logits)
        if path.shape[-1]:
            # One column more, for the marks of tokens that have none here.
            at, there = columns.find(path)
            marked = pad(seen, (0, 1)).scatter(2, torch.where(there, at, columns.width), True)
            seen = marked[..., : columns.width]
        return torch.where(seen, lowered, logits)

    def _by_index(self, logits: torch.Tensor, index: torch.Tensor, columns: _Columns) -> torch.Tensor:
        """Rules that hold at some output indices only. `index`: int64 [B, n]."""
        rules, low = self._rules, float("-inf")
        at = index[..., None]
        if self._ends_late:
            logits = logits.masked_fill((at < self._least) & columns.of(self._no_eos), low)
        if rules.forced_eos:
            last, not_forced = self._settings.max_new_tokens - 1, columns.of(self._not_forced)
            logits = torch.where((at == last) & ~not_forced, 0.0, logits)
            logits = logits.masked_fill((at == last) & not_forced, low)
        if rules.suppress_first:
            logits = logits.masked_fill((at == 0) & columns.of(self._suppress_first), low)
        return logits

    def _warp(self, logits: torch.Tensor, slack: torch.Tensor | None = None) -> torch.Tensor:
        """Temperature, top-k, top-p, min-p, in stock's order, with some slack [B]."""
        rules, low = self._rules, float("-inf")
        logits = logits / rules.temperature
        more = logits.new_zeros(()) if slack is None else slack[:, None, None]
        if 0 < rules.top_k < logits.shape[-1]:
            best = logits.topk(rules.top_k + 1, dim=-1).values
            # What is surely among the k most likely leads the next one.
            kth, next_best = best[..., -2:-1] - more.clamp(min=0), best[..., -1:] - more
            logits = logits.masked_fill((logits < kth) | ((more < 0) & (logits <= next_best)), low)
        if rules.top_p < 1.0:
            ascending = logits.sort(dim=-1)
            # Two probabilities stand to each other as e to the difference of their scores, which is off twice.
            drop = ascending.values.softmax(dim=-1).cumsum(dim=-1) <= (1 - rules.top_p) * (-2 * more).exp()
            drop[..., -1].fill_(False)
            logits = logits.masked_fill(torch.zeros_like(drop).scatter(2, ascending.indices, drop), low)
        if rules.min_p:
            probabilities = logits.softmax(dim=-1)
            least = rules.min_p * (-more).exp() * probabilities.amax(-1, keepdim=True)
            logits = logits.masked_fill(probabilities < least, low)
        return logits

    def commit(self, tokens: torch.Tensor, count: torch.Tensor) -> None:
        """Mark the first `count` [B] of `tokens` [B, m] as seen."""
        if not self._penalised:
            return
        counted = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
        self._seen.scatter_(1, torch.where(counted, tokens, self._vocabulary), True)
