"""The programs in examples/ run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specvlm_cli import app

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error::SyntaxWarning", EXAMPLES / name, *arguments]
    variables = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, check=False, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_caption_one() -> None:
    said = run("caption_one.py")
    assert "same tokens as plain decoding: True" in said
    assert len(said.splitlines()[0]) > 40


def test_stream_caption() -> None:
    assert len(run("stream_caption.py").strip()) > 40


def test_own_frames() -> None:
    assert "video tokens" in run("own_frames.py")


def test_demo_and_read_captions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What `make demo` does: every row decoded twice, with the very same tokens."""
    out = tmp_path / "demo-out"
    videos = EXAMPLES / "videos"
    assert (
        app.main(["caption", str(videos), "--preset", "demo", "--baseline-sample", "1.0", "-o", str(out)])
        == 0
    )
    count = len([path for path in videos.iterdir() if path.suffix in (".mp4", ".webm")])
    assert f"{count}/{count}" in capfd.readouterr().err
    table = run("read_captions.py", out)
    assert table.count("yes") == count
    assert max(map(len, table.splitlines())) <= 80
