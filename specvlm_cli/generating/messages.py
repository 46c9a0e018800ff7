"""What coordinator and worker say to each other, as pickled records. Both are our own processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specvlm.records import Caption
from specvlm_cli.baseline import Comparison
from specvlm_cli.decoding import SharedFrames
from specvlm_cli.engine import EngineFactory, Models
from specvlm_cli.failure import Failure

OnOom = Literal["fail", "reduce"]
REDUCED = "reduced_frames"  # flag of a row whose video was captioned from fewer frames than asked for


@dataclass(frozen=True, slots=True)
class Setup:
    """First message to a worker."""

    factory: EngineFactory
    device: str | None  # None: where the settings say


@dataclass(frozen=True, slots=True)
class Task:
    """One video to prepare, and to caption once a go-ahead comes. The descriptor of its frames follows.

    It takes the place of a task before it that got no go-ahead.
    """

    prompts: tuple[str, ...]
    own_prompts: bool  # the prompts are this video's own: an unusable one is no fault of the run
    frames: SharedFrames
    compare: bool  # decode plainly too
    estimate: bool  # where not, time a few plain steps
    plain_first: bool
    time_limit_s: float | None
    on_oom: OnOom


@dataclass(frozen=True, slots=True)
class GoAhead:
    """Caption the video of the last task; its time counts from here."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker runs; it is about to load the models."""

    gpus: int  # that it sees


@dataclass(frozen=True, slots=True)
class Ready:
    """The models are loaded."""

    models: Models


@dataclass(frozen=True, slots=True)
class Made:
    """All captions of one video, one for each prompt."""

    captions: tuple[tuple[Caption, Comparison | None], ...]
    times_s: tuple[float, ...]  # [F] of the frames that were used
    flags: tuple[str, ...]  # REDUCED, or nothing


@dataclass(frozen=True, slots=True)
class Failed:
    """One video has no caption."""

    failure: Failure
    trace: str
    transient: bool  # another try may work
    poisoned: bool  # the worker ends now, because its device is in an undefined state


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing will work: the models do not load, or every video would fail in the same way."""

    error: Exception
    trace: str


ToWorker = Task | GoAhead  # once it is ready
FromWorker = Hello | Ready | Made | Failed | Broken
