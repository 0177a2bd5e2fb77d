"""Temporal as the dispatcher of runs: starts, wakes, ends, and everything that may be lost on the way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError
from tests.drivers.conftest import Cluster, fresh_id
from tests.flows.steps import World
from tests.kit import NEVER, Num, Text, failing_with, node
from tests.servers_temporal import TemporalServer

from stroma import Flow, NodeHooks, Pipeline, RunConfig, RunExists, RunStatus, StoreError, stroma_flow
from stroma.drivers.temporal import worker as worker_module
from stroma.drivers.temporal import workflow as workflow_module
from stroma.temporal import StromaPlugin, TemporalRunner, register_search_attributes, stroma_worker

pytestmark = pytest.mark.slow


@asynccontextmanager
async def gated() -> AsyncIterator[tuple[Pipeline, World, asyncio.Event, asyncio.Event]]:
    """Yield a pipeline of three nodes, whose second one says that it was reached, and waits for its gate."""
    world, reached, opened = World(), asyncio.Event(), asyncio.Event()

    async def wait(state: Num) -> Num:
        world.calls.append(f"b {state.n}")
        reached.set()
        await opened.wait()
        return Num(n=state.n + 1)

    yield Pipeline("gated", [world.step("a"), node("b", wait), world.step("c")]), world, reached, opened
    opened.set()


@stroma_flow("asks", input=Num, output=Text)
async def asks(flow: Flow, state: Num) -> Text:
    return await flow.wait_for(Text, reason="Well?")


async def test_a_run_is_submitted_once(cluster: Cluster) -> None:
    """Submitting a run again gives its handle, whatever its status; another input raises RunExists."""
    world, run_id = World(), fresh_id()
    pipeline = Pipeline("p", [world.step("a")])
    handle = await cluster.runner.submit(pipeline, Num(n=1), run_id=run_id)
    assert await handle.status() == "QUEUED"
    await cluster.runner.submit(pipeline, Num(n=1), run_id=run_id)
    async with cluster.worker(pipeline):
        result = await handle.result(timeout=60)
        again = await cluster.runner.run(pipeline, Num(n=1), run_id=run_id)
    assert (result.status, again.status, again.output) == (RunStatus.COMPLETED, RunStatus.COMPLETED, Num(n=2))
    assert world.calls == ["a 1"]
    with pytest.raises(RunExists):
        await cluster.runner.submit(pipeline, Num(n=5), run_id=run_id)


async def test_run_returns_at_a_question(cluster: Cluster) -> None:
    """run() returns a suspended run with its question; an answer continues the run at once."""
    run_id = fresh_id()
    async with cluster.worker(asks):
        result = await cluster.runner.run(asks, Num(), run_id=run_id)
        assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["Well?"])
        since = time.monotonic()
        await cluster.runner.signal(run_id, Text(text="yes"))
        result = await cluster.runner.handle(run_id, asks).result(timeout=60)
    assert (result.status, result.output) == (RunStatus.RESUMED, Text(text="yes"))
    assert time.monotonic() - since < 30  # Before the re-check.


async def test_a_message_continues_a_run(cluster: Cluster) -> None:
    """A message continues a suspended run at once, from the runner and from a handle of it."""
    run_id = fresh_id()

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        return Text(text=f"{(await flow.receive(Text)).text} {(await flow.receive(Text)).text}")

    async with cluster.worker(f):
        result = await cluster.runner.run(f, Num(), run_id=run_id)
        assert result.suspended == ["waiting for a message"]
        since = time.monotonic()
        await cluster.runner.send(run_id, Text(text="a"))
        handle = cluster.runner.handle(run_id, f)
        while (await handle.until_stopped()).status is not RunStatus.SUSPENDED:
            await asyncio.sleep(0.01)
        await handle.send({"text": "b"})
        result = await handle.result(timeout=60)
    assert (result.status, result.output) == (RunStatus.RESUMED, Text(text="a b"))
    assert time.monotonic() - since < 30  # Before the re-check.


async def test_only_ids_cross(cluster: Cluster) -> None:
    """States, outputs and error texts are in the store alone: the workflow's history has ids and statuses."""
    run_id = fresh_id()

    pipeline = Pipeline("p", [node("a", failing_with(ValueError, "SECRET"), Text, Text)])
    async with cluster.worker(pipeline):
        result = await cluster.runner.run(pipeline, Text(text="SECRET"), run_id=run_id)
        assert result.status is RunStatus.PARTIAL
        handle = cluster.client.get_workflow_handle(run_id)
        assert await handle.result() == "PARTIAL"
    assert "U0VDUkVU" not in (history := (await handle.fetch_history()).to_json())
    assert "SECRET" not in history


