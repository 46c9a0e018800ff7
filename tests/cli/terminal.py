"""A terminal of the kind that people have, by pyte, which refuses what neither we nor rich need."""

from __future__ import annotations

import re
import unicodedata

import pyte

# One line up, clear this line, cursor off and on, and a few colours.
OURS = re.compile(r"\x1b\[(?:1A|2K|\?25[lh]|(?:0|1|2|31|32|36)m)")


class _Screen(pyte.HistoryScreen):
    """A screen that records the rightmost column that was written."""

    widest = 0

    def draw(self, data: str) -> None:
        for character in data:
            super().draw(character)
            self.widest = max(self.widest, self.cursor.x)


class Terminal:
    """Lines of text, and a cursor. Lines that leave the screen at the top are kept, but cannot be changed any more."""

    def __init__(self, width: int, height: int = 24) -> None:
        self.screen = _Screen(width, height, history=10_000)

    @property
    def lines(self) -> list[str]:
        """All lines down to the last one with text."""
        above = [
            "".join(row[column].data for column in range(self.screen.columns))
            for row in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip("\n").split("\n")

    def feed(self, text: str) -> None:
        """Write a text to the terminal.

        Raises:
            ValueError: The text has a control character or sequence that no line of ours needs.
        """
        rest = OURS.sub("", text).replace("\r", "").replace("\n", "")
        if any(unicodedata.category(character) == "Cc" for character in rest):
            raise ValueError(repr(rest))
        pyte.Stream(self.screen).feed(text)

    def resize(self, width: int, *, reflow: bool) -> None:
        """Change the width. With `reflow`, lines that are now too long wrap, otherwise they are cut.

        Lines that wrapped before are not joined again.
        """
        if not reflow:
            self.screen.resize(columns=width)
            self.screen.cursor.x = min(self.screen.cursor.x, width)
            return
        lines = self.lines
        self.screen = _Screen(width, self.screen.lines, history=10_000)
        self.feed("\r\n".join(lines))
