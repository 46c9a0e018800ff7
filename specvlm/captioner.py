"""From one video and a prompt to a caption: reading, preparing, prefilling, decoding, and the statistics of each.

A captioner holds a loaded target and perhaps a draft. It knows nothing of folders, jobs or ledgers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import torch

from specvlm.adaptive import AdaptiveTree, Bounds, Learned
from specvlm.choosing import FixedTree, TreeChooser
from specvlm.config import (
    FrameSettings,
    GenerationSettings,
    PositionsName,
    PrunerName,
    SpeculationSettings,
    TreeName,
)
from specvlm.costs import CostStore
from specvlm.decode import Decoding, RowText, Speculation, TargetRows
from specvlm.drafts.base import Draft, DraftJob, DraftRow, Proposer
from specvlm.errors import ConfigError, GenerationTimeoutError
from specvlm.estimate import PlainEstimate
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM
from specvlm.prefill import Features, Prompt, TargetReader, embed
from specvlm.records import Caption, CaptionStats, Frames, VideoSource
from specvlm.sampling import TokenRule, logits_rules
from specvlm.stats import StageClock, device_words, peak_memory_bytes, reset_peak_memory
from specvlm.tree import ROOT, make_shape
from specvlm.verify import Accept, accept
from specvlm.video import read_video

if TYPE_CHECKING:
    from specvlm.session import PromptSession


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded, for the record.

    Attributes:
        target: As the caller named it: a hub id or a folder.
        target_revision: Commit of a hub model, hash of a local one's config, or None.
        draft: As the caller named it, or None.
        draft_revision: As `target_revision`.
        family: As `model_type` in config.json.
        dtype: Of weights and caches.
        device: Of the target, in words.
        transformers_version: The version that runs the models.
        processor_options: Options of the video processor that are set rather than left to changing defaults.
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
    pruner: PrunerName
    prune_ratio: float
    top_p: float
    tree: TreeName
    positions: PositionsName
    depth: int
    nodes: int
    width: int


DEFAULT_PROMPT = "Describe the video."

Video = str | bytes | os.PathLike[str] | Frames


def _settings(options: CaptionOptions) -> tuple[GenerationSettings, SpeculationSettings]:
    """Sort keywords into the two groups; `seed` is of both."""
    known = {f.name for f in fields(GenerationSettings)} | {f.name for f in fields(SpeculationSettings)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    chosen: dict[str, Any] = dict(options)

    def pick(group: type) -> dict[str, Any]:
        return {f.name: chosen[f.name] for f in fields(group) if f.name in chosen}

    return GenerationSettings(**pick(GenerationSettings)), SpeculationSettings(**pick(SpeculationSettings))


class Seen:
    """What a captioner's models know of one video, kept between the captions of its several prompts.

    Attributes:
        features: Of the vision towers.
        reader: The target's cache.
        prompt_tokens: S of the longest prompt to come; the cache has room for it at once.
    """

    def __init__(self, target: VideoLM, prompt_tokens: int) -> None:
        """Nothing is known yet."""
        self.features, self.reader = Features(), TargetReader(target)
        self.prompt_tokens = prompt_tokens


@dataclass(frozen=True, slots=True)
class _DraftStart:
    """Prefills the draft, when the first tree is to be filled. It knows no job, so that none has to be collected."""

    draft: Draft
    work: DraftJob
    chooser: TreeChooser
    clock: StageClock

    def __call__(self, first: Sequence[int]) -> Proposer:
        with self.clock.awaited_stage("draft_prefill"):
            proposer = self.draft.begin(self.work, first)
        self.chooser.draft_began(self.clock.seconds("draft_prefill"))
        return proposer


class Job:
    """Captions in the making: of B prepared videos in one loop, or of one whose video may be `seen` already."""

    def __init__(
        self,
        captioner: Captioner,
        videos: Sequence[PreparedVideo],
        speculate: bool,
        options: CaptionOptions,
        seen: Seen | None = None,
    ) -> None:
        """Options are checked; nothing is done yet."""
        self._captioner, self._videos, self._seen = captioner, videos, seen
        self._generation, self._speculation = _settings(options)
        self._draft = captioner.draft if speculate else None
        if self._draft is not None:
            self._speculation = self._draft.settings(self._speculation)
        self._start = time.perf_counter()
        self._target = captioner.target
        reset_peak_memory(self._target.device)
        self.clock = StageClock(self._target.device)
        rules = logits_rules(captioner.generation_config, self._generation)
        self._rule = TokenRule(
            rules,
            self._generation,
            [video.inputs.token_ids[0] for video in videos],
            self._target.vocabulary,
            self._target.device,
        )
        limit, eos = self._generation.max_new_tokens, frozenset(rules.eos)
        self.texts = [RowText(limit, eos) for _ in videos]
        self._chooser: TreeChooser = FixedTree(ROOT)
        if self._draft is not None:
            self._chooser = captioner.chooser(self._speculation, self._generation, videos)
        self._decoding: Decoding | None = None
        self._end: float | None = None
        self._plain_token_s: float | None = None

    def run(self) -> Iterator[list[list[int]]]:
        """Do it all; yield each row's new tokens as they come."""
        with torch.inference_mode():
            rows, scores = self._prefill_target(self._embed())
        begin = self._draft_start(self._draft, rows, scores) if self._draft else None
        speculation = Speculation(self._chooser, begin, self._captioner.accept)
        self._decoding = Decoding(rows, speculation, self._rule, self.texts, self.clock)
        yield from self._decoding.run()
        self._end = time.perf_counter()

    def _embed(self) -> list[Prompt]:
        features = None if self._seen is None else self._seen.features
        if features is not None and self._target not in features:
            with self.clock.awaited_stage("tower"):
                features.of(self._target, self._videos[0].inputs)
        with self.clock.awaited_stage("vision"):
            return [embed(self._target, video.inputs, features) for video in self._videos]

    def _room(self, prompts: list[Prompt]) -> int:
        """Slots of a row. What a video's later captions need, with the draft too, is there from the first one on."""
        longest, nodes = max(prompt.length for prompt in prompts), self._chooser.nodes
        if self._seen is not None:
            longest = max(longest, self._seen.prompt_tokens)
            if self._draft is None and self._captioner.draft is not None:
                settings = self._captioner.draft.settings(self._speculation)
                chooser = self._captioner.chooser(settings, self._generation, self._videos)
                nodes = max(nodes, chooser.nodes)
        return longest + self._generation.max_new_tokens + nodes

    def _prefill_target(self, prompts: list[Prompt]) -> tuple[TargetRows, list[torch.Tensor]]:
        reader = TargetReader(self._target) if self._seen is None else self._seen.reader
        with self.clock.host_stage("target_prefill"):
            cache = reader.make_room(len(prompts), self._room(prompts))
            read = [reader.read(prompt, row, self.clock) for row, prompt in enumerate(prompts)]
        rows = TargetRows(self._target, cache, prompts, torch.cat([one.logits for one in read]))
        return rows, [one.scores for one in read]

    def _draft_start(self, draft: Draft, rows: TargetRows, scores: list[torch.Tensor]) -> _DraftStart:
        features = None if self._seen is None else self._seen.features
        told = [DraftRow(prompt, score, features) for prompt, score in zip(rows.prompts, scores, strict=True)]
        slots = self._generation.max_new_tokens + self._chooser.slots
        work = DraftJob(told, self._speculation, self._rule, slots, rows.cache)
        return _DraftStart(draft, work, self._chooser, self.clock)

    def finish(self, began: float, time_limit_s: float | None) -> None:
        """Do it all, unless that takes longer than the limit, counted from `began` on the monotonic clock.

        Raises:
            GenerationTimeoutError: It does, which is seen between two rounds.
        """
        for _ in self.run():
            late = time_limit_s is not None and time.monotonic() - began > time_limit_s
            if late and not all(text.finish_reason is not None for text in self.texts):
                raise GenerationTimeoutError(
                    f"the caption was not done after {time_limit_s:g} s and {len(self.texts[0].tokens)} tokens; "
                    "give it more time, or fewer tokens"
                )

    def estimate_plain(self) -> None:
        """Time a few plain steps, now that the captions are done."""
        if self._draft is None or self._decoding is None:
            return
        estimate = self._captioner.plain_estimate
        steps = self._decoding.time_plain_steps(estimate.affordable(self._total_s(0)))
        length = max(
            v.inputs.prompt_tokens + len(t.tokens) for v, t in zip(self._videos, self.texts, strict=True)
        )
        self._plain_token_s = estimate.token_s(length, steps)

    def _total_s(self, row: int) -> float:
        assert self._end is not None
        video = self._videos[row]
        return self._end - self._start + video.video_decode_s + video.preprocess_s

    def caption(self, row: int) -> Caption:
        """The finished caption of one row."""
        text, video = self.texts[row], self._videos[row]
        assert text.finish_reason is not None
        tokens = tuple(text.tokens)
        return Caption(
            self._captioner.detokenize(tokens), tokens, text.finish_reason, self._stats(row), video.source
        )

    def _stats(self, row: int) -> CaptionStats:
        text, video, clock = self.texts[row], self._videos[row], self.clock
        plain = self._draft is None
        proposer = self._decoding.proposer if self._decoding else None
        video_tokens, kept = video.inputs.video_tokens, proposer.kept[row] if proposer else 0
        return CaptionStats(
            method="plain" if self._draft is None else self._draft.method(self._speculation),
            num_frames=video.num_frames,
            video_tokens=video_tokens,
            video_tokens_kept=kept,
            compressor=proposer.compressors[row] if proposer and proposer.compressors else None,
            compression_ratio=video_tokens / kept if proposer and proposer.compressors and kept else None,
            prompt_tokens=video.inputs.prompt_tokens,
            completion_tokens=len(text.tokens),
            num_drafts=sum(text.histogram),
            num_draft_tokens=text.guessed,
            num_accepted_tokens=sum(k * count for k, count in enumerate(text.histogram)),
            acceptance_histogram=tuple(text.histogram),
            depth_tries=tuple(text.tries),
            video_decode_s=video.video_decode_s,
            preprocess_s=video.preprocess_s,
            vision_s=clock.seconds("tower") + clock.seconds("vision"),
            target_prefill_s=clock.seconds("target_prefill"),
            draft_prefill_s=clock.seconds("draft_prefill"),
            decode_s=clock.seconds("decode"),
            draft_s=0.0 if plain else clock.seconds("draft"),
            verify_s=clock.seconds("verify"),
            commit_s=clock.seconds("commit"),
            total_s=self._total_s(row),
            plain_token_s=self._plain_token_s,
            peak_memory_bytes=peak_memory_bytes(self._target.device),
            device=device_words(self._target.device),
        )


