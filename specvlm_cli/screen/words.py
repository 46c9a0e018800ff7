"""Numbers as people write them. Knows nothing of what they count."""

from __future__ import annotations

from specvlm.bench.words import amount as amount


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Return a time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def pace(each_s: float) -> str:
    """Return how fast videos come to an end, from the time that each takes."""
    if each_s < 1.0:
        return f"{1.0 / max(each_s, 1e-6):.1f} videos/s"
    return f"{each_s:.1f} s/video" if each_s < 600.0 else f"{each_s / 60.0:.1f} min/video"


def rate(number: float) -> str:
    """Return a number of things per second, with a decimal where it is small."""
    return f"{number:,.0f}" if number >= 10.0 else f"{number:.1f}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in percent; what is there is never 0 %, what is missing never 100 %."""
    percent = 100.0 * part / whole
    if 0.0 < percent < 1.0:
        return "<1 %"
    return ">99 %" if 99.0 < percent < 100.0 else f"{percent:.0f} %"
