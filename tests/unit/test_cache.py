"""Slabs: what is written, what is seen, what a commit moves."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from specvlm.cache import SlabCache, SlabShape
from specvlm.choosing import FixedTree
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.decode import Decoding, RowText, Speculation, TargetRows
from specvlm.drafts.base import DraftJob, DraftRow
from specvlm.prefill import embed, prefill_target
from specvlm.sampling import TokenRule, logits_rules
from specvlm.stats import StageClock
from specvlm.tree import ROOT
from tests.tiny import Size, random_frames, tiny_captioner

CPU = torch.device("cpu")


def small_cache(rows: int = 2, capacity: int = 10) -> SlabCache:
    return SlabCache(SlabShape(2, 4, torch.float32, (CPU, CPU)), rows, capacity)


def states(rows: int, count: int, start: float) -> torch.Tensor:
    """[rows, 2, count, 4] of distinct numbers."""
    return start + torch.arange(rows * 2 * count * 4, dtype=torch.float32).reshape(rows, 2, count, 4)


def test_prefill_writes_one_row() -> None:
    cache = small_cache()
    cache.aim_prefill(1, 0, 3, CPU)
    keys, values = cache.update(states(1, 3, 1), states(1, 3, 100), 1)
    assert torch.equal(keys, states(1, 3, 1))
    assert torch.equal(values, states(1, 3, 100))
    cache.aim_prefill(1, 3, 2, CPU)
    keys, _ = cache.update(states(1, 2, 50), states(1, 2, 60), 1)
    assert torch.equal(keys, torch.cat((states(1, 3, 1), states(1, 2, 50)), dim=2))
    cache.aim_prefill(0, 0, 1, CPU)
    keys, _ = cache.update(states(1, 1, 7), states(1, 1, 8), 1)
    assert torch.equal(keys, states(1, 1, 7))


def test_commit_moves_paths_row_by_row_as_if_read_at_once() -> None:
    cache = small_cache()
    slots = torch.arange(6).expand(2, 6)
    cache.aim_nodes(slots, 6)
    written = states(2, 6, 1)
    for layer in (0, 1):
        cache.update(written, -written, layer)
    cache.commit(torch.tensor([[2, 4, 5], [2, 1, 3]]), torch.tensor([[2, 3, 4], [1, 2, 3]]))
    cache.aim_nodes(torch.tensor([[9], [9]]), 6)
    for layer in (0, 1):
        keys, values = cache.update(states(2, 1, 0), states(2, 1, 0), layer)
        for got, source in ((keys, written), (values, -written)):
            assert torch.equal(got[0], source[0][:, [0, 1, 2, 4, 5, 5]])
            assert torch.equal(got[1], source[1][:, [0, 2, 1, 3, 4, 5]])


def test_a_slab_refuses_more_than_it_holds() -> None:
    with pytest.raises(ValueError, match="10 slots"):
        small_cache().aim_prefill(0, 8, 3, CPU)


def test_size_is_what_the_video_needs() -> None:
    assert small_cache(rows=2, capacity=10).size_bytes == 2 * 2 * 2 * 10 * 2 * 4 * 4


@pytest.mark.parametrize("tree", ["chain", "static", "dynamic"])
def test_a_rewound_cache_equals_one_that_never_advanced(tree: str) -> None:
    """After rounds with refused guesses, committed keys and values are those of plain decoding."""
    captioner = tiny_captioner("qwen", Size(layers=2, seed=1), Size(layers=2, seed=9))
    video = captioner.prepare(random_frames(2), "Tell me.")
    settings = SpeculationSettings(tree=tree, prune_ratio=0.0)  # type: ignore[arg-type]
    kept = {}
    for speculate in (False, True):
        with torch.inference_mode():
            prompt = embed(captioner.target, video.inputs)
            cache = captioner.target.new_cache(1, prompt.length + 30 + 40)
            read = prefill_target(captioner.target, prompt, cache, 0)
            rules = logits_rules(captioner.generation_config, _generation())
            rule = TokenRule(rules, _generation(), [video.inputs.token_ids[0]], 300, CPU)
        chooser = captioner.chooser(settings, _generation(), [video]) if speculate else FixedTree(ROOT)
        assert captioner.draft is not None
        work = DraftJob([DraftRow(prompt, read.scores)], settings, rule, 60, cache)
        begin = partial(captioner.draft.begin, work)
        texts = [RowText(20, frozenset())]
        rows = TargetRows(captioner.target, cache, [prompt], read.logits)
        for _ in Decoding(rows, Speculation(chooser, begin), rule, texts, StageClock(CPU)).run():
            pass
        length = prompt.length + 19  # the last token is never run
        kept[speculate] = (texts[0].tokens, [slab[:, :, :length] for slab in cache.slabs.by_device.values()])
    assert kept[True][0] == kept[False][0]
    for ours, plain in zip(kept[True][1], kept[False][1], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def _generation() -> GenerationSettings:
    return GenerationSettings(max_new_tokens=20)
