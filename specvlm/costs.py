"""What rounds cost on this machine: measured while captions are made, kept in a file for the next start.

A round costs the draft's time for its tree, the target's time to check it, and the rest. Trees that were used have
their own times; others are interpolated. It knows no models, only names of what was measured.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from specvlm.choosing import Heard

_RECENT = 15  # measurements of one thing that count
_KEEP_EVERY_S = 30.0
_SCHEMA = 2
_LONGEST_S = 3600.0  # of anything that is believed

TRIALS = 10  # rounds of set trees that a machine of which nothing is known begins with

Widths = tuple[int, ...]


class _Times:
    """The recent times of one thing, in seconds.

    The first time in a process pays what first use costs: it stands only until there is another one.
    """

    __slots__ = ("_count", "_known", "_recent")

    def __init__(self, known: float | None = None) -> None:
        self._known, self._count = known is not None, 0
        self._recent: deque[float] = deque([] if known is None else [float(known)], maxlen=_RECENT)

    def add(self, seconds: float) -> None:
        self._count += 1
        if self._count == 1 and self._known:
            return
        if self._count == 2 and not self._known:
            self._recent.clear()
        self._recent.append(seconds)

    def value(self) -> float:
        return median(self._recent)


class Prices(NamedTuple):
    """What rounds cost, at one moment."""

    plain_s: float  # a plain step
    verify_s: tuple[float, ...]  # by nodes
    draft_s: dict[Widths, float]  # of trees that were used
    level_s: float  # of other trees: for each level, with one node
    node_s: float  # and for each further node
    rest_s: float

    def round_s(self, widths: Widths, nodes: int) -> float:
        """A round of N nodes whose draft runs `widths` nodes level by level."""
        draft_s = self.draft_s.get(widths)
        if draft_s is None:
            draft_s = self.level_s * len(widths) + self.node_s * (sum(widths) - len(widths))
        return max(draft_s + self.verify_s[nodes] + self.rest_s, 1e-9)


def _on_line(points: Sequence[tuple[int, float]], at: int) -> float:
    """A value between or beyond points, which are sorted, two at least; it never falls."""
    above = next((i for i, (x, _) in enumerate(points) if x >= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(above - 1, 0)], points[max(above, 1)]
    if at == x1:
        return y1
    return y0 + max(0.0, (y1 - y0) / (x1 - x0)) * (at - x0)


class RoundCosts:
    """Seconds of rounds, for one pair of models on one device and prompts of about one length."""

    def __init__(self, known: dict[str, Any] | None = None, store: CostStore | None = None) -> None:
        """`known`: what `as_json` gave in an earlier process."""
        known = known or {}
        self._store = store
        self._verify = {int(n): _Times(s) for n, s in known.get("verify_s", {}).items()}
        self._draft = {_widths(key): _Times(s) for key, s in known.get("draft_s", {}).items()}
        self._rest = {bool(int(key)): _Times(s) for key, s in known.get("rest_s", {}).items()}
        self.trials = int(known.get("trials", 0))

    def hear(self, heard: Heard) -> float:
        """Learn from a round; return its seconds."""
        times, shape = heard.times_s, heard.shape
        draft_s, verify_s = times.get("draft", 0.0), times.get("verify", 0.0)
        self._verify.setdefault(shape.nodes, _Times()).add(verify_s)
        if shape.depth:
            self._draft.setdefault(shape.widths, _Times()).add(draft_s)
        whole_s = max(times.get("round", 0.0), draft_s + verify_s)
        rest_s = whole_s - verify_s - (draft_s if shape.depth else 0.0)
        self._rest.setdefault(shape.depth > 0, _Times()).add(rest_s)
        return whole_s

    def plain_s(self) -> float | None:
        """One plain step; None: none was timed."""
        if 1 not in self._verify or False not in self._rest:
            return None
        return self._verify[1].value() + self._rest[False].value()

    def prices(self, most_nodes: int) -> Prices | None:
        """What rounds of up to so many nodes cost, by all that is known now; None: too little is.

        What others do on the machine only ever adds to a time, and a larger tree never costs less: so nothing is
        believed to cost more than what was measured for something larger.
        """
        known = 1 in self._verify and len(self._verify) > 1 and len(self._rest) == 2
        if not known or not self._draft:
            return None
        measured = [
            (nodes, min(times.value() for larger, times in self._verify.items() if larger >= nodes))
            for nodes in sorted(self._verify)
        ]
        verify_s = tuple(_on_line(measured, nodes) for nodes in range(most_nodes + 1))
        drafts = {
            widths: min(times.value() for larger, times in self._draft.items() if _within(widths, larger))
            for widths in self._draft
        }
        plain_s = verify_s[1] + self._rest[False].value()
        return Prices(plain_s, verify_s, drafts, *_line(drafts), self._rest[True].value())

    def as_json(self) -> dict[str, Any]:
        """What the next process should know."""
        return {
            "verify_s": {str(n): times.value() for n, times in sorted(self._verify.items())},
            "draft_s": {",".join(map(str, w)): times.value() for w, times in sorted(self._draft.items())},
            "rest_s": {str(int(kind)): times.value() for kind, times in sorted(self._rest.items())},
            "trials": self.trials,
        }

    @property
    def settled(self) -> bool:
        """Whether all trials were made."""
        return self.trials >= TRIALS

    def keep(self) -> None:
        """Store what is known, now and then."""
        if self._store is not None:
            self._store.keep()


def _within(widths: Widths, larger: Widths) -> bool:
    """Whether a draft's tree is part of a larger one, level by level."""
    return len(widths) <= len(larger) and all(w <= more for w, more in zip(widths, larger, strict=False))


