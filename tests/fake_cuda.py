"""One round on a CUDA device that is not there: tensors without data, which know their device, shape and dtype.

Operations that mix devices, copy between them, or ask for a value, show; so do the kernels' own demands on shapes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm.attention import RoundAttention
from specvlm.cache import SlabCache
from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.decode import TargetRows, _Rounds
from specvlm.drafts.base import DraftJob, DraftRow, Horizon, Proposer
from specvlm.drafts.compressor import Compressed, CompressorConfig
from specvlm.drafts.head import HeadDraft, _HeadProposer
from specvlm.drafts.head_model import HeadConfig, HeadModel, PairSequence
from specvlm.drafts.small_model import _SmallModelProposer
from specvlm.drafts.vocabulary import DraftVocabulary
from specvlm.families import family_of
from specvlm.model import VideoLM
from specvlm.sampling import TokenRule, logits_rules
from specvlm.stats import StageClock
from specvlm.tree import TreeShape
from specvlm.verify import accept
from tests.emulated_graphs import tensors_of
from tests.tiny import FamilyName, Size, tiny_model

CUDA = torch.device("cuda", 0)
# Left whole: what it becomes is chosen by asking the device.
_WHOLE = (torch.ops.aten.scaled_dot_product_attention.default,)


class Case(NamedTuple):
    """What to run."""

    family: FamilyName
    shape: TreeShape  # made on the CPU
    attention: RoundAttention
    dtype: torch.dtype
    exact: bool  # one row whose length the host knows
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


def _head_proposer(
    draft: HeadDraft, prompts: list[Any], rule: TokenRule, cache: SlabCache, how: RoundAttention
) -> Proposer:
    """A head that reads prompts of which a few tokens of the video are left out."""
    draft.text.graphs, draft.text.round_attention = None, how
    read = []
    for prompt in prompts:
        pairs, positions = prompt.embeds[:, 7:], prompt.positions[:, 7:]
        positions = positions[: draft.target.family.position_rows]
        read.append(PairSequence(pairs, positions, Compressed(pairs[:, :9], positions[:, :9], "pool"), 0))
    rows = [DraftRow(prompt, torch.empty(0)) for prompt in prompts]
    return _HeadProposer(draft, DraftJob(rows, SpeculationSettings(), rule, 100, cache), read)


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
    return TokenRule(logits_rules(config, settings), settings, prompts, 300, torch.device("cpu"))


def _prompt(length: int, width: int, dtype: torch.dtype) -> Any:
    ids = torch.zeros(1, length, dtype=torch.long, device=CUDA)
    return SimpleNamespace(
        length=length,
        next_position=length,
        embeds=torch.empty(1, length, width, device=CUDA, dtype=dtype),
        positions=torch.zeros(3, length, dtype=torch.long, device=CUDA),
        inputs=SimpleNamespace(token_ids=ids),
    )


def run_round(case: Case, prompt: int) -> Seen:
    """Run a round behind prompts of about so many tokens; -> what was called."""
    rule, large, small = _rule(), *(tiny_model(case.family, Size(n, width=64)) for n in (2, 1))
    head = _head(large) if case.headed else None
    if case.exact:
        rule._least, rule._seen = rule._least[:1], rule._seen[:1]
    # A tensor of one element would be kept as a constant, for which the device would have to be there.
    no_constants = patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)
    with no_constants, FakeTensorMode(), torch.inference_mode():
        target, draft = (_lm_there(model, case.dtype) for model in (large, small))
        assert target.graphs is not None
        assert target.round_attention == "split"
        for model in (target, draft):
            model.graphs, model.round_attention = None, case.attention
        prompts = [_prompt(prompt + row, 64, case.dtype) for row in range(1 if case.exact else 2)]
        ids = range(0, 300, 7) if case.trimmed else None
        if head is not None:
            _weights_there(head, case.dtype)
            head_draft = HeadDraft(head, target, ids)
        cache = target.new_cache(len(prompts), prompt + 100)
        rows, rule = TargetRows(target, cache, prompts, torch.empty(0)), _there(rule)
        rounds = _Rounds(rows, rule, StageClock(torch.device("cpu")), accept)
        rounds.start(torch.zeros(len(prompts), dtype=torch.long, device=CUDA))
        if head is not None:
            rounds.proposer = _head_proposer(head_draft, prompts, rule, cache, case.attention)
        else:
            vocabulary = DraftVocabulary(draft.model.get_output_embeddings(), 300, ids)
            rounds.proposer = _SmallModelProposer(draft, vocabulary, prompts, rule, 100)
        value, seen = None, Seen()
        with seen:
            for stage in rounds._stages(_there(case.shape), Horizon(5, case.exact)):
                value = stage(value)
    assert isinstance(value, torch.Tensor)
    assert value.device == CUDA
    return seen
