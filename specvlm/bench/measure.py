"""One timed caption, by each method, with the same clock around all of them; and the conditions they ran under.

Captions are made from a video that is read and preprocessed already; the time of that counts in each method's
end-to-end time, since each would have paid it. Knows no order of methods and no tables.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers

import specvlm
from specvlm.bench.records import Conditions, Configuration, Stages, TimedCaption
from specvlm.bench.stock import Clock, Generated, generate, stock_attention
from specvlm.captioner import Captioner, CaptionOptions, PreparedVideo
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.errors import ConfigError, SpecvlmError
from specvlm.families.base import ModelInputs
from specvlm.host import usable_cores
from specvlm.records import CaptionStats
from specvlm.stats import peak_memory_bytes, reset_peak_memory

Generate = Callable[[Sequence[ModelInputs]], Generated]


class MethodError(Exception):
    """A method cannot caption a video. The message is one line, its own words."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one method did with one prepared video; see `TimedCaption` for the figures."""

    token_ids: tuple[int, ...]
    stages: Stages  # without reading and rest, and without preprocessing that was done before
    decode_s: float
    decode_tokens: int
    wall_s: float
    video_tokens_kept: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    depth_tries: tuple[int, ...] = ()
    compressor: str | None = None
    mean_batch_size: float = 1.0
    settled_tokens: int = 0


class Measurer:
    """Captions prepared videos by any method, and times it."""

    def __init__(
        self,
        captioner: Captioner,
        max_new_tokens: int,
        clock: Clock = time.perf_counter,
        others: Mapping[str, Captioner] | None = None,
    ) -> None:
        """Make ready.

        Args:
            captioner: For all methods, but for the drafts of others.
            max_new_tokens: Most tokens of a caption.
            clock: In seconds; another one where time is to be made up.
            others: By the names of their drafts; they share the captioner's target.
        """
        self._captioner, self._limit, self._clock = captioner, max_new_tokens, clock
        self._others = {} if others is None else others
        self._device = captioner.target.device

    def measure(self, how: Configuration, video: PreparedVideo, name: str, turn: int) -> TimedCaption:
        """Caption once.

        Raises:
            MethodError: This method cannot.
        """
        reset_peak_memory(self._device)
        by = self._transformers if how.method in ("stock", "assisted") else self._ours
        measured = by(how, video, self._of(how))
        return sample_of(how, facts_of(name, video), turn, measured, peak_memory_bytes(self._device))

    def _of(self, how: Configuration) -> Captioner:
        """The captioner with a configuration's draft."""
        return self._others.get(how.draft or "", self._captioner)

    def _ours(self, how: Configuration, video: PreparedVideo, captioner: Captioner) -> Measured:
        options: CaptionOptions = {**options_of(how), "max_new_tokens": self._limit}
        began = self._clock()
        try:
            caption = captioner.caption(video, speculate=how.method != "plain", **options)
        except ConfigError:
            raise  # what was asked for is wrong, not this video
        except (SpecvlmError, torch.OutOfMemoryError) as error:
            raise MethodError(one_line(error)) from error
        return of_stats(caption.token_ids, caption.stats, self._clock() - began)

    def _transformers(self, how: Configuration, video: PreparedVideo, captioner: Captioner) -> Measured:
        """`generate()` with its KV cache and sdpa, greedy, on the loaded weights and the same inputs."""
        with self._stock(how, captioner) as generate:
            began = self._clock()
            written = generate([video.inputs])
            (tokens,) = written.token_ids
            captioner.detokenize(tokens)
            ended = self._clock()
        stages = Stages(prefill_s=written.prefill_s, steps_s=written.steps_s)
        return Measured(tokens, stages, written.steps_s, len(tokens) - written.first_tokens, ended - began)

    @contextmanager
    def _stock(self, how: Configuration, captioner: Captioner) -> Iterator[Generate]:
        """`generate()` of a method, while the loaded models run stock attention.

        Raises:
            MethodError: It cannot caption; in its own words.
        """
        target = captioner.target
        more = {"assistant_model": _assistant(captioner)} if how.method == "assisted" else {}

        def run(inputs: Sequence[ModelInputs]) -> Generated:
            try:
                return generate(
                    target.model, target.embedding_device, inputs, self._limit, self._clock, **more
                )
            except Exception as error:  # whatever it is, it is its own error, and the others continue
                raise MethodError(one_line(error)) from error

        with stock_attention([target.model, *more.values()]), torch.inference_mode():
            yield run


def options_of(how: Configuration) -> CaptionOptions:
    """What of a configuration is said to a captioner; the rest are its defaults."""
    said = {name: getattr(how, name, None) for name in CaptionOptions.__annotations__}
    return cast("CaptionOptions", {name: value for name, value in said.items() if value is not None})


