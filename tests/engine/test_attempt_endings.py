"""Rules that an ordinary run never shows: whose cancellation, whose contract, whose hook it is."""

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field, RootModel
from tests.engine.event_log import Between, Diary, Journal, M, counted, same, swallow
from tests.kit import (
    NEVER,
    ONCE,
    THRICE,
    Num,
    Positive,
    context_of,
    failing_with,
    here,
    node,
    returning,
    stuck,
)

from stroma import (
    AsyncInMemoryStore,
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    StromaRunner,
    Suspend,
    execute_step,
    parallel,
)
from stroma.engine.context import INTERCEPTORS, Interceptor


async def test_a_run_in_a_task_that_was_cancelled_before() -> None:
    """The driver's own count is taken when it begins: an old cancellation makes no failure a cancellation."""

    async def go() -> Any:
        await swallow()
        nodes = [node("a", failing_with(asyncio.CancelledError, "stray"))]
        return await StromaRunner.quick(policy_map=NEVER).run(nodes, Num())

    result = await asyncio.create_task(go())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.message == "stray"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ending", ["success", "failure", "bad output", "question"])
async def test_a_cancellation_while_usage_is_priced_comes_out_afterwards(ending: str, grouped: bool) -> None:
    """Prices are read in a thread: what the attempt came to is kept and told, nothing more is called."""
    calls: list[str] = []

    async def func(state: Num) -> Any:
        calls.append("a")
        here().report_usage(input_tokens=3, model=f"held-unread-{ending}-{grouped}")
        asyncio.get_running_loop().call_soon(task.cancel)
        if ending == "failure":
            raise ConnectionError("down")
        if ending == "question":
            raise Suspend("may I?")
        return {"n": "none" if ending == "bad output" else 1}

    with Diary() as diary:
        one = node("a", func)
        nodes = [parallel(one) if grouped else one, counted(calls, "b", {})]
        config: dict[str, Any] = {"policy_map": THRICE, "contract_retries": {"a": 3}}
        task = asyncio.create_task(diary.runner(**config).run(nodes, Num()))
        with pytest.raises(asyncio.CancelledError):
            await task
        diary.journal()
    ends = {"success": "success", "failure": "failure", "bad output": "failure", "question": "suspended"}
    events = [line for line in diary.lines if line.startswith(("node_", "row a"))]
    kinds = [line.split()[0] for line in events if " a " in line and "parallel" not in line]
    assert kinds[:2] == ["node_start", f"node_{ends[ending]}"]
    (row,) = [line for line in events if line.startswith("row a")]
    assert f"#1 {ends[ending]} ran" in row
    assert row.endswith(" 3 tokens 0 USD")
    assert calls == ["a"]
    assert "run_end CANCELLED latency ran" in diary.lines


@pytest.mark.parametrize("side", ["input", "output"])
async def test_a_class_that_is_rebuilt_is_validated_anew(side: str) -> None:
    """model_rebuild() gives a class other rules; the next run goes by them, with the same node."""

    class Grows(BaseModel):
        n: int = 0

    one = node("a", same, *((Grows, Grows) if side == "input" else (Num, Grows)))
    runner = StromaRunner.quick(policy_map=NEVER)
    assert (await runner.run([one], Num())).status is RunStatus.COMPLETED
    Grows.model_fields["n"].metadata.append(Field(gt=0).metadata[0])
    Grows.model_rebuild(force=True)
    result = await runner.run([one], Num())
    assert result.status is RunStatus.FAILED
    assert result.failure.message == f"Contract violation for 'a' ({side}): n: Input should be greater than 0"
    assert (await runner.run([one], Num(n=1))).final_state == Grows(n=1)


