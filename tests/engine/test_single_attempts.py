"""One attempt at a time, for drivers that keep the counts themselves: what it does, refuses, and leaves as it was."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.event_log import Diary, swallow
from tests.kit import NEVER, Num, sleep_forever

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    Failure,
    FailureClass,
    NodeContract,
    NodeHooks,
    ReliabilityContext,
    StromaRunner,
    Suspend,
    current_node_or_none,
    parallel,
    stroma_node,
)
from stroma.contracts.node import find_node
from stroma.engine import NodeExecution
from stroma.engine.current import CURRENT
from stroma.engine.loop import attempt_once, begin_group
from stroma.engine.outcome import Halt


class Late(BaseModel):
    value: Unknown  # type: ignore[name-defined]  # noqa: F821


def node(
    node_id: str, func: Any, input_model: type[BaseModel] = Num, output_model: type[BaseModel] = Num
) -> Any:
    return find_node(
        stroma_node(
            node_id, NodeContract(node_id=node_id, input_schema=input_model, output_schema=output_model)
        )(func)
    )


async def same(state: Num) -> Num:
    return state


def context(diary: Diary, **config: Any) -> ReliabilityContext:
    runner = StromaRunner.quick(run_id="r", **{"policy_map": NEVER, "hooks": diary.hooks(), **config})
    return ReliabilityContext.for_run(runner.config, runner.registry, runner.checkpoint_manager)


def execution(
    ctx: ReliabilityContext, of: Any, attempt: int = 1, last: Failure | None = None
) -> NodeExecution:
    run = NodeExecution(ctx, of.node_id, "node", 4, "")
    run.attempt, run.last_failure = attempt, last
    return run


def group_of_one(run: Any = None) -> Any:
    """A group around the node "a"; ``run``: what is called in the place of running that."""
    group: Any = find_node(parallel(node("a", same)))
    if run is not None:
        group.run = run
    return group


def spent(ctx: ReliabilityContext) -> ReliabilityContext:
    ctx.cost_tracker.prior_tokens = 11
    return ctx


BUDGET = ExecutionBudget(max_tokens_total=10)


async def test_an_attempt_gives_its_output_and_nothing_stays_current() -> None:
    """The output comes back, the hooks are told, what was to be called at the end is, and the caller's node is current."""
    with Diary() as diary:
        ctx, ended = context(diary), list[int]()
        one = node("one", same)
        run = execution(ctx, one, 3)
        outside = execution(ctx, node("outside", same))
        run.at_end(lambda: ended.append(1))
        token = CURRENT.set(outside)
        assert await attempt_once(ctx, run, one, Num(n=5)) == Num(n=5)
        assert current_node_or_none() is outside
        CURRENT.reset(token)
    assert ended == [1]
    assert diary.lines == [
        "node_start one {'n': 5} @ node one 4 #3",
        "node_success one {'n': 5} 0 @ node one 4 #3 success None ran",
    ]
    assert [(e.attempt, e.position, e.output_state) for e in ctx.trace] == [(3, 4, {"n": 5})]


async def test_a_failure_is_the_callers_to_decide_of() -> None:
    """A failed attempt comes back as a Failure, not as a Halt: nothing is decided here, whatever policies say."""

    async def fail(state: Num) -> Num:
        raise ConnectionError("down")

    with Diary() as diary:
        ctx, one = context(diary), node("one", fail)
        outcome = await attempt_once(ctx, execution(ctx, one), one, Num())
    assert isinstance(outcome, Failure)
    assert (outcome.failure_class, outcome.message, outcome.attempt) == (FailureClass.RECOVERABLE, "down", 1)
    assert len(ctx.trace) == 1


@pytest.mark.parametrize("seconds", [None, 0.0, 1.5])
async def test_a_wait_is_told_as_the_engine_tells_it(seconds: float | None) -> None:
    """The hook of a retry finds the attempt before as the current one, and the one to come in its arguments."""
    with Diary() as diary:
        ctx, one = context(diary), node("one", same)
        last = Failure(ConnectionError("down"), FailureClass.RECOVERABLE, "one", 1, "down", "connection")
        run = execution(ctx, one, 2, last)
        await attempt_once(ctx, run, one, Num(), after_seconds=seconds)
    after = "after RECOVERABLE down (connection)"
    report = [] if seconds is None else [f"node_retry one 2 {seconds} RECOVERABLE @ node one 4 #1 {after}"]
    assert diary.lines == [
        *report,
        f"node_start one {{'n': 0}} @ node one 4 #2 {after}",
        f"node_success one {{'n': 0}} 0 @ node one 4 #2 {after} success None ran",
    ]
    assert run.attempt == 2


