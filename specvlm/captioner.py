"""From one video and a prompt to a caption: reading, preparing, prefilling, decoding, and the statistics of each.

A captioner holds a loaded target and perhaps a draft. It knows nothing of folders, jobs or ledgers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch

from specvlm.adaptive import AdaptiveTree, Learned, TreeBounds
from specvlm.batch import CaptionBatch, FinishedCaption, Kind
from specvlm.choosing import FixedTree, TreeChooser
from specvlm.config import (
    FrameSettings,
    GenerationSettings,
    PositionsName,
    PrunerName,
    SpeculationSettings,
    TreeName,
    of_type,
    one_of,
    whole,
    within,
)
from specvlm.costs import CostStore
from specvlm.decode import CaptionSequence, Decoder, DecodeSettings
from specvlm.drafts.base import Draft
from specvlm.errors import (
    ConfigError,
    GenerationError,
    GenerationTimeoutError,
    Setting,
    SpecvlmError,
    brief,
)
from specvlm.families.base import ModelInputs
from specvlm.graphs import Capture, CudaCapture
from specvlm.model import VideoLM
from specvlm.prefill import Begun
from specvlm.preset import DEFAULT_PROMPT
from specvlm.records import Caption, CaptionStats, Frames, VideoSource
from specvlm.sampling import TokenRule, logits_rules
from specvlm.settling import Settling
from specvlm.stats import StageClock, device_words, peak_memory_bytes
from specvlm.tree import ROOT, make_shape
from specvlm.video import read_video

if TYPE_CHECKING:
    from specvlm.session import PromptSession


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded, for the record.

    Attributes:
        target: As the caller named it: a hub id or a folder.
        target_revision: Commit of a hub model, hash of all files that are read of a local one, or None.
        draft: As the caller named it, or None.
        draft_revision: As `target_revision`.
        family: As `model_type` in config.json.
        dtype: Of weights and caches.
        device: Of the target, in words.
        transformers_version: The version that runs the models.
        processor_options: Options of the video processor that are set rather than left to changing defaults.
        warnings: Why captions may not be those of stock `generate()`, one line each; empty for most checkpoints.
    """

    target: str
    target_revision: str | None
    draft: str | None
    draft_revision: str | None
    family: str
    dtype: str
    device: str
    transformers_version: str
    processor_options: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    """A video read and preprocessed with its prompt; it can be captioned any number of times.

    Attributes:
        inputs: What the processor made.
        num_frames: F.
        source: The file's own facts, or None where the caller read the frames.
        video_decode_s: Time of reading.
        preprocess_s: Time of the processor.
    """

    inputs: ModelInputs
    num_frames: int
    source: VideoSource | None
    video_decode_s: float
    preprocess_s: float


class CaptionOptions(TypedDict, total=False):
    """Keywords of `Captioner.caption`: the fields of GenerationSettings and SpeculationSettings."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    seed: int
    exact: bool
    pruner: PrunerName
    prune_ratio: float
    top_p: float
    tree: TreeName
    positions: PositionsName
    depth: int
    nodes: int
    width: int


_KEPT_DECODERS = 2  # that have nothing in flight

Video = str | bytes | os.PathLike[str] | Frames
_VIDEO = (str, bytes, os.PathLike, Frames)


def _settings(options: CaptionOptions) -> tuple[GenerationSettings, SpeculationSettings]:
    """Sort keywords into the two groups; `seed` is of both."""
    known = {f.name for f in fields(GenerationSettings)} | {f.name for f in fields(SpeculationSettings)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    chosen: dict[str, Any] = dict(options)

    def pick(group: type) -> dict[str, Any]:
        return {f.name: chosen[f.name] for f in fields(group) if f.name in chosen}

    return GenerationSettings(**pick(GenerationSettings)), SpeculationSettings(**pick(SpeculationSettings))


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one video of `Captioner.caption_many`.

    Attributes:
        index: Its position in `videos`.
        caption: Its caption, or None.
        error: Why it has none, or None.
    """

    index: int
    caption: Caption | None
    error: SpecvlmError | None


