"""Runs `specvlm train` in forks of a process that has everything imported, to be killed there.

    python -m tests.cli.train_drive         starts, as orders on stdin say, one JSON object a line

`{"start": [ARGUMENTS], "stderr": FILE, "environment": {}}` answers with the process id, which is its process group too;
`{"wait": PID, "most_s": S}` with the exit code, minus the signal that ended it, or null where it still runs.
Importing and compiling takes most of a start's time; here it is done once. Nothing is faked but the picture of the
curve: drawing it would take half of what is left. Its file is written, and may be cut short, all the same.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cli.drive import Starter, _redirect, _wait


class TrainDriver(Starter):
    """The other end: makes starts, and waits for them."""

    def __init__(self, target: Path) -> None:
        """`target` is loaded once, so that all it brings is imported."""
        super().__init__("tests.cli.train_drive", str(target), MPLCONFIGDIR=str(target))

    def start(self, arguments: Sequence[object], stderr: Path, **environment: object) -> int:
        """Make a start; return its process id."""
        more = {name: str(value) for name, value in environment.items()}
        words = [str(one) for one in arguments]
        process = self.ask(json.dumps({"start": words, "stderr": str(stderr), "environment": more}))
        assert process is not None
        return process

    def run(self, arguments: Sequence[object], stderr: Path) -> int | None:
        """Make a start and wait for it."""
        return self.wait(self.start(arguments, stderr))


def _start(arguments: list[str], stderr: Path, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        _redirect(stderr)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        from specvlm_cli import app

        code = app.main(arguments)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _warm_up(target: str) -> None:
    import torch

    import specvlm
    import specvlm_cli.app
    import specvlm_cli.training.job  # noqa: F401
    from specvlm.training import folder
    from tests.tiny import random_frames

    assert callable(folder.curve)
    folder.curve = lambda _: b"a picture"
    torch.set_num_threads(1)
    captioner = specvlm.load(target)
    captioner.caption(captioner.prepare(random_frames(0), "Hi."), max_new_tokens=2)


def main() -> None:
    """Serve."""
    _warm_up(sys.argv[1])
    gc.collect()
    gc.freeze()  # so that collections in a fork neither look through all this nor copy it
    for line in sys.stdin:
        said = json.loads(line)
        if "start" in said:
            answer: int | None = _start(said["start"], Path(said["stderr"]), said["environment"])
        else:
            answer = _wait(said["wait"], said["most_s"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
