"""Attackers, unlucky clusters and bad input: what a run comes to, and what it says."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio import workflow
from temporalio.worker import Worker
from tests.drivers.conftest import LocalDriver, TemporalDriver
from tests.drivers.scenarios import Left, Right, Texts, counted, half
from tests.drivers.seam import Seam, SeamDriver
from tests.drivers.test_parity import Approval, asking, watching
from tests.kit import NEVER, ONCE, THRICE, Num, Text, node

from stroma import (
    BudgetExceeded,
    CheckpointNotFound,
    ExecutionBudget,
    NodeContract,
    NodeHooks,
    Pipeline,
    PipelineChanged,
    RunBusy,
    RunExists,
    RunStatus,
    StoreError,
    current_node,
    map_over,
    parallel,
    stroma_node,
)
from stroma.contracts.node import find_node


def failing_once(node_id: str) -> Any:
    async def func(state: Num) -> dict[str, int]:
        group = current_node()
        seen.append(group.attempt)
        if len(seen) == 1:
            raise ValueError("not yet")
        return {"left": 1}

    seen: list[int] = []
    return node(node_id, func, Num, Left)


# ---------------------------------------------------------------------- the same as a local run


async def test_a_retry_of_a_group_is_told_as_that_of_a_node() -> None:
    """The hook finds the group as the current node, at the attempt that failed."""
    heard: list[Any] = []
    for driver in (SeamDriver(), LocalDriver()):
        events: list[Any] = []
        group = parallel(failing_once("l"), half([], "r", "right", Right))
        policies = {find_node(group).node_id: ONCE}  # fmt: skip
        async with driver.bind(
            [group], hooks=watching(events), policy_map=NEVER, node_policies=policies
        ) as bound:
            assert (await bound.run(Num())).status is RunStatus.COMPLETED
        heard.append([event for event in events if event[0] == "retry"])
    assert heard[0] == heard[1]
    assert heard[0][0][-1] == (0, "", 1)


@pytest.mark.core
async def test_nodes_of_one_id_have_their_own_contracts() -> None:
    """Each state is read by the contract of the node that made it, and the trace shows it so."""
    heard: list[Any] = []

    async def says(state: Num) -> dict[str, str]:
        return {"text": "abc"}

    async def counts(state: Text) -> dict[str, int]:
        return {"n": len(state.text)}

    for driver in (SeamDriver(), LocalDriver()):
        nodes = [node("a", says, Num, Text), node("a", counts, Text, Num), counted([], "b")]
        async with driver.bind(nodes) as bound:
            result = await bound.run(Num())
        heard.append([(event.input_state, event.output_state) for event in result.trace])
    assert heard[0] == heard[1]
    assert heard[0][1] == ({"text": "abc"}, {"n": 3})


@pytest.mark.core
async def test_a_limit_to_a_runs_time_holds_inside_of_a_group() -> None:
    """What its children took so far counts for the next one, which is stopped at the limit."""

    def slow(node_id: str, name: str, instance: Any, seconds: float) -> Any:
        async def func(state: Num) -> dict[str, int]:
            await asyncio.sleep(seconds)
            return {name: 1}

        return node(node_id, func, Num, instance)

    nodes = [parallel(slow("l", "left", Left, 0.5), slow("r", "right", Right, 3600), max_concurrency=1)]
    async with SeamDriver().bind(nodes, budget=ExecutionBudget(max_latency_ms=1000)) as bound:
        result = await bound.run(Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert "at node 'r'" in result.failure.message
    exceeded = result.failure.exception
    assert isinstance(exceeded, BudgetExceeded)
    assert (exceeded.dimension, exceeded.limit) == ("latency", 1000)
    (group,) = result.trace
    assert group.children[-1].node_id == "r"
    assert group.children[-1].duration_ms < 1000
    assert result.final_state == Num()


class Incomparable:
    """As an array or a table of data: it says neither yes nor no."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    __ne__ = __eq__