async def test_a_broken_contract_says_whose_it_is() -> None:
    """The violation has the node, the side, what came as a dict, pydantic's errors and the expected class."""
    for nodes, state, direction, raw, schema in (
        ([node("a", same, Positive)], Num(), "input", {"n": 0}, Positive),
        ([node("a", returning(7), Num, Positive)], Num(), "output", {"value": 7}, Positive),
        ([node("z", same), node("a", same, Positive)], Num(), "input", {"n": 0}, Positive),
        ([node("a", same, Positive)], _Root([1]), "input", {"root": [1]}, Positive),
    ):
        result = await StromaRunner.quick(policy_map=NEVER).run(nodes, state)
        violation = result.failure.exception
        assert isinstance(violation, ContractViolation)
        assert (violation.node_id, violation.direction, violation.raw) == ("a", direction, raw)
        assert violation.schema is schema
        assert violation.__cause__ is not None
        assert (result.failure.attempt, result.failure.reason) == (1, "contract")
        assert result.failure.retry_after_seconds is None


class _Root(RootModel[list[int]]):
    pass


BAD = {"n": "none"}


async def test_repairs_are_no_retries() -> None:
    """Attempts granted to mend an output do not count as retries of other failures, nor those as repairs."""
    called: list[str] = []
    down = ConnectionError("down")
    runner = StromaRunner.quick(policy_map=ONCE, contract_retries={"a": 1})
    result = await runner.run([counted(called, "a", BAD, down, {"n": 1})], Num())
    assert (result.status, len(called)) == (RunStatus.COMPLETED, 3)
    called.clear()
    result = await runner.run([counted(called, "a", down, BAD, {"n": 1})], Num())
    assert (result.status, len(called)) == (RunStatus.COMPLETED, 3)
    called.clear()
    result = await runner.run([counted(called, "a", BAD, down, down, {"n": 1})], Num())
    assert (result.status, len(called)) == (RunStatus.PARTIAL, 3)


@pytest.mark.core
async def test_only_a_nodes_own_output_is_mended() -> None:
    """A broken input, and a violation of a run inside the node, are not what was granted."""
    called: list[str] = []
    runner = StromaRunner.quick(policy_map=NEVER, contract_retries={"a": 3})
    result = await runner.run([counted(called, "a", {}, input=Positive)], Num())
    assert (result.status, len(result.trace), called) == (RunStatus.FAILED, 1, [])

    async def inside(state: Num) -> Any:
        called.append("a")
        inner = await StromaRunner.quick(policy_map=NEVER).run([counted([], "b", BAD)], state)
        inner.raise_for_status()

    result = await runner.run([node("a", inside)], Num())
    assert (result.status, called) == (RunStatus.FAILED, ["a"])


async def test_a_violation_that_a_classifier_lets_retry_is_retried_by_policy() -> None:
    """What a classifier calls recoverable goes by the policy of that class; no repair is used up for it."""
    called: list[str] = []
    messages = [lambda error, _: FailureClass.RECOVERABLE]
    runner = StromaRunner.quick(policy_map=ONCE, contract_retries={"a": 5}, classifiers=messages)
    result = await runner.run([counted(called, "a", BAD)], Num())
    assert (result.status, len(called)) == (RunStatus.PARTIAL, 2)


async def test_what_is_kept_of_a_question() -> None:
    """Where it is asked, by which node, why, and what the answer must be; of a group around it nothing."""
    store = AsyncInMemoryStore()
    nodes = [
        counted([], "z", {"n": 1}),
        parallel(
            counted([], "a", Suspend("which?", schema=M)),
            counted([], "b", Suspend("why?"), output=M),
            max_concurrency=1,
        ),
    ]
    await StromaRunner.quick(store=store).run(nodes, Num(), run_id="r")
    questions = [tuple(waiting)[:6] for waiting in store.waiting("r")]
    assert questions == [(1, "0", "a", "which?", f"{M.__module__}:M", None), (1, "1", "b", "why?", "", None)]


async def test_the_step_that_asks_is_no_failure() -> None:
    """A step of plain code that waits is SUSPENDED with its reason, and has no failure."""
    runner = StromaRunner.quick(store=AsyncInMemoryStore())
    ctx = context_of(runner)
    result = await execute_step("a", counted([], "a", Suspend("may I?")), Num(n=2), ctx)
    assert (result.status, result.failure, result.suspended) == (RunStatus.SUSPENDED, None, ["may I?"])
    assert result.final_state == Num(n=2)


