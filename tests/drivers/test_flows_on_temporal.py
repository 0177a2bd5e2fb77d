"""Flows as workflows: changed bodies, fresh histories, lost workers, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from tests.chaos import flows as chaos
from tests.drivers.conftest import TemporalDriver
from tests.drivers.flow_scenarios import NumNode
from tests.flows.steps import Text, World
from tests.kit import NEVER, Num, node
from tests.servers_temporal import TemporalServer

from stroma import (
    ContractRegistry,
    ExecutionResult,
    Failure,
    Flow,
    NodeHooks,
    RunConfig,
    RunStatus,
    SQLiteStore,
    map_over,
    stroma_flow,
)
from stroma.contracts.node import find_node
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.plans import MissingNode, spec_of
from stroma.temporal import RemoteFailure, stroma_worker

pytestmark = pytest.mark.slow


def flow_of(body: Callable[[Flow, Num], Any]) -> Any:
    return stroma_flow("f", input=Num, output=Num)(body)


def worker(driver: TemporalDriver, flow: Any) -> Any:
    config = RunConfig(policy_map=NEVER)
    return stroma_worker(driver.client, driver.queue, [flow], config=config, **driver.worker_options)


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_true():
            await asyncio.sleep(0.02)


def failure_of(result: ExecutionResult[Any]) -> Failure:
    assert result.failure is not None
    return result.failure


class Versions:
    """Bodies of one flow, before and after it was edited. Both sleep, so that the worker can be exchanged."""

    def __init__(self, world: World) -> None:
        self.add, self.double = world.step("add"), world.step("double", lambda n: n * 2)

    async def recorded(self, flow: Flow, state: Num) -> Num:
        state = await flow.step(self.add, state)
        await flow.sleep(1)
        return await flow.step(self.add, state)

    async def another_step(self, flow: Flow, state: Num) -> Num:
        state = await flow.step(self.double, state)
        await flow.sleep(1)
        return await flow.step(self.add, state)

    async def another_input(self, flow: Flow, state: Num) -> Num:
        state = await flow.step(self.add, Num(n=state.n + 5))
        await flow.sleep(1)
        return await flow.step(self.add, state)

    async def no_step(self, flow: Flow, state: Num) -> Num:
        return state

    async def no_sleep(self, flow: Flow, state: Num) -> Num:
        return await flow.step(self.add, await flow.step(self.add, state))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("another_step", ["add#0", "double#0"]),
        ("another_input", ["add#0", "input"]),
        ("no_step", ["add#0", "the end of the flow"]),
        ("no_sleep", ["TimerStarted"]),
    ],
)
async def test_a_changed_flow_on_a_running_workflow_is_told(
    version: str, words: list[str], temporal: TemporalDriver
) -> None:
    """A body that does not do what its history says ends the run as FAILED, with a PipelineChanged that names the call."""
    world = World()
    versions = Versions(world)
    recorded, edited = flow_of(versions.recorded), flow_of(getattr(versions, version))
    runner = temporal.runner(RunConfig(policy_map=NEVER))
    async with worker(temporal, recorded):
        waiting = asyncio.ensure_future(runner.run(recorded, Num(), run_id=f"r-{temporal.queue}"))
        await until(lambda: bool(world.calls))
        await asyncio.sleep(0.3)  # Until the server has its end, and the flow sleeps.
    async with worker(temporal, edited):
        result = await asyncio.wait_for(waiting, 30)
    failure = failure_of(result)
    assert (result.status, failure.reason) == (RunStatus.FAILED, "changed")
    assert isinstance(failure.exception, RemoteFailure)
    assert failure.exception.type_name == "PipelineChanged"
    for word in words:
        assert word in failure.message


async def test_a_flow_that_was_restored_goes_on_after_a_reset(temporal: TemporalDriver) -> None:
    """A workflow that ended by a changed body goes on with the former one, once it is reset to its last task."""
    world = World()
    versions = Versions(world)
    recorded, edited = flow_of(versions.recorded), flow_of(versions.another_step)
    runner, run_id = temporal.runner(RunConfig(policy_map=NEVER)), f"r-{temporal.queue}"
    async with worker(temporal, recorded):
        waiting = asyncio.ensure_future(runner.run(recorded, Num(), run_id=run_id))
        await until(lambda: bool(world.calls))
        await asyncio.sleep(0.3)  # Until the server has its end, and the flow sleeps.
    async with worker(temporal, edited):
        result = await asyncio.wait_for(waiting, 30)
    assert failure_of(result).reason == "changed"
    async with worker(temporal, recorded):
        handle = temporal.client.get_workflow_handle(run_id)
        tasks = [
            event.event_id
            async for event in handle.fetch_history_events()
            if event.HasField("workflow_task_completed_event_attributes")
        ]
        await temporal.client.workflow_service.reset_workflow_execution(
            ResetWorkflowExecutionRequest(
                namespace=temporal.client.namespace,
                workflow_execution=WorkflowExecution(workflow_id=run_id),
                reason="the code is restored",
                request_id=run_id,
                workflow_task_finish_event_id=tasks[-1],
            )
        )
        result = await asyncio.wait_for(runner.run(recorded, Num(), run_id=run_id, if_running="attach"), 30)
    assert (result.status, result.output, world.calls) == (RunStatus.COMPLETED, Num(n=2), ["add 0", "add 1"])


async def test_a_flow_is_streamed_and_written_to_a_store(temporal: TemporalDriver, tmp_path: Path) -> None:
    """stream() has the ends of its steps; the store of the worker has the run with its steps when it ends."""
    world = World()
    add = world.step("add")

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.step(add, await flow.step(add, state))

    store = SQLiteStore(tmp_path / "runs.db")
    temporal.worker_options["store"] = store
    async with temporal.bind([flow_of(body)], policy_map=NEVER) as bound:
        events = [event async for event in bound.runner.stream(bound.pipeline, Num(), run_id="r")]
    assert [(event.kind, event.node_id) for event in events[1:-1]] == [("node_success", "add")] * 2
    assert events[-1].result is not None
    assert events[-1].result.output == Num(n=2)
    run = store.get_run("r")
    assert run is not None
    assert run.status == "COMPLETED"
    assert [one.branch for one in store.attempts("r")] == ["add#0", "add#1"]


async def test_another_worker_goes_on_with_a_body(temporal: TemporalDriver) -> None:
    """A worker that ends while a flow sleeps leaves it to another one, which calls no step again."""
    world = World()
    flow = flow_of(Versions(world).recorded)
    runner = temporal.runner(RunConfig(policy_map=NEVER))
    async with worker(temporal, flow):
        waiting = asyncio.ensure_future(runner.run(flow, Num()))
        await until(lambda: bool(world.calls))
    async with worker(temporal, flow):
        result = await asyncio.wait_for(waiting, 30)
    assert (result.status, result.output, world.calls) == (RunStatus.COMPLETED, Num(n=2), ["add 0", "add 1"])


async def test_a_replay_logs_nothing_again(
    temporal: TemporalDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """What the runner logs of a body is logged once, however often a worker replays it."""
    world = World()
    add = world.step("add")

    async def body(flow: Flow, state: Num) -> Num:
        await flow.step(add, state)
        raise KeyError("no such key")

    temporal.worker_options["max_cached_workflows"] = 0
    async with temporal.bind([flow_of(body)], policy_map=NEVER) as bound:
        await bound.run(Num())
    assert sum("flow 'f' raised" in record.getMessage() for record in caplog.records) == 1


async def test_a_resume_while_a_run_is_being_suspended_is_not_lost(temporal: TemporalDriver) -> None:
    """resume() that comes while the hooks of a suspension are called goes on with the run once they have ended."""
    asked, release = asyncio.Event(), asyncio.Event()

    async def on_run_end(run_id: str, result: ExecutionResult[Any]) -> None:
        asked.set()
        await release.wait()

    async def body(flow: Flow, state: Num) -> Num:
        return await flow.wait_for(Num, reason="how many?")

    config = {"hooks": NodeHooks(on_run_end=on_run_end), "hook_timeout_ms": 30_000}
    async with temporal.bind([flow_of(body)], policy_map=NEVER, **config) as bound:
        first = asyncio.ensure_future(bound.run(Num(), run_id=f"r-{temporal.queue}"))
        await asyncio.wait_for(asked.wait(), 30)
        again = asyncio.ensure_future(bound.go_on(Num(), f"r-{temporal.queue}"))
        handle = temporal.client.get_workflow_handle(f"r-{temporal.queue}")
        async with asyncio.timeout(30):
            while not [
                event
                async for event in handle.fetch_history_events()
                if event.HasField("workflow_execution_signaled_event_attributes")
            ]:
                await asyncio.sleep(0.05)
        release.set()
        assert (await first).status is RunStatus.SUSPENDED
        assert (await asyncio.wait_for(again, 30)).status is RunStatus.SUSPENDED


async def test_a_resume_calls_only_what_failed(temporal: TemporalDriver) -> None:
    """resume() of a flow that failed restores its steps, calls the failed one again and remembers the cost; hooks hear of it."""
    world, skipped = World(), []
    add, bad = world.step("add"), world.step("bad")

    async def body(flow: Flow, state: Num) -> Num:
        one, two = await asyncio.gather(flow.step(add, Num(n=1)), flow.step(add, Num(n=2)))
        return await flow.step(bad, Num(n=one.n + two.n + round(flow.random())))

    async def on_node_skipped(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        skipped.append((node_id, state["n"]))

    flow = flow_of(body)
    config = RunConfig(policy_map=NEVER, hooks=NodeHooks(on_node_skipped=on_node_skipped))
    world.failing = {"bad"}
    async with temporal.bind([flow], policy_map=NEVER, hooks=config.hooks) as bound:
        first = await bound.run(Num())
        assert first.status is RunStatus.PARTIAL
        world.failing.clear()
        result = await bound.runner.resume(bound.pipeline, first.run_id)
    assert result.status is RunStatus.RESUMED
    assert [call.split()[0] for call in world.calls] == ["add", "add", "bad", "bad"]
    assert world.calls[2] == world.calls[3]
    assert sorted(skipped) == [("add", 2), ("add", 3)]
    assert [event.node_id for event in result.trace] == ["bad"]


async def test_a_resume_of_a_changed_flow_is_told(temporal: TemporalDriver) -> None:
    """A resumed body that makes another call than the recorded one ends as PipelineChanged, and calls nothing."""
    world = World()
    add, bad, other = world.step("add"), world.step("bad"), world.step("other")
    edited = [False]

    async def body(flow: Flow, state: Num) -> Num:
        state = await flow.step(other if edited[0] else add, state)
        return await flow.step(bad, state)

    flow = flow_of(body)
    world.failing = {"bad"}
    async with temporal.bind([flow], policy_map=NEVER) as bound:
        first = await bound.run(Num())
        edited[0] = True
        result = await bound.runner.resume(bound.pipeline, first.run_id)
    assert (result.status, failure_of(result).reason) == (RunStatus.FAILED, "changed")
    assert "step 'add'" in failure_of(result).message
    assert world.calls == ["add 0", "bad 1"]


async def test_a_body_that_was_corrected_is_resumed(temporal: TemporalDriver) -> None:
    """A flow whose body raised goes on with the corrected body from the steps that it has."""
    world = World()
    add = world.step("add")
    corrected = [False]

    async def body(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        if not corrected[0]:
            raise KeyError("no such key")
        return await flow.step(add, state)

    flow = flow_of(body)
    async with temporal.bind([flow], policy_map=NEVER) as bound:
        first = await bound.run(Num())
        assert "no such key" in failure_of(first).message
        corrected[0] = True
        result = await bound.runner.resume(bound.pipeline, first.run_id)
    assert (result.status, result.output, world.calls) == (RunStatus.RESUMED, Num(n=2), ["add 0", "add 1"])


async def test_a_flow_continues_with_a_fresh_history(temporal: TemporalDriver) -> None:
    """A long flow begins fresh histories between its steps; each step is called once, and the trace and totals are whole."""
    calls: list[int] = []

    async def count(state: Num) -> Any:
        calls.append(state.n)
        return {"n": state.n + 1}, 10

    count_node = node("count", count)

    async def body(flow: Flow, state: Num) -> Num:
        first = flow.random()
        while state.n < 12:
            state = await flow.step(count_node, state)
            if state.n % 5 == 0:
                await flow.sleep(0.05)
        await asyncio.gather(*(flow.step(count_node, Num(n=100 + n)) for n in range(20)))
        assert first == flow_values.setdefault("first", first)
        answer = await flow.wait_for(Num, reason="and now?")
        for n in range(10):
            await flow.step(count_node, Num(n=200 + n))
        return answer

    flow_values: dict[str, float] = {}
    temporal.options["history_events"] = 20
    async with temporal.bind([flow_of(body)], policy_map=NEVER) as bound:
        first = await bound.run(Num(), run_id=f"r-{temporal.queue}")
        assert first.status is RunStatus.SUSPENDED, first.failure
        assert (first.total_tokens, len(first.trace)) == (320, 32)
        await bound.runner.signal(first.run_id, Num(n=7))
        result = await bound.go_on(Num(), first.run_id)
    assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=7))
    assert sorted(calls) == [*range(12), *range(100, 120), *range(200, 210)]
    histories = [one async for one in temporal.client.list_workflows(f"WorkflowId = '{first.run_id}'")]
    assert len(histories) >= 4


async def test_a_cancelled_flow_ends_its_steps_and_may_be_resumed(temporal: TemporalDriver) -> None:
    """cancel() ends the step in flight and the body, whose ``finally`` runs; a resume restores what was committed."""
    world, ended = World(), []
    add = world.step("add")
    begun, is_open = asyncio.Event(), [False]

    async def endless(state: Num) -> Num:
        world.calls.append("endless")
        begun.set()
        if not is_open[0]:
            await asyncio.Event().wait()
        return state

    endless_node: NumNode = node("endless", endless)

    async def body(flow: Flow, state: Num) -> Num:
        try:
            return await flow.step(endless_node, await flow.step(add, state))
        finally:
            ended.append(flow.is_closing)

    flow = flow_of(body)
    async with temporal.bind([flow], policy_map=NEVER) as bound:
        waiting = asyncio.ensure_future(bound.run(Num(), run_id=f"r-{temporal.queue}"))
        await begun.wait()
        assert await bound.runner.cancel(f"r-{temporal.queue}")
        result = await waiting
        assert result.status is RunStatus.CANCELLED
        assert [(event.node_id, event.outcome) for event in result.trace] == [
            ("add", "success"),
            ("endless", "cancelled"),
        ]
        assert ended[0] is True
        is_open[0] = True
        again = await bound.runner.resume(bound.pipeline, result.run_id)
    assert (again.status, again.output) == (RunStatus.RESUMED, Num(n=1))
    assert world.calls == ["add 0", "endless", "endless"]


async def test_large_states_of_a_flow_are_payloads(temporal: TemporalDriver, tmp_path: Path) -> None:
    """Inputs and outputs from 256 KiB on are in the payload store, not in the history; without one the run stops as PARTIAL."""

    async def grow(state: Text) -> Text:
        return Text(text=state.text * 2)

    grow_node = node("grow", grow, input=Text, output=Text)

    async def body(flow: Flow, state: Num) -> Num:
        text = await flow.step(grow_node, Text(text="x" * 200_000))
        text = await flow.step(grow_node, text)
        return Num(n=len(text.text))

    flow = flow_of(body)
    async with temporal.bind([flow], policy_map=NEVER) as bound:
        result = await bound.run(Num())
    assert (result.status, failure_of(result).reason) == (RunStatus.PARTIAL, "store")
    assert "payloads=" in failure_of(result).message
    temporal.options["payloads"] = temporal.worker_options["payloads"] = str(tmp_path)
    async with temporal.bind([flow], policy_map=NEVER) as bound:
        result = await bound.run(Num())
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=800_000))


async def test_a_step_that_one_machine_can_run_only_is_refused(temporal: TemporalDriver) -> None:
    """A map over a file or generator inside a flow is a ValueError of run(), before anything is called."""
    world = World()
    add = world.step("add")
    each = map_over(lambda state: iter([state]), add, into="numbers")

    async def body(flow: Flow, state: Num) -> Num:
        await flow.step(add, state)
        await flow.step(each, state)
        return state

    async with temporal.bind([flow_of(body)], policy_map=NEVER) as bound:
        with pytest.raises(ValueError, match="only one machine has"):
            await bound.run(Num())
    assert world.calls == []


async def test_a_worker_that_lacks_a_node_of_a_flow_says_which(temporal: TemporalDriver) -> None:
    """A node that a worker's code does not refer to is none it has, whatever the body in another process calls."""
    world = World()
    add = world.step("add")

    async def empty(flow: Flow, state: Num) -> Num:
        return state

    known = Attempts([flow_of(empty)]).site("f").known
    with pytest.raises(MissingNode, match=r"lacks node 'add'.*refer to its nodes by name"):
        known.find(spec_of(find_node(add), ContractRegistry()))


