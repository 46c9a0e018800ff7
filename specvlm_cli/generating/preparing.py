"""The worker's second pair of hands: hear what the coordinator says, and prepare videos, while a caption is made.

One thread listens, so that a go-ahead is heard at once; one prepares, a video at a time: frames and prompts become
a session of the engine, which runs no model and takes no memory of the device. What goes wrong is kept for the one
who asks for the video, so nothing is said of a video that gets no go-ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from queue import SimpleQueue

from specvlm.records import Frames
from specvlm_cli.decoding import open_frames
from specvlm_cli.engine import Engine, Session
from specvlm_cli.generating.messages import GoAhead, Task, ToWorker


class Upcoming:
    """A video that is being prepared, or is.

    Attributes:
        task: What is to be done with it.
    """

    def __init__(self, task: Task, frames: Future[Frames], session: Future[Session]) -> None:
        self.task = task
        self._frames = frames
        self._session: Future[Session] | None = session

    def frames(self) -> Frames:
        """Return its frames.

        Raises:
            OSError: They cannot be mapped.
        """
        return self._frames.result()

    def take(self) -> Session | None:
        """Wait for the session and return it; None: it was taken before. It is not kept here.

        Raises:
            Exception: What preparing raised.
        """
        session, self._session = self._session, None
        return None if session is None else session.result()

    def give_up(self) -> None:
        """Do not begin to prepare it, if that has not begun."""
        if self._session is not None:
            self._session.cancel()


class Preparer:
    """Hears tasks and prepares their videos, from now on until the coordinator hangs up."""

    def __init__(self, connection: Connection, engine: Engine) -> None:
        """Nobody else may listen to the connection any more."""
        self._connection = connection
        self._engine = engine
        self._claimed: SimpleQueue[Upcoming | BaseException] = SimpleQueue()
        self._processor = threading.Lock()  # the engine's; what it shares was not made for two threads
        self._hands = ThreadPoolExecutor(1, "preparing")
        threading.Thread(target=self._listen, name="listening", daemon=True).start()

    def next(self) -> Upcoming:
        """Wait for a go-ahead; return the video that is to be captioned now.

        Raises:
            EOFError: The coordinator has hung up.
            Exception: It cannot be understood.
        """
        heard = self._claimed.get()
        if isinstance(heard, BaseException):
            raise heard
        return heard

    def open(self, frames: Frames, prompts: tuple[str, ...]) -> Session:
        """Preprocess frames and prompts; what is being prepared beside it comes before or after.

        Raises:
            Exception: What the engine raises.
        """
        with self.paused():
            return self._engine.open(frames, prompts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Prepare nothing meanwhile."""
        with self._processor:
            yield

    def _listen(self) -> None:
        try:
            upcoming: Upcoming | None = None
            while True:
                message: ToWorker = self._connection.recv()
                if isinstance(message, GoAhead):
                    assert upcoming is not None
                    self._claimed.put(upcoming)
                    upcoming = None
                    continue
                if upcoming is not None:
                    upcoming.give_up()
                upcoming = self._prepare(message, recv_handle(self._connection))
        except BaseException as error:
            self._claimed.put(error)

    def _prepare(self, task: Task, descriptor: int) -> Upcoming:
        frames = self._hands.submit(open_frames, descriptor, task.frames)
        session = self._hands.submit(lambda: self.open(frames.result(), task.prompts))
        return Upcoming(task, frames, session)
