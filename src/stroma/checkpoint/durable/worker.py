"""The thread that writes to a durable store.

Callers on any event loop submit operations. The thread performs all queued operations together and
acknowledges them when they are stored, so that one fsync or round trip serves all operations submitted during
the previous one.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from stroma._utils.forks import call_in_child
from stroma.checkpoint.errors import StoreError

T = TypeVar("T")

#: An operation, called with the rows of the connection.
Operation = Callable[[Any], Any]

_MAX_BATCH_SIZE: Final = 1024  # bounds the wait of each operation for its acknowledgement

_generation = 0


def generation() -> int:
    """Return the number of forks since the first process. Threads of other generations do not exist here."""
    return _generation


@call_in_child
def _count_fork() -> None:
    global _generation
    _generation += 1


def permanent_error(message: str) -> StoreError:
    """Return a StoreError that a retry will not resolve."""
    error = StoreError(message)
    error.transient = False
    return error


def retry(
    call: Callable[[], T],
    is_temporary: Callable[[Exception], bool],
    patience_seconds: float,
    pauses: tuple[float, float],
) -> T:
    """Repeat a call while its error is temporary, for so long after the first one. Raises its last error.

    ``pauses``: the longest pause after the first call, in seconds, which doubles up to the second number.
    """
    deadline = None
    pause, most = pauses
    while True:
        try:
            return call()
        except Exception as error:
            now = time.monotonic()
            deadline = now + patience_seconds if deadline is None else deadline
            if not is_temporary(error) or now >= deadline:
                raise
        time.sleep(random.uniform(0, pause))
        pause = min(pause * 2, most)


class Job:
    """One operation, the future that waits for it, and its result."""

    __slots__ = ("error", "future", "loop", "operation", "then", "value")

    def __init__(
        self,
        operation: Operation,
        future: asyncio.Future[Any] | None,
        then: Callable[[Any], None] | None = None,
    ) -> None:
        self.operation = operation
        #: Called with the result once it is stored, in the thread of the store.
        self.then = then
        self.future = future
        self.loop = None if future is None else future.get_loop()
        self.value: Any = None
        self.error: Exception | None = None

    def settle(self) -> None:
        # The future of a cancelled caller is done already; its operation was performed nevertheless.
        if self.future is not None and not self.future.done():
            if self.error is None:
                self.future.set_result(self.value)
            else:
                self.future.set_exception(self.error)


class Connection(Protocol):
    """The connection of a store. All its methods are called in the worker thread."""

    #: The store in messages: its path, or its address without the password.
    name: str

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> Callable[[], StoreError] | None:
        """Perform all operations, together where that is cheaper, and set the result of each job.

        The batch begins with one job; ``more()`` adds the jobs that were queued since, and returns True if
        there were any. Returns a function that creates the error, if nothing can be written.
        """

    def handle(self) -> object:
        """Return the object that a forked child must not collect: closing it would affect the parent."""

    def close(self) -> None: ...


class Worker:
    """Performs operations in a daemon thread, which does not keep the interpreter alive."""

    def __init__(self, connection: Connection, thread_name: str) -> None:
        self._connection = connection
        self._generation = _generation
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._batch: list[Job] = []
        self._stopping = False
        # Creates the error if nothing can be written. Each caller needs its own exception.
        self._ended: Callable[[], StoreError] | None = None
        self._thread = threading.Thread(target=self._work, name=thread_name, daemon=True)

    def start(self) -> None:
        """Start the thread; if that fails, every operation fails."""
        try:
            self._thread.start()
        except RuntimeError as error:
            message = f"cannot write to {self._connection.name}: {error}"
            self._end(lambda: permanent_error(message))

    def submit(self, operation: Operation) -> asyncio.Future[Any]:
        """Queue an operation. The future ends when it is stored, with its value or exception.

        Cancelling the future does not cancel the operation.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(Job(operation, future))
        return future

    def post(self, operation: Operation, then: Callable[[Any], None] | None = None) -> None:
        """Queue an operation without waiting for it. May be called from any thread.

        ``then``: called with its result once it is stored, in the thread of the store; it must neither wait
            nor raise.
        """
        self._put(Job(operation, None, then))

    def _put(self, job: Job) -> None:
        self._queue.put(job)
        if self._ended is not None:
            self._refuse_queued()  # The thread has ended, or is ending, and may not read the queue again.

    def stop(self) -> None:
        """End the thread after the queued operations. Does not wait."""
        if self._generation == _generation:
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the end of the thread. No-op in a forked child, and before the start."""
        if self._generation == _generation and self._thread.ident is not None:
            self._thread.join()

    # ------------------------------------------------------------------ in the thread

    def _work(self) -> None:
        connection = self._connection
        message = f"the store of {connection.name} is closed; create a new one"
        handle: object = None
        try:
            while not self._stopping:
                job = self._queue.get()
                if job is None:
                    break
                self._batch.append(job)
                del job  # The waiting thread must not keep a state alive.
                fatal_error = connection.apply(self._batch, self._take_queued)
                if fatal_error is not None:
                    self._stopping = True
                    self._end(fatal_error)
                self._acknowledge()
                # A forked child must not close the connection, since that would affect its parent (the locks
                # and the WAL of a file, the session of a server): in the child, this frame keeps its
                # reference for ever.
                handle = connection.handle()
        except BaseException as error:
            message = (
                f"the writer thread of {connection.name} died ({error!r}); create a new store, then resume"
            )
        del handle
        self._end(lambda: permanent_error(message))
        connection.close()

    def _take_queued(self) -> bool:
        before = len(self._batch)
        try:
            while len(self._batch) < _MAX_BATCH_SIZE and not self._stopping:
                job = self._queue.get_nowait()
                if job is None:
                    self._stopping = True
                else:
                    self._batch.append(job)
        except queue.Empty:
            pass
        return len(self._batch) > before

    def _acknowledge(self) -> None:
        waiting: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        for job in self._batch:
            if job.loop is not None:
                waiting.setdefault(job.loop, []).append(job)
            elif job.then is not None and job.error is None:
                job.then(job.value)
        self._batch = []
        for loop, jobs in waiting.items():
            try:
                # One wake-up for all jobs of a loop.
                loop.call_soon_threadsafe(_settle, jobs)
            except RuntimeError:
                pass  # The loop is closed.

    def _end(self, create_error: Callable[[], StoreError]) -> None:
        """Let all operations fail from now on: first the error is set, then the queue is emptied."""
        if self._ended is None:
            self._ended = create_error
        for job in self._batch:
            job.error = job.error or self._ended()
        self._acknowledge()
        self._refuse_queued()

    def _refuse_queued(self) -> None:
        assert self._ended is not None
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return
            if job is not None and job.loop is not None:
                job.error = self._ended()
                try:
                    job.loop.call_soon_threadsafe(job.settle)
                except RuntimeError:
                    pass


def _settle(jobs: list[Job]) -> None:
    for job in jobs:
        job.settle()
