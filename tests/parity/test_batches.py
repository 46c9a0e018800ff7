"""Many sequences in flight: each caption is what stock `generate()` writes about its video alone, token for token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest

from specvlm.batch import CaptionBatch, Kind
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.config import POSITIONS, PRUNERS, TREES
from specvlm.session import PromptSession
from tests.heads import head_captioner
from tests.parity.test_stock import DRAFTS, FAMILIES, captioner_for
from tests.tiny import FamilyName, random_frames, stock_ids

PROMPTS = (
    "Hi there.",
    "Look at <video> and tell.",
    "Before it all.<video>",
    "What? And why? Say more of it.",
)
LONGEST = 24
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 7},
    {"forced_eos_token_id": 7, "suppress_tokens": [40, 44]},
)


@cache
def prepared(family: FamilyName, prompt: str, frames: int, seed: int) -> PreparedVideo:
    return captioner_for(family, "same").prepare(random_frames(seed, frames), prompt)


@cache
def session_frames(seed: int, frames: int) -> Any:
    return random_frames(seed, frames)


class Job(NamedTuple):
    """One caption that is wanted: of a video of its own, or of a prompt of a session."""

    video: PreparedVideo
    session: PromptSession | None = None
    number: int = 0  # of its prompts

    def add_to(self, batch: CaptionBatch, key: int, kind: Kind, *, alone: bool) -> None:
        if self.session is None:
            batch.add(key, self.video, kind, alone=alone)
        else:
            self.session.add_to(batch, key, self.number, kind, alone=alone)


@cache
def with_head(family: FamilyName) -> Captioner:
    return head_captioner(family)


class RandomCase:
    """Videos, prompts, rules and speculation, all drawn from one seed; and who comes and goes when."""

    def __init__(self, seed: int, family: FamilyName | None = None) -> None:
        draw = self.draw = random.Random(seed)
        drawn: FamilyName = draw.choice(FAMILIES)
        self.family = family or drawn
        draft = draw.choice([*DRAFTS, "head"])
        self.captioner = with_head(self.family) if draft == "head" else captioner_for(self.family, draft)
        self.batch_size = draw.randint(1, 8)
        self.rules = draw.choice(RULES)
        self.options: dict[str, Any] = {
            "max_new_tokens": draw.randint(1, LONGEST),
            "tree": draw.choice(TREES),
            "pruner": draw.choice(PRUNERS),
            "prune_ratio": draw.choice((0.0, 0.5, 0.9, 1.0)),
            "positions": draw.choice(POSITIONS),
            "seed": draw.randint(0, 99),
        }
        if draw.random() < 0.25:
            self.options["temperature"] = 0.8
        self.speculate = draw.random() < 0.85
        self.jobs = [job for _ in range(draw.randint(1, 2 * self.batch_size)) for job in self._jobs()]
        draw.shuffle(self.jobs)

    def _jobs(self) -> list[Job]:
        """A video with one prompt, or now and then with several in a session."""
        draw, frames, seed = self.draw, self.draw.choice((1, 2, 4, 6)), self.draw.randint(0, 3)
        if draw.random() < 0.8:
            return [Job(prepared(self.family, draw.choice(PROMPTS), frames, seed))]
        prompts = [draw.choice(PROMPTS) for _ in range(draw.randint(2, 4))]
        session = self.captioner.session(session_frames(seed, frames), prompts)
        return [
            Job(prepared(self.family, prompt, frames, seed), session, index)
            for index, prompt in enumerate(prompts)
        ]

    def set_rules(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The generation config, with an end-of-sequence token that ends some captions early.

        A step that fails fails the test: sequences that are tried again alone would hide it.
        """
        config = self.captioner.generation_config
        for name in {name for rules in RULES for name in rules}:
            monkeypatch.setattr(config, name, self.rules.get(name), raising=False)
        first = self.stock(self.jobs[0].video)
        ends = [first[self.draw.randrange(len(first))]] if first and self.draw.random() < 0.7 else []
        monkeypatch.setattr(config, "eos_token_id", ends)
        monkeypatch.setattr(CaptionBatch, "_after_fault", failed)

    def stock(self, video: PreparedVideo) -> tuple[int, ...]:
        """What `generate()` writes; with a temperature, what plain decoding alone writes, which stock cannot repeat."""
        if self.options.get("temperature"):
            return self.captioner.caption(video, speculate=False, **self.options).token_ids
        limit = self.options["max_new_tokens"]
        return stock_ids(self.captioner.target.model, video.inputs.tensors, limit)

    def check(self) -> None:
        alone = all(job.session is None for job in self.jobs) and self.draw.random() < 0.5
        got = self._many() if alone else self._coming_and_going()
        for number, tokens in got.items():
            assert tokens == self.stock(self.jobs[number].video), (number, self.options)

    def _many(self) -> dict[int, tuple[int, ...]]:
        """By `caption_many`; -> the tokens of all."""
        many = self.captioner.caption_many(
            (job.video for job in self.jobs),
            batch_size=self.batch_size,
            speculate=self.speculate,
            **self.options,
        )
        got = {}
        for done in many:
            assert done.error is None
            assert done.caption is not None
            got[done.index] = done.caption.token_ids
        assert sorted(got) == list(range(len(self.jobs)))
        return got

    def _coming_and_going(self) -> dict[int, tuple[int, ...]]:
        """Sequences are added and aborted while others run; -> the tokens of those that were not."""
        draw, batch = self.draw, CaptionBatch(self.captioner, self.batch_size)
        kind = self.captioner.kind(self.speculate, self.options)  # type: ignore[arg-type]
        to_come, here, got = list(range(len(self.jobs))), set[int](), dict[int, tuple[int, ...]]()
        aborted = set[int]()
        while to_come or len(batch):
            for _ in range(draw.randint(0 if len(batch) else 1, 3)):
                if to_come:
                    here.add(number := to_come.pop())
                    self.jobs[number].add_to(batch, number, kind, alone=draw.random() < 0.05)
            for key, caption, error in batch.step():
                assert error is None
                assert caption is not None
                here.remove(key)  # type: ignore[arg-type]
                got[key] = caption.token_ids  # type: ignore[index]
            if here and draw.random() < 0.08:
                here.remove(number := draw.choice(sorted(here)))
                aborted.add(number)
                batch.abort(number)
            assert len(batch) == len(here)
        assert sorted(got.keys() | aborted) == list(range(len(self.jobs)))
        return got


