"""Attempts that are not made, and those that a shared budget or a limit has to be told of."""

import asyncio
from typing import Any

from tests.engine.event_log import counted
from tests.kit import NEVER, ONCE, Num, Positive, cancel, cancel_after, node, noting, stuck

from stroma import (
    AsyncInMemoryStore,
    ExecutionBudget,
    Limit,
    NodeHooks,
    RunStatus,
    SharedBudget,
    StoreError,
    StromaRunner,
    parallel,
)

BAD = {"n": "none"}


async def test_a_group_whose_child_was_refused_by_a_store_is_not_tried_again() -> None:
    """Where a shared budget is unknown, no group around the child asks again, whatever its policy says."""
    requests: list[str] = []

    class Down(AsyncInMemoryStore):
        def change_cell(self, *_: Any, **__: Any) -> Any:
            requests.append("asked")
            raise StoreError("down")

    retry = noting(requests, lambda run_id, node_id, *_: f"retry of {node_id}")
    inner = parallel(counted(requests, "a", {}))
    outer = parallel(inner)
    runner = StromaRunner.quick(
        shared_budgets=SharedBudget("held-down-inside", max_tokens=10, store=Down()),
        policy_map=ONCE,
        node_policies=dict.fromkeys((outer.node_id, inner.node_id), ONCE),
        hooks=NodeHooks(on_node_retry=retry),
    )
    result = await runner.run([outer], Num())
    assert (result.status, requests) == (RunStatus.PARTIAL, ["asked"])
    assert (result.failure.reason, result.failure.node_id) == ("store", outer.node_id)


async def test_a_classifier_is_told_where_it_is_asked() -> None:
    """For each failure, a crossed limit and a refusal too, it is given the node, the attempt and the run."""
    requests: list[Any] = []

    def ask(error: Exception, where: Any) -> None:
        requests.append((type(error).__name__, where.node_id, where.attempt, where.run_id))

    runner = StromaRunner.quick(
        policy_map=ONCE,
        classifiers=[ask],
        contract_retries={"b": 1},
        budget=ExecutionBudget(max_tokens_total=10),
    )
    flaky = counted([], "a", ValueError("no"), {"n": 1})
    nodes = [flaky, counted([], "b", BAD, {"n": 2}), counted([], "c", ({"n": 3}, 11))]
    await runner.run(nodes, Num(), run_id="told")
    await runner.run([counted([], "d", {}, input=Positive)], Num(), run_id="told too")
    assert requests == [
        ("ValueError", "a", 1, "told"),
        ("ContractViolation", "b", 1, "told"),
        ("BudgetExceeded", "c", 1, "told"),
        ("ContractViolation", "d", 1, "told too"),
    ]


async def test_a_cancellation_while_a_budget_is_told_comes_out_afterwards() -> None:
    """What the attempt took is counted and its output kept, and the next node is not called."""
    started, calls, settled = asyncio.Event(), list[str](), list[int]()

    class Slow(AsyncInMemoryStore):
        async def change_cell(self, name: str, change: Any) -> Any:
            if calls:
                started.set()
                for _ in range(3):
                    await asyncio.sleep(0)
                settled.append(1)
            return await super().change_cell(name, change)

    shared = SharedBudget("held-slow", max_tokens=100, store=Slow(), reserve_tokens=1)
    store = AsyncInMemoryStore()
    runner = StromaRunner.quick(shared_budgets=shared, store=store)
    nodes = [counted(calls, "a", ({"n": 1}, 7)), counted(calls, "b", {})]
    await cancel_after(runner.run(nodes, Num(), run_id="r"), started)
    assert calls == ["a"]
    state = await shared.state()
    assert (state.spent_tokens, state.reserved_tokens) == (7, 0)
    assert [(row.outcome, row.output) for row in store.attempts("r")] == [("success", b'{"n":1}')]


async def test_a_cancelled_attempt_gives_its_place_back() -> None:
    """Under a limit of one at once the next attempt begins when the one before was cancelled or failed."""
    limits = {"held-one": Limit(concurrent=1)}
    started = asyncio.Event()

    def runner() -> StromaRunner:
        return StromaRunner.quick(policy_map=NEVER, limits=limits, node_limits={"a": "held-one"})

    task = asyncio.create_task(runner().run([node("a", stuck(started))], Num()))
    await started.wait()
    waiting = asyncio.create_task(runner().run([counted([], "a", ValueError("no"))], Num()))
    await asyncio.sleep(0)
    assert not waiting.done()
    await cancel(task)
    assert (await waiting).status is RunStatus.PARTIAL
    assert (await runner().run([counted([], "a", {"n": 1})], Num())).status is RunStatus.COMPLETED
