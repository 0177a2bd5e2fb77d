"""The drivers that the suite of behaviour is run over."""

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
from temporalio.service import RPCError
from tests.drivers.seam import SeamDriver
from tests.servers_temporal import TemporalServer

from stroma import AsyncInMemoryStore, CheckpointManager, ContractRegistry, Pipeline, RunConfig, StromaRunner
from stroma.temporal import TemporalRunner, stroma_worker
from stroma.trace import ExecutionResult


@dataclass
class Bound:
    """A runner of either kind, bound to one pipeline."""

    runner: Any
    pipeline: Pipeline
    driver: str

    async def run(self, state: BaseModel, **options: Any) -> ExecutionResult:
        result: ExecutionResult = await asyncio.wait_for(
            self.runner.run(self.pipeline, state, **options), 100
        )
        return result

    async def go_on(self, state: BaseModel, run_id: str) -> ExecutionResult:
        """Go on with a run: where it begins with a group, the local runner wants to know what its input is."""
        options = {"input_schema": type(state)} if self.driver == "local" else {}
        result: ExecutionResult = await asyncio.wait_for(
            self.runner.resume(self.pipeline, run_id, **options), 100
        )
        return result


class LocalDriver:
    name = "local"

    def __init__(self) -> None:
        self.store = AsyncInMemoryStore()

    @contextlib.asynccontextmanager
    async def bind(self, nodes: list[Any], **config: Any) -> AsyncIterator[Bound]:
        runner = StromaRunner(ContractRegistry(), CheckpointManager(self.store), RunConfig(**config))
        yield Bound(runner, Pipeline("pipe", nodes), self.name)


@dataclass
class TemporalDriver:
    client: Client
    name: str = "temporal"
    options: dict[str, Any] = field(default_factory=dict)
    #: Beats are frequent, so that cancellations arrive soon; on a slow machine a worker is not lost for that.
    worker_options: dict[str, Any] = field(default_factory=lambda: {"beat_seconds": 0.2})
    queue: str = field(default_factory=lambda: f"q-{uuid.uuid4().hex}")

    @contextlib.asynccontextmanager
    async def bind(self, nodes: list[Any], **config: Any) -> AsyncIterator[Bound]:
        pipeline = Pipeline("pipe", nodes)
        settings = RunConfig(**config)
        worker = stroma_worker(self.client, self.queue, [pipeline], config=settings, **self.worker_options)
        async with worker:
            yield Bound(self.runner(settings), pipeline, self.name)

    def runner(self, config: RunConfig | None = None) -> TemporalRunner:
        options = {"heartbeat_seconds": 30.0, "deliveries": 2, "redelivery_seconds": 0.1, **self.options}
        return TemporalRunner(self.client, self.queue, config=config, **options)


@pytest.fixture(scope="session")
def temporal_server() -> Iterator[TemporalServer]:
    server = TemporalServer()
    yield server
    server.kill()


async def connect(server: TemporalServer, **options: Any) -> Client:
    """A client of a server that may not be quite ready."""
    for _ in range(200):
        try:
            client = await Client.connect(server.address, **options)
            await client.service_client.check_health()
            await client.count_workflows()
            return client
        except (RPCError, RuntimeError):
            await asyncio.sleep(0.1)
    raise TimeoutError(server.address)


@pytest.fixture
async def temporal(temporal_server: TemporalServer) -> TemporalDriver:
    return TemporalDriver(await connect(temporal_server))


@pytest.fixture(params=["local", "temporal", "temporal-uncached"])
async def driver(request: pytest.FixtureRequest) -> Any:
    return await prepared_driver(request)


@pytest.fixture(params=["local", "seam", "temporal", "temporal-uncached"])
async def any_driver(request: pytest.FixtureRequest) -> Any:
    """Those that can only run, too."""
    return await prepared_driver(request)


async def prepared_driver(request: pytest.FixtureRequest) -> Any:
    if request.param == "local":
        return LocalDriver()
    if request.param == "seam":
        return SeamDriver()
    server: TemporalServer = request.getfixturevalue("temporal_server")
    driver = TemporalDriver(await connect(server))
    if request.param == "temporal-uncached":
        # Every workflow task replays the whole history: what is not the same in a replay is found.
        driver.worker_options["max_cached_workflows"] = 0
    return driver
