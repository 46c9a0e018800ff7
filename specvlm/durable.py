"""Files that survive a power cut: content first, then the name, then the folder that holds the name."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that a FIFO is not waited for
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name, in one step."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # a link there would be written through
    with part.open("xb") as file:
        file.write(data)
    publish(part, path)
