"""What a run came to, as frozen figures; how they are shown is for `talk.py`. Knows no terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from specvlm_cli.exits import ExitCode
from specvlm_cli.ledger import Row


@dataclass(frozen=True, slots=True)
class Speedup:
    """One kind of speedup over the videos that had a baseline."""

    of_totals: float  # sum of the plain times / sum of the speculative times
    median: float  # of the speedups of single videos


@dataclass(frozen=True, slots=True)
class Figures:
    """The captions of this start, summed up.

    Attributes:
        captions: Captions made by this start.
        completion_tokens: Their tokens.
        mean_accepted_tokens: Accepted tokens / rounds over all captions, the bonus token not counted.
        mean_acceptance_length: That + 1, tokens per round; None without rounds.
        compared: Captions that were also decoded plainly.
        identical: Of those, how many have the very same tokens.
        decode: Speedup of everything after the first token.
        end_to_end: Speedup from opening the file to the text.
    """

    captions: int = 0
    completion_tokens: int = 0
    mean_accepted_tokens: float | None = None
    mean_acceptance_length: float | None = None
    compared: int = 0
    identical: int = 0
    decode: Speedup | None = None
    end_to_end: Speedup | None = None


class Tally:
    """Counts rows as they come; keeps a few numbers of each, never the rows."""

    def __init__(self) -> None:
        self.captions = 0
        self._tokens = 0
        self._drafts = 0
        self._accepted = 0
        self._identical = 0
        self._decode: list[tuple[float, float]] = []  # (speculative, plain) time of equal amounts of tokens
        self._total: list[tuple[float, float]] = []  # (speculative, plain)

    def add(self, row: Row) -> None:
        self.captions += 1
        self._tokens += row["completion_tokens"]
        self._drafts += row["num_drafts"]
        self._accepted += row["num_accepted_tokens"]
        if row["speedup_source"] != "measured":
            return
        self._identical += row["exact_match"]
        self._total.append((row["total_s"], row["e2e_speedup"] * row["total_s"]))
        if row["decode_speedup"] is not None:
            self._decode.append((row["decode_s"], row["decode_speedup"] * row["decode_s"]))

    def figures(self) -> Figures:
        accepted = self._accepted / self._drafts if self._drafts else None
        return Figures(
            captions=self.captions,
            completion_tokens=self._tokens,
            mean_accepted_tokens=accepted,
            mean_acceptance_length=None if accepted is None else accepted + 1.0,
            compared=len(self._total),
            identical=self._identical,
            decode=_speedup(self._decode),
            end_to_end=_speedup(self._total),
        )


def _speedup(pairs: list[tuple[float, float]]) -> Speedup | None:
    if not pairs:
        return None
    ours, plain = (sum(times) for times in zip(*pairs, strict=True))
    return Speedup(plain / ours, median(theirs / mine for mine, theirs in pairs))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a start ended.

    Attributes:
        exit_code: See `exits.py`.
        out: The run folder.
        found: Videos that the inputs name.
        done: Of those, how many have a caption now.
        failed: Of those, how many have failed.
        pending: Of those, how many are still to be done.
        failed_now: Videos that failed in this start.
        wall_s: Time of this start, loading included.
        figures: The captions of this start; None where there was nothing to do.
        stopped: Why this start ended early; None where it did not.
    """

    exit_code: ExitCode
    out: str
    found: int
    done: int
    failed: int
    pending: int
    failed_now: int = 0
    wall_s: float = 0.0
    figures: Figures | None = None
    stopped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `schema` grows when a name in it changes its meaning."""
        return {"schema": 1, **asdict(self), "exit_code": int(self.exit_code)}
