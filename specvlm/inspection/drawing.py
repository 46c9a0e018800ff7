"""Drawing by Pillow as a sheet needs it: colours, fonts, one line of text of a given width. Knows no video."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]


class Theme(NamedTuple):
    """Colours of everything but pictures, heat and outlines."""

    paper: Colour
    ink: Colour
    faint: Colour
    rule: Colour


DARK = Theme(paper=(21, 24, 29), ink=(236, 239, 243), faint=(150, 158, 170), rule=(58, 64, 73))
LIGHT = Theme(paper=(255, 255, 255), ink=(27, 31, 36), faint=(91, 101, 112), rule=(200, 206, 213))
HEAT: Colour = (255, 50, 25)
FIRST_COLOUR: Colour = (255, 222, 40)
SECOND_COLOUR: Colour = (60, 214, 255)

_MOST_CHARACTERS = 400  # of one text from outside, before it is cut to the width there is


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, which is not imported for it: it knows more scripts than Pillow's own."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def one_line(text: str) -> str:
    """Text from outside as one line: white space folded, what cannot be printed shown as such."""
    folded = " ".join(text[:_MOST_CHARACTERS].split())
    return "".join(character if character.isprintable() else "\ufffd" for character in folded)


def cut(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """Text of at most `width` pixels, with an ellipsis where it was longer."""
    if face.getlength(text) <= width:
        return text
    short = len(text)
    while short and face.getlength(text[:short] + "…") > width:
        short -= 1
    return text[:short].rstrip() + "…"


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    face: ImageFont.FreeTypeFont,
    colour: Colour,
    anchor: str = "la",
) -> int:
    """Write one line; return where it ends on the right."""
    draw.text(at, text, font=face, fill=colour, anchor=anchor)
    return at[0] + round(face.getlength(text))


def outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour, width: int) -> None:
    """Draw a frame just inside a box, with a dark edge that sets it off from any picture."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=1)
    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=width)
