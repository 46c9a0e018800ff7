"""Shards: what `--shard` names, what `auto` finds in the environment, and that each video has one place."""

from __future__ import annotations

import pytest

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import item_id
from specvlm_cli.run.shard import MOST_SHARDS, Shard, parse_shard, shard_of


def array(task: int, count: int, **more: object) -> dict[str, str]:
    """Return what Slurm tells a task of an array."""
    known = {"ID": task, "COUNT": count, **more}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in known.items()}


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_every_video_is_in_exactly_one_shard(count: int) -> None:
    ids = [item_id(f"video {number}.mp4".encode()) for number in range(500)] + ["", "7", "\udcff", "日本"]
    holders = [[index for index in range(count) if Shard(index, count).holds(name)] for name in ids]
    assert all(len(holder) == 1 for holder in holders)
    share = [holders.count([index]) for index in range(count)]
    assert min(share) > 500 / count * 0.6


def test_places_never_change() -> None:
    """Run folders on disk are divided in this way: `printf a | sha256sum`, modulo 8."""
    assert [shard_of(name, 8) for name in ("a", "b", "video.mp4", "日本", "\udcff")] == [3, 5, 5, 2, 3]
    assert Shard().holds("anything")


@pytest.mark.parametrize(
    ("text", "shard"), [("0/1", Shard(0, 1)), ("3/8", Shard(3, 8)), ("99999/100000", Shard(99_999, 100_000))]
)
def test_shards_by_number(text: str, shard: Shard) -> None:
    assert parse_shard(text, {}) == shard


@pytest.mark.parametrize(
    "text",
    ["8/8", "1/0", "0/0", f"0/{MOST_SHARDS + 1}", "-1/8", "1", "", "1/2/3", "a/b", "1/ 2", "AUTO", "٣/8"],
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--shard {text}"):
        parse_shard(text, {})


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        (array(3, 8), Shard(3, 8)),
        (array(3, 8, MIN=0, MAX=7, STEP=1), Shard(3, 8)),
        (array(8, 8, MIN=1, MAX=8, STEP=1), Shard(7, 8)),
        (array(9, 4, MIN=3, MAX=12, STEP=3), Shard(2, 4)),
        (array(5, 1, MIN=5, MAX=5, STEP=0), Shard(0, 1)),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "3"}, Shard(1, 3)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, Shard(2, 4)),
    ],
)
def test_auto(environment: dict[str, str], shard: Shard) -> None:
    assert parse_shard("auto", environment) == shard


def test_auto_asks_slurm_first_and_torchrun_last() -> None:
    sky = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "3"}
    torchrun = {"RANK": "2", "WORLD_SIZE": "4"}
    assert parse_shard("auto", torchrun | sky | array(3, 8)) == Shard(3, 8)
    assert parse_shard("auto", torchrun | sky) == Shard(1, 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "--shard auto finds neither"),
        ({"RANK": "2"}, "--shard auto finds neither"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, r"RANK=4 WORLD_SIZE=4.*count from 0 to 3"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK='x' is no number"),
        ({"RANK": "\x1b[0m", "WORLD_SIZE": "4"}, r"RANK='\\\\x1b\[0m' is no number"),
        (array(3, 2, MIN=0, MAX=3, STEP=1), "has gaps"),
        (array(5, 3, MIN=0, MAX=7, STEP=1), "has gaps"),
        (array(4, 4, MIN=3, MAX=12, STEP=3), "has gaps"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT='' is no number"),
    ],
)
def test_auto_that_finds_none_says_what_it_saw(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_shard("auto", environment)
    assert str(caught.value).isprintable()