async def test_a_worker_may_hold_what_cannot_be_compared_in_its_context(temporal: TemporalDriver) -> None:
    """An array in the context of a worker's config breaks no attempt, and no node runs for nothing."""
    calls: list[str] = []

    async def func(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append("a")
        ctx["other"] = Incomparable()
        return {"n": 1 + ("table" in ctx)}

    contract = NodeContract(node_id="a", input_schema=Num, output_schema=Num)
    async with temporal.bind([stroma_node("a", contract)(func)], context={"table": Incomparable()}) as bound:
        result = await asyncio.wait_for(temporal.runner().run(bound.pipeline, Num()), 60)
    assert (result.status, calls) == (RunStatus.COMPLETED, ["a"])
    assert result.final_state == Num(n=2)


# ---------------------------------------------------------------------- sizes


@pytest.mark.core
async def test_wordy_failures_of_many_items_fit(temporal: TemporalDriver) -> None:
    """What 150 collected failures and hooks say, 15 kB each, is shortened before a server would refuse it."""
    calls: list[str] = []

    async def func(state: Text) -> Any:
        calls.append(state.text)
        raise ValueError("z" * 15_000)

    async def hook(*_: Any) -> None:
        raise RuntimeError("y" * 15_000)

    nodes = [map_over("texts", node("bad", func, Text, Text), into="made", on_item_failure="collect")]
    hooks = NodeHooks(on_node_failure=hook)
    async with temporal.bind(nodes, policy_map=NEVER, hooks=hooks) as bound:
        result = await bound.run(Texts(texts=[str(number) for number in range(150)]))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert (result.failed_items, len(calls)) == (150, 150)
    messages = [child.failure_message for child in next(iter(result.trace)).children]
    assert {text[:9] for text in messages if text is not None} == {"z" * 9}
    assert any(len(text or "") == 15_000 for text in messages)
    assert len(result.hook_errors) == 150


@pytest.mark.core
async def test_a_context_of_many_values_fits(temporal: TemporalDriver) -> None:
    """A client's is refused by name; what nodes put beyond it stays where it was put, and the run goes on."""

    async def puts(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        execution = current_node()
        for number in range(3):
            ctx[f"{execution.branch}.{number}"] = "x" * 60_000
        return {"left": 1}

    async def gets(state: Left, ctx: dict[str, Any]) -> dict[str, int]:
        return {"n": len(ctx)}

    def put(node_id: str) -> Any:
        contract = NodeContract(node_id=node_id, input_schema=Num, output_schema=Left)
        return stroma_node(node_id, contract)(puts)

    contract = NodeContract(node_id="gets", input_schema=Left, output_schema=Num)
    nodes = [parallel(*[put(f"p{number}") for number in range(20)]), stroma_node("gets", contract)(gets)]
    async with temporal.bind(nodes) as bound:
        with pytest.raises(TypeError, match="no room for '4'"):
            await bound.run(Num(), context={str(number): "x" * 60_000 for number in range(40)})
        result = await bound.run(Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state == Num(n=4)


# ---------------------------------------------------------------------- answers


async def test_an_answer_that_is_none_is_left_out(temporal: TemporalDriver) -> None:
    """A signal from elsewhere of any form stops nothing; one that is too large is refused; the first good one counts."""
    calls: list[str] = []
    run_id = uuid.uuid4().hex
    async with temporal.bind([asking(calls, "ask")]) as bound:
        result = await bound.run(Num(), run_id=run_id)
        assert result.status is RunStatus.SUSPENDED
        handle = temporal.client.get_workflow_handle(run_id)
        for bad in ({}, {"position": 0, "branch": ""}, {"position": 0, "branch": "", "payload": 7}):
            await handle.signal("stroma.answer", bad)
        await handle.signal("stroma.resume", "no number")
        with pytest.raises(StoreError, match="answer with its name"):
            await bound.runner.signal(run_id, {"approved": True, "why": "z" * 300_000}, schema=Large)
        await bound.runner.signal(run_id, Approval(approved=True))
        resumed = await asyncio.wait_for(bound.runner.resume(bound.pipeline, run_id), 60)
    assert resumed.status is RunStatus.RESUMED


class Large(BaseModel):
    approved: bool
    why: str


# ---------------------------------------------------------------------- ids


@workflow.defn(name="orders.ship", sandboxed=False)
class Order:
    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)


@pytest.mark.core
async def test_a_workflow_of_somebody_else_is_left_alone(temporal: TemporalDriver) -> None:
    """Its id is refused with its type; above all it is not cancelled, and no run takes its place."""
    order = uuid.uuid4().hex
    async with temporal.bind([counted([], "a")]) as bound:
        other = f"{temporal.queue}-orders"
        async with Worker(temporal.client, task_queue=other, workflows=[Order]):
            handle = await temporal.client.start_workflow(Order.run, id=order, task_queue=other)
            for attempt in (
                bound.run(Num(), run_id=order),
                bound.runner.cancel(order),
                bound.runner.signal(order, {}),
                bound.runner.resume(bound.pipeline, order),
                bound.runner.trace(bound.pipeline, order),
            ):
                with pytest.raises(RunExists, match=r"'orders\.ship', not of a run of Stroma"):
                    await attempt
            assert (await handle.describe()).status is not None
            await handle.terminate()


@pytest.mark.parametrize("run_id", ["\U0001f600" * 300, "a\nb\t\x7f", "x" * 3_000, "../..?%00#"], ids=str)
async def test_odd_run_ids_are_run_ids(temporal: TemporalDriver, run_id: str) -> None:
    """Of any characters and length; two long ones that begin alike are two runs."""
    run_id += uuid.uuid4().hex
    async with temporal.bind([counted([], "a")]) as bound:
        result = await bound.run(Num(), run_id=run_id)
        other = await bound.run(Num(n=1), run_id=run_id + "1", if_exists="error")
        again = await bound.run(Num(), run_id=run_id, if_exists="return")
    assert (result.run_id, again.run_id, other.run_id) == (run_id, run_id, run_id + "1")
    assert (again.final_state, other.final_state) == (Num(n=1), Num(n=2))


async def test_clients_that_begin_one_id_at_once_share_one_run(temporal: TemporalDriver) -> None:
    """With "attach" each gets its result, whoever was the quickest; the node runs once."""
    calls: list[str] = []
    started = asyncio.Event()

    async def func(state: Num) -> dict[str, int]:
        calls.append("a")
        await started.wait()
        return {"n": 1}

    run_id = uuid.uuid4().hex
    async with temporal.bind([node("a", func)]) as bound:
        running = [
            asyncio.create_task(bound.run(Num(), run_id=run_id, if_running="attach")) for _ in range(8)
        ]
        while not calls:
            await asyncio.sleep(0.01)
        started.set()
        results = await asyncio.gather(*running)
    assert calls == ["a"]
    assert {result.status for result in results} == {RunStatus.COMPLETED}


# ---------------------------------------------------------------------- workers in trouble


@pytest.mark.core
async def test_an_attempt_that_takes_too_long_is_not_made_again(temporal: TemporalDriver) -> None:
    """It was paid for: the run is PARTIAL, and says what to raise."""
    calls: list[str] = []

    async def func(state: Num) -> dict[str, int]:
        calls.append("a")
        await asyncio.Event().wait()
        return {"n": 1}

    temporal.options |= {"attempt_seconds": 1.0, "deliveries": 5}
    async with temporal.bind([node("a", func)], policy_map=THRICE) as bound:
        result = await bound.run(Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["a"])
    assert result.failure is not None
    assert "raise attempt_seconds=" in result.failure.message


@pytest.mark.nightly
async def test_what_needs_a_worker_says_so(temporal: TemporalDriver) -> None:
    """To ask where a run stands takes a worker: without one the error names it, instead of a code of the server."""
    run_id = uuid.uuid4().hex
    pipeline = Pipeline("pipe", [counted([], "a")])
    runner = temporal.runner()
    running = asyncio.create_task(runner.run(pipeline, Num(), run_id=run_id))
    with pytest.raises(StoreError, match="start a worker"):
        for _ in range(1_000):
            with contextlib.suppress(CheckpointNotFound):  # It is about to begin.
                await asyncio.wait_for(runner.trace(pipeline, run_id), 60)
            await asyncio.sleep(0.01)
    running.cancel()


async def test_a_blocked_event_loop_is_told_in_the_log(temporal: TemporalDriver, caplog: Any) -> None:
    """Its attempts are taken for lost and made again: the log says so, and what mends it."""
    calls: list[str] = []

    async def func(state: Num) -> dict[str, int]:
        calls.append("a")
        if len(calls) == 1:
            time.sleep(3)  # The mistake that this is about.
        return {"n": len(calls)}

    temporal.options |= {"heartbeat_seconds": 1.0, "deliveries": 50}
    async with temporal.bind([node("a", func)]) as bound:
        result = await bound.run(Num())
    assert result.status is RunStatus.COMPLETED
    assert len(calls) > 1
    assert any("asyncio.to_thread" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------------- going on


@pytest.mark.core
async def test_another_input_gets_no_result_of_this_one(temporal: TemporalDriver) -> None:
    """Neither by "attach" nor by "return" or "resume", waiting or ended: as a local run."""
    run_id, ended = uuid.uuid4().hex, uuid.uuid4().hex
    for driver in (temporal, LocalDriver()):
        async with driver.bind([asking([], "ask")]) as bound:
            await bound.run(Num(), run_id=run_id)
            with pytest.raises(PipelineChanged, match="another input"):
                await bound.run(Num(n=5), run_id=run_id, if_exists="resume")
        started, go_on = asyncio.Event(), asyncio.Event()
        async with driver.bind([_gate(started, go_on)]) as bound:
            running = asyncio.create_task(bound.run(Num(), run_id=ended))
            await started.wait()
            with pytest.raises(RunBusy, match="with another input") as caught:
                await bound.run(Num(n=5), run_id=ended, if_running="attach")
            assert not caught.value.same_input
            go_on.set()
            await running
            with pytest.raises(PipelineChanged, match="another input"):
                await bound.run(Num(n=5), run_id=ended, if_exists="return")


def _gate(started: asyncio.Event, go_on: asyncio.Event) -> Any:
    async def func(state: Num) -> dict[str, int]:
        started.set()
        await go_on.wait()
        return {"n": 1}

    return node("gate", func)


@pytest.mark.core
async def test_children_that_stand_elsewhere_by_now_take_no_output_of_others(
    temporal: TemporalDriver,
) -> None:
    """A group that is half done goes on with the children that it had, or not at all."""
    run_id = uuid.uuid4().hex
    for driver in (temporal, LocalDriver()):
        calls: list[str] = []
        left = half(calls, "l", "left", Left)
        right = node("r", _never, Num, Right)
        async with driver.bind([parallel(left, right, max_concurrency=1)], policy_map=NEVER) as bound:
            assert (await bound.run(Num(), run_id=run_id)).status is RunStatus.PARTIAL
        async with driver.bind([parallel(right, left, max_concurrency=1)], policy_map=NEVER) as bound:
            with pytest.raises(PipelineChanged, match=r"at position 0 \(0\)"):
                await bound.go_on(Num(), run_id)
        assert calls == ["l"]


async def _never(state: Num) -> Any:
    raise ValueError("no")


@pytest.mark.core
async def test_a_cancellation_that_comes_while_a_run_suspends_ends_it() -> None:
    """It waits for no answer that nobody wants any more, in whichever moment it came."""

    class Late(Seam):
        async def ask(self, request: Any) -> tuple[Any, bool]:
            reply, _ = await super().ask(request)
            return reply, request["op"] == "end"

    async with SeamDriver().bind([asking([], "ask")]) as bound:
        bound.runner.seam = Late(bound.runner.seam._attempts)
        result = await bound.run(Num())
    assert (result.status, result.suspended) == (RunStatus.CANCELLED, [])


async def test_what_earlier_segments_said_takes_no_room_of_later_ones(temporal: TemporalDriver) -> None:
    """A run that is resumed has room again for what its failures say."""

    async def func(state: Any) -> Any:
        raise ValueError("z" * 15_000)

    run_id = uuid.uuid4().hex
    texts = Texts(texts=[str(number) for number in range(15)])
    nodes = [
        map_over("texts", node("bad", func, Text, Text), into="made", on_item_failure="collect"),
        node("last", func, Texts, Num),
    ]
    messages: list[int] = []
    async with temporal.bind(nodes, policy_map=NEVER) as bound:
        for _ in range(2):
            result = await bound.run(texts, run_id=run_id, if_exists="resume")
            assert result.failure is not None
            assert result.failure.node_id == "last", result.failure.message[:300]
            messages.append(len(result.failure.message))
    assert messages[0] < 1_000
    assert messages[1] == 15_000
