"""What is said, where, and that nothing from outside can do harm on a terminal."""

from __future__ import annotations

import os
import pty
import re
import sys
from pathlib import Path

import pytest

from specvlm_cli.inputs.item import Item
from specvlm_cli.ledger import Claim, Failure
from specvlm_cli.talk import Talk
from tests.cli.conftest import Specvlm, rows

HOSTILE = b"[red]x\x1b]0;owned\x07\n\xe2\x80\xae\xff%d.mp4"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / os.fsdecode(HOSTILE)).write_text("video \x1b[2J[bold]")
    (folder / os.fsdecode(b"bad" + HOSTILE)).write_text("text")
    return folder


def test_hostile_names_and_captions_do_no_harm(
    specvlm: Specvlm, hostile: Path, out: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    result = specvlm("caption", hostile, "-o", out, "-v", "--log-file", log)
    assert result.code == 3
    for text in (result.err, log.read_text()):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
        assert "[red]x\\x1b]0;owned\\x07\\x0a\\u202e\\xff%d.mp4" in text
    (row,) = rows(out)
    assert row["path"].startswith("file:///")
    assert row["caption"] == "a caption of video \x1b[2J[bold]", "a row keeps what the model wrote"
    (failure,) = rows(out, "failures")
    assert failure["error"] == "not a video"
    assert "nothing to do" in specvlm("caption", hostile, "-o", out).err


def test_dry_run_shows_hostile_names_escaped(specvlm: Specvlm, hostile: Path, out: Path) -> None:
    lines = specvlm("caption", hostile, "-o", out, "-n").out.splitlines()
    assert len(lines) == 2
    assert all("\\x1b" in line and "\x1b" not in line for line in lines)


def test_hostile_names_survive_a_rebuild(specvlm: Specvlm, hostile: Path, out: Path) -> None:
    specvlm("caption", hostile, "-o", out)
    before = rows(out), rows(out, "failures")
    (out / ".specvlm" / "state-00000.db").unlink()
    assert specvlm("caption", hostile, "-o", out, "-q").err == ""
    assert (rows(out), rows(out, "failures")) == before


def test_quiet_is_silent_on_success_and_on_nothing_to_do(specvlm: Specvlm, videos: Path, out: Path) -> None:
    for _ in range(2):
        result = specvlm("caption", videos, "-o", out, "-q")
        assert (result.code, result.out, result.err) == (0, "", "")


def test_quiet_still_tells_what_failed(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "bad.mp4").write_text("text")
    lines = specvlm("caption", videos, "-o", out, "-q").err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"failed: {videos}/bad.mp4: not a video")
    assert lines[1].startswith("4 done, 1 failed, 0 to do")


def test_json_is_one_object_on_stdout(specvlm: Specvlm, videos: Path, out: Path) -> None:
    result = specvlm("caption", videos, "-o", out, "--json")
    assert result.out.count("\n") == 1
    found = result.json
    assert set(found) == {
        *(
            "schema",
            "exit_code",
            "out",
            "found",
            "done",
            "failed",
            "pending",
            "failed_now",
            "wall_s",
            "figures",
        ),
        "stopped",
    }
    assert (found["schema"], found["exit_code"], found["found"], found["done"]) == (1, 0, 4, 4)
    again = specvlm("caption", videos, "-o", out, "--json", "-q")
    assert again.err == ""
    assert again.json["figures"] is None


def test_log_file_is_appended_to(specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    specvlm("caption", videos, "-o", out, "-q", "--log-file", log)
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d 4 done, 0 failed, 0 to do .*", lines[-1]
    )


def test_a_traceback_only_with_v(specvlm: Specvlm, videos: Path, out: Path) -> None:
    (videos / "bug.mp4").write_text("bug")
    assert "Traceback" not in specvlm("caption", videos, "-o", out).err
    assert "ZeroDivisionError\n" in specvlm("caption", videos, "-o", out, "--retry-failed", "-v").err
    assert "Traceback" not in specvlm("caption", videos / "nowhere").err
    assert "Traceback" in specvlm("caption", videos / "nowhere", "-v").err


def test_log_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specvlm_cli.talk.LOG_EVERY_S", 0.01)
    with Talk(progress="log") as talk, talk.working(5):
        talk.failed(Claim(1, Item("0", b"/x.mp4"), 1), Failure("open", "NotAVideoError", "no"), "")
        while "1/5" not in (lines := capsys.readouterr().err):
            pass
    assert re.search(r"^1/5 · 1 failed · .* left$", lines, re.MULTILINE)


def _on_a_terminal(arguments: list[str], variables: dict[str, str]) -> str:
    """Run the driver with a terminal as its stderr; return what came there."""
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "tests.cli.drive", "run", *arguments]
        os.execvpe(
            sys.executable, command, os.environ | {"DRIVE_DELAY_S": "0.3", "TERM": "xterm"} | variables
        )
    shown = b""
    while True:
        try:
            shown += (piece := os.read(terminal, 65536))
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
    os.waitpid(child, 0)
    os.close(terminal)
    return shown.decode()


@pytest.mark.parametrize("no_color", ["", "1"])
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # the child only execs
def test_a_terminal_gets_a_bar(videos: Path, out: Path, no_color: str) -> None:
    shown = _on_a_terminal(
        ["caption", str(videos), "-o", str(out)], {"NO_COLOR": no_color} if no_color else {}
    )
    assert "━" in shown
    assert re.search(r"[1-4]/4 · 0 failed", shown)
    assert "4 done, 0 failed" in shown
    assert bool(re.search("\x1b\\[[0-9;]*3[0-9]m", shown)) == (not no_color)
