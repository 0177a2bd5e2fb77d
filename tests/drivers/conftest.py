"""The ways to run a pipeline for the suite of behaviour: all of them are one engine on a store."""

import asyncio
import contextlib
import pathlib
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.client import Client, WorkflowExecutionStatus
from tests.kit import NEVER
from tests.servers_temporal import TemporalServer
from tests.shared_stores import opened, place, store_of

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


class Cluster:
    """A task queue of a server, and a store."""

    def __init__(self, client: Client, store: Any) -> None:
        self.client, self.store = client, store
        self.queue = f"q-{uuid.uuid4().hex}"
        self.runner = TemporalRunner(client, self.queue, store)
        #: A runner that knows nothing of Temporal.
        self.local = StromaRunner.quick(store=store)

    def worker(self, *pipelines: Any, **options: Any) -> Any:
        config = RunConfig(policy_map=NEVER, lease_seconds=0.9)
        return stroma_worker(self.client, self.queue, pipelines, store=self.store, config=config, **options)

    async def until(self, is_so: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not is_so():
                await asyncio.sleep(0.02)

    async def until_status(self, run_id: str, status: str) -> None:
        await self.until(lambda: (run := self.store.get_run(run_id)) and run.status == status)

    async def workflow_status(self, run_id: str) -> WorkflowExecutionStatus | None:
        return (await self.client.get_workflow_handle(run_id).describe()).status


@pytest.fixture
def store() -> Iterator[Any]:
    with store_of("postgres") as store:
        yield store


@pytest.fixture
async def cluster(temporal_server: TemporalServer, store: Any) -> Cluster:
    return Cluster(await Client.connect(temporal_server.address), store)


def fresh_id() -> str:
    return f"run-{uuid.uuid4().hex}"


class Fleet:
    """Worker processes on one task queue and one store, and the diary of their calls."""

    client: Client

    def __init__(self, server: TemporalServer, where: str, folder: pathlib.Path) -> None:
        self.server, self.where = server, where
        self.diary = folder / "diary"
        self.queue, self.run_id = f"q-{uuid.uuid4().hex}", f"run-{uuid.uuid4().hex}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *job: str) -> subprocess.Popen[bytes]:
        """Start a worker; it is ready when this returns. ``job``: see worker_helper."""
        words = [self.server.address, self.queue, self.where, str(self.diary), *job]
        command = [sys.executable, "-m", "tests.drivers.worker_helper", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2])
        self.processes.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    def lines(self, what: str) -> list[tuple[int, int]]:
        """Return the node and the process of each call, or of each end of a call."""
        if not self.diary.exists():
            return []
        rows = [line.split() for line in self.diary.read_text().splitlines()]
        return [(int(node), int(pid)) for kind, node, pid in rows if kind == what]

    async def until(self, is_so: Callable[[], Any]) -> None:
        async with asyncio.timeout(90):
            while not is_so():
                await asyncio.sleep(0.02)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def fleet_of(
    server: TemporalServer, tmp_path: pathlib.Path
) -> AsyncIterator[tuple[Fleet, TemporalRunner, Any]]:
    with place("postgres") as where, opened("postgres", where) as store:
        fleet = Fleet(server, where, tmp_path)
        fleet.client = await Client.connect(server.address)
        runner = TemporalRunner(fleet.client, fleet.queue, store)
        try:
            yield fleet, runner, store
        finally:
            fleet.end()
