"""How a start works through its videos: limits, retries, devices. Plain values; knows neither flags nor videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from specvlm_cli.caption.settings import CaptionSettings
from specvlm_cli.readers import Limits
from specvlm_cli.run.ledger import Claim
from specvlm_cli.workers.messages import OnOom

_VIDEOS_OF_WORKER = 16  # fewer are not worth loading models once more


@dataclass(frozen=True, slots=True)
class Policy:
    """How a start works through its videos.

    Attributes:
        captions: What captions depend on, and how they are made.
        baseline_sample: Share of videos that are also decoded plainly, 0..1.
        limit: Most videos to work on; None: all.
        max_failures: Stop once this number of videos (int), or this share of the videos to do (float), have failed in
            this start; None: never.
        retries: Further tries of a video after a fault that may pass.
        timeout_s: Most time to generate all captions of one video; None: no limit.
        grace_s: Most time to finish the videos in progress after a signal to stop.
        on_oom: Whether a video may be captioned from fewer frames where memory runs out.
        devices: Where workers load their models, one each; None: where the settings say, or all GPUs.
        all_gpus: One worker for each GPU that the first worker sees.
        cpu_workers: Workers in place of the first of `devices`; more than one only on a CPU, whose cores they share.
        decode_workers: Videos that are read at the same time.
        limits: What reading one video may take.
        root: Nothing outside this folder is read; None: anything.
        ahead_bytes: Frames that may wait for a worker.
        part_rows: Captions in a part.
        part_s: Close a part at the latest after this time.
    """

    captions: CaptionSettings
    baseline_sample: float = 0.0
    limit: int | None = None
    max_failures: int | float | None = None
    retries: int = 2
    timeout_s: float | None = 600.0
    grace_s: float = 60.0
    on_oom: OnOom = "fail"
    devices: tuple[str | None, ...] = (None,)
    all_gpus: bool = False
    cpu_workers: int = 1
    decode_workers: int = 1
    limits: Limits = field(default_factory=Limits)
    root: bytes | None = None
    ahead_bytes: int = 2 << 30
    part_rows: int = 1000
    part_s: float = 600.0

    def for_videos(self, number: int) -> Policy:
        """Return the policy for a number of videos to do: with the failures that they may have, and fewer workers."""
        most = self.max_failures
        return replace(
            self,
            max_failures=max(1, math.ceil(most * number)) if isinstance(most, float) else most,
            cpu_workers=min(self.cpu_workers, max(1, number // _VIDEOS_OF_WORKER)),
        )

    def prompts_of(self, claim: Claim) -> tuple[str, ...]:
        """Return the prompts of a video: its own, or those of the run."""
        return claim.item.prompts or self.captions.prompts

    def asked(self, claim: Claim) -> Sequence[int]:
        """Return the indexes of the prompts to ask about a video: all, or those that have no caption yet."""
        return range(len(self.prompts_of(claim))) if claim.only is None else claim.only

    def sequences(self, claim: Claim) -> int:
        """Return how many captions are to be made of a video: one for each prompt to ask."""
        return len(self.asked(claim))
