"""Pause, cancel and budget of living runs."""

import asyncio
import pickle
import time
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from tests.fixtures import store_fixture
from tests.kit import context_of
from tests.shared_stores import FAMILIES
from tests.store_suite.helpers import due_runs

from stroma import (
    CheckpointNotFound,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    Journal,
    Limit,
    NodeHooks,
    Pipeline,
    RunStatus,
    StoreError,
    StromaRunner,
    current_node,
    map_over,
    parallel,
    stroma_flow,
)
from stroma.checkpoint.durable.store import LeaseRenewer
from stroma.failures import FailurePolicy
from stroma.runner.steps import execute_step

store = store_fixture(*FAMILIES)
one_store = store_fixture("sqlite")


class Num(BaseModel):
    n: int = 0
    items: list[int] = []


class Gate:
    """Nodes that log their calls; a call of a name waits until it is opened."""

    def __init__(self, runner: StromaRunner) -> None:
        self.runner = runner
        self.calls: list[str] = []
        self.closed: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}

    def close(self, *names: str) -> None:
        for name in names:
            self.closed[name], self.reached[name] = asyncio.Event(), asyncio.Event()

    def open(self) -> None:
        for event in self.closed.values():
            event.set()

    def node(self, name: str, *, tokens: int = 0, fails: int = 0) -> Any:
        failures = [ConnectionError("no")] * fails

        @self.runner.node(name, input=Num, output=Num)
        async def func(state: Num) -> Any:
            self.calls.append(name)
            if name in self.closed:
                self.reached[name].set()
                await self.closed[name].wait()
            if tokens:
                current_node().report_usage(input_tokens=tokens)
            if failures:
                raise failures.pop()
            return {"n": state.n + 1, "items": state.items}

        return func


def gate_of(store: Any, **config: Any) -> Gate:
    config.setdefault("policy_map", _retries(0))
    return Gate(StromaRunner.quick(store=store, **config))


def _retries(number: int, seconds: float = 0.0) -> Any:
    policy = FailurePolicy(max_retries=number, backoff_seconds=seconds, jitter=False)
    return dict.fromkeys(FailureClass, policy)


def record_of(gate: Gate, run_id: str = "r") -> Any:
    store: Any = gate.runner.checkpoint_manager.store
    return store.get_run(run_id)


async def test_a_pause_ends_a_list_after_its_node(store: Any) -> None:
    """The node at work finishes and is committed; the run is SUSPENDED ("paused"), and can be resumed."""
    gate = gate_of(store)
    gate.close("a")
    nodes = Pipeline("list", [gate.node("a"), gate.node("b")])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await gate.reached["a"].wait()
    assert await gate.runner.pause("r") is True
    gate.open()
    result = await run
    assert (result.status, result.suspended, result.failure) == (RunStatus.SUSPENDED, ["paused"], None)
    assert gate.calls == ["a"]
    record = record_of(gate)
    assert (record.status, record.error, record.nodes, record.holder) == ("SUSPENDED", "paused", 1, None)
    assert await gate.runner.recover(nodes) == {}
    again = await gate.runner.resume(nodes, "r")
    assert (again.status, gate.calls) == (RunStatus.RESUMED, ["a", "b"])
    assert await gate.runner.pause("r") is False


async def test_a_request_needs_a_run_and_a_journal() -> None:
    """An unknown run is CheckpointNotFound, a store without a journal StoreError; a bad limit is named."""

    class Plain:
        async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
        async def load(self, run_id: str, node_id: str) -> None: ...

    runner = StromaRunner.quick()
    with pytest.raises(CheckpointNotFound):
        await runner.pause("nobody")
    with pytest.raises(CheckpointNotFound):
        await runner.unpause("nobody")
    with pytest.raises(CheckpointNotFound):
        await runner.set_budget("nobody", tokens=1)
    with pytest.raises(ValueError, match="no limit is set"):
        await runner.set_budget("nobody")
    with pytest.raises(ValidationError):
        await runner.set_budget("nobody", cost_usd=-1.0)
    plain: Any = Plain()
    for request in (StromaRunner.quick(store=plain).pause("r"), StromaRunner.quick(store=plain).unpause("r")):
        with pytest.raises(StoreError, match="no journal of runs"):
            await request


