"""What is said, where, and that nothing from outside can do harm on a terminal."""

from __future__ import annotations

import os
import pty
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specvlm_cli.caption.outcome import Figures, LiveStatus, Outcome
from specvlm_cli.console.messages import Talk
from specvlm_cli.exits import ExitCode
from tests.cli.conftest import Specvlm, rows
from tests.cli.saying import HOSTILE as HOSTILE_TEXTS
from tests.cli.saying import claim, failure, harm, row

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
    assert (found["schema"], found["exit_code"], found["found"], found["done"]) == (1, 0, 4, 4)
    assert found["videos_per_hour"] == pytest.approx(4 * 3600 / found["captioning_s"])
    assert found["caption_tokens_per_s"] == pytest.approx(4 * 13 / found["captioning_s"])
    assert 0 < found["captioning_s"] < found["wall_s"]
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


def test_hostile_arguments_are_told_in_one_harmless_line(specvlm: Specvlm, videos: Path) -> None:
    places: list[Callable[[str], tuple[object, ...]]] = [
        lambda text: (text,),
        lambda text: ("caption", f"--no-such-flag{text}"),
        lambda text: ("caption", videos, "--limit", text),
        lambda text: ("caption", videos, "--device-map", text),
        lambda text: ("caption", videos, "--preset", text),
        lambda text: ("caption", videos, "--progress", text),
    ]
    for number, text in enumerate(HOSTILE_TEXTS):
        for place in (places[number % 6], places[(number // 6 + 3) % 6]):
            result = specvlm(*place(text))
            assert (result.code, result.out) == (2, "")
            assert re.fullmatch("specvlm: error: [^\n]+\n", result.err)
            assert harm(result.err[:-1]) == []


def test_hostile_arguments_do_no_harm_in_a_traceback(specvlm: Specvlm, videos: Path) -> None:
    for text in HOSTILE_TEXTS[::3]:
        shown = specvlm("caption", videos, "--progress", text, "-v").err
        assert "Traceback" in shown
        assert harm(shown.replace("\n", "")) == []


def said(talk: Talk, capsys: pytest.CaptureFixture[str], words: str) -> str:
    """Wait until stderr has these words, and return all of it."""
    shown = ""
    for _ in range(500):
        shown += capsys.readouterr().err
        if words in shown:
            return shown
        time.sleep(0.01)
    raise AssertionError(shown)


def test_log_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specvlm_cli.console.messages.LOG_EVERY_S", 0.01)
    with Talk(progress="log") as talk, talk.working(5):
        talk.failed(claim(), failure(), "")
        talk.captioned(claim(), [row(prompt_index=0), row(prompt_index=1)])
        talk.state(LiveStatus(2, 1, 3_000_000, 1, 1, 0))
        lines = said(talk, capsys, "generating")
    line = (
        r"^2/5 · 1 failed · .* videos/h · .* left · 3.00 accepted/round · "
        r"reading 2 · ready 1 \(3.0 MB\) · generating 1$"
    )
    assert re.search(line, lines, re.MULTILINE)


def test_a_log_file_gets_progress_and_the_end_whatever_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("specvlm_cli.console.messages.LOG_EVERY_S", 0.01)
    log = tmp_path / "log"
    with Talk(quiet=True, log_file=log) as talk:
        with talk.working(3):
            while not log.read_text():
                time.sleep(0.01)
            log.rename(tmp_path / "log.1")
            talk.captioned(claim(), [row()])
            while not log.exists():
                time.sleep(0.01)
        talk.close(Outcome(ExitCode.OK, "out", 3, 1, 0, 2, figures=Figures(captions=1)))
    assert capsys.readouterr().err == ""
    assert " 0/3 · 0 failed" in (tmp_path / "log.1").read_text()
    lines = log.read_text().splitlines()
    assert " 1/3 · 0 failed" in lines[-2]
    assert lines[-1].endswith(" 1 done, 0 failed, 2 to do in out, 0 s")


@pytest.mark.parametrize(
    ("error", "words"), [(OSError(28, "No space\n"), "[Errno 28] No space\\x0a"), (KeyboardInterrupt(), "")]
)
def test_what_ends_a_start_stands_in_the_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, error: BaseException, words: str
) -> None:
    log = tmp_path / "log"
    with pytest.raises(type(error)), Talk(log_file=log):
        raise error
    assert log.read_text().endswith(f" error: {words or 'KeyboardInterrupt'}\n")
    assert capsys.readouterr().err == ""


def test_a_full_log_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Talk(progress="log", log_file=Path("/dev/full")) as talk, talk.working(1):
        talk.note("one")
        talk.note("two")
        talk.captioned(claim(), [row()])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["one", "--log-file /dev/full: No space left on device; going on without it", "two"]
    assert lines[3].startswith("1/1 · 0 failed")


def test_verbose_shows_each_caption_with_its_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with Talk(progress="none", verbose=True) as talk:
        talk.captioned(claim("one.mp4"), [row(caption="A circle.")])
        talk.captioned(claim("two.mp4"), [row(caption="Red.\nBlue.", prompt_index=n) for n in range(2)])
    assert capsys.readouterr().err.splitlines() == [
        "one.mp4: A circle.",
        "two.mp4 [0]: Red. Blue.",
        "two.mp4 [1]: Red. Blue.",
    ]


def test_a_failure_names_the_part_of_the_video(capsys: pytest.CaptureFixture[str]) -> None:
    with Talk(progress="none") as talk:
        talk.failed(claim("a.mp4", start_s=1.5, end_s=3.0), failure("no"), "")
        talk.failed(claim("a.mp4", start_s=1.5), failure("no"), "")
    assert capsys.readouterr().err.splitlines() == [
        "failed: /videos/a.mp4 from 1.5 s to 3 s: no (decode, VideoDecodeError)",
        "failed: /videos/a.mp4 from 1.5 s to its end: no (decode, VideoDecodeError)",
    ]


@pytest.mark.parametrize("quiet", [True, False])
def test_the_closing_table_can_be_pasted(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    with Talk(progress="none", quiet=quiet) as talk:
        with talk.working(1):
            talk.failed(claim(), failure(), "")
        talk.close(Outcome(ExitCode.SOME_FAILED, "out", 1, 0, 1, 0, failed_now=1, figures=Figures()))
    _, ending, *table = capsys.readouterr().err.splitlines()
    assert ending == "0 done, 1 failed, 0 to do in out, 0 s"
    assert bool(table) == (not quiet)
    assert all(one.startswith("| ") and one.endswith(" |") for one in table)
    if table:
        assert any("1 decode:VideoDecodeError" in one for one in table)


def _on_a_terminal(arguments: list[str]) -> str:
    """Run the driver with a terminal as its stderr; return what came there."""
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "tests.cli.drive", "run", *arguments]
        os.execvpe(sys.executable, command, os.environ | {"DRIVE_DELAY_S": "0.15", "TERM": "xterm"})
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


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # the child only execs
def test_a_terminal_gets_a_bar(videos: Path, out: Path) -> None:
    shown = _on_a_terminal(["caption", str(videos), "-o", str(out)])
    assert re.search(r"── [0-3]/4 · 0 failed", re.sub("\x1b\\[[0-9;]*m", "", shown))
    assert "━" in shown
    assert "4 done, 0 failed" in shown
