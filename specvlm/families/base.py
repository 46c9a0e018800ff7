"""The contract of a model family: all that differs between video LLMs before the first text token.

A family turns frames and a prompt into token ids and pixel tensors with the model's own processor, and says where
the video tokens are, what they look like inside the model, and which positions they have. It does not generate.
`docs/families.md` walks through adding one.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from specvlm.errors import PreprocessError, PromptError
from specvlm.records import Frames

# Where the video is in a prompt; without it the video comes before the text.
VIDEO_MARK = "<video>"


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One prompt with its video, as the processor made it; nothing of it depends on the model's weights.

    Attributes:
        token_ids: int64 [1, S].
        video_at: int64 [V], where the video tokens are, ascending; text may stand between them.
        tensors: What the processor made, by its own names; what stock `generate(**tensors)` takes.
        video: What the video processor made, by its own names, for further prompts about the same video.
    """

    token_ids: torch.Tensor
    video_at: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    video: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """S."""
        return self.token_ids.shape[1]

    @property
    def video_tokens(self) -> int:
        """V."""
        return self.video_at.numel()


class VideoFeatures(NamedTuple):
    """What a vision tower makes of one video.

    Attributes:
        embeds: [V, hidden], in place of the embeddings of its video tokens.
        deep: Each [V, hidden], added to the hidden states of its video tokens behind the first layer of the text
            model, the second, and so on (DeepStack, arXiv 2406.04334); most families have none.
    """

    embeds: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> VideoFeatures:
        """The same on another device or in another format."""
        return VideoFeatures(self.embeds.to(device, dtype), tuple(one.to(device, dtype) for one in self.deep))


class _VideoOnce:
    """A video processor that is run at most once; what it made is given again and again."""

    def __init__(self, real: Any, made: Mapping[str, Any] | None = None) -> None:
        self.real, self.made = real, made

    def __call__(self, *videos: Any, **options: Any) -> BatchFeature:
        if self.made is None:
            self.made = dict(self.real(*videos, **options))
        return BatchFeature(dict(self.made))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class VideoGrid(NamedTuple):
    """Which part of which frames each video token covers.

    The first `cells` video tokens are the cells, in (time, row, column) order; each covers its share of the whole
    frame. What follows them covers no place.
    """

    steps: int  # T, in time
    rows: int  # of cells in a frame
    columns: int  # of cells in a frame
    frames_per_step: int  # frames that one step covers; the last one may hold fewer

    @property
    def cells(self) -> int:
        """Video tokens that cover a place, T x rows x columns."""
        return self.steps * self.rows * self.columns


