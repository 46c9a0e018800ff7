"""A trained head as draft: it reads the target's own features, and its own where the target has not been yet.

EAGLE-2 (arXiv 2406.16858) with the changes of SpecVLM (arXiv 2509.11815, section 3.1). The pair at position i is the
feature of token i and the embedding of token i + 1, and has the position of token i, M-RoPE's rows included. What the
target has accepted is read again with the target's features, in the round's commit; so a round of depth D takes D
passes of the head, one of them over the accepted path.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from specvlm.attention import AttentionPlan, Segment
from specvlm.cache import KVCache, PrefillPart
from specvlm.config import SpeculationSettings
from specvlm.drafts.base import Draft, DraftRead, DraftRow, Proposer
from specvlm.drafts.head_model import HeadModel, PairSequence, Shown
from specvlm.drafts.vocabulary import DraftVocabulary
from specvlm.model import Lengths, Nodes, VideoLM
from specvlm.prefill import packs
from specvlm.sampling import TokenRule
from specvlm.tree import Frontier, Guesses, TreeShape
from specvlm.verify import Accepted

CATCH_UP = 64  # tokens of a pass over what the target wrote alone
# The dynamic tree of EAGLE-2 and of the paper: 60 nodes, ten of them expanded at each of 7 levels.
DEPTH, NODES, WIDTH = 7, 60, 10


class HeadDraft(Draft):
    """A head and the target that it was made for."""

    def __init__(self, head: HeadModel, target: VideoLM, ids: Sequence[int] | None = None) -> None:
        """From now on the target keeps the features, which the head reads. `ids`: what it may guess; None: all."""
        self.head, self.target = head, target
        self.guessable = DraftVocabulary(target.model.get_output_embeddings(), target.vocabulary, ids)
        self.vocabulary = self.guessable.size
        self.text = head.text_model(target.family.position_rows)
        target.keep_features()

    def settings(self, settings: SpeculationSettings) -> SpeculationSettings:
        """A dynamic tree is the paper's where nothing is said."""
        if settings.tree != "dynamic":
            return settings
        return replace(
            settings,
            depth=settings.depth or DEPTH,
            nodes=settings.nodes or NODES,
            width=settings.width or WIDTH,
        )

    def method(self, settings: SpeculationSettings) -> str:
        """The compressor and the tree."""
        return f"specvlm-head/{self.head.config.compressor.name}/{settings.tree}"

    def proposer(self, settings: SpeculationSettings, rule: TokenRule, cache: KVCache) -> Proposer:
        """See `Draft`."""
        return _HeadProposer(self, settings, rule, cache)

    @property
    def slot_bytes(self) -> int:
        """See `Draft`."""
        return self.text.slot_bytes


