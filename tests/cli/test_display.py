"""The live display on a terminal: what stands there, how often it is drawn, and that nothing can break it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from specvlm_cli.caption.outcome import LiveStatus, Outcome, Tally
from specvlm_cli.console.live import LiveDisplay, reflows
from specvlm_cli.console.messages import Talk, error_line, error_trace
from specvlm_cli.console.meter import Meter
from specvlm_cli.exits import ExitCode
from tests.cli.saying import HOSTILE, claim, compared, failure, harm, row
from tests.cli.terminal import OURS, Terminal


class Recorder(io.StringIO):
    """A file that remembers each write; a terminal writes the line ends of a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text.replace("\n", "\r\n"))
        return len(text)


def console(width: int, height: int = 24) -> tuple[Console, Recorder]:
    file = Recorder()
    made = Console(file=file, force_terminal=True, width=width, height=height, soft_wrap=True, _environ={})
    return made, file


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stderr taken for a terminal of 80 columns."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def bars(terminal: Terminal) -> list[str]:
    return [one for one in terminal.lines if "─" in one or "━" in one]


@pytest.mark.parametrize("width", [40, 63, 80, 200])
@pytest.mark.parametrize("height", [5, 24])
def test_the_display_stands_below_all_messages_and_leaves_no_trace(width: int, height: int) -> None:
    output, file = console(width, height)
    terminal = Terminal(width, height)
    meter = Meter(30)
    with LiveDisplay(output, meter) as display:
        for number in range(30):
            meter.captioned(
                claim(f"clip{number}.mp4"), [compared(caption=f"A very \n long {number} 日本 " * 20)]
            )
            if number % 3 == 0:
                meter.failed(failure(kind=f"Kind{number}"))
                display.say(f"message {number}")
            meter.state(LiveStatus(number, number % 4, 10**number, 1, 2, number % 2))
            display.refresh()
            while file.writes:
                terminal.feed(file.writes.pop(0))
                assert len(bars(terminal)) <= 1
        assert len(bars(terminal)) == 1
        assert "clip29.mp4" in terminal.lines[-1] or height == 5
    terminal.feed("".join(file.writes))
    assert [one for one in terminal.lines if one] == [f"message {number}" for number in range(0, 30, 3)]
    assert terminal.screen.widest < width


@pytest.mark.parametrize("reflow", [True, False])
def test_the_display_follows_a_terminal_that_changes_its_size(
    monkeypatch: pytest.MonkeyPatch, reflow: bool
) -> None:
    for name in ("TMUX", "XTERM_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color" if reflow else "linux")
    output, file = console(150)
    terminal = Terminal(150)
    meter = Meter(9)
    sizes = (150, 120, 119, 60, 59, 160, 41, 90)
    with LiveDisplay(output, meter) as display:
        for width in sizes:
            terminal.resize(width, reflow=reflow)
            output.width, terminal.screen.widest = width, 0
            meter.captioned(claim(), [compared(caption="word " * 100)])
            display.say(f"at {width}")
            display.refresh()
            terminal.feed("".join(file.writes))
            file.writes.clear()
            assert len(bars(terminal)) == 1
            assert width - 10 <= terminal.screen.widest < width
    terminal.feed("".join(file.writes))
    assert [one for one in terminal.lines if one] == [f"at {width}" for width in sizes]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-256color", "VTE_VERSION": "7600"}, True),
        ({"TERM": "xterm-256color", "XTERM_VERSION": "XTerm(379)"}, False),
        ({"TERM": "screen"}, False),
        ({"TERM": "screen-256color", "TMUX": "/tmp/tmux"}, True),
        ({"TERM": "linux"}, False),
    ],
)
def test_which_terminals_break_lines_anew(environment: dict[str, str], expected: bool) -> None:
    assert reflows(environment) == expected


def test_what_has_not_changed_is_not_drawn_again() -> None:
    output, file = console(80)
    meter = Meter(9, lambda: 0.0)
    with LiveDisplay(output, meter) as display:
        file.writes.clear()
        display.refresh()
        assert file.writes == []
        meter.failed(failure())
        display.say("failed: one")
        display.refresh()
        assert len(file.writes) == 1, "message and display go out together, so that nothing flickers"


