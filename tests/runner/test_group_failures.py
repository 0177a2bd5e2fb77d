"""Groups, in what a run in good order never shows: what is tried again, is kept, or stops the run."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.event_log import Between, Journal, M, contract, counted
from tests.kit import NEVER, ONCE, THRICE, TWICE, Num, context_of, here, node, retry_policies

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    NodeHooks,
    RunStatus,
    StoreError,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
)


class Busy(Exception):
    status_code = 429

    def __init__(self, seconds: int) -> None:
        super().__init__("slow down")
        self.headers = {"Retry-After": str(seconds)}


async def test_a_group_fails_as_its_child_did() -> None:
    """It has the child's exception, class, message, reason and wait, under its own name and attempt."""
    error = Busy(500)
    nodes = [parallel(counted([], "a", error))]
    result = await StromaRunner.quick(policy_map=THRICE).run(nodes, Num())
    failure = result.failure
    assert failure.exception is error
    assert (failure.failure_class, failure.message) == (FailureClass.RECOVERABLE, "slow down")
    assert failure.reason == "rate_limit"
    assert (failure.retry_after_seconds, failure.node_id, failure.attempt) == (500, "parallel(a)", 1)


class Many(BaseModel):
    nums: list[Num]


@pytest.mark.parametrize("way", ["parallel", "map"])
async def test_the_cause_is_the_child_that_stopped_the_group(way: str) -> None:
    """The cause of a failed run is the child that stopped it, not a one with its text and more tries."""
    retried, store = asyncio.Event(), AsyncInMemoryStore()

    async def call(state: Num) -> Num:
        if state.n:
            await retried.wait()
            raise Busy(500)  # Beyond ``max_retry_after_seconds``: no further attempt.
        if here().attempt == 3:
            retried.set()
            await asyncio.Future()
        raise Busy(0)

    async def last(state: Num) -> Num:
        return await call(Num(n=1))

    first: BaseModel
    if way == "parallel":
        nodes, first = [parallel(node("a", call), node("b", last))], Num(n=0)
    else:
        nodes, first = [map_over("nums", node("b", call), into="nums")], Many(nums=[Num(n=0), Num(n=1)])
    runner = StromaRunner.quick(store=store, policy_map=THRICE)
    await runner.run(nodes, first, run_id="r")
    cause = store.get_run("r").cause
    assert (cause.node_id, cause.branch, cause.attempt) == ("b", "1", 1)


@pytest.mark.parametrize("retries", [0, 2])
async def test_a_group_is_tried_as_often_as_its_own_policy_says(retries: int) -> None:
    """Each attempt of it gives its children all of theirs; what they committed is not called again."""
    calls: list[str] = []
    own = retry_policies(retries)
    down = ConnectionError("down")
    nodes = [parallel(counted(calls, "a", {"n": 1}), counted(calls, "b", down, output=M), max_concurrency=1)]
    runner = StromaRunner.quick(policy_map=ONCE, node_policies={"parallel(a, b)": own})
    result = await runner.run(nodes, Num())
    assert calls == ["a", *["b", "b"] * (retries + 1)]
    assert [(e.node_id, e.attempt) for e in result.trace] == [
        ("parallel(a, b)", number + 1) for number in range(retries + 1)
    ]


async def test_what_a_group_committed_is_forgotten_when_it_is_done() -> None:
    """The same group later in the run calls its children again, as in a group that is tried again."""
    calls: list[str] = []
    down = ConnectionError("down")

    def group() -> Any:
        return parallel(
            counted(calls, "a", {"n": 1}), counted(calls, "b", down, {"m": 2}, output=M), max_concurrency=1
        )

    nodes = [group(), group()]
    runner = StromaRunner.quick(policy_map=NEVER, node_policies={"parallel(a, b)": ONCE})
    assert (await runner.run(nodes, Num())).status is RunStatus.COMPLETED
    assert calls == ["a", "b", "b", "a", "b", "b"]


async def test_groups_inside_a_group_that_is_tried_again() -> None:
    """What is committed inside it is not called again, at any depth: neither nodes nor whole groups."""
    calls: list[str] = []
    down = ConnectionError("down")
    inner = parallel(
        counted(calls, "a", {"n": 1}), counted(calls, "b", {"m": 2}, output=M), max_concurrency=1
    )
    outer = parallel(inner, counted(calls, "c", down, down, {"n": 4}), max_concurrency=1)
    runner = StromaRunner.quick(policy_map=NEVER, node_policies={outer.node_id: TWICE})
    result = await runner.run([outer], Num())
    assert result.status is RunStatus.COMPLETED
    assert calls == ["a", "b", "c", "c", "c"]
    assert result.final_state.model_dump() == {"n": 4, "m": 2}


