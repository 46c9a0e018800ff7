"""Results on stdout: tables on a terminal, aligned text elsewhere. Knows nothing of what they say.

Text from outside is cleaned here, and never read as markup. Colours are rich's decision (NO_COLOR, no terminal).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specvlm_cli.console.safe_text import cells, clean

Line = Sequence[str]


def console() -> Console:
    """Return stdout of this moment, where nothing is read as markup and no line is broken."""
    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False, soft_wrap=True)


def line(text: str, style: str = "") -> None:
    """Print one line."""
    console().print(Text(clean(text), style))


def as_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return a value with null for the numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def hanging(first: str, rest: str, indent: int, style: str = "") -> None:
    """Print a first word in a style and what follows; on a terminal, its further lines are indented.

    Long words, such as paths and names of models, are not broken.
    """
    text = clean(f"{first}{rest}")
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, indent + 20)
        wrapped = textwrap.wrap(
            text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
        text = "\n".join(wrapped)
    shown = Text(text)
    shown.stylize(style, 0, len(first))
    console().print(shown)


def pairs(lines: Sequence[tuple[str, str]]) -> None:
    """Print names and values, the values below each other."""
    for text in aligned(lines):
        line(text)


def table(header: Line, lines: Sequence[Line], right: Collection[int] = ()) -> None:
    """Print a table; the columns named in `right` hold numbers."""
    if sys.stdout.isatty():
        console().print(_rich(header, lines, right))
        return
    for text in aligned([header, *lines], right):
        line(text)


def _rich(header: Line, lines: Sequence[Line], right: Collection[int]) -> Table:
    shown = Table()
    for number, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if number in right else "left"
        shown.add_column(name, justify=justify, overflow="fold", no_wrap=number == 0)
    for one in lines:
        shown.add_row(*(Text(clean(cell)) for cell in one))
    return shown


def aligned(lines: Sequence[Line], right: Collection[int] = ()) -> list[str]:
    """Return lines whose cells stand below each other, two spaces apart."""
    cleaned = [[clean(cell) for cell in one] for one in lines]
    widths = [max(map(cells, column)) for column in zip(*cleaned, strict=True)]
    return [
        "  ".join(
            _padded(cell, width, number in right)
            for number, (cell, width) in enumerate(zip(one, widths, strict=True))
        ).rstrip()
        for one in cleaned
    ]


def _padded(cell: str, width: int, right: bool) -> str:
    room = " " * (width - cells(cell))
    return room + cell if right else cell + room
