"""One video, read in a child process like any other, by a command that waits for it."""

from __future__ import annotations

import os
import select

from specvlm.records import Frames
from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import FatalError
from specvlm_cli.readers.jobs import Limits, ReadJob
from specvlm_cli.readers.pool import DecodingPool
from specvlm_cli.readers.shared import ReadVideo


def read_one(job: ReadJob, limits: Limits) -> Frames:
    """Return the frames of one video.

    Raises:
        FatalError: It gives none.
    """
    with DecodingPool(1, limits) as pool:
        pool.submit(job)
        while not (outcomes := pool.collect()):
            select.select(pool.descriptors(), (), (), pool.next_deadline_s())
        (outcome,) = outcomes
        if isinstance(outcome, ReadVideo):
            frames = outcome.frames()
            outcome.close()
            return frames
    raise FatalError(f"{clean(os.fsdecode(job.path))}: {outcome.error} ({outcome.error_type})")
