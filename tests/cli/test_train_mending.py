"""`specvlm train` where its folder was damaged, is in use, or is given to something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specvlm.drafts.head_model import read_config
from specvlm.training.checkpoint import Checkpoints
from specvlm_cli import app
from specvlm_cli.run.lock import take
from specvlm_cli.training import start
from tests.cli.conftest import snapshot
from tests.cli.test_train import Train, log_of, models, out, train, videos

__all__ = ["models", "out", "train", "videos"]  # fixtures


def spoil(out: Path, what: str) -> None:
    """Damage the head in a folder, in one of the ways in which copying or a disk does."""
    path = out / what.partition(" ")[2]
    if what.startswith("no "):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def log_says_best(out: Path, step: int) -> None:
    """Have the newest checkpoint say that the head of a step guessed more than any other."""
    path = max((out / ".specvlm").glob("checkpoint-*[0-9]")) / "state.json"
    told = json.loads(path.read_text())
    for entry in told["facts"]["log"]:
        entry["mean_accepted_tokens"] = 3.0 if entry["step"] == step else 1.0
    path.write_text(json.dumps(told))


def test_a_damaged_head_of_a_finished_training_is_made_again(train: Train, videos: Path, out: Path) -> None:
    assert train(videos, "-o", out, held_out=0).code == 0
    names = ("model.safetensors", "config.json")
    before = {name: (out / name).read_bytes() for name in names}
    for how, name in [(how, name) for how in ("no", "half") for name in names]:
        spoil(out, f"{how} {name}")
        said = train(videos, "-o", out, held_out=0)
        assert (said.code, said.json["steps"], said.json["captions"]) == (0, 3, 0), said.err
        assert f"cannot read the head's {name} (" in said.err
        assert "the folder has the head of step 3 now" in said.err
        assert {name: (out / name).read_bytes() for name in names} == before
    assert "nothing to do" in train(videos, "-o", out, held_out=0).err


def test_a_head_whose_weights_are_gone_is_refused_in_one_line(train: Train, videos: Path, out: Path) -> None:
    """The best was an earlier one, so no checkpoint has it."""
    assert train(videos, "-o", out).code == 0
    log_says_best(out, 0)
    spoil(out, "no model.safetensors")
    before = snapshot(out)
    said = train(videos, "-o", out)
    assert (said.code, said.out) == (1, "")
    assert "the newest checkpoint is of a later step; train in another folder, where a copy of " in said.err
    assert said.err.count("\n") == 1
    assert snapshot(out) == before


def test_a_training_that_goes_on_has_a_head_again(train: Train, videos: Path, out: Path) -> None:
    assert train(videos, "-o", out, max_steps=1).code == 0
    log_says_best(out, 0)
    spoil(out, "half model.safetensors")
    at_one = Checkpoints(out / ".specvlm").newest().checkpoint
    assert at_one is not None
    reached = at_one.facts["log"][-1]
    assert reached["step"] == 1
    log_says_best(out, 0)  # with a figure that none will have again
    said = train(videos, "-o", out)
    assert said.code == 0
    assert "the folder has the head of step 1 now, until a better one comes" in said.err
    assert [entry["step"] for entry in log_of(out)] == [0, 1, 2]
    assert read_config(out).training["reached"] == reached
    kept = load_file(out / "model.safetensors")
    assert all(torch.equal(at_one.tensors[f"head.{name}"], value) for name, value in kept.items())


@pytest.mark.parametrize("device", ["cuda:77", "xpu:77"])
def test_a_device_that_is_not_there_leaves_nothing_behind(
    device: str, train: Train, videos: Path, out: Path
) -> None:
    said = train(videos, "-o", out, head_device=device)
    assert (said.code, said.out) == (2, "")
    assert f"--head-device {device}: there is none here" in said.err
    assert said.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("learning-rate", "nan"),
        ("cross-entropy", "nan"),
        ("smooth-l1", "inf"),
        ("compression-ratio", "nan"),
        ("queries", "0"),
        ("checkpoint-every", "0"),
        ("checkpoint-every", "999999d"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_flag(
    flag: str, value: str, train: Train, videos: Path, out: Path
) -> None:
    assert app.main(["train", str(videos), "-o", str(out), f"--{flag}", value]) == 2
    told = train.capfd.readouterr().err
    assert f"--{flag} {value} is out of range" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "told", ['{"settings": [], "resolved": {}}', "[]", "{}", '{"settings": {}, "resolved": 1}']
)
def test_settings_of_other_kinds_are_one_line(told: str, train: Train, videos: Path, out: Path) -> None:
    (out / ".specvlm").mkdir(parents=True)
    (out / ".specvlm" / "train.json").write_text(told)
    said = train(videos, "-o", out)
    assert (said.code, said.out) == (1, "")
    assert "train.json cannot be read (" in said.err
    assert said.err.rstrip().endswith("train in another folder")
    assert said.err.count("\n") == 1


def test_settings_of_a_start_that_was_refused_are_not_kept(train: Train, videos: Path, out: Path) -> None:
    said = train(videos, "-o", out, dtype="float16")
    assert said.code == 2
    assert not (out / ".specvlm" / "train.json").exists()
    assert train(videos, "-o", out, accumulate=1).code == 0


def test_captions_do_not_go_into_the_folder_of_a_head(train: Train, videos: Path, out: Path) -> None:
    assert train(videos, "-o", out).code == 0
    before = snapshot(out)
    for more in ([], ["-n"]):
        assert app.main(["caption", str(videos), "-o", str(out), *more]) == 2
        told = train.capfd.readouterr().err
        assert f"{out} is the folder of a trained head; give it with --draft, and another with -o" in told
    assert snapshot(out) == before


def test_fewer_steps_than_were_done(train: Train, videos: Path, out: Path) -> None:
    assert train(videos, "-o", out, epochs=2).code == 0
    said = train(videos, "-o", out, max_steps=1)
    assert (said.code, said.json["steps"]) == (0, 4)
    assert "nothing to do: 4 steps are done, and 1 were asked for" in said.err
    assert "4 steps of 1" not in said.err


def test_a_start_that_skips_says_so(train: Train, videos: Path, out: Path) -> None:
    (out / ".specvlm").mkdir(parents=True)
    with take(out / ".specvlm" / "lock", "other"):
        said = train(videos, "-o", out, if_locked="skip")
    assert (said.code, said.json["stopped"]) == (0, "locked")
    assert "skipped: another start is at work there" in said.err
    assert "start again to resume" not in said.err


def test_a_start_that_waited_asks_again_whether_it_is_finished(
    train: Train, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other start ends the training while this one waits; nothing is loaded then."""
    assert train(videos, "-o", out, max_steps=1).code == 0
    when_free = start.when_free

    def waited(*given: Any) -> object:
        monkeypatch.setattr(start, "when_free", when_free)
        assert train(videos, "-o", out).json["steps"] == 2
        monkeypatch.setattr(start.engine, "load_captioner", None)
        return when_free(*given)

    monkeypatch.setattr(start, "when_free", waited)
    said = train(videos, "-o", out, if_locked="wait")
    assert (said.code, said.json["steps"]) == (0, 2)
    assert "nothing to do: 2 steps are done" in said.err
