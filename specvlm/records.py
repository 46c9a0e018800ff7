"""Named data that crosses functions, with its shapes. No behaviour beyond derived figures.

Shape letters, here and in every docstring: B rows (videos in flight), F frames, V video tokens, S prompt tokens,
N tree nodes incl. the root, D tree depth, L layers, H heads, C vocabulary. Times end in `_s`, sizes in `_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


class VideoSource(NamedTuple):
    """What is known of the file that frames came from.

    `flags` say what was unusual about reading it: `truncated` (the file ends before its container says),
    `damaged` (data missing or undecodable near what was read), `partial` (fewer frames than were chosen, because
    of damage).
    """

    duration_s: float  # length of the whole video
    fps: float  # mean frame rate of the whole video
    width: int  # upright, as shown: after rotation, before scaling
    height: int
    backend: str  # reader and version, e.g. "pyav 18.1.0"
    decode_s: float  # wall time of opening, choosing and decoding
    flags: tuple[str, ...] = ()  # in this order, each at most once; empty for a sound file
    size_bytes: int = 0  # of the file, as it was opened
    mtime_ns: int = 0  # its time of change, in nanoseconds since 1970


class Frames(NamedTuple):
    """Decoded frames of one video, or of a part of it.

    Attributes:
        pixels: uint8 [F, height, width, 3], RGB, upright.
        times_s: float [F], the presentation time of each frame, in seconds from the first frame of the video.
        source: The file's own facts; None where the caller read the frames.
    """

    pixels: NDArray[np.uint8]  # [F, height, width, 3], RGB, upright
    times_s: NDArray[
        np.float64
    ]  # [F], the true presentation time of each frame, from the first frame of the video
    source: VideoSource | None = None  # None where the caller read the frames


@dataclass(frozen=True, slots=True)
class CaptionStats:
    """What one caption took. Metric names follow vLLM's `spec_decode` metrics.

    The stages of captions that were made together are shares of their steps' wall time, so sums over captions are wall
    time. What several captions of one `PromptSession` have in common counts in the first of them alone.

    Attributes:
        method: `"plain"`, `"specvlm/<pruner>/<tree>"`, or with a trained head `"specvlm-head/<compressor>/<tree>"`.
        num_frames: F, frames given to the processor.
        video_tokens: V, video tokens that the target saw.
        video_tokens_kept: Video tokens that the draft saw; 0 without a draft.
        prompt_tokens: S, the video tokens included.
        completion_tokens: Tokens of the caption, the end-of-sequence token included.
        num_drafts: Rounds: one propose and one verify each. 0 without a draft.
        num_draft_tokens: Guessed tokens of all rounds (nodes without the root).
        num_accepted_tokens: Guessed tokens that the target accepted and the caption uses.
        acceptance_histogram: Entry k counts the rounds that accepted k guesses, k = 0..D.
        depth_tries: Entry d - 1 counts the rounds whose guess at depth d was judged: those above it were right, and
            neither tree nor caption ended there.
        video_decode_s: Reading the file: open, choose, decode.
        preprocess_s: The processor: resize, normalise, patchify, tokenise.
        vision_s: The target's vision tower and embedding of the prompt.
        target_prefill_s: The target's prefill, both parts; the first token comes from here.
        draft_prefill_s: Pruning, the draft's vision tower and the draft's prefill.
        decode_s: All rounds: everything after the first token.
        draft_s: Share of `decode_s` in which the draft proposed.
        verify_s: Share of `decode_s` in which the target scored nodes and paths were chosen.
        commit_s: Share of `decode_s` in which caches were committed.
        total_s: video_decode_s, preprocess_s and all stages up to its last token.
        plain_token_s: Estimated time per token of plain decoding after the first token, with as many sequences in
            flight: from plain steps that `tree="auto"` timed anyway; None: there were none.
        peak_memory_bytes: Peak of the device's allocator (CUDA), or of the process (CPU).
        device: The target's device, in words.
        compressor: What a trained head's compressor did to this video, e.g. `"pool"`; operators used together are
            joined with `+`. None without a head.
        compression_ratio: video_tokens / video_tokens_kept of a trained head; None without a head, and where it
            saw no video token.
        mean_batch_size: How many sequences shared its steps, on average.
        context_tokens: The most tokens, prompt and caption together, that the target was made for
            (`max_position_embeddings`); None: its config does not say.
        settled_tokens: Tokens that a plain step decided, because a round could not be trusted with a near-tie.
        smallest_margin: The least by which the score of a token led the second best, the first token left out; None:
            not measured, without `exact`.
    """

    method: str
    num_frames: int
    video_tokens: int
    video_tokens_kept: int
    prompt_tokens: int
    completion_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_histogram: tuple[int, ...]
    video_decode_s: float
    preprocess_s: float
    vision_s: float
    target_prefill_s: float
    draft_prefill_s: float
    decode_s: float
    draft_s: float
    verify_s: float
    commit_s: float
    total_s: float
    peak_memory_bytes: int
    device: str
    plain_token_s: float | None = None
    depth_tries: tuple[int, ...] = ()
    compressor: str | None = None
    compression_ratio: float | None = None
    mean_batch_size: float = 1.0
    context_tokens: int | None = None
    settled_tokens: int = 0
    smallest_margin: float | None = None

    @property
    def beyond_context(self) -> bool:
        """Whether prompt and caption have more tokens than the target was made for, so that the text may be poor."""
        tokens = self.prompt_tokens + self.completion_tokens
        return self.context_tokens is not None and tokens > self.context_tokens

    @property
    def mean_accepted_tokens(self) -> float | None:
        """num_accepted_tokens / num_drafts, the papers' tau, without the bonus token; None without rounds."""
        return self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """mean_accepted_tokens + 1: tokens per round, the bonus token included; None without rounds.

        The round that ends a caption may add no bonus token, so rounds x this can exceed the tokens by one.
        """
        mean = self.mean_accepted_tokens
        return None if mean is None else mean + 1.0

    @property
    def token_s(self) -> float | None:
        """decode_s / (completion_tokens - 1): time per token after the first; None for a single token."""
        steps = self.completion_tokens - 1
        return self.decode_s / steps if steps > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """(completion_tokens - 1) / decode_s; None for a single token."""
        return None if not self.token_s else 1.0 / self.token_s


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption.

    Attributes:
        text: The caption, special tokens removed.
        token_ids: The generated tokens exactly as stock `generate()` gives them, end-of-sequence included.
        finish_reason: `"stop"` at an end-of-sequence token, `"length"` at `max_new_tokens`.
        stats: What it took.
        source: The file's own facts; None for frames that the caller read.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: CaptionStats = field(repr=False)
    source: VideoSource | None = field(default=None, repr=False)