async def test_a_pause_holds_in_groups(store: Any) -> None:
    """Children at work finish and are committed, others are not begun; a resume calls only those."""
    gate = gate_of(store)
    gate.close("a", "b")
    group = parallel(*(gate.node(name) for name in "abcd"), max_concurrency=2)
    nodes = Pipeline("group", [group, gate.node("e")])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await asyncio.gather(*(gate.reached[name].wait() for name in "ab"))
    await gate.runner.pause("r")
    gate.open()
    result = await run
    assert (result.status, result.suspended, sorted(gate.calls)) == ("SUSPENDED", ["paused"], ["a", "b"])
    again = await gate.runner.resume(nodes, "r", input_schema=Num)
    assert (again.status, sorted(gate.calls)) == ("RESUMED", ["a", "b", "c", "d", "e"])


@pytest.mark.parametrize("into", ["outputs", "journal"])
async def test_a_pause_holds_in_maps(store: Any, into: str) -> None:
    """Items at work finish and are committed, no other one is begun, nor read; a resume calls only those."""
    gate = gate_of(store)
    gate.close("item")
    read: list[int] = []

    def items(state: Any) -> Any:
        for n in range(50):
            read.append(n)
            yield {"n": n}

    mapped = map_over(
        items, gate.node("item"), into=Journal() if into == "journal" else "outputs", max_concurrency=3
    )
    nodes = Pipeline("map", [gate.node("first"), mapped])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await gate.reached["item"].wait()
    while gate.calls.count("item") < 3:
        await asyncio.sleep(0)
    await gate.runner.pause("r")
    gate.open()
    result = await run
    assert (result.status, result.suspended) == ("SUSPENDED", ["paused"])
    assert gate.calls.count("item") == 3
    assert len(read) < 10
    again = await gate.runner.resume(nodes, "r")
    assert again.status == "RESUMED", again.failure
    assert (gate.calls.count("first"), gate.calls.count("item")) == (1, 50)


@pytest.mark.parametrize("end", ["pause", "crossed limit"])
async def test_the_wait_for_an_item_ends(store: Any, end: str) -> None:
    """A map whose source waits for its next item stops at once, paused or over a limit; a resume reads the
    source again."""
    is_paused = end == "pause"
    gate = gate_of(store, budget=ExecutionBudget(max_tokens_total=None if is_paused else 5))
    waiting, never = asyncio.Event(), asyncio.Event()

    async def items(state: Any) -> Any:
        yield {"n": 0}
        waiting.set()
        await never.wait()

    gate.close("item")
    nodes = [map_over(items, gate.node("item", tokens=10), into="outputs")]
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await waiting.wait()
    await gate.reached["item"].wait()
    if is_paused:
        assert await gate.runner.pause("r")
    gate.open()
    assert (await run).status == ("SUSPENDED" if is_paused else "PARTIAL")
    never.set()
    await gate.runner.set_budget("r", tokens=100)
    again = await gate.runner.resume(nodes, "r", input_schema=Num)
    assert (again.status, gate.calls) == ("RESUMED", ["item"])


async def test_a_pause_ends_the_wait_for_a_retry(store: Any) -> None:
    """A run that waits an hour between two attempts is SUSPENDED at once; the resume makes the next one."""
    gate = gate_of(store, policy_map=_retries(1, 3600))
    waiting = asyncio.Event()

    async def retry(*_: Any) -> None:
        waiting.set()

    gate.runner.with_hooks(NodeHooks(on_node_retry=retry))
    nodes = Pipeline("retry", [gate.node("a", fails=1), gate.node("b")])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await waiting.wait()
    await asyncio.sleep(0)
    await gate.runner.pause("r")
    result = await asyncio.wait_for(run, 5)
    assert (result.status, result.suspended, gate.calls) == ("SUSPENDED", ["paused"], ["a"])
    assert (await gate.runner.resume(nodes, "r")).status == "RESUMED"
    assert gate.calls == ["a", "a", "b"]


