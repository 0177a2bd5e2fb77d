"""A worker: continues the runs of some pipelines that are due, while its process lives."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from stroma._utils.logs import get_logger
from stroma._utils.text import one_line, pluralize
from stroma.checkpoint import CheckpointNotFound, PipelineChanged, StoreError
from stroma.checkpoint.decisions import ENDED
from stroma.checkpoint.entries import delay_after
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueFigures, QueueReading, RunLimits
from stroma.engine.context import Dispatch
from stroma.hooks.sets import AnyHooks, distinct, flatten
from stroma.runner.drive import Blocked, Busy, RunDriver
from stroma.runner.flows.suspension import now_ms
from stroma.runner.live_runs import Batch, LiveRuns
from stroma.runner.pipeline import Pipeline, check_bound
from stroma.runner.stored_runs import ServedPipeline, StoredRuns
from stroma.trace.result import ExecutionResult

logger = get_logger()

#: Seconds between two queries, which are cheap: one for each pipeline.
_READ_SECONDS: Final = 5.0

#: Called with a pipeline and the figures of its queue; with None when they are no longer known.
QueueReader = Callable[[str, QueueReading | None], None]


def readers_of(hooks: AnyHooks | None) -> list[QueueReader]:
    """Return what exporters among these hooks show the figures of a queue with."""
    readers: list[Any] = [getattr(one, "queue_reader", None) for one in distinct(flatten(hooks))]
    return [reader for reader in readers if reader is not None]


async def watch_queues(
    stored: StoredRuns,
    served: Mapping[str, ServedPipeline],
    readers: Mapping[str, Sequence[QueueReader]],
    note: Callable[[Sequence[QueueReading]], None] | None,
) -> None:
    """Read the figures of these queues every few seconds; return at once without a reader.

    ``note`` is called with the figures of all queues. While the store cannot be read, the last figures hold.
    """
    if note is None and not any(readers.values()):
        return
    try:
        while True:
            try:
                now = now_ms()
                code = {name: one.code for name, one in served.items()}
                read = stored.journal("queue_figures").queue_figures
                figures: dict[str, QueueFigures] = await asyncio.to_thread(read, code, now)
            except StoreError as error:
                logger.debug("the figures of the queue cannot be read: %s", error)
            else:
                readings = {name: _reading_of(one, now) for name, one in figures.items()}
                if note is not None:
                    note(list(readings.values()))
                for name, reading in readings.items():
                    for reader in readers.get(name, ()):
                        reader(name, reading)
            await asyncio.sleep(_READ_SECONDS)
    finally:
        for name in served:
            for reader in readers.get(name, ()):
                reader(name, None)


def _reading_of(figures: QueueFigures, now: int) -> QueueReading:
    def seconds_since(ms: int | None) -> float:
        return 0.0 if ms is None else max(0, now - ms) / 1000

    return QueueReading(
        figures.queued,
        seconds_since(figures.oldest_due_ms),
        figures.blocked,
        seconds_since(figures.oldest_blocked_ms),
    )


_CLAIM_SECONDS: Final = 30.0  # A run that was claimed and not opened is free for others after this time.
_MAX_POLL_DELAY_SECONDS: Final = 30.0  # while the store cannot be read

Outcome = ExecutionResult | Exception


class WorkerHealth:
    """Condition of a worker. May be read in any thread."""

    #: A store that cannot be read for so long makes the worker unhealthy.
    MAX_FAILING_SECONDS: Final = 60.0

    def __init__(self, *, reads_queue: bool = True) -> None:
        self.started = asyncio.Event()  # Set once the store has been read.
        self.active = 0  # Runs in progress.
        self.is_draining = False  # No further run is continued.
        self.reads_queue = reads_queue  # The worker reads the next three from the store, every few seconds.
        self.queued: int | None = None  # QUEUED runs of its pipelines; None: not read yet.
        self.oldest_due_seconds: float | None = (
            None  # For how long the oldest due run was due; 0 without one.
        )
        self.blocked: int | None = None  # Runs of its pipelines that are blocked.
        self.failing_since: float | None = None  # By time.monotonic(), while the store cannot be read.
        #: Unfinished runs at its start, by pipeline and by each version that it does not serve.
        self.unserved: dict[str, dict[str, int]] = {}

    def note_queue(self, figures: Sequence[QueueReading]) -> None:
        """Take over the figures of the queues."""
        self.queued, self.blocked = sum(one.queued for one in figures), sum(one.blocked for one in figures)
        self.oldest_due_seconds = max((one.due_seconds for one in figures), default=0.0)

    @property
    def is_ok(self) -> bool:
        """True while the worker takes up runs; not before, while it drains, and without its store."""
        failing = 0.0 if self.failing_since is None else time.monotonic() - self.failing_since
        is_failing = failing >= self.MAX_FAILING_SECONDS
        return self.started.is_set() and not self.is_draining and not is_failing


class RunWorker:
    """One call of ``serve``. ``readers``: what shows the figures of the queue of each pipeline."""

    def __init__(
        self,
        stored: StoredRuns,
        driver: RunDriver,
        batch: Batch,
        live: LiveRuns,
        health: WorkerHealth | None = None,
        readers: Mapping[str, Sequence[QueueReader]] | None = None,
    ) -> None:
        self._stored = stored
        self._driver = driver
        self._batch = batch  # A shutdown drains it.
        self._live = live
        self.health = health or WorkerHealth(reads_queue=False)
        self._readers = readers or {}
        self._max_concurrency, self._poll_seconds = 0, 0.0
        self._on_result: Callable[[str, Outcome], None] | None = None
        self._active: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, int] = {}  # How often each run could not be continued here in succession.
        self._failed_polls = 0
        self._token = os.urandom(8).hex()
        self._news = asyncio.Event()
        self._next_look_for_lost = 0.0  # For runs without an owner, by the clock of the event loop.
        # Not the shared generator: a program that seeds it would make all workers choose the same runs.
        self._random = random.Random()

    async def serve(
        self,
        pipelines: Sequence[Pipeline],
        max_concurrency: int,
        poll_seconds: float,
        on_result: Callable[[str, Outcome], None] | None,
    ) -> None:
        """Continue due runs until the batch is drained; see :meth:`StromaRunner.serve`."""
        check_bound(max_concurrency, optional=False)
        if not 0 < poll_seconds < float("inf"):
            raise ValueError(f"poll_seconds must be above 0, got {poll_seconds!r}")
        self._max_concurrency, self._poll_seconds, self._on_result = max_concurrency, poll_seconds, on_result
        if not pipelines:
            raise ValueError("serve() needs at least one flow or Pipeline")
        self._stored.journal("claim")
        served = self._stored.served(pipelines)
        loop = asyncio.get_running_loop()
        drained = asyncio.ensure_future(self._batch.drained.wait())
        listen = getattr(self._stored.store, "listen", None)  # Calls when another process has made a run due.
        listener = None if listen is None else listen(partial(_wake, loop, self._news))
        note = self.health.note_queue if self.health.reads_queue else None
        watching = asyncio.ensure_future(watch_queues(self._stored, served, self._readers, note))
        try:
            while not self._batch.draining:
                self._news.clear()
                has_more = await self._take_up(served)
                news = asyncio.ensure_future(self._news.wait())
                waits: set[asyncio.Future[Any]] = {drained, news}
                waits |= set(self._active.values()) if has_more else set()
                await asyncio.wait(
                    waits, timeout=self._next_poll_seconds(), return_when=asyncio.FIRST_COMPLETED
                )
                news.cancel()
            self.health.is_draining = True
            while self._active:
                await asyncio.wait(set(self._active.values()))
        finally:
            drained.cancel()
            if listener is not None:
                listener.close()
            watching.cancel()
            self._batch.drained.set()
            await self._live.interrupt(set(self._active.values()))
            await asyncio.wait([watching])  # A worker that has ended shows no figures.

    def _next_poll_seconds(self) -> float:
        """Return a random delay, so that workers that were started together do not ask together."""
        seconds = self._poll_seconds * 2.0 ** min(self._failed_polls, 10)
        if self._failed_polls:
            seconds = max(self._poll_seconds, min(seconds, _MAX_POLL_DELAY_SECONDS))
        return seconds * self._random.uniform(0.5, 1.5)

    async def _take_up(self, served: dict[str, ServedPipeline]) -> bool:
        """Claim due runs while there is room, and continue them.

        Return True if others may start when a run ends: they wait for room, or for a limit of their pipeline.
        """
        free = self._max_concurrency - len(self._active)
        if free <= 0:
            return True
        limits = {name: one.limits for name, one in served.items()}
        now = asyncio.get_running_loop().time()
        with_lost = now >= self._next_look_for_lost
        if with_lost:
            self._next_look_for_lost = now + self._poll_seconds / 2
        code = {name: one.code for name, one in served.items()}
        request = ClaimRequest(self._token, _CLAIM_SECONDS, free, now_ms(), limits, with_lost, code)
        try:
            if not self.health.started.is_set():
                await self._report_unserved(served)
            claimed: list[Candidate] = await self._stored.store.claim(request)
        except StoreError as error:
            if not (self.health.started.is_set() or error.transient):
                raise
            if self._failed_polls == 0:
                self.health.failing_since = time.monotonic()
                logger.warning("the store cannot be asked for due runs: %s; trying again", error)
            self._failed_polls += 1
            return False
        self.health.started.set()
        if self._failed_polls:
            self._failed_polls, self.health.failing_since = 0, None
            logger.info("the store can be asked for due runs again")
        for one in claimed:
            # The run may have become due again while the last call for it is about to end.
            before = self._active.get(one.run_id)
            task = asyncio.create_task(self._continue(served[one.pipeline], one, before))
            self._active[one.run_id] = task
            self.health.active = len(self._active)
            task.add_done_callback(partial(self._finish, one.run_id))
        return len(claimed) >= free or any(one != RunLimits() for one in limits.values())

    async def _report_unserved(self, served: dict[str, ServedPipeline]) -> None:
        """Log how many runs wait for code of another version. Raises StoreError."""
        for name, one in served.items():
            counts = self.health.unserved[name] = await self._stored.count_unserved(name, one.code.versions)
            for version, count in counts.items():
                runs = f"{pluralize(count, 'run')} {'waits' if count == 1 else 'wait'}"
                logger.warning("%s for %s version %s, which is not served here", runs, name, version)

    async def _continue(
        self, served: ServedPipeline, claimed: Candidate, before: asyncio.Task[None] | None
    ) -> None:
        outcome: Outcome
        run_id = claimed.run_id
        if before is not None:
            await asyncio.wait([before])
        try:
            dispatch = Dispatch(now_ms(), claim=self._token)
            driven = await self._driver.continue_run(run_id, served, dispatch)
            if driven is None or isinstance(driven, Busy):
                logger.debug("run %s is not continued here: %s", run_id, driven)
                if self._batch.draining:
                    await self._stored.store.postpone(run_id, self._token, None)
                return
            if isinstance(driven, Blocked):
                due = 0.0 if driven.until is None else driven.until.timestamp()
                seconds, reason = max(0.0, due - now_ms() / 1000), one_line(driven.reason)
                logger.warning("run %s is blocked: %s; trying again in %.0f s", run_id, reason, seconds)
                outcome = PipelineChanged(driven.reason)
            else:
                assert driven.result is not None
                self._failures.pop(run_id, None)
                outcome = driven.result
        except CheckpointNotFound as error:
            logger.debug("run %s is not continued here: %s", run_id, error)
            return
        except Exception as error:
            outcome = error
            await self._postpone(run_id, error)
        if self._on_result is not None:
            self._on_result(run_id, outcome)

    async def _postpone(self, run_id: str, error: Exception) -> None:
        """Give a run back that could not be continued, for a while that grows with each failure.

        The end of a run that was opened has done so: its claim ended then.
        """
        failures = self._failures[run_id] = self._failures.get(run_id, 0) + 1
        now, due_ms = now_ms(), None
        try:
            await self._stored.store.postpone(run_id, self._token, now + int(1000 * delay_after(failures)))
            record = await self._stored.get(run_id)
            if record.status in ENDED:  # Its end hook raised, say.
                del self._failures[run_id]
                logger.warning("run %s has ended, %s: %s", run_id, record.status, error)
                return
            due_ms = record.due_ms
        except StoreError as problem:  # The claim expires by itself.
            logger.debug("run %s could not be given back: %s", run_id, problem)
        when = "later" if due_ms is None else f"in {max(0, due_ms - now) / 1000:.0f} s"
        logger.warning("run %s could not be continued: %s; trying again %s", run_id, error, when)

    def _finish(self, run_id: str, task: asyncio.Task[None]) -> None:
        if self._active.get(run_id) is task:
            del self._active[run_id]
        self.health.active = len(self._active)
        if not task.cancelled() and task.exception() is not None:
            logger.error("continuing run %s failed", run_id, exc_info=task.exception())


def _wake(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(news.set)
    except RuntimeError:
        pass  # The loop is closed.
