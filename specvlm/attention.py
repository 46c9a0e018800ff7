"""The attention function of text models: causal prefill with scores, and rounds, over a cache of slabs.

It is registered with `transformers` under the name `specvlm` and receives an `AttentionPlan`, which
text models hand through to it as they do with every keyword that they do not know. Called without a plan, by stock
`generate()` say, it is stock sdpa. It knows nothing of videos, drafts or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "specvlm"

# Text rows are scored in slices of this many, so that [H, rows, S] stays small when a long text follows the video.
SCORED_ROWS = 128

# How the nodes of a round look at what is committed: one kernel under one mask; each row's long prefix without a mask
# and the rest under one, merged; all of each row's committed slots by one kernel for sequences of different lengths,
# merged with the round's own nodes.
RoundAttention = Literal["masked", "split", "varlen"]
# A prefix is split off in steps of this many slots, so that sequences of nearly one length share their graphs.
PREFIX_STEP = 128
# A shorter one is not worth a second kernel and the merge.
SHORTEST_PREFIX = 512
# Kernels want the rows of a mask aligned; 16 elements suit every dtype.
_MASK_ALIGN = 16
_NO_MASK = torch.empty(0, 0, 0, 0)


class ScoreSum:
    """Running sum of the attention that text rows pay to the video tokens, over layers, heads and rows.

    SpecVLM, arXiv 2508.16201, section 3.2: the mean over heads, layers and rows is the importance of a video token.
    """

    def __init__(self, video_slots: torch.Tensor, device: torch.device) -> None:
        """`video_slots`: int64 [V], where the video tokens are in the sequence."""
        self.video_slots = video_slots.to(device)
        self.total = torch.zeros(video_slots.numel(), dtype=torch.float32, device=device)  # [V]
        self.terms = 0

    def add(self, weights: torch.Tensor, terms: int) -> None:
        """Add softmax weights of one layer, [S]: the sum of so many terms, one for each head and row."""
        over_video = weights.index_select(0, self.video_slots.to(weights.device))
        self.total += over_video.to(self.total.device)
        self.terms += terms

    def mean(self) -> torch.Tensor:
        """The mean attention of each video token, float32 [V]."""
        return self.total / max(self.terms, 1)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence in a prefill pass; they see what is before them in their own sequence, nothing else.

    Attributes:
        start: Where they begin in the pass.
        count: How many they are.
        first: Slots of their sequence before them.
        scored: The first of them whose attention is added to `scores`, counted within the segment.
        scores: Where to add the attention paid to the video, or None.
    """

    start: int
    count: int
    first: int = 0
    scored: int = 0
    scores: ScoreSum | None = None