def test_however_much_happens_it_is_drawn_four_times_a_second(
    forced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with Talk(progress="bar") as talk, talk.working(10**6):
        while time.monotonic() - began < 0.9:
            talk.failed(claim(), failure(), "")
            talk.captioned(claim(), [row()])
            talk.state(LiveStatus(1, 1, 1, 1, 1, 0))
    took_s = time.monotonic() - began
    shown = capsys.readouterr().err
    assert 3 <= shown.count(" so far") <= 4 * took_s + 3
    assert shown.count("failed: /videos/clip.mp4") > 100


def test_a_warning_is_not_lost_when_the_work_ends_badly(
    forced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(progress="bar")

    def work() -> None:
        with talk.working(3):
            talk.warn("just before")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    talk.warn("after it")
    terminal = Terminal(80)
    terminal.feed(capsys.readouterr().err.replace("\n", "\r\n"))
    before, line, after = (one for one in terminal.lines if one)
    assert (before, after) == ("just before", "after it")
    assert line.startswith("0/3 · 0 failed")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_used_where_they_are_wanted(
    forced: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_color: str
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    with Talk(progress="bar") as talk, talk.working(2):
        talk.captioned(claim(), [compared()])
    shown = capsys.readouterr().err
    assert "━" in shown
    assert bool(re.search("\x1b\\[[0-9;]*3[0-9]m", shown)) == (not no_color)


@pytest.mark.parametrize(
    ("progress", "variables", "has_bar"),
    [
        ("bar", {}, True),
        ("auto", {}, False),  # colours are forced, but this is no terminal
        ("bar", {"TERM": "dumb"}, False),
        ("log", {}, False),
        ("none", {}, False),
    ],
)
def test_a_bar_is_drawn_where_it_can_be(
    forced: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    progress: str,
    variables: dict[str, str],
    has_bar: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Talk(progress=progress) as talk, talk.working(3):
        pass
    shown = capsys.readouterr().err
    assert ("─" in shown) == has_bar
    assert ("0/3 · 0 failed" in shown) == (progress != "none")


def speak(talk: Talk) -> int:
    """Put every hostile string into every place that takes one; return how many messages that makes."""
    tally = Tally()
    with talk.working(3 * len(HOSTILE)):
        for number, text in enumerate(HOSTILE):
            talk.captioned(claim(text, number), [row(caption=text, device=text, target_model=text)])
            tally.add(row(device=text, target_model=text, draft_model=text))
            talk.failed(claim(text, number, start_s=1.0), failure(text, kind=text), "")
            tally.fail(failure(kind=text))
            talk.note(text)
            talk.warn(text * 5000)
    talk.close(Outcome(ExitCode.OK, "".join(HOSTILE), 1, 1, 0, 0, figures=tally.figures()))
    return 4 * len(HOSTILE) + 2


def test_no_hostile_text_reaches_a_terminal(forced: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Talk(progress="bar", verbose=True) as talk:
        speak(talk)
    shown = capsys.readouterr().err
    Terminal(80).feed(shown.replace("\n", "\r\n"))  # refuses what is not ours
    assert harm(OURS.sub("", shown).replace("\n", "").replace("\r", "")) == []
    assert "magenta" in shown


def test_no_hostile_text_reaches_plain_stderr_or_a_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with Talk(progress="log", verbose=True, log_file=log) as talk:
        messages = speak(talk)
    shown = capsys.readouterr().err
    assert harm(shown.replace("\n", "")) == harm(log.read_text().replace("\n", "")) == []
    assert shown.partition("| specvlm")[0].count("\n") == messages
    logged = log.read_text().splitlines()
    assert len(logged) == messages, "one message, one line"
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", one) for one in logged)
    assert max(map(len, logged)) <= 4000 + len("2026-01-01T00:00:00+00:00 ")
    assert len(log.read_bytes()) < 1_500_000


def test_no_hostile_text_reaches_json_as_it_is() -> None:
    for text in HOSTILE:
        tally = Tally()
        tally.add(row(target_model=text, device=text))
        tally.fail(failure(kind=text))
        said = json.dumps(Outcome(ExitCode.OK, text, 1, 1, 0, 0, figures=tally.figures()).as_json())
        assert harm(said.replace("\x7f", "")) == []
        assert json.loads(said)["out"] == text


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_is_one_harmless_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    error_line(text * 5000)
    error_trace(f"Traceback\n  {text}\nValueError: {text}")
    first, *rest = capsys.readouterr().err.split("\n")
    assert harm("".join([first, *rest])) == []
    assert first.startswith("specvlm: error: ")
    assert len(first) <= 4000 + len("specvlm: error: ")
    assert rest[0] == "Traceback"


def test_a_traceback_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    error_trace("Traceback\n" + "line\n" * 100_000 + "ValueError: the end")
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), lines[-1]) == (100, "ValueError: the end")


def write_to(descriptor: int, text: bytes) -> None:
    subprocess.run(["sh", "-c", 'printf "$1" >&2', "sh", text], stderr=descriptor, check=True)


def test_what_children_say_stands_above_the_display(forced: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Talk(progress="bar") as talk:
        child = talk.child_stderr()
        with talk.working(3):
            write_to(
                child,
                rb"\033[33mUserWarning\033[0m: odd\n\n10%%\r20%%\r\nagain\nagain\n\033[2Jevil\377\nhalf",
            )
            shown, end_s = "", time.monotonic() + 20.0
            while "evil" not in shown and time.monotonic() < end_s:
                time.sleep(0.05)
                shown += capsys.readouterr().err
    shown += capsys.readouterr().err
    terminal = Terminal(80)
    terminal.feed(shown.replace("\n", "\r\n"))
    said = [one for one in terminal.lines if one]
    assert said[:4] == [
        "worker: UserWarning: odd",
        "worker: 20%",
        "worker: again",
        "worker: \\x1b[2Jevil\\xff",
    ]
    assert said[4].startswith("0/3 · 0 failed")
    assert said[5:] == ["worker: half"]


def test_what_children_say_while_models_are_loaded_is_passed_on(
    forced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Talk() as talk:
        write_to(talk.child_stderr(), rb"\rdownload 10%%\rdownload \303\244")
    assert capsys.readouterr().err == "\rdownload 10%\rdownload ä"


def test_what_children_say_is_for_the_log_alone_where_all_is_quiet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Talk(quiet=True, log_file=tmp_path / "log") as talk:
        write_to(talk.child_stderr(), b"x" * 5000 + rb"\nlast words\n")
    assert capsys.readouterr().err == ""
    long, last = (tmp_path / "log").read_text().splitlines()
    assert len(long) < 4100
    assert last.endswith(" worker: last words")