class Captioner:
    """A loaded target, and perhaps a draft, ready to caption. Made by `specvlm.load`."""

    def __init__(
        self,
        target: VideoLM,
        processor: Any,
        draft: Draft | None,
        info: ModelInfo,
        frames: FrameSettings,
        prompt: str = DEFAULT_PROMPT,
    ) -> None:
        """`frames`, `prompt`: what to read of a video, and what to ask, when a call does not say."""
        self.target, self.draft = target, draft
        self.processor, self.info, self.frames, self.prompt = processor, info, frames, prompt
        self.generation_config = target.model.generation_config
        self.costs = CostStore()
        self.settling: Settling | None = Settling()
        self.make_capture: Callable[[torch.device], Capture] = CudaCapture
        self._learned: dict[Kind, Learned] = {}
        self._decoders: dict[Kind, Decoder] = {}

    # --- decoders, for `CaptionBatch` ---

    def kind(self, speculate: bool, options: CaptionOptions) -> Kind:
        """How to decode: what keywords ask for.

        Raises:
            ConfigError: An option is unknown, out of range, or of another type.
        """
        of_type("speculate", speculate, bool, "give True, or False for plain decoding")
        generation, speculation = _settings(options)
        return self.kind_of(generation, speculation if speculate else None)

    def kind_of(self, generation: GenerationSettings, speculation: SpeculationSettings | None) -> Kind:
        """How to decode; `speculation` None: plainly. Without a draft everything is decoded plainly."""
        if speculation is None or self.draft is None:
            return Kind(generation, None)
        return Kind(generation, self.draft.settings(speculation))

    def chooser(self, settings: SpeculationSettings, generation: GenerationSettings) -> TreeChooser:
        """What chooses the tree of each round."""
        assert self.draft is not None
        if settings.tree != "auto":
            return FixedTree(make_shape(settings, self.draft.vocabulary, self.target.device))
        learned = self._learned.setdefault(Kind(generation, settings), Learned())
        bounds = TreeBounds(settings.most_depth, settings.most_nodes)
        return AdaptiveTree(learned, self.costs, generation.max_new_tokens, self.target.device, bounds)

    def nodes(self, kind: Kind) -> int:
        """Most nodes of a round."""
        if kind.speculation is None or self.draft is None:
            return 1
        if kind.speculation.tree == "auto":
            return kind.speculation.most_nodes
        return make_shape(kind.speculation, self.draft.vocabulary, self.target.device).nodes

    def end_tokens(self, generation: GenerationSettings) -> tuple[int, ...]:
        """Tokens that end a caption."""
        return logits_rules(self.generation_config, generation).eos

    def _decode_settings(self, kind: Kind) -> DecodeSettings:
        rules = logits_rules(self.generation_config, kind.generation)

        def rule() -> TokenRule:
            return TokenRule(rules, kind.generation, self.target.vocabulary, self.target.device)

        settling = self.settling if kind.generation.exact else None
        if kind.speculation is None:
            return DecodeSettings(rule, FixedTree(ROOT), settling=settling)
        chooser, draft = self.chooser(kind.speculation, kind.generation), self.draft
        assert draft is not None
        propose = partial(draft.proposer, kind.speculation)
        return DecodeSettings(rule, chooser, propose, draft, settling)

    def take_decoder(self, kind: Kind) -> Decoder:
        """A decoder that has nothing in flight: the one that decoded this kind before, where it is free."""
        decoder = self._decoders.pop(kind, None)
        if decoder is None:
            decoder = Decoder(self.target, StageClock(self.target.device), self.make_capture)
        decoder.configure(self._decode_settings(kind))
        return decoder

    def refresh(self, decoder: Decoder, kind: Kind) -> None:
        """Have a decoder guess with the draft as it is now, whose vocabulary may have been trimmed meanwhile."""
        if kind.speculation is not None and decoder.settings.draft is not self.draft:
            decoder.follow(self._decode_settings(kind))

    def give_back(self, decoder: Decoder, kind: Kind) -> None:
        """A decoder has nothing in flight any more. The last ones stay, as their graphs and memory serve again."""
        self._decoders[kind] = decoder
        while len(self._decoders) > _KEPT_DECODERS:
            self._decoders.pop(next(iter(self._decoders)))
        if not self.target.captures:  # memory alone is soon had again
            decoder.release()

    def finished(
        self, sequence: CaptionSequence, video: PreparedVideo, kind: Kind, decoder: Decoder, *, first: bool
    ) -> Caption:
        """The caption of a sequence that has ended.

        `first`: reading and preprocessing of the video count in it; of several prompts, in one caption only.
        """
        assert sequence.text.finish_reason is not None
        tokens = tuple(sequence.text.tokens)
        stats = self._stats(sequence, video, kind, decoder, first=first)
        return Caption(self.detokenize(tokens), tokens, sequence.text.finish_reason, stats, video.source)

    def _stats(
        self, sequence: CaptionSequence, video: PreparedVideo, kind: Kind, decoder: Decoder, *, first: bool
    ) -> CaptionStats:
        text, seconds, read = sequence.text, sequence.seconds, sequence.draft
        read_s = video.video_decode_s if first else 0.0
        stages_s = sum(seconds[stage] for stage in ("vision", "target_prefill", "draft_prefill", "decode"))
        method = "plain"
        if kind.speculation is not None and self.draft is not None:
            method = self.draft.method(kind.speculation)
        video_tokens, kept = video.inputs.video_tokens, 0 if read is None else read.kept
        compressor = None if read is None else read.compressor
        return CaptionStats(
            method=method,
            num_frames=video.num_frames,
            video_tokens=video_tokens,
            video_tokens_kept=kept,
            compressor=compressor,
            compression_ratio=video_tokens / kept if compressor and kept else None,
            prompt_tokens=video.inputs.prompt_tokens,
            completion_tokens=len(text.tokens),
            num_drafts=sum(text.histogram),
            num_draft_tokens=text.guessed,
            num_accepted_tokens=sum(k * count for k, count in enumerate(text.histogram)),
            acceptance_histogram=tuple(text.histogram),
            depth_tries=tuple(text.tries),
            video_decode_s=read_s,
            preprocess_s=video.preprocess_s,
            vision_s=seconds["vision"],
            target_prefill_s=seconds["target_prefill"],
            draft_prefill_s=seconds["draft_prefill"],
            decode_s=seconds["decode"],
            draft_s=seconds["draft"] if kind.speculation is not None else 0.0,
            verify_s=seconds["verify"],
            commit_s=seconds["commit"],
            total_s=read_s + video.preprocess_s + stages_s,
            plain_token_s=decoder.plain_token_s(sequence),
            peak_memory_bytes=peak_memory_bytes(self.target.device),
            device=device_words(self.target.device),
            mean_batch_size=sequence.shared_steps / sequence.steps if sequence.steps else 1.0,
            context_tokens=self.target.context_tokens,
            settled_tokens=text.settled,
            smallest_margin=text.smallest_margin if math.isfinite(text.smallest_margin) else None,
        )

    @property
    def frame_multiple(self) -> int:
        """The number of frames that the model takes is a multiple of this; see `read_video`."""
        return self.target.family.frame_multiple(self.processor)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Token ids -> text without special tokens."""
        text: str = self.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def prepare(
        self,
        video: Video,
        prompt: str | None = None,
        *,
        system: str | None = None,
        frames: FrameSettings | None = None,
    ) -> PreparedVideo:
        """Read and preprocess a video once, to caption it several times; arguments are those of `caption`.

        Raises:
            VideoError: The file gives no frames.
            PromptError: The prompt cannot be used.
            ConfigError: An argument is of another type, or frame settings were given for frames that are read already.
        """
        prompt = self.prompt if prompt is None else prompt
        _check_texts([prompt], system)
        read, decode_s = self._read(video, frames)
        start = time.perf_counter()
        inputs = self.target.family.prepare(self.processor, read, prompt, system)
        preprocess_s = time.perf_counter() - start
        return PreparedVideo(inputs, len(read.pixels), read.source, decode_s, preprocess_s)

    def _read(self, video: Video, frames: FrameSettings | None) -> tuple[Frames, float]:
        """Frames of a video, and how long reading them took."""
        settings = self.frames if frames is None else frames
        of_type("frames", settings, FrameSettings, "give FrameSettings, e.g. FrameSettings(num_frames=8)")
        of_type(
            "video", video, _VIDEO, "give one path, or Frames; for several videos there is caption_many()"
        )
        start = time.perf_counter()
        if isinstance(video, Frames) and frames is not None:
            raise ConfigError(
                "frame settings choose frames of a file, and these frames are chosen; leave them out"
            )
        if not isinstance(video, Frames):
            video = read_video(video, settings, frame_multiple=self.frame_multiple)
        _check_frames(video)
        elapsed_s = time.perf_counter() - start
        # Frames that another process read took their time there.
        return video, elapsed_s if video.source is None else video.source.decode_s

    def session(
        self,
        video: Video,
        prompts: Sequence[str],
        *,
        system: str | None = None,
        frames: FrameSettings | None = None,
    ) -> PromptSession:
        """Read and preprocess a video once, to caption it with several prompts that share its prefill.

        Args:
            video: A path, or decoded frames.
            prompts: As in `caption`. One that cannot be used is an error when it is captioned.
            system: The system message of all of them.
            frames: Which frames to read; None takes the captioner's own.

        Raises:
            VideoError: The file gives no frames.
            ConfigError: There are no prompts, an argument is of another type, or frame settings were given for frames
                that are read already.
        """
        from specvlm.session import PromptSession  # which captions with this module

        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)) or not prompts:
            fix = "give at least one, in a list"
            raise ConfigError(Setting("prompts", prompts), "is not a list of prompts", fix=fix)
        _check_texts(prompts, system)
        read, decode_s = self._read(video, frames)
        return PromptSession(self, read, prompts, system, decode_s)

    def caption_prompts(
        self,
        video: Video,
        prompts: Sequence[str],
        *,
        system: str | None = None,
        speculate: bool = True,
        frames: FrameSettings | None = None,
        time_limit_s: float | None = None,
        **options: Unpack[CaptionOptions],
    ) -> list[Caption]:
        """Caption one video once for each of several prompts: read, preprocessed, seen and prefilled once.

        Each caption is what `caption` gives for its prompt. Arguments and errors are those of `caption`;
        `time_limit_s` is for each caption.
        """
        kind = self.kind(speculate, options)  # wrong options fail before a video is read
        _check_limit(time_limit_s)
        session = self.session(video, prompts, system=system, frames=frames)
        return [session.caption_as(kind, index, time_limit_s) for index in range(len(prompts))]

    def caption(
        self,
        video: Video | PreparedVideo,
        prompt: str | None = None,
        *,
        system: str | None = None,
        speculate: bool = True,
        frames: FrameSettings | None = None,
        time_limit_s: float | None = None,
        **options: Unpack[CaptionOptions],
    ) -> Caption:
        """Caption one video.

        Args:
            video: A path, decoded frames, or what `prepare` made, which has its prompt and frames already.
            prompt: The user's text; `<video>` in it marks where the video goes, else the video comes first.
                None asks what the preset asks, as the command line does.
            system: The system message; None leaves it to the chat template.
            speculate: False decodes plainly: same caption, slower.
            frames: Which frames to read; None takes the captioner's own.
            time_limit_s: Give up between two rounds once this much time has passed.
            **options: Fields of GenerationSettings and SpeculationSettings.

        Raises:
            ConfigError: An option is unknown, out of range, or of another type.
            VideoError: The file gives no frames.
            PromptError: The prompt cannot be used.
            GenerationError: There is no caption.
            GenerationTimeoutError: Not within the time limit.
        """
        began = time.monotonic()
        _check_limit(time_limit_s)
        kind = self.kind(speculate, options)  # wrong options fail before a video is read
        prepared = self._prepared(video, prompt, system, frames)
        return self.caption_one(prepared, kind, began=began, time_limit_s=time_limit_s)

    def caption_one(
        self,
        video: PreparedVideo,
        kind: Kind,
        *,
        begun: Begun | None = None,
        first: bool = True,
        began: float = 0.0,
        time_limit_s: float | None = None,
    ) -> Caption:
        """Caption one prepared video; `began`, on the monotonic clock, is when its time limit began to count.

        See `CaptionBatch.add` for the other arguments.

        Raises:
            GenerationError: There is no caption.
            GenerationTimeoutError: Not within the time limit.
        """
        batch = CaptionBatch(self, 1)
        batch.add(0, video, kind, begun=begun, first=first)
        try:
            while not (ended := batch.step()):
                if time_limit_s is not None and time.monotonic() - began > time_limit_s:
                    raise GenerationTimeoutError(
                        f"the caption was not done after {time_limit_s:g} s and {len(batch.text_of(0))} tokens; "
                        "give it more time, or fewer tokens"
                    )
        finally:
            batch.close()
        if ended[0].error is not None:
            raise ended[0].error
        assert ended[0].caption is not None
        return ended[0].caption

    def stream(
        self,
        video: Video | PreparedVideo,
        prompt: str | None = None,
        *,
        system: str | None = None,
        speculate: bool = True,
        frames: FrameSettings | None = None,
        **options: Unpack[CaptionOptions],
    ) -> Iterator[str]:
        """Caption one video and yield its text in pieces, as rounds end; joined, they are `caption(...).text`.

        Arguments and errors are those of `caption`.
        """
        kind = self.kind(speculate, options)
        batch = CaptionBatch(self, 1)
        batch.add(0, self._prepared(video, prompt, system, frames), kind)
        told = ""
        try:
            while not (ended := batch.step()):
                text = self.detokenize(batch.text_of(0))
                # Half a character at the end of the tokens so far shows as U+FFFD: wait for the rest of it.
                if text.startswith(told) and len(text) > len(told) and not text.endswith("\ufffd"):
                    yield text[len(told) :]
                    told = text
        finally:
            batch.close()
        if ended[0].error is not None:
            raise ended[0].error
        assert ended[0].caption is not None
        rest = ended[0].caption.text
        if len(rest) > len(told):
            yield rest[len(told) :]

    def _prepared(
        self,
        video: Video | PreparedVideo,
        prompt: str | None,
        system: str | None,
        frames: FrameSettings | None,
    ) -> PreparedVideo:
        if not isinstance(video, PreparedVideo):
            return self.prepare(video, prompt, system=system, frames=frames)
        if (prompt, system, frames) != (None, None, None):
            raise ConfigError("a prepared video has its prompt and frames already; give them to prepare()")
        return video

    def caption_many(
        self,
        videos: Iterable[Video | PreparedVideo | tuple[Video, str]],
        prompt: str | None = None,
        *,
        batch_size: int | None = None,
        system: str | None = None,
        speculate: bool = True,
        frames: FrameSettings | None = None,
        on_error: Literal["return", "raise"] = "return",
        **options: Unpack[CaptionOptions],
    ) -> Iterator[Done]:
        """Caption many videos, several at a time; each gets the caption that `caption` gives alone.

        A video is admitted as soon as another one is done (continuous batching); none waits for another to end.

        Args:
            videos: Paths, decoded frames, what `prepare` made, or pairs of a video and its own prompt. It is read
                lazily, only as far ahead as the batch needs.
            prompt: As in `caption`, for all videos without one of their own.
            batch_size: Most videos in flight; None: as many as memory holds and as help. When memory runs out, it is
                lowered, and what was in flight is captioned again.
            system: The system message of all of them; not with prepared videos.
            speculate: False decodes plainly: same captions, slower.
            frames: Which frames to read; not with prepared videos or decoded frames.
            on_error: `return` yields a result with the error for a video that gives no caption; `raise` raises the
                first error.
            **options: Fields of GenerationSettings and SpeculationSettings.

        Yields:
            Results as they finish, in any order; see `Done`.

        Raises:
            ConfigError: An option is unknown, out of range, or of another type.
            SpecvlmError: With `on_error="raise"`, why a video has no caption.
        """
        kind = self.kind(speculate, options)
        one_of("on_error", on_error, ("return", "raise"))
        if batch_size is not None:
            whole("batch_size", batch_size)
            within("batch_size", batch_size, 1, 1024, "give 1 to 1024 videos, or None")
        if isinstance(videos, (*_VIDEO, PreparedVideo)):
            fix = "give a list of videos, or use caption()"
            raise ConfigError(Setting("videos", videos), "is one video", fix=fix)
        of_type("videos", videos, Iterable, "give a list of videos")
        asked = _Batch(prompt, system, frames, kind)
        return self._caption_many(
            enumerate(videos), CaptionBatch(self, batch_size), asked, on_error == "raise"
        )

    def _caption_many(
        self, videos: Iterator[tuple[int, Any]], batch: CaptionBatch, asked: _Batch, raises: bool
    ) -> Iterator[Done]:
        try:
            more = True
            while more or len(batch):
                done = list[Done]()
                while more and batch.has_room():
                    index, video = next(videos, (-1, None))
                    more = index >= 0
                    if more and (error := self._add(batch, index, video, asked)) is not None:
                        done.append(Done(index, None, error))
                        break  # say so at once
                done += [_done(one) for one in batch.step()]
                for one in done:
                    if one.error is not None and raises:
                        raise one.error
                    yield one
        finally:
            batch.close()

    def _add(self, batch: CaptionBatch, index: int, video: Any, asked: _Batch) -> SpecvlmError | None:
        """Prepare a video and queue it; -> why that is not possible."""
        prompt = asked.prompt
        # Frames and prepared videos are no pairs, though frames are a tuple.
        if isinstance(video, tuple) and not isinstance(video, Frames):
            if len(video) != 2 or not isinstance(video[1], str):
                raise ConfigError(f"videos[{index}] is a tuple that is not a video and its prompt")
            video, prompt = video
        try:
            batch.add(index, self._prepared(video, prompt, asked.system, asked.frames), asked.kind)
        except ConfigError:
            raise  # every other video would fail in the same way
        except SpecvlmError as error:
            return error
        return None


class _Batch(NamedTuple):
    """What is asked of all videos of `caption_many`."""

    prompt: str | None
    system: str | None
    frames: FrameSettings | None
    kind: Kind


def _done(one: FinishedCaption) -> Done:
    error = one.error
    if error is not None and not isinstance(error, SpecvlmError):
        reason = " ".join(str(error).split()) or type(error).__name__
        made = GenerationError(f"{type(error).__name__}: {reason}")
        made.__cause__ = error
        error = made
    assert isinstance(one.key, int)
    return Done(one.key, one.caption, error)


def _check_texts(prompts: Iterable[object], system: object) -> None:
    for prompt in prompts:
        of_type("prompt", prompt, str, "give a text; for several prompts there is caption_prompts()")
    of_type("system", system, (str, type(None)), "give a text, or None for that of the chat template")


def _check_limit(time_limit_s: float | None) -> None:
    if time_limit_s is not None:
        within("time_limit_s", time_limit_s, 0.0, math.inf, "give seconds, or None for no limit")


def _check_frames(frames: Frames) -> None:
    pixels = frames.pixels
    of_type("frames.pixels", pixels, np.ndarray, "give an array, uint8 [frames, height, width, 3]")
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or len(pixels) == 0:
        raise ConfigError(
            f"frames of shape {pixels.shape}, {pixels.dtype} cannot be captioned; "
            "give uint8 [frames, height, width, 3]"
        )
    try:
        times_s = np.asarray(frames.times_s, np.float64)
    except (TypeError, ValueError):
        times_s = np.empty(0)
    if times_s.shape != (len(pixels),):
        raise ConfigError(
            f"{len(pixels)} frames have the times {brief(frames.times_s)}; give one each, in seconds"
        )
    if not np.isfinite(times_s).all() or (np.diff(times_s) < 0.0).any():
        raise ConfigError(
            f"the times of frames {brief(frames.times_s)} do not ascend; give frames in their order"
        )