@dataclass(frozen=True, slots=True)
class VisibleNodes:
    """What the nodes of some rows of a round see: those that one slab holds.

    Attributes:
        where: Their places in the batch: a slice, or int64 [rows].
        mask: Additive, [rows, 1, groups * n, visible - prefix], groups being query heads per key head; None: they
            see all visible slots, by the kernel that stock `generate()` runs in a step. `varlen`: of the round's
            own slots alone.
        prefix: This many first slots are seen by all nodes of these rows, and `mask` begins after them.
        lengths: `varlen`: int64 [rows], committed slots; None: another kernel.
    """

    where: slice | torch.Tensor
    mask: torch.Tensor | None = None
    prefix: int = 0
    lengths: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one forward attends to: the segments of a prefill, or the rows of a round, slab by slab."""

    segments: tuple[Segment, ...] = ()
    rows: tuple[VisibleNodes, ...] = ()

    def to(self, device: Any, *_: Any, **__: Any) -> AttentionPlan:
        """Follow a layer to its device (accelerate moves what it finds in a forward's arguments)."""
        return replace(self, rows=tuple(_moved(rows, device) for rows in self.rows))


def _moved(rows: VisibleNodes, device: Any) -> VisibleNodes:
    mask = None if rows.mask is None else rows.mask.to(device)
    lengths = None if rows.lengths is None else rows.lengths.to(device)
    where = rows.where if isinstance(rows.where, slice) else rows.where.to(device)
    return replace(rows, where=where, mask=mask, lengths=lengths)


def plan_arguments(plan: AttentionPlan) -> dict[str, Any]:
    """Keywords that bring a plan through any text model; one that is given a mask of four dimensions makes none."""
    return {"attention_mask": _NO_MASK, "attention_plan": plan}


def prefix_of(certain: int) -> int:
    """How much of the first `certain` slots, which every node sees, to split off; 0: nothing."""
    prefix = certain // PREFIX_STEP * PREFIX_STEP
    return prefix if prefix >= SHORTEST_PREFIX else 0


def _additive(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Bool [B, n, slots] (True: may look) -> additive mask [B, 1, groups * n, slots] of `dtype`."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).repeat(1, groups, 1)[:, None]


def own_mask(sees: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of a round's own slots alone: bool [B, n, m] -> additive [B, 1, groups * n, m]."""
    return _additive(sees, groups, dtype)


def ragged_mask(
    lengths: torch.Tensor, sees: torch.Tensor, visible: int, groups: int, dtype: torch.dtype, prefix: int = 0
) -> torch.Tensor:
    """The mask of rows that have committed different numbers of slots, or numbers that the host does not know.

    Args:
        lengths: int64 [B], committed slots, all of which every node sees; the round's own slots follow them.
        sees: bool [B, n, m], for the first m of the round's own slots.
        visible: Slots of the pass, at least those committed and the round's own.
        groups: Query heads per key head.
        dtype: Of the mask.
        prefix: Slots that get no mask, none of them after what the shortest row has committed.

    Returns:
        Additive [B, 1, groups * n, visible - prefix].
    """
    # By distance from the end of what a row has committed; column 0: committed slots, the last one: those after.
    columns = _additive(pad(pad(sees, (1, 0), value=True), (0, 1), value=False), groups, dtype)[:, 0]
    width = (visible - prefix + _MASK_ALIGN - 1) // _MASK_ALIGN * _MASK_ALIGN
    slot = torch.arange(prefix, prefix + width, device=lengths.device)
    column = (slot - lengths[:, None] + 1).clamp(0, columns.shape[2] - 1)  # [B, width]
    mask = columns.gather(2, column[:, None].expand(-1, columns.shape[1], -1))
    return mask[:, None, :, : visible - prefix]


def tail_mask(
    sees: torch.Tensor, visible: int, groups: int, dtype: torch.dtype, prefix: int = 0
) -> torch.Tensor:
    """The mask of one row whose nodes see all slots but, of the last m, only those where `sees` [1, n, m] is True."""
    before = visible - prefix - sees.shape[-1]
    behind = -(visible - prefix) % _MASK_ALIGN if prefix else 0
    return pad(_additive(sees, groups, dtype), (before, behind))[..., : visible - prefix]


def _pack_groups(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H, n, d] -> [B, kv heads, groups * n, d]: heads that share keys become rows, so keys are never expanded."""
    rows, heads, count, width = query.shape
    return query.reshape(rows, kv_heads, heads // kv_heads * count, width)


def _unpack_groups(packed: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, kv heads, groups * n, d] -> [B, n, H, d], the layout that models expect back."""
    rows, _, _, width = packed.shape
    return packed.reshape(rows, heads, -1, width).transpose(1, 2)


def _causal_from(first: int, rows: int, slots: int, device: torch.device) -> torch.Tensor:
    """Bool [1, rows, slots]: row i sees slots 0..first+i."""
    row = torch.arange(first, first + rows, device=device)
    return (torch.arange(slots, device=device) <= row[:, None])[None]


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention under an additive mask [B, 1, groups * n, slots]; -> [B, n, H, d]."""
    packed = _pack_groups(query, key.shape[1])
    return _unpack_groups(
        scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling), query.shape[1]
    )


class _Part(NamedTuple):
    """Attention over a part of the slots."""

    output: torch.Tensor  # [B, kv heads, groups * n, d]
    total: torch.Tensor  # float32 [B, kv heads, groups * n], log of the sum of exponentials


class _Kernels(NamedTuple):
    """Which of the kernels that tell their log-sum-exp a device has for a dtype and head size."""

    flash: bool  # takes no mask; splits the slots over the whole device
    efficient: bool


@lru_cache(maxsize=64)
def _cuda_kernels(device: torch.device, dtype: torch.dtype, width: int) -> _Kernels:
    probe = torch.empty(1, 1, 16, width, dtype=dtype, device=device)
    asked = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, False, False)
    return _Kernels(
        torch.backends.cuda.can_use_flash_attention(asked),
        torch.backends.cuda.can_use_efficient_attention(asked),
    )


def has_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a CUDA device has FlashAttention for keys of this kind."""
    return _cuda_kernels(device, dtype, width).flash


def _part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> _Part:
    """Attention of packed queries over some slots by the best kernel that returns its log-sum-exp."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return _Part(
            *aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, attn_mask=mask, scale=scaling
            )
        )
    if query.device.type == "cuda":
        kernels = _cuda_kernels(query.device, query.dtype, query.shape[-1])
        if kernels.flash and mask is None:
            return _Part(*aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)[:2])
        if kernels.efficient:
            bias = None if mask is None else mask.expand(-1, key.shape[1], -1, -1)
            output, total, *_ = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, scale=scaling
            )
            return _Part(output, total[..., : query.shape[2]])  # its rows are padded to 32
    return _part_by_hand(query, key, value, mask, scaling)


def _part_by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> _Part:
    logits = (query.float() @ key.float().transpose(2, 3)) * scaling
    if mask is not None:
        logits = logits + mask
    return _Part((logits.softmax(dim=-1) @ value.float()).to(value.dtype), logits.logsumexp(dim=-1))


def _merge(one: _Part, other: _Part) -> torch.Tensor:
    """Attention over both parts' slots. Neither part of any row is empty, so both totals are finite."""
    weight = (one.total - other.total).sigmoid()[..., None]
    merged = torch.lerp(other.output.float(), one.output.float(), weight)
    return merged.to(one.output.dtype)


def _split(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: VisibleNodes, scaling: float
) -> torch.Tensor:
    """The prefix without a mask, the rest under it, merged by log-sum-exp; -> [B, n, H, d].

    Flash-Decoding splits slots in the same way (Dao et al., 2023); here the split is where the mask begins, because
    the kernel that reads slots at full bandwidth takes no mask.
    """
    packed, prefix = _pack_groups(query, key.shape[1]), rows.prefix
    far = _part(packed, key[:, :, :prefix], value[:, :, :prefix], None, scaling)
    near = _part(packed, key[:, :, prefix:], value[:, :, prefix:], rows.mask, scaling)
    return _unpack_groups(_merge(far, near), query.shape[1])


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: VisibleNodes, scaling: float
) -> torch.Tensor:
    """All committed slots of each row by one kernel, the round's own nodes under their mask; -> [B, n, H, d]."""
    assert rows.lengths is not None
    assert rows.mask is not None
    far = committed_part(query, key, value, rows.lengths, scaling)
    own = rows.lengths[:, None] + torch.arange(rows.mask.shape[-1], device=query.device)  # [B, m]
    at = own[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    packed = _pack_groups(query, key.shape[1])
    near = _part(packed, key.gather(2, at), value.gather(2, at), rows.mask, scaling)
    return _unpack_groups(_merge(far, near), query.shape[1])


def committed_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, scaling: float
) -> _Part:
    """Attention of queries [B, H, n, d] over the first `lengths` [B] slots of each row, by `varlen_attn` on CUDA.

    Rows of a slab follow each other in memory, so their starts are those of a packed batch, and `seqused_k` says how
    much of each counts.
    """
    if query.device.type != "cuda":
        return _committed_by_hand(query, key, value, lengths, scaling)
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    rows, heads, count, width = query.shape
    slots = key.shape[2]
    start = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
    output, total = varlen_attn(
        query.transpose(1, 2).reshape(rows * count, heads, width),
        key.transpose(1, 2).reshape(rows * slots, key.shape[1], width),
        value.transpose(1, 2).reshape(rows * slots, key.shape[1], width),
        start * count,
        start * slots,
        count,
        slots,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
        enable_gqa=True,
        seqused_k=lengths.to(torch.int32),
    )
    by_row = output.reshape(rows, count, heads, width).transpose(1, 2)
    sums = total.reshape(heads, rows, count).transpose(0, 1)  # [B, H, n]
    packed = _pack_groups(by_row, key.shape[1])
    return _Part(packed, sums.reshape(*packed.shape[:3]))


def _committed_by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, scaling: float
) -> _Part:
    seen = torch.arange(key.shape[2], device=key.device) < lengths[:, None]
    mask = torch.zeros(seen.shape, device=key.device).masked_fill_(~seen, float("-inf"))
    return _part_by_hand(_pack_groups(query, key.shape[1]), key, value, mask[:, None, None], scaling)


def _add_scores(query: torch.Tensor, key: torch.Tensor, segments: Sequence[Segment], scaling: float) -> None:
    """Add the attention of scored rows to the scores of alike segments: a product of its own, touching no output.

    query [segments, H, count, d], key [segments, kv heads, first + count, d].
    """
    if segments[0].scores is None:
        return
    heads, count, first = query.shape[1], segments[0].count, segments[0].first
    for start in range(segments[0].scored, count, SCORED_ROWS):
        part = query[:, :, start : start + SCORED_ROWS]
        rows = part.shape[2]
        packed = _pack_groups(part.float(), key.shape[1])
        logits = (packed @ key.float().transpose(2, 3)) * scaling  # [segments, kv heads, groups * rows, S]
        logits = logits.reshape(len(segments), heads, rows, key.shape[2])
        visible = _causal_from(first + start, rows, key.shape[2], key.device)
        sums = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1).sum(dim=(1, 2))  # [segments, S]
        for segment, total in zip(segments, sums, strict=True):
            assert segment.scores is not None
            segment.scores.add(total, heads * rows)


