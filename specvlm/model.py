"""One loaded video LLM with its family: embeddings, forward passes over its cache, logits. It does not generate."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from operator import add
from typing import Any, NamedTuple

import torch

from specvlm.attention import (
    AttentionPlan,
    RoundAttention,
    VisibleNodes,
    has_flash,
    own_mask,
    plan_arguments,
    prefix_of,
    ragged_mask,
    tail_mask,
)
from specvlm.cache import KVCache, SlabRows, SlabShape, rounded
from specvlm.errors import GenerationError
from specvlm.families.base import Family, ModelInputs, VideoFeatures
from specvlm.graphs import can_capture

# On a CPU, a pass whose hidden states stay in its caches is fastest; a GPU wants to be filled.
PACKED_TOKENS_CPU, PACKED_TOKENS = 1024, 8192


class Nodes(NamedTuple):
    """Nodes of one round, to run in one pass."""

    tokens: torch.Tensor  # int64 [B, n]
    positions: torch.Tensor  # int64 [P, B, n] or [1, B, n]
    slots: torch.Tensor  # int64 [B, n], from the committed ones on
    # bool [B, n, m], which of the round's first m slots a node sees, its own included; None: n is 1, and it sees all
    sees: torch.Tensor | None


class Lengths(NamedTuple):
    """How many slots each row of a batch has committed."""

    slots: torch.Tensor  # int64 [B]
    most: tuple[int, ...]  # the same as the host knows it, or more
    least: tuple[int, ...]  # the same as the host knows it, or fewer

    def plus(self, more: Lengths | int) -> Lengths:
        """With so many more in each row."""
        if isinstance(more, int):
            most, least = (tuple(count + more for count in counts) for counts in self[1:])
            return Lengths(self.slots + more, most, least)
        most, least = tuple(map(add, self.most, more.most)), tuple(map(add, self.least, more.least))
        return Lengths(self.slots + more.slots, most, least)


class _Read(NamedTuple):
    """Rows of a slab that see its first slots under one plan."""

    group: SlabRows
    within: slice  # of the slab's rows
    visible: int
    plan: VisibleNodes


def cache_keyword(text: Any) -> str:
    """What a text model calls its cache: `transformers` 5.24 has another name for it than those before."""
    return "cache" if "cache" in inspect.signature(text.forward).parameters else "past_key_values"


class TextModel:
    """A stock decoder over a cache of slabs: embeddings in, hidden states out.

    Attributes:
        round_attention: How rounds attend, see `specvlm.attention.RoundAttention`: `masked` on the CPU; on CUDA
            `varlen` where torch (2.12 and later) and the device have it for these keys, else `split`. Chosen by
            reasoning (the kernels that read a long prefix at full bandwidth take no mask), not by measurement.
        packed_tokens: Tokens of a prefill pass that several prompts may share; a longer prompt has a pass of its own.
        captures: Rounds of this model can be CUDA graphs.
        told_step: Rounds get the lengths of sequences in steps of so many slots, so that one graph serves many
            rounds; 1: they get the exact lengths.
        keeps_features: New caches keep of each token, besides its keys and values, the output of the last norm.
    """

    def __init__(self, module: Any, text: Any, position_rows: int, dtype: torch.dtype) -> None:
        """Look at the decoder `text`, a part of `module`, loaded with the attention of this library."""
        self._module, self._text, self._position_rows = module, text, position_rows
        self._cache_keyword = cache_keyword(text)
        config = text.config
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        devices = tuple(next(layer.parameters()).device for layer in text.layers)
        self.dtype = dtype
        self._slab_shape = SlabShape(int(config.num_key_value_heads), int(head_dim), dtype, devices)
        self._groups = heads // self._slab_shape.kv_heads
        layer_types = getattr(config, "layer_types", None) or ()
        self._window = config.sliding_window if "sliding_attention" in layer_types else None
        on_cuda = all(device.type == "cuda" for device in devices)
        self.round_attention: RoundAttention = "masked"
        if on_cuda:
            self.round_attention = _cuda_attention(devices[0], dtype, int(head_dim))
        self.packed_tokens = PACKED_TOKENS if on_cuda else PACKED_TOKENS_CPU
        self.captures = can_capture(module, devices)
        self.told_step = 1
        self.keeps_features = False

    @property
    def device(self) -> torch.device:
        """Where hidden states come out; rounds are kept there."""
        device: torch.device = next(self._text.layers[-1].parameters()).device
        return device

    @property
    def hidden_size(self) -> int:
        """Width of hidden states."""
        return int(self._text.config.hidden_size)

    @property
    def context_tokens(self) -> int | None:
        """The most tokens, prompt and caption together, that the checkpoint was made for; None: it does not say."""
        return getattr(self._text.config, "max_position_embeddings", None)

    def keep_features(self) -> None:
        """From now on, new caches keep features; see `keeps_features`."""
        self.keeps_features = True
        self._slab_shape = self._slab_shape._replace(
            feature_width=self.hidden_size, feature_device=self.device
        )

    @property
    def most_slots(self) -> int | None:
        """The most tokens of a sequence; None: no limit. Layers with a sliding window see no more than this."""
        return self._window

    @property
    def slot_bytes(self) -> int:
        """Memory of one token in a cache."""
        return self._slab_shape.slot_bytes

    def cache_bytes(self, slots: int) -> int:
        """Memory of a sequence that needs so many slots."""
        return rounded(slots) * self.slot_bytes

    def check_length(self, slots: int) -> None:
        """Refuse a sequence that is too long.

        Raises:
            GenerationError: Some layers see a sliding window that is shorter than this.
        """
        if self._window is not None and slots > self._window:
            raise GenerationError(
                f"{slots} tokens exceed the sliding window of {self._window} that this checkpoint uses; "
                "give fewer frames or a smaller --max-new-tokens"
            )

    def new_cache(self, *slots: int) -> KVCache:
        """A cache, with a row of so many slots for each number.

        Raises:
            GenerationError: Some layers see a sliding window that is shorter.
        """
        for count in slots:
            self.check_length(count)
        cache = KVCache(self._slab_shape, self.device)
        if slots:
            cache.add(slots)
        return cache

    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        plan: AttentionPlan,
        more: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """One pass of the decoder over what the cache was aimed at.

        Args:
            embeds: [B, n, hidden].
            positions: int64 [P, B, n], or [1, B, n] where all rows of a position are the same.
            cache: Aimed at n slots per row; it also keeps the features, where it was made for them.
            plan: What to attend to.
            more: Further arguments of the text model; see `Family.text_arguments`.

        Returns:
            Hidden states after the last norm, [B, n, hidden], on `device`.
        """
        rows = self._position_rows
        out = self._text(
            inputs_embeds=embeds,
            position_ids=positions.expand(rows, -1, -1) if rows > 1 else positions[0],
            use_cache=True,
            **{self._cache_keyword: cache},
            **plan_arguments(plan),
            **(more or {}),
        )
        hidden: torch.Tensor = out.last_hidden_state.to(self.device)
        if self.keeps_features:
            cache.keep_features(hidden)
        return hidden

    def run_nodes(
        self, embeds: torch.Tensor, nodes: Nodes, cache: KVCache, lengths: Lengths, own: int
    ) -> torch.Tensor:
        """One pass over the nodes of a round, after what each row has committed.

        A lone node that sees all slots attends as in a step of stock `generate()`, on the same shapes.

        Args:
            embeds: Of the nodes, [B, n, hidden].
            nodes: n of them per row.
            cache: Written at the nodes' slots.
            lengths: Committed slots, all of which every node sees.
            own: Slots of the round so far, of these nodes and those before them.

        Returns:
            Hidden states [B, n, hidden].
        """
        lengths = self._told(lengths)
        reads = [read for group in cache.groups for read in self._reads(group, nodes, lengths, own)]
        cache.aim_nodes(nodes.slots, [(one.group.slab, one.within, one.visible) for one in reads])
        plan = AttentionPlan(rows=tuple(one.plan for one in reads))
        return self.forward(embeds, nodes.positions, cache, plan)

    def run_step(self, embeds: torch.Tensor, position: int, cache: KVCache, length: int) -> torch.Tensor:
        """One token as a step of stock `generate()` runs it for a prompt alone: the same kernels on the same shapes.

        Args:
            embeds: Of the token, [1, 1, hidden].
            position: Of the token.
            cache: Of one row; the token is written behind its first `length` slots, which it sees.
            length: Committed slots.

        Returns:
            Hidden state [1, 1, hidden].
        """
        (group,) = cache.groups
        slot = torch.full((1, 1), length, device=cache.base.device)
        row = slice(group.first, group.first + 1)
        cache.aim_nodes(slot, [(group.slab, row, length + 1)])
        plan = AttentionPlan(rows=(VisibleNodes(slice(0, 1)),))
        return self.forward(embeds, torch.full((1, 1, 1), position, device=embeds.device), cache, plan)

    def _told(self, lengths: Lengths) -> Lengths:
        """The lengths that rounds get: with `varlen` nothing that the host knows matters."""
        step = self.told_step
        if self.round_attention == "varlen":
            return Lengths(lengths.slots, (0,) * len(lengths.most), (0,) * len(lengths.least))
        if step == 1:
            return lengths
        most = tuple(-(-count // step) * step for count in lengths.most)
        return Lengths(lengths.slots, most, tuple(count // step * step for count in lengths.least))

    def host_state(self, lengths: Lengths, cache: KVCache) -> Hashable:
        """All that a pass over nodes depends on besides tensors and the nodes' number."""
        return self.round_attention, self._told(lengths)[1:], cache.layout

    def _reads(self, group: SlabRows, nodes: Nodes, lengths: Lengths, own: int) -> list[_Read]:
        """How the rows of a slab are read: together, or one by one where each has a prefix of its own to split off."""
        everyone = slice(group.first, group.first + len(group.rows))
        if self.round_attention == "varlen":
            sees = self._sees(nodes, own)[group.where]
            mask = own_mask(sees, self._groups, self.dtype)
            plan = VisibleNodes(group.where, mask, lengths=lengths.slots[group.where])
            return [_Read(group, everyone, group.slab.capacity, plan)]
        if self.round_attention == "split" and any(prefix_of(lengths.least[row]) for row in group.rows):
            return [
                self._read(group, (row,), slice(row, row + 1), slice(at, at + 1), nodes, lengths, own)
                for at, row in enumerate(group.rows, group.first)
            ]
        return [self._read(group, group.rows, group.where, everyone, nodes, lengths, own)]

    def _read(
        self,
        group: SlabRows,
        rows: Sequence[int],
        where: slice | torch.Tensor,
        within: slice,
        nodes: Nodes,
        lengths: Lengths,
        own: int,
    ) -> _Read:
        """Rows under one mask; a prefix is split off where there is one row, so that it is this row's own."""
        most, least = {lengths.most[row] for row in rows}, {lengths.least[row] for row in rows}
        visible = min(max(most) + own, group.slab.capacity)
        prefix = prefix_of(min(least)) if self.round_attention == "split" and len(rows) == 1 else 0
        known = len(most) == 1 and most == least  # all rows have committed this many slots
        if known and nodes.sees is None:  # a lone node sees every visible slot
            return _Read(group, within, visible, VisibleNodes(where))
        sees = self._sees(nodes, own)[where]
        if known:
            mask = tail_mask(sees, visible, self._groups, self.dtype, prefix)
        else:
            mask = ragged_mask(lengths.slots[where], sees, visible, self._groups, self.dtype, prefix)
        return _Read(group, within, visible, VisibleNodes(where, mask, prefix))

    def _sees(self, nodes: Nodes, own: int) -> torch.Tensor:
        if nodes.sees is not None:
            return nodes.sees
        return torch.ones(*nodes.tokens.shape, own, dtype=torch.bool, device=nodes.tokens.device)


