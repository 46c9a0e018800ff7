"""Training with many captions in flight: the same weights as with one at a time, whatever goes wrong meanwhile."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specvlm.batch import CaptionBatch, FinishedCaption
from specvlm.captioner import Captioner
from specvlm.drafts.head import HeadDraft
from specvlm.errors import GenerationError
from specvlm.records import Frames
from specvlm.training import folder
from specvlm_cli.readers import DecodingPool
from specvlm_cli.training import lessons, start
from specvlm_cli.training.captions import ALL_PROMPTS, LEFT_OUT_NAME
from specvlm_cli.training.frames import TrainingReader
from specvlm_cli.training.source import VideoSamples
from specvlm_cli.training.writing import Lesson, Writer
from tests.cli.conftest import Result
from tests.cli.test_real import save
from tests.cli.test_train import Train, captions_of, same, texts
from tests.cli.train_reader import PLACE
from tests.tiny import Size

COUNT = 6


class Died(BaseException):
    """As after `kill -9`."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "target", "qwen", Size(seed=1))


@pytest.fixture
def train(
    target: Path, forked_readers: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Train:
    """All videos are read before the first step, and one more is admitted with each round."""
    monkeypatch.setattr(start, "DecodingPool", partial(DecodingPool, reader=PLACE))
    monkeypatch.setattr(folder, "curve", lambda _: b"")
    first, room = TrainingReader.first, Writer.room
    monkeypatch.setattr(TrainingReader, "first", lambda self, _: first(self, COUNT))
    monkeypatch.setattr(Writer, "room", lambda self, author: min(room(self, author), 1))
    return Train(target, capfd)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return texts(tmp_path / "videos", *(f"video {number}" for number in range(COUNT)))


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Captions in flight, at each round of the training's batch."""
    seen: list[int] = []
    step = Writer.step

    def counted(self: Writer, author: Captioner) -> list[Lesson]:
        seen.append(len(self))
        return step(self, author)

    monkeypatch.setattr(Writer, "step", counted)
    return seen


def run(train: Train, videos: Path, out: Path, batch_size: object = "auto", **more: object) -> Result:
    return train(videos, "-o", out, held_out=0, batch_size=batch_size, checkpoint_every=1, **more)


_CALM: dict[tuple[Path, int], Path] = {}


@pytest.fixture
def calm(train: Train, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns the folder of a training of so many epochs that writes one caption at a time; each is made once.

    The videos have the same content in every test.
    """

    def made(epochs: int) -> Path:
        known = train.target, epochs
        if known not in _CALM:
            out = tmp_path_factory.mktemp("calm") / "head"
            assert run(train, videos, out, 1, epochs=epochs).code == 0
            _CALM[known] = out
        return _CALM[known]

    return made


def left_out(out: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(out / ".specvlm" / LEFT_OUT_NAME) as database:
        return database.execute("SELECT video, prompt, since, stage, error FROM left_out").fetchall()


@pytest.mark.parametrize(("batch_size", "in_flight"), [(1, 1), (3, 3), ("auto", COUNT)])
def test_the_batch_is_filled_with_samples_to_come(
    batch_size: object,
    in_flight: int,
    train: Train,
    videos: Path,
    tmp_path: Path,
    most: list[int],
    calm: Callable[[int], Path],
) -> None:
    """No caption is written twice, and what is learned depends on nothing of it."""
    said = run(train, videos, tmp_path / "many", batch_size, epochs=2)
    assert (said.code, said.json["captions"], said.json["samples"]) == (0, COUNT, 2 * COUNT), said.err
    assert max(most) == in_flight
    assert same(tmp_path / "many", calm(2))
    assert captions_of(tmp_path / "many") == captions_of(calm(2))


def test_a_failing_sample_is_blamed_in_its_turn(
    train: Train, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: list[int]
) -> None:
    step = CaptionBatch.step

    def failing(self: CaptionBatch) -> list[FinishedCaption]:
        error = GenerationError("it cannot be captioned")
        return [FinishedCaption(3, None, error) if one.key == 3 else one for one in step(self)]

    monkeypatch.setattr(CaptionBatch, "step", failing)
    for name, batch_size in (("many", "auto"), ("one", 1)):
        said = run(train, videos, tmp_path / name, batch_size, epochs=2)
        assert (said.code, said.json["left_out"], said.json["captions"]) == (3, 1, COUNT - 1), said.err
        assert "it cannot be captioned (generate, GenerationError)" in said.err
    assert max(most) > 3
    assert [row[1:] for row in left_out(tmp_path / "many")] == [(0, 3, "generate", "it cannot be captioned")]
    assert left_out(tmp_path / "many") == left_out(tmp_path / "one")
    assert same(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize("rounds", [3, 6])
def test_a_kill_with_captions_in_flight_changes_no_bit(
    rounds: int, train: Train, videos: Path, tmp_path: Path, calm: Callable[[int], Path]
) -> None:
    whole = calm(2)
    step, left = Writer.step, iter([False] * rounds)

    def dying(self: Writer, author: Captioner) -> list[Lesson]:
        if next(left, True):
            assert len(self) > 1
            raise Died
        return step(self, author)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "step", dying)
        with pytest.raises(Died):
            run(train, videos, tmp_path / "cut", epochs=2)
    kept = len(captions_of(tmp_path / "cut"))
    said = run(train, videos, tmp_path / "cut", epochs=2)
    assert (said.code, said.json["captions"]) == (0, COUNT - kept), said.err
    assert same(tmp_path / "cut", whole)
    assert captions_of(tmp_path / "cut") == captions_of(whole)


@pytest.mark.parametrize("how", ["estimated", "raised"])
def test_captions_in_flight_give_their_memory_to_learning(
    how: str,
    train: Train,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calm: Callable[[int], Path],
) -> None:
    """They are begun again afterwards; no sample is left out for them."""
    whole = calm(1)
    released: list[int] = []
    release, shown = Writer.release, lessons.read_example
    writers: list[Writer] = []

    def counted(self: Writer) -> None:
        released.append(len(self))
        release(self)

    def made(self: Writer, *arguments: Any) -> None:
        original(self, *arguments)
        writers.append(self)

    def short(*_: Any) -> str | None:
        return "too little" if writers and writers[0].holds_memory else None

    def raising(*arguments: Any) -> Any:
        if writers[0].holds_memory:
            raise torch.OutOfMemoryError("too little")
        return shown(*arguments)

    original = Writer.__init__
    monkeypatch.setattr(Writer, "__init__", made)
    monkeypatch.setattr(Writer, "release", counted)
    if how == "estimated":
        monkeypatch.setattr(lessons, "shortage", short)
    else:
        monkeypatch.setattr(lessons, "read_example", raising)
    said = run(train, videos, tmp_path / "short")
    assert (said.code, said.json["left_out"], said.json["captions"]) == (0, 0, COUNT), said.err
    assert max(released) > 1
    assert same(tmp_path / "short", whole)


def test_another_author_takes_over_when_the_first_is_done(
    train: Train, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head guesses for the target in some of the visits, with captions of both in the making."""
    assert run(train, videos, tmp_path / "plain", 1).code == 0
    visit, step = VideoSamples.visit, Writer.step
    turns, heads = iter([True, False, False, True, True, False]), list[bool]()

    def turning(self: VideoSamples, *arguments: Any) -> Any:
        self._lessons.head_guesses = next(turns)
        return visit(self, *arguments)

    def counted(self: Writer, author: Captioner) -> list[Lesson]:
        ended = step(self, author)
        assert self._author is not None
        heads.extend([isinstance(self._author.draft, HeadDraft)] * len(ended))
        return ended

    monkeypatch.setattr(VideoSamples, "visit", turning)
    monkeypatch.setattr(Writer, "step", counted)
    said = run(train, videos, tmp_path / "turns", 2)
    assert (said.code, said.json["captions"]) == (0, COUNT), said.err
    assert len(heads) == COUNT
    assert set(heads) == {True, False}
    assert same(tmp_path / "turns", tmp_path / "plain")


def test_a_sample_that_is_left_out_meanwhile_is_dropped(
    train: Train, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, forget = lessons.Lessons.visit, Writer.forget
    dropped, waiting = list[bool](), list[int]()
    places = [place for step in range(3) for place in start.Order(COUNT, 2, 0).places(step)]

    def visiting(self: lessons.Lessons, *arguments: Any) -> Any:
        measures = visit(self, *arguments)
        self._register._since[self._samples[places[4].sample].video.id, ALL_PROMPTS] = 4
        waiting.append(len(self._writer))
        return measures

    def forgetting(self: Writer, position: int) -> None:
        if position == 4:
            dropped.append(position in self)
        forget(self, position)

    monkeypatch.setattr(lessons.Lessons, "visit", visiting)
    monkeypatch.setattr(Writer, "forget", forgetting)
    for name, batch_size in (("many", "auto"), ("one", 1)):
        said = run(train, videos, tmp_path / name, batch_size)
        assert said.json["samples"] == COUNT - 1, said.err
        assert waiting[-1] == 0
    assert dropped == [True, False], "it was in flight where there was room for it"
    assert same(tmp_path / "many", tmp_path / "one")


def test_held_out_videos_are_decoded_together(
    train: Train, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them fails in the middle; what is accepted of the others is what it is one at a time."""
    held = texts(tmp_path / "held", "video 90", "text", "video 91", "video 92")
    step, seen = CaptionBatch.step, list[int]()

    def failing(self: CaptionBatch) -> list[FinishedCaption]:
        seen.append(len(self))
        error = GenerationError("it cannot be captioned")
        return [FinishedCaption(one.key, None, error) if one.key == (2, 0) else one for one in step(self)]

    monkeypatch.setattr(CaptionBatch, "step", failing)
    results = []
    for name, batch_size in (("many", "auto"), ("one", 1)):
        said = train(
            *(videos, "-o", tmp_path / name),
            held_out=held,
            batch_size=batch_size,
            prompt=["What is it?", "Where is it?"],
            learning_rate=1e-2,
        )
        assert (said.code, said.json["left_out"]) == (3, 2), said.err
        results.append([said.json["last"][one] for one in ("held_out", "num_drafts", "num_accepted_tokens")])
    assert max(seen) > 4
    assert results[0] == results[1]
    assert results[0][0] == 4


def test_a_video_that_is_read_is_taken_before_its_turn(tmp_path: Path) -> None:
    from tests.cli.test_training_reading import check, jobs

    with DecodingPool(2, reader=PLACE) as pool:
        reader = TrainingReader(pool, start.ReadLimits(2), check)
        reader.begin(jobs(tmp_path, 5, bad=1))
        while len(reader.ready()) < 4:
            pass
        assert reader.ready() == [1, 2, 3, 4], "no failures"
        assert reader.has(0)
        assert isinstance(reader.take_ahead(3), Frames)
        assert reader.ready() == [1, 2, 4]
        assert isinstance(reader.peek(1), Frames)
        assert isinstance(reader.take(2), Frames)
        assert reader.ready() == [4]


@pytest.mark.parametrize("given", ["0", "1025", "many", "-1"])
def test_a_batch_size_that_makes_no_sense_is_refused(
    given: str, train: Train, videos: Path, tmp_path: Path
) -> None:
    said = run(train, videos, tmp_path / "head", given)
    assert (said.code, said.out) == (2, "")
    assert f"invalid --batch-size {given!r}; use auto, or a number from 1 to 1024" in said.err
    assert said.err.count("\n") == 1


def test_the_batch_size_may_change_between_starts(train: Train, videos: Path, tmp_path: Path) -> None:
    assert run(train, videos, tmp_path / "head", 2, max_steps=1).code == 0
    assert run(train, videos, tmp_path / "head", 4).code == 0