def _continued(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, scaling: float
) -> torch.Tensor:
    """Causal attention of tokens that others precede; -> [1, n, H, d]."""
    outputs = []
    for start in range(0, query.shape[2], SCORED_ROWS):
        part = query[:, :, start : start + SCORED_ROWS]
        visible = _causal_from(first + start, part.shape[2], key.shape[2], key.device)
        mask = _additive(visible, query.shape[1] // key.shape[1], query.dtype)
        outputs.append(_masked(part, key, value, mask, scaling))
    return torch.cat(outputs, dim=1)


def _prefill(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    segments: Sequence[Segment],
    scaling: float,
) -> torch.Tensor:
    """Causal attention of packed segments; query [1, H, n, d] -> [1, n, H, d].

    `keys`, `values`: those of all tokens where every segment begins its sequence; else one of each for every segment.
    """
    outputs = []
    if not any(one.first for one in segments):
        for _, alike in groupby(segments, key=lambda one: (one.count, one.scored, one.scores is None)):
            outputs.append(_whole_prompts(query, keys[0], values[0], list(alike), scaling))
    else:
        for one, key, value in zip(segments, keys, values, strict=True):
            mine = query[:, :, one.start : one.start + one.count]
            outputs.append(_continued(mine, key, value, one.first, scaling))
            _add_scores(mine, key, [one], scaling)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _whole_prompts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], scaling: float
) -> torch.Tensor:
    """Segments of one length that begin their sequences and follow each other: a batch; -> [1, rows * n, H, d]."""
    start, count = segments[0].start, segments[0].count
    span = slice(start, start + len(segments) * count)
    by_row = [
        part[0, :, span].reshape(part.shape[1], len(segments), count, part.shape[3]).transpose(0, 1)
        for part in (query, key, value)
    ]  # each [segments, heads, count, d]
    queries, keys, values = by_row
    out = scaled_dot_product_attention(
        queries, keys, values, is_causal=count > 1, scale=scaling, enable_gqa=True
    )
    _add_scores(queries, keys, segments, scaling)
    return out.transpose(1, 2).flatten(0, 1)[None]


