"""Claims, rows and failures as the job layer hands them to `Talk`, and names that are out to do harm."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

from specvlm_cli.inputs.item import Item
from specvlm_cli.run.ledger import Claim, Failure

# One of each way to act on a terminal, to reorder or hide text, to break lines, or to be taken for markup.
HOSTILE = (
    "\x1b[35mmagenta",
    "\x1b[2J\x1b[H",
    "\x1b[7A\x1b[3K",
    "\x1b]0;title\x07",
    "\x1b]8;;http://127.0.0.1/\x1b\\link\x1b]8;;\x1b\\",
    "\x1b]52;c;aGk=\x07",
    "\x1b]1337;File=:\x07",
    "\x1bP$q\x1b\\",
    "\x1bPtmux;\x1b\x1b]0;x\x07\x1b\\",
    "\x1b[?1049h",
    "\x1b[?25l",
    "\x1b[6n",
    "\x1b[21t",
    "\x1bc",
    "\x1b(0qqq",
    "\x1b#8",
    "\x1b%@",
    "\x1b",
    "\x9b35m",
    "\x9d0;title\x9c",
    "\x90$q\x9c",
    "\x85next",
    "line\nfailed: forged",
    "line\r\nforged",
    "over\rwritten",
    "\b\b\b\b\b\bback",
    "\x07\x07bell",
    "tab\tab",
    "\x0b\x0cfeed",
    "\x0e\x0fshift",
    "\x7f\x7fdelete",
    "nul\0nul",
    "\u2028separator",
    "\u2029separator",
    "\u202egpm.exe",
    "\u2066\u2067\u2068\u2069",
    "\u200e\u200f\u061c",
    "zero\u200b\u200c\u200dwidth",
    "\u2060\u2061\u2062\u2063\u2064joined",
    "soft\xadhyphen",
    "\ufeffmark",
    "tag\U000e0001\U000e0041\U000e007f",
    "\ufff9annotated\ufffa\ufffb",
    "\ufe0e\ufe0f\U000e0100",
    "\u3164\u115f\u1160\uffa0filler",
    "z" + "\u0300\u0489\u20dd" * 50,
    "[red]markup[/red][bold]",
    "[link=http://127.0.0.1/]x[/link]",
    ":smile: [/]",
    "| a | b |\n|---|---|",
    "%d %s {0} {name} $(id) `id`",
    os.fsdecode(b"\xff\xfe\x80"),
    "\ud800alone\udfff",
)
assert len(HOSTILE) >= 50


def claim(name: str = "clip.mp4", ordinal: int = 0, **item: Any) -> Claim:
    """Return a claim on a video of this name."""
    try:
        path = os.fsencode(f"/videos/{name}")
    except UnicodeEncodeError:  # no name of a file can hold this; a caption or a message can
        path = b"/videos/unnamed"
    return Claim(ordinal, Item(str(ordinal), path, **item), 1)


def failure(error: str = "no frame can be decoded", kind: str = "VideoDecodeError") -> Failure:
    return Failure("decode", kind, error)


def row(**changes: Any) -> dict[str, Any]:
    """Return the columns of a caption row that somebody counts or shows."""
    return {
        "caption": "a caption",
        "prompt_index": 0,
        "completion_tokens": 11,
        "num_drafts": 2,
        "num_accepted_tokens": 6,
        "video_decode_s": 0.5,
        "preprocess_s": 0.25,
        "vision_s": 0.25,
        "target_prefill_s": 0.5,
        "draft_prefill_s": 0.5,
        "decode_s": 2.0,
        "total_s": 4.0,
        "target_model": "fake/target",
        "draft_model": "fake/draft",
        "device": "fake",
        "speedup_source": None,
        "exact_match": None,
        "decode_speedup": None,
        "e2e_speedup": None,
        "baseline_token_s": None,
        "estimated_token_s": None,
        "mean_batch_size": 4.0,
    } | changes


def compared(decode: float = 2.0, end_to_end: float = 1.5, **changes: Any) -> dict[str, Any]:
    """Return a row of a caption that was decoded plainly too."""
    speeds = {"decode_speedup": decode, "e2e_speedup": end_to_end}
    return row(speedup_source="measured", exact_match=True) | speeds | changes


def harm(text: str) -> list[str]:
    """Return the characters of a text that could act on a terminal, hide in it or reorder it."""
    return [one for one in text if _is_harmful(one)]


def _is_harmful(character: str) -> bool:
    hidden = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
    category = unicodedata.category(character)
    selector = 0xFE00 <= ord(character) <= 0xFE0F or 0xE0000 <= ord(character) <= 0xE0FFF
    return category in ("Cc", "Cf", "Cs", "Zl", "Zp") or selector or character in hidden
