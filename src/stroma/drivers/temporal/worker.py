"""Workers that drive runs for Temporal."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, Final

from temporalio import activity
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.client import Client
from temporalio.plugin import SimplePlugin
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker, WorkerConfig

from stroma._utils.logs import get_logger
from stroma.checkpoint import CheckpointNotFound, StoreError, open_store
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.queue import MAX_CLAIM_SECONDS, ClaimRequest, RunLimits
from stroma.contracts.contract import ContractRegistry
from stroma.drivers.temporal.place import CallActivity, TemporalCaller, heartbeats
from stroma.drivers.temporal.workflow import (
    DRIVE,
    LEASES,
    PIPELINE_KEY,
    STATUS_KEY,
    Answer,
    Dispatcher,
    StromaRun,
)
from stroma.engine.config import RunConfig
from stroma.failures.errors import PlaceError
from stroma.runner.drive import Blocked, DriveOutcome, Ended
from stroma.runner.pipeline import Pipeline, nodes_of, require_runnable
from stroma.runner.runner import StromaRunner
from stroma.runner.worker import readers_of, watch_queues

logger = get_logger()

#: Statuses of runs that have not ended, by the outcome of ``drive``.
_STATUS: Final = {"suspended": "SUSPENDED", "busy": "RUNNING", "blocked": "BLOCKED", "yielded": "INTERRUPTED"}
#: Between looks for due runs that may have no workflow, and for how long a run must have been due.
REPAIR_SECONDS: float = 30.0
MIN_AGE_SECONDS: float = 5.0
_PAGE: Final = 1000  # runs of one claim
#: The answer to a heartbeat tells of a cancellation.
_HEARTBEATS: Final[WorkerConfig] = {"max_heartbeat_throttle_interval": timedelta(seconds=1)}


def shared_store(store: Any) -> AsyncStates:
    """Return a store, or open one. Raises StoreError if processes cannot share it, ValueError for a URL."""
    opened = open_store(store) if isinstance(store, (str, os.PathLike)) else store
    if not isinstance(opened, AsyncStates):
        raise StoreError(
            f"{type(opened).__name__} cannot be shared by processes; use PostgresStore or RedisStore"
        )
    return opened


class StromaPlugin(SimplePlugin):
    """Lets a worker drive runs of Stroma beside its other work. For one task queue and one worker.

    ``client`` and ``task_queue`` are those of the worker. The other arguments, and what is raised, are those
    of :func:`stroma_worker`.
    """

    def __init__(
        self,
        client: Client,
        task_queue: str,
        pipelines: Sequence[Pipeline],
        *,
        store: Any,
        config: RunConfig | None = None,
        max_seconds: float = 900.0,
    ) -> None:
        self._store = shared_store(store)
        self._owns_store = self._store is not store
        self._dispatcher = Dispatcher(client, task_queue)
        self._runner = StromaRunner(ContractRegistry(), CheckpointManager(self._store), config)
        self._runner._caller = caller = TemporalCaller(client, task_queue)
        self._served = self._runner._stored.served(pipelines)
        self._configs = {name: self._runner._config_of(one.nodes) for name, one in self._served.items()}
        for one in self._served.values():
            require_runnable(nodes_of(one.nodes), self._runner.registry, caller)
        for name in (name for name, one in self._served.items() if any(one.limits)):
            fix = "do not apply on Temporal; use its task queues"
            logger.warning("max_runs and max_runs_per_key of pipeline %r %s", name, fix)
        LEASES.update({(task_queue, name): one.lease_seconds for name, one in self._configs.items()})
        self._pipelines, self._max_seconds = list(pipelines), max_seconds
        super().__init__("stroma", activities=[self.drive], workflows=[StromaRun], run_context=self._serve)

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add what a worker needs, with frequent heartbeats."""
        return {**super().configure_worker(config), **_HEARTBEATS}

    @activity.defn(name=DRIVE)
    async def drive(self, run_id: str, pipeline: str, cancels: bool = False) -> Answer:
        """Continue a run as far as possible, or cancel it first. Every outcome of ``drive`` is an answer."""
        try:
            if cancels:
                await self._runner.cancel(run_id)
            with self._beating(run_id):
                outcome = await self._drive(run_id)
        except CheckpointNotFound as error:
            logger.warning("the workflow of a run that was deleted ends: %s", error)
            return {"outcome": "ended", "status": "DELETED"}
        if isinstance(outcome, Blocked):
            logger.warning("run %r of %r is blocked: %s", run_id, pipeline, outcome.reason)
        return _to_answer(outcome)

    async def _drive(self, run_id: str) -> DriveOutcome:
        driving = asyncio.ensure_future(
            self._runner.drive(run_id, pipelines=self._pipelines, max_seconds=self._max_seconds)
        )
        reactions = [asyncio.ensure_future(self._leave(run_id))]
        try:
            while not driving.done():
                try:
                    await asyncio.wait([driving])
                except asyncio.CancelledError:
                    reactions.append(asyncio.ensure_future(self._react(run_id)))
            details = activity.cancellation_details()
            if details is not None and (details.paused or details.reset) and driving.exception() is None:
                raise asyncio.CancelledError  # The server starts another attempt in its time.
            return driving.result()
        finally:
            for reaction in reactions:
                reaction.cancel()

    async def _leave(self, run_id: str) -> None:
        await activity.wait_for_worker_shutdown()
        logger.info("run %r ends at its next step boundary: its worker is shut down", run_id)
        await self._runner.shutdown(drain_seconds=math.inf)

    async def _react(self, run_id: str) -> None:
        """React to a cancellation of the activity. ``drive`` then returns."""
        details = activity.cancellation_details()
        if details is not None and details.cancel_requested:
            await self._runner.cancel(run_id)
        elif details is not None and details.worker_shutdown:
            await self._runner.shutdown(drain_seconds=0.0)  # The graceful time is over.
        else:
            # Paid steps in flight are committed.
            why = "its workflow was terminated or reset, or it was late"
            logger.warning("run %r ends at its next step boundary: %s", run_id, why)
            self._runner._live.drain(run_id)

    @contextmanager
    def _beating(self, run_id: str) -> Iterator[None]:
        """Send a heartbeat after each renewal of the lease of a run, in the thread that renews leases."""
        listeners = self._runner._stored.store.lease_listeners
        with heartbeats() as beat:

            def on_renewal(renewed: str) -> None:
                if renewed == run_id:
                    beat({"status": "RUNNING", **self._runner._live.progress(run_id)})

            listeners.append(on_renewal)
            try:
                yield
            finally:
                listeners.remove(on_renewal)

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[None]:
        readers = {name: readers_of(config.hooks) for name, config in self._configs.items()}
        tasks = [
            asyncio.ensure_future(self._repair()),
            asyncio.ensure_future(watch_queues(self._runner._stored, self._served, readers, None)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._runner.aclose()
            if self._owns_store:
                await self._store.aclose()

    async def _repair(self) -> None:
        """Start workflows of due runs without an owner, which may have been submitted or resumed elsewhere.

        A claim is only a mark that keeps the run from the next looks of all workers for a while.
        """
        token, store = os.urandom(8).hex(), self._runner._stored.store
        pipelines = dict.fromkeys(self._served, RunLimits())
        code = {name: one.code for name, one in self._served.items()}
        while True:
            try:
                now_ms = int((time.time() - MIN_AGE_SECONDS) * 1000)
                request = ClaimRequest(token, MAX_CLAIM_SECONDS, _PAGE, now_ms, pipelines, code=code)
                while due := await store.claim(request):
                    for run in due:
                        await self._dispatcher.start(run)
            except Exception as error:  # A later look may succeed.
                logger.warning("runs without a workflow could not be started: %s; trying again", error)
            await asyncio.sleep(REPAIR_SECONDS)


def _to_answer(outcome: DriveOutcome) -> Answer:
    name: Any = type(outcome).__name__.lower()
    if isinstance(outcome, Ended):
        return {"outcome": name, "status": str(outcome.status)}
    until = getattr(outcome, "until", None)
    until_ms = None if until is None else int(until.timestamp() * 1000)
    return {"outcome": name, "status": _STATUS[name], "until_ms": until_ms}


def stroma_worker(
    client: Client,
    task_queue: str,
    pipelines: Sequence[Pipeline],
    *,
    store: Any = None,
    place: str | None = None,
    config: RunConfig | None = None,
    max_concurrency: int = 100,
    max_seconds: float = 900.0,
    drain_seconds: float = 30.0,
) -> Worker:
    """Create a worker that drives runs of flows and pipelines; then ``await worker.run()``.

    Args:
        task_queue: the task queue that drives the runs, also for a worker of a place.
        store: the store of the runs, or its URL: Postgres, Redis, or a SQLite file for workers on one
            machine.
        place: drive no runs, but call the nodes that have this place, which is a task queue too; without a
            store. Experimental.
        config: configuration of all runs; by default each pipeline's own.
        max_concurrency: maximum number of runs, or of calls, at once.
        max_seconds: after this time a run goes to the next free worker, at a step boundary.
        drain_seconds: time of the steps in flight once the worker is shut down; then they are cancelled.

    Raises ValueError for two pipelines of one name and for a place that is the task queue, TypeError for
    anything but flows and Pipelines, StoreError for a store that processes cannot share.
    """
    if place == task_queue:
        why = "is the task queue that drives runs: a run would wait for itself"
        raise PlaceError(f"place {place!r} {why}; pass another place or task_queue")
    settings: dict[str, Any] = {
        "max_concurrent_activities": max_concurrency,
        "graceful_shutdown_timeout": timedelta(seconds=drain_seconds),
    }
    if place is not None:
        settings |= {"activities": [CallActivity(place, pipelines, config).call], **_HEARTBEATS}
        return Worker(client, task_queue=place, **settings)
    plugin = StromaPlugin(client, task_queue, pipelines, store=store, config=config, max_seconds=max_seconds)
    # After the loss of a worker its workflows are taken over after this time; the default is 10 s.
    settings["sticky_queue_schedule_to_start_timeout"] = timedelta(seconds=1)
    return Worker(client, task_queue=task_queue, plugins=[plugin], **settings)


async def register_search_attributes(client: Client) -> None:
    """Create the search attributes ``StromaPipeline`` and ``StromaStatus`` on the server, once, as its admin.

    Runs get them where they are registered, and go without where they are not.
    """
    keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    wanted = {PIPELINE_KEY.name: keyword, STATUS_KEY.name: keyword}
    try:
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=client.namespace, search_attributes=wanted)
        )
    except RPCError as error:
        if error.status != RPCStatusCode.ALREADY_EXISTS:
            raise