def _line(drafts: dict[Widths, float]) -> tuple[float, float]:
    """Seconds of a level with one node, and of each node beyond; least squares, neither below 0."""
    rows = [(len(w), sum(w) - len(w), seconds) for w, seconds in drafts.items()]
    a, b = sum(n * n for n, _, _ in rows), sum(n * more for n, more, _ in rows)
    c = sum(more * more for _, more, _ in rows)
    u, v = sum(n * s for n, _, s in rows), sum(more * s for _, more, s in rows)
    determinant = a * c - b * b
    if determinant <= 1e-9:
        return u / a, 0.0
    level_s, node_s = (u * c - v * b) / determinant, (v * a - u * b) / determinant
    return (level_s, node_s) if level_s > 0.0 and node_s >= 0.0 else (u / a, 0.0)


def _widths(key: str) -> Widths:
    return tuple(int(width) for width in key.split(","))


class CostStore:
    """The file with the costs of one pair of models on one device; it may be missing, broken or not writable."""

    def __init__(self, file: Path | None) -> None:
        """`file`: None keeps nothing."""
        self._file = file
        self._kept_at = time.monotonic()
        self._settled = 0
        self._costs: dict[str, RoundCosts] = {}
        self._read = _read(file)

    def costs(self, prompt_tokens: int, rows: int) -> RoundCosts:
        """The costs for prompts of about this length: lengths within a factor of two share them."""
        key = f"{rows}x{1 << (prompt_tokens - 1).bit_length()}"
        if key not in self._costs:
            self._costs[key] = RoundCosts(self._read.get(key), self)
        return self._costs[key]

    def keep(self) -> None:
        """Write the file when trials have come to their end, and every half minute."""
        settled = sum(costs.settled for costs in self._costs.values())
        if settled > self._settled or time.monotonic() - self._kept_at >= _KEEP_EVERY_S:
            self._settled = settled
            self.write()

    def write(self) -> None:
        """Write the file."""
        self._kept_at = time.monotonic()
        if self._file is None:
            return
        found = _read(self._file) | {key: costs.as_json() for key, costs in self._costs.items()}
        with suppress(OSError):
            _replace(self._file, json.dumps({"schema": _SCHEMA, "costs": found}, indent=1))


def _read(file: Path | None) -> dict[str, Any]:
    """What an earlier process kept; nothing where it is not just as `write` leaves it."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        costs = found["costs"] if found["schema"] == _SCHEMA else {}
        return {str(key): _checked(one) for key, one in costs.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}


def _checked(one: dict[str, Any]) -> dict[str, Any]:
    """What `RoundCosts.as_json` gave.

    Raises:
        ValueError: A time or a number is none.
    """
    times = [float(value) for name in ("verify_s", "draft_s", "rest_s") for value in one[name].values()]
    if not all(0.0 <= value < _LONGEST_S for value in times) or not 0 <= int(one["trials"]) <= TRIALS:
        raise ValueError(one)
    RoundCosts(one)
    return one


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise


def cost_file(name: str) -> Path | None:
    """Where costs are kept: in specvlm's folder below `XDG_CACHE_HOME`, or ~/.cache; None: there is no such place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return folder / "specvlm" / f"round-costs-{name}.json"
