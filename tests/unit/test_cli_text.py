"""Text from outside, made fit for files and terminals."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specvlm_cli.text import clean, path_bytes, path_text, short, storable


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_path_survives_as_text(name: bytes) -> None:
    path = b"/" + name
    text = path_text(path)
    text.encode("utf-8")
    assert path_bytes(text) == path


def test_utf8_paths_stay_as_they_are() -> None:
    assert path_text("/videos/ä 100%.mp4".encode()) == "/videos/ä 100%.mp4"
    assert path_text(b"/videos/\xff 100%.mp4") == "file:///videos/%FF%20100%25.mp4"


@given(st.text())
def test_cleaned_text_is_one_harmless_line(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned.splitlines()) <= 1
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in cleaned)
    cleaned.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("\u202egpm.exe", "\\u202egpm.exe"),
        (os.fsdecode(b"\xff.mp4"), "\\xff.mp4"),
        ("[bold]ä 日本[/bold]", "[bold]ä 日本[/bold]"),
    ],
)
def test_what_could_move_the_cursor_is_escaped(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_storable_text_is_utf8() -> None:
    assert storable("ä") == "ä"
    assert storable(os.fsdecode(b"ok \xff")) == "ok \\xff"
    storable("\ud800 alone").encode("utf-8")


def test_short_marks_what_it_cut() -> None:
    assert short("abc", 3) == "abc"
    assert short("abcd", 3) == "ab…"
