"""Runs `specvlm train` in forks of a process that has everything imported, to be killed there.

Nothing is faked but the picture of the curve: drawing it would take half of what importing leaves of a start's time.
Its file is written, and may be cut short, all the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.cli import fork_server
from tests.cli.fork_server import ForkServer


class TrainDriver(ForkServer):
    """Makes starts, and waits for them."""

    def __init__(self, target: Path) -> None:
        """`target` is loaded once, so that all it brings is imported."""
        super().__init__("tests.cli.train_drive", target, MPLCONFIGDIR=str(target))

    def start(self, arguments: Sequence[object], stderr: Path, **environment: object) -> int:
        """Make a start; return its process id."""
        more = {name: str(value) for name, value in environment.items()}
        words = [str(one) for one in arguments]
        return self.fork({"arguments": words, "stderr": str(stderr), "environment": more})

    def run(self, arguments: Sequence[object], stderr: Path) -> int | None:
        """Make a start and wait for it."""
        return self.wait(self.start(arguments, stderr))


def _start(order: dict[str, Any]) -> int:
    return fork_server.fork(partial(_run, order), Path(order["stderr"]))


def _run(order: dict[str, Any]) -> int:
    from specvlm_cli import app

    os.environ.update(order["environment"])
    return app.main(order["arguments"])


def _warm_up(target: str) -> None:
    import torch

    import specvlm
    import specvlm_cli.app
    import specvlm_cli.training.start  # noqa: F401
    from specvlm.training import folder
    from tests.tiny import random_frames

    assert callable(folder.curve)
    folder.curve = lambda _: b"a picture"
    torch.set_num_threads(1)
    captioner = specvlm.load(target)
    captioner.caption(captioner.prepare(random_frames(0), "Hi."), max_new_tokens=2)


if __name__ == "__main__":
    _warm_up(sys.argv[1])
    fork_server.serve(_start)
