"""One picture of an inspection: numbers and legend, frames with scores and kept cells, and all steps at a glance.

Every number on it is in `Inspection.figures()` too. It knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from specvlm.inspection.drawing import (
    DARK,
    FIRST_COLOUR,
    HEAT,
    SECOND_COLOUR,
    Colour,
    Theme,
    cut,
    font,
    one_line,
    outline,
    write,
)
from specvlm.inspection.looking import FIRST, SECOND, FrameStep, Inspection
from specvlm.words import counted, percent

MOST_PICTURES = 12
_MARGIN, _GAP = 28, 18
_WIDEST, _NARROWEST = 1440, 1000  # of a sheet, in pixels
_PICTURE = range(240, 441)  # width of a picture
_TALLEST = 440  # picture
_CELL = 20  # width of a cell that is easily seen
_LABEL_HEIGHT = 42
_LEGEND_LINE = 26
_TIMELINE_HEIGHT = 96
_COLD, _HOT = 1.0, 99.0  # percentiles of the scores between which heat goes from nothing to all
_STEEPNESS = (
    0.7  # heat ~ share ** this: attention is so uneven that else a few cells would be all there is to see
)
_OPAQUE = 0.75  # the hottest cell


class SheetText(NamedTuple):
    """What the sheet is about; text from outside."""

    video: str
    target: str
    prompt: str


class _Layout(NamedTuple):
    """Where things are, in pixels."""

    width: int  # of the sheet
    picture: tuple[int, int]  # width and height of one
    slot: int  # width that one picture and its label take
    per_line: int  # pictures side by side
    theme: Theme


@dataclass(frozen=True)
class Heat:
    """How a score becomes a colour.

    Attributes:
        low: Score, and any below it, that is shown as cold.
        high: Score, and any above it, that is shown as the hottest.
        mean: Mean score of a video token.
    """

    low: float
    high: float
    mean: float

    @classmethod
    def of(cls, scores: NDArray[np.float32]) -> Heat:
        """The scale for these scores [V]."""
        low, high = np.percentile(scores.astype(np.float64), (_COLD, _HOT)).tolist()
        return cls(low, high, max(float(scores.mean()), 1e-30))

    def opacity(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Scores -> 0..1."""
        span = max(self.high - self.low, 1e-30)  # all scores may be the same
        share = np.clip((scores.astype(np.float64) - self.low) / span, 0.0, 1.0)
        opacity: NDArray[np.float64] = _OPAQUE * share**_STEEPNESS
        return opacity


