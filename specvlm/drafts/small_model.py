"""A smaller model of the target's family as draft, which sees all text and only the kept video tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specvlm.config import SpeculationSettings
from specvlm.drafts.base import Draft, DraftRow, Proposer
from specvlm.model import VideoLM
from specvlm.prefill import Prompt, embed, prefill_draft, prune_prompt
from specvlm.pruning import prune
from specvlm.sampling import TokenRule
from specvlm.tree import Frontier, Guesses, make_shape
from specvlm.verify import Accepted


class SmallModelDraft(Draft):
    """Drafting of SpecVLM, arXiv 2508.16201, section 3."""

    def __init__(self, model: VideoLM, vocabulary: int) -> None:
        """`vocabulary`: shared with the target; padded rows beyond it are never guessed."""
        self.model = model
        self._vocabulary = vocabulary

    def begin(
        self,
        rows: Sequence[DraftRow],
        settings: SpeculationSettings,
        rule: TokenRule,
        max_new_tokens: int,
    ) -> Proposer:
        """Prune and prefill each row."""
        prompts, kept = [], []
        for row in rows:
            keep = prune(row.scores, settings)
            kept.append(int(keep.sum()))
            prompts.append(
                prune_prompt(embed(self.model, row.inputs), keep, compact=settings.positions == "compact")
            )
        proposer = _SmallModelProposer(self.model, self._vocabulary, prompts, settings, rule, max_new_tokens)
        proposer.kept = tuple(kept)
        return proposer


class _SmallModelProposer(Proposer):
    """One job. The cache holds all committed tokens but perhaps the last one before the root.

    A leaf of the tree is never run, so when a leaf is accepted its keys and values are missing; each round therefore
    begins with two tokens, the last committed one and the root. Where it was there already, it is written anew.
    """

    def __init__(
        self,
        model: VideoLM,
        vocabulary: int,
        prompts: Sequence[Prompt],
        settings: SpeculationSettings,
        rule: TokenRule,
        max_new_tokens: int,
    ) -> None:
        self._model, self._vocabulary, self._rule = model, vocabulary, rule
        device = model.device
        self._shape = make_shape(settings, vocabulary, device)
        self.nodes, self.depth = self._shape.nodes, self._shape.depth
        self._longest_prompt = max(prompt.length for prompt in prompts)
        capacity = self._longest_prompt + max_new_tokens + self._shape.slots
        self._cache = model.new_cache(len(prompts), capacity)
        for row, prompt in enumerate(prompts):
            prefill_draft(model, prompt, self._cache, row)
        self._prompt_lengths = torch.tensor([prompt.length for prompt in prompts], device=device)
        self._next_position = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        # Of the two tokens that begin a round, the committed one does not see the root.
        self._root_sees = torch.tensor([[[False], [True]]], device=device).expand(len(prompts), 2, 1)
        self._previous = torch.stack([prompt.inputs.token_ids[0, -1] for prompt in prompts]).to(device)

    def propose(self, root: torch.Tensor, index: torch.Tensor, longest: int) -> Guesses:
        """One tree, grown level by level."""
        lengths = self._prompt_lengths + index

        def expand(frontier: Frontier) -> torch.Tensor:
            if frontier.depth == 0:
                logits = self._run_root(root, index, lengths, longest)
            else:
                logits = self._run_level(frontier, index, lengths, longest)
            depths = torch.full_like(frontier.tokens, frontier.depth)
            return self._rule.scores(logits, depths, frontier.path)

        return self._shape.grow(root, expand)

    def _run_root(
        self, root: torch.Tensor, index: torch.Tensor, lengths: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Run the last committed token and the root; -> logits of the root, [B, 1, shared vocabulary]."""
        tokens = torch.stack((self._previous, root), dim=1)
        at = self._next_position + index
        positions = torch.stack((at - 1, at), dim=1)[None]  # [1, B, 2]
        slots = torch.stack((lengths - 1, lengths), dim=1)
        hidden = self._forward(tokens, positions, slots, self._root_sees, lengths, longest)
        return self._logits(hidden[:, 1:])

    def _run_level(
        self, frontier: Frontier, index: torch.Tensor, lengths: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Run k nodes of one depth; -> logits [B, k, shared vocabulary]."""
        count = frontier.tokens.shape[1]
        positions = (self._next_position + index + frontier.depth)[None, :, None].expand(1, -1, count)
        end = frontier.first_slot + count
        slots = lengths[:, None] + torch.arange(frontier.first_slot, end, device=lengths.device)
        hidden = self._forward(frontier.tokens, positions, slots, frontier.sees[..., :end], lengths, longest)
        return self._logits(hidden)

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        sees: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        visible = self._longest_prompt + longest + sees.shape[-1]
        # The target may write a token of its padding that the draft has no row for; any row serves a guess.
        tokens = tokens.clamp(max=self._model.vocabulary - 1)
        return self._model.forward_nodes(tokens, positions, self._cache, slots, sees, lengths, visible)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)[..., : self._vocabulary]

    def commit(self, guesses: Guesses, accepted: Accepted, index: torch.Tensor) -> None:
        """Move the accepted path's keys and values behind the committed ones."""
        first = (self._prompt_lengths + index)[:, None]
        destination = first + torch.arange(self.depth + 1, device=first.device)
        self._cache.commit(first + guesses.slots.gather(1, accepted.path), destination)
        written = torch.cat((guesses.tokens[:, :1], accepted.tokens), dim=1)
        self._previous = written.gather(1, accepted.guessed[:, None]).squeeze(1)
