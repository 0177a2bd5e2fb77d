"""Promises where two rules meet: a price, an interrupt, a hook or a nested run in the wrong moment."""

import asyncio
import contextvars
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, RootModel, field_validator
from tests.kit import NEVER, TWICE, Num, node, quick

from stroma import (
    KNOWN_MODELS,
    AsyncInMemoryStore,
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    HookError,
    NodeContract,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    SQLiteStore,
    current_node,
    execute_step,
    parallel,
    stroma_node,
)


def watch(seen: list[str], name: str = "", **others: Any) -> NodeHooks:
    def noting(event: str) -> Any:
        async def hook(*_: Any) -> None:
            seen.append(f"{name}{event[8:]}")

        return hook

    events = ("on_node_start", "on_node_success", "on_node_failure", "on_node_cancelled")
    return NodeHooks(**{**{event: noting(event) for event in events}, **others})


# ---------------------------------------------------------------------- money


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.7, 1.1], ids=str)
async def test_a_cost_at_eighty_percent_warns(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """on_budget_warning fires at 80 % of a limit in dollars, also where a binary fraction falls short of it."""
    monkeypatch.setitem(KNOWN_MODELS, "one cent", (10_000.0, 0.0))
    seen: list[Any] = []

    async def warn(*arguments: Any) -> None:
        seen.append(arguments)

    async def func(state: Num) -> Any:
        return {"n": 1}, round(limit * 80), "one cent"

    runner = quick(
        budget=ExecutionBudget(max_cost_usd=limit), hooks=NodeHooks(on_budget_warning=warn), run_id="r"
    )
    await runner.run([node("a", func)], Num())
    assert seen == [("r", "cost", pytest.approx(0.8 * limit), limit)]


@pytest.mark.core
@pytest.mark.parametrize(
    "price",
    [(1,), "dear", {"input": 1}, ("1", "2"), (float("nan"), 1.0), (float("inf"), 1.0), (-5.0, 1.0)],
    ids=str,
)
async def test_a_senseless_price_loses_no_output(price: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """G4, G9: what is priced by nonsense in KNOWN_MODELS is bad usage: TERMINAL, the output kept, each start ended."""
    monkeypatch.setitem(KNOWN_MODELS, "mine", price)
    store = AsyncInMemoryStore()
    seen: list[str] = []

    async def func(state: Num) -> Any:
        return {"n": 7}, 5, "mine"

    result = await quick(store=store, hooks=watch(seen), run_id="r").run([node("a", func)], Num())
    assert (result.status, result.total_tokens, result.total_cost_usd) == (RunStatus.FAILED, 5, 0.0)
    assert (await store.load("r", "a"), seen) == (Num(n=7), ["start", "failure"])


# ---------------------------------------------------------------------- groups


async def test_a_childs_own_budget_error_cancels_its_siblings() -> None:
    """A child whose own run went over its own budget fails like any other: its siblings are cancelled."""
    seen: list[str] = []

    async def over(state: Num) -> Any:
        await asyncio.sleep(0)
        raise BudgetExceeded("tokens", 1, 2, "inside")

    async def wait(state: Num) -> Any:
        await asyncio.wait_for(asyncio.Event().wait(), 1)

    group = parallel(node("a", over), node("b", wait))
    result = await quick(policy_map=NEVER, hooks=watch(seen)).run([group], Num())
    assert result.status is RunStatus.PARTIAL
    assert seen == ["start", "start", "start", "failure", "cancelled", "failure"]


async def test_a_group_is_tried_again_after_a_childs_own_budget_error() -> None:
    """A group that node_policies names is tried again after it, since no limit of this run is crossed."""
    calls: list[int] = []

    async def over(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise BudgetExceeded("tokens", 1, 2, "inside")
        return {"n": 1}

    group = parallel(node("a", over))
    result = await quick(policy_map=NEVER, node_policies={group.node_id: TWICE}).run([group], Num())
    assert (result.status, len(calls)) == (RunStatus.COMPLETED, 2)


async def test_siblings_of_a_failed_attempt_over_the_limit_finish() -> None:
    """Children in flight finish and commit when a limit is crossed, also if the attempt that crossed it failed."""
    store = AsyncInMemoryStore()
    begun = asyncio.Event()

    async def fails(state: Num) -> Any:
        await begun.wait()
        run = current_node()
        assert run is not None
        run.report_usage(input_tokens=100)
        raise ValueError("and over the limit")

    async def goes_on(state: Num) -> Any:
        begun.set()
        for _ in range(20):
            await asyncio.sleep(0)
        return {"n": 7}, 1

    group = parallel(node("a", fails), node("b", goes_on))
    runner = quick(store=store, run_id="r", budget=ExecutionBudget(max_tokens_total=10))
    result = await runner.run([group], Num())
    assert (result.status, result.total_tokens) == (RunStatus.PARTIAL, 101)
    assert await store.load("r", "b") == Num(n=7)


@pytest.mark.core
async def test_a_violation_inside_a_node_is_not_repaired() -> None:
    """contract_retries is about a node's own output, not about a violation in a run that the node made."""
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        raise ContractViolation("inside", "output", {}, [])

    result = await quick(contract_retries={"a": 3}).run([node("a", func)], Num())
    assert (result.status, len(calls)) == (RunStatus.FAILED, 1)


# ---------------------------------------------------------------------- what ends a process


@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError], ids=lambda e: e.__name__)
async def test_a_classifier_that_raises_is_skipped(error: type[BaseException]) -> None:
    """G2: a classifier that raises an Exception, or a CancelledError of its own, is skipped."""

    def classifier(exc: Exception, context: Any) -> FailureClass | None:
        raise error

    async def func(state: Num) -> Any:
        raise ConnectionError

    result = await quick(classifiers=[classifier]).run([node("a", func)], Num())
    assert [event.failure for event in result.trace] == [FailureClass.RECOVERABLE] * 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
async def test_an_interrupt_in_a_classifier_of_the_budget_loses_no_output(error: type[BaseException]) -> None:
    """G4, G9: a classifier that stops the process over a budget loses neither the output nor the end of its start."""
    store = AsyncInMemoryStore()
    seen: list[str] = []

    def classifier(exc: Exception, context: Any) -> FailureClass | None:
        raise error

    async def func(state: Num) -> Any:
        return {"n": 7}, 5

    budget = ExecutionBudget(max_tokens_total=1)
    runner = quick(store=store, run_id="r", classifiers=[classifier], budget=budget, hooks=watch(seen))
    with pytest.raises(error):
        await runner.run([node("a", func)], Num())
    assert (await store.load("r", "a"), seen) == (Num(n=7), ["start", "failure"])


class Interrupting:
    """A store of the simple protocol in which Ctrl-C strikes."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        raise KeyboardInterrupt

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return None

    def delete(self, run_id: str) -> None: ...


async def test_an_interrupt_in_the_store_leaves_no_start_without_its_end() -> None:
    """G9: KeyboardInterrupt while the store commits comes out after the attempt's end was told."""
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        await quick(store=Interrupting(), hooks=watch(seen)).run([node("a", lambda state: {"n": 1})], Num())
    assert seen == ["start", "cancelled"]


@pytest.mark.parametrize("event", ["on_node_start", "on_node_success"])
async def test_an_interrupt_in_a_hook_leaves_the_sets_paired(event: str) -> None:
    """G9: KeyboardInterrupt in a hook of one set: every set that saw the start sees one end, and no other does."""
    seen: list[str] = []

    async def interrupt(*_: Any) -> None:
        seen.append(f"2 {event[8:]}")
        raise KeyboardInterrupt

    sets = [watch(seen, "1 "), watch(seen, "2 ", **{event: interrupt}), watch(seen, "3 ")]
    with pytest.raises(KeyboardInterrupt):
        await quick(hooks=sets).run([node("a", lambda state: {"n": 1})], Num())
    for name in "123":
        own = [what[2:] for what in seen if what[0] == name]
        assert own == ["start", "cancelled" if event == "on_node_start" else "success"], seen


# ---------------------------------------------------------------------- hooks


@pytest.mark.core
async def test_a_hook_cannot_grant_attempts() -> None:
    """G8: what a hook writes on current_node() has no node called more often."""
    calls: list[int] = []

    async def meddle(*_: Any) -> None:
        run = current_node()
        assert run is not None
        run.attempt = -5 if len(calls) < 20 else run.attempt

    async def func(state: Num) -> Any:
        calls.append(1)
        raise ValueError

    result = await quick(hooks=NodeHooks(on_node_failure=meddle)).run([node("a", func)], Num())
    assert ([event.attempt for event in result.trace], len(calls)) == ([1, 2, 3], 3)


@pytest.mark.parametrize("event", ["on_node_start", "on_node_success", "on_run_end"])
async def test_a_hook_that_raises_generator_exit_changes_nothing(event: str) -> None:
    """G8: a GeneratorExit that a hook raises itself is an exception in a hook like any other."""

    async def leave(*_: Any) -> None:
        raise GeneratorExit

    result = await quick(hooks=NodeHooks(**{event: leave})).run([node("a", lambda state: {"n": 1})], Num())
    assert (result.status, [error.hook for error in result.hook_errors]) == (RunStatus.COMPLETED, [event])


class Loose(BaseModel):
    anything: Any = None


async def test_a_run_whose_input_cannot_be_stored_starts_and_ends(tmp_path: Path) -> None:
    """on_run_end has its on_run_start, also in a run whose initial state no store can keep."""
    seen: list[str] = []

    async def start(*_: Any) -> None:
        seen.append("start")

    async def end(*_: Any) -> None:
        seen.append("end")

    store = SQLiteStore(tmp_path / "runs.db")
    runner = quick(store=store, hooks=NodeHooks(on_run_start=start, on_run_end=end))
    result = await runner.run([node("a", lambda state: {"n": 1})], Loose(anything=threading.Lock()))
    assert (result.status, seen) == (RunStatus.FAILED, ["start", "end"])


# ---------------------------------------------------------------------- what is shown, what is said


class Pair(RootModel[list[int]]):
    pass


def cancelling(state: dict[str, Any]) -> Any:
    raise asyncio.CancelledError


def raising(state: dict[str, Any]) -> Any:
    raise ValueError("cannot")


@pytest.mark.core
@pytest.mark.parametrize(
    "redact",
    [
        lambda state: {1: 2},
        lambda state: {"cls": 1, "self": 2, "_fields_set": 3},
        lambda state: {},
        lambda state: None,
        raising,
        cancelling,
    ],
    ids=["odd keys", "odd names", "nothing", "None", "raises", "cancels"],
)
@pytest.mark.parametrize("root", [False, True], ids=["model", "root model"])
async def test_whatever_redact_makes_every_hook_is_called(redact: Any, root: bool) -> None:
    """If redact raises, whatever that is, or gives what is no state of the class, each hook is called all the same."""
    seen: list[str] = []
    shown: list[Any] = []

    async def start(*_: Any) -> None:
        seen.append("run start")

    async def end(run_id: str, result: Any) -> None:
        seen.append("run end")
        shown.append(result.final_state)

    async def same(state: Any) -> Any:
        return state

    kind: type[BaseModel] = Pair if root else Num
    state = Pair([7]) if root else Num(n=7)
    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=kind, output_schema=kind)
    hooks = watch(seen, on_run_start=start, on_run_end=end)
    result = await quick(hooks=hooks, redact=redact).run([stroma_node("a", contract)(same)], state)
    assert (result.status, result.final_state, result.hook_errors) == (RunStatus.COMPLETED, state, [])
    assert seen == ["run start", "start", "success", "run end"]
    assert type(shown[0]) is kind
    assert "7" not in repr(shown[0])


