"""A captioner without models: a video is a text file, and its text says what becomes of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specvlm.errors import GenerationError, NonFiniteLogitsError, PreprocessError, PromptError
from specvlm.records import Caption, CaptionStats, Frames
from specvlm_cli.caption.engine import FinishedSequence, Models
from specvlm_cli.commands.caption_flags import CaptionFlags
from tests.cli.fake_reader import text_of

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


@dataclass(frozen=True)
class FakeFactory:
    """Makes fake engines in worker processes; what they are asked to do is written into a file, line by line."""

    journal: str
    delay_s: float = 0.0  # of a step
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
    batch_size: int | None = None  # None: auto
    holds: int = 1  # sequences that auto finds room for
    steps: int = 1  # most steps of a caption; how many it has is a hash of its video

    def gpus(self) -> int:
        return self.seen_gpus

    def load(self, device: str | None, sharing: int) -> FakeEngine:
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
    """A batch of made-up captions. Each behaves as the first word of its video says; anything else is captioned."""

    def __init__(self, factory: FakeFactory, device: str) -> None:
        self._factory = factory
        self._device = device
        self._waiting: dict[Hashable, _Sequence] = {}
        self._running: dict[Hashable, _Sequence] = {}
        self.batch_size = factory.batch_size or factory.holds

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
        if text.startswith("crowded") and text not in _CROWDED:
            _CROWDED.add(text)
            raise MemoryError
        self._factory.note("prepared", text)
        return FakeSession(text, prompts, frames)

    def add(
        self,
        key: Hashable,
        session: Any,  # what `open` returned
        index: int,
        *,
        speculate: bool = True,
        alone: bool = False,
    ) -> None:
        assert key not in self._waiting
        assert key not in self._running
        steps = 1 + zlib.crc32(f"{session.text} {index}".encode()) % self._factory.steps
        self._waiting[key] = _Sequence(session, index, speculate, alone, steps)

    def step(self) -> list[FinishedSequence]:
        self._admit()
        running = list(self._running.items())
        self._factory.note("step", len(running), *sorted(one.session.text for _, one in running))
        time.sleep(self._factory.delay_s)
        self._misbehave()
        for _, one in running:
            one.steps -= 1
            one.shared += len(running)
            one.done += 1
        finished = [self._finished(key, one) for key, one in running if one.steps <= 0]
        for done in finished:
            del self._running[done.key]
        return finished

    def _admit(self) -> None:
        for key, one in list(self._waiting.items()):
            company = [*self._running.values(), one]
            if len(company) > (1 if any(each.alone for each in company) else self.batch_size):
                return
            self._running[key] = self._waiting.pop(key)

    def _misbehave(self) -> None:
        """Do to the whole batch what one of its videos does."""
        for one in self._running.values():
            text = one.session.text
            if text.startswith("endless"):
                one.steps = 2
                time.sleep(0.02)
            if text.startswith("patient"):
                one.steps = 1 if _others_are_captioned(self._factory) else 2
                time.sleep(0.02)
            if one.steps > 1:
                continue
            if text.startswith("poison"):
                raise RuntimeError("CUDA error: device-side assert triggered")
            if text.startswith("dies") or (text.startswith("together dies") and len(self._running) > 1):
                self._factory.note("died", text, len(self._running))
                os.kill(os.getpid(), signal.SIGKILL)
            if text.startswith("kills all"):
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600.0)
            if text.startswith("hangs"):
                self._factory.note("captioned", text, one.speculate, self._device)
                time.sleep(600.0)

    def _finished(self, key: Hashable, one: _Sequence) -> FinishedSequence:
        text = one.session.text
        self._factory.note("captioned", text, one.speculate, self._device)
        error = _error(text, len(one.session.frames.pixels))
        return (
            FinishedSequence(key, None, error)
            if error is not None
            else FinishedSequence(key, self._caption(one), None)
        )

    def _caption(self, one: _Sequence) -> Caption:
        text, prompt, number = (
            one.session.text,
            one.session.prompts[one.index],
            len(one.session.frames.pixels),
        )
        words = "" if text.startswith("empty") else f"a caption of {text}" + self._more(text)
        if prompt.startswith("second"):
            words += " (second)"
        differs = text.startswith("differs") and not one.speculate
        ids = (1, 2, 4) if differs or (text.startswith("leans") and one.shared > one.done) else (1, 2, 3)
        took = stats(plain=not one.speculate, frames=number, first=one.index == 0)
        took = replace(took, mean_batch_size=one.shared / one.done)
        if text.startswith("long"):
            took = replace(took, context_tokens=took.prompt_tokens + took.completion_tokens - 1)
        if text.startswith("headed") and one.speculate:
            took = replace(
                took, method="specvlm-head/select/static", compressor="pool", compression_ratio=5.0
            )
        if one.speculate:
            took = replace(took, plain_token_s=stats(plain=True, frames=number).token_s)
        return Caption(words, ids, "stop", took, one.session.frames.source)

    def _more(self, text: str) -> str:
        """Return words that no compression makes short, and that are the same each time."""
        numbers = range(self._factory.words)
        return "".join(f" {hashlib.sha256(f'{text} {number}'.encode()).hexdigest()}" for number in numbers)

    def abort(self, key: Hashable) -> None:
        self._waiting.pop(key, None)
        self._running.pop(key, None)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def warm_up(self, frames: Frames, prompt: str) -> None:
        self._factory.note("warm_up")

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)


@dataclass(frozen=True)
class FakeSession:
    """One video, and what it is to be asked."""

    text: str
    prompts: Sequence[str]
    frames: Frames


@dataclass
class _Sequence:
    """One caption in the making."""

    session: FakeSession
    index: int
    speculate: bool
    alone: bool
    steps: int  # that are left
    shared: int = 0  # sequences in its steps
    done: int = 0


_CROWDED: set[str] = set()  # videos for which there was no memory once, in this process


def _others_are_captioned(factory: FakeFactory) -> bool:
    return len(Log(Path(factory.journal)).captioned) >= 2


def _error(text: str, frames: int) -> Exception | None:
    """Return what goes wrong with one caption alone."""
    if text.startswith("explodes"):
        return GenerationError("it went off")
    if text.startswith("bug"):
        return ZeroDivisionError()
    if text.startswith("nan"):
        return NonFiniteLogitsError("NaN logits")
    if text.startswith("huge") and frames > 2:
        return MemoryError("too many frames")
    if text.startswith("prompt"):
        return PromptError("the prompt has no place for a video")
    return None


class Log:
    """What fake engines were asked to do, as their journal tells it."""

    def __init__(self, journal: Path) -> None:
        self.factory = FakeFactory(str(journal))

    @property
    def loads(self) -> list[object]:
        return [number for (number,) in self._lines("load")]

    def lines(self) -> list[list[Any]]:
        """Return all that was noted: a word and what belongs to it."""
        return self._all()

    def _lines(self, word: str) -> list[list[object]]:
        return [rest for first, *rest in self._all() if first == word]

    def _all(self) -> list[list[object]]:
        journal = Path(self.factory.journal)
        return list(map(json.loads, journal.read_text().splitlines())) if journal.exists() else []

    @property
    def events(self) -> list[str]:
        """Return what happened to which video, in order, e.g. `captioned video 1`."""
        lines = [line for line in self._all() if line[0] != "step"]
        return [f"{word} {text}" for word, text, *_ in filter(lambda line: len(line) > 1, lines)]

    @property
    def steps(self) -> list[list[object]]:
        """Return what ran together in each step, by text."""
        return [texts for _, *texts in self._lines("step")]

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


def with_demo(flags: CaptionFlags) -> tuple[CaptionFlags, str]:
    """Return the flags with the demo pair where no model is named, as if it were."""
    return flags if flags.preset or flags.target else replace(flags, preset="demo"), ""