async def test_a_hook_that_raises_is_listed_by_its_name() -> None:
    """The hook of a wait, a start or an end that raises is listed with its node, and changes nothing."""

    async def boom(*_: Any) -> None:
        raise RuntimeError("hook")

    hooks = NodeHooks(on_node_retry=boom, on_node_start=boom, on_node_success=boom)
    ctx = context(Diary(), hooks=hooks)
    last = Failure(ConnectionError("down"), FailureClass.RECOVERABLE, "one", 1, "down", "connection")
    one, group = node("one", same), group_of_one()
    assert await attempt_once(ctx, execution(ctx, one, 2, last), one, Num(), after_seconds=0.0) == Num()
    assert await begin_group(ctx, execution(ctx, group, 2, last), group, Num(), after_seconds=0.0) is None
    assert [(failed.hook, failed.node_id) for failed in ctx.hook_failures] == [
        ("on_node_retry", "one"),
        ("on_node_start", "one"),
        ("on_node_success", "one"),
        ("on_node_retry", "parallel(a)"),
        ("on_node_start", "parallel(a)"),
    ]


async def test_a_wait_after_no_failure_is_none() -> None:
    """Without a failure before it there is nothing to tell of, with a wait or without; and without hooks nobody to tell."""
    with Diary() as diary:
        ctx, one = context(diary), node("one", same)
        await attempt_once(ctx, execution(ctx, one), one, Num(), after_seconds=1.0)
        assert [line.split()[0] for line in diary.lines] == ["node_start", "node_success"]
        last = Failure(ConnectionError("down"), FailureClass.RECOVERABLE, "one", 1, "down", "connection")
        ctx = context(diary, hooks=[])
        run = execution(ctx, one, 2, last)
        assert await attempt_once(ctx, run, one, Num(), after_seconds=1.0) == Num()
    assert run.attempt == 2


async def test_once_the_budget_is_spent_no_attempt_is_begun() -> None:
    """It is refused with the budget's error, whose cause is the failure before; in the log, and in no trace."""
    with Diary() as diary:
        ctx, one = spent(context(diary, budget=BUDGET)), node("one", same)
        down = ConnectionError("down")
        last = Failure(down, FailureClass.RECOVERABLE, "one", 1, "down", "connection")
        outcome = await attempt_once(ctx, execution(ctx, one, 2, last), one, Num())
    assert isinstance(outcome, Halt)
    assert (outcome.spent, outcome.partial, outcome.suspended, outcome.output) == (True, False, False, None)
    assert outcome.status == "PARTIAL"
    error = outcome.failure.exception
    assert isinstance(error, BudgetExceeded)
    assert error.__cause__ is down
    assert (outcome.failure.node_id, outcome.failure.attempt, outcome.failure.reason) == ("one", 2, "budget")
    assert diary.lines == [f"log INFO: node 'one' is not called: {error}"]
    assert len(ctx.trace) == 0


@pytest.mark.parametrize(
    ("ns", "called"), [(999_999_999, True), (1_000_000_000, True), (1_000_000_001, False)]
)
async def test_exactly_at_the_limit_a_child_is_called(ns: int, called: bool) -> None:
    """What the functions of its group took so far counts to the nanosecond; exactly at the limit is within it."""
    with Diary() as diary:
        ctx, one = context(diary, budget=ExecutionBudget(max_latency_ms=1000)), node("one", same)
        group = NodeExecution(ctx, "group", "group", 0, "")
        group.children, group.busy_ns = [], ns
        run = NodeExecution(ctx, "one", "node", 0, "0", group)
        run.attempt = 1
        outcome = await attempt_once(ctx, run, one, Num())
    events = [line.split()[0] for line in diary.lines if line.startswith("node_")]
    if called:
        assert events[0] == "node_start"
    else:
        assert events == []
        assert isinstance(outcome, Halt)
        error = outcome.failure.exception
        assert isinstance(error, BudgetExceeded)
        assert (error.dimension, error.limit, error.actual, error.node_id) == (
            "latency",
            1000,
            1000.000001,
            "one",
        )


async def test_a_classifier_is_asked_about_a_refusal() -> None:
    """What a classifier of the user's says of a spent budget decides how the run ends; it is told where."""
    requests: list[Any] = []

    def fatal(error: Exception, where: Any) -> FailureClass | None:
        requests.append((type(error), where.node_id, where.attempt, where.run_id))
        return FailureClass.TERMINAL

    with Diary() as diary:
        ctx, one = spent(context(diary, budget=BUDGET, classifiers=[fatal])), node("one", same)
        outcome = await attempt_once(ctx, execution(ctx, one, 7), one, Num())
    assert isinstance(outcome, Halt)
    assert outcome.status == "FAILED"
    assert requests == [(BudgetExceeded, "one", 7, "r")]


