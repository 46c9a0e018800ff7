"""Which part of the videos is ours: `--shard I/N`, or `auto` from what a job scheduler says. Knows no video."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import Flag, UsageError

MOST_SHARDS = 100_000  # names of parts and ledgers hold five digits

_ARRAY = "SLURM_ARRAY_TASK_"
# (rank, how many) as schedulers and launchers name them, in the order in which they are asked.
_RANKS = (("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"), ("RANK", "WORLD_SIZE"))


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`, 0 <= index < count."""

    index: int = 0
    count: int = 1

    def holds(self, identity: str) -> bool:
        """Say whether a video of this id is of this shard."""
        return self.count == 1 or shard_of(identity, self.count) == self.index


def shard_of(identity: str, count: int) -> int:
    """Return sha256(id) mod count."""
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()) % count


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """Return what `--shard` names.

    Raises:
        UsageError: The text is not I/N or auto, or `auto` finds no shard in the environment.
    """
    if text == "auto":
        return _from_environment(environment)
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found:
        raise UsageError(Flag("shard", text), "is no shard", fix="give I/N with I from 0 to N - 1, or auto")
    return _checked(int(found.group(1)), int(found.group(2)), text)


def _checked(index: int, count: int, given: str) -> Shard:
    if not 0 < count <= MOST_SHARDS:
        raise UsageError(Flag("shard", given), f": a run has 1 to {MOST_SHARDS} shards", fix="give another N")
    if not 0 <= index < count:
        raise UsageError(
            Flag("shard", given), f": shards count from 0 to {count - 1}", fix="give one of those"
        )
    return Shard(index, count)


def _from_environment(environment: Mapping[str, str]) -> Shard:
    if f"{_ARRAY}ID" in environment:
        return _of_array(environment)
    for rank, count in _RANKS:
        if rank in environment and count in environment:
            shown = f"{rank}={environment[rank]} {count}={environment[count]}"
            return _checked(_number(environment, rank), _number(environment, count), f"auto ({shown})")
    raise UsageError(
        Flag("shard", "auto"),
        f"finds neither {_ARRAY}ID nor SKYPILOT_NODE_RANK nor RANK with WORLD_SIZE in the environment",
        fix="give --shard I/N",
    )


def _of_array(environment: Mapping[str, str]) -> Shard:
    """Return the task's place in its job array; with gaps in the array, places and shards would not agree."""
    task, count = _number(environment, f"{_ARRAY}ID"), _number(environment, f"{_ARRAY}COUNT")
    first = _number(environment, f"{_ARRAY}MIN", "0")
    last = _number(environment, f"{_ARRAY}MAX", str(first + count - 1))
    step = _number(environment, f"{_ARRAY}STEP", "1") or 1
    index, rest = divmod(task - first, step)
    if rest or (last - first) // step + 1 != count:
        raise UsageError(
            Flag("shard", "auto"),
            f": the job array has gaps ({count} tasks from {first} to {last})",
            fix='give --shard "$SLURM_ARRAY_TASK_ID/N" with the number of shards for N',
        )
    return _checked(index, count, f"auto (task {task} of {count})")


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise UsageError(
            Flag("shard", "auto"), f": {name}={clean(value)!r} is no number", fix="give --shard I/N"
        )
    return int(value)
