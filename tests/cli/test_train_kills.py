"""Trainings that are killed, signalled and started again: the same weights, bitwise, as if nothing had been.

And trainings of two processes, as `torchrun`, or accelerate's launcher for several GPUs, starts them.
"""

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
from tests.cli.train_drive import TrainDriver
from tests.ports import free_ports
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
        learning = ["--accumulate", 2, "--epochs", 4, "--learning-rate", 1e-3, "--seed", 3]
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
    with sqlite3.connect(out / ".specvlm" / "left-out.db") as database:
        left = database.execute("SELECT video, prompt, since FROM left_out ORDER BY video").fetchall()
    weights = load_file(newest / "state.safetensors")
    return State(told["step"], weights, log, (out / "model.safetensors").read_bytes(), captions, left)


def assert_same(one: State, other: State) -> None:
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    assert (one.step, one.log, one.kept) == (other.step, other.log, other.kept)
    assert (one.captions, one.left_out) == (other.captions, other.left_out)


@pytest.fixture(scope="module")
def whole(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> State:
    """An uninterrupted training."""
    out = tmp_path_factory.mktemp("whole") / "head"
    assert ground.run(out) == 3, out.with_suffix(".err").read_text()
    state = state_of(out)
    assert state.step == 12
    assert [entry["step"] for entry in state.log] == [0, 4, 8, 12]
    assert len(state.captions) == 4
    assert len(state.left_out) == 1
    return state


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob(".specvlm/checkpoint-*[0-9]"))


def newest(out: Path) -> int:
    """Return the number of the newest checkpoint; 0: there is none. Two are kept, and their names count up."""
    names = checkpoints(out)
    return int(names[-1][-8:]) if names else 0


def killed(ground: Ground, out: Path, kills: int, chance: random.Random) -> int:
    """Kill a training at random moments, a few steps after each start; return how often it was before it ended.

    How far it gets is counted in checkpoints, so a busy machine changes nothing.
    """
    for done in range(kills):
        process = ground.driver.start(ground.arguments(out), out.with_suffix(".err"))
        wanted = newest(out) + chance.randrange(3)
        while (code := ground.driver.wait(process, 0.0)) is None and newest(out) < wanted:
            time.sleep(0.002)
        delay_s = chance.choice([chance.uniform(0.0, 0.05), chance.uniform(0.0, 0.8)])
        if code is None:
            code = ground.driver.wait(process, delay_s)
        if code is None:
            os.killpg(process, signal.SIGKILL)
            code = ground.driver.wait(process)
        # It may end by itself, also just before it is killed.
        if code != -signal.SIGKILL:
            assert code == 3, out.with_suffix(".err").read_text()
            return done
    return kills


def test_six_kills_change_no_bit(ground: Ground, whole: State, tmp_path: Path) -> None:
    chance, kills, trainings = random.Random(5), 0, 0
    while kills < 6:
        out = tmp_path / f"head{trainings}"
        kills += killed(ground, out, 6 - kills, chance)
        assert ground.run(out) in (0, 3), out.with_suffix(".err").read_text()
        assert_same(state_of(out), whole)
        trainings += 1
    assert trainings <= 3, "it was killed several times in a life"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_kills_change_no_bit(seed: int, ground: Ground, whole: State, tmp_path: Path) -> None:
    out = tmp_path / "head"
    killed(ground, out, 10, random.Random(seed))
    assert ground.run(out) in (0, 3)
    assert_same(state_of(out), whole)


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGUSR1, signal.SIGUSR2)], ids=str
)
def test_signals_stop_with_a_checkpoint(
    numbers: tuple[signal.Signals, ...], ground: Ground, whole: State, tmp_path: Path
) -> None:
    """One after the other in the life of a training, which ends as if there had been none."""
    out, told, step = tmp_path / "head", tmp_path / "told", 0
    for number in numbers:
        told.unlink(missing_ok=True)
        before, end_s = newest(out), time.monotonic() + 60
        process = ground.driver.start(ground.arguments(out), told)
        while newest(out) < before + 2:  # the first may be of no whole step
            assert time.monotonic() < end_s, told.read_text()
            time.sleep(0.005)
        os.kill(process, number)
        assert ground.driver.wait(process) == STOPPED, told.read_text()
        assert f"stopped by {number.name}, start again to resume" in told.read_text()
        state = json.loads((out / ".specvlm" / checkpoints(out)[-1] / "state.json").read_text())
        assert step < state["step"] < 12
        step = state["step"]
        assert (out / ".specvlm" / "lock").read_text() == ""
    assert ground.run(out) == 3
    assert_same(state_of(out), whole)


