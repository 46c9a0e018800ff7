"""The worker process: load the models, then caption videos, many at a time, until the coordinator hangs up.

The main thread decodes, step after step; videos are prepared in another (`preparing.py`). It knows frames and prompts;
no file, no ledger, no screen. It ignores the signals that stop a run: the coordinator decides what becomes of the
videos in flight, and kills if it must.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import Empty
from typing import NamedTuple

from specvlm.errors import ConfigError, GenerationTimeoutError, ModelError, PromptError
from specvlm.records import Caption, Frames
from specvlm_cli.caption import baseline
from specvlm_cli.caption.engine import Engine, Session
from specvlm_cli.caption.failure import Failure, failure_of
from specvlm_cli.exits import FatalError
from specvlm_cli.process import die_with_parent
from specvlm_cli.workers.messages import (
    REDUCED,
    Admit,
    Broken,
    Compare,
    Failed,
    Hello,
    Lost,
    Ready,
    VideoCaptions,
    Withdraw,
    WorkerReport,
    WorkerSetup,
)
from specvlm_cli.workers.preparing import Heard, Prepared, Preparer, PreparingVideo

Captions = dict[int, Caption]  # of one video, by the number of the prompt

_FOR_ALL = (ConfigError, ModelError)  # no fault of one video: every other would fail the same way
_FEWEST_SHARE = 8  # with on_oom=reduce, frames are halved down to this part of them


def main(descriptor: int, parent: int) -> None:
    """Serve the coordinator at the other end of a socket until it hangs up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)
    os.dup2(2, 1)  # stdout is for data, and what libraries print is none
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        _serve(connection)


def _serve(connection: Connection) -> None:
    setup: WorkerSetup = connection.recv()
    try:
        connection.send(Hello(setup.factory.gpus()))
        engine = setup.factory.load(setup.device, setup.sharing)
        connection.send(Ready(engine.models, engine.batch_size))
    except Exception as error:
        connection.send(_broken(error))
        return
    preparer = Preparer(connection, engine)
    try:
        _Service(connection, setup, engine, preparer).run()
    finally:
        preparer.close()


