"""A draft whose vocabulary is learned on the way: when, from what, and captions that stay the same."""

from __future__ import annotations

from collections import Counter

import pytest

import specvlm
from specvlm.bench.clips import example_clips
from specvlm.captioner import Captioner
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.drafts.kept_tokens import Choosing, MostUsed, unseen_share
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.errors import ConfigError
from specvlm.trimming import Trimming, guess_from
from specvlm_cli.caption.engine import SpecvlmEngine
from specvlm_cli.caption.settings import CaptionSettings, ModelChoice
from tests.tiny import Size, processor_for, random_frames, tiny_captioner

TARGET = Size(layers=2, seed=1, vocabulary=320)


@pytest.fixture
def captioner() -> Captioner:
    made = tiny_captioner("qwen", TARGET, TARGET)
    made.generation_config.eos_token_id = []
    return made


def ids_of(captioner: Captioner) -> list[int] | None:
    assert isinstance(captioner.draft, SmallModelDraft)
    ids = captioner.draft.guessable.ids
    return None if ids is None else ids.tolist()


@pytest.mark.parametrize(
    ("counts", "size", "share"),
    [
        ({}, 50, 1.0),
        ({200: 1, 201: 9}, 50, 0.1),
        ({200: 1, 201: 8, 3: 1}, 50, 0.1),  # 3 would have filled up
        ({200: 1, 201: 8, 3: 1}, 3, 0.2),  # nothing fills up
        ({200: 2, 201: 8}, 50, 0.0),
    ],
    ids=str,
)
def test_the_share_of_tokens_to_come_that_would_be_left_out(
    counts: dict[int, int], size: int, share: float
) -> None:
    by = Choosing(processor_for("qwen").tokenizer, 290, [])
    assert unseen_share(Counter(counts), size, by) == pytest.approx(share)


def test_trimmed_once_captions_tell_enough(captioner: Captioner) -> None:
    """Chosen after 1, 2, 4, 8 captions; what is used comes first."""
    trimming = Trimming(captioner, MostUsed(4))
    costs = captioner.costs
    trimming.hear([200, 201, 202])
    assert (trimming.trimmed, ids_of(captioner)) == (False, None)
    trimming.hear([200, 201, 202])
    assert (trimming.trimmed, ids_of(captioner)) == (True, [0, 200, 201, 202])
    assert captioner.draft is not None
    assert captioner.draft.vocabulary == 4
    assert captioner.costs is not costs
    costs = captioner.costs
    trimming.hear([5, 6] * 9)
    assert ids_of(captioner) == [0, 200, 201, 202]
    trimming.hear([5, 6] * 9)
    assert ids_of(captioner) == [5, 6, 200, 201]
    assert captioner.costs is costs


def test_a_rare_token_in_a_larger_caption_does_not_hinder(captioner: Captioner) -> None:
    trimming = Trimming(captioner, MostUsed(4))
    trimming.hear([*[200, 201] * 50, 250])
    assert ids_of(captioner) == [0, 200, 201, 250]
    assert trimming.trimmed


def test_earlier_captions_count(captioner: Captioner) -> None:
    assert not Trimming(captioner, MostUsed(20, ["zebra"])).trimmed
    assert Trimming(captioner, MostUsed(20, ["zebra", "zebra"])).trimmed
    tokens = captioner.processor.tokenizer("zebra")["input_ids"]
    assert set(tokens) <= set(ids_of(captioner) or [])


@pytest.mark.parametrize("size", [0, 320, 1000])
def test_numbers_without_a_meaning_are_refused_at_once(captioner: Captioner, size: int) -> None:
    with pytest.raises(ConfigError, match=f"draft_vocab={size} is out of range"):
        Trimming(captioner, MostUsed(size))


def test_captions_stay_the_same_while_the_vocabulary_changes(captioner: Captioner) -> None:
    """In a session too, whose features and caches stay."""
    frames, prompts = random_frames(3), ["Hi there.", "What is it?", "And why?"]
    plain = [
        captioner.caption(captioner.prepare(frames, prompt), speculate=False, max_new_tokens=24).token_ids
        for prompt in prompts
    ]
    session = captioner.session(frames, prompts)
    for index, ids in enumerate(([1], None, plain[0])):
        if ids is not None:
            guess_from(captioner, ids)
        assert session.caption(index, max_new_tokens=24, tree="static").token_ids == plain[index]


def test_the_batch_tools_engine_counts_each_caption_once(captioner: Captioner) -> None:
    """Not what is decoded plainly beside it: that would make every token look common."""
    heard: list[tuple[int, ...]] = []
    trimming = Trimming(captioner, MostUsed(40))
    trimming.hear = heard.append  # type: ignore[assignment,method-assign]
    settings = CaptionSettings(
        ModelChoice("tiny"),
        ("Hi there.",),
        None,
        captioner.frames,
        GenerationSettings(max_new_tokens=9),
        SpeculationSettings(tree="chain"),
    )
    engine = SpecvlmEngine(captioner, settings, trimming)
    session = engine.open(random_frames(1), settings.prompts)
    made = []
    for speculate, alone in ((False, False), (True, False), (True, True)):
        engine.add("one", session, 0, speculate=speculate, alone=alone)
        while not (ended := engine.step()):
            pass
        (finished,) = ended
        assert finished.caption is not None, finished.error
        made.append(finished.caption.token_ids)
    assert made == [made[0]] * 3
    assert heard == [made[0]]


def test_the_demo_pair_with_half_of_its_vocabulary() -> None:
    """Trimmed after half of the example clips, the other half is guessed about as well, and written the same."""
    captioner = specvlm.load("demo")
    clips = [str(clip.video) for clip in example_clips()]
    whole = [captioner.caption(clip, tree="static") for clip in clips]
    trimming = Trimming(captioner, MostUsed(312))
    for caption in [*whole[:4], *whole[:4]]:
        trimming.hear(caption.token_ids)
    assert trimming.trimmed
    assert captioner.draft is not None
    assert captioner.draft.vocabulary == 312
    half = [captioner.caption(clip, tree="static") for clip in clips]
    assert [caption.token_ids for caption in half] == [caption.token_ids for caption in whole]
    rounds = [sum(caption.stats.num_drafts for caption in each[4:]) for each in (whole, half)]
    assert rounds[1] < 2 * rounds[0]
