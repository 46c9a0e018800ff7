"""The `specvlm` command, and `python -m specvlm_cli`. Ctrl-C while the rest is imported ends it quietly too."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from specvlm_cli.app import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
