"""Reads one manifest to its end, and prints what that took as JSON; `tests.faults.manifests` starts it.

    python -m tests.faults.read_manifest MANIFEST [--keep COLUMN] [--start]

With `--start`, a whole dry run of `specvlm caption` does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import InputOptions, Inputs


def peak_mb() -> int:
    """Return the most memory that this process has had; `getrusage` would count what its parent had, too."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def read(path: Path, keep: str) -> dict[str, Any]:
    """Read the items alone."""
    items = problems = 0
    error = None
    try:
        for item in Inputs([str(path)], InputOptions(keep_columns=(keep,) if keep else ())):
            items += 1
            problems += item.problem is not None
    except UsageError as refused:
        error = str(refused)
    return {"items": items, "problems": problems, "error": error}


def start(path: Path) -> dict[str, Any]:
    """Do all that a start does before a model is loaded."""
    from specvlm_cli import app

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        code = app.main(["caption", str(path), "-n", "-q", "--preset", "demo", "-o", f"{folder}/out"])
    return {"items": None, "problems": 0, "error": None if code == 0 else f"exit {code}"}


def main() -> None:
    """Do what the command line of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--keep", default="")
    parser.add_argument("--start", action="store_true")
    asked = parser.parse_args()
    began = time.monotonic()
    found = start(asked.manifest) if asked.start else read(asked.manifest, asked.keep)
    print(json.dumps(found | {"seconds": time.monotonic() - began, "rss_mb": peak_mb()}))


if __name__ == "__main__":
    main()