def _assistant(captioner: Captioner) -> Any:
    """The draft as `transformers` takes it.

    Raises:
        MethodError: There is none.
    """
    if not isinstance(captioner.draft, SmallModelDraft):
        raise MethodError("no draft that transformers could take as its assistant_model")
    return captioner.draft.model.model


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def of_stats(token_ids: tuple[int, ...], stats: CaptionStats, wall_s: float) -> Measured:
    """The captioner's own stage times; the wall time around them is ours, as for the other methods."""
    in_rounds = stats.draft_s + stats.verify_s + stats.commit_s
    stages = Stages(
        vision_s=stats.vision_s,
        target_prefill_s=stats.target_prefill_s,
        draft_prefill_s=stats.draft_prefill_s,
        draft_s=stats.draft_s,
        verify_s=stats.verify_s,
        commit_s=stats.commit_s,
        host_s=max(stats.decode_s - in_rounds, 0.0),
    )
    return Measured(
        token_ids=token_ids,
        stages=stages,
        decode_s=stats.decode_s,
        decode_tokens=len(token_ids) - 1,
        wall_s=wall_s,
        video_tokens_kept=stats.video_tokens_kept,
        num_drafts=stats.num_drafts,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
        acceptance_histogram=stats.acceptance_histogram,
        depth_tries=stats.depth_tries,
        compressor=stats.compressor,
        mean_batch_size=stats.mean_batch_size,
        settled_tokens=stats.settled_tokens,
    )


class VideoFacts(NamedTuple):
    """What a sample says of its video, and what was done once for all methods."""

    name: str
    num_frames: int
    video_tokens: int
    prompt_tokens: int
    read_s: float
    preprocess_s: float  # 0.0 where each method preprocesses for itself


def facts_of(name: str, video: PreparedVideo) -> VideoFacts:
    """What a prepared video says of itself."""
    return VideoFacts(
        name=name,
        num_frames=video.num_frames,
        video_tokens=video.inputs.video_tokens,
        prompt_tokens=video.inputs.prompt_tokens,
        read_s=video.video_decode_s,
        preprocess_s=video.preprocess_s,
    )


def sample_of(
    how: Configuration, facts: VideoFacts, turn: int, measured: Measured, peak: int
) -> TimedCaption:
    """The sample of one caption."""
    return TimedCaption(
        configuration=how,
        video=facts.name,
        turn=turn,
        num_frames=facts.num_frames,
        video_tokens=facts.video_tokens,
        video_tokens_kept=measured.video_tokens_kept,
        prompt_tokens=facts.prompt_tokens,
        token_ids=measured.token_ids,
        stages=_whole(measured, facts),
        decode_s=measured.decode_s,
        decode_tokens=measured.decode_tokens,
        total_s=facts.read_s + facts.preprocess_s + measured.wall_s,
        num_drafts=measured.num_drafts,
        num_draft_tokens=measured.num_draft_tokens,
        num_accepted_tokens=measured.num_accepted_tokens,
        acceptance_histogram=measured.acceptance_histogram,
        depth_tries=measured.depth_tries,
        peak_memory_bytes=peak,
        compressor=measured.compressor,
        mean_batch_size=measured.mean_batch_size,
        settled_tokens=measured.settled_tokens,
    )


def _whole(measured: Measured, facts: VideoFacts) -> Stages:
    """All stages of a caption: with what was done once for all methods, and with what no stage has."""
    known_s = sum(astuple(measured.stages))
    return replace(
        measured.stages,
        read_s=facts.read_s,
        preprocess_s=facts.preprocess_s + measured.stages.preprocess_s,
        rest_s=max(measured.wall_s - known_s, 0.0),
    )


class BenchRequest(NamedTuple):
    """What the user asked for, as the conditions tell it."""

    command: str
    target: str
    draft: str | None
    prompt: str
    max_new_tokens: int
    repeat: int
    clips: str


def conditions(captioner: Captioner, asked: BenchRequest, videos: tuple[str, ...]) -> Conditions:
    """Machine, versions and settings of this moment."""
    info = captioner.info
    return Conditions(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{platform.machine()} {platform.system()}",
        processor=_processor(),
        device=info.device,
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        python_version=platform.python_version(),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        specvlm_version=specvlm.__version__,
        dtype=info.dtype,
        family=info.family,
        videos=videos,
        peak_memory_of="device" if captioner.target.device.type == "cuda" else "process",
        frame_multiple=captioner.frame_multiple,
        **asked._asdict(),
    )


def _processor() -> str:
    """Name of the CPU, if the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