def draw_sheet(
    found: Inspection, text: SheetText, most: int = MOST_PICTURES, theme: Theme = DARK
) -> Image.Image:
    """Draw the sheet, RGB.

    Args:
        found: What was looked at and kept.
        text: What it is about.
        most: Most pictures; of more steps these are chosen evenly, first and last included.
        theme: `DARK` or `LIGHT`.
    """
    chosen = evenly_chosen(len(found.steps), most)
    layout = _layout(found, len(chosen), theme)
    lines = -(-len(chosen) // layout.per_line)
    heat = Heat.of(found.scores)
    parts: list[tuple[int, Callable[[ImageDraw.ImageDraw, Image.Image, int], None]]] = [
        (146, lambda draw, _, top: _draw_head(draw, top, layout, found, text)),
        (
            _LEGEND_LINE * (len(found.stages) + 1) + 18,
            lambda draw, _, top: _draw_legend(draw, top, found, heat, theme),
        ),
    ]
    for line in range(lines):
        numbers = chosen[line * layout.per_line : (line + 1) * layout.per_line]
        draw_line = _pictures_drawer(found, numbers, layout, heat)
        parts.append((layout.picture[1] + _LABEL_HEIGHT + _GAP, draw_line))
    parts.append((_TIMELINE_HEIGHT + 56, lambda draw, _, top: _draw_timeline(draw, top, layout, found)))
    parts.append((20, lambda draw, _, top: _draw_foot(draw, top, layout, found, len(chosen))))
    sheet = Image.new("RGB", (layout.width, 2 * _MARGIN + sum(height for height, _ in parts)), theme.paper)
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for height, part in parts:
        part(draw, sheet, top)
        top += height
    return sheet


def evenly_chosen(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly, both ends included."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [round(place) for place in np.linspace(0, count - 1, most)]


def _layout(found: Inspection, pictures: int, theme: Theme) -> _Layout:
    height, width = found.frames.pixels.shape[1:3]
    wide = min(max(found.grid.columns * _CELL, _PICTURE.start), _PICTURE.stop - 1)
    tall = round(wide * height / width)
    if tall > _TALLEST:
        wide, tall = max(1, round(_TALLEST * width / height)), _TALLEST
    slot = max(wide, _PICTURE.start)
    fit = max(1, (_WIDEST - 2 * _MARGIN + _GAP) // (slot + _GAP))
    per_line = -(-pictures // -(-pictures // fit))  # lines as equal as can be
    content = per_line * (slot + _GAP) - _GAP
    return _Layout(max(_NARROWEST, content + 2 * _MARGIN), (wide, max(1, tall)), slot, per_line, theme)


# Head and legend


def _draw_head(
    draw: ImageDraw.ImageDraw, top: int, layout: _Layout, found: Inspection, text: SheetText
) -> None:
    room = layout.width - 2 * _MARGIN
    title, plain = font(26, bold=True), font(15)
    write(draw, (_MARGIN, top), cut(one_line(text.video), title, room), title, layout.theme.ink)
    about = f"{one_line(text.target)}  ·  {one_line(text.prompt)}"
    write(draw, (_MARGIN, top + 38), cut(about, plain, room), plain, layout.theme.faint)
    left = _MARGIN
    for value, name in _headline(found):
        number, small = font(24, bold=True), font(13)
        end = write(draw, (left, top + 72), value, number, layout.theme.ink)
        left = max(end, write(draw, (left, top + 104), name, small, layout.theme.faint)) + 36


def _headline(found: Inspection) -> list[tuple[str, str]]:
    """The numbers of the pruner, and what each of them is."""
    seen = found.seen
    pruner, _, settings = found.pruner_words.partition(", ")
    share = percent(seen / found.video_tokens)
    lines = [
        (pruner, settings or "nothing is pruned"),
        (f"{found.video_tokens:,}", "video tokens"),
        (f"{seen:,}", f"kept ({share})" if found.has_cells else f"made of them ({share})"),
    ]
    if found.has_cells:
        lines.append((f"{percent(found.attention_kept())}", "of the attention is kept"))
    return [*lines, (f"{percent(found.attention_to_video)}", "of all attention is on the video")]


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, found: Inspection, heat: Heat, theme: Theme) -> None:
    face = font(14)
    for one in found.stages:
        outline(draw, (_MARGIN, top, _MARGIN + 18, top + 18), *_STROKES[one.stage])
        tokens = f"{one.kept:,} token{'' if one.kept == 1 else 's'}"
        label = f"{one.name}: {tokens}, {percent(one.attention)} of the attention"
        write(draw, (_MARGIN + 27, top + 1), label, face, theme.ink)
        top += _LEGEND_LINE
    _draw_heat_scale(draw, top, heat, theme)


_GREY = 96  # of a picture, on the heat scale
_STROKES: dict[int, tuple[Colour, int]] = {FIRST: (FIRST_COLOUR, 3), SECOND: (SECOND_COLOUR, 2)}


def _draw_heat_scale(draw: ImageDraw.ImageDraw, top: int, heat: Heat, theme: Theme) -> None:
    face, width = font(14), 160
    left = write(draw, (_MARGIN, top + 1), f"attention: {heat.low / heat.mean:.2f} x", face, theme.ink) + 8
    opacity = heat.opacity(np.linspace(heat.low, heat.high, width))[:, None]
    mixed = np.rint(_GREY * (1 - opacity) + np.array(HEAT) * opacity).astype(int)
    for x, colour in enumerate(mixed.tolist()):
        draw.line((left + x, top, left + x, top + 18), fill=tuple(colour))
    words = f"{heat.high / heat.mean:.2f} x the mean of a video token"
    write(draw, (left + width + 8, top + 1), words, face, theme.ink)


# Pictures


def _pictures_drawer(
    found: Inspection, numbers: Sequence[int], layout: _Layout, heat: Heat
) -> Callable[[ImageDraw.ImageDraw, Image.Image, int], None]:
    def draw_them(draw: ImageDraw.ImageDraw, sheet: Image.Image, top: int) -> None:
        for place, number in enumerate(numbers):
            left = _MARGIN + place * (layout.slot + _GAP)
            sheet.paste(step_picture(found, number, layout.picture, heat), (left, top))
            _draw_label(draw, (left, top + layout.picture[1] + 5), layout, found, number)

    return draw_them


def step_picture(found: Inspection, number: int, size: tuple[int, int], heat: Heat) -> Image.Image:
    """The first frame of a step, of this size, with its scores as heat and its kept cells outlined."""
    frame = Image.fromarray(found.frames.pixels[found.steps[number].frames[0]])
    picture = _dimmed(frame.resize(size, Image.Resampling.LANCZOS))
    veil = np.rint(255 * heat.opacity(found.cells(found.scores)[number])).astype(np.uint8)
    mask = Image.fromarray(veil).resize(size, Image.Resampling.NEAREST)
    picture.paste(Image.new("RGB", size, HEAT), (0, 0), mask)
    draw = ImageDraw.Draw(picture)
    stage = found.cells(found.stage)[number]
    for kept, (colour, width) in _STROKES.items():
        for row, column in np.argwhere(stage == kept).tolist():
            outline(draw, _cell_box(row, column, stage.shape, size), colour, width)
    return picture


def _dimmed(frame: Image.Image) -> Image.Image:
    """Half of its colour and a third of its light taken away, so that heat and outlines stand out."""
    grey = frame.convert("L").convert("RGB")
    return Image.blend(grey, frame, 0.5).point(lambda value: value * 2 // 3)


def _cell_box(
    row: int, column: int, shape: tuple[int, ...], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a cell, all inside it."""
    (rows, columns), (width, height) = shape, size
    return (
        round(column * width / columns),
        round(row * height / rows),
        round((column + 1) * width / columns) - 1,
        round((row + 1) * height / rows) - 1,
    )


def _draw_label(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], layout: _Layout, found: Inspection, number: int
) -> None:
    step, face = found.steps[number], font(13)
    write(draw, at, cut(_frames_and_times(step), face, layout.slot), face, layout.theme.ink)
    kept = f"kept {step.kept} of {found.grid.rows * found.grid.columns}  ·  " if found.has_cells else ""
    below = f"{kept}{percent(step.attention)} of attention"
    write(draw, (at[0], at[1] + 17), cut(below, face, layout.slot), face, layout.theme.faint)


def _frames_and_times(step: FrameStep) -> str:
    first, last = step.frames
    if first == last:
        return f"frame {first + 1}  ·  {step.times_s[0]:.2f} s"
    return f"frames {first + 1}-{last + 1}  ·  {step.times_s[0]:.2f}-{step.times_s[1]:.2f} s"


# All steps, and the foot


def _draw_timeline(draw: ImageDraw.ImageDraw, top: int, layout: _Layout, found: Inspection) -> None:
    """Bars of what is kept and a line of the attention, each on a scale of its own."""
    steps, face = found.steps, font(13)
    most = max(step.kept for step in steps), max(step.attention for step in steps)
    bars = f" kept cells (bars, at most {most[0]}) and" if found.has_cells else ""
    end = write(draw, (_MARGIN, top), f"{counted(len(steps), 'step')} in all:{bars}", face, layout.theme.ink)
    write(
        draw,
        (end, top),
        f" share of the attention (line, at most {percent(most[1])})",
        face,
        layout.theme.faint,
    )
    bottom, right = top + 24 + _TIMELINE_HEIGHT, layout.width - _MARGIN
    edges = np.rint(np.linspace(_MARGIN, right, len(steps) + 1)).astype(int).tolist()
    line: list[tuple[int, int]] = []
    for step, left, end in zip(steps, edges, edges[1:], strict=False):
        _draw_bar(draw, step, (left, end - 1), bottom, most[0])
        level = bottom - round(_TIMELINE_HEIGHT * step.attention / (most[1] or 1.0))
        line += [(left, level), (max(left, end - 1), level)]
    draw.line((_MARGIN, bottom, right, bottom), fill=layout.theme.rule, width=1)
    draw.line(line, fill=layout.theme.paper, width=5)
    draw.line(line, fill=layout.theme.ink, width=2)
    write(draw, (_MARGIN, bottom + 5), f"{steps[0].times_s[0]:.2f} s", face, layout.theme.faint)
    write(draw, (right, bottom + 5), f"{steps[-1].times_s[1]:.2f} s", face, layout.theme.faint, "ra")


def _draw_bar(draw: ImageDraw.ImageDraw, step: FrameStep, span: tuple[int, int], low: int, most: int) -> None:
    """Stage I below, stage II upon it."""
    inset = (span[1] - span[0]) // 8
    left, right = span[0] + inset, max(span[0] + inset, span[1] - inset)
    for kept, (colour, _) in zip((step.kept_first, step.kept_second), _STROKES.values(), strict=True):
        high = low - round(_TIMELINE_HEIGHT * kept / max(most, 1))
        if high < low:
            draw.rectangle((left, high, right, low - 1), fill=_muted(colour))
        low = high


def _muted(colour: Colour) -> Colour:
    red, green, blue = (value * 3 // 4 for value in colour)
    return red, green, blue


def _draw_foot(draw: ImageDraw.ImageDraw, top: int, layout: _Layout, found: Inspection, shown: int) -> None:
    face = font(13)
    said = cut("  ".join(_remarks(found, shown)), face, layout.width - 2 * _MARGIN)
    write(draw, (_MARGIN, top), said, face, layout.theme.faint)


def _remarks(found: Inspection, shown: int) -> list[str]:
    """What must be known to read the sheet."""
    steps, grid = len(found.steps), found.grid
    said = [
        f"{shown} of {counted(steps, 'step')} are shown, evenly chosen."
        if shown < steps
        else f"{counted(steps, 'step')} in all."
    ]
    if grid.frames_per_step > 1:
        said.append(f"A step covers {grid.frames_per_step} frames; its first one is shown.")
    if beyond := found.video_tokens - grid.cells:
        kept = int(np.count_nonzero(found.stage[grid.cells :]))
        told = f"; kept: {kept}" if found.has_cells else ""
        said.append(f"{beyond} video token{'s are' if beyond > 1 else ' is'} no cell{told}.")
    if not found.has_cells:
        said.append("New tokens are made of all cells; none is outlined.")
    said.append(
        f"Heat runs from the scores' {_COLD:g}st to their {_HOT:g}th percentile, the same for all frames."
    )
    return said
