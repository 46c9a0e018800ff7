"""A smaller model of the target's family as draft, which sees all text and only the kept video tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from specvlm.config import SpeculationSettings
from specvlm.drafts.base import Draft, DraftJob, Horizon, Proposer
from specvlm.drafts.vocabulary import DraftVocabulary
from specvlm.model import Extent, Nodes, Reach, VideoLM
from specvlm.prefill import Prompt, embed, prefill_draft, prune_prompt
from specvlm.pruning import prune
from specvlm.sampling import TokenRule
from specvlm.tree import Frontier, Guesses, TreeShape
from specvlm.verify import Accepted

CATCH_UP = 64  # tokens of a pass over what the target wrote alone, so that its mask stays small


class SmallModelDraft(Draft):
    """Drafting of SpecVLM, arXiv 2508.16201, section 3.

    Attributes:
        guessable: The tokens that it may guess, and its logits of them.
    """

    def __init__(self, model: VideoLM, shared: int, ids: Sequence[int] | None = None) -> None:
        """Take a model, and what it may guess.

        Args:
            model: The draft.
            shared: Tokens that it has in common with the target; padded rows beyond them are never guessed.
            ids: Those of them that it may guess; None: all.
        """
        self.model = model
        self.guessable = DraftVocabulary(model.model.get_output_embeddings(), shared, ids)
        self.vocabulary = self.guessable.size

    def method(self, settings: SpeculationSettings) -> str:
        """The pruner and the tree."""
        return f"specvlm/{settings.pruner}/{settings.tree}"

    def begin(self, job: DraftJob, first: Sequence[int]) -> Proposer:
        """Prune and prefill each row."""
        prompts, kept = [], []
        for row in job.rows:
            keep = prune(row.scores, job.settings)
            kept.append(int(keep.sum()))
            prompt = embed(self.model, row.prompt.inputs, row.features)
            prompts.append(prune_prompt(prompt, keep, compact=job.settings.positions == "compact"))
        proposer = _SmallModelProposer(self.model, self.guessable, prompts, job.rule, job.slots)
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
        vocabulary: DraftVocabulary,
        prompts: Sequence[Prompt],
        rule: TokenRule,
        slots: int,
    ) -> None:
        self._model, self._vocabulary, self._rule = model, vocabulary, rule
        device = model.device
        lengths = [prompt.length for prompt in prompts]
        self._cache = model.new_cache(len(prompts), max(lengths) + slots)
        self._extent = Extent.of(lengths, self._cache)
        for row, prompt in enumerate(prompts):
            prefill_draft(model, prompt, self._cache, row)
        self._prompt_lengths = torch.tensor(lengths, device=device)
        self._next_position = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        # Of the two tokens that begin a round, the committed one does not see the root.
        self._root_sees = torch.tensor([[[False], [True]]], device=device).expand(len(prompts), 2, 1)
        self._previous = torch.stack([prompt.inputs.token_ids[0, -1] for prompt in prompts]).to(device)

    @property
    def host_state(self) -> Hashable:
        """See `Proposer`."""
        name = self._cache.slabs.name  # slabs are one model's alone
        return self._model.round_attention, name, self._extent, self._vocabulary

    def propose(self, shape: TreeShape, root: torch.Tensor, index: torch.Tensor, horizon: Horizon) -> Guesses:
        """One tree, grown level by level."""
        lengths = self._prompt_lengths + index

        def expand(frontier: Frontier) -> torch.Tensor:
            if frontier.depth == 0:
                hidden = self._run_root(root, index, lengths, horizon)
            else:
                hidden = self._run_level(frontier, index, lengths, horizon)
            depths = torch.full_like(frontier.tokens, frontier.depth)
            logits = self._vocabulary.logits(hidden)
            return self._rule.scores(logits, depths, frontier.path, self._vocabulary.ids)

        return shape.grow(root, expand, self._vocabulary.ids)

    def _run_root(
        self, root: torch.Tensor, index: torch.Tensor, lengths: torch.Tensor, horizon: Horizon
    ) -> torch.Tensor:
        """Run the last committed token and the root; -> the root's hidden state, [B, 1, hidden]."""
        at = self._next_position + index
        nodes = Nodes(
            torch.stack((self._previous, root), dim=1),
            torch.stack((at - 1, at), dim=1)[None],  # [1, B, 2]
            torch.stack((lengths - 1, lengths), dim=1),
            self._root_sees,
        )
        return self._forward(nodes, lengths, self._reach(horizon, 1))[:, 1:]

    def _run_level(
        self, frontier: Frontier, index: torch.Tensor, lengths: torch.Tensor, horizon: Horizon
    ) -> torch.Tensor:
        """Run k nodes of one depth; -> hidden states [B, k, hidden]."""
        count = frontier.tokens.shape[1]
        end = frontier.first_slot + count
        nodes = Nodes(
            frontier.tokens,
            (self._next_position + index + frontier.depth)[None, :, None].expand(1, -1, count),
            lengths[:, None] + torch.arange(frontier.first_slot, end, device=lengths.device),
            None if frontier.sees is None else frontier.sees[..., :end],
        )
        return self._forward(nodes, lengths, self._reach(horizon, end))

    def _reach(self, horizon: Horizon, own: int) -> Reach:
        return self._extent.reach(horizon.longest, own, exact=horizon.exact)

    def _forward(self, nodes: Nodes, lengths: torch.Tensor, reach: Reach) -> torch.Tensor:
        # The target may write a token of its padding that the draft has no row for; any row serves a guess.
        known = nodes._replace(tokens=nodes.tokens.clamp(max=self._model.vocabulary - 1))
        return self._model.forward_nodes(known, self._cache, lengths, reach)

    def commit(
        self, shape: TreeShape, guesses: Guesses, accepted: Accepted, index: torch.Tensor, horizon: Horizon
    ) -> None:
        """Move the accepted path's keys and values behind the committed ones."""
        first = (self._prompt_lengths + index)[:, None]
        destination = first + torch.arange(shape.depth + 1, device=first.device)
        self._cache.commit(first + guesses.slots.gather(1, accepted.path), destination)
        written = torch.cat((guesses.tokens[:, :1], accepted.tokens), dim=1)
        self._previous.copy_(written.gather(1, accepted.guessed[:, None]).squeeze(1))

    def catch_up(self, captions: Sequence[Sequence[int]], known: Sequence[int]) -> None:
        """Run what was missed but the last token before the root, which the next round begins with."""
        last = [len(caption) - 2 for caption in captions]  # index of that token; -1 is the prompt's last
        missed = max(end - max(heard - 2, 0) for end, heard in zip(last, known, strict=True))
        for done in range(0, missed, CATCH_UP):
            starts = [max(end - missed + done, 0) for end in last]
            self._run_missed(captions, starts, min(CATCH_UP, missed - done))
        previous = [
            caption[end] if end >= 0 else int(self._previous[row])
            for row, (caption, end) in enumerate(zip(captions, last, strict=True))
        ]
        self._previous.copy_(torch.tensor(previous, device=self._previous.device))

    def _run_missed(self, captions: Sequence[Sequence[int]], starts: Sequence[int], count: int) -> None:
        """Run `count` tokens of each caption; a row with fewer, which is done, runs some over again."""
        device = self._prompt_lengths.device
        tokens = [
            [caption[min(start + i, len(caption) - 1)] for i in range(count)]
            for caption, start in zip(captions, starts, strict=True)
        ]
        index = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        lengths = self._prompt_lengths + index[:, 0]
        causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        nodes = Nodes(
            torch.tensor(tokens, device=device),
            (self._next_position[:, None] + index)[None],
            self._prompt_lengths[:, None] + index,
            causal.expand(len(captions), -1, -1),
        )
        self._forward(nodes, lengths, self._reach(Horizon(max(starts), exact=len(captions) == 1), count))
