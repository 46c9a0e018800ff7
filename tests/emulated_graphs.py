"""CUDA graphs on the CPU: operations are recorded with the very tensors and numbers of one run, and repeated.

As in a graph, what the host knew is fixed, every operation reads and writes the same addresses, recording changes
nothing, and asking for a value fails.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specvlm.attention import RoundAttention
from specvlm.cache import KVCache, Slab
from specvlm.captioner import Captioner
from specvlm.decode import Decoder
from specvlm.drafts.base import Draft
from specvlm.drafts.head import HeadDraft, _HeadProposer
from specvlm.drafts.small_model import SmallModelDraft, _SmallModelProposer
from specvlm.graphs import Recorded, Rig, Stage
from specvlm.model import TextModel

# What a stream that is being captured cannot do: ask for values, shapes that depend on data, memory of the host.
FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "aten.equal",
    "lift_fresh",
    "is_nonzero",
)


@cache
def forbidden(function: Any) -> bool:
    """Whether a graph cannot hold this operation."""
    return any(name in str(function) for name in FORBIDDEN)


class CannotCaptureError(RuntimeError):
    """An operation that a graph cannot hold."""


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Those among an operation's arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            if isinstance(one, torch.Tensor):
                found.append(one)
            elif isinstance(one, (list, tuple, dict)):
                found += tensors_of(one)
    return found


def address(tensor: torch.Tensor) -> int:
    """Of the storage, which views share."""
    return tensor.untyped_storage()._cdata


@cache
def decomposes(function: Any) -> bool:
    """Whether an operation is made of others."""
    if function.namespace != "aten":
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return composite in function.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), composite
    )


@cache
def writes(function: Any) -> bool:
    """Whether an operation changes what it is given."""
    return bool(function._schema.is_mutable)


class Step(NamedTuple):
    """One operation that is repeated, and where its results go."""

    function: Any
    args: Any
    kwargs: dict[str, Any]
    kept: list[torch.Tensor]


class Recorder(TorchDispatchMode):
    """Runs operations, and notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, torch.UntypedStorage] = {}  # during the recording, by address
        self.read: dict[int, torch.Tensor] = {}  # there before
        self._spoilt: list[torch.Tensor] = []
        self.replay_of: Any = None  # a weak reference: whoever may repeat it keeps that
        self._steps: list[Step] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if forbidden(func):
            raise CannotCaptureError(str(func))
        kwargs = kwargs or {}
        if decomposes(func):  # what is made of other operations may hide one that asks
            with self:
                return func.decompose(*args, **kwargs)
        given = tensors_of(args) + tensors_of(kwargs)
        ours = {address(tensor): tensor for tensor in given}
        mutable = writes(func)
        for where, tensor in ours.items():
            if where not in self.made:
                self.read[where] = tensor
                if mutable and where not in self._before:
                    storage = tensor.untyped_storage()
                    self._before[where] = (storage, storage.clone())
        out = func(*args, **kwargs)
        results = tensors_of(out)
        new = [(where, tensor) for tensor in results if (where := address(tensor)) not in ours]
        for where, tensor in new:
            self.made[where] = tensor.untyped_storage()
        if mutable:
            self._steps.append(Step(func, args, kwargs, []))
        elif new:  # else a view, which stays one
            self._steps.append(Step(func, args, kwargs, results))
        return out

    def finish(self) -> None:
        """Put everything that was there before back as it was."""
        for storage, before in self._before.values():
            storage.copy_(before, non_blocking=False)
        self._spoilt = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in self.made.values()]

    def replay(self) -> None:
        """Repeat all operations on the same addresses.

        What the recording left there is spoilt before the first time, so that nobody lives on it.
        """
        for left in self._spoilt:
            left.fill_(0xFF)
        self._spoilt = []
        for function, args, kwargs, kept in self._steps:
            out = function(*args, **kwargs)
            if kept:
                for old, new in zip(kept, tensors_of(out), strict=True):
                    old.copy_(new)


