"""Text from outside (paths, captions, errors) made fit for files and for terminals. Knows no console.

A path is bytes. In a Parquet column it is text: the path itself where it is UTF-8, else its `file://` URI,
which loses nothing (an absolute path never starts with `file:`, so the two forms cannot be mistaken for each
other).

On a screen and in a log, what could act on a terminal, reorder a line or hide in it is escaped, joiners and
variation selectors of emoji included: a name must differ from every other name. A caption is there to be
read, so what is invisible in it is left out instead: an emoji that is joined from several is shown as those.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote_from_bytes, unquote_to_bytes

MOST_CHARACTERS = 4000  # of one message
MOST_MARKS = (
    4  # combining marks on one character: no script needs more, and a flood covers the lines around it
)
_URI = "file://"

# C0 and C1 controls, line separators, lone surrogates, two that are no characters.
_CONTROLS = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff"
# All that Unicode calls default-ignorable (soft hyphen, zero width, bidirectional controls, fillers, variation
# selectors, tags), and the interlinear annotation marks.
_INVISIBLE = (
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_HOSTILE = re.compile(f"[{_CONTROLS}{_INVISIBLE}]")
_UNSEEN = re.compile(f"[{_INVISIBLE}]")
_DRAWING = re.compile("\x1b\\[(?:[0-9;]*m|A)")
_SURROGATE = re.compile("[\ud800-\udfff]")


def path_text(path: bytes) -> str:
    """Return the lossless text of an absolute path."""
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        return _URI + quote_from_bytes(path)


def path_bytes(text: str) -> bytes:
    """Undo `path_text`."""
    return unquote_to_bytes(text[len(_URI) :]) if text.startswith(_URI) else text.encode("utf-8")


def storable(text: str) -> str:
    r"""Return text that UTF-8 can hold: a lone surrogate, as in `os.fsdecode(b"\xff")`, becomes `\xff`."""
    return _SURROGATE.sub(lambda found: _escape(found.group()), text)


def clean(text: str) -> str:
    """Return one line that is safe on a terminal: what could act on it, or not be seen, is escaped."""
    if text.isascii() and text.isprintable():
        return text
    return _without_floods(_HOSTILE.sub(lambda found: _escape(found.group()), text))


def escaped(text: str) -> str:
    """Return lines, also ones that are drawn over and over as a progress bar is, that are safe on a terminal.

    Ends of lines and returns to the beginning of a line are kept. Colours, and moves to the line above, which
    several bars at once make, are left out.
    """
    pieces = re.split(r"([\r\n])", _DRAWING.sub("", text))
    return "".join(piece if piece in ("\r", "\n") else clean(piece) for piece in pieces)


def _without_floods(text: str) -> str:
    """Escape the combining marks that come after the fourth on one character."""
    kept, run = [], 0
    for character in text:
        run = run + 1 if _is_mark(character) else 0
        kept.append(character if run <= MOST_MARKS else _escape(character))
    return "".join(kept)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Me")


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # one undecodable byte of a file name
        return f"\\x{code - 0xDC00:02x}"
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def short(text: str, width: int) -> str:
    """Return cleaned text of at most `width` characters."""
    cleaned = clean(text[: width + 1])  # cleaning never makes it shorter
    return cleaned if len(cleaned) <= width else cleaned[: width - 1] + "…"


def caption_line(caption: str) -> str:
    """Return a caption as one line to be read: white space folded, invisible characters left out."""
    begin = caption[: 2 * MOST_CHARACTERS]
    return short(" ".join(_UNSEEN.sub("", begin).split()), MOST_CHARACTERS)


def cells(text: str) -> int:
    """Return at most how many columns of a terminal cleaned text takes; terminals differ, none takes more."""
    return sum(map(_cells, text))


def _cells(character: str) -> int:
    if character.isascii():
        return 1
    if _is_mark(character):
        return 0
    doubtful = unicodedata.category(character) in ("So", "Sk", "Cn", "Co")  # emoji, new or private characters
    return 2 if doubtful or unicodedata.east_asian_width(character) in ("W", "F", "A") else 1


def cut(cleaned: str, width: int) -> str:
    """Return cleaned text that takes at most `width` columns of a terminal."""
    if cells(cleaned) <= width:
        return cleaned
    used, room = 0, width - _cells("…")
    for index, character in enumerate(cleaned):
        used += _cells(character)
        if used > room:
            return cleaned[:index] + "…" * (room >= 0)
    return cleaned
