"""Fixtures of the command line's tests: made-up videos, and `specvlm` run in this process without models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specvlm_cli import app, engine
from specvlm_cli.settings import CaptionSettings
from tests.cli.fake import FakeEngine


@dataclass
class Result:
    """What one run of the command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


class Specvlm:
    """Runs the command in this process, with a fake engine."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.engine = FakeEngine()
        self.loads: list[CaptionSettings] = []
        self._capfd = capfd

    def load(self, settings: CaptionSettings, *, quiet: bool) -> FakeEngine:
        self.loads.append(settings)
        return self.engine

    def __call__(self, *arguments: object) -> Result:
        self._capfd.readouterr()
        code = app.main([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        return Result(code, out, err)


@pytest.fixture
def specvlm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Specvlm:
    command = Specvlm(capfd)
    monkeypatch.setattr(engine, "load", command.load)
    return command


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four good videos, one of them in a folder below."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.webm", "c.MP4", "more/d.mkv"):
        (folder / name).write_text(f"video {name}")
    (folder / "notes.txt").write_text("not one of them")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def rows(out: Path, folder: str = "captions") -> list[dict[str, Any]]:
    """Return all rows of a run folder, by id, as any Parquet reader sees them."""
    files = sorted((out / folder).glob("[!.]*.parquet"))
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(found, key=lambda row: str(row["id"]))


@pytest.fixture
def captions() -> Callable[[Path], list[dict[str, Any]]]:
    return rows


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return every file and folder below with what changes when it is written to."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.stat().st_size)
        for path in [folder, *folder.rglob("*")]
    }
