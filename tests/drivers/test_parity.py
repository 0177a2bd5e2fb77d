"""Hooks, cancellation, suspension and resuming: the same under every driver."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from tests.drivers.conftest import LocalDriver
from tests.drivers.scenarios import (
    Left,
    Positive,
    Right,
    Texts,
    counted,
    failing,
    half,
    joined,
    measuring,
    result_told,
    spending,
)
from tests.kit import NEVER, THRICE, Num, node

from stroma import (
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    NodeHooks,
    PipelineChanged,
    RunExists,
    RunStatus,
    StoreError,
    Suspend,
    current_node,
    current_node_or_none,
    map_over,
    parallel,
)
from stroma.hooks.dispatch import HookNotAsync
from stroma.trace import ExecutionResult


class Approval(BaseModel):
    approved: bool


def watching(seen_events: list[Any]) -> NodeHooks:
    """Notes every call of a hook, and what is current during it."""

    def place() -> Any:
        execution = current_node_or_none()
        return None if execution is None else (execution.position, execution.branch, execution.attempt)

    async def run_start(run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        seen_events.append(("run_start", pipeline, state, place()))

    async def run_end(run_id: str, result: ExecutionResult) -> None:
        seen_events.append(("run_end", result.status, result.total_tokens, len(result.trace), place()))

    async def start(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        seen_events.append(("start", node_id, state, place()))

    async def success(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        seen_events.append(("success", node_id, state, tokens, place()))

    async def failure(run_id: str, node_id: str, error: BaseException, kind: FailureClass) -> None:
        seen_events.append(("failure", node_id, str(error), kind, place()))

    async def retry(run_id: str, node_id: str, attempt: int, delay: float, kind: FailureClass) -> None:
        seen_events.append(("retry", node_id, attempt, delay, kind, place()))

    async def skipped(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        seen_events.append(("skipped", node_id, state))

    async def cancelled(run_id: str, node_id: str) -> None:
        seen_events.append(("cancelled", node_id, place()))

    async def suspended(run_id: str, node_id: str, reason: str) -> None:
        seen_events.append(("suspended", node_id, reason, place()))

    async def warning(run_id: str, dimension: str, used: float, limit: float) -> None:
        seen_events.append(("warning", dimension, used, limit))

    return NodeHooks(
        on_run_start=run_start, on_run_end=run_end, on_node_start=start, on_node_success=success,
        on_node_failure=failure, on_node_retry=retry, on_node_skipped=skipped, on_node_cancelled=cancelled,
        on_node_suspended=suspended, on_budget_warning=warning,
    )  # fmt: skip


async def test_hooks_are_told_the_same_in_the_same_order(driver: Any) -> None:
    """Names, order, arguments and what is current: run, attempts, retries, groups around their children, warnings."""
    heard: list[list[Any]] = []
    for one in (driver, LocalDriver()):
        calls: list[str] = []
        events: list[Any] = []
        nodes = [
            failing(calls, "a", TimeoutError("slow")),
            parallel(half(calls, "l", "left", Left), half(calls, "r", "right", Right), max_concurrency=1),
            joined(calls),
            spending(calls, "d", 85),
        ]
        budget = ExecutionBudget(max_tokens_total=100)
        async with one.bind(nodes, policy_map=THRICE, hooks=watching(events), budget=budget) as bound:
            result = await bound.run(Num())
        assert result.status is RunStatus.COMPLETED
        heard.append(events)
    assert heard[0] == heard[1]
    assert [event[0] for event in heard[0]] == [
        "run_start", "start", "failure", "retry", "start", "success",  # a
        "start", "start", "success", "start", "success", "success",  # the group around its children
        "start", "success", "start", "success", "warning", "run_end",
    ]  # fmt: skip


async def test_a_hook_that_raises_changes_nothing(driver: Any) -> None:
    """It is in ``hook_errors``, the run COMPLETED, and the node called once."""

    async def broken(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        raise RuntimeError("no disk")

    calls: list[str] = []
    async with driver.bind([counted(calls, "a")], hooks=NodeHooks(on_node_success=broken)) as bound:
        result = await bound.run(Num())
    assert (result.status, calls) == (RunStatus.COMPLETED, ["a"])
    assert [(e.hook, e.node_id, str(e.exception)) for e in result.hook_errors] == [
        ("on_node_success", "a", "no disk")
    ]


async def test_a_hook_that_is_not_async_is_a_type_error(driver: Any) -> None:
    """It comes out of run() with what was committed; nothing further is called."""
    calls: list[str] = []
    plain: Any = lambda *_: None  # noqa: E731
    hooks = NodeHooks(on_node_success=plain)
    async with driver.bind([counted(calls, "a"), counted(calls, "b")], hooks=hooks) as bound:
        with pytest.raises(HookNotAsync) as caught:
            await bound.run(Num())
    assert calls == ["a"]
    assert caught.value.result is not None
    assert caught.value.result.final_state == Num(n=1)


async def test_bad_input_fires_the_failure_hook_and_no_start(driver: Any) -> None:
    """A trace event and the failure hook, no start hook, and no exception out of run()."""
    calls: list[str] = []
    events: list[Any] = []
    async with driver.bind([counted(calls, "a", input=Positive)], hooks=watching(events)) as bound:
        result = await bound.run(Num())
    assert (result.status, calls) == (RunStatus.FAILED, [])
    assert [(event.node_id, event.outcome, event.input_state) for event in result.trace] == [
        ("a", "failure", {"n": 0})
    ]
    assert result.failure is not None
    assert isinstance(result.failure.exception, ContractViolation)
    assert result.failure.exception.direction == "input"
    assert [event[0] for event in events] == ["run_start", "failure", "run_end"]


async def test_what_is_no_node_and_no_model_is_a_type_error(driver: Any) -> None:
    """Wrong arguments leave run() as exceptions, before anything is begun."""
    async with driver.bind([counted([], "a")]) as bound:
        with pytest.raises(TypeError, match="decorate it with"):
            await bound.runner.run([lambda state: state], Num())
        with pytest.raises(TypeError, match="must be a pydantic model"):
            await bound.runner.run(bound.pipeline, {"n": 1})


async def test_cancelling_reaches_the_node(driver: Any, run_id: str) -> None:
    """The run ends as CANCELLED with the attempt in its trace, its hook is told, and it can be resumed."""
    calls: list[str] = []
    events: list[Any] = []
    started, again = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def waits(state: Num) -> dict[str, int]:
        calls.append("w")
        started.set()
        try:
            if not again.is_set():
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("w")
            raise
        return {"n": state.n + 1}

    nodes = [counted(calls, "a"), node("w", waits), counted(calls, "b")]
    async with driver.bind(nodes, hooks=watching(events)) as bound:
        running = asyncio.create_task(bound.run(Num(), run_id=run_id))
        if driver.name == "temporal":
            await started.wait()
            assert await bound.runner.cancel(run_id)
        else:
            await started.wait()
            next(iter(bound.runner._live.runs)).cancel()  # The store in memory knows no other processes.
        result = await running
        assert result.status is RunStatus.CANCELLED
        assert [(e.node_id, e.outcome) for e in result.trace] == [("a", "success"), ("w", "cancelled")]
        assert result.final_state == Num(n=1)
        assert (calls, ended) == (["a", "w"], ["w"])
        assert [event[0] for event in events] == [
            "run_start",
            "start",
            "success",
            "start",
            "cancelled",
            "run_end",
        ]
        again.set()
        resumed = await bound.go_on(Num(), run_id)
    assert resumed.status is RunStatus.RESUMED
    assert resumed.final_state == Num(n=3)
    assert calls == ["a", "w", "w", "b"]


async def test_cancelling_a_group_cancels_what_is_inside(driver: Any, run_id: str) -> None:
    """Its children are cancelled attempts under one cancelled event; what had ended stays committed."""
    calls: list[str] = []
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def waits(state: Num) -> dict[str, int]:
        calls.append("r")
        while "l" not in calls:
            await asyncio.sleep(0.01)
        started.set()
        await go_on.wait()
        return {"right": 1}

    nodes = [parallel(half(calls, "l", "left", Left), node("r", waits, Num, Right)), joined(calls)]
    async with driver.bind(nodes) as bound:
        running = asyncio.create_task(bound.run(Num(), run_id=run_id))
        await started.wait()
        if driver.name == "temporal":
            trace = await bound.runner.trace(bound.pipeline, run_id)
            while len(trace.trace) == 0 and not _has_child(
                await bound.runner.client.get_workflow_handle(run_id).query("stroma.state", result_type=dict)
            ):
                await asyncio.sleep(0.02)
            await bound.runner.cancel(run_id)
        else:
            await asyncio.sleep(0)
            next(iter(bound.runner._live.runs)).cancel()
        result = await running
        assert result.status is RunStatus.CANCELLED
        assert [(e.node_id, e.outcome) for e in result.trace] == [("parallel(l, r)", "cancelled")]
        inside = result.trace.rows[0].children  # type: ignore[union-attr]
        assert sorted((e.node_id, e.outcome) for e in inside) == [("l", "success"), ("r", "cancelled")]
        go_on.set()
        resumed = await bound.go_on(Num(), run_id)
    assert resumed.status is RunStatus.RESUMED
    assert resumed.final_state == Num(n=2)
    assert sorted(calls) == ["join", "l", "r", "r"]


def _has_child(state: dict[str, Any]) -> bool:
    return bool(state["state"]["tree"]["done"])


@pytest.fixture
def run_id() -> str:
    """One that no other test has: some of them share a server."""
    return uuid.uuid4().hex


def asking(calls: list[str], node_id: str, promised: type[BaseModel] = Num, field: str = "n") -> Any:
    async def func(state: Num) -> dict[str, int]:
        calls.append(node_id)
        execution = current_node()
        answer = execution.signal
        if answer is None:
            raise Suspend(f"may {node_id} go on?", schema=Approval)
        return {field: state.n + (10 if answer.approved else 100)}

    return node(node_id, func, Num, promised)


async def test_a_suspended_run_goes_on_with_its_answer(driver: Any, run_id: str) -> None:
    """SUSPENDED with the reason; the answer is checked; after it the node is called again and the run is RESUMED."""
    heard = []
    for one in (driver, LocalDriver()):
        calls: list[str] = []
        events: list[Any] = []
        nodes = [counted(calls, "a"), asking(calls, "ask"), counted(calls, "b")]
        async with one.bind(nodes, hooks=watching(events)) as bound:
            result = await bound.run(Num(), run_id=run_id)
            assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["may ask go on?"])
            assert result.failure is None
            with pytest.raises(ValueError):
                await bound.runner.signal(run_id, {"approved": "perhaps"})
            await bound.runner.signal(run_id, {"approved": True})
            resumed = await bound.go_on(Num(), run_id)
            with pytest.raises(StoreError, match="is not waiting for an answer"):
                await bound.runner.signal(run_id, {"approved": True})
        assert (resumed.status, resumed.final_state) == (RunStatus.RESUMED, Num(n=12))
        assert calls == ["a", "ask", "ask", "b"]
        heard.append((result_told(result), result_told(resumed), events))
    assert heard[0] == heard[1]


async def test_what_waits_beside_others_does_not_hold_them_up(driver: Any, run_id: str) -> None:
    """In a group the others finish; two that wait are told apart; what had finished is not called again."""
    calls: list[str] = []
    nodes = [
        parallel(
            half(calls, "l", "left", Left),
            asking(calls, "q", Right, "right"),
            asking(calls, "p", Left, "left"),
        ),
        joined(calls),
    ]
    async with driver.bind(nodes) as bound:
        result = await bound.run(Num(), run_id=run_id)
        assert result.status is RunStatus.SUSPENDED
        assert sorted(result.suspended) == ["may p go on?", "may q go on?"]
        with pytest.raises(ValueError, match="select one with"):
            await bound.runner.signal(run_id, {"approved": True})
        await bound.runner.signal(run_id, {"approved": True}, node_id="q")
        await bound.runner.signal(run_id, {"approved": False}, node_id="p")
        resumed = await bound.go_on(Num(), run_id)
    assert (resumed.status, resumed.final_state) == (RunStatus.RESUMED, Num(n=110))
    assert sorted(calls) == ["join", "l", "p", "p", "q", "q"]


async def test_a_run_that_gave_up_is_resumed_where_it_stopped(driver: Any, run_id: str) -> None:
    """Committed nodes are skipped, and told as skipped; the budget remembers them, the totals do not."""
    heard = []
    for one in (driver, LocalDriver()):
        calls: list[str] = []
        events: list[Any] = []
        nodes = [
            spending(calls, "a", 70),
            map_over_texts(calls),
            spending(calls, "d", 20),
        ]
        async with one.bind(nodes, policy_map=NEVER, hooks=watching(events), budget=ExecutionBudget(max_tokens_total=100)) as bound:  # fmt: skip
            result = await bound.run(Num(n=3), run_id=run_id)
            assert result.status is RunStatus.PARTIAL
            resumed = await bound.go_on(Num(n=3), run_id)
        assert resumed.status is RunStatus.RESUMED
        assert resumed.total_tokens == 20
        assert calls == ["a", "flaky", "flaky", "d"]
        heard.append((result_told(result), result_told(resumed), events))
    assert heard[0] == heard[1]


def map_over_texts(calls: list[str]) -> Any:
    return failing(calls, "flaky", ValueError("not yet"))


async def test_items_that_are_done_are_not_run_again(driver: Any, run_id: str) -> None:
    """On resume only the items of a map that did not finish run."""
    calls: list[str] = []
    broken = [True]

    class Text(BaseModel):
        text: str

    class Length(BaseModel):
        length: int

    async def func(state: Text) -> dict[str, int]:
        calls.append(state.text)
        if state.text == "cc" and broken[0]:
            raise ValueError("not yet")
        return {"length": len(state.text)}

    nodes = [map_over("texts", node("length", func, Text, Length), into="lengths", max_concurrency=1)]
    async with driver.bind(nodes, policy_map=NEVER) as bound:
        state = Texts(texts=["a", "bb", "cc", "dd"])
        result = await bound.run(state, run_id=run_id)
        assert (result.status, calls) == (RunStatus.PARTIAL, ["a", "bb", "cc"])
        broken[0] = False
        resumed = await bound.go_on(state, run_id)
    assert resumed.status is RunStatus.RESUMED
    assert calls == ["a", "bb", "cc", "cc", "dd"]
    assert resumed.final_state is not None
    assert [one["length"] for one in resumed.final_state.model_dump()["lengths"]] == [1, 2, 2, 2]


@pytest.mark.parametrize("shape", ["parallel", "map", "map of a sequence"])
async def test_what_crossed_the_budget_inside_of_a_group_is_not_called_again(
    driver: Any, run_id: str, shape: str
) -> None:
    """It was paid for and is committed: a resume with a larger budget goes on with what was not called."""
    calls: list[str] = []

    class Text(BaseModel):
        text: str

    class Length(BaseModel):
        length: int

    async def measured(state: Text) -> Any:
        calls.append(state.text)
        return {"length": len(state.text)}, 60

    async def left(state: Num) -> Any:
        calls.append("l")
        return {"left": state.n + 1}, 120

    measure = node("length", measured, Text, Length)
    each = [node("same", lambda state: {"text": state.text}, Text, Text), measure]
    nodes: list[Any]
    state: BaseModel
    if shape == "parallel":
        state, calls_made, left_over = Num(), ["l"], ["r", "join"]
        group = parallel(node("l", left, Num, Left), half(calls, "r", "right", Right), max_concurrency=1)
        nodes = [group, joined(calls)]
    else:
        state, calls_made, left_over = Texts(texts=["a", "bb", "cc"]), ["a", "bb"], ["cc"]
        nodes = [map_over("texts", measure if shape == "map" else each, into="lengths", max_concurrency=1)]
    async with driver.bind(nodes, budget=ExecutionBudget(max_tokens_total=100)) as bound:
        result = await bound.run(state, run_id=run_id)
        assert (result.status, result.total_tokens, calls) == (RunStatus.PARTIAL, 120, calls_made)
    calls.clear()
    async with driver.bind(nodes, budget=ExecutionBudget(max_tokens_total=1000)) as bound:
        resumed = await bound.go_on(state, run_id)
    assert (resumed.status, calls) == (RunStatus.RESUMED, left_over)


async def test_an_item_whose_usage_cannot_be_counted_is_a_failure_and_no_output(any_driver: Any) -> None:
    """A collecting map has each item once, though the output of such an item is committed."""

    class Text(BaseModel):
        text: str

    class Length(BaseModel):
        length: int

    async def measured(state: Text) -> Any:
        model = "nobody-knows" if state.text == "bb" else "gpt-4o-mini"
        return {"length": len(state.text)}, 10, 0, model

    measure = node("length", measured, Text, Length)
    nodes = [map_over("texts", measure, into="lengths", on_item_failure="collect")]
    config: dict[str, Any] = {"policy_map": NEVER, "budget": ExecutionBudget(max_cost_usd=1)}
    async with any_driver.bind(nodes, **config) as bound:
        result = await bound.run(Texts(texts=["a", "bb", "ccc"]))
    assert (result.status, result.failed_items) == (RunStatus.COMPLETED, 1)
    assert result.final_state is not None
    assert [one["length"] for one in result.final_state.model_dump()["lengths"]] == [1, 3]


async def test_nodes_of_an_item_that_are_done_are_not_run_again(driver: Any, run_id: str) -> None:
    """On resume an item continues with the node that did not finish, and the others with theirs."""
    calls: list[str] = []
    nodes = [map_over("texts", measuring(calls, failing_at="bc"), into="lengths", max_concurrency=1)]
    fixed = [map_over("texts", measuring(calls), into="lengths", max_concurrency=1)]
    state = Texts(texts=["a", "bc", "d"])
    async with driver.bind(nodes, policy_map=NEVER) as bound:
        result = await bound.run(state, run_id=run_id)
        assert (result.status, calls) == (RunStatus.PARTIAL, ["read", "doubled", "length", "read", "doubled"])
    calls.clear()
    async with driver.bind(fixed, policy_map=NEVER) as bound:
        resumed = await bound.go_on(state, run_id)
    assert resumed.status is RunStatus.RESUMED
    assert calls == ["doubled", "length", "read", "doubled", "length"]
    assert resumed.final_state is not None
    assert [one["length"] for one in resumed.final_state.model_dump()["lengths"]] == [4, 8, 4]


async def test_an_item_waits_for_a_person_between_two_nodes(driver: Any, run_id: str) -> None:
    """The other items go through all of their nodes meanwhile; after the answer only what was not done is called."""
    calls: list[str] = []

    class Numbers(BaseModel):
        numbers: list[Num]

    async def doubtful(state: Num) -> dict[str, int]:
        calls.append(f"ask {state.n}")
        if state.n == 2 and current_node().signal is None:
            raise Suspend("may it go on?", schema=Approval)
        return {"n": state.n}

    steps = [counted(calls, "a"), node("ask", doubtful), counted(calls, "b")]
    async with driver.bind([map_over("numbers", steps, into="done", max_concurrency=1)]) as bound:
        state = Numbers(numbers=[Num(n=n) for n in range(3)])
        result = await bound.run(state, run_id=run_id)
        assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["may it go on?"])
        assert calls == ["a", "ask 1", "b", "a", "ask 2", "a", "ask 3", "b"]
        calls.clear()
        await bound.runner.signal(run_id, {"approved": True})
        resumed = await bound.go_on(state, run_id)
    assert calls == ["ask 2", "b"]
    assert resumed.final_state is not None
    assert [one["n"] for one in resumed.final_state.model_dump()["done"]] == [2, 3, 4]


async def test_an_id_that_was_used(driver: Any, run_id: str) -> None:
    """By default a new execution; "error" refuses, "return" gives what it came to, another input cannot be resumed."""
    calls: list[str] = []
    async with driver.bind([counted(calls, "a")]) as bound:
        first = await bound.run(Num(), run_id=run_id)
        assert first.status is RunStatus.COMPLETED
        second = await bound.run(Num(n=5), run_id=run_id)
        assert (second.status, second.final_state) == (RunStatus.COMPLETED, Num(n=6))
        with pytest.raises(RunExists):
            await bound.run(Num(n=5), run_id=run_id, if_exists="error")
        with pytest.raises(PipelineChanged):
            await bound.run(Num(n=6), run_id=run_id, resume=True)
        again = await bound.run(Num(n=5), run_id=run_id, if_exists="return")
        assert again.final_state == Num(n=6)
        assert again.status is RunStatus.COMPLETED
        resumed = await bound.run(Num(n=5), run_id=run_id, resume=True)
        assert resumed.status is RunStatus.RESUMED
    assert calls == ["a", "a"]


async def test_many_runs_at_once(driver: Any) -> None:
    """The outcomes are in the order of the inputs, and each is told as it comes."""
    calls: list[str] = []
    events: list[int] = []
    async with driver.bind([counted(calls, "a")]) as bound:
        results = await bound.runner.run_many(
            bound.pipeline, [Num(n=n) for n in range(5)], on_result=lambda number, _: events.append(number)
        )
    assert [result.final_state for result in results] == [Num(n=n + 1) for n in range(5)]
    assert sorted(events) == list(range(5))


async def test_a_node_knows_where_it_is(driver: Any, run_id: str) -> None:
    """Run id, pipeline, position, branch, attempt, the last failure, and a key that all attempts of an execution share."""
    seen: list[Any] = []

    async def func(state: Num) -> dict[str, int]:
        execution = current_node()
        last = execution.last_failure
        seen.append((
            execution.run_id, execution.pipeline, execution.node_id, execution.position, execution.branch,
            execution.attempt, execution.kind, execution.idempotency_key, None if last is None else str(last.exception),
        ))  # fmt: skip
        if execution.branch and execution.attempt == 1:
            raise ValueError("not yet")
        return {"n": state.n + 1}

    nodes = [node("a", func), parallel(node("a", func))]
    async with driver.bind(nodes, policy_map=THRICE) as bound:
        await bound.run(Num(), run_id=run_id)
        await bound.run(Num(), run_id=run_id)
    expected = [
        [
            (run_id, "pipe", "a", 0, "", 1, "node", f"{run_id}:{execution}:0:", None),
            (run_id, "pipe", "a", 1, "0", 1, "node", f"{run_id}:{execution}:1:0", None),
            (run_id, "pipe", "a", 1, "0", 2, "node", f"{run_id}:{execution}:1:0", "not yet"),
        ]
        for execution in (1, 2)
    ]
    assert seen == [*expected[0], *expected[1]]


async def test_a_stream_ends_with_the_result(driver: Any) -> None:
    """Each attempt's end in order, and at last the result that run() gives."""
    calls: list[str] = []
    async with driver.bind([failing(calls, "a", TimeoutError("slow")), counted(calls, "b")], policy_map=THRICE) as bound:  # fmt: skip
        events = [event async for event in bound.runner.stream(bound.pipeline, Num())]
    ends = [(e.kind, e.node_id, e.attempt) for e in events if e.event is not None]
    assert ends == [("node_failure", "a", 1), ("node_success", "a", 2), ("node_success", "b", 1)]
    assert events[0].kind == "run_start"
    assert events[-1].kind == "run_end"
    assert events[-1].result is not None
    assert events[-1].result.status is RunStatus.COMPLETED
    assert [e.number for e in events] == list(range(1, len(events) + 1))