# What stock runs in a step: query [B, H, 1, d], keys and values -> [B, 1, H, d].
_StockStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _round(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    rows: Sequence[VisibleNodes],
    scaling: float,
    step: _StockStep,
) -> torch.Tensor:
    """Attention of the nodes of a round, slab by slab; query [B, H, n, d] -> [B, n, H, d]."""
    if len(rows) == 1 and isinstance(rows[0].where, slice):
        return _of_rows(query, keys[0], values[0], rows[0], scaling, step)
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for key, value, some in zip(keys, values, rows, strict=True):
        out[some.where] = _of_rows(query[some.where], key, value, some, scaling, step)
    return out


def _of_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: VisibleNodes,
    scaling: float,
    step: _StockStep,
) -> torch.Tensor:
    if rows.lengths is not None:
        return _varlen(query, key, value, rows, scaling)
    if rows.mask is None:
        return step(query, key, value)
    if rows.prefix:
        return _split(query, key, value, rows, scaling)
    return _masked(query, key, value, rows.mask, scaling)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    attention_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function; query [B, H, n, d] -> [B, n, H, d].

    With a plan, `key` and `value` are lists as this library's cache gives them, see `specvlm.cache`.
    """
    if attention_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_plan.segments:
        return _prefill(query, key, value, attention_plan.segments, scale), None

    def step(one: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, one, keys, values, None, scaling=scaling, **kwargs)[0]

    return _round(query, key, value, attention_plan.rows, scale, step), None


def register_attention() -> None:
    """Make `attn_implementation="specvlm"` known to `transformers`. Harmless when repeated."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
