"""Fixtures of the command line's tests: made-up videos, and `specvlm` run in this process without models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specvlm_cli import app
from specvlm_cli.caption import coordinator, engine
from specvlm_cli.caption.settings import CaptionSettings
from specvlm_cli.commands import caption
from specvlm_cli.readers import DecodingPool, read_client
from specvlm_cli.workers import worker
from tests.cli import drive, forks
from tests.cli.fake import FakeFactory, Log, with_demo
from tests.cli.fake_reader import READER


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
    """Runs the command in this process; its worker processes hold fake engines, and its videos are texts."""

    def __init__(self, capfd: pytest.CaptureFixture[str], journal: Path) -> None:
        self.engine = Log(journal)
        self._settings: list[CaptionSettings] = []
        self._capfd = capfd

    @property
    def loads(self) -> list[CaptionSettings]:
        """Return the settings with which models were loaded, once for each worker."""
        return [self._settings[int(str(number))] for number in self.engine.loads]

    def factory(
        self, settings: CaptionSettings, *, quiet: bool, batch_size: int | None, readers: int
    ) -> FakeFactory:
        self._settings.append(settings)
        return replace(self.engine.factory, number=len(self._settings) - 1, batch_size=batch_size)

    def behave(self, **changes: Any) -> None:
        """Change how the engines behave from now on."""
        self.engine.factory = replace(self.engine.factory, **changes)

    def __call__(self, *arguments: object) -> Result:
        self._capfd.readouterr()
        code = app.main([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        return Result(code, out, err)


@pytest.fixture
def forked_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the process that forks readers from a small one, see `tests.cli.forks`.

    Examples for the shell, and tests marked `fresh_workers`, start it and the workers as the product does.
    """
    if forks.can_fork():
        forks.server()
        drive.fork_children(monkeypatch.setattr, read_client, by=forks.Forked)


@pytest.fixture
def forked(forked_readers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also fork workers from this process: importing torch takes seconds in each new interpreter."""
    if forks.can_fork():
        drive.fork_children(monkeypatch.setattr, worker)


@pytest.fixture
def forked_fakes(forked_readers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also fork workers from the small process: those with fake engines need no torch."""
    if forks.can_fork():
        drive.fork_children(monkeypatch.setattr, worker, by=forks.Forked)


@pytest.fixture
def specvlm(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Specvlm:
    if request.node.get_closest_marker("fresh_workers") is None:
        request.getfixturevalue("forked_fakes")
    command = Specvlm(capfd, tmp_path_factory.mktemp("fake") / "journal")
    monkeypatch.setattr(engine, "Factory", command.factory)
    monkeypatch.setattr(coordinator, "DecodingPool", partial(DecodingPool, reader=READER))
    monkeypatch.setattr(caption, "_decode_workers", lambda: 1)  # so that videos come in their order
    monkeypatch.setattr(caption, "_cpu_workers", lambda *_: 1)
    monkeypatch.setattr(caption, "_with_preset", with_demo)
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
