"""Text from outside, made fit for files and terminals."""

from __future__ import annotations

import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from specvlm_cli.console.safe_text import (
    MOST_CHARACTERS,
    MOST_MARKS,
    caption_line,
    cells,
    clean,
    cut,
    path_bytes,
    path_text,
    short,
    storable,
)
from tests.cli.saying import HOSTILE, harm

VISIBLE_FORMATS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"  # signs around digits
ANY_TEXT = st.text() | st.sampled_from(HOSTILE)


def is_format_only(character: str) -> bool:
    """Say whether Unicode calls it a format character, but one that shows, or one of a dead script."""
    return character in VISIBLE_FORMATS or ord(character) in (0x110BD, 0x110CD, *range(0x13430, 0x13440))


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_path_survives_as_text(name: bytes) -> None:
    path = b"/" + name
    text = path_text(path)
    text.encode("utf-8")
    assert path_bytes(text) == path


def test_utf8_paths_stay_as_they_are() -> None:
    assert path_text("/videos/ä 100%.mp4".encode()) == "/videos/ä 100%.mp4"
    assert path_text(b"/videos/\xff 100%.mp4") == "file:///videos/%FF%20100%25.mp4"


@given(ANY_TEXT)
def test_cleaned_text_is_one_harmless_line(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned.splitlines()) <= 1
    assert not [one for one in harm(cleaned) if not is_format_only(one)]
    assert len(cleaned) >= len(text), "nothing is left out: names stay different"
    cleaned.encode("utf-8")


def test_every_character_alone_is_harmless() -> None:
    everything = (chr(code) for code in range(0x110000))
    suspects = [one for one in everything if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert len(suspects) > 2000
    assert [one for one in suspects if harm(clean(one)) and not is_format_only(one)] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("\u202egpm.exe", "\\u202egpm.exe"),
        (os.fsdecode(b"\xff.mp4"), "\\xff.mp4"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("soft\xadhyphen", "soft\\xadhyphen"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("\u2764\ufe0f", "\u2764\\ufe0f"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\\u200d\U0001f469"),
        ("[bold]ä 日本[/bold]", "[bold]ä 日本[/bold]"),
        ("a\u0308\ue000\xa0\u3000", "a\u0308\ue000\xa0\u3000"),
    ],
)
def test_what_could_act_or_hide_is_escaped(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_flood_of_marks_ends_at_the_fourth() -> None:
    cleaned = clean("z" + "\u0301" * 10 + "y" + "\u0301" * 3)
    assert cleaned == "z" + "\u0301" * MOST_MARKS + "\\u0301" * 6 + "y" + "\u0301" * 3


def test_storable_text_is_utf8() -> None:
    assert storable("ä") == "ä"
    assert storable(os.fsdecode(b"ok \xff")) == "ok \\xff"
    storable("\ud800 alone").encode("utf-8")


def test_short_marks_what_it_cut() -> None:
    assert short("abc", 3) == "abc"
    assert short("abcd", 3) == "ab…"
    assert short("\x1b" * 10_000_000, 9) == "\\x1b\\x1b…"


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("Two lines.\n\n\tAnd\u2028more. ", "Two lines. And more."),
        ("a family \U0001f468\u200d\U0001f469\u200d\U0001f467", "a family \U0001f468\U0001f469\U0001f467"),
        ("a \u2764\ufe0f", "a \u2764"),
        ("\u202ereversed\u2069 zero\u200bwidth", "reversed zerowidth"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("[bold]not markup", "[bold]not markup"),
    ],
)
def test_a_caption_is_a_line_to_be_read(caption: str, shown: str) -> None:
    assert caption_line(caption) == shown


def test_a_long_caption_is_cut() -> None:
    assert caption_line("word " * 10_000).endswith("…")
    assert len(caption_line("word " * 10_000)) == MOST_CHARACTERS


@given(ANY_TEXT)
def test_a_caption_line_is_harmless(text: str) -> None:
    assert not [one for one in harm(caption_line(text)) if not is_format_only(one)]


@given(ANY_TEXT, st.integers(0, 60))
def test_cut_text_fits_on_any_terminal(text: str, width: int) -> None:
    kept = cut(clean(text), width)
    assert cells(kept) <= width
    assert cell_len(kept) <= cells(kept)
    assert kept == clean(text) or kept.endswith("…") or width < cells("…")


def test_what_fits_is_not_cut() -> None:
    assert cut("日本", 4) == "日本"
    assert cut("日本語", 5) == "日…"