async def test_a_pause_ends_the_wait_for_a_turn() -> None:
    """An attempt that is queued for a limit is not made."""
    limit = Limit(requests_per_minute=1)
    gate = gate_of(None, limits={"a": limit}, node_limits={"b": "a"})
    queued = asyncio.Event()

    async def wait(*_: Any) -> None:
        queued.set()

    gate.runner.with_hooks(NodeHooks(on_node_wait=wait))
    nodes = Pipeline("turn", [gate.node("a"), gate.node("b")])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await queued.wait()
    await gate.runner.pause("r")
    result = await asyncio.wait_for(run, 5)
    assert (result.status, result.suspended, gate.calls) == ("SUSPENDED", ["paused"], ["a"])
    assert [mark.kind for mark in result.trace.marks] == ["wait"]


async def test_a_pause_holds_in_flows(store: Any) -> None:
    """Steps at work finish and are committed; the body begins no other; a resume replays it."""
    gate = gate_of(store)
    gate.close("b")
    steps = {name: gate.node(name) for name in "abc"}

    @stroma_flow("flow", input=Num, output=Num)
    async def flow(flow: Any, state: Num) -> Num:
        state = await flow.step(steps["a"], state)
        b, _ = await asyncio.gather(flow.step(steps["b"], state), _later(flow, state))
        return await flow.step(steps["a"], b)

    async def _later(flow: Any, state: Num) -> Any:
        await asyncio.sleep(0.05 if gate.closed["b"].is_set() else 3600)
        return await flow.step(steps["c"], state)

    run = asyncio.create_task(gate.runner.run(flow, Num(), run_id="r"))
    await gate.reached["b"].wait()
    await gate.runner.pause("r")
    gate.open()
    result = await asyncio.wait_for(run, 10)
    assert (result.status, result.suspended, gate.calls) == ("SUSPENDED", ["paused"], ["a", "b"])
    again = await gate.runner.resume(flow, "r")
    assert (again.status, gate.calls) == ("RESUMED", ["a", "b", "c", "a"])


async def test_a_pause_ends_the_waits_of_a_flow(store: Any) -> None:
    """A flow that sleeps in the process is SUSPENDED at once, no worker wakes it; unpause() hands it on."""
    gate = gate_of(store)
    asleep = asyncio.Event()
    step = gate.node("a")

    @stroma_flow("sleeper", input=Num, output=Num)
    async def flow(flow: Any, state: Num) -> Num:
        state = await flow.step(step, state)
        asleep.set()
        await flow.sleep(seconds=0.5)
        return await flow.step(step, state)

    run = asyncio.create_task(gate.runner.run(flow, Num(), run_id="r"))
    await asleep.wait()
    await gate.runner.pause("r")
    result = await asyncio.wait_for(run, 5)
    assert (result.status, result.suspended, gate.calls) == ("SUSPENDED", ["paused"], ["a"])
    store_: Any = gate.runner.checkpoint_manager.store
    assert await due_runs(store_, 1 << 60, "sleeper") == []
    assert await gate.runner.unpause("r") is True
    outcomes: dict[str, Any] = {}
    ends: list[Any] = []

    def note(run_id: str, outcome: Any) -> None:
        outcomes[run_id] = outcome
        ends.append(asyncio.create_task(gate.runner.shutdown(drain_seconds=0)))

    await asyncio.wait_for(gate.runner.serve(flow, poll_seconds=0.05, on_result=note), 20)
    assert isinstance(outcomes["r"], ExecutionResult)
    assert (outcomes["r"].status, gate.calls) == ("RESUMED", ["a", "a"])