class Noting(Interceptor):
    """Notes what stands around a call; changes what it is told to."""

    def __init__(self, name: str, seen: list[str], kind: FailureClass | None = None) -> None:
        self.name = name
        self.seen = seen
        self.kind = kind

    async def call(self, run: Any, node: Any, call: Any, state: BaseModel) -> Any:
        self.seen.append(f"{self.name} before {run.node_id} {node.node_id} {state}")
        try:
            return await call(state)
        finally:
            self.seen.append(f"{self.name} after")

    def diagnosed(self, run: Any, failure: Any) -> Any:
        self.seen.append(f"{self.name} {run.node_id} {failure.failure_class}")
        if self.kind is None:
            return failure
        return type(failure)(
            failure.exception, self.kind, failure.node_id, failure.attempt, failure.message, failure.reason
        )


@pytest.fixture
def probes() -> Iterator[list[Interceptor]]:
    before = list(INTERCEPTORS)
    yield INTERCEPTORS
    INTERCEPTORS[:] = before


async def test_probes_stand_around_a_call(probes: list[Interceptor]) -> None:
    """The first one is outermost; each is told of the failure as the one before it has left it."""
    seen: list[str] = []
    probes += [Noting("1", seen, FailureClass.TERMINAL), Noting("2", seen)]
    result = await StromaRunner.quick(policy_map=THRICE).run([counted([], "a", ValueError("no"))], Num(n=2))
    assert seen == [
        "1 before a a n=2",
        "2 before a a n=2",
        "2 after",
        "1 after",
        "1 a AMBIGUOUS",
        "2 a TERMINAL",
    ]
    assert result.status is RunStatus.FAILED
    assert result.failure.failure_class is FailureClass.TERMINAL


async def test_every_end_is_marked_as_delivered_once() -> None:
    """With delivery at least once, each end that has a hook is marked after it, however the attempt ended."""
    marked: list[str] = []

    def between(session: Any) -> Any:
        return Between(session, delivered=lambda row: marked.append(f"{row[0]} {row[1]} {row[6]}"))

    with Diary() as diary:
        diary.store = Journal(between)
        nodes = [counted([], "a", ValueError("no"), {"n": 1}), node("b", stuck(diary.started))]
        await diary.cut(nodes, Num(), hook_delivery="at_least_once", policy_map=ONCE)
        assert marked == ["a 1 failure", "a 2 success", "b 1 cancelled"]
        marked.clear()
        await diary.run([counted([], "a", Suspend("may I?"))], Num(), hook_delivery="at_least_once")
        assert marked == ["a 1 suspended"]
        marked.clear()
        again = {"hook_delivery": "at_least_once", "if_exists": "restart"}
        await diary.run([counted([], "a", {}, input=Positive)], Num(), **again)
        assert marked == ["a 1 failure"]


async def test_a_deadline_is_a_budget_error_elsewhere() -> None:
    """Pickled, it is the BudgetExceeded that it is for everybody."""

    async def forever(state: Num) -> Any:
        await asyncio.Event().wait()

    runner = StromaRunner.quick(budget=ExecutionBudget(max_latency_ms=20))
    result = await runner.run([node("a", forever)], Num())
    again = pickle.loads(pickle.dumps(result.failure.exception))
    assert type(again) is BudgetExceeded
    assert (again.dimension, again.limit, again.node_id) == ("latency", 20, "a")
    assert again.actual >= 20


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_failure_beyond_the_budget_names_the_limit(grouped: bool) -> None:
    """An attempt that fails and crosses a limit keeps its own failure; a note says why no retry followed."""

    async def ask(state: Num) -> Any:
        here().report_usage(input_tokens=60)
        raise ConnectionError("no")

    nodes = [parallel(node("a", ask)) if grouped else node("a", ask)]
    runner = StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=100), policy_map=THRICE)
    result = await runner.run(nodes, Num())
    assert (result.status, result.total_tokens) == (RunStatus.PARTIAL, 120)
    with pytest.raises(ConnectionError) as caught:
        result.raise_for_status()
    (note,) = caught.value.__notes__
    assert note.startswith(
        "No further call is made, since the budget of the run is spent: budget exceeded: max_tokens_total"
    )
    result = await StromaRunner.quick(policy_map=NEVER).run(nodes, Num())
    assert not hasattr(result.failure.exception, "__notes__")
