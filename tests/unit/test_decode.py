"""The loop: what a round may not do, and what one row takes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm import decode
from specvlm.config import TREES, SpeculationSettings
from specvlm.decode import CaptionText
from specvlm.tree import make_shape
from tests.heads import fresh_captioner
from tests.tiny import Size, random_frames, tiny_captioner

# Operations whose shape depends on data, so that the host must wait for it; and ways to ask for values.
WAITS = ("nonzero", "masked_select", "unique", "equal.")
ASKS = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")


class Watch(TorchDispatchMode):
    """Notes operations that would make a device wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.covering
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("draft", ["small", "head"])
def test_a_round_never_waits_for_its_own_results(
    tree: str, temperature: float, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One synchronisation per round: the report at its end, and nothing else asks for a value."""
    captioner = (
        tiny_captioner("qwen", Size(seed=1), Size(seed=2)) if draft == "small" else fresh_captioner("qwen")
    )
    captioner.generation_config.repetition_penalty = 1.1
    captioner.generation_config.min_new_tokens = 3
    watched: list[str] = []
    rounds = 0
    real = decode._Rounds.run
    asked: list[str] = []

    def telling(name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def tell(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return method(tensor, *args, **kwargs)

        return tell

    def watch(*args: Any) -> Any:
        nonlocal rounds
        rounds += 1
        with Watch() as watching, monkeypatch.context() as patched:
            for name in ASKS:
                patched.setattr(torch.Tensor, name, telling(name))
            result = real(*args)
        watched.extend(watching.seen)
        return result

    monkeypatch.setattr(decode._Rounds, "run", watch)
    captioner.caption(random_frames(1), tree=tree, temperature=temperature, max_new_tokens=20)  # type: ignore[arg-type]
    assert rounds > 1
    assert watched == []
    assert asked == ["tolist"] * rounds


def test_a_guess_counts_as_tried_where_it_was_judged() -> None:
    shape = make_shape(SpeculationSettings(tree="chain", depth=3), 300, torch.device("cpu"))
    text = CaptionText(limit=9, eos=frozenset({99}))
    for tokens in ([1], [1, 2, 3, 4], [1, 99]):
        text.take(tokens)
        text.count(shape, len(tokens) - 1)
    # The first guess of the first round was wrong; all three of the second were right; the caption ended in the third.
    assert (text.histogram, text.tries, text.guessed) == ([1, 1, 0, 1], [3, 1, 1], 9)


def test_a_row_takes_tokens_up_to_an_end_or_its_limit() -> None:
    text = CaptionText(limit=5, eos=frozenset({9}))
    assert text.take([1, 2]) == [1, 2]
    assert text.finish_reason is None
    assert text.take([3, 9, 4]) == [3, 9]
    assert (text.tokens, text.finish_reason) == ([1, 2, 3, 9], "stop")
    assert text.take([5]) == []
    short = CaptionText(limit=2, eos=frozenset({9}))
    assert short.take([1, 9]) == [1, 9]
    assert short.finish_reason == "stop"
    full = CaptionText(limit=2, eos=frozenset())
    assert full.take([1, 9, 3]) == [1, 9]
    assert full.finish_reason == "length"
