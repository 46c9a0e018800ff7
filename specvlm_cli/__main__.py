"""The `specvlm` command, and `python -m specvlm_cli`. A signal while the rest is imported ends it quietly too."""

import os
import signal
import sys

_STOPPED, _INTERRUPTED = 75, 130  # as in `exits.py`, which is not imported yet
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Run the command line and return its exit code."""
    before = {number: signal.signal(number, lambda *_: os._exit(_STOPPED)) for number in _SIGNALS}
    try:
        from specvlm_cli.app import main as run

        for number, handler in before.items():
            signal.signal(number, handler)
        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
