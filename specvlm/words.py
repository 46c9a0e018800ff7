"""Numbers as people read them. Knows nothing of what they count."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def amount(size_bytes: int) -> str:
    """A size in the largest decimal unit that it fills."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000.0:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000.0
    return f"{size:.1f} TB"


def percent(share: float | None) -> str:
    """A share with one decimal; 0 % and 100 % are exactly that. Empty for None."""
    if share is None:
        return ""
    if share in (0.0, 1.0):
        return f"{100.0 * share:.0f} %"
    if 0.0 < share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if 0.999 < share < 1.0 else f"{100.0 * share:.1f} %"