class Family(ABC):
    """What the library must know of one architecture. Stateless."""

    name: str  # as `model_type` in config.json
    position_rows: int  # P: rows of a position, 3 for M-RoPE, else 1

    @property
    def prompts_like(self) -> str:
        """Name of the family that prepares a prompt in the same way: models of both can draft for each other."""
        return self.name

    # --- the processor ---

    @abstractmethod
    def frame_multiple(self, processor: Any) -> int:
        """Frames come in multiples of this many."""

    @abstractmethod
    def processor_options(self, processor: Any) -> dict[str, Any]:
        """Options of the video processor that are set rather than left to a default that changes."""

    @abstractmethod
    def video_token(self, processor: Any) -> str:
        """The placeholder of one video token in the text."""

    @abstractmethod
    def video_grid(self, processor: Any, inputs: ModelInputs) -> VideoGrid:
        """Where in the video its video tokens are."""

    def prepare(self, processor: Any, frames: Frames, prompt: str, system: str | None = None) -> ModelInputs:
        """Run the model's own processor.

        Args:
            processor: The checkpoint's `AutoProcessor`.
            frames: uint8 [F, height, width, 3] and their times.
            prompt: The user's text; `<video>` in it marks where the video stands, else the video stands first.
            system: The system message; None leaves it to the chat template.

        Raises:
            PromptError: The prompt holds special tokens, or more than one `<video>`.
            PreprocessError: The processor refuses these frames, for their aspect ratio say.
        """
        text = self._render(processor, prompt, system)
        pixels = torch.from_numpy(np.ascontiguousarray(frames.pixels)).permute(
            0, 3, 1, 2
        )  # [F, 3, height, width]
        try:
            return self._inputs(
                processor,
                _VideoOnce(processor.video_processor),
                text,
                pixels,
                video_metadata=[[self._metadata(frames)]],
                do_sample_frames=False,
                **self.processor_options(processor),
            )
        except ValueError as error:
            shape = "x".join(map(str, frames.pixels.shape[:3]))
            reason = " ".join(str(error).split())
            raise PreprocessError(
                f"frames of {shape}: the model's processor refuses them ({reason})"
            ) from error

    def prepare_again(
        self, processor: Any, inputs: ModelInputs, prompt: str, system: str | None = None
    ) -> ModelInputs:
        """What `prepare` gives for another prompt about the video of `inputs`, whose pixel tensors are shared.

        The processor runs as before, but for the pixels; so text that it writes for the video stands where it should.

        Raises:
            PromptError: The prompt holds special tokens, or more than one `<video>`.
        """
        video = _VideoOnce(processor.video_processor, inputs.video)
        nothing = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        return self._inputs(processor, video, self._render(processor, prompt, system), nothing)

    def _inputs(
        self, processor: Any, video: _VideoOnce, text: str, pixels: torch.Tensor, **options: Any
    ) -> ModelInputs:
        with_video = copy.copy(processor)
        with_video.video_processor = video
        made = with_video(text=[text], videos=[pixels], return_tensors="pt", **options)
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        ids = tensors["input_ids"]
        video_id = processor.tokenizer.convert_tokens_to_ids(self.video_token(processor))
        assert video.made is not None
        return ModelInputs(ids, (ids[0] == video_id).nonzero().squeeze(1), tensors, video.made)

    def template_ids(self, processor: Any) -> list[int]:
        """Token ids of a short prompt about a video, whose one video token is not yet as many as a video has.

        Raises:
            PromptError: The checkpoint has no chat template, or one that knows no video.
        """
        text = self._render(processor, "What happens?", None)
        return list(processor.tokenizer(text)["input_ids"])

    def _metadata(self, frames: Frames) -> VideoMetadata:
        """True frame times, given to the processor as the mean rate of the frames that it gets."""
        count = len(frames.times_s)
        span = float(frames.times_s[-1] - frames.times_s[0]) if count > 1 else 0.0
        fallback = frames.source.fps if frames.source is not None and frames.source.fps > 0 else 2.0
        fps = (count - 1) / span if span > 0 else fallback
        height, width = frames.pixels.shape[1:3]
        return VideoMetadata(
            total_num_frames=count,
            fps=fps,
            width=width,
            height=height,
            duration=count / fps,
            frames_indices=list(range(count)),
        )

    def _render(self, processor: Any, prompt: str, system: str | None) -> str:
        """The prompt in the checkpoint's chat template."""
        for text in (prompt, system or ""):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise PromptError(f"prompt {text!r} is not valid Unicode text; remove the lone surrogates")
        before, mark, after = prompt.partition(VIDEO_MARK)
        if not mark:
            before, after = "", prompt
        if VIDEO_MARK in after:
            raise PromptError(f"prompt {prompt!r} holds {VIDEO_MARK} more than once; a prompt has one video")
        self._refuse_special_tokens(processor, before, after, system or "")
        content = self._content(before, after, self.video_token(processor))
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        try:
            rendered: str = processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # of the template itself, which is a program
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise PromptError(
                f"the checkpoint's chat template cannot be used ({reason}); copy chat_template.jinja from the "
                "original checkpoint"
            ) from error
        if rendered.count(self.video_token(processor)) != 1:
            raise PromptError(
                f"the checkpoint's chat template renders {rendered.count(self.video_token(processor))} videos "
                "for one; use a checkpoint whose template knows video"
            )
        return rendered

    def _content(self, before: str, after: str, video_token: str) -> list[dict[str, str]]:
        """A user message with the video between two texts, either of which may be empty."""
        texts = [{"type": "text", "text": text} for text in (before, after)]
        return [part for part in (texts[0], {"type": "video"}, texts[1]) if part.get("text") != ""]

    @staticmethod
    def _refuse_special_tokens(processor: Any, *texts: str) -> None:
        for token in processor.tokenizer.all_special_tokens:
            if any(token in text for text in texts):
                raise PromptError(f"the prompt holds the special token {token}; remove it")

    # --- the model ---

    @abstractmethod
    def text_model(self, model: Any) -> Any:
        """The decoder: embeddings in, hidden states out."""

    @abstractmethod
    def see(self, model: Any, videos: Sequence[ModelInputs]) -> list[VideoFeatures]:
        """Run the vision tower once over several videos. What it makes of each is on the tower's device."""

    def text_arguments(self, where: torch.Tensor, deep: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Further arguments of the text model in a prefill pass, for what `see` gives besides the embeddings.

        Args:
            where: bool [1, n], True at the pass's v video tokens.
            deep: Their rows of `VideoFeatures.deep`, each [v, hidden].
        """
        return {}

    @abstractmethod
    def positions(self, model: Any, inputs: ModelInputs) -> torch.Tensor:
        """Positions of the prompt, int64 [P, S], on the CPU. New tokens count on from the last one."""

    @abstractmethod
    def geometry(self, model: Any, processor: Any) -> dict[str, Any]:
        """What a draft must share with its target so that both see the same video tokens in the same pixels."""