async def test_a_group_that_was_begun_is_ended_whatever_was_spent_meanwhile() -> None:
    """``begun`` says that the budget was asked already: what its children made is kept."""

    async def run(*_: Any) -> dict[str, Any]:
        return {"n": 3}

    with Diary() as diary:
        ctx = spent(context(diary, budget=BUDGET))
        group = group_of_one(run)
        refused = await attempt_once(ctx, execution(ctx, group), group, Num())
        assert isinstance(refused, Halt)
        assert not [line for line in diary.lines if line.startswith("node_start")]
        started = await attempt_once(ctx, execution(ctx, group), group, Num(), has_begun=True)
    assert [line for line in diary.lines if line.startswith("node_start parallel")]
    assert isinstance(started, Halt)
    assert started.spent
    assert started.output is not None
    assert started.output.model_dump() == {"n": 3}


@pytest.mark.parametrize("limited", [False, True])
async def test_a_group_is_begun_alone(limited: bool) -> None:
    """Its start is told, its children are not called, and the caller's node is current again."""
    with Diary() as diary:
        ctx = context(diary, **({"budget": BUDGET} if limited else {}))
        group = group_of_one()
        run, ended = NodeExecution(ctx, group.node_id, "group", 2, ""), list[int]()
        run.attempt = 1
        run.at_end(lambda: ended.append(1))
        assert await begin_group(ctx, run, group, Num(n=4)) is None
        assert current_node_or_none() is None
    assert diary.lines == ["node_start parallel(a) {'n': 4} @ group parallel(a) 2 #1"]
    assert ended == [1]
    assert len(ctx.trace) == 0


async def test_a_group_whose_beginning_is_interrupted_is_told_and_kept() -> None:
    """What its start hook is interrupted by comes out, and the attempt is a cancelled one, with its input."""

    async def stops(*_: Any) -> None:
        raise KeyboardInterrupt("now")

    with Diary() as diary:
        ctx, group = context(diary, hooks=diary.hooks(node_start=stops)), group_of_one()
        with pytest.raises(KeyboardInterrupt, match="now"):
            await begin_group(ctx, execution(ctx, group), group, Num(n=4))
        assert current_node_or_none() is None
    assert [line.split()[0] for line in diary.lines] == ["node_start", "node_cancelled"]
    (event,) = ctx.trace
    assert (event.outcome, event.input_state, event.output_state) == ("cancelled", {"n": 4}, None)


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_question_comes_back_with_what_was_raised(grouped: bool) -> None:
    """The driver is given the very exception, and the reason in words; a group has those of its child."""
    request = Suspend("may I?", schema=Num)

    async def ask(state: Num) -> Num:
        raise request

    with Diary() as diary:
        ctx = context(diary)
        one = find_node(parallel(node("a", ask))) if grouped else node("a", ask)
        halt = await attempt_once(ctx, execution(ctx, one, 3), one, Num())
    assert isinstance(halt, Halt)
    assert (halt.suspended, halt.spent, halt.partial, halt.output) == (True, False, False, None)
    failure = halt.failure
    assert (failure.failure_class, failure.message, failure.node_id, failure.attempt) == (
        FailureClass.RECOVERABLE,
        "may I?",
        one.node_id,
        3,
    )
    if not grouped:
        assert failure.exception is request


async def test_a_group_that_is_begun_again_tells_of_the_wait() -> None:
    """The hook of the retry comes first, then the start."""
    with Diary() as diary:
        ctx = context(diary)
        group = group_of_one()
        last = Failure(ConnectionError("down"), FailureClass.RECOVERABLE, "a", 1, "down", "connection")
        run = NodeExecution(ctx, group.node_id, "group", 2, "")
        run.attempt, run.last_failure = 2, last
        assert await begin_group(ctx, run, group, Num(), after_seconds=0.5) is None
    after = "after RECOVERABLE down (connection)"
    assert diary.lines == [
        f"node_retry parallel(a) 2 0.5 RECOVERABLE @ group parallel(a) 2 #1 {after}",
        f"node_start parallel(a) {{'n': 0}} @ group parallel(a) 2 #2 {after}",
    ]


async def test_a_group_is_not_begun_once_the_budget_is_spent() -> None:
    """The refusal is a Halt that says that the run's own limit is crossed; no start is told."""
    with Diary() as diary:
        ctx = spent(context(diary, budget=BUDGET))
        group = group_of_one()
        halt = await begin_group(ctx, execution(ctx, group), group, Num())
        assert current_node_or_none() is None
    assert isinstance(halt, Halt)
    assert halt.spent
    assert isinstance(halt.failure.exception, BudgetExceeded)
    assert diary.lines == [f"log INFO: node 'parallel(a)' is not called: {halt.failure.message}"]


