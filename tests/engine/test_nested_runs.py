"""Runs inside of nodes: their errors and deadlines, as the outer run sees them."""

from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import TWICE, Num, One, failing_with, forever, give_one, node, quick, quick_without_retries
from tests.shared_stores import IN_PROCESS

from stroma import (
    BudgetExceeded,
    ContractViolation,
    CorruptCheckpoint,
    ExecutionBudget,
    FailureClass,
    NodeContext,
    NodeHooks,
    PipelineChanged,
    RunStatus,
    SQLiteStore,
    StoreError,
    parallel,
)
from stroma.hooks.dispatch import HookNotAsync


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "status", "attempts"),
    [
        (PipelineChanged, RunStatus.FAILED, 1),  # Another attempt would meet the same.
        (CorruptCheckpoint, RunStatus.PARTIAL, 3),
        (StoreError, RunStatus.PARTIAL, 3),
    ],
)
async def test_errors_of_a_nested_run_are_failures_of_the_node(
    kind: type[Exception], status: RunStatus, attempts: int
) -> None:
    """What a node's own run raises is a failure of the node: a result with that error, not an exception."""
    result = await quick().run([node("a", failing_with(kind, "of another run"))], Num())
    assert (result.status, len(result.trace)) == (status, attempts)
    assert type(result.failure.exception) is kind


R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


store = store_fixture(*IN_PROCESS)


async def _unopened() -> None:
    await SQLiteStore("/dev/null/x.db").save("a", "b", Num())


async def _sync_hook() -> None:
    hooks = NodeHooks(on_node_start=lambda *_: len(_))
    await quick_without_retries(hooks=hooks).run([node("i", give_one, output=One)], Num())


async def _deadline() -> None:
    async def slow(state: Num) -> Any:
        await forever()

    budget = ExecutionBudget(max_latency_ms=1)
    result = await quick_without_retries(budget=budget).run([node("i", slow)], Num())
    result.raise_for_status()


NESTED = [(_unopened, StoreError, A), (_sync_hook, HookNotAsync, A), (_deadline, BudgetExceeded, R)]


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("budget", [None, 60_000])
@pytest.mark.parametrize(("inner", "error", "kind"), NESTED, ids=lambda p: getattr(p, "__name__", None))
async def test_errors_of_a_run_within_a_node_are_failures_like_any_other(
    inner: Any, error: type[Exception], kind: FailureClass, budget: int | None, in_group: bool, store: Any
) -> None:
    """What a run or a store of the node's own raises is that node's failure: classified and retried."""
    requests: list[type[BaseException]] = []
    calls: list[int] = []
    recover_at = [99]

    async def outer(state: Num) -> Any:
        calls.append(1)
        if len(calls) < recover_at[0]:
            await inner()
        return {"a": 1}

    def look(exc: Exception, _: NodeContext) -> None:
        requests.append(type(exc))

    outer_node: Any = node("outer", outer, output=One)
    nodes = [parallel(outer_node)] if in_group else [outer_node]
    limits = ExecutionBudget(max_latency_ms=budget)
    runner = quick_without_retries(store=store, policy_map=TWICE, classifiers=[look], budget=limits)
    result = await runner.run(nodes, Num())
    assert result.status is RunStatus.PARTIAL
    assert isinstance(result.failure.exception, error)
    assert result.failure.failure_class is kind
    assert len(calls) == 3
    assert len(requests) == 3
    assert all(issubclass(a, error) for a in requests)
    assert [e.failure for e in result.trace.walk() if e.node_id == "outer"] == [kind] * 3

    calls.clear()
    recover_at[0] = 3
    assert (await runner.run(nodes, Num())).status is RunStatus.COMPLETED
    assert len(calls) == 3

    calls.clear()
    recover_at[0] = 99
    result = await runner.with_classifiers([lambda exc, _: T]).run(nodes, Num())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)


@pytest.mark.core
async def test_a_violation_inside_a_node_is_not_repaired() -> None:
    """contract_retries is about a node's own output, not about a violation in a run that the node made."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        raise ContractViolation("inside", "output", {}, [])

    result = await quick(contract_retries={"a": 3}).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)
