"""A smaller model of the target's family as draft, which sees all text and only the kept video tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from specvlm.cache import KVCache
from specvlm.config import SpeculationSettings
from specvlm.drafts.base import Draft, DraftRead, DraftRow, Proposer
from specvlm.drafts.vocabulary import DraftVocabulary
from specvlm.model import Lengths, Nodes, VideoLM
from specvlm.prefill import PrefillRow, ToSee, embed, prefill_draft, prune_prompt
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
        self.model = self.text = model
        self.guessable = DraftVocabulary(model.model.get_output_embeddings(), shared, ids)
        self.vocabulary = self.guessable.size

    def method(self, settings: SpeculationSettings) -> str:
        """The pruner and the tree."""
        return f"specvlm/{settings.pruner}/{settings.tree}"

    def proposer(self, settings: SpeculationSettings, rule: TokenRule, cache: KVCache) -> Proposer:
        """See `Draft`."""
        return _SmallModelProposer(self, settings, rule)

    @property
    def slot_bytes(self) -> int:
        """See `Draft`."""
        return self.model.slot_bytes


class _SmallModelProposer(Proposer):
    """A batch. The cache holds all committed tokens but perhaps the last one before the root.

    A leaf of the tree is never run, so when a leaf is accepted its keys and values are missing; each round therefore
    begins with two tokens, the last committed one and the root. Where it was there already, it is written again.
    """

    def __init__(self, draft: SmallModelDraft, settings: SpeculationSettings, rule: TokenRule) -> None:
        self._model, self._vocabulary = draft.model, draft.guessable
        self._settings, self._rule = settings, rule
        device = draft.model.device
        self.cache = draft.model.new_cache()
        self._prompts: list[int] = []  # tokens of each row's pruned prompt
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        self._prompt_lengths, self._next_position, self._previous = nothing, nothing, nothing
        # Of the two tokens that begin a round, the committed one does not see the root.
        self._root_sees = torch.tensor([[[True, False], [True, True]]], device=device)

    @property
    def rows(self) -> int:
        """See `Proposer`."""
        return len(self._prompts)

    def add(self, rows: Sequence[DraftRow], most_rows: int = 0) -> list[DraftRead]:
        """Prune and prefill."""
        keeps = [prune(row.scores, self._settings) for row in rows]
        compact = self._settings.positions == "compact"
        seen = embed(self._model, [ToSee(row.prompt.inputs, row.features) for row in rows])
        prompts = [prune_prompt(*one, compact=compact) for one in zip(seen, keeps, strict=True)]
        first = self.rows
        self.cache.add(
            [prompt.length + row.slots for prompt, row in zip(prompts, rows, strict=True)], most_rows
        )
        self._prompts += [prompt.length for prompt in prompts]
        self._next_position = self._with(self._next_position, [prompt.next_position for prompt in prompts])
        last = [int(prompt.inputs.token_ids[0, -1]) for prompt in prompts]
        self._previous = self._with(self._previous, last)
        self._prompt_lengths = self._with(self._prompt_lengths, [prompt.length for prompt in prompts])
        prefill_draft(
            self._model, self.cache, [PrefillRow(prompt, row) for row, prompt in enumerate(prompts, first)]
        )
        return [DraftRead(int(keep.sum())) for keep in keeps]

    def _with(self, values: torch.Tensor, more: Sequence[int]) -> torch.Tensor:
        return torch.cat((values, torch.tensor(more, dtype=torch.long, device=values.device)))

    def keep(self, rows: Sequence[int]) -> None:
        """See `Proposer`."""
        self.cache.keep(rows)
        self._prompts = [self._prompts[row] for row in rows]
        at = torch.tensor(rows, dtype=torch.long, device=self._previous.device)
        self._prompt_lengths = self._prompt_lengths[at]
        self._next_position, self._previous = self._next_position[at], self._previous[at]

    def follow(self, draft: Draft, rule: TokenRule) -> None:
        """See `Proposer`."""
        assert isinstance(draft, SmallModelDraft)
        self._vocabulary, self._rule = draft.guessable, rule

    def _lengths(self, index: Lengths) -> Lengths:
        """Committed slots of rows whose root has this index."""
        prompts = tuple(self._prompts)
        return Lengths(self._prompt_lengths, prompts, prompts).plus(index)

    def host_state(self, index: Lengths) -> Hashable:
        """See `Proposer`."""
        lengths = self._lengths(index)
        host = [self._model.host_state(one, self.cache) for one in (lengths, lengths.plus(-1))]
        return tuple(host), self._vocabulary

    def propose(self, shape: TreeShape, root: torch.Tensor, index: Lengths) -> Guesses:
        """One tree, grown level by level."""
        lengths = self._lengths(index)

        def expand(frontier: Frontier) -> torch.Tensor:
            if frontier.depth == 0:
                hidden = self._run_root(root, index.slots, lengths)
            else:
                hidden = self._run_level(frontier, index.slots, lengths)
            depths = torch.full_like(frontier.tokens, frontier.depth)
            logits = self._vocabulary.logits(hidden)
            return self._rule.scores(logits, depths, frontier.path, self._vocabulary.ids)

        return shape.grow(root, expand, self._vocabulary.ids)

    def _run_root(self, root: torch.Tensor, index: torch.Tensor, lengths: Lengths) -> torch.Tensor:
        """Run the last committed token and the root; -> the root's hidden state, [B, 1, hidden]."""
        at, slots = self._next_position + index, lengths.slots
        nodes = Nodes(
            torch.stack((self._previous, root), dim=1),
            torch.stack((at - 1, at), dim=1)[None],  # [1, B, 2]
            torch.stack((slots - 1, slots), dim=1),
            self._root_sees.expand(len(root), -1, -1),
        )
        # Both are the round's own, so that either sees a slot of the round: parts that are merged may not be empty.
        return self._forward(nodes, lengths.plus(-1), 2)[:, 1:]

    def _run_level(self, frontier: Frontier, index: torch.Tensor, lengths: Lengths) -> torch.Tensor:
        """Run k nodes of one depth; -> hidden states [B, k, hidden]."""
        count = frontier.tokens.shape[1]
        end = frontier.first_slot + count
        slots = lengths.slots[:, None]
        nodes = Nodes(
            frontier.tokens,
            (self._next_position + index + frontier.depth)[None, :, None].expand(1, -1, count),
            slots + torch.arange(frontier.first_slot, end, device=slots.device),
            None if frontier.sees is None else frontier.sees[..., :end],
        )
        return self._forward(nodes, lengths, end)

    def _forward(self, nodes: Nodes, lengths: Lengths, own: int) -> torch.Tensor:
        # The target may write a token of its padding that the draft has no row for; any row serves a guess.
        known = nodes._replace(tokens=nodes.tokens.clamp(max=self._model.vocabulary - 1))
        return self._model.forward_nodes(known, self.cache, lengths, own)

    def commit(self, shape: TreeShape, guesses: Guesses, accepted: Accepted, index: Lengths) -> None:
        """Move the accepted path's keys and values to the end of the committed ones."""
        first = (self._prompt_lengths + index.slots)[:, None]
        destination = first + torch.arange(shape.depth + 1, device=first.device)
        self.cache.commit(first + guesses.slots.gather(1, accepted.path), destination)
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
        """Run `count` tokens of each caption; a row with fewer runs its last one again, and leaves no trace of it."""
        device = self._prompt_lengths.device
        tokens = [
            [caption[min(start + i, len(caption) - 1)] for i in range(count)]
            for caption, start in zip(captions, starts, strict=True)
        ]
        index = Lengths(torch.tensor(starts, device=device), tuple(starts), tuple(starts))
        at = index.slots[:, None] + torch.arange(count, device=device)
        causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        nodes = Nodes(
            torch.tensor(tokens, device=device),
            (self._next_position[:, None] + at)[None],
            self._prompt_lengths[:, None] + at,
            causal.expand(len(captions), -1, -1),
        )
        self._forward(nodes, self._lengths(index), count)
