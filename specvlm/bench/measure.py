"""One timed caption, by each method, with the same clock around all of them; and the conditions they ran under.

Captions are made from a video that is read and preprocessed already; the time of that counts in each method's
end-to-end time, since each would have paid it. Knows no order of methods and no tables.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import specvlm
from specvlm.attention import ATTENTION
from specvlm.bench.records import Conditions, Configuration, Sample, Stages
from specvlm.captioner import Captioner, CaptionOptions, PreparedVideo
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.errors import ConfigError, SpecvlmError
from specvlm.records import CaptionStats
from specvlm.stats import peak_memory_bytes, reset_peak_memory

Clock = Callable[[], float]
_STOCK = "sdpa"


class MethodError(Exception):
    """A method cannot caption a video. The message is one line, its own words."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one method did with one prepared video; see `Sample` for the figures."""

    token_ids: tuple[int, ...]
    stages: Stages  # without reading, preprocessing and rest
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

    def measure(self, how: Configuration, video: PreparedVideo, name: str, turn: int) -> Sample:
        """Caption once.

        Raises:
            MethodError: This method cannot.
        """
        reset_peak_memory(self._device)
        by = self._transformers if how.method in ("stock", "assisted") else self._ours
        measured = by(how, video, self._others.get(how.draft or "", self._captioner))
        return _sample(how, video, name, turn, measured, peak_memory_bytes(self._device))

    def _ours(self, how: Configuration, video: PreparedVideo, captioner: Captioner) -> Measured:
        options: CaptionOptions = {**_options(how), "max_new_tokens": self._limit}
        began = self._clock()
        try:
            caption = captioner.caption(video, speculate=how.method != "plain", **options)
        except ConfigError:
            raise  # what was asked for is wrong, not this video
        except (SpecvlmError, torch.OutOfMemoryError) as error:
            raise MethodError(_one_line(error)) from error
        return _of_stats(caption.token_ids, caption.stats, self._clock() - began)

    def _transformers(self, how: Configuration, video: PreparedVideo, captioner: Captioner) -> Measured:
        """`generate()` with its KV cache and sdpa, greedy, on the loaded weights and the same inputs."""
        target, inputs, streamer = captioner.target.model, video.inputs, _FirstTokens(self._clock)
        more = {"assistant_model": _assistant(captioner)} if how.method == "assisted" else {}
        with stock_attention([target, *more.values()]), torch.inference_mode():
            began = self._clock()
            try:
                tensors = {
                    key: value.to(captioner.target.embedding_device) for key, value in inputs.tensors.items()
                }
                written = target.generate(
                    **tensors, max_new_tokens=self._limit, do_sample=False, streamer=streamer, **more
                )
            except Exception as error:  # whatever it is, it is its own error, and the others go on
                raise MethodError(_one_line(error)) from error
            tokens = tuple(written[0, inputs.prompt_tokens :].tolist())
            generated = self._clock()
            captioner.detokenize(tokens)
            ended = self._clock()
        decode_s = generated - streamer.first_s
        stages = Stages(prefill_s=streamer.first_s - began, steps_s=decode_s)
        return Measured(tokens, stages, decode_s, len(tokens) - streamer.first_tokens, ended - began)


class _FirstTokens:
    """A streamer that notes when `generate()` has its first new tokens, and how many they are."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._calls = clock, 0
        self.first_s, self.first_tokens = 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        """The first call is the prompt, the second the first new token, or those of the first round."""
        self._calls += 1
        if self._calls == 2:
            self.first_s, self.first_tokens = self._clock(), value.numel()

    def end(self) -> None:
        """Nothing to flush."""


def _options(how: Configuration) -> CaptionOptions:
    """What of a configuration is said to a captioner; the rest are its defaults."""
    options: CaptionOptions = {}
    if how.pruner is not None:
        options["pruner"] = how.pruner
    if how.prune_ratio is not None:
        options["prune_ratio"] = how.prune_ratio
    if how.tree is not None:
        options["tree"] = how.tree
    return options


def _assistant(captioner: Captioner) -> Any:
    """The draft as `transformers` takes it.

    Raises:
        MethodError: There is none.
    """
    if not isinstance(captioner.draft, SmallModelDraft):
        raise MethodError("no draft that transformers could take as its assistant_model")
    return captioner.draft.model.model


@contextmanager
def stock_attention(models: list[Any]) -> Iterator[None]:
    """Have loaded models run stock sdpa throughout, and put this library's attention back."""
    for model in models:
        model.set_attn_implementation(_STOCK)
    try:
        yield
    finally:
        for model in models:
            model.set_attn_implementation({"": _STOCK, "text_config": ATTENTION, "vision_config": _STOCK})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _of_stats(token_ids: tuple[int, ...], stats: CaptionStats, wall_s: float) -> Measured:
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
    )


def _sample(
    how: Configuration, video: PreparedVideo, name: str, turn: int, measured: Measured, peak: int
) -> Sample:
    return Sample(
        configuration=how,
        video=name,
        turn=turn,
        num_frames=video.num_frames,
        video_tokens=video.inputs.video_tokens,
        video_tokens_kept=measured.video_tokens_kept,
        prompt_tokens=video.inputs.prompt_tokens,
        token_ids=measured.token_ids,
        stages=_whole(measured, video),
        decode_s=measured.decode_s,
        decode_tokens=measured.decode_tokens,
        total_s=video.video_decode_s + video.preprocess_s + measured.wall_s,
        num_drafts=measured.num_drafts,
        num_draft_tokens=measured.num_draft_tokens,
        num_accepted_tokens=measured.num_accepted_tokens,
        acceptance_histogram=measured.acceptance_histogram,
        depth_tries=measured.depth_tries,
        peak_memory_bytes=peak,
        compressor=measured.compressor,
    )


def _whole(measured: Measured, video: PreparedVideo) -> Stages:
    """All stages of a caption: with what was done once for all methods, and with what no stage has."""
    known_s = sum(astuple(measured.stages))
    return replace(
        measured.stages,
        read_s=video.video_decode_s,
        preprocess_s=video.preprocess_s,
        rest_s=max(measured.wall_s - known_s, 0.0),
    )


class Asked(NamedTuple):
    """What the user asked for, as the conditions tell it."""

    command: str
    target: str
    draft: str | None
    prompt: str
    max_new_tokens: int
    repeat: int
    clips: str


def conditions(captioner: Captioner, asked: Asked, videos: tuple[str, ...]) -> Conditions:
    """Machine, versions and settings of this moment."""
    info = captioner.info
    return Conditions(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{platform.machine()} {platform.system()}",
        processor=_processor(),
        device=info.device,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
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
    """Name of the CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
