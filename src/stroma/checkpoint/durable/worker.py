"""The thread that talks to a durable store.

Callers on any event loop hand it operations. It takes all that wait, has them done together and acknowledges them when
they are kept: one fsync or one round trip serves everybody who came while the last one was under way.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from stroma.checkpoint.errors import StoreError

__all__ = ["Connection", "Job", "Operation", "Worker", "generation", "permanent_error"]

T = TypeVar("T")

#: What is to be done, with whatever the connection hands it.
Operation = Callable[[Any], Any]

_MAX_BATCH_SIZE: Final = 1024  # operations at once: nobody waits for the end of an endless stream

_generation = 0


def generation() -> int:
    """Return the number of forks between this process and the first one. Threads of other generations do not exist here."""
    return _generation


def _after_fork() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


def permanent_error(message: str) -> StoreError:
    """A StoreError that trying again will not mend."""
    error = StoreError(message)
    error.transient = False
    return error


class Job:
    """One operation, who waits for it, and what became of it."""

    __slots__ = ("error", "future", "loop", "operation", "value")

    def __init__(self, operation: Operation, future: asyncio.Future[Any] | None) -> None:
        self.operation = operation
        self.future = future
        self.loop = None if future is None else future.get_loop()
        self.value: Any = None
        self.error: Exception | None = None

    def settle(self) -> None:
        # A caller who was cancelled no longer waits; the operation was done all the same.
        if self.future is not None and not self.future.done():
            if self.error is None:
                self.future.set_result(self.value)
            else:
                self.future.set_exception(self.error)


class Connection(Protocol):
    """A store as its thread sees it. Everything here is called in that thread."""

    #: What messages call the store: its path, or its address without the password.
    name: str

    def apply(self, batch: list[Job], more: Callable[[], bool]) -> Callable[[], StoreError] | None:
        """Do all operations, together where that is cheaper, and note in each job what became of it.

        The batch is given with one job in it; ``more()`` takes what has come meanwhile into it, and says whether there
        was any. Returns what makes the
        reason why nothing can be written any more, if that is so.
        """

    def handle(self) -> object:
        """Object that must not be garbage-collected in a forked child, where closing it would harm the parent's connection."""

    def close(self) -> None: ...


class Worker:
    """Has operations done in a daemon thread: it never keeps the interpreter alive."""

    def __init__(self, connection: Connection, thread_name: str) -> None:
        self._connection = connection
        self._generation = _generation
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._batch: list[Job] = []
        self._stopping = False
        # Why nothing more can be written. Each caller gets an exception of its own.
        self._ended: Callable[[], StoreError] | None = None
        self._thread = threading.Thread(target=self._work, name=thread_name, daemon=True)

    def start(self) -> None:
        """Start the thread; if that fails, every operation fails."""
        try:
            self._thread.start()
        except RuntimeError as error:
            why = f"cannot write to {self._connection.name}: {error}"
            self._end(lambda: permanent_error(why))

    def submit(self, operation: Operation) -> asyncio.Future[Any]:
        """Have an operation done. The future ends when it is kept, with its value or exception.

        Cancelling the future does not cancel the operation.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(Job(operation, future))
        return future

    def post(self, operation: Operation) -> None:
        """Have an operation done that nobody waits for. From any thread."""
        self._put(Job(operation, None))

    def _put(self, job: Job) -> None:
        self._queue.put(job)
        if self._ended is not None:
            self._refuse_queued()  # The thread has ended, or ends now: nobody else may look at the queue again.

    def stop(self) -> None:
        """Let the thread end after what is queued. Does not wait."""
        if self._generation == _generation:
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the thread's end; no-op in a forked child, and before the start."""
        if self._generation == _generation and self._thread.ident is not None:
            self._thread.join()

    # ------------------------------------------------------------------ in the thread

    def _work(self) -> None:
        connection = self._connection
        why = f"the store of {connection.name} is closed; make a new one"
        held: object = None
        try:
            while not self._stopping:
                job = self._queue.get()
                if job is None:
                    break
                self._batch.append(job)
                del job  # A thread that waits keeps nobody's state alive.
                poisoned = connection.apply(self._batch, self._take_waiting)
                if poisoned is not None:
                    self._stopping = True
                    self._end(poisoned)
                self._acknowledge()
                # A forked child must not close the connection, since that would touch its parent's (the locks and the
                # WAL of a file, a server's session): there this frame, and so its reference, stays for ever.
                held = connection.handle()
        except BaseException as error:
            why = f"the writer thread of {connection.name} died ({error!r}); make a new store, then resume"
        del held
        self._end(lambda: permanent_error(why))
        connection.close()

    def _take_waiting(self) -> bool:
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
        self._batch = []
        for loop, jobs in waiting.items():
            try:
                # One wake-up for all of a loop.
                loop.call_soon_threadsafe(_settle, jobs)
            except RuntimeError:
                pass  # The loop was closed: nobody waits there any more.

    def _end(self, why: Callable[[], StoreError]) -> None:
        """From now on every operation fails: first the reason, then the queue, so that none slips through."""
        if self._ended is None:
            self._ended = why
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