async def test_a_submitter_that_dies_too_early(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker starts the workflow of a submitted run that has none."""
    monkeypatch.setattr(worker_module, "REPAIR_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "MIN_AGE_SECONDS", 0.0)
    world = World()
    pipeline = Pipeline("p", [world.step("a")])
    handle = await cluster.local.submit(pipeline, Num(n=1), run_id=fresh_id())
    async with cluster.worker(pipeline):
        assert (await handle.result(timeout=60)).status is RunStatus.COMPLETED
    assert world.calls == ["a 1"]


async def test_a_run_that_is_resumed_or_submitted_again_without_temporal(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker starts another workflow for a run that was resumed in the store, and for a reused id."""
    monkeypatch.setattr(worker_module, "REPAIR_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "MIN_AGE_SECONDS", 0.0)
    monkeypatch.setattr(worker_module, "MAX_CLAIM_SECONDS", 0.1)
    world, run_id = World(), fresh_id()
    world.failing.add("a")
    pipeline = Pipeline("p", [world.step("a")])
    async with cluster.worker(pipeline):
        assert (await cluster.runner.run(pipeline, Num(), run_id=run_id)).status is RunStatus.PARTIAL
        await cluster.client.get_workflow_handle(run_id).result()
        world.failing.clear()
        assert await cluster.store.reopen(run_id)
        assert (await cluster.local.handle(run_id, pipeline).result(timeout=60)).status is RunStatus.RESUMED
        await cluster.store.delete(run_id)
        handle = await cluster.local.submit(pipeline, Num(n=5), run_id=run_id)
        assert (await handle.result(timeout=60)).status is RunStatus.COMPLETED
    assert world.calls == ["a 0", "a 0", "a 5"]


async def test_a_lost_wake_signal(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that only the store knows of is found by the re-check."""
    monkeypatch.setattr(workflow_module, "RECHECK_SECONDS", 0.3)
    run_id = fresh_id()
    async with cluster.worker(asks):
        assert (await cluster.runner.run(asks, Num(), run_id=run_id)).status is RunStatus.SUSPENDED
        await cluster.local.signal(run_id, Text(text="yes"))
        assert (await cluster.runner.handle(run_id, asks).result(timeout=60)).output == Text(text="yes")


async def test_a_cancelled_workflow_cancels_the_run(cluster: Cluster) -> None:
    """Cancelling the workflow cancels the run through the store, in the middle of a step."""
    run_id = fresh_id()
    async with gated() as (pipeline, world, reached, _), cluster.worker(pipeline):
        await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        await asyncio.wait_for(reached.wait(), 60)
        await cluster.client.get_workflow_handle(run_id).cancel()
        await cluster.until_status(run_id, "CANCELLED")
        assert world.calls == ["a 0", "b 1"]
        while await cluster.workflow_status(run_id) is WorkflowExecutionStatus.RUNNING:
            await asyncio.sleep(0.02)
        assert await cluster.workflow_status(run_id) is WorkflowExecutionStatus.CANCELED


async def test_a_cancelled_workflow_of_a_suspended_run(cluster: Cluster) -> None:
    """Cancelling the workflow of a suspended run cancels the run."""
    run_id = fresh_id()
    async with cluster.worker(asks):
        await cluster.runner.run(asks, Num(), run_id=run_id)
        await cluster.client.get_workflow_handle(run_id).cancel()
        await cluster.until_status(run_id, "CANCELLED")


async def test_a_workflow_that_is_cancelled_while_its_activity_returns(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation that the server requests of an activity as it returns still cancels the run."""
    run_id, drive = fresh_id(), StromaPlugin._drive

    async def drive_until_cancelled(plugin: StromaPlugin, run_id: str) -> Any:
        outcome = await drive(plugin, run_id)
        workflow = cluster.client.get_workflow_handle(run_id)
        await workflow.cancel()
        while not any(
            event.HasField("activity_task_cancel_requested_event_attributes")
            for event in (await workflow.fetch_history()).events
        ):
            await asyncio.sleep(0.02)
        return outcome

    monkeypatch.setattr(StromaPlugin, "_drive", drive_until_cancelled)
    async with cluster.worker(asks):
        await cluster.runner.submit(asks, Num(), run_id=run_id)
        await cluster.until_status(run_id, "CANCELLED")


async def test_a_handle_cancels_its_run(cluster: Cluster) -> None:
    """The workflow of a suspended run that its handle cancels ends at once, not at the next look."""
    run_id = fresh_id()
    async with cluster.worker(asks):
        handle = await cluster.runner.submit(asks, Num(), run_id=run_id)
        await handle.until_stopped()
        assert await handle.cancel()
        result = cluster.client.get_workflow_handle(run_id).result()
        assert await asyncio.wait_for(result, 30) == "CANCELLED"


async def test_the_workflow_of_a_deleted_run_ends(cluster: Cluster) -> None:
    """A workflow whose run was deleted from the store ends; it does not look for the run for ever."""
    run_id = fresh_id()
    async with cluster.worker(asks):
        await cluster.runner.run(asks, Num(), run_id=run_id)
        await cluster.store.delete(run_id)
        workflow = cluster.client.get_workflow_handle(run_id)
        await workflow.signal("wake")
        assert await asyncio.wait_for(workflow.result(), 30) == "DELETED"


async def test_a_terminated_workflow_is_resumed(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose workflow was terminated is INTERRUPTED after the step in flight and can be resumed."""
    run_id = fresh_id()
    async with gated() as (pipeline, world, reached, opened), cluster.worker(pipeline):
        await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        await asyncio.wait_for(reached.wait(), 60)
        await cluster.client.get_workflow_handle(run_id).terminate()
        await cluster.until(lambda: "its workflow was terminated" in caplog.text)
        opened.set()
        await cluster.until_status(run_id, "INTERRUPTED")
        assert world.calls == ["a 0", "b 1"]
        assert await cluster.runner.resume(run_id)
        result = await cluster.runner.handle(run_id, pipeline).result(timeout=60)
    assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=3))
    assert world.calls == ["a 0", "b 1", "c 2"]


async def test_a_worker_that_is_shut_down(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that is shut down gives its run back at the next step boundary; another one continues it."""
    caplog.set_level("INFO", "stroma")
    run_id = fresh_id()
    async with gated() as (pipeline, world, reached, opened):
        first = cluster.worker(pipeline)
        working = asyncio.ensure_future(first.run())
        handle = await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        await asyncio.wait_for(reached.wait(), 60)
        leaving = asyncio.ensure_future(first.shutdown())
        await cluster.until(lambda: "its worker is shut down" in caplog.text)
        await asyncio.sleep(0)
        opened.set()
        await asyncio.gather(leaving, working)
        assert await handle.status() == "INTERRUPTED"
        async with cluster.worker(pipeline):
            result = await handle.result(timeout=60)
    assert (result.output, world.calls) == (Num(n=3), ["a 0", "b 1", "c 2"])


async def test_a_worker_whose_time_to_drain_is_over(cluster: Cluster) -> None:
    """A step that outlives the drain is cancelled, its run INTERRUPTED, and another worker calls it."""
    run_id = fresh_id()
    async with gated() as (pipeline, world, reached, opened):
        handle = await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        async with cluster.worker(pipeline, drain_seconds=0.2):
            await asyncio.wait_for(reached.wait(), 60)
        assert await handle.status() == "INTERRUPTED"
        opened.set()
        async with cluster.worker(pipeline):
            result = await handle.result(timeout=60)
    assert (result.output, world.calls) == (Num(n=3), ["a 0", "b 1", "b 1", "c 2"])


async def test_a_slice_ends_at_a_step_boundary(cluster: Cluster) -> None:
    """A run whose slice is over yields at the next step boundary, and continues in another activity."""
    calls: list[int] = []

    async def slow(state: Num) -> Num:
        calls.append(state.n)
        await asyncio.sleep(0.2)
        return Num(n=state.n + 1)

    pipeline = Pipeline("slow", [node(f"s{n}", slow) for n in range(4)])
    run_id = fresh_id()
    async with cluster.worker(pipeline, max_seconds=0.3):
        result = await cluster.runner.run(pipeline, Num(), run_id=run_id)
    assert (result.output, calls) == (Num(n=4), [0, 1, 2, 3])
    assert cluster.store.get_run(run_id).epoch > 1


async def test_a_node_that_blocks_the_event_loop(cluster: Cluster) -> None:
    """Heartbeats are sent by the thread that renews the lease: a node that blocks its loop loses neither."""
    calls: list[int] = []

    async def block(state: Num) -> Num:
        calls.append(state.n)
        time.sleep(4)
        return Num(n=state.n + 1)

    pipeline = Pipeline("blocks", [node("a", block)])
    run_id = fresh_id()
    async with cluster.worker(pipeline):
        result = await cluster.runner.run(pipeline, Num(), run_id=run_id)
    assert (result.status, calls) == (RunStatus.COMPLETED, [0])
    history = (await cluster.client.get_workflow_handle(run_id).fetch_history()).events
    attempts = [e.activity_task_started_event_attributes.attempt for e in history if e.event_type == 11]
    assert attempts == [1]


async def test_heartbeats_carry_step_status_and_cost(cluster: Cluster) -> None:
    """Temporal's own pages show the last finished step, the status and the cost of a run in progress."""
    run_id = fresh_id()
    async with gated() as (pipeline, _, reached, _), cluster.worker(pipeline):
        await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        await asyncio.wait_for(reached.wait(), 60)
        while True:
            described = await cluster.client.get_workflow_handle(run_id).describe()
            pending = described.raw_description.pending_activities
            if pending and pending[0].heartbeat_details.payloads:
                break
            await asyncio.sleep(0.02)
        (details,) = await cluster.client.data_converter.decode(pending[0].heartbeat_details.payloads)
        assert details == {"status": "RUNNING", "step": "a", "cost_usd": 0.0}


async def test_a_failed_run_is_resumed(cluster: Cluster) -> None:
    """resume() continues a run that had ended, in a new workflow; committed nodes are not called again."""
    world, run_id = World(), fresh_id()
    world.failing.add("b")
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    async with cluster.worker(pipeline):
        assert (await cluster.runner.run(pipeline, Num(), run_id=run_id)).status is RunStatus.PARTIAL
        world.failing.clear()
        assert await cluster.runner.resume(run_id)
        result = await cluster.runner.handle(run_id, pipeline).result(timeout=60)
        assert not await cluster.runner.resume(run_id)
    assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=2))
    assert world.calls == ["a 0", "b 1", "b 1"]


async def test_a_run_is_resumed_while_its_end_is_reported(cluster: Cluster) -> None:
    """A run that is resumed between its end in the store and the end of its workflow is continued."""
    world, run_id, ended, resumed = World(), fresh_id(), asyncio.Event(), asyncio.Event()

    async def end(run_id: str, result: Any) -> None:
        ended.set()
        await resumed.wait()

    world.failing.add("a")
    config = RunConfig(policy_map=NEVER, lease_seconds=0.9, hooks=NodeHooks(on_run_end=end))
    pipeline = Pipeline("p", [world.step("a")])
    worker = stroma_worker(cluster.client, cluster.queue, [pipeline], store=cluster.store, config=config)
    async with worker:
        handle = await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        await asyncio.wait_for(ended.wait(), 60)
        world.failing.clear()
        assert await cluster.runner.resume(run_id)
        resumed.set()
        assert (await handle.result(timeout=60)).status is RunStatus.RESUMED


async def test_a_worker_without_the_pipeline_harms_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose pipeline a worker does not have is blocked, and continues with a worker that has it."""
    monkeypatch.setattr(workflow_module, "RECHECK_SECONDS", 0.2)
    world, run_id = World(), fresh_id()
    pipeline = Pipeline("p", [world.step("a")])
    handle = await cluster.runner.submit(pipeline, Num(), run_id=run_id)
    async with cluster.worker(asks):
        await cluster.until(lambda: "is blocked" in caplog.text)
    assert await handle.status() == "QUEUED"
    async with cluster.worker(pipeline):
        assert (await handle.result(timeout=60)).status is RunStatus.COMPLETED


async def test_a_long_run_id(cluster: Cluster) -> None:
    """A run id that a server does not accept is hashed for the workflow."""
    world, run_id = World(), "ü" * 500
    pipeline = Pipeline("p", [world.step("a")])
    async with cluster.worker(pipeline):
        result = await cluster.runner.run(pipeline, Num(), run_id=run_id)
        assert (result.run_id, result.status) == (run_id, RunStatus.COMPLETED)


async def test_a_delay_is_waited_for(cluster: Cluster) -> None:
    """A run with a delay does not start before it is due."""
    world, since = World(), time.monotonic()
    pipeline = Pipeline("p", [world.step("a")])
    async with cluster.worker(pipeline):
        result = await cluster.runner.run(pipeline, Num(), run_id=fresh_id(), delay=1.0)
    assert (result.status, world.calls) == (RunStatus.COMPLETED, ["a 0"])
    assert time.monotonic() - since >= 1.0


async def test_priority_and_key_are_those_of_the_workflow(cluster: Cluster) -> None:
    """priority= and key= become Temporal's priority, 1 to 5, and its fairness key of at most 64 bytes."""
    pipeline = Pipeline("p", [World().step("a")])
    for priority, key, expected in (
        (0, None, (3, "")),
        (-1, "acme", (2, "acme")),
        (9, "ü" * 100, (5, "ü" * 32)),
    ):
        handle = await cluster.runner.submit(pipeline, Num(), run_id=fresh_id(), priority=priority, key=key)
        described = await cluster.client.get_workflow_handle(handle.run_id).describe()
        stored = described.raw_description.workflow_execution_info.priority
        assert (stored.priority_key, stored.fairness_key) == expected


async def test_exporters_show_the_queue(cluster: Cluster) -> None:
    """A worker shows exporters how many runs of its pipelines are queued, as one without Temporal does."""
    readings: list[tuple[str, Any]] = []

    class Exporter(NodeHooks):
        def queue_reader(self, pipeline: str, reading: Any) -> None:
            readings.append((pipeline, reading))

    pipeline = Pipeline("p", [World().step("a")])
    await cluster.local.submit(pipeline, Num(), run_id=fresh_id(), delay=3600)
    config = RunConfig(hooks=Exporter())
    async with stroma_worker(cluster.client, cluster.queue, [pipeline], store=cluster.store, config=config):
        await cluster.until(lambda: readings)
    assert [(name, reading and reading.queued) for name, reading in readings] == [("p", 1), ("p", None)]


async def test_an_unreachable_server(store: Any) -> None:
    """A run stored while the server is away is a warning, no error: it starts once a worker finds it."""
    server = TemporalServer()
    client = await Client.connect(server.address)
    runner = TemporalRunner(client, "q", store)
    server.kill()
    pipeline = Pipeline("p", [World().step("a")])
    handle = await runner.submit(pipeline, Num(), run_id=fresh_id())
    assert await handle.status() == "QUEUED"
    assert await handle.cancel()
    with pytest.raises(RPCError):  # No worker looks for a run that had ended.
        await runner.resume(handle.run_id)


async def test_search_attributes(store: Any) -> None:
    """Where the server has the search attributes, runs are found by their pipeline and status."""
    server = TemporalServer()
    try:
        cluster = Cluster(await Client.connect(server.address), store)
        await register_search_attributes(cluster.client)
        await register_search_attributes(cluster.client)
        cluster.runner = TemporalRunner(cluster.client, cluster.queue, store)
        pipeline = Pipeline("p", [World().step("a")])
        async with cluster.worker(pipeline):
            await cluster.runner.run(pipeline, Num(), run_id=fresh_id())
            query = "StromaPipeline = 'p' AND StromaStatus = 'COMPLETED'"
            async with asyncio.timeout(60):
                while not (await cluster.client.count_workflows(query)).count:
                    await asyncio.sleep(0.05)
    finally:
        server.kill()


async def test_a_store_that_is_not_shared(cluster: Cluster) -> None:
    """A store in memory is refused, since other processes cannot read it."""
    from stroma import AsyncInMemoryStore

    with pytest.raises(StoreError, match="cannot be shared"):
        TemporalRunner(cluster.client, "q", AsyncInMemoryStore())
