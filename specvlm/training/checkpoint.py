"""Checkpoints of a training: tensors and facts, in a folder that appears whole or not at all. Knows no models.

Two are kept, so that a training resumes from the older one if the newest is damaged. Each is a folder with
`state.safetensors` and `state.json`, which holds the other's SHA-256; it is written under another name, made
durable, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from specvlm.durable import publish, sync
from specvlm.files import open_plain, read_text, remove

_PREFIX, _PART = "checkpoint-", ".part"
_TENSORS, _FACTS = "state.safetensors", "state.json"
_NAME = re.compile(f"{_PREFIX}[0-9]{{8}}")
_KEPT = 2
_CHUNK = 1 << 22


class Checkpoint(NamedTuple):
    """What a training resumes from."""

    step: int
    facts: Mapping[str, Any]  # plain values
    tensors: dict[str, torch.Tensor]  # on the CPU


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written. The message says what is wrong with it."""


class SavedTraining(NamedTuple):
    """A checkpoint to resume from."""

    checkpoint: Checkpoint | None  # the newest that is whole; None: there is none
    damaged: list[str]  # what is wrong with newer ones, which are removed where there is a whole one


class Checkpoints:
    """The checkpoints of one training, in one folder; their names count up."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read or made yet."""
        self._folder = folder

    def save(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint; when it is durable older ones go, but for the one before.

        Raises:
            OSError: It cannot be written.
        """
        for left in self._folder.glob(f"{_PREFIX}*{_PART}"):  # a process died while it wrote this
            remove(left)
        names = self._names()
        number = int(names[0].removeprefix(_PREFIX)) + 1 if names else 1
        final = self._folder / f"{_PREFIX}{number:08d}"
        part = final.with_name(final.name + _PART)
        part.mkdir()
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        (part / _TENSORS).write_bytes(save(plain))
        told = {"step": step, "sha256": _digest(part / _TENSORS), "facts": facts}
        (part / _FACTS).write_text(json.dumps(told, indent=1), encoding="utf-8")
        for path in (part / _TENSORS, part / _FACTS):
            sync(path)
        publish(part, final)
        for older in self._names()[_KEPT:]:
            shutil.rmtree(self._folder / older)

    def peek(self) -> tuple[int, Mapping[str, Any]] | None:
        """Step and facts of the newest checkpoint whose facts can be read, touching nothing; None: there is none."""
        for name in self._names():
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                told = _facts(self._folder / name)
                return int(told["step"]), told["facts"]
        return None

    def newest(self) -> SavedTraining:
        """Read the newest checkpoint that is whole."""
        damaged: list[str] = []
        for number, name in enumerate(names := self._names()):
            try:
                checkpoint = _read(self._folder / name)
            except DamagedCheckpointError as error:
                damaged.append(f"{name}: {error}")
                continue
            for newer in names[:number]:  # they would stand before those to come
                shutil.rmtree(self._folder / newer)
            return SavedTraining(checkpoint, damaged)
        return SavedTraining(None, damaged)

    def _names(self) -> list[str]:
        """Newest first."""
        folders = (path for path in self._folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name))
        return sorted((path.name for path in folders if _is_folder(path)), reverse=True)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself: `rmtree` refuses a link and waits for a FIFO."""
    return path.is_dir() and not path.is_symlink()


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedCheckpointError: It is not what was written.
    """
    try:
        told = _facts(path)
        if _digest(path / _TENSORS) != told["sha256"]:
            raise DamagedCheckpointError(f"{_TENSORS} is not the file that was written")
        return Checkpoint(int(told["step"]), told["facts"], load_file(path / _TENSORS))
    except OSError as error:
        raise DamagedCheckpointError(str(error.strerror or error)) from error
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{_FACTS} is damaged") from error


def _facts(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(read_text(path / _FACTS))
    return told


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
