"""The processes of a start: who descends from whom, who is what, and who is left. Linux only, by /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Role = Literal["worker", "server", "reader"]

_WORDS = {"worker": b"workers.child", "server": b"readers import read_server"}


def children(parent: int) -> list[int]:
    """Return the children of a process; none where it is gone."""
    found = []
    try:
        for task in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{task}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass
    return found


def members(coordinator: int, role: Role) -> list[int]:
    """Return the processes of one kind that work for a coordinator."""
    if role != "reader":
        return [child for child in children(coordinator) if _is(child, role)]
    servers = [child for child in children(coordinator) if _is(child, "server")]
    return [child for server in servers for child in children(server)]


def name_me(role: Role) -> None:
    """Have this process, a fork, taken for what it is."""
    Path("/proc/self/comm").write_text(f"specvlm-{role}")


def _is(process: int, role: Role) -> bool:
    return _WORDS[role] in _read(process, "cmdline") or _read(process, "comm") == f"specvlm-{role}\n".encode()


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def living_in(folder: Path) -> dict[int, str]:
    """Return the live processes whose working directory is this folder, and what each is."""
    return {process: _name(process) for process in _processes() if _lives_in(process, str(folder))}


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _lives_in(process: int, folder: str) -> bool:
    try:
        return os.readlink(f"/proc/{process}/cwd") == folder
    except OSError:  # gone, or a zombie
        return False


def _name(process: int) -> str:
    return (
        (_read(process, "comm") + _read(process, "cmdline"))
        .replace(b"\0", b" ")
        .decode(errors="replace")[-120:]
    )


def wait_until_gone(folder: Path, most_s: float) -> dict[int, str]:
    """Wait until no process works in this folder any more; return those that are left after `most_s`."""
    end_s = time.monotonic() + most_s
    while (left := living_in(folder)) and time.monotonic() < end_s:
        time.sleep(0.02)
    return left