@pytest.mark.parametrize("kind", ["node", "group"])
async def test_a_contract_that_cannot_be_read_ends_it(kind: str) -> None:
    """It is one failed attempt, told and kept as one whose input is wrong, and the caller's node is current again."""
    broken = stroma_node("late", NodeContract(node_id="late", input_schema=Num, output_schema=Late))(
        sleep_forever
    )
    with Diary() as diary:
        ctx = context(diary)
        if kind == "node":
            one = find_node(broken)
            outcome: Any = await attempt_once(ctx, execution(ctx, one), one, Num(n=8))
        else:
            one = find_node(parallel(broken))
            outcome = await begin_group(ctx, execution(ctx, one), one, Num(n=8))  # type: ignore[arg-type]
        assert current_node_or_none() is None
    assert isinstance(outcome, Halt)
    violation = outcome.failure.exception
    assert isinstance(violation, ContractViolation)
    assert (violation.node_id, violation.direction, violation.raw) == (one.node_id, "input", {"n": 8})
    assert (outcome.failure.failure_class, outcome.failure.attempt) == (FailureClass.TERMINAL, 1)
    assert "name 'Unknown' is not defined" in outcome.failure.message
    assert [line.split()[0] for line in diary.lines] == ["log", "node_failure"]
    assert diary.lines[1].endswith(f"TERMINAL @ node {one.node_id} 4 #1 failure contract 0.0")
    (event,) = ctx.trace
    assert (event.input_state, event.output_state, event.duration_ms) == ({"n": 8}, None, 0)


async def test_an_old_cancellation_is_not_the_attempts() -> None:
    """In a task that has swallowed a cancellation before, a stray CancelledError of a node is a failure; a new one is not."""

    async def stray(state: Num) -> Num:
        raise asyncio.CancelledError("stray")

    async def swallows() -> Any:
        await swallow()
        ctx, one = context(diary), node("one", stray)
        return await attempt_once(ctx, execution(ctx, one), one, Num())

    with Diary() as diary:
        outcome = await asyncio.create_task(swallows())
    assert isinstance(outcome, Failure)
    assert outcome.message == "stray"


async def test_an_attempt_waits_for_its_turn() -> None:
    """Under a limit that nobody else uses up, it is made; nodes without one are made all the same."""
    from stroma import Limit

    with Diary() as diary:
        ctx = context(diary, limits={"turn": Limit(concurrent=1)}, node_limits={"one": "turn"})
        for name in ("one", "two"):
            one = node(name, same)
            assert await attempt_once(ctx, execution(ctx, one), one, Num()) == Num()
    assert len(ctx.trace) == 2


async def test_a_group_takes_no_turn_of_its_own() -> None:
    """Its children do: a limit under the group's own name holds nobody back, in a run as well as attempt by attempt."""
    from stroma import Limit

    async def run(*_: Any) -> dict[str, Any]:
        return {"n": 3}

    group = group_of_one(run)
    turn = {"turn": Limit(requests_per_minute=1, max_wait_seconds=0.0)}
    limits: dict[str, Any] = {"limits": turn, "node_limits": {group.node_id: "turn"}}
    with Diary() as diary:
        ctx = context(diary, **limits)
        for _ in range(3):
            outcome = await attempt_once(ctx, execution(ctx, group), group, Num())
            assert isinstance(outcome, BaseModel)
            assert outcome.model_dump() == {"n": 3}
    result = await StromaRunner.quick(**limits).run([group_of_one()] * 3, Num())
    assert result.status == "COMPLETED"


def test_the_names_of_a_halt() -> None:
    """What stopped for good is terminal if trying again is no use, else partial; a node that waits is neither."""

    def halt(kind: FailureClass, **more: bool) -> Halt:
        return Halt(Failure(ValueError("no"), kind, "a", 1, "no"), **more)

    assert halt(FailureClass.TERMINAL).status == "FAILED"
    assert halt(FailureClass.TERMINAL, partial=True).status == "PARTIAL"
    assert halt(FailureClass.RECOVERABLE).status == "PARTIAL"
    assert halt(FailureClass.AMBIGUOUS).status == "PARTIAL"
    assert halt(FailureClass.TERMINAL, suspended=True).status == "SUSPENDED"
    plain = halt(FailureClass.TERMINAL)
    assert (plain.output, plain.partial, plain.spent, plain.suspended) == (None, False, False, False)