def test_two_trainings_never_share_a_folder(ground: Ground, tmp_path: Path) -> None:
    out = tmp_path / "head"
    arguments = ground.arguments(out, "--epochs", 400)  # so that it does not end meanwhile
    process = ground.driver.start(arguments, out.with_suffix(".err"))
    while not list(out.glob(".specvlm/train.json")):
        assert ground.driver.wait(process, 0.005) is None, out.with_suffix(".err").read_text()
    assert ground.driver.run(arguments, tmp_path / "second.err") == STOPPED
    assert f"{out} is in use by process {process}" in (tmp_path / "second.err").read_text()
    os.kill(process, signal.SIGTERM)
    assert ground.driver.wait(process) == STOPPED, out.with_suffix(".err").read_text()


def test_what_is_over_the_time_stops(ground: Ground, whole: State, tmp_path: Path) -> None:
    """With hardly any time it stops as soon as it could, and with enough it goes on to the end."""
    out = tmp_path / "head"
    assert ground.run(out, "--max-runtime", "0.3s") == STOPPED
    assert "stopped by max-runtime, start again to resume" in out.with_suffix(".err").read_text()
    assert ground.run(out, "--max-runtime", "1h") == 3
    assert_same(state_of(out), whole)


def test_a_truncated_checkpoint_is_seen(ground: Ground, whole: State, tmp_path: Path) -> None:
    out = tmp_path / "head"
    assert ground.run(out, "--max-steps", 6) == 3
    newest = max((out / ".specvlm").glob("checkpoint-*[0-9]"))
    path = newest / "state.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert ground.run(out) == 3
    assert f"{newest.name}: state.safetensors is not the file that was written; going on from step" in (
        out.with_suffix(".err").read_text()
    )
    ours, theirs = state_of(out), whole
    assert all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())


def launched(ground: Ground, out: Path, *more: object) -> list[int]:
    """Start two processes of one training, with the variables that torchrun sets, on the CPU."""
    (port,) = free_ports(1)
    return [
        ground.driver.start(
            ground.arguments(out, *more),
            out.with_suffix(f".err{rank}"),
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            LOCAL_WORLD_SIZE=2,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_USE_CPU="true",  # where there is a GPU too
        )
        for rank in range(2)
    ]


def test_two_processes_average_their_gradients(ground: Ground, whole: State, tmp_path: Path) -> None:
    """Sums in another order round otherwise, so it is not bitwise; what is told is the same."""
    out = tmp_path / "head"
    codes = [ground.driver.wait(process) for process in launched(ground, out)]
    assert codes == [3, 3], out.with_suffix(".err0").read_text()
    state = state_of(out)
    for name, value in whole.weights.items():
        if name.startswith("head."):
            assert (value - state.weights[name]).abs().mean() < 2e-5, name
    assert (state.captions, state.left_out) == (whole.captions, whole.left_out)
    assert [entry["samples"] for entry in state.log] == [entry["samples"] for entry in whole.log]
    assert [entry["num_drafts"] > 0 for entry in state.log] == [True] * 4
    assert [out.with_suffix(f".err{rank}").read_text().count("left out: ") for rank in range(2)] == [1, 0]


def test_a_signal_to_one_process_stops_both(ground: Ground, whole: State, tmp_path: Path) -> None:
    out = tmp_path / "head"
    processes = launched(ground, out)
    end_s = time.monotonic() + 60
    while not list(out.glob(".specvlm/checkpoint-00000003")):
        assert time.monotonic() < end_s, out.with_suffix(".err0").read_text()
        time.sleep(0.005)
    os.kill(processes[1], signal.SIGTERM)
    assert [ground.driver.wait(process) for process in processes] == [STOPPED, STOPPED]
    assert ground.run(out) == 3, "one process goes on from what two have done"
    assert state_of(out).captions == whole.captions
