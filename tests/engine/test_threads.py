"""Plain ``def`` nodes run in a bounded number of threads."""

import asyncio
import logging
import threading
from typing import Any

import pytest
from pydantic import ValidationError
from tests.kit import Many as States
from tests.kit import Num

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    Flow,
    NodeHooks,
    RunConfig,
    RunStatus,
    StromaRunner,
    current_run,
    execute_step,
    map_over,
    parallel,
)

NEVER = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=0)}


class Gate:
    """A plain function that holds its thread until it is opened, and counts the threads in it."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.lock = threading.Lock()
        self.inside = self.peak = 0
        self.first = threading.Event()

    def __call__(self, state: Num) -> Num:
        with self.lock:
            self.inside += 1
            self.peak = max(self.peak, self.inside)
        self.first.set()
        assert self.opened.wait(30)
        with self.lock:
            self.inside -= 1
        return state


def gated(runner: StromaRunner, gate: Gate, name: str = "sync") -> Any:
    @runner.node(name, input=Num, output=Num)
    def sync(state: Num) -> Num:
        return gate(state)

    return sync


def opens_at(gate: Gate, count: int) -> NodeHooks:
    """Return hooks that open the gate when so many nodes wait."""
    waits: list[str] = []

    async def on_node_wait(_run_id: str, node_id: str, reason: str, _seconds: float) -> None:
        assert reason == "max_threads"
        waits.append(node_id)
        if len(waits) == count:
            gate.opened.set()

    return NodeHooks(on_node_wait=on_node_wait)


@pytest.mark.core
@pytest.mark.parametrize("shape", ["parallel", "map", "runs", "flow", "flows"])
async def test_at_most_max_threads_plain_nodes_run_at_once(shape: str) -> None:
    """``max_threads`` bounds the plain nodes of a runner, in groups, maps, flows and over several runs."""
    gate = Gate()
    runner = StromaRunner.quick(max_threads=3, hooks=opens_at(gate, 9))
    sync = gated(runner, gate)

    @runner.flow("flow", input=Num, output=Num)
    async def flow(flow: Flow, state: Num) -> Num:
        if shape == "flow":
            await asyncio.gather(*(flow.step(sync, Num(n=n)) for n in range(12)))
        else:
            await flow.step(sync, state)
        return state

    if shape == "parallel":
        await runner.run([parallel(*(gated(runner, gate, f"sync{n}") for n in range(12)))], Num())
    elif shape == "map":
        items = States(items=[Num(n=n) for n in range(12)])
        await runner.run([map_over("items", sync, into="items", max_concurrency=12)], items)
    elif shape == "flow":
        await runner.run(flow, Num())
    else:
        nodes: Any = [sync] if shape == "runs" else flow
        results = await asyncio.gather(*(runner.run(nodes, Num()) for _ in range(12)))
        assert {result.status for result in results} == {RunStatus.COMPLETED}
    assert gate.peak == 3


async def test_the_default_is_40_threads() -> None:
    """Without a setting, 40 plain nodes run at once, and the others wait."""
    gate = Gate()
    runner = StromaRunner.quick(hooks=opens_at(gate, 5))
    result = await runner.run([parallel(*(gated(runner, gate, f"s{n}") for n in range(45)))], Num())
    assert (result.status, gate.peak) == (RunStatus.COMPLETED, 40)


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_max_threads_is_at_least_one(value: Any) -> None:
    """A bound of no threads, which no plain node could pass, is refused."""
    with pytest.raises(ValidationError):
        RunConfig(max_threads=value)


@pytest.mark.core
async def test_a_cancellation_while_a_thread_becomes_free() -> None:
    """A plain node waiting for a thread is cancelled also as one becomes free; the next gets it."""
    gate = Gate()
    runs: list[asyncio.Task[Any]] = []

    async def on_node_success(run_id: str, *_: Any) -> None:
        if run_id == "first":
            runs[1].cancel()

    async def on_node_wait(*arguments: Any) -> None:
        if len(runs) == 3 and runs[2].get_name() == arguments[0]:
            gate.opened.set()

    hooks = NodeHooks(on_node_success=on_node_success, on_node_wait=on_node_wait)
    runner = StromaRunner.quick(max_threads=1, hooks=hooks)
    work = gated(runner, gate)
    for name in ("first", "second", "third"):
        runs.append(asyncio.create_task(runner.run([work], Num(), run_id=name), name=name))
        if name == "first":
            await asyncio.to_thread(gate.first.wait)
    ended = await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 30)
    assert isinstance(ended[1], asyncio.CancelledError), ended[1]
    assert [ended[0].status, ended[2].status] == [RunStatus.COMPLETED] * 2


async def test_the_wait_for_a_thread_is_in_no_time_limit() -> None:
    """The wait for a thread is in no node's duration, timeout or latency budget."""
    gate = Gate()
    runner = StromaRunner.quick(max_threads=1)
    holder = asyncio.create_task(runner.run([gated(runner, gate)], Num()))
    await asyncio.to_thread(gate.first.wait)

    async def open_late(*_: Any) -> None:
        await asyncio.sleep(0.3)
        gate.opened.set()

    config = {"node_timeouts": {"quick": 200}, "budget": ExecutionBudget(max_latency_ms=250)}
    runner.config = runner.config.model_copy(update={**config, "hooks": NodeHooks(on_node_wait=open_late)})
    quick = runner.node("quick", input=Num, output=Num)(lambda state: state)
    result = await runner.run([quick], Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert next(iter(result.trace)).duration_ms < 200
    assert [mark.reason for mark in result.trace.marks] == ["max_threads"]
    assert (await holder).status is RunStatus.COMPLETED


async def test_an_abandoned_thread_gives_its_place_back(caplog: pytest.LogCaptureFixture) -> None:
    """A node that timed out leaves its thread behind, with a warning, and the next does not wait for it."""
    gate = Gate()
    runner = StromaRunner.quick(max_threads=1, node_timeouts={"sync": 50}, policy_map=NEVER)
    sync = gated(runner, gate)
    try:
        for _ in range(3):
            async with asyncio.timeout(30):
                assert (await runner.run([sync], Num())).status is RunStatus.PARTIAL
        assert gate.inside == 3
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert sum("'sync' continues in its thread" in text for text in warnings) == 3
    finally:
        gate.opened.set()


async def test_a_run_that_waits_for_a_thread_can_be_cancelled() -> None:
    """A cancelled run leaves the line, and those behind it get their turn."""
    gate = Gate()
    runner = StromaRunner.quick(max_threads=1)
    sync = gated(runner, gate)
    holder = asyncio.create_task(runner.run([sync], Num()))
    await asyncio.to_thread(gate.first.wait)
    waiting = [asyncio.create_task(runner.run([sync], Num())) for _ in range(3)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    gate.opened.set()
    results = await asyncio.gather(holder, *waiting[1:])
    assert {result.status for result in results} == {RunStatus.COMPLETED}


@pytest.mark.parametrize("how", ["run_sync", "same loop", "step"])
async def test_plain_nodes_inside_plain_nodes_have_threads_of_their_own(how: str) -> None:
    """A plain node that runs plain nodes does not wait for the place that it takes itself."""
    runner, loop = StromaRunner.quick(max_threads=2), asyncio.get_running_loop()
    inner = runner.node("inner", input=Num, output=Num)(lambda state: state)

    @runner.node("outer", input=Num, output=Num)
    def outer(state: Num) -> Num:
        if how == "run_sync":
            runner.run_sync([inner, inner], state).raise_for_status()
        else:
            work = (
                runner.run([inner], state)
                if how == "same loop"
                else execute_step("inner", inner, state, current_run())
            )
            asyncio.run_coroutine_threadsafe(work, loop).result(20).raise_for_status()
        return state

    async with asyncio.timeout(30):
        results = await asyncio.gather(*(runner.run([outer], Num()) for _ in range(8)))
    assert {result.status for result in results} == {RunStatus.COMPLETED}
