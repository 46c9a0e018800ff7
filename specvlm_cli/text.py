"""Text from outside (paths, captions, errors) made fit for files and for terminals. Knows no console.

A path is bytes. In a Parquet column it is text: the path itself where it is UTF-8, else its `file://` URI,
which loses nothing (an absolute path never starts with `file:`, so the two forms cannot be mistaken for each
other).
"""

from __future__ import annotations

import re
from urllib.parse import quote_from_bytes, unquote_to_bytes

_URI = "file://"

# C0 and C1 controls, bidirectional marks and overrides, line separators, and lone surrogates.
_HOSTILE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
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
    """Return one line that is safe on a terminal: what could move the cursor or reorder text is escaped."""
    return _HOSTILE.sub(lambda found: _escape(found.group()), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # one undecodable byte of a file name
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def short(text: str, width: int) -> str:
    """Return cleaned text of at most `width` characters."""
    cleaned = clean(text)
    return cleaned if len(cleaned) <= width else cleaned[: width - 1] + "…"