class Captioner:
    """A loaded target, and perhaps a draft, ready to caption. Made by `specvlm.load`."""

    def __init__(
        self, target: VideoLM, processor: Any, draft: Draft | None, info: ModelInfo, frames: FrameSettings
    ) -> None:
        """`frames`: what to read of a video when a call does not say."""
        self.target, self.draft = target, draft
        self.processor, self.info, self.frames = processor, info, frames
        self.generation_config = target.model.generation_config
        self.accept: Accept = accept
        self.costs, self.plain_estimate = CostStore(None), PlainEstimate()
        self._learned: dict[tuple[SpeculationSettings, bool, int], Learned] = {}

    def chooser(
        self, settings: SpeculationSettings, generation: GenerationSettings, videos: Sequence[PreparedVideo]
    ) -> TreeChooser:
        """What chooses the tree of each round of a job of B videos."""
        assert self.draft is not None
        if settings.tree != "auto":
            return FixedTree(make_shape(settings, self.draft.vocabulary, self.target.device))
        learned = self._learned.setdefault((settings, generation.temperature > 0, len(videos)), Learned())
        prompt_tokens = max(video.inputs.prompt_tokens for video in videos)
        costs = self.costs.costs(prompt_tokens, len(videos))
        bounds = Bounds(settings.most_depth, settings.most_nodes)
        return AdaptiveTree(learned, costs, generation.max_new_tokens, self.target.device, bounds)

    @property
    def frame_multiple(self) -> int:
        """The number of frames that the model takes is a multiple of this; see `read_video`."""
        return self.target.family.frame_multiple(self.processor)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Token ids -> text without special tokens."""
        text: str = self.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def prepare(
        self, video: Video, prompt: str, *, system: str | None = None, frames: FrameSettings | None = None
    ) -> PreparedVideo:
        """Read and preprocess a video once, to caption it several times.

        Raises:
            VideoError: The file gives no frames.
            PromptError: The prompt cannot be used.
            ConfigError: Frame settings were given for frames that are read already.
        """
        read, decode_s = self._read(video, frames)
        start = time.perf_counter()
        inputs = self.target.family.prepare(self.processor, read, prompt, system)
        preprocess_s = time.perf_counter() - start
        return PreparedVideo(inputs, len(read.pixels), read.source, decode_s, preprocess_s)

    def _read(self, video: Video, frames: FrameSettings | None) -> tuple[Frames, float]:
        """Frames of a video, and how long reading them took."""
        settings = self.frames if frames is None else frames
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
            ConfigError: There are no prompts, or frame settings were given for frames that are read already.
        """
        from specvlm.session import PromptSession  # which runs jobs of this module

        if isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts={prompts!r} is no list of prompts; give at least one, in a list")
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
        _settings(options)  # wrong options fail before a video is read
        session = self.session(video, prompts, system=system, frames=frames)
        return [
            session.caption(index, speculate=speculate, time_limit_s=time_limit_s, **options)
            for index in range(len(prompts))
        ]

    def caption(
        self,
        video: Video | PreparedVideo,
        prompt: str | None = None,
        *,
        system: str | None = None,
        speculate: bool = True,
        frames: FrameSettings | None = None,
        time_limit_s: float | None = None,
        estimate: bool = False,
        **options: Unpack[CaptionOptions],
    ) -> Caption:
        """Caption one video.

        Args:
            video: A path, decoded frames, or what `prepare` made, which has its prompt and frames already.
            prompt: The user's text; `<video>` in it marks where the video stands, else the video stands first.
                None asks to describe the video.
            system: The system message; None leaves it to the chat template.
            speculate: False decodes plainly: same caption, slower.
            frames: Which frames to read; None takes the captioner's own.
            time_limit_s: Give up between two rounds once this much time has passed.
            estimate: Time a few plain steps when the caption is done, for `stats.plain_token_s`; `total_s` does not
                count them. They take at most 2.5 % of the time of all captions, and none without a draft.
            **options: Fields of GenerationSettings and SpeculationSettings.

        Raises:
            ConfigError: An option is unknown or out of range.
            VideoError: The file gives no frames.
            PromptError: The prompt cannot be used.
            GenerationError: No caption came of it.
            GenerationTimeoutError: Not within the time limit.
        """
        began = time.monotonic()
        job = self._job(video, prompt, system, speculate, frames, options)
        job.finish(began, time_limit_s)
        if estimate:
            job.estimate_plain()
        return job.caption(0)

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
        job = self._job(video, prompt, system, speculate, frames, options)
        told = ""
        for _ in job.run():
            text = self.detokenize(job.texts[0].tokens)
            # Half a character at the end of the tokens so far shows as U+FFFD: wait for the rest of it.
            if text.startswith(told) and len(text) > len(told) and not text.endswith("\ufffd"):
                yield text[len(told) :]
                told = text
        rest = job.caption(0).text
        if len(rest) > len(told):
            yield rest[len(told) :]

    def _job(
        self,
        video: Video | PreparedVideo,
        prompt: str | None,
        system: str | None,
        speculate: bool,
        frames: FrameSettings | None,
        options: CaptionOptions,
    ) -> Job:
        _settings(options)  # wrong options fail before a video is read
        if not isinstance(video, PreparedVideo):
            prompt = DEFAULT_PROMPT if prompt is None else prompt
            video = self.prepare(video, prompt, system=system, frames=frames)
        elif (prompt, system, frames) != (None, None, None):
            raise ConfigError("a prepared video has its prompt and frames already; give them to prepare()")
        return Job(self, [video], speculate, options)

    def caption_rows(
        self, videos: Sequence[PreparedVideo], *, speculate: bool = True, **options: Unpack[CaptionOptions]
    ) -> list[Caption]:
        """Caption several prepared videos in one loop, B rows at a time; each gets what it would get alone."""
        if not videos:
            return []
        job = Job(self, videos, speculate, options)
        for _ in job.run():
            pass
        return [job.caption(row) for row in range(len(videos))]


def _check_frames(frames: Frames) -> None:
    pixels = frames.pixels
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or len(pixels) == 0:
        raise ConfigError(
            f"frames of shape {pixels.shape}, {pixels.dtype} cannot be captioned; "
            "give uint8 [frames, height, width, 3]"
        )
    if len(frames.times_s) != len(pixels):
        raise ConfigError(f"{len(pixels)} frames have {len(frames.times_s)} times; give one each")
