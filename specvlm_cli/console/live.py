"""The live display: a few lines at the bottom of a terminal, drawn in place. Messages go above it.

It is drawn at most four times a second, by a thread of its own; messages wait for the next time. It knows what
to show from a `Meter`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Self

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from specvlm.words import counted
from specvlm_cli.console.meter import Meter, Standing, progress, speed, state
from specvlm_cli.console.safe_text import caption_line, cells, clean, cut
from specvlm_cli.console.words import duration

REFRESH_S = 0.25
KINDS_SHOWN = 3
_SHORTEST_BAR, _LONGEST_BAR = 10, 40


class StyledWords(NamedTuple):
    """Words that stay on one line, in one style."""

    text: str
    style: str = ""


class LiveDisplay:
    """The live display of one run, on a terminal."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console = console
        self._meter = meter
        self._lock = threading.RLock()
        self._waiting: list[str] = []
        self._frame = Text()
        self._width = console.width  # for which the frame was drawn
        self._reflows = reflows(os.environ)
        self._live = Live(self, console=console, auto_refresh=False, transient=True)

    def __rich__(self) -> Text:
        """Return what rich draws, whenever it draws."""
        return self._frame

    def __enter__(self) -> Self:
        self._live.start()
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._live.stop()

    def say(self, message: str) -> None:
        """Print a line above the display, the next time that is drawn."""
        with self._lock:
            self._waiting.append(message)

    def refresh(self) -> None:
        """Print what is waiting, and draw how things stand."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        width, height = self._console.size
        frame = drawn(self._meter.standing(), width - 1, height - 2)
        is_new, old, self._frame = frame != self._frame, self._frame, frame
        if not (waiting or is_new):
            return
        with self._console:  # one write for all of it
            if width < self._width and self._reflows:
                self._console.control(_up(_rows(old, width) - _rows(old, self._width)))
            if waiting:
                self._console.print(Text("\n".join(waiting)))  # draws the frame too
            else:
                self._live.refresh()
        self._width = width


def reflows(environment: Mapping[str, str]) -> bool:
    """Say whether a terminal that gets narrower rewraps its lines; most do, a few cut them off."""
    cuts = "XTERM_VERSION" in environment or environment.get("TERM", "").startswith(
        ("linux", "rxvt", "screen")
    )
    return "TMUX" in environment or not cuts


def _rows(frame: Text, width: int) -> int:
    """Return how many rows of a terminal a frame takes."""
    return sum(max(math.ceil(cell_len(line) / width), 1) for line in frame.plain.split("\n"))


def _up(rows: int) -> Control:
    """Return what makes a terminal clear this many rows, from the one it is on upwards."""
    return Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * rows)


def drawn(standing: Standing, width: int, height: int) -> Text:
    """Return the display: at most `height` lines of at most `width` columns."""
    width = max(width, 1)
    so_far = StyledWords(f"{duration(standing.elapsed_s)} so far", "dim")
    lines = [
        *flowing([*_progress(standing), so_far], width, start=_bar(standing, width)),
        *flowing([StyledWords(text, "green") for text in speed(standing)], width),
        *flowing([StyledWords(text, "dim") for text in state(standing)], width),
        *flowing(_kinds(standing), width),
        *_last(standing, width),
    ]
    return Text("\n", no_wrap=True, overflow="crop").join(lines[: max(height, 1)])


def flowing(pieces: Iterable[StyledWords], width: int, start: Text | None = None) -> list[Text]:
    """Set pieces one after the other, beginning a new line where the next one has no room."""
    lines = [] if start is None else [start]
    gap = " "
    for text, style in pieces:
        text = cut(text, width)
        if lines and len(lines[-1]) + len(gap) + cells(text) <= width:
            lines[-1].append(gap).append(text, style)
        else:
            lines.append(Text.assemble((text, style)))
        gap = " · "
    return lines


def _bar(standing: Standing, width: int) -> Text:
    length = min(max(width // 4, _SHORTEST_BAR), _LONGEST_BAR, width)
    ended, todo = standing.shown
    done = length * min(ended, todo) // max(todo, 1)
    return Text.assemble(("━" * done, "cyan"), ("─" * (length - done), "dim"))


def _progress(standing: Standing) -> list[StyledWords]:
    done, failed, *rest = progress(standing)
    some = standing.failed or standing.before.failed
    return [StyledWords(done, "bold"), StyledWords(failed, "red" if some else ""), *map(StyledWords, rest)]


def _kinds(standing: Standing) -> list[StyledWords]:
    shown = [StyledWords(f"{number} {clean(kind)}", "red") for kind, number in standing.kinds[:KINDS_SHOWN]]
    more = len(standing.kinds) - len(shown)
    return [*shown, StyledWords(f"and {counted(more, 'more kind')}", "red")] if more else shown


def _last(standing: Standing, width: int) -> list[Text]:
    if standing.last is None:
        return []
    name = cut(clean(standing.last.name), max(width // 3, 8))
    return [Text(cut(f"{name}: {caption_line(standing.last.caption)}", width))]


@contextmanager
def every(period_s: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` every `period_s` seconds from a thread of its own while the block runs."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(period_s):
            action()

    thread = threading.Thread(target=loop, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
