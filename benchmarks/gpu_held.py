"""Rounds on one prefilled state, again and again: what benchmarks/gpu.py times."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from specvlm.bench.modelled import ModelledCaptioner
from specvlm.captioner import PreparedVideo
from specvlm.choosing import FixedTree
from specvlm.config import GenerationSettings, SpeculationSettings, TreeName
from specvlm.decode import Decoding, RowText, Speculation, TargetRows
from specvlm.drafts.base import DraftJob, DraftRow, Proposer
from specvlm.prefill import embed, prefill_target
from specvlm.sampling import TokenRule, logits_rules
from specvlm.stats import StageClock
from specvlm.tree import TreeShape, make_shape


@dataclass(frozen=True)
class Times:
    """Medians over rounds."""

    round_s: float
    draft_s: float
    verify_s: float
    commit_s: float


class Held:
    """A caption whose prompts are read and whose rounds can be run again and again, on the same keys and values.

    Attributes:
        tree: The shape that was asked for.
        limit: Tokens of the caption.
        begin: Prefills the draft anew.
    """

    def __init__(
        self, captioner: ModelledCaptioner, video: PreparedVideo, tree: TreeName, rounds: int
    ) -> None:
        """`rounds`: the most that are run in a row."""
        self._captioner = captioner
        assert captioner.draft is not None
        settings = captioner.draft.settings(SpeculationSettings(tree=tree))
        self.tree = make_shape(settings, captioner.draft.vocabulary, captioner.target.device)
        self.limit = (rounds + 2) * (self.tree.depth + 1)
        generation = GenerationSettings(max_new_tokens=self.limit)
        target = captioner.target
        rules = logits_rules(captioner.generation_config, generation)
        ids = [video.inputs.token_ids[0]]
        self._rule = TokenRule(rules, generation, ids, target.vocabulary, target.device)
        captioner.chooser(settings, generation, [video])  # sets what rounds accept
        with torch.inference_mode():
            prompt = embed(target, video.inputs)
            cache = target.new_cache(1, prompt.length + self.limit + self.tree.nodes)
            read = prefill_target(target, prompt, cache, 0)
            self._rows = TargetRows(target, cache, [prompt], read.logits)
            row = DraftRow(prompt, read.scores)
            slots = self.limit + self.tree.slots
            work = DraftJob([row], settings, self._rule, slots, cache)
            first = [int(read.logits.argmax())]
            self.begin: Callable[[], Proposer] = lambda: captioner.draft.begin(work, first)
            self._proposer = self.begin()

    def rounds(self, shape: TreeShape) -> Iterator[StageClock]:
        """Run rounds from the prompt's end on, until the caption is full; yield the clock after each."""
        clock = StageClock(self._captioner.target.device)
        speculation = Speculation(FixedTree(shape), lambda _: self._proposer, self._captioner.accept)
        text = RowText(self.limit, frozenset())
        decoding = Decoding(self._rows, speculation, self._rule, [text], clock)
        running = decoding.run()
        next(running)  # the token that the prefill gave
        for _ in running:
            yield clock

    def time(self, shape: TreeShape, rounds: int) -> Times:
        """Time rounds, after two that warm up."""
        seen: list[tuple[float, ...]] = []
        names = ("decode", "draft", "verify", "commit")
        for _, clock in zip(range(rounds + 2), self.rounds(shape), strict=False):
            seen.append(tuple(clock.seconds(name) for name in names))
        each = [
            [after - before for before, after in zip(first, second, strict=True)]
            for first, second in itertools.pairwise(seen[1:])
        ]
        return Times(*(statistics.median(column) for column in zip(*each, strict=True)))