def _broken(error: Exception) -> Broken:
    trace = _trace_of(error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of some library that does not survive the way
        error = FatalError(f"{type(error).__name__}: {error}")
    return Broken(error, trace)


class _ForAllError(Exception):
    """Carries what no single video is to blame for."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _BatchError(Exception):
    """Carries what concerns all videos in flight."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class _Sequences:
    """One video that was admitted, and its sequences.

    Attributes:
        video: The video.
        alone: Nothing else runs while it does.
        in_set: It is decoded both ways.
        captions: What is finished, by the number of the prompt.
        running: Sequences that the engine has.
        due_s: When its time is over; None: never, or it does not run yet.
        frames: What is captioned; None: not known yet, or not needed any more.
        whole: Number of frames that were asked for.
        times_s: Of the frames that are captioned.
        flags: REDUCED, or nothing.
        prepared_twice: Memory ran out while it was prepared, and it was tried again.
    """

    video: PreparingVideo
    alone: bool = False
    in_set: bool = False
    captions: Captions = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    due_s: float | None = None
    frames: Frames | None = None
    whole: int = 0
    times_s: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()
    prepared_twice: bool = False

    @property
    def key(self) -> int:
        return self.video.task.key

    @property
    def is_captioned(self) -> bool:
        return len(self.captions) == len(self.video.task.prompts)


class _Opened(NamedTuple):
    """A video of a set, and its session."""

    one: _Sequences
    session: Session


class _Service:
    """Captions what the coordinator sends: the loop of a worker, and what it knows of each video."""

    def __init__(
        self, connection: Connection, setup: WorkerSetup, engine: Engine, preparer: Preparer
    ) -> None:
        self._connection = connection
        self._setup = setup
        self._engine = engine
        self._preparer = preparer
        self._known: dict[int, PreparingVideo] = {}  # prepared or being prepared, and not admitted
        self._waiting: dict[int, _Sequences] = {}  # admitted, without slots
        self._running: dict[int, _Sequences] = {}
        self._compare: list[Compare] = []
        self._admitted: list[int] = []  # since the last report, like what has ended
        self._ended: list[VideoCaptions | Failed] = []
        self._cold = True

    def run(self) -> None:
        """Work until the coordinator hangs up, or until nothing can be done here any more.

        Raises:
            EOFError: The coordinator has hung up.
        """
        try:
            while True:
                self._hear()
                self._fill()
                self._report()
                if self._running:
                    self._step()
                elif self._compare and not self._waiting:
                    self._compare_all(self._compare.pop(0))
        except _ForAllError as broken:
            self._report()
            self._connection.send(_broken(broken.error))
        except _BatchError as lost:
            self._report()
            self._connection.send(self._lost(lost.error))

    def _lost(self, error: Exception) -> Lost:
        return Lost(
            tuple(self._running),
            failure_of("generate", error),
            _trace_of(error),
            transient=_is_poisoned(error),
        )

    # What is heard

    def _hear(self) -> None:
        """Take what has come; wait for it where there is nothing else to do."""
        while True:
            try:
                heard = self._preparer.inbox.get(block=self._is_idle())
            except Empty:
                return
            self._take(heard)

    def _is_idle(self) -> bool:
        return not (
            self._running
            or self._ended
            or any(one.video.session.done() for one in self._waiting.values())
            or (self._compare and not self._waiting)
        )

    def _take(self, heard: Heard) -> None:
        match heard:
            case PreparingVideo():
                self._known[heard.task.key] = heard
            case Admit(keys, alone):
                for key in keys:
                    self._waiting[key] = _Sequences(self._known.pop(key), alone)
            case Compare():
                self._compare.append(heard)
            case Withdraw(key):
                self._known.pop(key).session.cancel()
            case Prepared():
                pass
            case BaseException():
                raise heard

    def _report(self) -> None:
        """Say what was admitted and what has ended since the last report."""
        if self._admitted or self._ended:
            report = WorkerReport(tuple(self._admitted), tuple(self._ended), self._engine.batch_size)
            self._admitted, self._ended = [], []
            self._connection.send(report)

    # One video after the other gets its slots, and loses them

    def _fill(self) -> None:
        """Give slots to videos that wait for them and are prepared, in the order of their admission."""
        for one in list(self._waiting.values()):
            if not one.video.session.done():
                continue
            if (
                len(self._engine)
                and len(self._engine) + len(one.video.task.prompts) > self._engine.batch_size
            ):
                return
            del self._waiting[one.key]
            session = self._opened(one)
            if session is not None:
                self._admitted.append(one.key)
                self._start(one, session, speculate=True, alone=one.alone)

    def _start(self, one: _Sequences, session: Session, *, speculate: bool, alone: bool) -> None:
        task = one.video.task
        one.captions, one.running = {}, set(range(len(task.prompts)))
        if self._setup.on_oom == "fail":  # nothing will be prepared again
            one.frames = one.video.frames = None
        limit_s = self._setup.time_limit_s
        one.due_s = None if limit_s is None else time.monotonic() + limit_s
        self._running[one.key] = one
        for index in range(len(task.prompts)):
            self._engine.add((one.key, index), session, index, speculate=speculate, alone=alone)

    def _opened(self, one: _Sequences) -> Session | None:
        """Wait for a video's session; None: there is none, which is reported or being put right.

        Raises:
            _ForAllError: No video could be prepared.
        """
        try:
            if one.frames is None:
                assert one.video.frames is not None
                one.frames = one.video.frames.result()
                one.whole = len(one.frames.pixels)
            one.times_s = tuple(one.frames.times_s.tolist())
            return one.video.session.result()
        except Exception as error:
            self._on_unprepared(one, error)
            return None

    def _on_unprepared(self, one: _Sequences, error: Exception) -> None:
        again = one.frames is not None and not one.prepared_twice
        if again and not isinstance(error, _FOR_ALL) and self._engine.is_out_of_memory(error):
            one.prepared_twice = True
            self._prepare_again(one)
        else:
            self._on_error(one, error, "preprocess")

    def _prepare_again(self, one: _Sequences) -> None:
        """Have a video wait for its slots once more, with fewer frames or for another try; not in a set."""
        assert one.frames is not None
        one.video.session = self._preparer.prepare(one.frames, one.video.task.prompts)
        one.in_set, one.captions = False, {}
        self._waiting[one.key] = one

    def _step(self) -> None:
        """Run a step; take note of what it finished, and give up what has had its time."""
        try:
            finished = self._engine.step()
        except _FOR_ALL as error:
            raise _ForAllError(error) from error
        except Exception as error:
            raise _BatchError(error) from error
        for one_done in finished:
            self._on_finished(*one_done)
        for one in self._overdue():
            late = f"the captions were not done after {self._setup.time_limit_s:g} s"
            self._on_error(one, GenerationTimeoutError(late))

    def _on_finished(self, key: object, caption: Caption | None, error: Exception | None) -> None:
        assert isinstance(key, tuple)
        ordinal, index = key
        one = self._running.get(ordinal)
        if one is None:  # another sequence of it has failed in this step
            return
        one.running.discard(index)
        if caption is None:
            assert error is not None
            self._on_error(one, error)
        elif not caption.text.strip():
            self._fail(
                one, Failure("generate", "EmptyCaption", "the model wrote nothing; try another prompt")
            )
        else:
            one.captions[index] = caption
            if not one.running:
                del self._running[ordinal]
                if not one.in_set:
                    made = tuple(
                        (one.captions[at], baseline.estimate(one.captions[at])) for at in sorted(one.captions)
                    )
                    self._ended.append(VideoCaptions(one.key, made, one.times_s, one.flags))

    def _overdue(self) -> list[_Sequences]:
        now_s = time.monotonic()
        return [one for one in self._running.values() if one.due_s is not None and one.due_s <= now_s]

    # What goes wrong

    def _on_error(self, one: _Sequences, error: Exception, stage: str = "generate") -> None:
        """Take note of a video that has no caption, and what that means for the others.

        Raises:
            _ForAllError: No video is to blame.
            _BatchError: The device is in an undefined state.
        """
        traceback.clear_frames(error.__traceback__)  # which hold the tensors that are in the way
        if isinstance(error, _FOR_ALL):
            raise _ForAllError(error)
        if isinstance(error, PromptError):
            if not one.video.task.own_prompts:
                raise _ForAllError(error)
            stage = "preprocess"
        elif _is_poisoned(error):
            self._running.setdefault(one.key, one)
            raise _BatchError(error)
        elif self._engine.is_out_of_memory(error):
            self._on_out_of_memory(one, error)
            return
        self._fail(one, failure_of(stage, error), _trace_of(error))

    def _fail(self, one: _Sequences, failure: Failure, trace: str = "") -> None:
        self._forget(one)
        self._ended.append(Failed(one.key, failure, trace))

    def _forget(self, one: _Sequences) -> None:
        """Take a video's slots away."""
        for index in one.running:
            self._engine.abort((one.key, index))
        one.running = set()
        self._running.pop(one.key, None)

    def _on_out_of_memory(self, one: _Sequences, error: Exception) -> None:
        """Caption half the frames of a video that memory cannot hold by itself, as far as that is allowed."""
        if self._setup.on_oom == "reduce" and one.frames is not None:
            fewer = self._halved(one.frames, one.whole)
            if fewer is not None:
                self._forget(one)
                one.frames, one.flags = fewer, (REDUCED,)
                self._prepare_again(one)
                return
        reason = f"memory ran out with {len(one.times_s)} frames ({error}); give fewer or smaller ones"
        self._fail(one, Failure("generate", type(error).__name__, reason))

    def _halved(self, frames: Frames, whole: int) -> Frames | None:
        """Return half of the frames; None: that would be too few of the `whole` number."""
        multiple = self._engine.models.frame_multiple
        count = len(frames.pixels) // 2 // multiple * multiple
        if count < max(multiple, whole // _FEWEST_SHARE):
            return None
        kept = slice(None, 2 * count, 2)
        return frames._replace(pixels=frames.pixels[kept], times_s=frames.times_s[kept])

    # Sets that are decoded both ways

    def _compare_all(self, what: Compare) -> None:
        """Decode a set with the draft and plainly, and one video of it in a batch of one."""
        opened: list[_Opened] = []
        for key in what.keys:
            one = _Sequences(self._known.pop(key), in_set=True)
            session = self._opened(one)
            if session is not None:
                opened.append(_Opened(one, session))
        if not opened:
            return
        self._warm_up(opened[0].one)
        batch = sum(len(one.video.task.prompts) for one, _ in opened)
        made: dict[bool, dict[int, Captions]] = {}
        for speculate in (False, True) if what.plain_first else (True, False):
            self._admitted += [one.key for one, _ in opened]
            made[speculate] = self._decode(opened, speculate=speculate)
            opened = [one for one in opened if one.one.key in made[speculate]]
        alone: dict[int, Captions] = {}
        if opened and batch > 1:
            self._admitted += [one.key for one, _ in opened]
            alone = self._decode(opened[:1], speculate=True, alone=True)
            opened = opened[0 if alone else 1 :]
        for one, _ in opened:
            self._ended.append(
                _compared(one, made[True][one.key], made[False][one.key], alone.get(one.key, {}))
            )

    def _warm_up(self, one: _Sequences) -> None:
        if self._cold:
            self._cold = False
            assert one.frames is not None
            with self._preparer.paused():
                self._engine.warm_up(one.frames, one.video.task.prompts[0])

    def _decode(
        self, opened: Sequence[_Opened], *, speculate: bool, alone: bool = False
    ) -> dict[int, Captions]:
        """Decode videos until none is left; return the captions of those that have all of theirs.

        What becomes of the others is reported, or being put right.
        """
        for one, session in opened:
            self._start(one, session, speculate=speculate, alone=alone)
        self._report()
        while self._running:
            self._step()
        return {one.key: one.captions for one, _ in opened if one.in_set and one.is_captioned}


def _compared(one: _Sequences, drafted: Captions, plain: Captions, alone: Captions) -> VideoCaptions:
    """Return what the ways of decoding one video say together; `alone`: in a batch of one, where that was tried."""
    pairs = tuple(
        (caption, baseline.compare(caption, plain[index], alone.get(index)))
        for index, caption in sorted(drafted.items())
    )
    agrees = all(baseline.alone_agrees(caption, alone.get(index)) for index, caption in drafted.items())
    return VideoCaptions(one.key, pairs, one.times_s, one.flags, agrees if alone else None)


def _trace_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _is_poisoned(error: BaseException) -> bool:
    """Say whether the device cannot be used any more by this process, as after a failed CUDA kernel."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
