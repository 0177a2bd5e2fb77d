"""Children of groups that end, fail or are cancelled beside one another."""

import asyncio
import collections
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.kit import (
    NEVER,
    ONCE,
    TWICE,
    Num,
    One,
    Three,
    Two,
    bare,
    context_on,
    forever,
    node,
    quick,
    quick_without_retries,
    record_hooks,
    record_node_hooks,
    same,
)
from tests.shared_stores import IN_PROCESS

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ExecutionBudget,
    FailureClass,
    InMemoryStore,
    Limit,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    SharedBudget,
    current_node,
    execute_step,
    parallel,
)


@pytest.mark.core
@pytest.mark.parametrize("queue", ["max_concurrency", "max_threads", "limit", "shared budget"])
async def test_children_that_wait_are_not_called_after_a_crossed_limit(queue: str) -> None:
    """A child that waits for its turn when a limit is crossed is not begun: no event, no call, no hook."""
    seen: list[str] = []

    def child(name: str, tokens: int) -> Any:
        def func(state: Num) -> Any:
            seen.append(name)
            return {"n": 1}, tokens

        async def async_func(state: Num) -> Any:
            await asyncio.sleep(0)
            return func(state)

        return node(name, func if queue == "max_threads" else async_func)

    refused: list[str] = []

    def classify(error: Exception, context: Any) -> None:
        # Every child that is begun and refused for the budget is classified; one that is not begun is not.
        if isinstance(error, BudgetExceeded):
            refused.append(context.node_id)

    bound = 1 if queue == "max_concurrency" else None
    group = parallel(child("dear", 11), child("queued", 1), child("last", 1), max_concurrency=bound)
    options: dict[str, Any] = {
        "max_threads": {"max_threads": 1},
        "limit": {
            "limits": {"one": Limit(concurrent=1)},
            "node_limits": dict.fromkeys(["dear", "queued", "last"], "one"),
        },
        "shared budget": {"shared_budgets": SharedBudget("team", max_tokens=100)},
    }
    budget = ExecutionBudget(max_tokens_total=10)
    runner = quick(budget=budget, classifiers=[classify], **options.get(queue, {}))
    result = await runner.run([group], Num())
    assert (result.status, seen) == (RunStatus.PARTIAL, ["dear"])
    assert {event.node_id for event in result.trace.walk()} == {group.node_id, "dear"}
    assert isinstance(result.failure and result.failure.exception, BudgetExceeded)
    if queue == "max_concurrency":
        assert refused == ["dear"]


class Other(BaseModel):
    m: int = 0


async def test_siblings_are_cancelled_in_the_order_of_their_starts() -> None:
    """What a group does when a child fails is always the same: even the order of cancellations."""
    ended: list[str] = []
    all_wait = asyncio.Event()

    def child(name: str) -> Any:
        async def func(state: Num) -> Any:
            try:
                if name == "last":
                    all_wait.set()
                    raise ValueError("no")
                await all_wait.wait()
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        return node(name, func)

    names = [f"n{index}" for index in range(30)]
    for _ in range(5):
        ended.clear()
        all_wait.clear()
        result = await quick_without_retries().run([parallel(*map(child, [*names, "last"]))], Num())
        assert result.status is not RunStatus.COMPLETED
        assert ended == ["last", *names]


@pytest.mark.core
async def test_a_child_that_was_restored_is_restored_once() -> None:
    """A group that is tried again after a resume neither calls nor restores again what it has restored."""
    store, seen, left = AsyncInMemoryStore(), list[str](), [2]

    async def flaky(state: Num) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError
        return {"m": 1}

    nodes = [parallel(node("a", same), node("b", flaky, output=Other))]
    assert (
        await quick_without_retries(store=store).run(nodes, Num(), run_id="r")
    ).status is RunStatus.PARTIAL
    policies = {"parallel(a, b)": ONCE}
    runner = quick_without_retries(store=store, node_policies=policies, hooks=record_hooks(seen))
    assert (await runner.run(nodes, Num(), run_id="r", resume=True)).status is RunStatus.RESUMED
    assert seen.count("skipped a") == 1
    assert "start a" not in seen


class Asked(Exception):
    """What an HTTP client raises when the server asks to wait."""

    status_code = 429
    response = type("Response", (), {"status_code": 429, "headers": {"retry-after": "7"}})


