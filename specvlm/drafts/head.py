"""A trained head as draft: it reads the target's own features, and its own where the target has not been yet.

EAGLE-2 (arXiv 2406.16858) with the changes of SpecVLM (arXiv 2509.11815, section 3.1). The pair at position i is the
feature of token i and the embedding of token i + 1, and has the position of token i, M-RoPE's rows included. What the
target has accepted is read anew with the target's features, in the round's commit; so a round of depth D takes D
passes of the head, one of them over the accepted path.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from specvlm.attention import AttentionPlan
from specvlm.config import SpeculationSettings
from specvlm.drafts.base import Draft, DraftJob, Horizon, Proposer
from specvlm.drafts.head_model import HeadModel, PairSequence, Shown
from specvlm.drafts.vocabulary import DraftVocabulary
from specvlm.model import Extent, Nodes, VideoLM
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

    def begin(self, job: DraftJob, first: Sequence[int]) -> Proposer:
        """Compress and prefill each row."""
        read = [self._read(job, row, token) for row, token in enumerate(first)]
        return _HeadProposer(self, job, read)

    def _read(self, job: DraftJob, row: int, first: int) -> PairSequence:
        """The pairs of one prompt, and last that of the first token of its caption."""
        told, device = job.rows[row], self.head.device
        root = self.target.embed_tokens(torch.tensor([[first]]))
        shown = Shown(
            job.cache.row_features(row, told.prompt.length),
            torch.cat((told.prompt.embeds[:, 1:], root), dim=1).to(device),
            told.prompt.positions.to(device),
            told.prompt.inputs.is_video.nonzero().squeeze(1),
            told.prompt.length,
            told.scores.to(device),
        )
        return self.head.sequence(shown, torch.Generator().manual_seed(job.settings.seed))


class _HeadProposer(Proposer):
    """One job. The cache holds the pairs of all committed tokens, the root's included."""

    def __init__(self, draft: HeadDraft, job: DraftJob, read: Sequence[PairSequence]) -> None:
        self._head, self._text, self._target = draft.head, draft.text, draft.target
        self._vocabulary, self._rule, self._kept = draft.guessable, job.rule, job.cache
        self.kept = tuple(one.video.inputs.shape[1] for one in read)
        self.compressors = tuple(one.video.operator for one in read)
        device = draft.head.device
        before = [one.pairs.shape[1] - 1 for one in read]  # pairs before the root's
        self._cache = self._text.new_cache(len(read), max(before) + 1 + job.slots)
        self._extent = Extent.of(before, self._cache)
        self._before = torch.tensor(before, device=device)
        lengths = [row.prompt.length for row in job.rows]
        self._prompt_lengths = torch.tensor(lengths, device=device)
        # Of the root of index 0, which has the position of the prompt's last token.
        at = [row.prompt.next_position - 1 for row in job.rows]
        self._position = torch.tensor(at, device=device)
        self._root = torch.cat([self._prefill(row, one) for row, one in enumerate(read)])  # [B, 1, hidden]

    def _prefill(self, row: int, read: PairSequence) -> torch.Tensor:
        count = read.pairs.shape[1]
        self._cache.aim_prefill(row, 0, count, read.pairs.device)
        hidden = self._text.forward(read.pairs, read.positions[:, None], self._cache, AttentionPlan())
        return hidden[:, -1:]

    @property
    def host_state(self) -> Hashable:
        """See `Proposer`."""
        slabs = self._cache.slabs.name, self._kept.slabs.name  # which are one head's, and one target's, alone
        return self._text.round_attention, slabs, self._extent, self._vocabulary

    def propose(self, shape: TreeShape, root: torch.Tensor, index: torch.Tensor, horizon: Horizon) -> Guesses:
        """One tree, grown level by level; the root was read when it was committed."""
        hidden = self._root

        def expand(frontier: Frontier) -> torch.Tensor:
            nonlocal hidden
            if frontier.depth:
                above = frontier.parents[..., None].expand(-1, -1, hidden.shape[-1])
                hidden = self._run_level(frontier, hidden.gather(1, above), index, horizon)
            depths = torch.full_like(frontier.tokens, frontier.depth)
            logits = self._vocabulary.logits(hidden)
            return self._rule.scores(logits, depths, frontier.path, self._vocabulary.ids)

        return shape.grow(root, expand, self._vocabulary.ids)

    def _run_level(
        self, frontier: Frontier, above: torch.Tensor, index: torch.Tensor, horizon: Horizon
    ) -> torch.Tensor:
        """Run k nodes of one depth, whose parents gave the features above [B, k, hidden]; -> theirs."""
        count = frontier.tokens.shape[1]
        end = frontier.first_slot + count
        lengths = self._before + index
        nodes = Nodes(
            frontier.tokens,
            (self._position + index + frontier.depth)[None, :, None].expand(1, -1, count),
            lengths[:, None] + torch.arange(frontier.first_slot, end, device=lengths.device),
            None if frontier.sees is None else frontier.sees[..., :end],
        )
        reach = self._extent.reach(horizon.longest, end, exact=horizon.exact)
        return self._text.run_nodes(self._pairs(above, nodes.tokens), nodes, self._cache, lengths, reach)

    def _pairs(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self._head.pairs(features, self._target.embed_tokens(tokens).to(features.device))

    def commit(
        self, shape: TreeShape, guesses: Guesses, accepted: Accepted, index: torch.Tensor, horizon: Horizon
    ) -> None:
        """Read the accepted path and the new root with the target's features."""
        hidden = self._read_written(accepted.tokens, index + 1, horizon.longest + 1, exact=horizon.exact)
        at = accepted.guessed[:, None, None].expand(-1, 1, hidden.shape[-1])
        self._root.copy_(hidden.gather(1, at))

    def _read_written(
        self, tokens: torch.Tensor, index: torch.Tensor, longest: int, *, exact: bool
    ) -> torch.Tensor:
        """Read tokens [B, n] of the captions, the first of which has `index` [B], with the features before them.

        `longest` is the largest index, or more. -> hidden states [B, n, hidden].
        """
        count = tokens.shape[1]
        levels = torch.arange(count, device=index.device)
        # Where a guess spoilt the target's logits, its feature is NaN; behind a mask that is NaN all the same.
        told = self._kept.features((self._prompt_lengths + index - 1)[:, None] + levels).nan_to_num()
        lengths = self._before + index
        causal = torch.ones(count, count, dtype=torch.bool, device=index.device).tril()
        nodes = Nodes(
            tokens,
            ((self._position + index)[:, None] + levels)[None],
            lengths[:, None] + levels,
            causal.expand(len(index), -1, -1) if count > 1 else None,
        )
        pairs = self._pairs(told, tokens)
        reach = self._extent.reach(longest, count, exact=exact)
        return self._text.run_nodes(pairs, nodes, self._cache, lengths, reach)

    def catch_up(self, captions: Sequence[Sequence[int]], known: Sequence[int]) -> None:
        """Read what was missed, the root included."""
        ends = [len(caption) for caption in captions]
        missed = max(end - heard for end, heard in zip(ends, known, strict=True))
        for done in range(0, missed, CATCH_UP):
            count = min(CATCH_UP, missed - done)
            # A row that missed less, or is done, reads some over again.
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
        index = torch.tensor(starts, device=device)
        hidden = self._read_written(
            torch.tensor(tokens, device=device), index, max(starts), exact=len(captions) == 1
        )
        last = [
            min(len(caption) - 1 - start, count - 1) for caption, start in zip(captions, starts, strict=True)
        ]
        at = torch.tensor(last, device=device)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, at)
