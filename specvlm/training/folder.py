"""The folder of a head in training: the best head so far, the log, the curve, and the state to resume from.

The folder is a head that can be loaded from the first evaluation on. Knows no models but the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.durable import write_whole
from specvlm.errors import TrainingError
from specvlm.training.checkpoint import Checkpoint, Checkpoints
from specvlm.training.curve import curve

STATE, LOG, CURVE = ".specvlm", "log.jsonl", "curve.png"


class HeadFolder:
    """One such folder.

    Attributes:
        root: The folder.
        checkpoints: What a training resumes from.
    """

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        """`warn` receives damage that could be repaired."""
        self.root, self._warn = root, warn
        self.checkpoints = Checkpoints(root / STATE)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None: none was written yet.

        Raises:
            TrainingError: There are some, and all are damaged.
        """
        found = self.checkpoints.newest()
        if found.checkpoint is None and found.damaged:
            raise TrainingError(
                f"{self.root}: no checkpoint is whole ({'; '.join(found.damaged)}); train in another folder, or "
                f"remove the checkpoints in {STATE} to start over with the captions that are there"
            )
        for damage in found.damaged:
            assert found.checkpoint is not None
            self._warn(f"{damage}; going on from step {found.checkpoint.step}")
        return found.checkpoint

    def keep(self, head: HeadModel, config: HeadConfig) -> None:
        """Have the folder be this head."""
        head.save(self.root, config)

    def tell(self, log: Sequence[dict[str, Any]]) -> None:
        """Write the log, one entry a line, and its curve."""
        write_whole(self.root / LOG, "".join(json.dumps(entry) + "\n" for entry in log).encode())
        write_whole(self.root / CURVE, curve(log))
