"""The settings of a training as they are kept in its folder, and the refusal of a start with others. Plain values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from specvlm.drafts.head_model import WEIGHTS, read_config
from specvlm.durable import write_whole
from specvlm.errors import ModelLoadError
from specvlm.training.checkpoint import Checkpoints
from specvlm.training.folder import STATE
from specvlm.training.progress import Progress
from specvlm_cli.caption.settings import Plain, differences
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError, Flag, UsageError
from specvlm_cli.safe_files import read_whole

_FILE = "train.json"
_RUN_FILE = "run.json"  # of a run of `caption`
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """What a folder says of its training.

    Attributes:
        settings: All that the trained weights, or the choice of the best of them, depend on.
        resolved: What the target turned out to be; empty before it was loaded once.
    """

    settings: Plain
    resolved: Plain


def read(root: Path) -> Stored | None:
    """Return what a folder says of its training; None: it may be trained into.

    Raises:
        UsageError: It holds something else.
        FatalError: It cannot be read.
    """
    shown = clean(str(root))
    if not root.exists():
        return None
    if not root.is_dir():
        raise UsageError(f"{shown} is a file; give a folder for the head with -o")
    path = root / STATE / _FILE
    try:
        told = json.loads(read_whole(path))
        return Stored(_plain(told, "settings"), _plain(told, "resolved"))
    except FileNotFoundError:
        if (root / STATE / _RUN_FILE).exists() or any(one.name != STATE for one in root.iterdir()):
            raise UsageError(
                f"{shown} is not empty, and no head was trained in it; give another folder with -o"
            ) from None
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FatalError(
            f"{clean(str(path))} cannot be read ({clean(' '.join(str(error).split()))}); train in another folder"
        ) from error


def _plain(told: Any, name: str) -> Plain:
    found = told[name]
    if not isinstance(found, dict):
        raise TypeError(f"its {name} are none")
    return found


def write(root: Path, stored: Stored) -> None:
    """Keep the settings of a training."""
    told = {"format": _FORMAT, "settings": stored.settings, "resolved": stored.resolved}
    write_whole(root / STATE / _FILE, (json.dumps(told, indent=1) + "\n").encode())


def agree(root: Path, before: Plain, now: Plain, *, flags: bool = True) -> None:
    """Refuse a start whose settings are not those of the training; `flags`: they have the names of flags.

    Raises:
        UsageError: They differ.
    """
    changed = differences(before, json.loads(json.dumps(now)))
    # What one side does not have follows from another setting, which is reported first.
    changed.sort(key=lambda one: one.name not in before.keys() & now.keys())
    if changed:
        first, *others = changed
        is_flag = flags and " " not in first.name
        more = f" (and {len(others)} more)" if others else ""
        raise UsageError(
            f"{clean(str(root))} was begun with other settings:",
            Flag(first.name) if is_flag else first.name,
            clean(first.values) + more,
            fix="give those, or another folder with -o",
        )


def damage(root: Path) -> str | None:
    """What is wrong with the head in a folder, in words; None: it can be loaded, as far as a quick look shows."""
    try:
        read_config(root)
        with safe_open(root / WEIGHTS, "pt"):
            return None
    except ModelLoadError as error:
        return str(error).removesuffix("; train it again")
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{root}: cannot read the head's {WEIGHTS} ({reason})"


def finished(root: Path, total: int) -> Progress | None:
    """Return the log of a training that went to its end, and was evaluated there; None: it did not. Touches nothing."""
    known = Checkpoints(root / STATE).peek()
    if known is None or known[0] < total:
        return None
    progress = Progress.of(known[1])
    return progress if progress.evaluated_at(known[0]) else None
