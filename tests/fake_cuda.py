"""One round on a CUDA device that is not there: tensors without data, which know their device, shape and dtype.

Operations that mix devices, copy between them, or ask for a value, show; so do the kernels' own demands on shapes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm import attention
from specvlm.attention import RoundAttention, has_flash
from specvlm.cache import KVCache
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.decode import TOLD_STEP, _Rounds, _Verifier
from specvlm.drafts.base import Proposer
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft, _HeadProposer
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.families import family_of
from specvlm.model import Lengths, VideoLM
from specvlm.sampling import TokenRule, logits_rules
from specvlm.stats import StageClock
from specvlm.tree import TreeShape
from tests.emulated_graphs import FORBIDDEN, draft_text, tensors_of
from tests.tiny import FamilyName, Size, tiny_model

CUDA = torch.device("cuda", 0)
_TENSOR = torch.tensor
# Left whole: what it becomes is chosen by asking the device.
_WHOLE = (torch.ops.aten.scaled_dot_product_attention.default,)


class Case(NamedTuple):
    """What to run."""

    family: FamilyName
    shape: TreeShape  # made on the CPU
    attention: RoundAttention
    dtype: torch.dtype
    exact: (
        bool  # one row whose length the host knows; else two, one of them in a slab of its own, told in steps
    )
    trimmed: bool = False  # the draft guesses from some tokens alone
    headed: bool = False  # the draft is a head; else a small model


class Seen(TorchDispatchMode):
    """Notes what is called, on which devices, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.elsewhere: set[str] = set()  # called with, or giving, tensors that are not on the device
        self.largest = 0  # elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func not in _WHOLE:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        made = tensors_of(out)
        if any(tensor.device.type != "cuda" for tensor in (*tensors_of((args, kwargs)), *made)):
            self.elsewhere.add(str(func))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.numel())
        self.names.add(str(func))
        return out