class _HeadProposer(Proposer):
    """A batch. The cache holds the pairs of all committed tokens, the root's included."""

    def __init__(
        self, draft: HeadDraft, settings: SpeculationSettings, rule: TokenRule, cache: KVCache
    ) -> None:
        self._head, self._text, self._target = draft.head, draft.text, draft.target
        self._vocabulary, self._settings = draft.guessable, settings
        self._rule, self._kept = rule, cache
        device = draft.head.device
        self.cache = self._text.new_cache()
        self._pairs_before: list[int] = []  # pairs of each row before its first root's
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        self._before, self._prompt_lengths, self._position = nothing, nothing, nothing
        self._root = torch.zeros(0, 1, draft.target.hidden_size, dtype=draft.head.dtype, device=device)

    @property
    def rows(self) -> int:
        """See `Proposer`."""
        return len(self._pairs_before)

    def add(self, rows: Sequence[DraftRow], most_rows: int = 0) -> list[DraftRead]:
        """Compress and prefill."""
        read = [self._read(row) for row in rows]
        before = [one.pairs.shape[1] - 1 for one in read]
        first = self.rows
        self.cache.add([count + 1 + row.slots for count, row in zip(before, rows, strict=True)], most_rows)
        self._pairs_before += before
        self._before = self._with(self._before, before)
        self._prompt_lengths = self._with(self._prompt_lengths, [row.prompt.length for row in rows])
        # Of the root of index 0, which has the position of the prompt's last token.
        self._position = self._with(self._position, [row.prompt.next_position - 1 for row in rows])
        self._root = torch.cat((self._root, self._prefill(first, read)))
        return [DraftRead(one.video.inputs.shape[1], one.video.operator) for one in read]

    def _with(self, values: torch.Tensor, more: Sequence[int]) -> torch.Tensor:
        return torch.cat((values, torch.tensor(more, dtype=torch.long, device=values.device)))

    def _read(self, row: DraftRow) -> PairSequence:
        """The pairs of one prompt, and last that of the first token of its caption."""
        device = self._head.device
        root = self._target.embed_tokens(torch.tensor([[row.first]]))
        shown = Shown(
            self._kept.row_features(row.row, row.prompt.length),
            torch.cat((row.prompt.embeds[:, 1:], root), dim=1).to(device),
            row.prompt.positions.to(device),
            row.prompt.video_at,
            row.prompt.length,
            row.scores.to(device),
        )
        return self._head.sequence(shown, torch.Generator().manual_seed(self._settings.seed))

    def _prefill(self, first: int, read: Sequence[PairSequence]) -> torch.Tensor:
        """Read sequences of pairs into the rows from `first` on; -> what the last pair of each gave, [n, 1, hidden]."""
        found: dict[int, torch.Tensor] = {}
        for pack in packs([one.pairs.shape[1] for one in read], self._text.packed_tokens):
            segments, done = list[Segment](), 0
            for index in pack:
                segments.append(Segment(done, read[index].pairs.shape[1]))
                done += segments[-1].count
            parts = [
                PrefillPart(first + index, 0, one.count) for index, one in zip(pack, segments, strict=True)
            ]
            self.cache.aim_prefill(parts, self._head.device)
            hidden = self._text.forward(
                torch.cat([read[index].pairs for index in pack], dim=1),
                torch.cat([read[index].positions for index in pack], dim=1)[:, None],
                self.cache,
                AttentionPlan(tuple(segments)),
            )
            for index, one in zip(pack, segments, strict=True):
                end = one.start + one.count
                found[index] = hidden[:, end - 1 : end]
        return torch.cat([found[index] for index in range(len(read))])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Proposer`."""
        self.cache.keep(rows)
        self._pairs_before = [self._pairs_before[row] for row in rows]
        at = torch.tensor(rows, dtype=torch.long, device=self._before.device)
        self._before, self._prompt_lengths = self._before[at], self._prompt_lengths[at]
        self._position, self._root = self._position[at], self._root[at]

    def follow(self, draft: Draft, rule: TokenRule) -> None:
        """See `Proposer`."""
        assert isinstance(draft, HeadDraft)
        self._vocabulary, self._rule = draft.guessable, rule

    def _lengths(self, index: Lengths) -> Lengths:
        """Committed slots of rows whose root, with this index, is not counted."""
        before = tuple(self._pairs_before)
        return Lengths(self._before, before, before).plus(index)

    def host_state(self, index: Lengths) -> Hashable:
        """See `Proposer`."""
        host = self._text.host_state(self._lengths(index), self.cache)
        return host, self._kept.layout, self._vocabulary

    def propose(self, shape: TreeShape, root: torch.Tensor, index: Lengths) -> Guesses:
        """One tree, grown level by level; the root was read when it was committed."""
        hidden = self._root

        def expand(frontier: Frontier) -> torch.Tensor:
            nonlocal hidden
            if frontier.depth:
                above = frontier.parents[..., None].expand(-1, -1, hidden.shape[-1])
                hidden = self._run_level(frontier, hidden.gather(1, above), index)
            depths = torch.full_like(frontier.tokens, frontier.depth)
            logits = self._vocabulary.logits(hidden)
            return self._rule.scores(logits, depths, frontier.path, self._vocabulary.ids)

        return shape.grow(root, expand, self._vocabulary.ids)

    def _run_level(self, frontier: Frontier, above: torch.Tensor, index: Lengths) -> torch.Tensor:
        """Run k nodes of one depth, whose parents gave the features above [B, k, hidden]; -> theirs."""
        count = frontier.tokens.shape[1]
        end = frontier.first_slot + count
        lengths = self._lengths(index)
        slots = lengths.slots[:, None]
        nodes = Nodes(
            frontier.tokens,
            (self._position + index.slots + frontier.depth)[None, :, None].expand(1, -1, count),
            slots + torch.arange(frontier.first_slot, end, device=slots.device),
            None if frontier.sees is None else frontier.sees[..., :end],
        )
        return self._text.run_nodes(self._pairs(above, nodes.tokens), nodes, self.cache, lengths, end)

    def _pairs(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self._head.pairs(features, self._target.embed_tokens(tokens).to(features.device))

    def commit(self, shape: TreeShape, guesses: Guesses, accepted: Accepted, index: Lengths) -> None:
        """Read the accepted path and the new root with the target's features."""
        hidden = self._read_written(accepted.tokens, index.plus(1))
        at = accepted.guessed[:, None, None].expand(-1, 1, hidden.shape[-1])
        self._root.copy_(hidden.gather(1, at))

    def _read_written(self, tokens: torch.Tensor, index: Lengths) -> torch.Tensor:
        """Read tokens [B, n] of the captions with the features before them; `index`: that of the first ones.

        -> hidden states [B, n, hidden].
        """
        count = tokens.shape[1]
        levels = torch.arange(count, device=tokens.device)
        # Where a guess spoilt the target's logits, its feature is NaN; behind a mask that is NaN all the same.
        told = self._kept.features((self._prompt_lengths + index.slots - 1)[:, None] + levels).nan_to_num()
        lengths = self._lengths(index)
        causal = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        nodes = Nodes(
            tokens,
            ((self._position + index.slots)[:, None] + levels)[None],
            lengths.slots[:, None] + levels,
            causal.expand(len(tokens), -1, -1) if count > 1 else None,
        )
        return self._text.run_nodes(self._pairs(told, tokens), nodes, self.cache, lengths, count)

    def catch_up(self, captions: Sequence[Sequence[int]], known: Sequence[int]) -> None:
        """Read what was missed, the root included."""
        ends = [len(caption) for caption in captions]
        missed = max(end - heard for end, heard in zip(ends, known, strict=True))
        for done in range(0, missed, CATCH_UP):
            count = min(CATCH_UP, missed - done)
            # A row that missed less reads some over again.
            starts = [max(end - missed + done, 0) for end in ends]
            self._root.copy_(self._read_missed(captions, starts, count))

    def _read_missed(
        self, captions: Sequence[Sequence[int]], starts: Sequence[int], count: int
    ) -> torch.Tensor:
        """Read `count` tokens of each caption; -> what the last of them gave, [B, 1, hidden]."""
        device = self._before.device
        tokens = [
            [caption[min(start + i, len(caption) - 1)] for i in range(count)]
            for caption, start in zip(captions, starts, strict=True)
        ]
        index = Lengths(torch.tensor(starts, device=device), tuple(starts), tuple(starts))
        hidden = self._read_written(torch.tensor(tokens, device=device), index)
        last = [
            min(len(caption) - 1 - start, count - 1) for caption, start in zip(captions, starts, strict=True)
        ]
        at = torch.tensor(last, device=device)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, at)
