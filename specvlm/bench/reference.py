"""The caption that stock `generate()` writes for one video, to compare a caption with that was made in another way.

Greedy captions are stock's alone. A sampled one depends on the seed by this library's own rule, which stock does not
have: there `generate()` is greedy over scores that `TokenRule` makes of its logits, one row at a time. Knows no run
folder and no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from specvlm.bench.stock import generate, stock_attention
from specvlm.captioner import Captioner
from specvlm.config import GenerationSettings
from specvlm.records import FinishReason, Frames
from specvlm.sampling import TokenRule, logits_rules


class StockCaption(NamedTuple):
    """What stock `generate()` wrote.

    Attributes:
        token_ids: With the end of sequence, if it came.
        text: Without special tokens.
        finish_reason: As in `Caption`.
        margins: For each token, its score minus that of the second best token.
        prompt_tokens: Tokens of the prompt, the video's included.
        video_tokens: Tokens of the video.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    margins: tuple[float, ...]
    prompt_tokens: int
    video_tokens: int


class Reference:
    """Captions videos with stock `generate()` on the target of a captioner, one at a time, whatever its draft."""

    def __init__(self, captioner: Captioner, generation: GenerationSettings, system: str | None) -> None:
        """`system`: the system message; None leaves it to the chat template.

        Raises:
            ConfigError: The generation config asks for something that this library refuses.
        """
        self.captioner = captioner
        self._generation, self._system = generation, system
        self._rules = logits_rules(captioner.generation_config, generation)

    def caption(self, frames: Frames, prompt: str, stop: Callable[[], bool] = lambda: False) -> StockCaption:
        """Caption frames; once `stop` says so, the caption ends at once and is not to be used.

        Raises:
            PromptError: The prompt cannot be used.
            PreprocessError: The processor cannot take these frames.
            Exception: `generate()` failed.
        """
        captioner, target = self.captioner, self.captioner.target
        inputs = target.family.prepare(captioner.processor, frames, prompt, self._system)
        margins = _Margins(inputs.prompt_tokens)
        processors: list[LogitsProcessor] = [margins]
        if self._generation.temperature > 0:
            processors.insert(0, _Sampling(self._rule(inputs.token_ids[0]), inputs.prompt_tokens))
        with self._stock():
            written = generate(
                target.model,
                target.embedding_device,
                [inputs],
                self._generation.max_new_tokens,
                logits_processor=processors,
                stopping_criteria=[_Stop(stop)],
            )
        (tokens,) = written.token_ids
        return StockCaption(
            token_ids=tokens,
            text=captioner.detokenize(tokens),
            finish_reason="stop" if tokens and tokens[-1] in self._rules.eos else "length",
            margins=margins.upto(len(tokens)),
            prompt_tokens=inputs.prompt_tokens,
            video_tokens=inputs.video_tokens,
        )

    def _rule(self, prompt: torch.Tensor) -> TokenRule:
        """The rule for one row; `prompt`: int64 [S]."""
        target = self.captioner.target
        rule = TokenRule(self._rules, self._generation, target.vocabulary, target.device)
        rule.add([prompt])
        return rule

    @contextmanager
    def _stock(self) -> Iterator[None]:
        """Have the target run stock attention, and where we sample, without logits processors: they are in the rule."""
        model = self.captioner.target.model
        own = model.generation_config
        with stock_attention([model]), torch.inference_mode():
            try:
                if self._generation.temperature > 0:
                    model.generation_config = _bare(own)
                yield
            finally:
                model.generation_config = own


def _bare(config: Any) -> GenerationConfig:
    """A generation config that ends captions as another one does, and does nothing else."""
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(do_sample=False, **ids)  # type: ignore[no-untyped-call,unused-ignore]


class _Sampling(LogitsProcessor):  # type: ignore[misc,unused-ignore]
    """Makes scores of logits by the token rule, for a batch of one."""

    def __init__(self, rule: TokenRule, prompt_tokens: int) -> None:
        self._rule, self._prompt_tokens = rule, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [1, C] after the tokens [1, S] -> scores [1, C] whose argmax is the token that is drawn."""
        index = input_ids.shape[1] - self._prompt_tokens
        here = scores.device
        if index:
            self._rule.commit(input_ids[:, -1:], torch.ones(1, dtype=torch.long, device=here))
        self._rule.begin_round(torch.tensor([index], device=here), 0)
        root = torch.zeros(1, 1, dtype=torch.long, device=here)
        return self._rule.scores(scores[:, None], root, root.new_zeros(1, 1, 0))[:, 0]


class _Margins(LogitsProcessor):  # type: ignore[misc,unused-ignore]
    """Comes last and changes nothing: notes by how much the best score leads, for each token."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._found: dict[int, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, C], as they are."""
        first, second = scores[0].float().topk(2).values
        self._found[input_ids.shape[1] - self._prompt_tokens] = first - second
        return scores

    def upto(self, count: int) -> tuple[float, ...]:
        """The margins of the first tokens."""
        return tuple(float(self._found[index]) for index in range(count))


class _Stop(StoppingCriteria):  # type: ignore[misc,unused-ignore]
    """Ends `generate()` once it is asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return bool [B], whether each row ends."""
        return torch.full((input_ids.shape[0],), self._asked(), device=input_ids.device)