def _there(value: Any) -> Any:
    """The same on the device, at any depth of this library's own objects."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    if isinstance(value, torch.device):
        return CUDA
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_there, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_there, value))
    if type(value).__module__.startswith("specvlm.") and hasattr(value, "__dict__"):
        moved = object.__new__(type(value))
        moved.__dict__.update({name: _there(one) for name, one in vars(value).items()})
        return moved
    return value


def _weights_there(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    kind = dtype if held is module._parameters else tensor.dtype
                    there = torch.empty(tensor.shape, dtype=kind, device=CUDA)
                    held[name] = torch.nn.Parameter(there, False) if held is module._parameters else there


def _lm_there(model: Any, dtype: torch.dtype) -> VideoLM:
    _weights_there(model, dtype)
    return VideoLM(model, family_of(model.config, "tiny"))


def _head(model: Any) -> HeadModel:
    """A head for a stock model, still on the CPU."""
    target = VideoLM(model, family_of(model.config, "tiny"))
    compressor = CompressorConfig("none", ())
    config = HeadConfig("tiny", None, target.family.name, target.hidden_size, compressor=compressor)
    return HeadModel.fresh(target, config, seed=0).eval().requires_grad_(False)


def _proposer(draft: SmallModelDraft | HeadDraft, rows: _Rows) -> Proposer:
    """A draft that has begun with all rows, a few tokens of whose videos it was not shown."""
    assert rows.rule is not None
    proposer: Any = draft.proposer(SpeculationSettings(), rows.rule, rows.cache)
    shown = [prompt.length - 7 for prompt in rows.prompts]
    proposer.cache.add([count + 100 for count in shown])
    lengths = torch.tensor(shown, device=CUDA)
    following = torch.tensor([prompt.next_position for prompt in rows.prompts], device=CUDA)
    if isinstance(proposer, _HeadProposer):
        proposer._pairs_before, proposer._before = shown, lengths
        proposer._prompt_lengths, proposer._position = lengths + 7, following - 1
        width = proposer._root.shape[2]
        proposer._root = torch.empty(len(shown), 1, width, dtype=proposer._root.dtype, device=CUDA)
    else:
        proposer._prompts, proposer._prompt_lengths = shown, lengths
        proposer._next_position, proposer._previous = following, torch.zeros_like(following)
    return proposer  # type: ignore[no-any-return]


def _rule() -> TokenRule:
    """Every rule at once."""
    settings = GenerationSettings(max_new_tokens=30, temperature=0.7, top_k=4)
    config = SimpleNamespace(
        repetition_penalty=1.2,
        min_new_tokens=4,
        forced_eos_token_id=7,
        top_p=0.9,
        min_p=0.05,
        suppress_tokens=[4],
        begin_suppress_tokens=[5],
        eos_token_id=[6],
    )
    prompts = [torch.arange(5), torch.arange(3)]
    rule = TokenRule(logits_rules(config, settings), settings, 300, torch.device("cpu"))
    rule.add(prompts)
    return rule


class _Rows(NamedTuple):
    """The rows of a batch."""

    prompts: list[Any]
    cache: KVCache
    rule: TokenRule


def _prompt(length: int) -> Any:
    return SimpleNamespace(length=length, next_position=length)


def _tensor_there(values: Any, dtype: torch.dtype | None = None, device: Any = CUDA) -> torch.Tensor:
    """What `torch.tensor` makes, which asks for the device; rounds may not call it."""
    made = _TENSOR(values, dtype=dtype)
    return torch.empty(made.shape, dtype=made.dtype, device=device)


def _begun(
    case: Case, models: tuple[Any, Any], head: HeadModel | None, rule: TokenRule, prompt: int
) -> tuple[_Rounds, Lengths]:
    """Sequences with their prompts read by target and draft, and the index of the last token of each."""
    target, draft = (_lm_there(model, case.dtype) for model in models)
    assert target.captures
    assert target.round_attention == ("varlen" if has_flash(CUDA, case.dtype, 16) else "split")
    ids = range(0, 300, 7) if case.trimmed else None
    made: SmallModelDraft | HeadDraft = SmallModelDraft(draft, 300, ids)
    if head is not None:
        _weights_there(head, case.dtype)
        made = HeadDraft(head, target, ids)
    for model in (target, draft_text(made)):
        model.round_attention = case.attention
        model.told_step = 1 if case.exact else TOLD_STEP
    prompts = [_prompt(prompt), _prompt(2 * prompt)][: 1 if case.exact else 2]
    verifier = _Verifier(target)
    verifier.add(prompts, 100, 0)
    rounds = _Rounds(verifier, StageClock(torch.device("cpu")), None)
    rounds.rule = _there(rule)
    rounds.add(torch.zeros(len(prompts), dtype=torch.long, device=CUDA))
    rounds.proposer = _proposer(made, _Rows(prompts, verifier.cache, rounds.rule))
    index = Lengths(rounds.state.step, (5,) * len(prompts), (5,) * len(prompts))
    return rounds, index


def run_round(case: Case, prompt: int) -> Seen:
    """Run a round after prompts of about so many tokens; -> what was called."""
    rule, large, small = _rule(), *(tiny_model(case.family, Size(n, width=64)) for n in (2, 1))
    head = _head(large) if case.headed else None
    if case.exact:
        rule._least, rule._seen = rule._least[:1], rule._seen[:1]
    # A tensor of one element would be kept as a constant, for which the device would have to be there.
    no_constants = patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)
    with no_constants, FakeTensorMode(), torch.inference_mode():
        with patch.object(torch, "tensor", _tensor_there):
            rounds, index = _begun(case, (large, small), head, rule, prompt)
        value, seen = None, Seen()
        with seen:
            for stage in rounds._stages(_there(case.shape), index):
                value = stage(value)
    assert isinstance(value, torch.Tensor)
    assert value.device == CUDA
    return seen


def round_that_stays(case: Case, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Run a round after long prompts, and check that it stays on the device and copies no cache."""
    flash = case.dtype == torch.bfloat16
    if case.attention == "varlen" and not flash:
        pytest.skip("no such kernel")
    monkeypatch.setattr(attention, "_cuda_kernels", lambda *_: attention._Kernels(flash, True))
    seen = run_round(case, 4000)
    assert seen.elsewhere == set()
    assert [name for name in seen.names if any(word in name for word in FORBIDDEN)] == []
    if case.attention != "masked":  # whose mask is as long as the prompt
        assert seen.largest < 4000 * 2 * 16  # one row's keys in one layer; features of the prompt are larger
    return seen
