"""Rounds on one prefilled state, again and again: what benchmarks/gpu.py times."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from modelled import ModelledCaptioner

from specvlm.captioner import PreparedVideo
from specvlm.choosing import FixedTree
from specvlm.config import GenerationSettings, SpeculationSettings, TreeName
from specvlm.decode import TOLD_STEP, CaptionSequence, CaptionText, DecodeSettings
from specvlm.sampling import TokenRule, logits_rules
from specvlm.tree import TreeShape, make_shape


@dataclass(frozen=True)
class Times:
    """Medians over rounds."""

    round_s: float
    draft_s: float
    verify_s: float
    commit_s: float


class Held:
    """Captions whose prompts are read and whose rounds can be run again and again, on the same keys and values.

    Attributes:
        tree: The shape that was asked for.
    """

    def __init__(
        self, captioner: ModelledCaptioner, videos: list[PreparedVideo], tree: TreeName, rounds: int
    ) -> None:
        """`rounds`: the most that are run in a row."""
        self._captioner, self._rounds = captioner, rounds
        assert captioner.draft is not None
        settings = captioner.draft.settings(SpeculationSettings(tree=tree))
        self.tree = make_shape(settings, captioner.draft.vocabulary, captioner.target.device)
        limit = (rounds + 3) * (self.tree.depth + 1) + 1  # no caption ends
        generation = GenerationSettings(max_new_tokens=limit)
        target = captioner.target
        rules = logits_rules(captioner.generation_config, generation)

        def rule() -> TokenRule:
            return TokenRule(rules, generation, target.vocabulary, target.device)

        draft = captioner.draft
        self._settings = DecodeSettings(
            rule,
            FixedTree(self.tree),
            lambda rule, cache: draft.proposer(settings, rule, cache),
            draft,
        )
        self._decoder = captioner.decoder(settings)
        self._decoder.configure(self._settings)
        self._rig = self._decoder._rig
        self._sequences = [
            CaptionSequence(number, video.inputs, CaptionText(limit, frozenset()))
            for number, video in enumerate(videos)
        ]
        self._decoder.admit(self._sequences)
        self._first = [sequence.text.tokens[0] for sequence in self._rows()]

    def _rows(self) -> list[CaptionSequence]:
        """The sequences in the order in which the batch has them."""
        rows = [row.sequence for row in self._decoder._rows]
        return [sequence for sequence in rows if sequence is not None]

    def begin(self) -> None:
        """Prefill the draft anew."""
        rounds = self._decoder._rounds
        if rounds.proposer is not None:
            rounds.proposer.keep([])
        for row in self._decoder._rows:
            row.drafted = 0
        self._rewind()
        with torch.inference_mode():
            self._decoder._ready_draft()

    def _rewind(self) -> None:
        """Every caption has its first token again, and nothing else."""
        state = self._decoder._rounds.state
        for row, first in zip(self._decoder._rows, self._first, strict=True):
            row.text.tokens[:], row.index = [first], 0
            row.drafted = min(row.drafted, 1)
        with torch.inference_mode():
            state.root.copy_(torch.tensor(self._first, device=state.root.device))
            state.step.zero_()

    def rounds(self, shape: TreeShape) -> Iterator[dict[str, float]]:
        """Run rounds from the prompts' ends on; yield the stages' times of each, in seconds.

        Eagerly, where the target's `captures` is turned off.
        """
        target, draft = self._captioner.target, self._captioner.draft
        assert draft is not None
        self._decoder._rounds._rig = self._rig if target.captures else None
        for model in (target, draft.text):
            model.told_step = TOLD_STEP if target.captures else 1
        self._decoder.follow(replace(self._settings, chooser=FixedTree(shape)))
        self._rewind()
        names = ("decode", "draft", "verify", "commit")
        for _ in range(self._rounds + 2):
            before = {name: self._spent_s(name) for name in names}
            ended = self._decoder.step()
            assert not ended
            yield {name: self._spent_s(name) - before[name] for name in names}

    def _spent_s(self, stage: str) -> float:
        """Of all sequences, whose shares add up to the whole."""
        return sum(sequence.seconds[stage] for sequence in self._sequences)

    def time(self, shape: TreeShape, rounds: int) -> Times:
        """Time rounds, after two that warm up."""
        each = [tuple(one.values()) for one in itertools.islice(self.rounds(shape), rounds + 2)][2:]
        return Times(*(statistics.median(column) for column in zip(*each, strict=True)))
