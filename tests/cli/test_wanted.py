"""What one start is about: each video once, prompts put together, ids that would be mistaken refused."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs.item import Item
from specvlm_cli.run.wanted import MOST_PROMPTS, WantedVideos


def stored(wanted: WantedVideos) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(wanted.path)) as database:
        return database.execute("SELECT id, path, prompts FROM video ORDER BY place").fetchall()


def test_the_first_of_equal_rows_is_kept_and_the_others_are_counted() -> None:
    items = [Item("a", b"/a"), Item("b", b"/b"), Item("a", b"/a"), Item("a", b"/a")]
    with WantedVideos.gather(items) as wanted:
        assert stored(wanted) == [("a", b"/a", None), ("b", b"/b", None)]
        assert (wanted.count, wanted.doubles) == (2, 2)
        place = wanted.path
    assert not place.exists()


def test_what_a_killed_start_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("specvlm-wanted-dead", "specvlm-wanted-young", "specvlm-other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "alive").touch()
        if name != "specvlm-wanted-young":
            os.utime(tmp_path / name, (1, 1))
    with WantedVideos.gather([Item("a", b"/a")]) as held:
        os.utime(held.path.parent, (1, 1))
        with WantedVideos.gather([Item("b", b"/b")]) as wanted:
            assert (held.path.exists(), wanted.count) == (True, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"specvlm-wanted-young", "specvlm-other"}


def test_rows_that_ask_different_things_about_one_video_go_together() -> None:
    items = [Item("a", b"/a", prompts=(text,)) for text in ("one", "two", "one")]
    with WantedVideos.gather([*items, Item("b", b"/b", prompts=("three",))]) as wanted:
        assert [json.loads(prompts) for *_, prompts in stored(wanted)] == [["one", "two"], ["three"]]


def test_a_file_through_two_inputs_is_one_video_but_not_where_the_manifest_says_so() -> None:
    through_two = [Item("a", b"/x"), Item("b", b"/x"), Item("c", b"/x", 1.0, 2.0)]
    with WantedVideos.gather(through_two) as wanted:
        assert [identity for identity, *_ in stored(wanted)] == ["a", "c"]
    meant = [Item("a", b"/x", own_id=True), Item("b", b"/x", own_id=True)]
    with WantedVideos.gather(meant) as wanted:
        assert wanted.count == 2


def test_a_row_that_names_no_video_takes_the_place_of_none() -> None:
    bad = Item("a", b"", problem="no path", own_id=True)
    with WantedVideos.gather([bad, Item("a", b"/a", own_id=True), bad]) as wanted:
        assert stored(wanted) == [("a", b"/a", None)]
    with WantedVideos.gather([bad, bad]) as wanted:
        assert (wanted.count, wanted.doubles) == (1, 1)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([Item("a", b"/x/a"), Item("a", b"/y/a")], "/x/a and /y/a have one path below their inputs"),
        (
            [Item("a", b"/x", own_id=True), Item("a", b"/y", own_id=True)],
            "have the same id 'a' in the manifest",
        ),
        (
            [Item("a", b"/x", 0.0, 1.0, own_id=True), Item("a", b"/x", 1.0, 2.0, own_id=True)],
            "several parts of /x have the id 'a'",
        ),
        ([Item("a", b"/x", prompts=("one",)), Item("a", b"/x")], "with a prompt and without"),
        (
            [Item("a", b"/x", prompts=(str(number),)) for number in range(MOST_PROMPTS + 1)],
            f"more than {MOST_PROMPTS} prompts",
        ),
    ],
)
def test_what_would_be_mistaken_for_something_else_is_refused(items: list[Item], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WantedVideos.gather(items)
