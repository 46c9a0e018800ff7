"""Numbers as people write them. Knows nothing of what they count."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def rate(number: float) -> str:
    """Return a number of things per second, with a decimal where it is small."""
    return f"{number:,.0f}" if number >= 10.0 else f"{number:.1f}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in percent; what is there is never 0 %, what is missing never 100 %."""
    percent = 100.0 * part / whole
    if 0.0 < percent < 1.0:
        return "<1 %"
    return ">99 %" if 99.0 < percent < 100.0 else f"{percent:.0f} %"


def per_hour(videos: float) -> str:
    """Return how many videos get their captions in an hour."""
    return f"{rate(videos)} videos/h"


def per_s(tokens: float) -> str:
    """Return how many caption tokens are made in a second of wall time."""
    return f"{rate(tokens)} tokens/s"


def between(low: float, high: float) -> str:
    """Return the range of an estimated speedup, to one decimal."""
    shown = f"{low:.1f}x", f"{high:.1f}x"
    return f"about {shown[0]}" if shown[0] == shown[1] else " to ".join(shown)


def over_plain(mean_batch_size: float | None) -> str:
    """Return what a speedup is against: plain decoding at the same batch size, where that is known."""
    return "over plain" if mean_batch_size is None else f"over plain at batch size {mean_batch_size:.1f}"
