"""A captioner without models: a video is a text file, and its text says what becomes of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from specvlm.errors import GenerationError, NotAVideoError, PromptError, VideoDecodeError, VideoNotFoundError
from specvlm.records import Caption, CaptionStats, VideoSource
from specvlm_cli.engine import Models
from specvlm_cli.inputs.item import Item

ROUNDS = 4
ACCEPTED = (0, 1, 2, 1)  # rounds that accepted 0, 1, 2, 3 tokens: 8 accepted in 4 rounds


def stats(*, plain: bool, tokens: int = 13) -> CaptionStats:
    """Statistics of a made-up caption; plain decoding takes three times as long."""
    decode_s = 0.6 if plain else 0.2
    return CaptionStats(
        method="plain" if plain else "specvlm/specvlm/static",
        num_frames=8,
        video_tokens=128,
        video_tokens_kept=0 if plain else 13,
        prompt_tokens=150,
        completion_tokens=tokens,
        num_drafts=0 if plain else ROUNDS,
        num_draft_tokens=0 if plain else 100,
        num_accepted_tokens=0 if plain else 8,
        acceptance_histogram=() if plain else ACCEPTED,
        video_decode_s=0.1,
        preprocess_s=0.1,
        vision_s=0.0,
        target_prefill_s=0.0,
        draft_prefill_s=0.0 if plain else 0.1,
        decode_s=decode_s,
        draft_s=0.0,
        verify_s=0.0,
        commit_s=0.0,
        total_s=decode_s + (0.2 if plain else 0.3),
        peak_memory_bytes=1000,
        device="fake",
    )


@dataclass
class FakeEngine:
    """Behaves as the first word of a file says; anything else is a video."""

    delay_s: float = 0.0
    revision: str = "r1"
    prepared: list[bytes] = field(default_factory=list)
    captioned: list[tuple[str, bool]] = field(default_factory=list)
    warm_ups: int = 0

    @property
    def models(self) -> Models:
        return Models("fake/target", self.revision, "fake/draft", "fake", {"target_revision": self.revision})

    def prepare(self, item: Item) -> str:
        self.prepared.append(item.path)
        name = os.fsdecode(item.path)
        if not os.path.exists(item.path):
            raise VideoNotFoundError(name, "no such file")
        text = Path(name).read_text()
        if text.startswith("text"):
            raise NotAVideoError(name, "not a video")
        if text.startswith("damaged"):
            raise VideoDecodeError(name, "no frame can be decoded")
        if text.startswith("prompt"):
            raise PromptError("the prompt has no place for a video")
        return text

    def caption(self, prepared: str, *, speculate: bool) -> Caption:
        time.sleep(self.delay_s)
        self.captioned.append((prepared, speculate))
        if prepared.startswith("explodes"):
            raise GenerationError("it went off")
        if prepared.startswith("bug"):
            raise ZeroDivisionError
        if prepared.startswith("interrupt"):
            raise KeyboardInterrupt
        words = "" if prepared.startswith("empty") else f"a caption of {prepared}"
        ids = (1, 2, 3) if not (prepared.startswith("differs") and not speculate) else (1, 2, 4)
        source = VideoSource(2.0, 25.0, 64, 48, "fake 1", 0.1)
        return Caption(words, ids, "stop", stats(plain=not speculate), source)

    def warm_up(self, prepared: str) -> None:
        self.warm_ups += 1