@pytest.mark.parametrize(("made", "root"), [({"root": "***"}, "***"), ({"hidden": True}, {"hidden": True})])
async def test_redact_of_a_root_model(made: dict[str, Any], root: Any) -> None:
    """on_run_end gets what redact made of a root model's state, whether under the key "root" or without it."""
    shown: list[Any] = []

    async def end(run_id: str, result: Any) -> None:
        shown.append(result.final_state.root)

    async def same(state: Any) -> Any:
        return state

    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=Pair, output_schema=Pair)
    runner = quick(hooks=NodeHooks(on_run_end=end), redact=lambda _: made)
    await runner.run([stroma_node("a", contract)(same)], Pair([7]))
    assert shown == [root]


async def test_a_trace_that_was_looked_at_is_still_the_runs_own() -> None:
    """G7, G8: neither redact nor on_run_end changes an event, also if a hook has looked at the trace during the run."""

    async def look(*_: Any) -> None:
        current = current_node()
        assert current is not None
        list(current.ctx.trace.walk())

    async def spoil(run_id: str, result: Any) -> None:
        for event in result.trace.walk():
            assert event.input_state == {"n": "hidden"}
            event.input_state["n"] = event.node_id = "spoiled"

    async def plus(state: Num) -> Any:
        return {"n": state.n + 1}

    nodes = [node("a", plus), parallel(node("b", plus)), node("c", plus)]
    hooks = NodeHooks(on_node_success=look, on_run_end=spoil)
    result = await quick(hooks=[hooks, hooks], redact=lambda state: {"n": "hidden"}).run(nodes, Num())
    assert result.hook_errors == []
    assert [(event.node_id, event.input_state) for event in result.trace.walk()] == [
        ("a", {"n": 0}),
        ("parallel(b)", {"n": 1}),
        ("b", {"n": 1}),
        ("c", {"n": 2}),
    ]


