"""The worker process: load the models, then caption one video after the other until the coordinator hangs up.

The main thread generates; the next video is prepared beside it (`preparing.py`). It knows frames and prompts; no
file, no ledger, no screen. It ignores the signals that stop a run: the coordinator decides what becomes of the
video in hand, and kills if it must.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

from specvlm.errors import ConfigError, GenerationTimeoutError, ModelError, PromptError
from specvlm.records import Caption, Frames
from specvlm_cli import baseline
from specvlm_cli.baseline import Comparison
from specvlm_cli.engine import Engine, Session
from specvlm_cli.exits import FatalError
from specvlm_cli.failure import Failure, failure_of
from specvlm_cli.generating.messages import REDUCED, Broken, Failed, Hello, Made, Ready, Setup, Task
from specvlm_cli.generating.preparing import Preparer, Upcoming
from specvlm_cli.process import die_with_parent

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
    setup: Setup = connection.recv()
    try:
        connection.send(Hello(setup.factory.gpus()))
        engine = setup.factory.load(setup.device)
        connection.send(Ready(engine.models))
    except Exception as error:
        connection.send(_broken(error))
        return
    _Service(connection, engine).run()


def _broken(error: Exception) -> Broken:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of some library that does not survive the way
        error = FatalError(f"{type(error).__name__}: {error}")
    return Broken(error, trace)


class _Refused(Exception):  # noqa: N818  it carries a failure, and is none
    """Carries why this video has no caption."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error)
        self.failure = failure


class _Service:
    """Captions what the coordinator sends."""

    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        self._engine = engine
        self._preparer = Preparer(connection, engine)
        self._cold = True

    def run(self) -> None:
        while True:
            answer = self._answer(self._preparer.next())
            self._connection.send(answer)
            if isinstance(answer, Broken) or (isinstance(answer, Failed) and answer.poisoned):
                return

    def _answer(self, video: Upcoming) -> Made | Failed | Broken:
        try:
            return self._with_memory_at_hand(video)
        except _FOR_ALL as error:
            return _broken(error)
        except PromptError as error:
            return _failed(error, "preprocess") if video.task.own_prompts else _broken(error)
        except Exception as error:
            return _failed(error, "generate")

    def _with_memory_at_hand(self, video: Upcoming) -> Made:
        """Caption; where memory runs out, free what can be freed and try again, as the task allows."""
        task, frames = video.task, video.frames()
        for tried in _tries(task, frames, self._engine.models.frame_multiple):
            flags = () if len(tried.pixels) == len(frames.pixels) else (REDUCED,)
            try:
                made = tuple(self._captions(video, tried))
                return Made(made, tuple(tried.times_s.tolist()), flags)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # which hold the tensors that are in the way
                if not self._engine.is_out_of_memory(error):
                    raise
                last = error
        reason = f"memory ran out with {len(tried.pixels)} frames ({last}); give fewer or smaller ones"
        raise _Refused(Failure("generate", type(last).__name__, reason))

    def _captions(self, video: Upcoming, frames: Frames) -> Iterator[tuple[Caption, Comparison | None]]:
        began, task = time.monotonic(), video.task
        session = self._open(video, frames)
        if task.compare and self._cold:
            with self._preparer.paused():
                self._engine.warm_up(frames, task.prompts[0])
            self._cold = False
        for index in range(len(task.prompts)):
            left_s = None if task.time_limit_s is None else task.time_limit_s - (time.monotonic() - began)
            if left_s is not None and left_s <= 0:
                raise GenerationTimeoutError(f"the captions were not done after {task.time_limit_s:g} s")
            yield _caption(session, index, task, left_s)

    def _open(self, video: Upcoming, frames: Frames) -> Session:
        """Return what was prepared, the first time; then prepare these frames."""
        try:
            return video.take() or self._preparer.open(frames, video.task.prompts)
        except (*_FOR_ALL, PromptError):
            raise
        except Exception as error:
            if self._engine.is_out_of_memory(error):
                raise
            raise _Refused(failure_of("preprocess", error)) from error


def _caption(
    session: Session, index: int, task: Task, time_limit_s: float | None
) -> tuple[Caption, Comparison | None]:
    """Caption one prompt, and where that was asked for, do it plainly too."""
    if not task.compare:
        caption = session.caption(index, speculate=True, time_limit_s=time_limit_s, estimate=task.estimate)
        return _written(caption), baseline.estimate(caption)
    order = (False, True) if task.plain_first else (True, False)
    made = {
        speculate: session.caption(index, speculate=speculate, time_limit_s=time_limit_s)
        for speculate in order
    }
    return _written(made[True]), baseline.compare(made[True], made[False])


def _failed(error: Exception, stage: str) -> Failed:
    failure = error.failure if isinstance(error, _Refused) else failure_of(stage, error)
    poisoned = _is_poisoned(error)
    trace = "".join(traceback.format_exception(error.__cause__ or error))
    return Failed(failure, trace, transient=poisoned, poisoned=poisoned)


def _tries(task: Task, frames: Frames, multiple: int) -> Iterator[Frames]:
    """Yield the frames twice, and then, if that is allowed, ever fewer of them."""
    yield frames
    yield frames
    least = max(multiple, len(frames.pixels) // _FEWEST_SHARE)
    while task.on_oom == "reduce" and (count := len(frames.pixels) // 2 // multiple * multiple) >= least:
        kept = slice(None, 2 * count, 2)
        frames = frames._replace(pixels=frames.pixels[kept], times_s=frames.times_s[kept])
        yield frames


def _written(caption: Caption) -> Caption:
    if not caption.text.strip():
        reason = "the model wrote nothing; try another prompt"
        raise _Refused(Failure("generate", "EmptyCaption", reason))
    return caption


def _is_poisoned(error: BaseException) -> bool:
    """Say whether the device cannot be used any more by this process, as after a failed CUDA kernel."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