def _cuda_attention(device: torch.device, dtype: torch.dtype, width: int) -> RoundAttention:
    if not has_flash(device, dtype, width):
        return "split"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "split"
    return "varlen" if "seqused_k" in inspect.signature(varlen_attn).parameters else "split"


class VideoLM(TextModel):
    """A stock `transformers` model seen through what decoding needs of it."""

    def __init__(self, model: Any, family: Family) -> None:
        """`model` was loaded with the attention of this library for its text part."""
        super().__init__(model, family.text_model(model), family.position_rows, model.dtype)
        self.model, self.family = model, family
        self._embed = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        self.vocabulary = int(self._head.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where logits come out; rounds are kept there."""
        device: torch.device = self._head.weight.device
        return device

    @property
    def embedding_device(self) -> torch.device:
        """Where hidden states start."""
        device: torch.device = self._embed.weight.device
        return device

    @property
    def embedded_tokens(self) -> int:
        """Token ids that the model has an embedding for: 0 to this, exclusive."""
        return int(self._embed.weight.shape[0])

    @property
    def text(self) -> Any:
        """The decoder."""
        return self._text

    def see(self, videos: Sequence[ModelInputs]) -> list[VideoFeatures]:
        """Run the vision tower over videos; what it makes of them is where hidden states start."""
        embeds = self._embed.weight
        return [one.to(embeds.device, embeds.dtype) for one in self.family.see(self.model, videos)]

    def embed_prompt(self, inputs: ModelInputs, features: VideoFeatures) -> torch.Tensor:
        """Token embeddings with those of the video's V tokens in their places, [1, S, hidden]."""
        device = self.embedding_device
        embeds = self._embed(inputs.token_ids.to(device))
        return embeds.index_copy(1, inputs.video_at.to(device), features.embeds[None])  # type: ignore[no-any-return]

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text tokens [B, n] -> [B, n, hidden]."""
        return self._embed(tokens.to(self.embedding_device))  # type: ignore[no-any-return]

    def positions(self, inputs: ModelInputs) -> torch.Tensor:
        """Positions of the prompt, [P, S], on the CPU."""
        return self.family.positions(self.model, inputs)

    def forward_nodes(self, nodes: Nodes, cache: KVCache, lengths: Lengths, own: int) -> torch.Tensor:
        """`run_nodes` with the embeddings of the nodes' tokens."""
        return self.run_nodes(self.embed_tokens(nodes.tokens), nodes, cache, lengths, own)

    def step(self, token: int, position: int, cache: KVCache, length: int) -> torch.Tensor:
        """`run_step` with the embedding of a token."""
        tokens = torch.full((1, 1), token, device=self.embedding_device)
        return self.run_step(self.embed_tokens(tokens), position, cache, length)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, n, hidden] -> logits float32 [B, n, C]."""
        return self._head(hidden).float()  # type: ignore[no-any-return]