async def test_a_groups_retry_obeys_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: what the server asked a child to wait is waited for by the group that is tried again."""
    delays: list[float] = []
    calls: list[int] = []

    async def note(delay: float) -> None:
        delays.append(delay)

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise Asked
        return {"n": 1}

    monkeypatch.setattr("stroma.engine.loop.sleep", note)
    group = parallel(node("a", func))
    result = await quick(policy_map=NEVER, node_policies={group.node_id: TWICE}).run([group], Num())
    assert (result.status, delays) == (RunStatus.COMPLETED, [7.0])


R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


def context(config: RunConfig) -> ReliabilityContext:
    return context_on(AsyncInMemoryStore(), config)


store = store_fixture(*IN_PROCESS)


@pytest.mark.parametrize("how", ["failure", "timeout"])
async def test_a_child_interrupted_while_it_is_committed_is_not_called_again(how: str) -> None:
    """A child being committed when its group failed or timed out is kept, and is not called again."""
    calls: collections.Counter[str] = collections.Counter()
    saving, release = asyncio.Event(), asyncio.Event()

    class Slow:
        def __init__(self) -> None:
            self.inner = AsyncInMemoryStore()
            self.load, self.delete = self.inner.load, self.inner.delete

        async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            saving.set()
            await release.wait()
            await self.inner.save(run_id, node_id, state)

    async def a(state: Num) -> Any:
        calls["a"] += 1
        return {"a": 1}

    async def b(state: Num) -> Any:
        calls["b"] += 1
        if calls["b"] > 1:
            return {"b": 1}
        await saving.wait()
        try:
            if how == "timeout":
                await forever()
            asyncio.get_running_loop().call_soon(release.set)
            raise ValueError("b")
        except asyncio.CancelledError:
            release.set()
            raise

    group = parallel(node("a", a, output=One), node("b", b, output=Two))
    runner = quick_without_retries(
        store=Slow(),
        node_policies={group.node_id: TWICE},
        node_timeouts={group.node_id: 50} if how == "timeout" else {},
    )
    result = await runner.run([group], Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert calls == {"a": 1, "b": 2}
    first = next(iter(result.trace))
    assert first.failure is (R if how == "timeout" else A)


async def test_steps_side_by_side_do_not_forget_each_others_children() -> None:
    """Two steps of one context run at once: the end of one reruns no child of the other's group."""
    calls: list[str] = []
    failed, other_done = asyncio.Event(), asyncio.Event()

    async def a(state: Num) -> Any:
        calls.append("a")
        return {"a": 1}, 3

    async def b(state: Num) -> Any:
        calls.append("b")
        if calls.count("b") == 1:
            for _ in range(20):  # a is committed by then
                await asyncio.sleep(0)
            raise ValueError("b")
        return {"b": 1}

    async def other(state: Num) -> Any:
        await failed.wait()
        return {"n": 2}, 4

    async def failure(run_id: str, node_id: str, *_: Any) -> None:
        if node_id == group.node_id:
            failed.set()
            await other_done.wait()

    async def success(run_id: str, node_id: str, *_: Any) -> None:
        if node_id == "other":
            other_done.set()

    group = parallel(bare("a", a), bare("b", b))
    hooks = NodeHooks(on_node_failure=failure, on_node_success=success)
    ctx = context(RunConfig(policy_map=NEVER, node_policies={group.node_id: {A: TWICE[A]}}, hooks=hooks))
    first, second = await asyncio.gather(
        execute_step("g", group, Num(), ctx), execute_step("other", other, Num(), ctx)
    )
    assert (first.status, second.status) == (RunStatus.COMPLETED, RunStatus.COMPLETED)
    assert calls == ["a", "b", "b"]
    assert ctx.cost_tracker.total_tokens == 7
    assert second.final_state == Num(n=2)


async def test_many_steps_of_one_context_at_once(store: Any) -> None:
    """Steps begun side by side on one context open its run once, each with its place, key and event."""
    ctx = context_on(store, RunConfig(run_id="side"))
    keys: list[str] = []

    async def step(state: Num) -> Any:
        keys.append(current_node().idempotency_key)
        await asyncio.sleep(0)
        return {"n": state.n + 1}, 1

    results = await asyncio.gather(*(execute_step("step", step, Num(n=i), ctx) for i in range(20)))
    assert [r.final_state for r in results] == [Num(n=i + 1) for i in range(20)]
    assert len(set(keys)) == 20
    assert ctx.cost_tracker.total_tokens == 20
    assert len(ctx.trace) == 20
    assert ctx.execution == 1


async def test_a_crossed_budget_comes_before_a_siblings_failure() -> None:
    """Once a child has crossed the budget, a failing sibling cancels nobody; the run stops as PARTIAL."""
    entry = InMemoryStore()
    crossed, broken, started = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Refused(Exception):
        status_code = 401

    async def over(state: Num) -> Any:
        await started.wait()
        return {"a": 1}, 100

    async def bad(state: Num) -> Any:
        await crossed.wait()
        raise Refused("bad key")

    async def slow(state: Num) -> Any:
        started.set()
        await broken.wait()
        for _ in range(20):  # Time enough for a cancellation to arrive.
            await asyncio.sleep(0)
        return {"c": 1}

    async def failure(run_id: str, node_id: str, *_: Any) -> None:
        {"over": crossed, "bad": broken}.get(node_id, asyncio.Event()).set()

    group = parallel(
        node("over", over, output=One), node("bad", bad, output=Two), node("slow", slow, output=Three)
    )
    result = await quick_without_retries(
        store=entry,
        run_id="r",
        budget=ExecutionBudget(max_tokens_total=10),
        hooks=NodeHooks(on_node_failure=failure),
    ).run([group], Num())
    assert result.status is RunStatus.PARTIAL
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert result.failure.exception.node_id == "over"
    assert entry.load("r", "over") == One(a=1)
    assert entry.load("r", "slow") == Three(c=1)
    (event,) = result.trace
    assert {e.node_id: e.failure for e in event.children} == {"over": R, "bad": T, "slow": R}


async def test_a_childs_own_budget_error_cancels_its_siblings() -> None:
    """A child whose own run went over its own budget fails like any other: its siblings are cancelled."""
    seen: list[str] = []

    async def over(state: Num) -> Any:
        await asyncio.sleep(0)
        raise BudgetExceeded("tokens", 1, 2, "inside")

    async def wait(state: Num) -> Any:
        await asyncio.wait_for(asyncio.Event().wait(), 1)

    group = parallel(node("a", over), node("b", wait))
    result = await quick(policy_map=NEVER, hooks=record_node_hooks(seen)).run([group], Num())
    assert result.status is RunStatus.PARTIAL
    assert seen == ["start", "start", "start", "failure", "cancelled", "failure"]
