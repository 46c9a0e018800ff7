"""Trainings that are killed, signalled and started again: the same weights, bitwise, as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_real import save
from tests.cli.train_drive import ROOT, TrainDriver
from tests.tiny import Size
from tests.video_files import write_video

STOPPED = 75


@dataclass
class Ground:
    """A target, videos, and a process that makes starts."""

    driver: TrainDriver
    target: Path
    videos: Path

    def arguments(self, out: Path, *more: object) -> list[object]:
        """A training of 12 steps on five videos, one of them held out and one broken."""
        flags = ["--target", self.target, "--draft", "none", "-o", out, "-q", "--checkpoint-every", 1]
        learning = ["--accumulate", 2, "--epochs", 6, "--learning-rate", 1e-3, "--seed", 3]
        looks = ["--evaluate-every", 4, "--held-out", 0.2, "--max-new-tokens", 8, "--num-frames", 4]
        return ["train", self.videos, *flags, *learning, *looks, "--prompt", "What is it?", *more]

    def run(self, out: Path, *more: object) -> int | None:
        return self.driver.run(self.arguments(out, *more), out.with_suffix(".err"))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("train")
    target = save(root / "target", "qwen", Size(seed=1))
    videos = root / "videos"
    videos.mkdir()
    for number in range(5):
        write_video(videos / f"{number}.mp4", frames=12 + 6 * number)
    (videos / "broken.mp4").write_text("no video")
    with TrainDriver(target) as driver:
        yield Ground(driver, target, videos)


@dataclass
class State:
    """All that two trainings of the same settings have in common."""

    step: int
    weights: dict[str, torch.Tensor]
    log: list[dict[str, Any]]
    kept: bytes
    captions: list[tuple[Any, ...]]
    left_out: list[tuple[Any, ...]]


def state_of(out: Path) -> State:
    newest = max((out / ".specvlm").glob("checkpoint-*[0-9]"))
    told = json.loads((newest / "state.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in told["facts"]["log"]] == [entry["step"] for entry in log]
    for entry in log:
        del entry["at"], entry["trained_s"]
    with sqlite3.connect(out / ".specvlm" / "captions.db") as database:
        captions = database.execute("SELECT * FROM caption ORDER BY key").fetchall()
        left = database.execute("SELECT video, prompt, since FROM left_out ORDER BY video").fetchall()
    weights = load_file(newest / "state.safetensors")
    return State(told["step"], weights, log, (out / "model.safetensors").read_bytes(), captions, left)


def assert_same(one: State, other: State) -> None:
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    assert (one.step, one.log, one.kept) == (other.step, other.log, other.kept)
    assert (one.captions, one.left_out) == (other.captions, other.left_out)


@pytest.fixture(scope="module")
def whole(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, float]:
    """An uninterrupted training, and what it took."""
    out = tmp_path_factory.mktemp("whole") / "head"
    began_s = time.monotonic()
    assert ground.run(out) == 3, out.with_suffix(".err").read_text()
    took_s = time.monotonic() - began_s
    state = state_of(out)
    assert state.step == 12
    assert [entry["step"] for entry in state.log] == [0, 4, 8, 12]
    assert len(state.captions) == 4
    assert len(state.left_out) == 1
    return state, took_s


def killed(ground: Ground, out: Path, kills: int, took_s: float, chance: random.Random) -> int:
    """Kill a training at random moments of its life, until it has been often enough; return how often it was."""
    done = 0
    while done < kills:
        process = ground.driver.start(ground.arguments(out), out.with_suffix(".err"))
        code = ground.driver.wait(process, chance.uniform(0.1, 1.0) * took_s)
        if code is not None:  # it was at its end before
            assert code == 3, out.with_suffix(".err").read_text()
            break
        os.killpg(process, signal.SIGKILL)
        assert ground.driver.wait(process) == -signal.SIGKILL
        done += 1
    return done


def test_ten_kills_change_no_bit(ground: Ground, whole: tuple[State, float], tmp_path: Path) -> None:
    state, took_s = whole
    chance, kills, round_ = random.Random(5), 0, 0
    while kills < 10:
        out = tmp_path / f"head{round_}"
        # Shorter lives than a whole training's, so that one training is killed several times.
        kills += killed(ground, out, 10 - kills, 0.6 * took_s, chance)
        assert ground.run(out) in (0, 3), out.with_suffix(".err").read_text()
        assert_same(state_of(out), state)
        round_ += 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_kills_change_no_bit(
    seed: int, ground: Ground, whole: tuple[State, float], tmp_path: Path
) -> None:
    state, took_s = whole
    out = tmp_path / "head"
    killed(ground, out, 10, 0.4 * took_s, random.Random(seed))
    assert ground.run(out) in (0, 3)
    assert_same(state_of(out), state)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_with_a_checkpoint(
    number: signal.Signals, ground: Ground, whole: tuple[State, float], tmp_path: Path
) -> None:
    out = tmp_path / "head"
    process = ground.driver.start(ground.arguments(out), out.with_suffix(".err"))
    end_s = time.monotonic() + 60
    while not list(out.glob(".specvlm/checkpoint-00000003")):
        assert time.monotonic() < end_s, out.with_suffix(".err").read_text()
        time.sleep(0.005)
    os.kill(process, number)
    assert ground.driver.wait(process) == STOPPED
    said = out.with_suffix(".err").read_text()
    assert f"stopped by {number.name}, start again to go on" in said
    newest = max((out / ".specvlm").glob("checkpoint-*[0-9]"))
    assert 1 < json.loads((newest / "state.json").read_text())["step"] < 12
    assert (out / ".specvlm" / "lock").read_text() == ""
    assert ground.run(out) == 3
    assert_same(state_of(out), whole[0])


def test_two_trainings_never_share_a_folder(ground: Ground, tmp_path: Path) -> None:
    out = tmp_path / "head"
    process = ground.driver.start(ground.arguments(out), out.with_suffix(".err"))
    while not list(out.glob(".specvlm/train.json")):
        time.sleep(0.005)
    assert ground.driver.run(ground.arguments(out), tmp_path / "second.err") == STOPPED
    assert f"{out} is in use by process {process}" in (tmp_path / "second.err").read_text()
    os.kill(process, signal.SIGTERM)
    assert ground.driver.wait(process) == STOPPED


def test_what_is_over_the_time_stops(ground: Ground, whole: tuple[State, float], tmp_path: Path) -> None:
    out = tmp_path / "head"
    starts = 0
    while (code := ground.run(out, "--max-runtime", f"{whole[1] / 2:.2f}s")) == STOPPED:
        starts += 1
        assert starts < 50
    assert code == 3
    assert starts >= 1
    assert_same(state_of(out), whole[0])


def test_a_truncated_checkpoint_is_seen(ground: Ground, whole: tuple[State, float], tmp_path: Path) -> None:
    out = tmp_path / "head"
    assert ground.run(out, "--max-steps", 6) == 3
    newest = max((out / ".specvlm").glob("checkpoint-*[0-9]"))
    path = newest / "state.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert ground.run(out) == 3
    assert f"{newest.name}: state.safetensors is not the file that was written; going on from step" in (
        out.with_suffix(".err").read_text()
    )
    ours, theirs = state_of(out), whole[0]
    assert all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())


def test_the_repository_is_where_it_was() -> None:
    """Starts work where their folders are."""
    assert not list(ROOT.glob("log.jsonl"))
