"""The drawn clips: the same each time, true to their facts, and never shared between the sets."""

from itertools import pairwise

import numpy as np
import pytest

from recipes.demo.batches import cell_facts
from recipes.demo.clips import (
    BACKGROUNDS,
    COLOURS,
    EXAMPLE_SEEDS,
    FIRST_TRAINING_SEED,
    HELD_OUT_SEEDS,
    MOTIONS,
    SHAPES,
    SIZES,
    render,
    scene_for,
    seed_for,
    state_at,
)

TIMES_S = (np.arange(8) / 2).astype(np.float32)


def test_a_clip_is_a_function_of_its_seed() -> None:
    first, second = (render(scene_for(11), TIMES_S, 96, 96) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape == (8, 96, 96, 3)
    assert np.array_equal(first, second)
    assert scene_for(11) != scene_for(12)


def test_one_scene_can_be_drawn_at_any_size_and_time() -> None:
    scene = scene_for(3)
    whole = render(scene, TIMES_S, 64, 128)
    assert whole.shape == (8, 64, 128, 3)
    assert np.array_equal(render(scene, TIMES_S[5:6], 64, 128), whole[5:6])


def test_every_fact_occurs_and_every_thing_starts_inside() -> None:
    scenes = [scene_for(seed) for seed in range(400)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert {t.colour for t in things} == set(COLOURS)
    assert {t.shape for t in things} == set(SHAPES)
    assert {t.size for t in things} == set(SIZES)
    assert {t.motion for t in things} == set(MOTIONS)
    assert {len(s.things) for s in scenes} == {1, 2}
    assert any(s.meet for s in scenes)
    for thing in things:
        x, y, _, _ = state_at(thing, np.asarray([0.0, 4.0], np.float32))
        assert ((x > 0) & (x < 1) & (y > 0) & (y < 1)).all()


def test_the_sets_share_no_seed() -> None:
    held_out = {seed_for("held-out", i) for i in range(len(HELD_OUT_SEEDS))}
    examples = {seed_for("examples", i) for i in range(len(EXAMPLE_SEEDS))}
    assert not held_out & examples
    assert max(held_out | examples) < FIRST_TRAINING_SEED == seed_for("train", 0)


def test_what_moves_left_moves_left() -> None:
    seed = next(s for s in range(1000) if [t.motion for t in scene_for(s).things] == ["left"])
    scene = scene_for(seed)
    frames = render(scene, TIMES_S, 96, 96).astype(int)
    coloured = np.ptp(frames, axis=-1) > 60
    centres = [np.nonzero(picture)[1].mean() for picture in coloured]
    assert all(later < earlier for earlier, later in pairwise(centres))


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_cells_name_the_colour_that_is_drawn_there(seed: int) -> None:
    scene = scene_for(seed)
    facts = cell_facts(scene, TIMES_S, 6, 6)
    covered = facts["colour"] < len(COLOURS)
    assert covered.any(axis=(1, 2)).all()
    assert set(np.unique(facts["colour"][covered])) <= {list(COLOURS).index(t.colour) for t in scene.things}
    assert (facts["shape"][~covered] < 0).all()
