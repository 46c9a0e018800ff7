"""The elastic visual compressor: the pairs of V video tokens become fewer before a head reads them.

SpecVLM (the second of that name), arXiv 2509.11815, section 3.2: several operators, and a gate that reads the
question's features and picks one of them per input (`select`), weighs them (`weighted`), or none: all are used one
after the other (`concat`). If there is text between video tokens, such as timestamps, each stretch of video tokens is
compressed for itself. It knows neither models nor caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional

from specvlm.config import SpeculationSettings
from specvlm.errors import ConfigError, Setting
from specvlm.pruning import prune

OperatorName = Literal["prune", "prune-guided", "pool", "conv", "resampler", "text-only"]
CompressorMode = Literal["none", "single", "select", "weighted", "concat"]

OPERATORS: tuple[OperatorName, ...] = get_args(OperatorName)
MODES: tuple[CompressorMode, ...] = get_args(CompressorMode)
DEFAULT_OPERATORS: tuple[OperatorName, ...] = ("prune", "pool", "conv", "resampler", "text-only")
LEAST_RATIO, MOST_RATIO = 1.0, 1000.0
_HEADS_WIDTH = 64  # of the resampler's attention, about


@dataclass(frozen=True, slots=True)
class CompressorConfig:
    """What stands between the target's video tokens and a head.

    Attributes:
        mode: `none`: every pair is read; `single`: one operator; `select`, `weighted`, `concat`: several.
        operators: Those in use, in order.
        ratio: Video tokens per token that `prune`, `prune-guided`, `pool` and `conv` leave; the resampler leaves
            `queries`, `text-only` none.
        queries: Of the resampler.
    """

    mode: CompressorMode = "select"
    operators: tuple[OperatorName, ...] = DEFAULT_OPERATORS
    ratio: float = 5.0
    queries: int = 2

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"compressor mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        for operator in self.operators:
            if operator not in OPERATORS:
                raise ConfigError(
                    f"compressor operator {operator!r} is unknown; choose from {', '.join(OPERATORS)}"
                )
        if len(set(self.operators)) < len(self.operators):
            raise ConfigError(f"compressor operators {', '.join(self.operators)}: give each of them once")
        least, most = {"none": (0, 0), "single": (1, 1)}.get(self.mode, (2, len(OPERATORS)))
        if not least <= len(self.operators) <= most:
            raise ConfigError(
                f"compressor mode {self.mode!r} takes {least} to {most} operators, not {len(self.operators)}"
            )
        if not isinstance(self.ratio, int | float) or not LEAST_RATIO <= self.ratio <= MOST_RATIO:
            ratio = Setting("compression_ratio", self.ratio)
            raise ConfigError(ratio, "is out of range", fix="give 1 to 1000, 3 to 20 mostly")
        if not isinstance(self.queries, int) or not 1 <= self.queries <= 1024:
            raise ConfigError(Setting("queries", self.queries), "is out of range", fix="give 1 to 1024")

    @property
    def name(self) -> str:
        """The mode, or the one operator."""
        return self.operators[0] if self.mode == "single" else self.mode


def stretches(video_at: torch.Tensor) -> tuple[int, ...]:
    """How many video tokens each stretch without text has; `video_at`: int64 [V], ascending."""
    ends = (video_at.diff() != 1).nonzero().squeeze(1) + 1
    return tuple(
        torch.diff(ends.cpu(), prepend=torch.tensor([0]), append=torch.tensor([len(video_at)])).tolist()
    )


class VideoPairs(NamedTuple):
    """The pairs of one video's tokens, and what may help to choose among them."""

    inputs: torch.Tensor  # [1, V, hidden]
    positions: torch.Tensor  # int64 [P, V]
    scores: torch.Tensor  # float32 [V], the target's attention to each
    question: torch.Tensor  # [hidden], mean feature of the text behind the video
    stretches: tuple[int, ...]  # see `stretches`; V in all


class Compressed(NamedTuple):
    """What is left of them."""

    inputs: torch.Tensor  # [1, kept, hidden]
    positions: torch.Tensor  # int64 [P, kept]
    stretches: tuple[int, ...]  # how many are left of each stretch; kept in all
    operator: str  # what was used; operators used together are joined by "+"
    # Zero, but with the gate's gradient: to be added to the attention logits of all kept pairs. None: no gate chose.
    log_weight: torch.Tensor | None = None


class _Left(NamedTuple):
    """What an operator leaves, as in `Compressed`."""

    inputs: torch.Tensor
    positions: torch.Tensor
    stretches: tuple[int, ...]


