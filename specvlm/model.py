"""One loaded video LLM with its family: embeddings, forward passes over slabs, logits. It does not generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from specvlm.attention import (
    AttentionPlan,
    RoundAttention,
    node_table,
    plan_for,
    prefix_of,
    round_plan,
    tail_plan,
)
from specvlm.cache import SlabCache, SlabShape
from specvlm.errors import GenerationError
from specvlm.families.base import Family, ModelInputs
from specvlm.graphs import Graphs, can_capture


class Nodes(NamedTuple):
    """Nodes of one round, to run in one pass."""

    tokens: torch.Tensor  # int64 [B, n]
    positions: torch.Tensor  # int64 [P, B, n] or [1, B, n]
    slots: torch.Tensor  # int64 [B, n], from the committed ones on
    # bool [B, n, m], which of the round's first m slots a node sees, its own included; None: n is 1, and it sees all
    sees: torch.Tensor | None


class Reach(NamedTuple):
    """How far nodes look, as numbers of slots known on the host."""

    visible: int  # slots of a row that the pass may look at: at least those committed and those of the round so far
    own: int  # m, of the round so far
    exact: bool  # one row, whose committed slots are the first visible - own
    certain: int = 0  # that many first slots are committed in every row


class Extent(NamedTuple):
    """How long the prompts of a job's rows are, as far as rounds must know it on the host."""

    certain: int  # every row has committed this many slots before the last token of its prompt, or more
    longest: int  # slots of the longest prompt, or more
    exact: bool  # both are the very numbers

    @classmethod
    def of(cls, lengths: Sequence[int], cache: SlabCache) -> Extent:
        """What rounds must know of prompts of these lengths."""
        grain = cache.grain
        certain, longest = (min(lengths) - 1) // grain * grain, -(-max(lengths) // grain) * grain
        return cls(certain, longest, grain == 1)

    def reach(self, index: int, own: int, *, exact: bool) -> Reach:
        """How far nodes look.

        Args:
            index: In the caption, of the last token, the largest of all rows, or more.
            own: Slots of the round so far.
            exact: There is one row, and `index` is the index of its last token.
        """
        return Reach(self.longest + index + own, own, exact and self.exact, self.certain)


