"""Rounds as CUDA graphs: memory that stays where it is from video to video, and the graphs that rely on it.

A graph repeats the kernels of one run with the very numbers and addresses that the host knew then. So what differs
between two rounds is in tensors at fixed addresses, and what the host knew is the graph's key. Nothing here knows
what a round does. How something is captured is an argument, so that tests replay without a GPU.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from specvlm.cache import SlabCache, Slabs, SlabShape

# The host tells lengths and indices in steps of this many slots, so that a graph serves as many rounds.
STEP = 128
# Kept at once; the one that was not used for longest goes. Each holds a description of a few thousand kernels.
MOST_ROUNDS = 32

Stage = Callable[[Any], Any]  # what the stage before gave -> what the next one gets


class Recorded(NamedTuple):
    """A stage that can be repeated."""

    output: Any  # tensors that every replay writes anew
    replay: Callable[[], None]


class Capture(Protocol):
    """Records stages without running them."""

    def __call__(self, stage: Stage, value: Any) -> Recorded:
        """Record `stage(value)`. No tensor that existed before may change."""


class CudaCapture:
    """Captures on a stream of its own, into one memory pool for all graphs that it makes.

    The pool may be shared because graphs run one after the other, the stages of a round in the order in which they
    were captured, and no round reads what an earlier one gave; outputs are kept, so later captures leave them alone.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: where the stages run."""
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, stage: Stage, value: Any) -> Recorded:
        """Record `stage(value)` as a graph."""
        graph = torch.cuda.CUDAGraph()
        # The outer stream context brings the caller's stream back where a capture that fails does not. Other threads
        # may go on using the device.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = stage(value)
        return Recorded(output, graph.replay)


def can_capture(model: torch.nn.Module, devices: Sequence[torch.device]) -> bool:
    """Whether rounds of a model can be graphs: one CUDA device, and nothing of accelerate's moving between."""
    if {device.type for device in devices} != {"cuda"} or len({p.device for p in model.parameters()}) > 1:
        return False
    return not any(hasattr(module, "_hf_hook") for module in model.modules())


class Rig:
    """What rounds over one cache keep at fixed addresses, and the graphs of these rounds.

    Job after job puts its own values into the same tensors, so a graph of an earlier job serves a later one.
    """

    def __init__(self, graphs: Graphs, capture: Capture) -> None:
        self._graphs, self._capture = graphs, capture
        self._tensors: dict[str, torch.Tensor] = {}
        self._rounds: OrderedDict[Hashable, Sequence[Stage] | None] = OrderedDict()  # None: ran once, eagerly

    @torch.inference_mode()
    def place(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The tensor of this name, which now holds `value`; at the same address as long as shapes do not change."""
        kept = self._tensors.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (value.shape, value.dtype, value.device):
            if kept is not None:
                self._rounds.clear()  # their address is given up
            self._tensors[name] = value.clone(memory_format=torch.contiguous_format)
        elif kept is not value:
            kept.copy_(value)
        return self._tensors[name]

    def adopt(self, name: str, holder: object) -> None:
        """Put every tensor that `holder` has as an attribute into its place."""
        for attribute, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, attribute, self.place(f"{name}.{attribute}", value))

    def stages(self, key: Hashable, stages: Sequence[Stage]) -> Sequence[Stage]:
        """The stages of a round, ready to run: as they are when `key` is new, then as graphs.

        The first run makes libraries choose their kernels and set up what a capture may not.

        Args:
            key: All that the stages depend on beside tensors in their places and the weights.
            stages: Each takes what the one before gave, the first None.
        """
        if not self._graphs.working:
            return stages
        if key not in self._rounds:
            self._rounds[key] = None
            if len(self._rounds) > MOST_ROUNDS:
                self._rounds.popitem(last=False)
            return stages
        self._rounds.move_to_end(key)
        if self._rounds[key] is None:
            self._rounds[key] = self._record(stages)
        return self._rounds[key] or stages

    def _record(self, stages: Sequence[Stage]) -> Sequence[Stage] | None:
        """Capture all stages before any of them runs, so that one that cannot be captured leaves nothing half done."""
        replays: list[Stage] = []
        value = None
        try:
            for stage in stages:
                recorded = self._capture(stage, value)
                replays.append(_replay_of(recorded))
                value = recorded.output
        except Exception as error:  # whatever it is, rounds can do without graphs
            self._rounds.clear()
            self._graphs.give_up(error)
            return None
        return replays


def _replay_of(recorded: Recorded) -> Stage:
    def run(_: Any) -> Any:
        recorded.replay()
        return recorded.output

    return run


class _Kept(NamedTuple):
    """Memory that is handed to one job after another."""

    slabs: Slabs
    rig: Rig
    holder: weakref.ref[SlabCache]  # the cache of the job that has it now


class Graphs:
    """Keeps one model's slabs and what is captured over them.

    One set of slabs is kept, as large as any job so far needed; a larger one takes its place after it was given back.
    A job that asks while another still runs gets memory of its own and runs eagerly.

    Attributes:
        working: False after a capture failed; rounds then run eagerly for good.
    """

    def __init__(self, make_capture: Callable[[torch.device], Capture] = CudaCapture) -> None:
        """`make_capture`: device -> what captures there."""
        self._make_capture = make_capture
        self._kept: _Kept | None = None
        self.working = True

    def new_cache(self, shape: SlabShape, rows: int, capacity: int) -> SlabCache:
        """A cache of at least `capacity` slots a row, zeros at the beginning, in the kept memory if that is free."""
        if self._is_held():
            return SlabCache(shape, rows, capacity)
        kept = self._kept
        if kept is not None and (kept.slabs.rows != rows or kept.slabs.capacity < capacity):
            kept = self._kept = None  # given back before a larger one is asked for
        if kept is None:
            # Room for a prompt and an index that are rounded up.
            slabs = Slabs(shape, rows, (capacity + 2 * STEP) // STEP * STEP)
            rig = Rig(self, self._make_capture(shape.devices[0]))
        else:
            slabs, rig = kept.slabs, kept.rig
            slabs.clear()
        cache = SlabCache(shape, rows, capacity, slabs, grain=STEP)
        self._kept = _Kept(slabs, rig, weakref.ref(cache))
        return cache

    def _is_held(self) -> bool:
        if self._kept is None or self._kept.holder() is None:
            return False
        gc.collect()  # a job that is over may hang in a cycle of references
        return self._kept.holder() is not None

    def rig(self, cache: SlabCache) -> Rig | None:
        """The rig of a cache in the kept memory; None: this cache's rounds run eagerly."""
        kept = self._kept
        return kept.rig if kept is not None and kept.slabs is cache.slabs else None

    def give_up(self, error: Exception) -> None:
        """Run eagerly from now on."""
        self.working = False
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"rounds could not be captured as CUDA graphs ({type(error).__name__}: {reason}); "
            "captions are the same and slower",
            RuntimeWarning,
            stacklevel=2,
        )


def index_step(index: int) -> int:
    """The index that a graph looks to instead of `index`: the next multiple of the step."""
    return (index // STEP + 1) * STEP
