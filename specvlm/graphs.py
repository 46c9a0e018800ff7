"""Rounds as CUDA graphs: tensors that stay where they are from batch to batch, and the graphs that rely on it.

A graph repeats the kernels of one run with the same numbers and addresses that the host knew then. So what differs
between two rounds is in tensors at fixed addresses, and what the host knew is the graph's key. Nothing here knows
what a round does. How something is captured is an argument, so that tests replay without a GPU.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

# Kept at once; the one that was not used for longest goes. Each holds a description of a few thousand kernels.
MOST_ROUNDS = 64

Stage = Callable[[Any], Any]  # what the stage before gave -> what the next one gets


class Recorded(NamedTuple):
    """A stage that can be repeated."""

    output: Any  # tensors that every replay overwrites
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
        # may continue to use the device.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = stage(value)
        return Recorded(output, graph.replay)


def can_capture(model: torch.nn.Module, devices: Sequence[torch.device]) -> bool:
    """Whether rounds of a model can be graphs: one CUDA device, nothing of accelerate's moving between.

    Quantised layers may ask the host in between (bitsandbytes 8 bit for its outliers), which no graph can.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    if {device.type for device in devices} != {"cuda"} or len({p.device for p in model.parameters()}) > 1:
        return False
    return not any(hasattr(module, "_hf_hook") for module in model.modules())


class Table(Protocol):
    """What a graph reads besides tensors in their places."""

    @property
    def valid(self) -> bool:
        """Whether it is still there."""


class _CapturedRound(NamedTuple):
    """A kind of round that was met before."""

    stages: Sequence[Stage] | None  # None: it ran once, eagerly
    tables: Sequence[Table]  # what the graphs read besides tensors in their places, kept alive for them


class Rig:
    """What rounds keep at fixed addresses, and the graphs of these rounds.

    Batch after batch puts its own values into the same tensors, so a graph of an earlier batch serves a later one.

    Attributes:
        working: False after a capture failed; rounds then run eagerly for good.
    """

    def __init__(self, capture: Capture) -> None:
        """`capture`: records stages."""
        self._capture = capture
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._rounds: OrderedDict[Hashable, _CapturedRound] = OrderedDict()
        self.working = True

    def fresh(self) -> Rig:
        """Another one that has nothing yet."""
        rig = Rig(self._capture)
        rig.working = self.working
        return rig

    @torch.inference_mode()
    def place(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The tensor of this name and shape, which now holds `value`; always at the same address."""
        key = (name, value.shape, value.dtype, value.device)
        kept = self._tensors.get(key)
        if kept is None:
            kept = self._tensors[key] = value.clone(memory_format=torch.contiguous_format)
        elif kept is not value:
            kept.copy_(value)
        return kept

    def adopt(self, name: str, holder: object) -> None:
        """Put every tensor that `holder` has as an attribute into its place."""
        for attribute, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, attribute, self.place(f"{name}.{attribute}", value))

    def forget(self) -> None:
        """Give up the graphs of memory that is gone: nothing will ask for them again."""
        gone = [key for key, known in self._rounds.items() if not all(table.valid for table in known.tables)]
        for key in gone:
            del self._rounds[key]

    def stages(self, key: Hashable, stages: Sequence[Stage], tables: Sequence[Table] = ()) -> Sequence[Stage]:
        """The stages of a round, ready to run: as they are when `key` is new, then as graphs.

        The first run makes libraries choose their kernels and set up what a capture may not.

        Args:
            key: All that the stages depend on besides tensors in their places, the weights, and `tables`.
            stages: Each takes what the one before gave, the first None.
            tables: What holds further tensors that the stages read, always the same for a key.
        """
        if not self.working:
            return stages
        known = self._rounds.get(key)
        if known is None:
            self._rounds[key] = _CapturedRound(None, ())
            if len(self._rounds) > MOST_ROUNDS:
                self._rounds.popitem(last=False)
            return stages
        self._rounds.move_to_end(key)
        if known.stages is None:
            recorded = self._record(stages)
            if recorded is None:
                return stages
            known = self._rounds[key] = _CapturedRound(recorded, tables)
        assert known.stages is not None
        return known.stages

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
            self._give_up(error)
            return None
        return replays

    def _give_up(self, error: Exception) -> None:
        """Run eagerly from now on."""
        self.working = False
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"rounds could not be captured as CUDA graphs ({type(error).__name__}: {reason}); "
            "captions are the same and slower",
            RuntimeWarning,
            stacklevel=2,
        )


def _replay_of(recorded: Recorded) -> Stage:
    def run(_: Any) -> Any:
        recorded.replay()
        return recorded.output

    return run
