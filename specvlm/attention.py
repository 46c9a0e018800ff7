"""The attention function of text models: causal prefill, scored text rows, and trees, over one slab cache.

It is registered with `transformers` under the name `specvlm` and is told what to do by an `AttentionPlan`, which
travels where the attention mask would (`attention_mask={"full_attention": plan}`). Called without a plan, by stock
`generate()` say, it is stock sdpa. It knows nothing of videos, drafts or caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "specvlm"

# Text rows are scored in slices of this many, so that [H, rows, S] stays small when a long text follows the video.
SCORED_ROWS = 128


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


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one forward attends to.

    Attributes:
        first: Causal forwards: slot of the first query row; row i sees slots 0..first+i.
        mask: Tree forwards: additive, [B, 1, groups * n, visible slots], groups being query heads per key head, as
            `tree_plan` makes it; None: causal from `first`.
        scores: Where to add the attention paid to the video, or None.
    """

    first: int = 0
    mask: torch.Tensor | None = None
    scores: ScoreSum | None = None

    def to(self, device: Any, *_: Any, **__: Any) -> AttentionPlan:
        """Follow a layer to its device (accelerate moves what it finds in a forward's arguments)."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))


def plan_for(mask: AttentionPlan) -> dict[str, AttentionPlan]:
    """The mapping that text models hand to their layers untouched."""
    return {"full_attention": mask, "sliding_attention": mask}


def _additive(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Bool [B, n, slots] (True: may look) -> additive mask [B, 1, groups * n, slots] of `dtype`."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).repeat(1, groups, 1)[:, None]


def tree_plan(visible: torch.Tensor, groups: int, dtype: torch.dtype) -> AttentionPlan:
    """The plan of a forward in which node i of row b sees the slots where `visible` [B, n, slots] is True."""
    return AttentionPlan(mask=_additive(visible, groups, dtype))


def tail_plan(sees: torch.Tensor, visible: int, groups: int, dtype: torch.dtype) -> AttentionPlan:
    """The plan of one row whose nodes see all slots but, of the last m, only those where `sees` [1, n, m] is True."""
    return AttentionPlan(mask=pad(_additive(sees, groups, dtype), (visible - sees.shape[-1], 0)))


def round_mask(lengths: torch.Tensor, sees: torch.Tensor, visible: int) -> torch.Tensor:
    """What the nodes of one round see: all committed slots of their row, and of the round's own slots what `sees` says.

    Args:
        lengths: int64 [B], committed slots; the round's own slots follow them.
        sees: bool [B, n, m], for the first m of the round's own slots.
        visible: Slots of the mask, at least `lengths.max() + m`.

    Returns:
        bool [B, n, visible].
    """
    rows, nodes, own = sees.shape
    committed = torch.arange(visible, device=lengths.device) < lengths[:, None]
    where = lengths[:, None] + torch.arange(own, device=lengths.device)
    mask = committed[:, None].repeat(1, nodes, 1)
    return mask.scatter_(2, where[:, None].expand(rows, nodes, own), sees)


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
    if plan.mask is None and query.shape[2] > 1:
        return _causal(query, key, value, plan, scale), None
    return _masked(query, key, value, plan.mask, scale), None


def register_attention() -> None:
    """Make `attn_implementation="specvlm"` known to `transformers`. Harmless when repeated."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
