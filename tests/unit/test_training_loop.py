"""The loop that trains heads: order, resuming at any step, checkpoints that are whole or not there, the best head."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from specvlm.captioner import Captioner
from specvlm.costs import CostStore
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel, read_config
from specvlm.errors import ConfigError, TrainingError
from specvlm.training import checkpoint, folder, trainer
from specvlm.training.checkpoint import Checkpoints
from specvlm.training.curve import curve
from specvlm.training.example import read_example
from specvlm.training.folder import CURVE, LOG, STATE, HeadFolder
from specvlm.training.learner import Learner
from specvlm.training.objective import Losses, ObjectiveSettings
from specvlm.training.order import Order, SampleTurn, noise_seed, shuffled
from specvlm.training.progress import Held, Measures, Progress
from specvlm.training.ranks import Alone
from specvlm.training.settings import Schedule, TrainingSettings
from specvlm.training.trainer import Ending, Learn, Trainer, TrainingParts
from tests.tiny import Size, random_frames, tiny_captioner

SAMPLES, TOKENS = 5, 10
SETTINGS = TrainingSettings(learning_rate=3e-3, accumulate=2, seed=7)
SCHEDULE = Schedule(epochs=3, evaluate_every=4, checkpoint_s=1e9)


class Silent:
    """A watcher that says nothing."""

    def began(self, step: int, total: int, progress: Progress) -> None: ...

    def learned(self, one: Measures | None) -> None: ...

    def stepped(self, step: int, progress: Progress) -> None: ...

    def evaluating(self) -> None: ...

    def evaluated(self, entry: dict[str, Any]) -> None: ...


@dataclass
class Clips:
    """A source of random clips, captioned beforehand; the last one is held out.

    Attributes:
        useless: Samples that are left out.
        visited: Positions, in order.
        before: Called before each visit.
        is_settled: Whether failures so far are for good.
    """

    teacher: Captioner
    pupil: Captioner | None = None
    useless: frozenset[int] = frozenset()
    visited: list[int] = field(default_factory=list)
    before: Callable[[SampleTurn], None] = lambda _: None
    is_settled: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        self.videos = [self.teacher.prepare(random_frames(i), "Hi.") for i in range(SAMPLES + 1)]
        self.captions = [self.teacher.caption(v, max_new_tokens=TOKENS).token_ids for v in self.videos]

    def begin(self, steps: range) -> None:
        self.visited = []

    def visit(self, place: SampleTurn | None, learn: Learn) -> Measures | None:
        assert place is not None
        self.before(place)
        self.visited.append(place.position)
        if place.sample in self.useless:
            return None
        inputs, tokens = self.videos[place.sample].inputs, self.captions[place.sample]
        return learn(read_example(self.teacher.target, inputs, tokens))

    def held_out(self, step: int) -> list[Held] | None:
        assert self.pupil is not None
        stats = self.pupil.caption(self.videos[-1], tree="dynamic", max_new_tokens=TOKENS).stats
        return [Held(stats.num_drafts, stats.num_accepted_tokens)]

    def settled(self) -> bool:
        return self.is_settled()

    def end(self) -> None:
        self.is_settled = lambda: True


@pytest.fixture(scope="module")
def clips() -> Clips:
    teacher = tiny_captioner("qwen", Size(seed=1), None)
    teacher.target.keep_features()
    return Clips(teacher)


@dataclass
class Run:
    """One start of a training."""

    ending: Ending
    learner: Learner
    source: Clips
    root: Path

    def weights(self) -> dict[str, torch.Tensor]:
        return self.learner.state()


def train(
    clips: Clips,
    root: Path,
    *,
    settings: TrainingSettings = SETTINGS,
    schedule: Schedule = SCHEDULE,
    objective: ObjectiveSettings | None = None,
    stop: Callable[[int], str | None] = lambda _: None,
    warn: Callable[[str], None] = pytest.fail,
    draw: Callable[[Any], bytes] = lambda _: b"",
    **changes: Any,
) -> Run:
    """Make a start; `stop` is asked with the steps taken so far. Curves take long, and are drawn once."""
    target = clips.teacher.target
    config = HeadConfig(
        "tiny", None, target.family.name, target.hidden_size, compressor=CompressorConfig(ratio=3.0)
    )
    head, in_use = (HeadModel.fresh(target, config, settings.seed) for _ in range(2))
    in_use.eval().requires_grad_(False)
    pupil = Captioner(
        target, clips.teacher.processor, HeadDraft(in_use, target), clips.teacher.info, clips.teacher.frames
    )
    pupil.costs = CostStore()
    source = replace(clips, pupil=pupil, **changes)
    (root / STATE).mkdir(parents=True, exist_ok=True)
    learner = Learner(head.train(), settings, Alone())
    parts = TrainingParts(target, learner, in_use, source, HeadFolder(root, warn), Alone(), Silent())
    order = Order(SAMPLES, settings.accumulate, settings.seed)
    loop = Trainer(
        parts, order, settings, objective or ObjectiveSettings(), schedule, lambda: stop(learner.steps)
    )
    with patch.object(folder, "curve", draw):
        return Run(loop.run(), learner, source, root)


def log_of(root: Path) -> list[dict[str, Any]]:
    """The log, without its times."""
    entries = [json.loads(line) for line in (root / LOG).read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("at", "trained_s")} for entry in entries]


def assert_same(one: Run, other: Run) -> None:
    """Bitwise the same weights, moments, log and kept head."""
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert log_of(one.root) == log_of(other.root)
    assert (one.root / "model.safetensors").read_bytes() == (other.root / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted training: 9 steps, the last of each epoch with a single sample."""
    return train(clips, tmp_path_factory.mktemp("whole"), draw=curve)