def _by_stretch(found: _Left | VideoPairs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and positions of each stretch."""
    counts = list(found.stretches)
    return list(
        zip(torch.split(found.inputs, counts, 1), torch.split(found.positions, counts, 1), strict=True)
    )


def _joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Left:
    inputs, positions = zip(*parts, strict=True)
    return _Left(torch.cat(inputs, 1), torch.cat(positions, 1), tuple(one.shape[1] for one in inputs))


class _Operator(nn.Module):
    """Pairs -> fewer; `generator` is for those that draw lots."""

    def forward(self, video: VideoPairs, generator: torch.Generator) -> _Left:
        """Compress each stretch for itself."""
        return _joined([self.of_stretch(*part) for part in _by_stretch(video)])

    def of_stretch(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [1, n, hidden] and positions [P, n] of one stretch -> fewer."""
        raise NotImplementedError


def _left(count: int, ratio: float) -> int:
    return max(1, min(count, round(count / ratio)))


class _Prune(_Operator):
    """Some pairs, as they are."""

    def __init__(self, ratio: float, *, guided: bool) -> None:
        super().__init__()
        self._ratio, self._guided = ratio, guided

    def forward(self, video: VideoPairs, generator: torch.Generator) -> _Left:
        """Choose among all."""
        where = self.kept(video.scores, generator)
        ends = torch.tensor(video.stretches).cumsum(0)
        before = torch.searchsorted(where.cpu(), ends)  # how many of a stretch and those before it
        return _Left(
            video.inputs.index_select(1, where),
            video.positions.index_select(1, where.to(video.positions.device)),
            tuple(before.diff(prepend=torch.tensor([0])).tolist()),
        )

    def kept(self, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Which of V pairs are kept, int64, ascending: at random, or by the target's attention (arXiv 2508.16201)."""
        if self._guided:
            settings = SpeculationSettings(pruner="specvlm", prune_ratio=1.0 - 1.0 / self._ratio)
            return prune(scores, settings).nonzero().squeeze(1)
        order = torch.randperm(scores.numel(), generator=generator)
        return order[: _left(scores.numel(), self._ratio)].sort().values.to(scores.device)


class _Pool(_Operator):
    """Means of neighbours in (time, row, column) order; each has the position of the middle one."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self._ratio = ratio

    def of_stretch(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = inputs.shape[1]
        left = _left(count, self._ratio)
        pooled = functional.adaptive_avg_pool1d(inputs.transpose(1, 2), left).transpose(1, 2)
        return pooled, positions[:, _middles(count, left)]


def _middles(count: int, left: int) -> list[int]:
    """The middle of each of `left` windows over `count`, as adaptive pooling lays them."""
    return [(i * count // left + -(-(i + 1) * count // left) - 1) // 2 for i in range(left)]


class _Conv(_Operator):
    """One strided convolution, by channel, then across channels. It begins as the mean of neighbours."""

    def __init__(self, hidden: int, ratio: float) -> None:
        super().__init__()
        self._stride = max(1, round(ratio))
        self.depth = nn.Conv1d(hidden, hidden, self._stride, self._stride, groups=hidden, bias=False)
        self.across = nn.Linear(hidden, hidden, bias=False)
        nn.init.constant_(self.depth.weight, 1.0 / self._stride)
        nn.init.eye_(self.across.weight)

    def of_stretch(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = inputs.shape[1]
        missing = -count % self._stride
        last = inputs[:, -1:].expand(-1, missing, -1)
        padded = torch.cat((inputs, last), dim=1).transpose(1, 2)
        middles = range((self._stride - 1) // 2, padded.shape[2], self._stride)
        where = [min(middle, count - 1) for middle in middles]
        return self.across(self.depth(padded).transpose(1, 2)), positions[:, where]


class _Resampler(_Operator):
    """One layer of cross-attention from a few learned queries."""

    def __init__(self, hidden: int, queries: int) -> None:
        super().__init__()
        heads = max(h for h in range(1, max(1, hidden // _HEADS_WIDTH) + 1) if hidden % h == 0)
        self.queries = nn.Parameter(torch.randn(1, queries, hidden) * 0.02)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.attention = nn.MultiheadAttention(hidden, heads, bias=False, batch_first=True)

    def of_stretch(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.norm(inputs)
        found, _ = self.attention(self.queries, seen, seen, need_weights=False)
        return self.queries + found, positions[:, _middles(inputs.shape[1], found.shape[1])]


class _TextOnly(_Operator):
    """Nothing of the video."""

    def of_stretch(self, inputs: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs[:, :0], positions[:, :0]


def _operator(name: OperatorName, hidden: int, config: CompressorConfig) -> _Operator:
    makers: dict[OperatorName, Callable[[], _Operator]] = {
        "prune": lambda: _Prune(config.ratio, guided=False),
        "prune-guided": lambda: _Prune(config.ratio, guided=True),
        "pool": lambda: _Pool(config.ratio),
        "conv": lambda: _Conv(hidden, config.ratio),
        "resampler": lambda: _Resampler(hidden, config.queries),
        "text-only": _TextOnly,
    }
    return makers[name]()


class Compressor(nn.Module):
    """All operators of a head, and its gate."""

    def __init__(self, config: CompressorConfig, hidden: int) -> None:
        """`hidden`: width of the pairs."""
        super().__init__()
        self.config = config
        self.operators = nn.ModuleList(_operator(name, hidden, config) for name in config.operators)
        self.gate: nn.Linear | None = None
        if config.mode in ("select", "weighted"):
            self.gate_norm = nn.RMSNorm(hidden, eps=1e-6)
            # Hardly a preference to begin with: an operator that is never drawn never learns.
            self.gate = nn.Linear(hidden, len(config.operators))
            nn.init.normal_(self.gate.weight, std=0.1 * hidden**-0.5)
            nn.init.zeros_(self.gate.bias)

    def forward(self, video: VideoPairs, generator: torch.Generator) -> Compressed:
        """Compress. In training mode the gate's choice is drawn (Gumbel-softmax), else it is the most likely one."""
        mode = self.config.mode
        if mode == "none":
            return Compressed(video.inputs, video.positions, video.stretches, "none")
        if mode == "select":
            return self._select(video, generator)
        if mode == "weighted":
            return self._weigh(video, generator)
        made = [_by_stretch(operator(video, generator)) for operator in self.operators]
        joined = _joined([_joined(parts)[:2] for parts in zip(*made, strict=True)])
        return Compressed(*joined, "+".join(self.config.operators))

    def _shares(self, video: VideoPairs, generator: torch.Generator, *, draw: bool) -> torch.Tensor:
        """The gate's share of each operator, [operators]."""
        assert self.gate is not None
        logits: torch.Tensor = self.gate(self.gate_norm(video.question)).float()
        if draw:
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            logits = logits - torch.log(-torch.log(uniform.clamp(1e-12, 1.0 - 1e-12))).to(logits)
        return logits.softmax(dim=-1)

    def _select(self, video: VideoPairs, generator: torch.Generator) -> Compressed:
        """One operator alone is run, in training too.

        A layer that normalises its inputs does not feel a factor on them, so the straight-through factor of
        Gumbel-softmax goes where it is felt: to the weight that attention gives to the kept pairs.
        """
        shares = self._shares(video, generator, draw=self.training)
        choice = int(shares.argmax())
        left: _Left = self.operators[choice](video, generator)
        log_weight = torch.log1p(shares[choice] - shares[choice].detach()) if self.training else None
        return Compressed(*left, self.config.operators[choice], log_weight)

    def _weigh(self, video: VideoPairs, generator: torch.Generator) -> Compressed:
        """The weighted sum on one grid; the resampler's few tokens are repeated, and `text-only` adds nothing."""
        shares = self._shares(video, generator, draw=False).to(video.inputs)
        made = [_by_stretch(operator(video, generator)) for operator in self.operators]
        summed = []
        for (inputs, positions), *parts in zip(_by_stretch(video), *made, strict=True):
            left = _left(inputs.shape[1], self.config.ratio)
            total = inputs.new_zeros(1, left, inputs.shape[2])
            for share, (some, _) in zip(shares, parts, strict=True):
                if some.shape[1]:
                    spread = [i * some.shape[1] // left for i in range(left)]
                    total = total + share * some[:, spread]
            summed.append((total, positions[:, _middles(inputs.shape[1], left)]))
        return Compressed(*_joined(summed), "+".join(self.config.operators))

    def kept(
        self, video_scores: torch.Tensor, operator: str, generator: torch.Generator
    ) -> torch.Tensor | None:
        """Which of V video tokens an operator that prunes keeps, int64; None for one that makes new ones."""
        for name, module in zip(self.config.operators, self.operators, strict=True):
            if name == operator and isinstance(module, _Prune):
                return module.kept(video_scores, generator)
        return None