class TextModel:
    """A stock decoder over slabs: embeddings in, hidden states out.

    Attributes:
        dtype: Of weights and slabs.
        round_attention: How rounds attend: `masked`, one kernel under one mask; `split`, the long prefix without a
            mask and the rest under one; `flex`, FlexAttention. `split` on CUDA and `masked` elsewhere: chosen by
            reasoning (the kernel that reads a long prefix at full bandwidth takes no mask), not by measurement.
        graphs: What makes this model's rounds CUDA graphs, None: they run eagerly. Set to None to turn them off;
            rounds follow the target's, a draft's own only keeps its slabs in place.
        keeps_features: New caches keep of each token, beside its keys and values, what comes out behind the last norm.
    """

    def __init__(self, module: Any, text: Any, position_rows: int, dtype: torch.dtype) -> None:
        """Look at the decoder `text`, a part of `module`, loaded with the attention of this library."""
        self._module, self._text, self._position_rows = module, text, position_rows
        config = text.config
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        devices = tuple(next(layer.parameters()).device for layer in text.layers)
        self.dtype = dtype
        self._slab_shape = SlabShape(int(config.num_key_value_heads), int(head_dim), dtype, devices)
        self._groups = heads // self._slab_shape.kv_heads
        self._window = config.sliding_window if "sliding_attention" in config.layer_types else None
        on_cuda = all(device.type == "cuda" for device in devices)
        self.round_attention: RoundAttention = "split" if on_cuda else "masked"
        self.graphs: Graphs | None = Graphs() if can_capture(module, devices) else None
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

    def keep_features(self) -> None:
        """From now on, new caches keep features; see `keeps_features`."""
        if self.keeps_features:
            return
        self.keeps_features = True
        self._slab_shape = self._slab_shape._replace(
            feature_width=self.hidden_size, feature_device=self.device
        )
        self.graphs = None if self.graphs is None else Graphs()  # whose slabs have no room for them

    def new_cache(self, rows: int, capacity: int) -> SlabCache:
        """Slabs for `rows` videos of at most `capacity` tokens, prompt and caption and one round together.

        Raises:
            GenerationError: Some layers see a sliding window that is shorter than this.
        """
        if self._window is not None and capacity > self._window:
            raise GenerationError(
                f"{capacity} tokens exceed the sliding window of {self._window} that this checkpoint uses; "
                "give fewer frames or a smaller --max-new-tokens"
            )
        if self.graphs is None:
            return SlabCache(self._slab_shape, rows, capacity)
        return self.graphs.new_cache(self._slab_shape, rows, capacity)

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, cache: SlabCache, plan: AttentionPlan
    ) -> torch.Tensor:
        """One pass of the decoder over what the cache was aimed at.

        Args:
            embeds: [B, n, hidden].
            positions: int64 [P, B, n], or [1, B, n] where all rows of a position are the same.
            cache: Aimed at n slots per row; it also keeps the features, where it was made for them.
            plan: What to attend to.

        Returns:
            Hidden states after the last norm, [B, n, hidden], on `device`.
        """
        rows = self._position_rows
        out = self._text(
            inputs_embeds=embeds,
            position_ids=positions.expand(rows, -1, -1) if rows > 1 else positions[0],
            past_key_values=cache,
            attention_mask=plan_for(plan),
            use_cache=True,
        )
        hidden: torch.Tensor = out.last_hidden_state.to(self.device)
        if self.keeps_features:
            cache.keep_features(hidden)
        return hidden

    def run_nodes(
        self, embeds: torch.Tensor, nodes: Nodes, cache: SlabCache, lengths: torch.Tensor, reach: Reach
    ) -> torch.Tensor:
        """One pass over the nodes of a round, behind what each row has committed.

        Args:
            embeds: Of the nodes, [B, n, hidden].
            nodes: n of them per row.
            cache: Written at the nodes' slots.
            lengths: int64 [B], committed slots, all of which every node sees.
            reach: How far nodes look.

        Returns:
            Hidden states [B, n, hidden].
        """
        visible = min(reach.visible, cache.capacity)
        cache.aim_nodes(nodes.slots, visible)
        plan = self._round_plan(nodes, lengths, reach._replace(visible=visible))
        return self.forward(embeds, nodes.positions, cache, plan)

    def _round_plan(self, nodes: Nodes, lengths: torch.Tensor, reach: Reach) -> AttentionPlan:
        sees = nodes.sees
        if sees is None:
            if reach.exact:  # a lone node sees every visible slot
                return AttentionPlan()
            sees = torch.ones(*nodes.tokens.shape, reach.own, dtype=torch.bool, device=lengths.device)
        if self.round_attention == "flex":
            return AttentionPlan(table=node_table(lengths, sees, self._groups, torch.float32))
        prefix = prefix_of(reach.certain) if self.round_attention == "split" else 0
        if reach.exact:
            return tail_plan(sees, reach.visible, self._groups, self.dtype, prefix)
        return round_plan(node_table(lengths, sees, self._groups, self.dtype), reach.visible, prefix)


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
    def text(self) -> Any:
        """The decoder."""
        return self._text

    def see(self, inputs: ModelInputs) -> torch.Tensor:
        """Run the vision tower: features of the video tokens, [V, hidden], where hidden states start."""
        embeds = self._embed.weight
        return self.family.embed_video(self.model, inputs).to(embeds.device, embeds.dtype)

    def embed_prompt(self, inputs: ModelInputs, features: torch.Tensor) -> torch.Tensor:
        """Token embeddings with the video's features [V, hidden] in their places, [1, S, hidden]."""
        device = self.embedding_device
        embeds = self._embed(inputs.token_ids.to(device))
        where = inputs.is_video.to(device).nonzero().squeeze(1)
        return embeds.index_copy(1, where, features[None])  # type: ignore[no-any-return]

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text tokens [B, n] -> [B, n, hidden]."""
        return self._embed(tokens.to(self.embedding_device))  # type: ignore[no-any-return]

    def positions(self, inputs: ModelInputs) -> torch.Tensor:
        """Positions of the prompt, [P, S], on the CPU."""
        return self.family.positions(self.model, inputs)

    def forward_nodes(
        self, nodes: Nodes, cache: SlabCache, lengths: torch.Tensor, reach: Reach
    ) -> torch.Tensor:
        """`run_nodes` with the embeddings of the nodes' tokens."""
        return self.run_nodes(self.embed_tokens(nodes.tokens), nodes, cache, lengths, reach)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, n, hidden] -> logits float32 [B, n, C]."""
        return self._head(hidden).float()  # type: ignore[no-any-return]
