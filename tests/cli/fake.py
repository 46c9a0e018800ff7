"""A captioner without models: a video is a text file, and its text says what becomes of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from specvlm.config import FrameSettings
from specvlm.errors import (
    GenerationError,
    GenerationTimeoutError,
    NonFiniteLogitsError,
    NotAVideoError,
    PreprocessError,
    PromptError,
    VideoDecodeError,
    VideoNotFoundError,
    VideoUnavailableError,
)
from specvlm.records import Caption, CaptionStats, Frames, VideoSource
from specvlm_cli.engine import Models

ROUNDS = 4
ACCEPTED = (0, 1, 2, 1)  # rounds that accepted 0, 1, 2, 3 tokens: 8 accepted in 4 rounds


def stats(*, plain: bool, tokens: int = 13, frames: int = 8, first: bool = True) -> CaptionStats:
    """Statistics of a made-up caption; plain decoding takes three times as long.

    Further prompts of a video share the reading, half of the preprocessing and the draft's vision.
    """
    decode_s = 0.6 if plain else 0.2
    read_s, draft_s = (0.1, 0.1) if first else (0.0, 0.05)
    draft_s = 0.0 if plain else draft_s
    preprocess_s = 0.1 if first else 0.05
    return CaptionStats(
        method="plain" if plain else "specvlm/specvlm/static",
        num_frames=frames,
        video_tokens=128,
        video_tokens_kept=0 if plain else 13,
        prompt_tokens=150,
        completion_tokens=tokens,
        num_drafts=0 if plain else ROUNDS,
        num_draft_tokens=0 if plain else 100,
        num_accepted_tokens=0 if plain else 8,
        acceptance_histogram=() if plain else ACCEPTED,
        video_decode_s=read_s,
        preprocess_s=preprocess_s,
        vision_s=0.0,
        target_prefill_s=0.0,
        draft_prefill_s=draft_s,
        decode_s=decode_s,
        draft_s=0.0,
        verify_s=0.0,
        commit_s=0.0,
        total_s=read_s + preprocess_s + draft_s + decode_s,
        peak_memory_bytes=1000,
        device="fake",
    )


def read(
    path: bytes, settings: FrameSettings, *, frame_multiple: int = 1, root: bytes | None = None
) -> Frames:
    """Read a video that is a text file: its text is the pixels. Runs in the reading child."""
    name = os.fsdecode(path)
    if not os.path.exists(path):
        raise VideoNotFoundError(name, "no such file")
    text = Path(name).read_text()
    if text.startswith("text"):
        raise NotAVideoError(name, "not a video")
    if text.startswith("damaged"):
        raise VideoDecodeError(name, "no frame can be decoded")
    if text.startswith("stale"):
        raise VideoUnavailableError(name, "stale file handle")
    if text.startswith(("slow", "stuck")):
        time.sleep(0.1 if text.startswith("slow") else 600.0)
    pixels = np.frombuffer(text.encode(), np.uint8).repeat(3).reshape(1, 1, -1, 3)
    source = VideoSource(2.0, 25.0, 64, 48, "fake 1", 0.1, size_bytes=len(text), mtime_ns=1)
    return Frames(pixels.repeat(8, axis=0), np.arange(8.0), source)


def text_of(frames: Frames) -> str:
    """Return the text that `read` put into the pixels."""
    return bytes(np.ascontiguousarray(frames.pixels[0, 0, :, 0])).decode()


@dataclass(frozen=True)
class FakeFactory:
    """Makes fake engines in worker processes; what they are asked to do is written into a file, line by line."""

    journal: str
    delay_s: float = 0.0
    prepare_s: float = 0.0
    device: str = "fake"
    revision: str = "r1"
    seen_gpus: int = 0
    error: Exception | None = None  # raised by loading
    only_on: str | None = None  # the device where that happens; None: on all
    dies_loading: bool = False
    number: int = 0  # of the settings that it was made for
    load_s: float = 0.0
    words: int = 0  # that every caption has more

    def gpus(self) -> int:
        return self.seen_gpus

    def load(self, device: str | None) -> FakeEngine:
        self.note("load", self.number)
        time.sleep(self.load_s)
        if self.dies_loading:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error is not None and self.only_on in (None, device):
            raise self.error
        return FakeEngine(self, device or self.device)

    def note(self, *words: object) -> None:
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(words) + "\n")


class FakeEngine:
    """Behaves as the first word of a video says; anything else gets a caption."""

    def __init__(self, factory: FakeFactory, device: str) -> None:
        self._factory = factory
        self._device = device

    @property
    def models(self) -> Models:
        revision = self._factory.revision
        return Models(
            "fake/target", revision, "fake/draft", self._device, 1, resolved={"target_revision": revision}
        )

    def open(self, frames: Frames, prompts: Sequence[str]) -> FakeSession:
        text = text_of(frames)
        self._factory.note("preparing", text)
        time.sleep(self._factory.prepare_s)
        if text.startswith("unfit"):
            raise PreprocessError("frames of no use")
        if text.startswith("prompt, says the processor"):
            raise PromptError("the prompt has no place for a video")
        if text.startswith("breaks"):
            raise ZeroDivisionError
        if text.startswith("dies preparing"):
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("crowded") and threading.current_thread() is not threading.main_thread():
            raise MemoryError
        self._factory.note("prepared", text)
        return FakeSession(self._factory, self._device, text, prompts, frames)

    def warm_up(self, frames: Frames, prompt: str) -> None:
        self._factory.note("warm_up")

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)


@dataclass(frozen=True)
class FakeSession:
    """One video, and what it is to be asked."""

    factory: FakeFactory
    device: str
    text: str
    prompts: Sequence[str]
    frames: Frames

    def caption(
        self, index: int, *, speculate: bool, time_limit_s: float | None = None, estimate: bool = False
    ) -> Caption:
        text, prompt, number = self.text, self.prompts[index], len(self.frames.pixels)
        if text.startswith("prompt"):
            raise PromptError("the prompt has no place for a video")
        if text.startswith("patient"):
            self._wait_for_others()
        time.sleep(self.factory.delay_s)
        self.factory.note("captioned", text, speculate, self.device)
        _misbehave(text, number, time_limit_s)
        words = "" if text.startswith("empty") else f"a caption of {text}" + self._more(text)
        if prompt.startswith("second"):
            words += " (second)"
        ids = (1, 2, 3) if not (text.startswith("differs") and not speculate) else (1, 2, 4)
        took = stats(plain=not speculate, frames=number, first=index == 0)
        if text.startswith("headed") and speculate:
            took = replace(
                took, method="specvlm-head/select/static", compressor="pool", compression_ratio=5.0
            )
        if estimate:
            took = replace(took, plain_token_s=stats(plain=True, frames=number).token_s)
        return Caption(words, ids, "stop", took, self.frames.source)

    def _wait_for_others(self) -> None:
        """Wait until two other videos are captioned, if that ever happens."""
        for _ in range(400):
            if len(Log(Path(self.factory.journal)).captioned) >= 2:
                return
            time.sleep(0.05)

    def _more(self, text: str) -> str:
        """Return words that no compression makes short, and that are the same each time."""
        numbers = range(self.factory.words)
        return "".join(f" {hashlib.sha256(f'{text} {number}'.encode()).hexdigest()}" for number in numbers)


def _misbehave(text: str, frames: int, time_limit_s: float | None) -> None:
    if text.startswith("explodes"):
        raise GenerationError("it went off")
    if text.startswith("bug"):
        raise ZeroDivisionError
    if text.startswith("nan"):
        raise NonFiniteLogitsError("NaN logits")
    if text.startswith("huge") and frames > 2:
        raise MemoryError("too many frames")
    if text.startswith("poison"):
        raise RuntimeError("CUDA error: device-side assert triggered")
    if text.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if text.startswith("hangs"):
        time.sleep(600.0)
    if text.startswith("endless"):
        raise GenerationTimeoutError(f"not done after {time_limit_s} s")


class Log:
    """What fake engines were asked to do, as their journal tells it."""

    def __init__(self, journal: Path) -> None:
        self.factory = FakeFactory(str(journal))

    @property
    def loads(self) -> list[object]:
        return [number for (number,) in self._lines("load")]

    def _lines(self, word: str) -> list[list[object]]:
        return [rest for first, *rest in self._all() if first == word]

    def _all(self) -> list[list[object]]:
        journal = Path(self.factory.journal)
        return list(map(json.loads, journal.read_text().splitlines())) if journal.exists() else []

    @property
    def events(self) -> list[str]:
        """Return what happened to which video, in order, e.g. `captioned video 1`."""
        return [f"{word} {text}" for word, text, *_ in filter(lambda line: len(line) > 1, self._all())]

    @property
    def prepared(self) -> list[object]:
        return [text for (text,) in self._lines("prepared")]

    @property
    def captioned(self) -> list[tuple[object, object]]:
        return [(text, speculate) for text, speculate, _ in self._lines("captioned")]

    @property
    def device_of(self) -> dict[object, object]:
        """Return by which device each video was captioned."""
        return {text: device for text, _, device in self._lines("captioned")}

    @property
    def devices(self) -> set[object]:
        return {device for *_, device in self._lines("captioned")}

    @property
    def warm_ups(self) -> int:
        return len(self._lines("warm_up"))