class Emulator:
    """Captures as `CudaCapture` does.

    Attributes:
        captured: Stages recorded.
        replayed: Stages repeated.
        fails_at: Fail in the stage of this number; None: never.
    """

    def __init__(self) -> None:
        self.captured: list[Recorder] = []
        self.replayed = 0
        self.fails_at: int | None = None

    def __call__(self, stage: Stage, value: Any) -> Recorded:
        recorder = Recorder()
        if len(self.captured) == self.fails_at:
            stage = self._failing(stage)
        try:
            with recorder:
                output = stage(value)
        finally:
            recorder.finish()
        self.captured.append(recorder)

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        recorder.replay_of = weakref.ref(replay)
        return Recorded(output, replay)

    @staticmethod
    def _failing(stage: Stage) -> Stage:
        def fail(value: Any) -> Any:
            stage(value)
            raise CannotCaptureError("no graph today")

        return fail


def draft_text(draft: Draft) -> TextModel:
    """The decoder that a draft runs over slabs of its own."""
    assert isinstance(draft, SmallModelDraft | HeadDraft)
    return draft.model if isinstance(draft, SmallModelDraft) else draft.text


def emulate(captioner: Captioner) -> Emulator:
    """Turn graphs on for a captioner on the CPU; -> what captures its rounds."""
    emulator = Emulator()
    captioner.target.captures = True
    captioner.make_capture = lambda _: emulator
    captioner._decoders.clear()  # which were made without
    return emulator


def run_eagerly(captioner: Captioner) -> None:
    """Turn graphs off again, and have rounds attend as they do on the CPU."""
    captioner.target.captures = False
    captioner._decoders.clear()
    attend_by(captioner, "masked")


def attend_by(captioner: Captioner, how: RoundAttention) -> None:
    """Have rounds of target and draft attend so."""
    captioner.target.round_attention = how
    if captioner.draft is not None:
        draft_text(captioner.draft).round_attention = how


def kept_decoders(captioner: Captioner) -> list[Decoder]:
    """The decoders of a captioner that has nothing in flight, the one that was used last at the end."""
    return list(captioner._decoders.values())


def rig_of(decoder: Decoder) -> Rig:
    """What a decoder's rounds keep at fixed addresses."""
    assert decoder._rig is not None
    return decoder._rig


def caches_of(decoder: Decoder) -> list[KVCache]:
    """The target's cache, and the draft's where it has begun."""
    proposer = decoder._rounds.proposer
    assert proposer is None or isinstance(proposer, _SmallModelProposer | _HeadProposer)
    return [decoder._verifier.cache, *([] if proposer is None else [proposer.cache])]


def slabs_of(decoder: Decoder) -> list[Slab]:
    """The slabs of all its caches."""
    return [slab for cache in caches_of(decoder) for slab in cache._slabs]


def kept_by(captioner: Captioner, decoder: Decoder) -> set[int]:
    """The addresses of all that graphs of a decoder may read.

    Weights, slabs, tensors in their places, tables that are kept alive for a graph, constants of what is in its key.
    """
    rig = rig_of(decoder)
    modules = [captioner.target.model]
    if isinstance(captioner.draft, SmallModelDraft):
        modules.append(captioner.draft.model.model)
    if isinstance(captioner.draft, HeadDraft):
        modules.append(captioner.draft.head)
    kept = [
        *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers())),
        *(tensor for slab in slabs_of(decoder) for tensor, _ in slab.parts()),
        *rig._tensors.values(),
        *held_tensors([(key, known.tables) for key, known in rig._rounds.items()]),
    ]
    return {address(tensor) for tensor in kept}


def strangers(captioner: Captioner, emulator: Emulator) -> list[tuple[int, list[torch.Size]]]:
    """What the recorded stages of a captioner's last decoder read that nobody keeps: by stage, the shapes."""
    known, found = kept_by(captioner, kept_decoders(captioner)[-1]), []
    for number, recorder in enumerate(emulator.captured):
        if recorder.replay_of() is None:  # given up, with the memory that it was about
            continue
        before = emulator.captured[number - number % 3 : number]
        mine = known | {made for earlier in before for made in earlier.made}
        if shapes := [tensor.shape for where, tensor in recorder.read.items() if where not in mine]:
            found.append((number, shapes))
    return found


def held_tensors(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """All tensors that an object holds, at any depth of attributes, lists, tuples and dicts."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from held_tensors(one, seen)
    elif isinstance(value, dict):  # no list of its values: another one may get its id
        for one in value.values():
            yield from held_tensors(one, seen)
    elif type(value).__module__.startswith("specvlm."):
        yield from held_tensors(getattr(value, "__dict__", {}), seen)
