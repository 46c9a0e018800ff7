"""Drawn clip files: the same each time, disjoint sets, readable, and captioned right by the demo targets."""

from itertools import combinations
from pathlib import Path

import pytest

import specvlm
from recipes.demo.captions import compare, facts_in, facts_of
from recipes.demo.clips import EXAMPLE_SEEDS, FIRST_TRAINING_SEED, scene_for, seed_for
from recipes.demo.draw import LONGER, SIZES, SQUARE, WIDE, DrawnSplit, Format, draw_clips, main
from specvlm.config import FrameSettings
from specvlm.video import read_video


def test_files_are_the_same_each_time_and_named_by_their_number(tmp_path: Path) -> None:
    both = [list(draw_clips(tmp_path / name, "head", 2, first=7)) for name in ("a", "b")]
    assert [path.name for path in both[0]] == ["head-000007.mp4", "head-000008.mp4"]
    assert [path.read_bytes() for path in both[0]] == [path.read_bytes() for path in both[1]]
    assert both[0][0].read_bytes() != both[0][1].read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [path.name for path in both[0]]


def test_the_sets_share_no_seed_with_each_other_nor_with_what_the_pairs_saw() -> None:
    seeds = [{seed_for(split, number) for number in range(size)} for split, size in SIZES.items()]
    for one, other in combinations([*seeds, set(EXAMPLE_SEEDS)], 2):
        assert not one & other
    assert max(map(max, seeds)) < FIRST_TRAINING_SEED


@pytest.mark.parametrize("split", SIZES)
def test_a_set_ends(tmp_path: Path, split: DrawnSplit) -> None:
    assert len(list(draw_clips(tmp_path, split, 1, first=SIZES[split] - 1))) == 1
    for count, first in ((1, SIZES[split]), (2, SIZES[split] - 1), (0, 0), (1, -1)):
        with pytest.raises(ValueError, match="smaller"):
            draw_clips(tmp_path, split, count, first)


@pytest.mark.parametrize("wrong", [{"height": 30}, {"width": 97}, {"fps": 0}])
def test_what_cannot_be_encoded_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        Format(**wrong)


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "c"), "--count", "2", "--split", "held-out", "--longer", "--fps", "8"])
    assert "2 clips" in capsys.readouterr().out
    frames = read_video(str(tmp_path / "c" / "held-out-000001.mp4"), FrameSettings(num_frames=64))
    assert frames.pixels.shape == (32, 96, 192, 3)
    with pytest.raises(SystemExit, match="held-out"):
        main([str(tmp_path / "c"), "--count", "301", "--split", "held-out"])


@pytest.mark.parametrize("preset", ["demo", pytest.param("demo-llava", marks=pytest.mark.slow)])
def test_targets_caption_the_files_right(tmp_path: Path, preset: str) -> None:
    captioner = specvlm.load(preset)
    right = total = 0
    for number, path in enumerate(draw_clips(tmp_path, "head", 8)):
        text = captioner.caption(str(path), "Describe the video.", max_new_tokens=150).text
        scene = scene_for(seed_for("head", number))
        for hits, of in compare(facts_in(text), facts_of(scene)).values():
            right, total = right + hits, total + of
    assert right / total > 0.95


@pytest.mark.parametrize(
    ("stored", "num_frames", "tokens"), [(SQUARE, 8, 144), (WIDE, 8, 128), (LONGER, 64, 1024)]
)
def test_formats_give_the_video_tokens_that_they_promise(
    tmp_path: Path, stored: Format, num_frames: int, tokens: int
) -> None:
    (path,) = draw_clips(tmp_path, "head", 1, stored=stored)
    captioner = specvlm.load("demo")
    prepared = captioner.prepare(str(path), "Describe.", frames=FrameSettings(num_frames=num_frames))
    assert prepared.inputs.video_tokens == tokens
