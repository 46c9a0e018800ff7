"""The attention function of text models: causal prefill, scored text rows, and rounds, over one slab cache.

It is registered with `transformers` under the name `specvlm` and is told what to do by an `AttentionPlan`, which
travels where the attention mask would (`attention_mask={"full_attention": plan}`). Called without a plan, by stock
`generate()` say, it is stock sdpa. It knows nothing of videos, drafts or caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "specvlm"

# Text rows are scored in slices of this many, so that [H, rows, S] stays small when a long text follows the video.
SCORED_ROWS = 128

# How the nodes of a round look at what is committed: one kernel under one mask; the long prefix without a mask and
# the rest under one, merged; FlexAttention.
RoundAttention = Literal["masked", "split", "flex"]
# A prefix is split off in steps of this many slots, so that prompts of nearly one length share their graphs.
PREFIX_STEP = 128
# A shorter one is not worth a second kernel and the merge.
SHORTEST_PREFIX = 512
# Kernels want the rows of a mask aligned; 16 elements suit every dtype.
_MASK_ALIGN = 16


class ScoreSum:
    """Running sum of the attention that text rows pay to the video tokens, over layers, heads and rows.

    SpecVLM, arXiv 2508.16201, section 3.2: the mean over heads, layers and rows is the importance of a video token.
    """

    def __init__(self, video_slots: torch.Tensor, device: torch.device) -> None:
        """`video_slots`: int64 [V], where the video tokens stand in the cache."""
        self.video_slots = video_slots.to(device)
        self.total = torch.zeros(video_slots.numel(), dtype=torch.float32, device=device)  # [V]
        self.terms = 0

    def add(self, weights: torch.Tensor) -> None:
        """Add softmax `weights` [1, H, rows, S] of one layer."""
        over_video = weights.sum(dim=(0, 1, 2)).index_select(0, self.video_slots.to(weights.device))
        self.total += over_video.to(self.total.device)
        self.terms += weights.shape[0] * weights.shape[1] * weights.shape[2]

    def mean(self) -> torch.Tensor:
        """The mean attention of each video token, float32 [V]."""
        return self.total / max(self.terms, 1)


class NodeTable(NamedTuple):
    """What a round's nodes see, by distance from the end of what their row has committed."""

    # float [B, groups * n, m + 2], additive; column 0: committed slots, 1..m: the round's own, m + 1: those behind
    columns: torch.Tensor
    lengths: torch.Tensor  # int64 [B], committed slots


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one forward attends to.

    Attributes:
        first: Causal forwards: slot of the first query row; row i sees slots 0..first+i.
        mask: Rounds: additive, [B, 1, groups * n, visible - prefix], groups being query heads per key head;
            None: causal from `first`.
        scores: Where to add the attention paid to the video, or None.
        prefix: Rounds: this many first slots are seen by all nodes, and `mask` begins behind them.
        table: Rounds: given to FlexAttention instead of a mask.
    """

    first: int = 0
    mask: torch.Tensor | None = None
    scores: ScoreSum | None = None
    prefix: int = 0
    table: NodeTable | None = None

    def to(self, device: Any, *_: Any, **__: Any) -> AttentionPlan:
        """Follow a layer to its device (accelerate moves what it finds in a forward's arguments)."""
        mask = None if self.mask is None else self.mask.to(device)
        table = None if self.table is None else NodeTable(*(one.to(device) for one in self.table))
        return replace(self, mask=mask, table=table)


def plan_for(mask: AttentionPlan) -> dict[str, AttentionPlan]:
    """The mapping that text models hand to their layers untouched."""
    return {"full_attention": mask, "sliding_attention": mask}


def prefix_of(certain: int) -> int:
    """How much of the first `certain` slots, which every node sees, to split off; 0: nothing."""
    prefix = certain // PREFIX_STEP * PREFIX_STEP
    return prefix if prefix >= SHORTEST_PREFIX else 0


def _additive(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Bool [B, n, slots] (True: may look) -> additive mask [B, 1, groups * n, slots] of `dtype`."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).repeat(1, groups, 1)[:, None]


def node_table(lengths: torch.Tensor, sees: torch.Tensor, groups: int, dtype: torch.dtype) -> NodeTable:
    """What nodes see: all slots that their row has committed, and of the round's own what `sees` says.

    Args:
        lengths: int64 [B], committed slots; the round's own slots follow them.
        sees: bool [B, n, m], for the first m of the round's own slots.
        groups: Query heads per key head.
        dtype: Of the table.
    """
    seen = pad(pad(sees, (1, 0), value=True), (0, 1), value=False)
    return NodeTable(_additive(seen, groups, dtype)[:, 0], lengths)


def round_plan(table: NodeTable, visible: int, prefix: int = 0) -> AttentionPlan:
    """The plan of rows that have committed different numbers of slots, or of one row whose number is not known.

    Args:
        table: What the nodes see.
        visible: Slots of the pass, at least those committed and the round's own.
        prefix: Slots without a mask, none of them behind what the shortest row has committed.
    """
    width = (visible - prefix + _MASK_ALIGN - 1) // _MASK_ALIGN * _MASK_ALIGN
    last = table.columns.shape[2] - 1
    slot = torch.arange(prefix, prefix + width, device=table.lengths.device)
    column = (slot - table.lengths[:, None] + 1).clamp(0, last)  # [B, width]
    mask = table.columns.gather(2, column[:, None].expand(-1, table.columns.shape[1], -1))
    return AttentionPlan(mask=mask[:, None, :, : visible - prefix], prefix=prefix)


def tail_plan(
    sees: torch.Tensor, visible: int, groups: int, dtype: torch.dtype, prefix: int = 0
) -> AttentionPlan:
    """The plan of one row whose nodes see all slots but, of the last m, only those where `sees` [1, n, m] is True."""
    before = visible - prefix - sees.shape[-1]
    behind = -(visible - prefix) % _MASK_ALIGN if prefix else 0
    mask = pad(_additive(sees, groups, dtype), (before, behind))
    return AttentionPlan(mask=mask[..., : visible - prefix], prefix=prefix)


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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention under an additive mask [B, 1, groups * n, slots], or over all slots; -> [B, n, H, d]."""
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


def _part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> _Part:
    """Attention of packed queries over some slots by the best kernel that tells its log-sum-exp."""
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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    """The prefix without a mask, the rest under it, merged by log-sum-exp; -> [B, n, H, d].

    Flash-Decoding splits slots in the same way (Dao et al., 2023); here the split is where the mask begins, because
    the kernel that reads slots at full bandwidth takes no mask.
    """
    packed, prefix = _pack_groups(query, key.shape[1]), plan.prefix
    far = _part(packed, key[:, :, :prefix], value[:, :, :prefix], None, scaling)
    near = _part(packed, key[:, :, prefix:], value[:, :, prefix:], plan.mask, scaling)
    return _unpack_groups(_merge(far, near), query.shape[1])


@lru_cache(maxsize=2)
def _flex_kernel(kind: str) -> Callable[..., torch.Tensor]:
    """FlexAttention; without a compiler behind it, on the CPU, its reference."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    if kind == "cpu":
        return flex_attention
    return torch.compile(flex_attention, dynamic=True)


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: NodeTable, scaling: float
) -> torch.Tensor:
    """FlexAttention (arXiv 2412.05496) over all slots; -> [B, n, H, d]."""
    columns, lengths = table

    def score(
        logit: torch.Tensor, row: torch.Tensor, _: torch.Tensor, node: torch.Tensor, slot: torch.Tensor
    ) -> torch.Tensor:
        return logit + columns[row, node, (slot - lengths[row] + 1).clamp(0, columns.shape[2] - 1)]

    packed = _pack_groups(query, key.shape[1])
    out = _flex_kernel(query.device.type)(packed, key, value, score_mod=score, scale=scaling)
    return _unpack_groups(out, query.shape[1])


def _scored(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    """Causal attention with its weights in sight; adds them to `plan.scores`; -> [B, n, H, d]."""
    assert plan.scores is not None
    heads, count = query.shape[1], query.shape[2]
    outputs = []
    for start in range(0, count, SCORED_ROWS):
        part = query[:, :, start : start + SCORED_ROWS]
        rows = part.shape[2]
        packed = _pack_groups(part, key.shape[1])
        logits = (packed @ key.transpose(2, 3)).float() * scaling  # [B, kv heads, groups * rows, S]
        logits = logits.reshape(part.shape[0], heads, rows, key.shape[2])
        visible = _causal_from(plan.first + start, rows, key.shape[2], key.device)
        weights = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1)  # [B, H, rows, S]
        plan.scores.add(weights)
        outputs.append(_unpack_groups(_pack_groups(weights.to(value.dtype), key.shape[1]) @ value, heads))
    return torch.cat(outputs, dim=1)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scaling: float
) -> torch.Tensor:
    """Causal attention of a prefill part; -> [B, n, H, d]."""
    if plan.first == 0:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)
    outputs = []
    for start in range(0, query.shape[2], SCORED_ROWS):
        part = query[:, :, start : start + SCORED_ROWS]
        visible = _causal_from(plan.first + start, part.shape[2], key.shape[2], key.device)
        mask = _additive(visible, query.shape[1] // key.shape[1], query.dtype)
        outputs.append(_masked(part, key, value, mask, scaling))
    return torch.cat(outputs, dim=1)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionPlan | torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function. query [B, H, n, d]; key, value [B, kv heads, visible slots, d] -> [B, n, H, d]."""
    if not isinstance(attention_mask, AttentionPlan):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plan = attention_mask
    if plan.scores is not None:
        return _scored(query, key, value, plan, scale), None
    if plan.table is not None:
        return _flex(query, key, value, plan.table, scale), None
    if plan.prefix:
        return _split(query, key, value, plan, scale), None
    if plan.mask is None and query.shape[2] > 1:
        return _causal(query, key, value, plan, scale), None
    return _masked(query, key, value, plan.mask, scale), None


def register_attention() -> None:
    """Make `attn_implementation="specvlm"` known to `transformers`. Harmless when repeated."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