async def test_a_pause_of_plain_code(store: Any) -> None:
    """Under ``async with ctx`` the step at work finishes, the next one is SUSPENDED, and so is the run."""
    gate = gate_of(store)
    gate.close("a")

    async def code() -> list[Any]:
        config = gate.runner.config.model_copy(update={"run_id": "r", "resume": True})
        ctx = context_of(gate.runner, config)
        results = []
        async with ctx:
            for name in "ab":
                results.append(await execute_step(name, nodes[name], Num(), ctx))
        return [result.status for result in results]

    nodes = {name: gate.node(name) for name in "ab"}
    run = asyncio.create_task(code())
    await gate.reached["a"].wait()
    await gate.runner.pause("r")
    gate.open()
    assert (await run, gate.calls) == (["COMPLETED", "SUSPENDED"], ["a"])
    assert (record_of(gate).status, record_of(gate).error) == ("SUSPENDED", "paused")
    assert (await code(), gate.calls) == (["COMPLETED", "COMPLETED"], ["a", "b"])


async def test_paused_time_is_in_no_latency_budget(store: Any) -> None:
    """A run that was paused for longer than its latency budget ends within it."""
    gate = gate_of(store, budget=ExecutionBudget(max_latency_ms=500))
    gate.close("a")
    nodes = Pipeline("late", [gate.node("a"), gate.node("b")])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await gate.reached["a"].wait()
    gate.open()
    await gate.runner.pause("r")
    if (await run).status == "SUSPENDED":
        await asyncio.sleep(0.6)
        assert (await gate.runner.resume(nodes, "r")).status == "RESUMED"


async def test_no_attempt_begins_after_a_cancel_has_returned(store: Any) -> None:
    """Once cancel() has returned, not even an attempt of another task of the run begins."""
    gate = gate_of(store)
    begun: list[float] = []

    @gate.runner.node("item", input=Num, output=Num)
    async def item(state: Num) -> Any:
        begun.append(time.monotonic())
        await asyncio.sleep(0.001)
        return {}

    mapped = map_over(
        lambda state: ({"n": n} for n in range(100_000)), item, into=Journal(), max_concurrency=8
    )
    nodes = Pipeline("many", [gate.node("first"), mapped])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    while len(begun) < 20:
        await asyncio.sleep(0.001)
    assert await gate.runner.cancel("r") is True
    returned = time.monotonic()
    result = await run
    assert result.status == "CANCELLED"
    assert max(begun) <= returned
    assert record_of(gate).status == "CANCELLED"


