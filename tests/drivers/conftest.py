"""The ways to run a pipeline that the suite of behaviour is run over: all of them are one engine on a store."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.client import Client
from tests.servers_temporal import TemporalServer
from tests.shared_stores import store_of

from stroma import CheckpointManager, ContractRegistry, Pipeline, RunConfig, StromaRunner
from stroma.temporal import TemporalRunner, stroma_worker
from stroma.trace import ExecutionResult

#: The suite of behaviour, embedded and over each way to distribute runs.
WAYS = ("embedded", "workers-sqlite", "workers-redis", "workers-postgres", "temporal")


@dataclass
class Bound:
    """A way to run one pipeline.

    Attributes:
        control: signals, pauses, cancels and changes budgets.
    """

    pipeline: Pipeline
    control: Any
    store: Any

    async def run(self, state: BaseModel, run_id: str | None = None) -> ExecutionResult:
        """Run it until it ends or is suspended."""
        raise NotImplementedError

    async def go_on(self, run_id: str) -> ExecutionResult:
        """Wait until a run that was answered or released ends, or is suspended again."""
        raise NotImplementedError


class Embedded(Bound):
    async def run(self, state: BaseModel, run_id: str | None = None) -> ExecutionResult:
        result: ExecutionResult = await self.control.run(self.pipeline, state, run_id=run_id)
        return result

    async def go_on(self, run_id: str) -> ExecutionResult:
        result: ExecutionResult = await self.control.resume(self.pipeline, run_id)
        return result


class Dispatched(Bound):
    async def run(self, state: BaseModel, run_id: str | None = None) -> ExecutionResult:
        handle = await self.control.submit(self.pipeline, state, run_id=run_id)
        result: ExecutionResult = await asyncio.wait_for(handle.until_stopped(), 60)
        return result

    async def go_on(self, run_id: str) -> ExecutionResult:
        handle = self.control.handle(run_id, self.pipeline)
        result: ExecutionResult = await asyncio.wait_for(handle.until_stopped(), 60)
        return result


@dataclass
class Way:
    """Binds pipelines to one way of running them."""

    name: str
    store: Any
    server: TemporalServer | None = None
    queue: str = field(default_factory=lambda: f"q-{uuid.uuid4().hex}")

    @property
    def run_id(self) -> str:
        """A run id for this test alone: a server outlives its tests."""
        return f"run-{self.queue}"

    @contextlib.asynccontextmanager
    async def bind(self, pipeline: Any, **config: Any) -> AsyncIterator[Bound]:
        if not isinstance(pipeline, Pipeline):
            pipeline = Pipeline("pipe", pipeline)
        settings = RunConfig(**config)
        manager = CheckpointManager(self.store)
        runner = StromaRunner(ContractRegistry(), manager, settings)
        if self.name == "embedded":
            yield Embedded(pipeline, runner, self.store)
        elif self.server is None:
            serving = asyncio.ensure_future(runner.serve(pipeline, poll_seconds=0.02))
            try:
                yield Dispatched(pipeline, StromaRunner(ContractRegistry(), manager), self.store)
            finally:
                await runner.shutdown()
                await serving
        else:
            client = await Client.connect(self.server.address)
            worker = stroma_worker(client, self.queue, [pipeline], store=self.store, config=settings)
            async with worker:
                control = TemporalRunner(client, self.queue, self.store)
                yield Dispatched(pipeline, control, self.store)


@contextlib.contextmanager
def embedded() -> Iterator[Way]:
    """Return the way to run pipelines in this process, on a store of its own."""
    with store_of("sqlite") as store:
        yield Way("embedded", store)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """Each way to run pipelines, on an empty store."""
    name = request.param
    kind = {"embedded": "sqlite", "temporal": "postgres"}.get(name, name.removeprefix("workers-"))
    server = request.getfixturevalue("temporal_server") if name == "temporal" else None
    with store_of(kind) as store:
        yield Way(name, store, server)