@pytest.mark.nightly
@pytest.mark.timeout(400)
async def test_a_flow_whose_workers_are_killed_ends_as_one_that_was_left_alone(
    temporal: TemporalDriver, temporal_server: TemporalServer, tmp_path: Path
) -> None:
    """Workers that are killed at any instant: each step is committed once, under one idempotency key, to the same end."""
    diary, draw = tmp_path / "calls", random.Random(7)
    diary.touch()
    temporal.options["heartbeat_seconds"] = 2.0
    runner = temporal.runner(RunConfig(policy_map=NEVER))
    flow = chaos.make_flow(lambda line: None, draw)

    def start() -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "tests.drivers.worker_helper",
            temporal_server.address,
            temporal.queue,
        ]
        return subprocess.Popen([*command, str(tmp_path), "flow"], cwd=Path(__file__).parents[2])

    async def until_the_next_call() -> None:
        seen = diary.stat().st_size
        while diary.stat().st_size == seen:
            await asyncio.sleep(0.005)

    async def kill_at_any_instant() -> None:
        nonlocal process, kills
        while kills < 4:
            await until_the_next_call()
            await asyncio.sleep(draw.uniform(0, 0.1))
            process.kill()
            process.wait()
            kills += 1
            process = start()

    process, kills = start(), 0
    killing = asyncio.create_task(kill_at_any_instant())
    try:
        asked = await asyncio.wait_for(runner.run(flow, chaos.Number(), run_id="killed"), 300)
        assert asked.status is RunStatus.SUSPENDED, asked.failure
        await runner.signal("killed", chaos.Text(text="yes"))
        result = await asyncio.wait_for(
            runner.run(flow, chaos.Number(), run_id="killed", if_running="attach"), 60
        )
    finally:
        killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing
        process.kill()
        process.wait()
    assert kills == 4
    assert result.output == chaos.Text(text=chaos.END)
    committed = Counter(event.branch for event in asked.trace if event.outcome == "success")
    assert committed == dict.fromkeys(chaos.COMMITTED - {"inner#0"}, 1)
    keys: dict[str, set[str]] = defaultdict(set)
    for line in diary.read_text().splitlines():
        _, branch, key = line.split(" ")
        keys[branch].add(key)
    assert {branch: len(found) for branch, found in keys.items() if len(found) > 1} == {}
