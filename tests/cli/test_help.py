"""Help: `-h` on one screen, `--help` with every flag, examples that are right, and widths that are kept."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer.main

from specvlm_cli import app
from specvlm_cli.app import main
from specvlm_cli.commands.help import EXAMPLES, MOST_USED

GROUP: Any = typer.main.get_command(app.app)
FLAGS = {
    name: [one for one in command.params if one.param_type_name == "option"]
    for name, command in GROUP.commands.items()
}


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def listed(lines: list[str]) -> list[str]:
    """Return the flags that a page explains."""
    return [found[1] for line in lines if (found := re.match(r"  (?:-\w, )?(--[a-z0-9-]+)", line))]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", [None, *FLAGS])
def test_pages_keep_their_width(
    name: str | None,
    flag: str,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys, *filter(None, (name, flag)))
    assert max(map(len, lines)) <= columns
    assert lines[0].startswith("Usage: specvlm ")


@pytest.mark.parametrize("name", FLAGS)
def test_short_help_is_one_screen_of_the_most_used_flags(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, name, "-h")
    assert len(lines) <= 40
    most_used = MOST_USED[name].split()
    assert set(most_used) <= {one.opts[0] for one in FLAGS[name]}
    assert listed(lines) == most_used
    assert lines[-1] == f"--help shows {len(FLAGS[name]) - len(most_used)} more."


@pytest.mark.parametrize("name", FLAGS)
def test_long_help_has_every_flag_once_with_a_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(shown(capsys, name, "--help"))
    assert sorted(found) == sorted(one.opts[0] for one in FLAGS[name])
    for one in FLAGS[name]:
        assert one.help[0].isupper(), one.help
        assert one.help.rstrip(")").endswith("."), one.help


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_use_flags_that_exist(name: str) -> None:
    assert 1 <= len(EXAMPLES[name]) <= 4
    for example in EXAMPLES[name]:
        for part in example.split(" -- ")[-1].split(" | "):
            words = shlex.split(part, comments=True)
            if words[0] in ("specvlm", "caption"):
                command = words[1] if words[0] == "specvlm" else words[0]
                known = {spelling for one in FLAGS[command] for spelling in one.opts}
                assert {word for word in words if word.startswith("-") and word != "-"} <= known, example


def test_a_value_may_be_the_short_help_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "missing", "--prompt", "-h"]) == 2
    assert "missing" in capsys.readouterr().err
