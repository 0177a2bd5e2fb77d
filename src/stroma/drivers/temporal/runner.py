"""TemporalRunner: begins runs on a Temporal cluster, and waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Literal, cast

from pydantic import BaseModel
from temporalio.client import (
    Client,
    WorkflowQueryRejectedError,
)
from temporalio.service import RPCError, RPCStatusCode

from stroma.checkpoint import StoreError, Waiting
from stroma.checkpoint.payloads import BlobStore, blob_store
from stroma.contracts.contract import ContractRegistry
from stroma.drivers.remote.plans import KnownNodes, freeze
from stroma.drivers.remote.questions import answer_of, waiting_of
from stroma.drivers.remote.results import Reader, result_of
from stroma.drivers.remote.state import RunState
from stroma.drivers.remote.wire import (
    LARGE,
    SegmentReport,
    json_size,
    unfold,
)
from stroma.drivers.temporal import names
from stroma.drivers.temporal.cluster import OPEN, Cluster
from stroma.drivers.temporal.start import RunStarter, StartedRun, StartOptions, busy_error
from stroma.drivers.temporal.stream import TemporalStream
from stroma.engine.config import RunConfig
from stroma.runner.batch import Batch
from stroma.runner.pipeline import Pipeline, nodes_of
from stroma.runner.signals import match_answer
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["TemporalRunner"]


class TemporalRunner:
    """Starts runs on a Temporal cluster, with the interface of StromaRunner; workers run the nodes.

    ``config``: policies, timeouts, budgets, fallbacks and contract retries go with each run. Hooks, classifiers, limits,
    shared budgets and redact are the workers' own: pass those to :func:`stroma_worker`.

    ``payloads``: the store of states of 256 KiB and more, the same as the workers'. ``heartbeat_seconds``: a worker that
    is silent for this time is lost, and its attempts are started again elsewhere; heartbeats are sent at half of it, so no
    node may block its event loop for that long (use ``asyncio.to_thread`` for blocking work). ``attempt_seconds``: a
    longer attempt, whatever its own timeout, stops the run as PARTIAL. ``deliveries``: how many workers may be lost, or
    lack the node, before the run stops as PARTIAL; the second one is tried after ``redelivery_seconds``, later ones after
    growing waits. ``history_events``: a run with a longer history continues with a fresh one. ``task_seconds``: the time
    of a worker for one workflow task, replay included; a worker lost in a task is noticed after it. ``server_seconds``:
    how long calls wait for an unreachable server before they raise StoreError with its address.
    """

    def __init__(
        self,
        client: Client,
        task_queue: str,
        *,
        config: RunConfig | None = None,
        registry: ContractRegistry | None = None,
        payloads: BlobStore | str | None = None,
        heartbeat_seconds: float = 10.0,
        attempt_seconds: float = 86_400.0,
        deliveries: int = 10,
        redelivery_seconds: float = 1.0,
        history_events: int = 10_000,
        task_seconds: float = 10.0,
        server_seconds: float = 60.0,
    ) -> None:
        self.client = client
        self.task_queue = task_queue
        self.config = RunConfig() if config is None else config
        self.registry = ContractRegistry() if registry is None else registry
        self.payloads = blob_store(payloads)
        self._own_config = config
        settings = {
            "heartbeat_seconds": heartbeat_seconds,
            "attempt_seconds": attempt_seconds,
            "deliveries": deliveries,
            "redelivery_seconds": redelivery_seconds,
            "history_events": history_events,
        }
        self._cluster = Cluster(client, server_seconds)
        self._starter = RunStarter(
            self._cluster, task_queue, self.registry, self.payloads, settings, task_seconds
        )

    # ------------------------------------------------------------------ running

    async def run(
        self,
        node_sequence: Pipeline | Iterable[Any],
        initial_state: BaseModel,
        *,
        run_id: str | None = None,
        context: dict[str, Any] | None = None,
        resume: bool | None = None,
        if_exists: Literal["new", "restart", "resume", "return", "error"] | None = None,
        if_running: Literal["error", "attach"] | None = None,
        traceparent: str | None = None,
    ) -> ExecutionResult:
        """Run nodes one after the other on the workers of the task queue, and wait for the end.

        As :meth:`stroma.StromaRunner.run`. A caller that is cancelled does not end the run: ``cancel`` does, and
        ``if_running="attach"`` waits for it again. A suspended node returns a SUSPENDED result; the run continues by itself
        once :meth:`signal` has answered, and :meth:`resume` waits for it.

        Raises TypeError for anything that is not a node or cannot be sent, RunBusy, RunExists, PipelineChanged, StoreError
        for a state that is too large without ``payloads``, and for a server that was unreachable for ``server_seconds``.
        """
        options = StartOptions(run_id, context, resume, if_exists, if_running, traceparent)
        started = await self._begin(node_sequence, initial_state, options)
        return started if isinstance(started, ExecutionResult) else await started.result()

    async def _begin(
        self, node_sequence: Pipeline | Iterable[Any], initial: BaseModel, options: StartOptions
    ) -> StartedRun | ExecutionResult:
        config = self._config_of(node_sequence)
        return await self._starter.begin(self._known(node_sequence, config), config, initial, options)

    async def resume(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> ExecutionResult:
        """Resume a run that stopped, or wait for one that continues after an answer; from any process.

        A run that failed, stopped or was cancelled continues at its first position without a commit, under the policies
        and budgets of this runner. Raises CheckpointNotFound, PipelineChanged, RunBusy while it runs.
        """
        started = await self._resume_run(node_sequence, run_id)
        return await started.result()

    async def _resume_run(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> StartedRun:
        config = self._config_of(node_sequence)
        known = self._known(node_sequence, config)
        workflow = await self._cluster.describe_existing(run_id)
        handle = self._cluster.handle(run_id)
        if workflow.status in OPEN:
            parked = await self._cluster.suspended_report(handle)
            if parked is not None:
                started = await self._starter.wake(handle, known, config, parked)
            else:
                status = await self._cluster.query(handle, names.ROWS, 0)
                if not status["segment"]:
                    raise busy_error(run_id)
                started = StartedRun(self._starter, run_id, handle, known, config, int(status["segment"]))
        else:
            plan = freeze(known.pipeline, known.nodes, config, self.registry, run_id=run_id)
            started = await self._starter.resume(handle, plan, known, config, None)
        return started

    async def run_many(
        self,
        node_sequence: Pipeline | Iterable[Any],
        inputs: Iterable[BaseModel],
        *,
        max_concurrency: int = 100,
        run_ids: Callable[[int, BaseModel], str] | None = None,
        on_result: Callable[[int, ExecutionResult | Exception], None] | None = None,
        **options: Any,
    ) -> list[ExecutionResult | Exception]:
        """Call :meth:`run` for each input, at most ``max_concurrency`` at once; see :meth:`stroma.StromaRunner.run_many`."""
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        run = partial(self.run, nodes, **options)
        return await Batch().run_each(run, inputs, max_concurrency, run_ids, on_result)

    def stream(
        self, node_sequence: Pipeline | Iterable[Any], initial_state: BaseModel, **options: Any
    ) -> TemporalStream:
        """Return the events of :meth:`run` as an async iterator; see :class:`TemporalStream`. ``options`` are those of run()."""
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        return self._stream(nodes, lambda: self._begin(nodes, initial_state, StartOptions(**options)))

    def stream_resumed(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> TemporalStream:
        """Return the events of :meth:`resume` as an async iterator."""
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        return self._stream(nodes, lambda: self._resume_run(nodes, run_id))

    def follow(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> TemporalStream:
        """Return the events of an existing run as an async iterator, without changing the run.

        The last event has its result, or what it is waiting for. Raises CheckpointNotFound.
        """
        nodes = node_sequence if isinstance(node_sequence, Pipeline) else list(node_sequence)
        return self._stream(nodes, lambda: self._watch(nodes, run_id))

    async def _watch(self, nodes: Pipeline | list[Any], run_id: str) -> StartedRun | ExecutionResult:
        config = self._config_of(nodes)
        known = self._known(nodes, config)
        workflow = await self._cluster.describe_existing(run_id)
        handle = self._cluster.handle(run_id)
        if workflow.status in OPEN:
            return StartedRun(self._starter, run_id, handle, known, config, 0)
        return await self._starter.result(await self._cluster.final_report(handle), known, config)

    def _stream(
        self, nodes: Pipeline | list[Any], start: Callable[[], Awaitable[StartedRun | ExecutionResult]]
    ) -> TemporalStream:
        known = self._known(nodes, self._config_of(nodes))

        async def begin() -> tuple[str, Any]:
            started = await start()
            if isinstance(started, ExecutionResult):
                return started.run_id, asyncio.sleep(0, started)
            return started.run_id, started.result()

        async def look(run_id: str, since: int) -> list[TraceEvent]:
            try:
                reply = await self._cluster.query(self._cluster.handle(run_id), names.ROWS, since)
            except (RPCError, WorkflowQueryRejectedError, StoreError):
                return []  # No worker, for example: the next call tries again.
            reader = Reader(known, self.payloads, run_id, [])
            return [await reader.event(row) for row in reply["rows"]]

        return TemporalStream(begin, look)

    # ------------------------------------------------------------------ from any process

    async def cancel(self, run_id: str) -> bool:
        """Cancel a run; its nodes are cancelled within a heartbeat. Returns False if it had ended.

        Raises CheckpointNotFound.
        """
        workflow = await self._cluster.describe_existing(run_id)
        if workflow.status not in OPEN:
            return False
        try:
            await self._cluster.handle(run_id).cancel()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    async def pause(self, run_id: str) -> bool:
        """Raise NotImplementedError: a run on Temporal cannot be paused."""
        raise NotImplementedError(
            f"run {run_id!r} is on Temporal and cannot be paused; cancel it, or stop the workers of {self.task_queue!r}"
        )

    async def set_budget(self, run_id: str, **limits: float | None) -> bool:
        """Raise NotImplementedError: the budget of a run on Temporal goes with its start."""
        raise NotImplementedError(
            f"run {run_id!r} is on Temporal and keeps the budget that it was started with; cancel it, and resume it with another one"
        )

    async def signal(
        self,
        run_id: str,
        answer: Any,
        *,
        node_id: str | None = None,
        branch: str | None = None,
        schema: type[BaseModel] | None = None,
    ) -> None:
        """Send the answer that a suspended run is waiting for; it continues once all are answered.

        As :meth:`stroma.StromaRunner.signal`.
        """
        waiting = [one for one in await self.waiting(run_id) if one.payload is None]
        answered = match_answer(waiting, run_id, answer, node_id=node_id, branch=branch, schema=schema)
        assert answered.payload is not None
        size = json_size(answered.payload.decode())
        if size >= LARGE:
            raise StoreError(
                f"the answer must have fewer than {LARGE} bytes, got {size}; save large data in another store and answer with "
                "its name"
            )
        await self._cluster.handle(run_id).signal(names.ANSWER, answer_of(answered))

    async def waiting(self, run_id: str) -> list[Waiting]:
        """Return the requests of suspended nodes of a run, answered ones included. Raises CheckpointNotFound."""
        workflow = await self._cluster.describe_existing(run_id)
        if workflow.status not in OPEN:
            return []
        state = cast(
            "RunState",
            unfold((await self._cluster.query(self._cluster.handle(run_id), names.STATE))["state"]),
        )
        answers = state["answers"]
        return [
            waiting_of({**one, "payload": (answers[key]["payload"] or "") if key in answers else None})
            for key, one in state["waiting"].items()
        ]

    async def trace(self, node_sequence: Pipeline | Iterable[Any], run_id: str) -> ExecutionResult:
        """Return the current result of a run; its status is INTERRUPTED while it runs. Raises CheckpointNotFound."""
        config = self._config_of(node_sequence)
        workflow = await self._cluster.describe_existing(run_id)
        handle = self._cluster.handle(run_id)
        if workflow.status in OPEN:
            report = cast("SegmentReport", await self._cluster.query(handle, names.REPORT))
        else:  # A result that has ended needs no worker.
            report = await self._cluster.final_report(handle)
        if report["status"] == "RUNNING":
            report["status"] = RunStatus.INTERRUPTED.value
        return await result_of(report, self._known(node_sequence, config), self.payloads)

    # ------------------------------------------------------------------ starting

    def _config_of(self, nodes: Any) -> RunConfig:
        if isinstance(nodes, Pipeline) and nodes.config is not None and self._own_config is None:
            return nodes.config
        return self.config

    def _known(self, nodes: Any, config: RunConfig) -> KnownNodes:
        name = nodes.name if isinstance(nodes, Pipeline) else config.pipeline
        return KnownNodes(name, nodes_of(nodes), self.registry)
