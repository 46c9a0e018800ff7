"""What runs in a worker besides the decoding: one thread listens, one prepares videos, a video at a time.

Preparing turns frames and prompts into a session of the engine: it runs no model and takes no memory of the device.
What goes wrong with it is kept for whoever asks for the session, so nothing is said of a video that is not admitted.
All that is heard and all that is prepared ends up in one inbox, on which the decoding waits where it has nothing to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue

from specvlm.records import Frames
from specvlm_cli.caption.engine import Engine, Session
from specvlm_cli.readers import open_frames
from specvlm_cli.workers.messages import Admit, Compare, Task, ToWorker, Withdraw, receive_descriptor


class Prepared:
    """The inbox's word for a video that is prepared now, or cannot be; its session says which."""


class PreparingVideo:
    """A video that is being prepared, or is.

    Attributes:
        task: What is to be done with it.
        frames: Its frames, once they are mapped; a result that raises OSError where they cannot be. None: they are
            not needed any more.
        session: Its session, once it is prepared; a result that raises what preparing raised.
    """

    def __init__(self, task: Task, frames: Future[Frames], session: Future[Session]) -> None:
        self.task = task
        self.frames: Future[Frames] | None = frames
        self.session = session


Heard = (
    PreparingVideo | Admit | Compare | Withdraw | Prepared | BaseException
)  # the last: nothing more can be heard


class Preparer:
    """Hears tasks and prepares their videos, from now on until the coordinator hangs up.

    Attributes:
        inbox: What was heard, in order, and notes of what is prepared.
    """

    def __init__(self, connection: Connection, engine: Engine) -> None:
        """No other thread may listen to the connection any more."""
        self.inbox: SimpleQueue[Heard] = SimpleQueue()
        self._connection = connection
        self._engine = engine
        self._processor = threading.Lock()  # the engine's; what it shares was not made for two threads
        self._thread = ThreadPoolExecutor(1, "preparing")
        threading.Thread(target=self._listen, name="listening", daemon=True).start()

    def prepare(self, frames: Frames, prompts: tuple[str, ...]) -> Future[Session]:
        """Have frames and prompts preprocessed, after all that is waiting for that."""
        return self._submit(lambda: frames, prompts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Prepare nothing meanwhile."""
        with self._processor:
            yield

    def close(self) -> None:
        """Prepare nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> None:
        try:
            while True:
                message: ToWorker = self._connection.recv()
                heard = self._begin(message) if isinstance(message, Task) else message
                self.inbox.put(heard)
        except BaseException as error:
            self.inbox.put(error)

    def _begin(self, task: Task) -> PreparingVideo:
        descriptor = receive_descriptor(self._connection.fileno())
        frames = self._thread.submit(open_frames, descriptor, task.frames)
        return PreparingVideo(task, frames, self._submit(frames.result, task.prompts))

    def _submit(self, frames: Callable[[], Frames], prompts: tuple[str, ...]) -> Future[Session]:
        def opened() -> Session:
            with self._processor:
                return self._engine.open(frames(), prompts)

        session = self._thread.submit(opened)
        session.add_done_callback(lambda _: self.inbox.put(Prepared()))
        return session