async def test_a_group_over_the_budget_is_not_tried_again() -> None:
    """Neither by its own policy nor by the run's: nothing more is called, and the run is PARTIAL."""
    calls: list[str] = []
    nodes = [parallel(counted(calls, "a", ({"n": 1}, 11))), counted(calls, "b", {})]
    budget = ExecutionBudget(max_tokens_total=10)
    runner = StromaRunner.quick(policy_map=ONCE, node_policies={"parallel(a)": ONCE}, budget=budget)
    result = await runner.run(nodes, Num())
    assert (result.status, calls, len(result.trace)) == (RunStatus.PARTIAL, ["a"], 1)
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert (result.failure.node_id, result.failure.reason) == ("parallel(a)", "budget")


def keeps_no_output(session: Any) -> Any:
    """A session whose store is full: attempts are noted, and no output is kept."""

    def record(row: Any, schema: Any, output: Any, *call: Any) -> Any:
        if output is not None:
            error = StoreError("full")
            error.transient = False
            raise error
        return session.record(row, schema, output, *call)

    return Between(session, record=record)


@pytest.mark.parametrize("depth", [1, 3])
async def test_a_group_whose_child_was_not_kept_is_not_tried_again(depth: int) -> None:
    """The child's output is lost: no group around it is tried again, and the run is PARTIAL and resumable."""
    calls: list[str] = []
    group: Any = counted(calls, "a", {"n": 1})
    policies: dict[str, Any] = {}
    for _ in range(depth):
        group = parallel(group)
        policies[group.node_id] = ONCE
    runner = StromaRunner.quick(
        store=Journal(keeps_no_output),
        policy_map=ONCE,
        node_policies=policies,
        classifiers=[lambda error, _: FailureClass.TERMINAL],
    )
    result = await runner.run([group], Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["a"])
    assert (result.failure.reason, result.failure.message) == ("store", "full")
    assert result.failure.failure_class is FailureClass.RECOVERABLE


@pytest.mark.parametrize("deep", [False, True])
async def test_siblings_of_what_crossed_a_limit_finish(deep: bool) -> None:
    """What is in flight was paid for: it is kept, also beside a group in which the limit was crossed."""
    calls: list[str] = []
    started, spent = asyncio.Event(), asyncio.Event()

    async def slow(state: Num) -> Any:
        started.set()
        await spent.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        calls.append("slow")
        return {"m": 1}

    async def spends(state: Num) -> Any:
        await started.wait()
        return {"n": 1}, 11

    async def raise_from_hook(*_: Any) -> None:
        spent.set()

    inner = node("a", spends)
    outer = parallel(parallel(parallel(inner)) if deep else inner, node("b", slow, Num, M))
    store = AsyncInMemoryStore()
    runner = StromaRunner.quick(
        store=store,
        policy_map=ONCE,
        node_policies={outer.node_id: ONCE},
        budget=ExecutionBudget(max_tokens_total=10),
        hooks=NodeHooks(on_node_failure=raise_from_hook),
    )
    result = await runner.run([outer], Num(), run_id="r")
    assert (result.status, calls, len(result.trace)) == (RunStatus.PARTIAL, ["slow"], 1)
    assert [row.output for row in store.attempts("r") if row.node_id == "b"] == [b'{"m":1}']


async def test_a_group_whose_childs_failure_was_not_kept_is_not_tried_again() -> None:
    """What a failed child used could not be noted: nothing more is spent, whatever policies say."""
    calls: list[str] = []

    def between(session: Any) -> Any:
        def record(row: Any, *more: Any) -> Any:
            if row[0] == "a":
                error = StoreError("full")
                error.transient = False
                raise error
            return session.record(row, *more)

        return Between(session, record=record)

    inner = parallel(counted(calls, "a", ValueError("no")))
    outer = parallel(inner)
    policies = dict.fromkeys((outer.node_id, inner.node_id), ONCE)
    runner = StromaRunner.quick(store=Journal(between), policy_map=ONCE, node_policies=policies)
    result = await runner.run([outer], Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["a"])
    failure = result.failure
    assert (failure.reason, failure.message, failure.node_id) == ("store", "full", outer.node_id)
    assert failure.failure_class is FailureClass.RECOVERABLE
    assert isinstance(failure.exception, StoreError)


async def test_a_group_deep_inside_which_a_child_was_not_kept_is_not_tried_again() -> None:
    """No group around it is, whatever its policy says; the run can be resumed."""
    calls: list[str] = []

    inner = parallel(counted(calls, "a", {"n": 1}))
    middle = parallel(inner)
    outer = parallel(middle)
    policies = dict.fromkeys((outer.node_id, middle.node_id, inner.node_id), ONCE)
    runner = StromaRunner.quick(store=Journal(keeps_no_output), policy_map=ONCE, node_policies=policies)
    result = await runner.run([outer], Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["a"])


