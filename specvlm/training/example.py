"""One captioned video as the frozen target sees it: what a head learns from. Nothing of it is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specvlm.attention import AttentionPlan, Segment
from specvlm.cache import PrefillPart
from specvlm.errors import GenerationError
from specvlm.families.base import ModelInputs
from specvlm.model import VideoLM
from specvlm.prefill import PrefillRow, ToSee, embed, prefill_target

SHORTEST = 2  # tokens of a caption: the head guesses from the second one on


@dataclass(frozen=True, slots=True)
class Example:
    """One video, its prompt of S tokens and its caption of T; n = S + T - 1, all tokens but the last.

    Attributes:
        video: int64 [V], where the video tokens stand.
        embeds: [1, n, hidden], embeddings of tokens, and the video's features, as the target reads them.
        positions: int64 [P, n].
        features: [1, n, hidden], what the target gives behind its last norm.
        scores: float32 [V], the target's attention to each video token.
        prompt_tokens: S.
    """

    video: torch.Tensor
    embeds: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor
    scores: torch.Tensor
    prompt_tokens: int

    def to(self, device: torch.device) -> Example:
        """The same on another device."""
        return Example(
            self.video.to(device),
            self.embeds.to(device),
            self.positions.to(device),
            self.features.to(device),
            self.scores.to(device),
            self.prompt_tokens,
        )


def read_example(target: VideoLM, inputs: ModelInputs, token_ids: Sequence[int]) -> Example:
    """Show the target a video, its prompt and the caption that it wrote of it, in one go.

    Args:
        target: It must keep features; see `keep_features`.
        inputs: What the processor made of video and prompt.
        token_ids: The caption's, T of them.

    Raises:
        GenerationError: The caption has a single token, or all is longer than the checkpoint's sliding window.
    """
    if len(token_ids) < SHORTEST:
        raise GenerationError(f"a caption of {len(token_ids)} tokens teaches nothing; it takes {SHORTEST}")
    with torch.inference_mode():
        (prompt,) = embed(target, [ToSee(inputs)])
        known = torch.tensor([list(token_ids[:-1])], device=target.embedding_device)
        count = prompt.length + known.shape[1]
        cache = target.new_cache(count)
        scores = prefill_target(target, cache, [PrefillRow(prompt, 0)])[0].scores
        written = target.embed_tokens(known)
        where = prompt.next_position + torch.arange(known.shape[1], device=written.device)
        positions = where.expand(prompt.positions.shape[0], -1)
        cache.aim_prefill([PrefillPart(0, prompt.length, known.shape[1])], written.device)
        plan = AttentionPlan((Segment(0, known.shape[1], prompt.length),))
        target.forward(written, positions[:, None], cache, plan)
        features = cache.features(torch.arange(count, device=target.device)[None])
        embeds = torch.cat((prompt.embeds, written), dim=1)
        positions = torch.cat((prompt.positions, positions), dim=1)
    # Clones made outside of inference mode may take part in a graph of gradients.
    video = inputs.video_at.to(target.device)
    return Example(
        video,
        embeds.to(target.device).clone(),
        positions.to(target.device).clone(),
        features.clone(),
        scores.to(target.device).clone(),
        prompt.length,
    )