def failed(batch: CaptionBatch, error: Exception) -> Any:
    """In place of trying again."""
    raise error


@pytest.mark.filterwarnings("ignore:Both `min_new_tokens`", "ignore:Unfeasible length")
@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 40))]
)
def test_every_caption_of_a_batch_is_stock(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = RandomCase(seed)
    case.set_rules(monkeypatch)
    case.check()


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:Both `min_new_tokens`", "ignore:Unfeasible length")
def test_many_random_batches(request: pytest.FixtureRequest) -> None:
    first, cases = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-cases")
    wrong, family = {}, request.config.getoption("--fuzz-family") or None
    for seed in range(first + 1000, first + 1000 + cases):
        with pytest.MonkeyPatch.context() as monkeypatch:
            case = RandomCase(seed, family)
            case.set_rules(monkeypatch)
            try:
                case.check()
            except Exception as error:  # go on to the next one
                wrong[seed] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    assert not wrong


def finished(batch: CaptionBatch) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Steps until nothing is left; each key with its tokens."""
    while len(batch):
        for key, caption, error in batch.step():
            assert error is None
            assert caption is not None
            yield key, caption.token_ids


def in_batch(
    captioner: Captioner, videos: list[PreparedVideo], size: int, **options: Any
) -> list[tuple[int, ...]]:
    batch = CaptionBatch(captioner, size)
    kind = captioner.kind(True, options)  # type: ignore[arg-type]
    for number, video in enumerate(videos):
        batch.add(number, video, kind)
    return [tokens for _, tokens in sorted(finished(batch))]


@pytest.mark.covering(strength=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", TREES)
def test_prompts_of_several_videos_share_their_prefills_inside_a_batch(family: FamilyName, tree: str) -> None:
    captioner = captioner_for(family, "noisy")
    options: dict[str, Any] = {"tree": tree, "max_new_tokens": 12}
    kind = captioner.kind(True, options)  # type: ignore[arg-type]
    prompts = PROMPTS[:2] + PROMPTS[3:]
    sessions: list[PromptSession] = [
        captioner.session(session_frames(seed, frames), prompts) for seed, frames in ((1, 4), (2, 2), (3, 6))
    ]
    batch = CaptionBatch(captioner, 5)
    for index in range(len(prompts)):
        for number, session in enumerate(sessions):
            session.add_to(batch, (number, index), index, kind)
    got = dict(finished(batch))
    for number, (seed, frames) in enumerate(((1, 4), (2, 2), (3, 6))):
        for index, prompt in enumerate(prompts):
            alone = captioner.caption(session_frames(seed, frames), prompt, **options)
            assert got[number, index] == alone.token_ids, (number, index)