@pytest.mark.core
async def test_a_violation_of_the_nodes_own_making_is_shown() -> None:
    """A ContractViolation that a node made, without what belongs to it, is a failure like any other, redacted too."""

    class Own(ContractViolation):
        def __init__(self) -> None:
            pass

    async def func(state: Num) -> Any:
        raise Own

    seen: list[str] = []
    runner = quick(hooks=watch(seen), redact=lambda state: state, contract_retries={"a": 1})
    result = await runner.run([node("a", func)], Num())
    assert (result.status, seen) == (RunStatus.FAILED, ["start", "failure"])


async def test_a_hook_error_without_a_repr_is_raised_as_one() -> None:
    """hook_errors="raise" gives HookError, whatever the repr of what the hook raised does."""

    class Mute(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    async def start(*_: Any) -> None:
        raise Mute

    async def same(state: Num) -> Any:
        return state

    with pytest.raises(HookError, match="a Mute"):
        await quick(hooks=NodeHooks(on_node_start=start), hook_errors="raise").run([node("a", same)], Num())


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, BaseException, ValueError])
@pytest.mark.parametrize("where", ["__str__", "status_code", "__cause__"])
async def test_an_exception_that_raises_anything_is_a_failure(kind: type[BaseException], where: str) -> None:
    """G2: whatever str() or an attribute of an exception raises, be it no Exception, the node has failed with it."""

    def misbehave(self: object) -> Any:
        raise kind("no")

    members = {where: misbehave if where == "__str__" else property(misbehave)}
    hostile = type("Hostile", (Exception,), members)

    async def func(state: Num) -> Any:
        raise hostile("words")

    result = await quick(policy_map=NEVER).run([node("a", func)], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert result.failure.failure_class is FailureClass.AMBIGUOUS
    assert result.failure.message == ("Hostile" if where == "__str__" else "words")


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, LookupError])
@pytest.mark.parametrize("at", ["input", "output"])
async def test_a_validator_that_raises_no_validation_error_is_a_violation(
    kind: type[BaseException], at: str
) -> None:
    """A validator that raises a CancelledError, say, has refused a value: FAILED, each start ended, the run's end told."""

    class Refusing(BaseModel):
        n: int = 0

        @field_validator("n")
        @classmethod
        def refuse(cls, value: int) -> int:
            if value == 5:
                raise kind("no")
            return value

    async def func(state: Any) -> Any:
        return {"n": 5}

    given, promised = (Refusing, Num) if at == "input" else (Num, Refusing)
    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=given, output_schema=promised)
    seen: list[str] = []

    async def end(*_: Any) -> None:
        seen.append("run end")

    runner = quick(hooks=watch(seen, on_run_end=end))
    result = await runner.run([stroma_node("a", contract)(func)], Num(n=5))
    assert result.status is RunStatus.FAILED
    assert result.failure is not None
    assert result.failure.message.startswith(f"Contract violation for 'a' ({at})")
    assert seen == [*(["start"] if at == "output" else []), "failure", "run end"]


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, BaseException, ValueError])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_a_store_that_raises_no_exception_has_refused(
    kind: type[BaseException], is_async: bool
) -> None:
    """Whatever a store raises at a commit, but for KeyboardInterrupt and SystemExit, it has failed: PARTIAL, hooks pair."""

    class Refusing:
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            raise kind("no")

        def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
        def delete(self, run_id: str) -> None: ...

    class Later(Refusing):
        async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:  # type: ignore[override]
            raise kind("no")

    async def same(state: Num) -> Any:
        return state

    seen: list[str] = []

    async def end(*_: Any) -> None:
        seen.append("run end")

    runner = quick(store=Later() if is_async else Refusing(), hooks=watch(seen, on_run_end=end))
    result = await runner.run([node("a", same)], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert result.failure.reason == "store"
    assert seen == ["start", "failure", "run end"]


@pytest.mark.core
async def test_the_error_of_a_sync_hook_has_the_result_of_a_step() -> None:
    """In plain code, too, the TypeError of a hook that is not async comes after the trace, with ``result`` on it."""

    async def same(state: Num) -> Any:
        return state, 5

    runner = quick()
    config = RunConfig(hooks=NodeHooks(on_node_success=lambda *_: None))  # type: ignore[arg-type,return-value]
    ctx = ReliabilityContext.for_run(config, runner.registry, runner.checkpoint_manager)
    with pytest.raises(TypeError, match="on_node_success") as caught:
        await execute_step("a", same, Num(), ctx)
    result = caught.value.result  # type: ignore[attr-defined]
    assert (result.status, result.total_tokens) == (RunStatus.INTERRUPTED, 5)
    assert [event.outcome for event in result.trace] == ["success"]


@pytest.mark.core
async def test_hooks_that_can_be_read_once_are_read_once() -> None:
    """Sets of hooks that come out of a generator are called in every run."""
    seen: list[str] = []

    async def same(state: Num) -> Any:
        return state

    runner = quick(hooks=(hooks for hooks in [watch(seen)]))
    for _ in range(2):
        await runner.run([node("a", same)], Num())
    assert seen == ["start", "success"] * 2


async def test_limits_of_any_size() -> None:
    """A limit that is too large to be counted with is refused when it is made; the largest one is no limit."""
    largest = 10**30
    for field in ("max_tokens_total", "max_latency_ms"):
        with pytest.raises(ValueError, match=field):
            ExecutionBudget(**{field: 10**400})
    with pytest.raises(ValueError, match="node_timeouts"):
        quick(node_timeouts={"a": 10**5000})
    with pytest.raises(ValueError, match="hook_timeout_ms"):
        quick(hook_timeout_ms=10**400)
    budget = ExecutionBudget(max_tokens_total=largest, max_cost_usd=1.7e308, max_latency_ms=largest)

    async def wait(*_: Any) -> None:
        await asyncio.sleep(0)

    async def func(state: Num) -> Any:
        left = current_node().remaining_budget  # type: ignore[union-attr]
        await asyncio.sleep(0)
        assert left.tokens == largest
        return state, 5, 5, "gpt-4o"

    hooks = NodeHooks(on_node_start=wait, on_budget_warning=wait)
    runner = quick(budget=budget, hooks=hooks, hook_timeout_ms=largest, node_timeouts={"a": largest})
    result = await runner.run([parallel(node("a", func))], Num())
    result.raise_for_status()


@pytest.mark.core
def test_a_run_that_is_thrown_away_leaves_no_noise() -> None:
    """A coroutine of run() that is collected long after its loop was closed ends without a complaint."""
    complaints: list[Any] = []

    async def wait(state: Num) -> Any:
        await asyncio.sleep(30)

    async def begin() -> Any:
        task = asyncio.create_task(quick().run([node("a", wait)], Num()))
        await asyncio.sleep(0.01)
        return task

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(begin())
        loop.close()
        task._log_destroy_pending = False

    before, sys.unraisablehook = sys.unraisablehook, complaints.append
    try:
        contextvars.Context().run(abandon)
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert complaints == []
