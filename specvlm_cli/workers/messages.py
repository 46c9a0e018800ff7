"""What coordinator and worker say to each other, as pickled records. Both are our own processes.

Every video has a key, its ordinal in the ledger, and every message says which videos it is about.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Literal

from specvlm.records import Caption
from specvlm_cli.caption.baseline import Comparison
from specvlm_cli.caption.engine import EngineFactory, Models
from specvlm_cli.caption.failure import Failure
from specvlm_cli.readers import SharedFrames
from specvlm_cli.readers.shared import CLOSE_ON_EXEC

OnOom = Literal["fail", "reduce"]
REDUCED = "reduced_frames"  # flag of a row whose video was captioned from fewer frames than asked for


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """First message to a worker."""

    factory: EngineFactory
    device: str | None  # None: where the settings say
    sharing: int  # workers on the CPU, if that is the device
    time_limit_s: float | None  # of each video, counted from its admission
    on_oom: OnOom


@dataclass(frozen=True, slots=True)
class Task:
    """One video to prepare. The descriptor of its frames follows. It runs once a message admits it."""

    key: int
    prompts: tuple[str, ...]
    own_prompts: bool  # the prompts are this video's own: an unusable one is no fault of the run
    frames: SharedFrames


@dataclass(frozen=True, slots=True)
class Admit:
    """Caption these videos as soon as there are slots."""

    keys: tuple[int, ...]
    alone: bool = False  # one video, and nothing runs next to it


@dataclass(frozen=True, slots=True)
class Compare:
    """Decode these videos as a batch of their own, with the draft and plainly, and compare."""

    keys: tuple[int, ...]
    plain_first: bool


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Forget a video that was not admitted."""

    key: int


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker runs; it is about to load the models."""

    gpus: int  # that it sees


@dataclass(frozen=True, slots=True)
class Ready:
    """The models are loaded."""

    models: Models
    batch_size: int  # most sequences in flight


@dataclass(frozen=True, slots=True)
class VideoCaptions:
    """All captions of one video, one for each prompt."""

    key: int
    captions: tuple[tuple[Caption, Comparison | None], ...]
    times_s: tuple[float, ...]  # [F] of the frames that were used
    flags: tuple[str, ...] = ()  # REDUCED, or nothing
    as_alone: bool | None = None  # its captions are those of a batch of one; None: not compared


@dataclass(frozen=True, slots=True)
class Failed:
    """One video has no caption."""

    key: int
    failure: Failure
    trace: str


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What became of videos since the last report."""

    admitted: tuple[int, ...]  # these run from now on, and so does their time
    ended: tuple[VideoCaptions | Failed, ...]
    batch_size: int  # most sequences in flight, from now on


@dataclass(frozen=True, slots=True)
class Lost:
    """Something went wrong that concerns every video in flight; the worker ends."""

    keys: tuple[int, ...]  # of the videos in flight
    failure: Failure
    trace: str
    transient: bool  # another try may work: the device is in an undefined state


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing will work: the models do not load, or every video would fail in the same way."""

    error: Exception
    trace: str


ToWorker = Task | Admit | Compare | Withdraw  # once it is ready
FromWorker = Hello | Ready | WorkerReport | Lost | Broken


def send_descriptor(connection: int, descriptor: int) -> None:
    """Send a descriptor over a Unix socket, given by its own; no answer comes, so both sides may talk meanwhile.

    Raises:
        OSError: The other side is gone, or takes nothing.
    """
    with socket.socket(fileno=os.dup(connection)) as ours:
        socket.send_fds(ours, [b"\0"], [descriptor])


def receive_descriptor(connection: int) -> int:
    """Return a descriptor that was sent.

    Raises:
        EOFError: The other side has hung up.
        OSError: Nothing can be received.
    """
    with socket.socket(fileno=os.dup(connection)) as ours:
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1, CLOSE_ON_EXEC)
    if not descriptors:
        raise EOFError
    return descriptors[0]