# --- order ---


def test_each_epoch_is_another_permutation_that_seed_and_epoch_decide() -> None:
    orders = {(seed, epoch): tuple(shuffled(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert orders[1, 1] == tuple(shuffled(50, 1, 1))


def test_no_step_reaches_over_the_end_of_an_epoch() -> None:
    order = Order(5, 2, 0)
    steps = [order.places(step) for step in range(6)]
    assert [len(places) for places in steps] == [2, 2, 1, 2, 2, 1]
    assert [place.position for places in steps for place in places] == list(range(10))
    assert sorted(place.sample for places in steps[:3] for place in places) == list(range(5))
    assert order.total_steps(Schedule(epochs=4)) == 12
    assert order.total_steps(Schedule(epochs=4, max_steps=7)) == 7


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_the_samples_of_each_step(ranks: int) -> None:
    order = Order(7, 3, 0)
    shares = [list(order.places_of(range(6), rank, ranks)) for rank in range(ranks)]
    every = sorted(place for share in shares for place in share)
    assert every == [place for step in range(6) for place in order.places(step)]


def test_noise_is_that_of_the_position() -> None:
    seeds = {noise_seed(seed, position) for seed in range(3) for position in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: TrainingSettings(learning_rate=0.0), "learning_rate=0.0 is out of range"),
        (lambda: TrainingSettings(accumulate=0), "accumulate=0 is out of range"),
        (lambda: TrainingSettings(clip_norm=0.0), "clip_norm=0.0 is out of range"),
        (lambda: TrainingSettings(seed=-1), "seed=-1 is out of range"),
        (lambda: Schedule(epochs=0), "epochs=0 is out of range"),
        (lambda: Schedule(evaluate_every=1.5), "evaluate_every=1.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: Schedule(checkpoint_s=float("nan")), "checkpoint_s=nan is out of range"),
    ],
)
def test_settings_are_checked(made: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        made()


# --- the loop ---


def test_a_training_learns_and_keeps_its_best_head(whole: Run, clips: Clips) -> None:
    log = log_of(whole.root)
    assert [entry["step"] for entry in log] == [0, 4, 8, 9]
    assert whole.ending.steps == whole.ending.total == 9
    assert whole.ending.progress.samples == 3 * SAMPLES
    assert log[0]["loss"] is None
    assert log[-1]["loss"] < log[1]["loss"]
    best = max(reversed(log), key=lambda entry: entry["mean_accepted_tokens"])
    kept = read_config(whole.root)
    assert kept.training["reached"]["step"] == best["step"]
    head = HeadModel.load(whole.root, clips.teacher.target)
    pupil = Captioner(
        clips.teacher.target,
        clips.teacher.processor,
        HeadDraft(head, clips.teacher.target),
        clips.teacher.info,
        clips.teacher.frames,
    )
    stats = pupil.caption(clips.videos[-1], tree="dynamic", max_new_tokens=TOKENS).stats
    assert stats.mean_accepted_tokens == best["mean_accepted_tokens"]
    with Image.open(whole.root / CURVE) as picture:
        assert picture.format == "PNG"
        assert picture.width > 400


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 9])
def test_a_training_that_was_cut_goes_on_as_if_it_had_not_been(
    cut: int, whole: Run, clips: Clips, tmp_path: Path
) -> None:
    first = train(clips, tmp_path, stop=lambda step: "SIGTERM" if step >= cut else None)
    assert first.ending.steps == cut
    assert first.ending.stopped == ("SIGTERM" if cut < 9 else None)
    rest = train(clips, tmp_path)
    assert_same(rest, whole)
    assert rest.source.visited == whole.source.visited[len(first.source.visited) :]


def test_the_result_does_not_depend_on_checkpoints_nor_on_where_a_step_was_cut(
    whole: Run, clips: Clips, tmp_path: Path
) -> None:
    """It dies in the middle of steps, between samples and while it writes, again and again."""

    class Died(BaseException):
        pass

    def die(place: SampleTurn) -> None:
        if place.position not in seen and place.position % 3 == 1:
            seen.add(place.position)
            raise Died

    seen: set[int] = set()
    often = replace(SCHEDULE, checkpoint_steps=1)
    deaths = 0
    while True:
        try:
            done = train(clips, tmp_path, schedule=often, before=die)
            break
        except Died:
            deaths += 1
    assert deaths == 5
    assert_same(done, whole)


def test_a_step_that_stopping_cuts_in_two_is_not_taken(clips: Clips, tmp_path: Path, whole: Run) -> None:
    asked = iter([None, None, None, "SIGUSR1"])
    first = train(clips, tmp_path, stop=lambda _: next(asked, "SIGUSR1"))
    assert first.ending.stopped == "SIGUSR1"
    assert (first.ending.steps, len(first.source.visited)) == (1, 3)
    assert_same(train(clips, tmp_path), whole)


def test_more_epochs_go_on_from_fewer(whole: Run, clips: Clips, tmp_path: Path) -> None:
    train(clips, tmp_path, schedule=replace(SCHEDULE, epochs=1))
    longer = train(clips, tmp_path)
    ours, theirs = longer.weights(), whole.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [entry["step"] for entry in log_of(tmp_path)] == [0, 3, 4, 8, 9]


def test_samples_that_are_left_out_are_not_counted(clips: Clips, tmp_path: Path) -> None:
    """A step's gradient is the mean over those that are there; a step without any changes nothing."""
    order = Order(SAMPLES, SETTINGS.accumulate, SETTINGS.seed)
    lone = order.places(2)[0].sample
    schedule = replace(SCHEDULE, epochs=1, evaluate_every=100)
    before = train(clips, tmp_path / "a", schedule=replace(schedule, max_steps=2), useless=frozenset({lone}))
    after = train(clips, tmp_path / "a", schedule=schedule, useless=frozenset({lone}))
    assert after.ending.steps == 3
    assert after.ending.progress.samples == before.ending.progress.samples == 4
    assert all(torch.equal(value, before.weights()[name]) for name, value in after.weights().items())


def test_the_gradient_of_a_step_is_the_mean_of_its_samples(clips: Clips, tmp_path: Path) -> None:
    """A step over one sample, left out the other, is the step over that sample alone."""
    place, other = Order(SAMPLES, 2, SETTINGS.seed).places(0)
    one = train(
        clips, tmp_path / "a", schedule=replace(SCHEDULE, max_steps=1), useless=frozenset({other.sample})
    )
    alone = Order(SAMPLES, 1, SETTINGS.seed).places(0)[0]
    assert alone == place
    two = train(
        clips,
        tmp_path / "b",
        settings=replace(SETTINGS, accumulate=1),
        schedule=replace(SCHEDULE, max_steps=1),
    )
    assert all(torch.equal(value, two.weights()[name]) for name, value in one.weights().items())


def test_evaluating_changes_nothing(whole: Run, clips: Clips, tmp_path: Path) -> None:
    torch.manual_seed(99)
    often = train(clips, tmp_path, schedule=replace(SCHEDULE, evaluate_every=1))
    ours, theirs = often.weights(), whole.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(log_of(tmp_path)) == 10


def test_settings_change_what_is_learned(whole: Run, clips: Clips, tmp_path: Path) -> None:
    """Seed, clipping, rate and loss all reach the weights; else a flag would do nothing."""
    short = replace(SCHEDULE, max_steps=2, evaluate_every=100)
    plain = train(clips, tmp_path / "plain", schedule=short)
    others = {
        "seed": train(clips, tmp_path / "seed", schedule=short, settings=replace(SETTINGS, seed=8)),
        "clip": train(clips, tmp_path / "clip", schedule=short, settings=replace(SETTINGS, clip_norm=1e-3)),
        "rate": train(
            clips, tmp_path / "rate", schedule=short, settings=replace(SETTINGS, learning_rate=1e-4)
        ),
        "l1": train(clips, tmp_path / "l1", schedule=short, objective=ObjectiveSettings(smooth_l1=0.5)),
        "ce": train(clips, tmp_path / "ce", schedule=short, objective=ObjectiveSettings(cross_entropy=0.5)),
        "unroll": train(clips, tmp_path / "unroll", schedule=short, objective=ObjectiveSettings(unroll=2)),
    }
    for name, other in others.items():
        same = [torch.equal(value, other.weights()[key]) for key, value in plain.weights().items()]
        assert not all(same), name


def test_a_loss_that_is_not_finite_ends_it_in_one_line(
    clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Run
) -> None:
    """What was reached before stands in the checkpoint."""
    original, calls = trainer.distillation_loss, iter(range(100))

    def spoilt(*arguments: Any) -> Losses:
        losses = original(*arguments)
        return losses._replace(total=losses.total * float("nan")) if next(calls) == 5 else losses

    monkeypatch.setattr(trainer, "distillation_loss", spoilt)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan; give a lower --learning-rate"):
        train(clips, tmp_path, schedule=replace(SCHEDULE, checkpoint_steps=1))
    assert Checkpoints(tmp_path / STATE).peek()[0] == 3  # type: ignore[index]
    monkeypatch.undo()
    assert_same(train(clips, tmp_path), whole)


def test_a_gradient_that_is_not_finite_is_no_step(
    clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Run
) -> None:
    """Of a loss that is; what was reached before stands in the checkpoint."""
    original, calls = Learner.gradient, iter(range(100))

    def spoilt(self: Learner, loss: torch.Tensor) -> Any:
        parts = original(self, loss)
        spoils = next(calls) == 5
        return [None if part is None else part * float("nan") if spoils else part for part in parts]

    monkeypatch.setattr(Learner, "gradient", spoilt)
    with pytest.raises(
        TrainingError, match=r"step 4: the norm of the gradient is nan; give a lower --learning"
    ):
        train(clips, tmp_path, schedule=replace(SCHEDULE, checkpoint_steps=1))
    assert Checkpoints(tmp_path / STATE).peek()[0] == 3  # type: ignore[index]
    monkeypatch.undo()
    assert_same(train(clips, tmp_path), whole)


def test_weights_that_are_not_finite_are_not_kept(clips: Clips, tmp_path: Path) -> None:
    settings = replace(SETTINGS, learning_rate=1.0)
    object.__setattr__(settings, "learning_rate", float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: a weight is not finite; give a lower --learning-rate"):
        train(clips, tmp_path, settings=settings, schedule=replace(SCHEDULE, checkpoint_steps=1))
    assert Checkpoints(tmp_path / STATE).peek()[0] == 0  # type: ignore[index]


def test_no_checkpoint_builds_on_samples_that_may_be_tried_again(
    clips: Clips, tmp_path: Path, whole: Run
) -> None:
    """From the second step on nothing is settled; the next start does those steps over again."""
    often = replace(SCHEDULE, checkpoint_steps=1)
    first = train(
        clips,
        tmp_path,
        schedule=often,
        useless=frozenset(range(SAMPLES)),
        is_settled=iter([True] * 2 + [False] * 20).__next__,
        stop=lambda step: "SIGTERM" if step >= 6 else None,
    )
    assert (first.learner.steps, first.ending.steps) == (6, 1)
    assert Checkpoints(tmp_path / STATE).peek()[0] == 1  # type: ignore[index]


# --- bfloat16 ---


def test_a_head_in_bfloat16_has_float32_masters(clips: Clips) -> None:
    target = clips.teacher.target
    config = HeadConfig("tiny", None, target.family.name, target.hidden_size)
    head = HeadModel.fresh(target, config, 0).to(torch.bfloat16)
    learner = Learner(head, replace(SETTINGS, learning_rate=1e-5), Alone())
    weight = head.join.weight
    before = weight.detach().clone()
    for _ in range(40):  # each too small for bfloat16
        learner.add([torch.ones_like(one) for one in head.parameters()])
        learner.step(1)
    state = learner.state()
    assert state["head.join.weight"].dtype == torch.float32
    assert torch.equal(state["head.join.weight"].bfloat16(), weight)
    assert torch.allclose(state["head.join.weight"], before.float() - 40e-5, atol=2e-5)
    again = Learner(HeadModel.fresh(target, config, 1).to(torch.bfloat16), SETTINGS, Alone())
    again.restore(state, 40)
    assert all(torch.equal(value, state[name]) for name, value in again.state().items())


# --- checkpoints ---


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, {"fact": step}, {"weight": torch.full((3,), float(step))})


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() == (None, [])
    for step in (0, 4, 4, 9):
        save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000003", "checkpoint-00000004"]
    found, damaged = checkpoints.newest()
    assert found is not None
    assert (found.step, found.facts, damaged) == (9, {"fact": 9}, [])
    assert torch.equal(found.tensors["weight"], torch.full((3,), 9.0))
    assert checkpoints.peek() == (9, {"fact": 9})


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "flipped"])
def test_damage_is_seen_and_the_one_before_is_used(file: str, how: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    path = tmp_path / "checkpoint-00000002" / file
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    found, damaged = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert len(damaged) == 1
    assert damaged[0].startswith("checkpoint-00000002: ")
    save(checkpoints, 3)
    found, damaged = checkpoints.newest()
    assert found is not None
    assert (found.step, damaged) == (3, [])


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies at each operation on files in turn."""

    class Died(BaseException):
        pass

    def dying(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, operation)

    left = [10**9]
    dying(checkpoint, "save")
    dying(os, "fsync")
    dying(os, "replace")
    dying(checkpoint.shutil, "rmtree")
    for owner, name in ((Path, "write_bytes"), (Path, "mkdir"), (Path, "write_text")):
        dying(owner, name)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    deaths, step = 0, 3
    for most in range(40):
        left[0] = most
        try:
            save(checkpoints, step)
            died = False
        except Died:
            died = True
            deaths += 1
        left[0] = 10**9
        found, damaged = checkpoints.newest()
        assert found is not None
        assert damaged == []
        assert found.step in ((step - 1, step) if died else (step,))
        assert torch.equal(found.tensors["weight"], torch.full((3,), float(found.step)))
        step = found.step + 1
    assert deaths > 5


def test_a_training_says_which_checkpoint_it_goes_on_from(clips: Clips, tmp_path: Path, whole: Run) -> None:
    train(clips, tmp_path, stop=lambda step: "SIGTERM" if step >= 6 else None)
    newest = max((tmp_path / STATE).glob("checkpoint-*"))
    path = newest / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    said: list[str] = []
    assert_same(train(clips, tmp_path, warn=said.append), whole)
    assert said == [
        f"{newest.name}: state.safetensors is not the file that was written; going on from step 4"
    ]


def test_without_a_whole_checkpoint_it_does_not_begin_anew(clips: Clips, tmp_path: Path) -> None:
    train(clips, tmp_path, schedule=replace(SCHEDULE, max_steps=1))
    for path in (tmp_path / STATE).glob("checkpoint-*/state.json"):
        path.write_text("{")
    with pytest.raises(TrainingError, match=r"no checkpoint is whole .*; train in another folder"):
        train(clips, tmp_path)


@pytest.mark.parametrize("kind", ["FIFO", "link", "file", "odd name"])
def test_what_somebody_put_beside_the_checkpoints_is_not_touched(kind: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "state", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "diary.txt").write_text("dear diary")
    planted = folder / ("checkpoint-latest" if kind == "odd name" else "checkpoint-00000007")
    match kind:
        case "FIFO":
            os.mkfifo(planted)
        case "link":
            planted.symlink_to(outside)
        case "file":
            planted.write_text("x")
        case _:
            planted.mkdir()
    os.mkfifo(folder / "checkpoint-00000001.part")
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert checkpoints.peek() == (3, {"fact": 3})
    found, damaged = checkpoints.newest()
    assert found is not None
    assert (found.step, damaged) == (3, [])
    assert os.path.lexists(planted)
    assert (outside / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_checkpoint_that_is_a_fifo_is_damaged(file: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    (tmp_path / "checkpoint-00000001" / file).unlink()
    os.mkfifo(tmp_path / "checkpoint-00000001" / file)
    assert checkpoints.newest() == (None, ["checkpoint-00000001: not a regular file"])
