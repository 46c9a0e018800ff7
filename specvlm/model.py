"""One loaded video LLM with its family: embeddings, forward passes over slabs, logits. It does not generate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from specvlm.attention import AttentionPlan, plan_for, round_mask, tail_plan, tree_plan
from specvlm.cache import SlabCache, SlabShape
from specvlm.errors import GenerationError
from specvlm.families.base import Family, ModelInputs


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


class VideoLM:
    """A stock `transformers` model seen through what decoding needs of it."""

    def __init__(self, model: Any, family: Family) -> None:
        """`model` was loaded with the attention of this library for its text part."""
        self.model, self.family = model, family
        self._text = family.text_model(model)
        self._embed = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        config = self._text.config
        self.vocabulary = int(self._head.weight.shape[0])
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        devices = tuple(next(layer.parameters()).device for layer in self._text.layers)
        self._slab_shape = SlabShape(int(config.num_key_value_heads), int(head_dim), model.dtype, devices)
        self._groups = heads // self._slab_shape.kv_heads
        self._window = config.sliding_window if "sliding_attention" in config.layer_types else None

    @property
    def embedding_device(self) -> torch.device:
        """Where hidden states start."""
        device: torch.device = self._embed.weight.device
        return device

    @property
    def device(self) -> torch.device:
        """Where logits come out; rounds are kept there."""
        device: torch.device = self._head.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and slabs."""
        return self._slab_shape.dtype

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
        return SlabCache(self._slab_shape, rows, capacity)

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

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, cache: SlabCache, plan: AttentionPlan
    ) -> torch.Tensor:
        """One pass of the decoder over what the cache was aimed at.

        Args:
            embeds: [B, n, hidden].
            positions: int64 [P, B, n], or [1, B, n] where all rows of a position are the same.
            cache: Aimed at n slots per row.
            plan: What to attend to.

        Returns:
            Hidden states after the last norm, [B, n, hidden], where logits come out.
        """
        rows = self.family.position_rows
        out = self._text(
            inputs_embeds=embeds,
            position_ids=positions.expand(rows, -1, -1) if rows > 1 else positions[0],
            past_key_values=cache,
            attention_mask=plan_for(plan),
            use_cache=True,
        )
        return out.last_hidden_state.to(self.device)  # type: ignore[no-any-return]

    def forward_nodes(
        self,
        nodes: Nodes,
        cache: SlabCache,
        lengths: torch.Tensor,
        reach: Reach,
    ) -> torch.Tensor:
        """One pass over the nodes of a round, behind what each row has committed.

        Args:
            nodes: n of them per row.
            cache: Written at the nodes' slots.
            lengths: int64 [B], committed slots, all of which every node sees.
            reach: How far nodes look.

        Returns:
            Hidden states [B, n, hidden].
        """
        cache.aim_nodes(nodes.slots, reach.visible)
        plan = self._round_plan(nodes, lengths, reach)
        return self.forward(self.embed_tokens(nodes.tokens), nodes.positions, cache, plan)

    def _round_plan(self, nodes: Nodes, lengths: torch.Tensor, reach: Reach) -> AttentionPlan:
        if reach.exact:
            if nodes.sees is None:  # a lone node sees every visible slot
                return AttentionPlan()
            return tail_plan(nodes.sees, reach.visible, self._groups, self.dtype)
        sees = nodes.sees
        if sees is None:
            sees = torch.ones(*nodes.tokens.shape, reach.own, dtype=torch.bool, device=lengths.device)
        return tree_plan(round_mask(lengths, sees, reach.visible), self._groups, self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, n, hidden] -> logits float32 [B, n, C]."""
        return self._head(hidden).float()  # type: ignore[no-any-return]
