"""The one thread that writes to a SQLite file.

Callers on any event loop hand it operations. It takes all that wait, gives each a savepoint, commits them together
and acknowledges them after the commit: one fsync serves everybody who came while the last one was under way.
"""

from __future__ import annotations

import asyncio
import copy
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from stroma.checkpoint._sqlite_file import DatabaseFile, is_fatal, lasting
from stroma.checkpoint.journal import StoreError

__all__ = ["Writer", "generation"]

T = TypeVar("T")

_MOST: Final = 1024  # operations in one transaction: nobody waits for the end of an endless stream

_generation = 0


def generation() -> int:
    """How many forks lie between this process and the first one. A thread of another generation is not here."""
    return _generation


def _after_fork() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


class _Job:
    """One operation, who waits for it, and what became of it."""

    __slots__ = ("error", "future", "loop", "operation", "value")

    def __init__(self, operation: Callable[[sqlite3.Connection], Any], future: asyncio.Future[Any]) -> None:
        self.operation = operation
        self.future = future
        self.loop = future.get_loop()
        self.value: Any = None
        self.error: Exception | None = None

    def settle(self) -> None:
        # A caller who was cancelled no longer waits; the operation was done all the same.
        if not self.future.done():
            if self.error is None:
                self.future.set_result(self.value)
            else:
                self.future.set_exception(self.error)


class Writer:
    """Runs operations on one connection, in a daemon thread: it never keeps the interpreter alive."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._generation = _generation
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._batch: list[_Job] = []
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._stopping = False
        # Why nothing more can be written. Each caller gets an exception of its own.
        self._ended: Callable[[], StoreError] | None = None
        self._thread = threading.Thread(target=self._work, name="stroma-sqlite", daemon=True)

    def start(self) -> None:
        """Start the thread; if that fails, every operation fails."""
        try:
            self._thread.start()
        except RuntimeError as error:
            why = f"cannot write to {self._file.path}: {error}"
            self._end(lambda: lasting(why))

    def submit(self, operation: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Have an operation done in a transaction. The future ends after its COMMIT, with its value or exception.

        Cancelling the future does not cancel the operation.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put(_Job(operation, future))
        if self._ended is not None:
            self._refuse_queued()  # The thread has ended, or ends now: nobody else may look at the queue again.
        return future

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
        path = self._file.path
        why = f"the store of {path} is closed; make a new SQLiteStore"
        held: object = None
        try:
            while not self._stopping:
                job = self._queue.get()
                if job is None:
                    break
                self._batch.append(job)
                del job  # A thread that waits keeps nobody's state alive.
                self._commit()
                self._acknowledge()
                # A forked child must not close the connection, since that would touch its parent's locks and WAL:
                # there this frame, and so its reference, stays for ever.
                held = self._db
        except BaseException as error:
            why = f"the writer thread of {path} died ({error!r}); make a new SQLiteStore, then resume"
        del held
        self._end(lambda: lasting(why))
        self._close()

    def _commit(self) -> None:
        """One transaction for all that wait. Whatever becomes of it stands in the jobs."""
        batch, file = self._batch, self._file
        try:
            db = self._connection()
            file.patiently(lambda: db.execute("BEGIN IMMEDIATE"))
            done = 0
            while done < len(batch) or self._take_waiting():
                self._apply(db, batch[done])
                done += 1
            file.patiently(lambda: db.execute("COMMIT"))
        except (sqlite3.Error, StoreError) as error:
            self._take_waiting()  # They would fail for the same reason, one after another.
            self._undo(error)
            for job in batch:
                if job.error is None:
                    told = self._explain(error)
                    job.error = copy.copy(told) if told is error else told  # Each task raises one of its own.

    def _take_waiting(self) -> bool:
        """Take what has been queued meanwhile into the batch; whether there was any."""
        before = len(self._batch)
        try:
            while len(self._batch) < _MOST and not self._stopping:
                job = self._queue.get_nowait()
                if job is None:
                    self._stopping = True
                else:
                    self._batch.append(job)
        except queue.Empty:
            pass
        return len(self._batch) > before

    def _apply(self, db: sqlite3.Connection, job: _Job) -> None:
        db.execute("SAVEPOINT one")
        try:
            job.value = job.operation(db)
        except Exception as error:
            if is_fatal(error) or not db.in_transaction:  # Some errors make SQLite roll back everything.
                raise
            db.execute("ROLLBACK TO one")
            job.error = self._explain(error)
        db.execute("RELEASE one")

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, StoreError):
            return error
        if isinstance(error, sqlite3.Error):
            told = self._file.explain(error)
        else:
            told = lasting(f"{self._file.path} cannot keep this: {type(error).__name__}: {error}")
        told.__cause__ = error
        return told

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and self._identity != self._file.identity():
            self._close()  # Deleted or replaced: what went into the old file would be lost.
        if self._db is None:
            self._db = self._file.open()
            self._identity = self._file.identity()
        return self._db

    def _undo(self, error: Exception) -> None:
        """After a transaction that failed: back to where the next one can begin."""
        db = self._db
        if db is None:
            return
        if is_fatal(error):
            self._stopping = True
            self._end(lambda: self._file.explain(error))
            return
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:
            self._close()  # The next operation opens the file anew.

    def _acknowledge(self) -> None:
        waiting: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        for job in self._batch:
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
            if job is not None:
                job.error = self._ended()
                try:
                    job.loop.call_soon_threadsafe(job.settle)
                except RuntimeError:
                    pass

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            try:
                db.close()
            except sqlite3.Error:
                pass  # What was acknowledged is in the WAL; the next one to open the file finds it.


def _settle(jobs: list[_Job]) -> None:
    for job in jobs:
        job.settle()
