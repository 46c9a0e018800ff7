"""Where results go, and what text files say: names with colons, remote addresses, byte order marks, clocks ahead."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from specvlm_cli.inputs import InputOptions, Inputs
from tests.cli import invariants
from tests.cli.conftest import Specvlm, rows

COLONS = ("night-23:45", "v2:draft/set:1", "gs:x")


@pytest.mark.parametrize("name", COLONS)
def test_a_relative_name_with_a_colon_is_a_folder(
    specvlm: Specvlm, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (videos / "b.webm").write_text("explodes")  # so that there are failures, too
    for _ in range(2):  # the second start reads what the first one wrote
        assert specvlm("caption", videos, "-o", name, "--limit", 2).code in (0, 3)
    invariants.check(tmp_path / name, videos, failed=1)
    assert specvlm("status", name, "--verify").code == 0
    assert specvlm("export", name, f"{name}-copy").code == 0
    assert specvlm("export", name, "one:file.parquet").code == 0
    os.unlink(Path(name) / ".specvlm" / "state-00000.db")  # rebuilt from the parts
    assert specvlm("caption", videos, "-o", name).code == 0
    assert len(rows(tmp_path / name)) == 3


@pytest.mark.parametrize(
    "command",
    [
        ("caption", ".", "-o", "s3://bucket/run"),
        ("export", "run", "hf://datasets/a/b"),
        ("bench", "-o", "gs://bucket/x"),
        ("train", ".", "-o", "abfs://a@b/c"),
        ("inspect", "a.mp4", "-o", "https://host/a.png"),
        ("vocab", "run", "-o", "file:///tmp/vocab"),
        ("slurm", "s3://bucket/run", "--", "caption", "."),
    ],
)
def test_nothing_is_written_to_a_remote_address(
    specvlm: Specvlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = specvlm(*command)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.endswith("nothing is written to remote addresses; give a local path")
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_is_no_part_of_a_text(specvlm: Specvlm, videos: Path, tmp_path: Path) -> None:
    mark = "\ufeff"
    for name, before in (("plain", ""), ("marked", mark)):
        for what in ("ask", "be"):
            (tmp_path / f"{name}-{what}.txt").write_text(f"{before}{what} so\r\n", encoding="utf-8")
        (tmp_path / f"{name}.toml").write_text(
            f'{before}max-new-tokens = 9\nsystem = "@{tmp_path}/{name}-be.txt"\n'
        )
        flags = ("--prompt", f"@{tmp_path}/{name}-ask.txt", "--config", tmp_path / f"{name}.toml")
        assert specvlm("caption", videos, "-o", tmp_path / name, *flags).code == 0
    plain, marked = rows(tmp_path / "plain"), rows(tmp_path / "marked")
    assert {row["prompt"] for row in marked} == {"ask so"}
    assert [row["config_hash"] for row in marked] == [row["config_hash"] for row in plain]


@pytest.mark.parametrize(("ahead_s", "young"), [(-30, True), (30, True), (90, False), (10**8, False)])
def test_a_file_of_the_future_is_young_for_a_while_only(videos: Path, ahead_s: int, young: bool) -> None:
    later = time.time() + ahead_s
    os.utime(videos / "a.mp4", (later, later))
    for path in videos.rglob("*.*"):
        if path.name != "a.mp4":
            os.utime(path, (1, 1))
    inputs = Inputs([str(videos)], InputOptions(min_age_s=60.0))
    assert (b"a.mp4" not in [os.path.basename(item.path) for item in inputs]) == young


@pytest.mark.parametrize("name", ["book.xlsx", "rows.JSON", "a.tsv", "b.arrow"])
def test_formats_that_are_not_written_are_no_folders(
    specvlm: Specvlm, videos: Path, tmp_path: Path, name: str
) -> None:
    assert specvlm("caption", videos, "-o", tmp_path / "out").code == 0
    result = specvlm("export", tmp_path / "out", tmp_path / name)
    assert result.code == 2
    assert f"{Path(name).suffix} files are not written; give a folder, or a name that ends in" in result.err
    assert not (tmp_path / name).exists()
