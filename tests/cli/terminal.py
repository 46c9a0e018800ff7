"""A terminal of the simplest kind: what is written to it moves a cursor and leaves characters on lines."""

from __future__ import annotations

import re
import unicodedata

_TOKEN = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])|(\r)|(\n)|([^\x00-\x1f\x7f-\x9f])", re.DOTALL)
# All that we and rich need: one line up, this line gone, cursor off and on, and a few colours.
OURS = re.compile(r"\x1b\[(?:1A|2K|\?25[lh]|(?:0|1|2|31|32|36)m)")


class Terminal:
    """Lines of text, and a cursor. Lines that leave it at the top are kept, but cannot be reached any more."""

    def __init__(self, width: int, height: int = 24) -> None:
        self.width = width
        self.height = height
        self._cells: list[list[str]] = [[]]
        self._goes_on = [False]  # whether a row is the rest of the one above
        self.widest = 0
        self._row = 0
        self._column = 0

    @property
    def lines(self) -> list[str]:
        return ["".join(line).rstrip() for line in self._cells]

    def feed(self, text: str) -> None:
        """Do what a text says.

        Raises:
            ValueError: There is something in it that no line of ours needs.
        """
        place = 0
        while place < len(text):
            token = _TOKEN.match(text, place)
            if token is None:
                raise ValueError(f"{text[place]!r} at {text[place : place + 20]!r}")
            self._obey(token)
            place = token.end()

    def resize(self, width: int, *, reflow: bool) -> None:
        """Change the width; with `reflow`, rows that are now too long are broken anew, else they are cut."""
        self.width = width
        if not reflow:
            self._cells = [row[:width] for row in self._cells]
            self._column = min(self._column, width)
            return
        assert not any(self._goes_on), "rows that were broken before are not put together again"
        pieces = [max(-(-len(row) // width), 1) for row in self._cells]
        broken, self._goes_on = self._cells, []
        self._cells = []
        for row, number in zip(broken, pieces, strict=True):
            self._cells += [row[piece * width : (piece + 1) * width] for piece in range(number)]
            self._goes_on += [piece > 0 for piece in range(number)]
        last_row = sum(pieces[: self._row + 1]) - 1
        self._row, self._column = last_row, self._column - (pieces[self._row] - 1) * width

    def _obey(self, token: re.Match[str]) -> None:
        _, number, command, home, down, character = token.groups()
        if command == "A":
            self._row = max(self._row - int(number or 1), len(self._cells) - self.height, 0)
        elif command == "K":
            self._cells[self._row] = []
            self._goes_on[self._row] = False
        elif command is not None and command not in "mhl":
            raise ValueError(token.group())
        elif home:
            self._column = 0
        elif down:
            self._down()
        elif character:
            self._put(character)

    def _down(self, *, goes_on: bool = False) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells.append([])
            self._goes_on.append(goes_on)

    def _put(self, character: str) -> None:
        size = _width(character)
        if self._column + size > self.width:
            self._column = 0
            self._down(goes_on=True)
        line = self._cells[self._row]
        line.extend(" " * (self._column + size - len(line)))
        if size:
            line[self._column : self._column + size] = [character, ""][:size]
        elif self._column:
            line[self._column - 1] += character
        self._column += size
        self.widest = max(self.widest, self._column)


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
