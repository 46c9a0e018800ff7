"""Streams that are closed, full, or of a small encoding, and Ctrl-C while modules are imported."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from specvlm_cli.console.streams import Stderr
from tests.cli import invariants

ROOT = Path(__file__).parents[2]


def shell(command: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which "$@" is the driver with these arguments."""
    words = [sys.executable, "-m", "tests.cli.drive", "run", *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", command, "sh", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | variables,
    )


@pytest.mark.parametrize(
    ("broken", "progress"),
    [
        ("2>&-", "bar"),
        ("2>/dev/full", "bar"),
        ("2>/dev/full", "log"),
        ("<&- >&- 2>&-", "log"),
        (">&-", "bar"),
    ],
)
def test_a_broken_stream_stops_no_caption(broken: str, progress: str, videos: Path, out: Path) -> None:
    (videos / "bad.mp4").write_text("text")
    done = shell(f'"$@" {broken}', "caption", videos, "-o", out, "-v", "--progress", progress)
    assert done.returncode == 3, done.stderr
    invariants.check(out, videos, failed=1)


def test_an_error_without_stderr_says_nothing_on_stdout(videos: Path, out: Path) -> None:
    done = shell('"$@" 2>&-', "caption", videos / "nowhere", "-o", out, "-v")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_name_that_the_encoding_lacks_is_escaped(videos: Path, out: Path) -> None:
    (videos / "\u732b.mp4").write_text("video")
    done = shell('"$@"', "caption", videos, "-o", out, "-n", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u732b.mp4" in done.stdout


def test_ctrl_c_while_modules_are_imported_is_quiet() -> None:
    program = f"""
import builtins, os
imported = builtins.__import__
def interrupted(name, *arguments):
    if name == "pyarrow":
        os.kill(os.getpid(), {int(signal.SIGINT)})
    return imported(name, *arguments)
builtins.__import__ = interrupted
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from specvlm_cli.__main__ import main
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("encoding", "written"), [("utf-8", "━─·… ä"), ("ascii", "#--~ \\xe4"), ("latin-1", "#--~ ä")]
)
def test_what_we_draw_with_fits_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace", write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert Stderr().write("━─·… ä") == 6
    assert stream.buffer.getvalue() == written.encode(encoding)  # type: ignore[attr-defined]


def test_a_reader_that_is_slow_for_a_moment_misses_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    with os.fdopen(read, "rb", 0) as reader, os.fdopen(write, "wb", 0) as raw:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, "utf-8", write_through=True))
        for _ in range(20):
            Stderr().write("x" * 65536)
        while reader.read(1 << 20):
            pass
        Stderr().write("back\n")
        assert (reader.read(100) or b"").endswith(b"back\n")
