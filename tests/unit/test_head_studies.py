"""The studies of trained heads in small: equal training, resuming, figures, and tables that hold what was measured."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("head_study", "head_scaling", "head_compressors")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


def options(work: Path, **chosen: Any) -> argparse.Namespace:
    """Of a study of two steps."""
    small = {
        "preset": "demo",
        "learning_rate": 3e-3,
        "accumulate": 2,
        "unroll": 1,
        "threads": None,
        "clips": 4,
    }
    return argparse.Namespace(**small | {"work": work, "figures": work / "figures"} | chosen)


@pytest.fixture(scope="module")
def scaling(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole study of longer training, in small, and its options."""
    some = {"units": [1, 2], "seeds": [3], "unit_steps": 1, "held_out": 1, "turns": 1}
    asked = options(tmp_path_factory.mktemp("scaling"), compressor="none", ratio=5.0, **some)
    world = scripts.head_study.World.load("demo", asked.work)
    scripts.head_scaling.SQUARE_CLIPS = scripts.head_study.SQUARE_CLIPS._replace(limit=18)
    return SimpleNamespace(world=world, asked=asked, said=scripts.head_scaling.report(world, asked))


def test_longer_training_is_told_for_every_seed_and_unit(scaling: Any) -> None:
    said = scaling.said
    assert [(one["seed"], one["units"]) for one in said["heads"]] == [(3, 1), (3, 2)]
    for one in (*said["heads"], said["small draft"]):
        assert all(0 <= value <= 16 for value in one["accepted"].values())
        assert all(value > 0 for value in one["speedup"].values())
    assert said["small draft"]["accepted"]["chain"] > 1
    text = (scaling.asked.work / "scaling.md").read_text()
    assert [line.split(" |")[0] for line in text.splitlines()[4:]] == [
        "| 1 unit",
        "| 2 units",
        "| small draft",
    ]
    assert f"{said['small draft']['accepted']['dynamic']:.2f}" in text
    assert (scaling.asked.figures / "head-scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_of_other_settings_is_not_gone_on_with(scripts: Any, scaling: Any) -> None:
    other = argparse.Namespace(**{**vars(scaling.asked), "learning_rate": 1e-3})
    with pytest.raises(SystemExit, match="another --work"):
        scripts.head_scaling.train(scaling.world, other)


def weights(trainees: list[Any]) -> list[torch.Tensor]:
    return [weight for one in trainees for weight in one.learner.head.state_dict().values()]


@pytest.mark.slow
def test_heads_of_a_study_gone_on_with_are_those_of_one_run_through(
    scripts: Any, scaling: Any, tmp_path: Path
) -> None:
    study = scripts.head_study

    def trainees(pool: Any) -> list[Any]:
        target = world.captioner.target
        heads = {
            name: study.HeadModel.fresh(target, world.head_config(study.compressor_named(name, 5.0)), 0)
            for name in ("select", "conv")
        }
        training, objective = study.training_of(asked, 0), study.objective_of(asked)
        return [study.Trainee(name, head, pool, training, objective) for name, head in heads.items()]

    asked = scaling.asked
    ends = []
    for folder, halts in (("through", (3,)), ("resumed", (1, 3))):
        world = study.World(scaling.world.captioner, scaling.world.prompt, tmp_path / folder)
        world.work.mkdir()
        for halt in halts:
            pool = study.Pool(world, [study.SQUARE_CLIPS] * 4)
            made, steps = trainees(pool), list[int]()
            study.learn(world, pool, made, halt, {}, lambda step, _, steps=steps: steps.append(step))
        ends.append((weights(made), steps))
    assert [steps for _, steps in ends] == [[1, 2, 3], [2, 3]]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert not torch.equal(ends[0][0][0], weights(trainees(pool))[0]), "they learned"


def test_every_compressor_is_compared_and_longer_clips_are_spread(scripts: Any) -> None:
    script, study = scripts.head_compressors, scripts.head_study
    found = script.compressors([3.0, 5.0, 10.0, 20.0], 5.0)
    singles = Counter(config.operators[0] for config in found.values() if config.mode == "single")
    assert singles == {"prune": 4, "prune-guided": 4, "pool": 4, "conv": 4, "resampler": 1, "text-only": 1}
    assert {config.mode for config in found.values()} == {"none", "single", "select", "weighted", "concat"}
    kinds = script.training_kinds(100, 0.1)
    assert Counter(kind.name for kind in kinds) == {"short": 80, "middle": 10, "long": 10}
    assert Counter(kind.name for kind in kinds[:50])["long"] == 5
    assert script.training_kinds(7, 0.0) == [study.SHORT] * 7


def test_figures_of_runs_are_what_their_words_say(scripts: Any) -> None:
    study = scripts.head_study

    def run(method: str, clip: int, decode_s: float, accepted: int = 0, rounds: int = 1) -> Any:
        stats = SimpleNamespace(num_accepted_tokens=accepted, num_drafts=rounds)
        return study.Run(method, clip, decode_s, None if method == "stock" else SimpleNamespace(stats=stats))

    runs = [
        *(run("stock", clip, seconds) for clip, seconds in ((0, 4.0), (1, 3.0), (2, 1.0))),
        *(
            run("head", clip, 1.0, accepted, rounds)
            for clip, accepted, rounds in ((0, 10, 2), (1, 2, 2), (2, 0, 1))
        ),
        run("head", 0, 3.0, 0, 1),
    ]
    assert study.accepted(runs, "head") == 12 / 6
    assert study.decode_speedup(runs, "head") == 2.0  # the median of 4 / 2, 3 / 1 and 1 / 1


@pytest.mark.slow
def test_heads_are_compared_on_the_same_clips_and_tokens(scripts: Any, scaling: Any) -> None:
    script, study = scripts.head_compressors, scripts.head_study
    world, target = scaling.world, scaling.world.captioner.target
    pool = study.Pool(world, [study.SHORT] * 2)
    training, objective = study.training_of(scaling.asked, 0), study.objective_of(scaling.asked)
    trainees = [
        study.Trainee(
            name, study.HeadModel.fresh(target, world.head_config(config), 0), pool, training, objective
        )
        for name, config in script.compressors([4.0], 4.0).items()
        if name in ("none", "text-only", "pool 4x", "select 4x")
    ]
    found = script.compare_heads(world, trainees, study.SHORT._replace(limit=12), 1)
    rows = {row.compressor: row for row in found.rows}
    assert (found.video_tokens, found.clips) == (128, 1)
    assert [rows[name].kept for name in ("none", "text-only", "pool 4x")] == [128, 0, 32]
    assert rows["none"].kv_bytes - rows["text-only"].kv_bytes == 128 * 2 * 32 * 4, "one head of 32, float32"
    assert all(row.prefill_ms > 0 for row in rows.values())
    assert set(rows["select 4x"].operators) <= {"prune", "pool", "conv", "resampler", "text-only"}
    text = script.table(found)
    assert "| none | 128 |" in text
    assert "| select 4x (" in text