async def test_a_cancel_of_a_run_that_completes(one_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cancel() returns False if the run completed before its owner read the request."""
    monkeypatch.setattr(LeaseRenewer, "_read_requests", lambda *_: None)
    gate = gate_of(one_store)
    gate.close("last")
    run = asyncio.create_task(gate.runner.run(Pipeline("one", [gate.node("last")]), Num(), run_id="r"))
    await gate.reached["last"].wait()
    cancelling = asyncio.create_task(gate.runner.cancel("r"))
    while not one_store.is_request_pending("r"):
        await asyncio.sleep(0.001)
    gate.open()
    assert (await run).status == "COMPLETED"
    assert await cancelling is False


async def test_a_raise_applies_before_the_next_attempt(store: Any) -> None:
    """A budget that is raised while a node is at work is the one that its output and the next node meet."""
    gate = gate_of(store, budget=ExecutionBudget(max_tokens_total=10))
    gate.close("a")
    nodes = Pipeline("raised", [gate.node("a", tokens=8), gate.node("b", tokens=8)])
    run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
    await gate.reached["a"].wait()
    assert await gate.runner.set_budget("r", tokens=20) is True
    gate.open()
    assert (await run).status == "COMPLETED"
    assert await gate.runner.set_budget("r", tokens=30) is False


async def test_a_limit_that_is_set_later_applies(store: Any) -> None:
    """A run without a budget, a flow too, ends PARTIAL over a limit that is set while it runs."""
    gate = gate_of(store)
    gate.close("a")
    steps = {name: gate.node(name, tokens=8) for name in "abc"}

    @stroma_flow("flow", input=Num, output=Num)
    async def flow(flow: Any, state: Num) -> Num:
        for name in "abc":
            state = await flow.step(steps[name], state)
        return state

    for nodes in (Pipeline("list", list(steps.values())), flow):
        gate.close("a")
        gate.calls.clear()
        run = asyncio.create_task(gate.runner.run(nodes, Num(), run_id="r"))
        await gate.reached["a"].wait()
        assert await gate.runner.set_budget("r", tokens=10) is True
        gate.open()
        result = await run
        assert (result.status, gate.calls) == ("PARTIAL", ["a", "b"])
        assert result.failure is not None
        # It holds for those who resume the run, with the config of another process.
        again = await gate.runner.resume(nodes, "r")
        assert (again.status, gate.calls) == ("PARTIAL", ["a", "b"])


@pytest.mark.parametrize("kind", ["list", "flow"])
async def test_a_limit_that_is_crossed_before_a_retry(store: Any, kind: str) -> None:
    """A node of a run without a budget is not tried again over a limit that is set while it waits."""

    async def set_limit(*_: Any) -> None:
        assert await gate.runner.set_budget("r", tokens=7) is True

    gate = gate_of(store, hooks=NodeHooks(on_node_retry=set_limit), policy_map=_retries(1))
    step = gate.node("a", tokens=8, fails=1)

    @stroma_flow("flow", input=Num, output=Num)
    async def flow(flow: Any, state: Num) -> Num:
        output: Num = await flow.step(step, state)
        return output

    nodes = flow if kind == "flow" else Pipeline("list", [step])
    result = await gate.runner.run(nodes, Num(), run_id="r")
    assert (result.status, gate.calls) == ("PARTIAL", ["a"])
    assert result.failure.reason == "budget"


async def test_a_limit_set_for_a_run_says_where_to_raise_it(store: Any) -> None:
    """It replaces a larger budget of the config that resumes the run, and the message names set_budget()."""
    gate = gate_of(store, budget=ExecutionBudget(max_tokens_total=10, max_cost_usd=9), unknown_model="warn")
    nodes = Pipeline("set", [gate.node("a", tokens=16), gate.node("b")])
    result = await gate.runner.run(nodes, Num(), run_id="r")
    assert "; raise max_tokens_total, then resume the run" in result.failure.message
    assert await gate.runner.set_budget("r", tokens=12) is True
    gate.runner.with_budget(tokens=1000)
    result = await gate.runner.resume(nodes, "r")
    assert (result.status, gate.calls) == ("PARTIAL", ["a"])
    assert "limit 12 tokens" in result.failure.message
    assert "raise it with set_budget(tokens=...) or `stroma budget RUN --tokens`" in result.failure.message
    assert await gate.runner.set_budget("r", tokens=1000, latency_ms=1000) is True
    gate.close("b")
    result = await gate.runner.resume(nodes, "r")
    for error in (result.failure.exception, pickle.loads(pickle.dumps(result.failure.exception))):
        assert "set_budget(latency_ms=...) or `stroma budget RUN --latency-ms`" in str(error)
    gate.open()
    assert await gate.runner.set_budget("r", latency_ms=100_000) is True
    assert (await gate.runner.resume(nodes, "r")).status == "RESUMED"


async def test_questions_are_listed_beside_the_budget(one_store: Any) -> None:
    """A run that waits for its budget lists its open questions too, and its record says "budget"."""
    gate = gate_of(one_store, budget=ExecutionBudget(max_tokens_total=10), on_budget="wait")

    @gate.runner.node
    async def ask(state: Num) -> Num:
        return current_node().wait_for(Num, reason="how many?")

    nodes = Pipeline("asking", [parallel(ask, gate.node("spend", tokens=8), gate.node("more", tokens=8))])
    await gate.runner.run(nodes, Num(), run_id="r")
    for _ in range(2):
        result = await gate.runner.resume(nodes, "r", input_schema=Num)
        assert sorted(result.suspended) == ["budget", "how many?"]
        assert [question.reason for question in result.questions] == ["how many?"]
    await gate.runner.run(nodes, Num(), run_id="r", resume=True)
    assert record_of(gate).error == "budget"
    async for event in gate.runner.follow("r"):
        if event.kind == "run_suspended":
            assert event.details is not None
            assert event.details["suspended"] == ["budget", "how many?"]
            break


@pytest.mark.parametrize("kind", ["list", "flow", "group", "map"])
async def test_a_run_waits_for_its_budget(store: Any, kind: str) -> None:
    """G6. With on_budget="wait" it is SUSPENDED with reason "budget"; after a raise a worker resumes it."""
    gate = gate_of(store, budget=ExecutionBudget(max_tokens_total=10), on_budget="wait")
    steps = {name: gate.node(name, tokens=8) for name in "abcd"}

    @stroma_flow("flow", input=Num, output=Num)
    async def flow(flow: Any, state: Num) -> Num:
        for name in "abcd":
            state = await flow.step(steps[name], state)
        return state

    def four(state: Any) -> Any:
        return [{"n": n} for n in range(4)]

    first = gate.node("first")
    nodes: Any = {
        "list": Pipeline("list", list(steps.values())),
        "flow": flow,
        "group": Pipeline("group", [first, parallel(*steps.values(), max_concurrency=1)]),
        "map": Pipeline("map", [first, map_over(four, steps["a"], into="outputs", max_concurrency=1)]),
    }[kind]
    result = await gate.runner.run(nodes, Num(items=[1, 2, 3, 4]), run_id="r")
    assert (result.status, result.suspended, result.failure) == ("SUSPENDED", ["budget"], None)
    assert len([name for name in gate.calls if name != "first"]) == 2
    assert (record_of(gate).status, record_of(gate).error) == ("SUSPENDED", "budget")
    store_: Any = gate.runner.checkpoint_manager.store
    assert await due_runs(store_, 1 << 60, kind) == []
    # A resume without a raise, or with one that is too small, calls nothing.
    assert (await gate.runner.resume(nodes, "r")).suspended == ["budget"]
    assert await gate.runner.set_budget("r", tokens=12) is True
    assert len([name for name in gate.calls if name != "first"]) == 2
    outcomes: list[Any] = []
    ends: list[Any] = []

    def note(run_id: str, outcome: Any) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 2:
            ends.append(asyncio.create_task(gate.runner.shutdown(drain_seconds=0)))

    serving = asyncio.create_task(gate.runner.serve(nodes, poll_seconds=0.05, on_result=note))
    while not outcomes:
        await asyncio.sleep(0.01)
    assert outcomes[0].suspended == ["budget"]
    assert await gate.runner.set_budget("r", tokens=32) is True
    await asyncio.wait_for(serving, 20)
    assert outcomes[1].status == "RESUMED", outcomes[1].failure
    assert len([name for name in gate.calls if name != "first"]) == 4
    assert outcomes[1].total_tokens == 16


@pytest.mark.parametrize("when", ["stopped", "running"])
async def test_a_raise_continues_a_run_that_also_waits_for_a_person(store: Any, when: str) -> None:
    """With on_budget="wait", a raise makes the run due although it also waits for an answer: the branch that
    the budget stopped goes on, and nothing is bought again."""
    gate = gate_of(store, budget=ExecutionBudget(max_tokens_total=5), on_budget="wait", inline_wait_seconds=0)
    gate.close("pay")
    pay, write = gate.node("pay", tokens=8), gate.node("write")

    @gate.runner.node
    async def ask(state: Num) -> Num:
        return current_node().wait_for(Num, reason="ok?")

    @gate.runner.flow("f", input=Num, output=Num)
    async def f(flow: Any, state: Num) -> Num:
        async def report() -> Num:
            return await flow.step(write, await flow.step(pay, state))

        await asyncio.gather(flow.step(ask, state), report())
        return state

    run = asyncio.create_task(gate.runner.run(f, Num(), run_id="r"))
    await gate.reached["pay"].wait()
    if when == "running":
        assert await gate.runner.set_budget("r", tokens=50)
    gate.open()
    result = await run
    if when == "stopped":
        assert sorted(result.suspended) == ["budget", "ok?"]
        assert await gate.runner.set_budget("r", tokens=50)
    assert await due_runs(store, 1 << 60, "f") == ["r"]
    outcome: Any = await gate.runner.drive("r")
    assert [one.reason for one in outcome.questions] == ["ok?"]
    assert gate.calls == ["pay", "write"]
    assert await due_runs(store, 1 << 60, "f") == []