async def test_a_step_over_the_budget_has_its_output() -> None:
    """The result of a step of plain code has what was kept, also of one that took the run over its limit."""
    runner = StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=10))
    ctx = context_of(runner)
    result = await execute_step("a", counted([], "a", ({"n": 5}, 11)), Num(), ctx)
    assert (result.status, result.final_state) == (RunStatus.PARTIAL, Num(n=5))
    again = await execute_step("b", counted([], "b", {"n": 6}), Num(n=7), ctx)
    assert (again.status, again.final_state) == (RunStatus.PARTIAL, Num(n=7))


async def test_a_limit_of_a_run_inside_a_node_is_not_the_runs() -> None:
    """A node whose own pipeline went over its budget has failed: it is tried again as its policy says."""
    calls: list[str] = []

    async def inside(state: Num) -> Any:
        calls.append("a")
        inner = StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=1))
        (await inner.run([counted([], "x", ({"n": 1}, 5))], state)).raise_for_status()

    runner = StromaRunner.quick(policy_map=ONCE, budget=ExecutionBudget(max_tokens_total=100))
    result = await runner.run([node("a", inside)], Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["a", "a"])


async def test_a_group_that_goes_on_runs_what_is_left() -> None:
    """After a resume, and in its further attempts, the committed children are restored, at any depth."""
    calls: list[str] = []
    store, down = AsyncInMemoryStore(), ConnectionError("down")

    def nodes(*outcomes: Any) -> list[Any]:
        inner = parallel(
            counted(calls, "a", {"n": 1}), counted(calls, "b", *outcomes, output=M), max_concurrency=1
        )
        return [parallel(inner, counted(calls, "c", {"n": 4}), max_concurrency=1)]

    first = await StromaRunner.quick(store=store, policy_map=NEVER).run(nodes(down), Num(), run_id="r")
    assert (first.status, calls) == (RunStatus.PARTIAL, ["a", "b"])
    calls.clear()
    again = nodes(down, down, {"m": 5})
    policies = {again[0].node_id: TWICE}
    runner = StromaRunner.quick(store=store, policy_map=NEVER, node_policies=policies)
    result = await runner.run(again, Num(), run_id="r", resume=True)
    assert result.status is RunStatus.RESUMED
    assert calls == ["b", "b", "b", "c"]
    assert result.final_state.model_dump() == {"n": 4, "m": 5}


async def test_where_a_restored_node_stands_is_told() -> None:
    """The hook of a skipped node finds the place it has in the run, and nothing of an attempt."""
    store, events = AsyncInMemoryStore(), list[str]()

    async def skipped(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        events.append(
            f"{node_id} {state} @ {here().kind} {here().position} [{here().branch}] #{here().attempt}"
        )

    group = parallel(counted([], "a", {"n": 1}))
    nodes = [counted([], "z", {"n": 3}), group, counted([], "x", ValueError("no"))]
    await StromaRunner.quick(store=store, policy_map=NEVER).run(nodes, Num(), run_id="r")
    runner = StromaRunner.quick(store=store, policy_map=NEVER, hooks=NodeHooks(on_node_skipped=skipped))
    await runner.run(nodes, Num(), run_id="r", resume=True)
    assert events == ["z {'n': 3} @ node 0 [] #0", "parallel(a) {'n': 1} @ group 1 [] #0"]


async def test_groups_side_by_side_in_plain_code() -> None:
    """What one group committed outlives another's end: each is tried again with its own."""
    calls: list[str] = []
    other_done = asyncio.Event()

    async def waits(state: Num) -> Any:
        calls.append("b")
        await other_done.wait()
        if calls.count("b") == 1:
            raise ConnectionError("down")
        return {"m": 2}

    first = parallel(counted(calls, "a", {"n": 1}), node("b", waits, Num, M), max_concurrency=1)
    second = parallel(counted(calls, "c", {"n": 3}))
    runner = StromaRunner.quick(policy_map=NEVER, node_policies={first.node_id: ONCE})
    ctx = context_of(runner)

    async def then() -> Any:
        while "b" not in calls:
            await asyncio.sleep(0)
        result = await execute_step("second", second, Num(), ctx)
        other_done.set()
        return result

    results = await asyncio.gather(execute_step("first", first, Num(), ctx), then())
    assert [result.status for result in results] == [RunStatus.COMPLETED, RunStatus.COMPLETED]
    assert calls == ["a", "b", "c", "b"]


async def test_a_step_that_was_kept_under_a_contract_of_its_own() -> None:
    """A resumed step is read with the contract of the call, and is the n-th call of its id."""
    store, calls = AsyncInMemoryStore(), list[str]()
    own = contract("a", Num, M)

    async def plain() -> list[Any]:
        runner = StromaRunner.quick(store=store, run_id="r", resume=True)
        ctx = context_of(runner)
        async with ctx:
            results = [
                await execute_step(
                    "a", counted(calls, "a", {"n": 1, "m": number}), Num(n=number), ctx, contract=own
                )
                for number in (1, 2)
            ]
        return [result.final_state for result in results]

    assert await plain() == [M(m=1), M(m=2)]
    assert await plain() == [M(m=1), M(m=2)]
    assert calls == ["a", "a"]
