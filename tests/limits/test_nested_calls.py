"""Calls inside calls that share budgets, limits, circuits and threads: none is in a deadlock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kit import NEVER, Num, computing, noting
from tests.tiers import examples

from stroma import (
    AsyncInMemoryStore,
    Breaker,
    FailureClass,
    FailurePolicy,
    Limit,
    NodeHooks,
    RunStatus,
    SharedBudget,
    SQLiteStore,
    StromaRunner,
    current_run,
    execute_step,
)

_numbers = count()


class Step(NamedTuple):
    """A node, the gates that it passes, and the nodes that its function runs."""

    budgets: frozenset[int]
    limit: int | None
    is_sync: bool
    is_concurrent: bool
    inner: tuple[Step, ...] = ()


def steps(inner: st.SearchStrategy[tuple[Step, ...]]) -> st.SearchStrategy[Step]:
    return st.builds(
        Step,
        st.frozensets(st.integers(0, 2)),
        st.none() | st.integers(0, 1),
        st.booleans(),
        st.booleans(),
        inner,
    )


def programs(depth: int) -> st.SearchStrategy[tuple[Step, ...]]:
    inner = st.just(()) if depth == 0 else programs(depth - 1)
    return st.lists(steps(inner), max_size=2).map(tuple)


def size_of(program: tuple[Step, ...]) -> int:
    return sum(1 + size_of(step.inner) for step in program)


class Nest:
    """The nodes of a program, and a runner of theirs."""

    def __init__(self, program: tuple[Step, ...], store: Any) -> None:
        self.by_budget: list[list[str]] = [[], [], []]
        self.node_limits: dict[str, str] = {}
        self.ids = count()
        number = next(_numbers)
        plain = StromaRunner.quick()
        self.runner = plain
        self.roots = [self.build(step) for step in program]
        self.budgets = [
            # Each call reserves more than half of it, so that one call at a time has room.
            SharedBudget(
                f"{number}-{i}",
                max_tokens=100,
                reserve_tokens=60,
                store=store,
                nodes=ids,
                max_wait_seconds=None,
            )
            for i, ids in enumerate(self.by_budget)
        ]
        named = {node: f"{number}-{name}" for node, name in self.node_limits.items()}
        self.runner = StromaRunner.quick(
            store=store,
            shared_budgets=self.budgets,
            limits={name: Limit(concurrent=1, max_wait_seconds=None) for name in named.values()},
            node_limits=named,
            breaker=Breaker(min_calls=1, max_wait_seconds=None),
            max_threads=1,
        )

    def build(self, step: Step) -> Any:
        node_id = f"n{next(self.ids)}"
        for i in step.budgets:
            self.by_budget[i].append(node_id)
        if step.limit is not None:
            self.node_limits[node_id] = str(step.limit)
        inner = [self.build(one) for one in step.inner]

        async def run_inner(state: Num) -> None:
            if step.is_concurrent:
                results = await asyncio.gather(*(self.runner.run([one], state) for one in inner))
            else:
                results = [await self.runner.run([one], state) for one in inner]
            assert all(result.status is RunStatus.COMPLETED for result in results), results

        async def call(state: Num) -> Any:
            await asyncio.sleep(0.001)
            await run_inner(state)
            return state, 1

        def call_sync(state: Num) -> Any:
            for one in inner:
                result = self.runner.run_sync([one], state)
                assert result.status is RunStatus.COMPLETED, result
            return state, 1

        func: Callable[[Num], Any] = call_sync if step.is_sync else call
        return StromaRunner.quick().node(node_id, input=Num, output=Num)(func)

    async def run(self) -> list[Any]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*(self.runner.run([root], Num()) for root in self.roots))


async def _check(program: tuple[Step, ...], store: Any) -> None:
    nest = Nest(program, store)
    results = await nest.run()
    assert [result.status for result in results] == [RunStatus.COMPLETED] * len(program), results
    for budget, nodes in zip(nest.budgets, nest.by_budget, strict=True):
        state = await budget.state()
        used = (0, 0) if state is None else (state.spent_tokens, state.reserved_tokens)
        assert used == (len(nodes), 0)


WIDE = st.lists(steps(programs(2)), min_size=2, max_size=4).map(tuple)


@examples(60)
@given(program=WIDE)
def test_no_call_waits_for_calls_that_wait_for_it(program: tuple[Step, ...]) -> None:
    """Nested calls that need each other's budgets, limits and threads end, and budgets have their use."""
    asyncio.run(_check(program, AsyncInMemoryStore()))


@pytest.mark.slow
def test_no_call_in_a_file_waits_for_calls_that_wait_for_it(tmp_path: Path) -> None:
    """The same with budgets in a store of their own."""
    store = SQLiteStore(tmp_path / "runs.db", synchronous="normal")

    @examples(15)
    @given(program=WIDE)
    def check(program: tuple[Step, ...]) -> None:
        asyncio.run(_check(program, store))

    check()
    store.close()


@pytest.mark.core
async def test_two_budgets_that_need_each_other() -> None:
    """Two outer calls that hold what the other's inner call needs both complete without a time limit."""
    program = tuple(
        Step(frozenset({i}), None, False, False, (Step(frozenset({0, 1}), None, False, False),))
        for i in (0, 1)
    )
    await _check(program, AsyncInMemoryStore())


async def test_an_inner_call_uses_the_place_of_the_call_around_it() -> None:
    """A call inside one that has the only place of ``Limit(concurrent=1)`` does not wait for it."""
    program = (Step(frozenset(), 0, False, False, (Step(frozenset(), 0, False, False),)),)
    await _check(program, AsyncInMemoryStore())


async def test_an_inner_call_does_not_wait_for_the_probe_around_it() -> None:
    """The call that probes a circuit leaves that to the call inside it, which needs the same provider."""
    now, is_down = 0.0, True
    runner = StromaRunner.quick(
        breaker=Breaker(min_calls=1, open_seconds=1, max_wait_seconds=None, _clock=lambda: now),
        limits={"llm": Limit(requests_per_minute=1000)},
        node_limits={"outer": "llm", "inner": "llm"},
        policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=0)},
    )

    @runner.node("inner", input=Num, output=Num)
    async def inner(state: Num) -> Num:
        if is_down:
            raise ConnectionError("down")
        return state

    @runner.node("outer", input=Num, output=Num)
    async def outer(state: Num) -> Num:
        result = await runner.run([inner], state)
        result.raise_for_status()
        return state

    assert (await runner.run([inner], Num())).status is RunStatus.PARTIAL
    now, is_down = 1.5, False
    async with asyncio.timeout(30):
        result = await runner.run([outer], Num())
    assert result.status is RunStatus.COMPLETED
    assert [mark.kind for mark in result.trace.marks] == ["circuit_half_open"]


async def test_a_call_that_waits_holds_no_other_budget() -> None:
    """An attempt that waits for room in one budget reserves nothing in the others meanwhile."""
    number, store = next(_numbers), AsyncInMemoryStore()
    one, two = (
        SharedBudget(f"{number}-{name}", max_tokens=100, reserve_tokens=60, store=store, nodes=nodes)
        for name, nodes in (("1", ["both"]), ("2", ["both", "busy"]))
    )
    runner = StromaRunner.quick(shared_budgets=[one, two])
    started, gate = asyncio.Event(), asyncio.Event()
    reserved: list[int] = []

    @runner.node("busy", input=Num, output=Num)
    async def busy(state: Num) -> Any:
        started.set()
        await gate.wait()
        return state, 1

    both = runner.node("both", input=Num, output=Num)(computing(lambda state: (state, 1)))

    async def look(*_: Any) -> None:
        account = await one.state()
        reserved.append(0 if account is None else account.reserved_tokens)
        gate.set()

    runner = runner.with_hooks(NodeHooks(on_node_wait=look))
    first = asyncio.create_task(runner.run([busy], Num()))
    await started.wait()
    assert (await runner.run([both], Num())).status is RunStatus.COMPLETED
    assert (await first).status is RunStatus.COMPLETED
    assert reserved == [0]


def nested_runner(error: Exception, **config: Any) -> tuple[StromaRunner, Any]:
    """Return a runner, and a node that calls a step that calls one which raises."""
    runner = StromaRunner.quick(policy_map=NEVER, **config)

    @runner.node("model", input=Num, output=Num)
    async def model(state: Num) -> Num:
        raise error

    async def call(step_id: str, step: Any, state: Num) -> Num:
        run = current_run()
        assert run is not None
        result = await execute_step(step_id, step, state, run)
        result.raise_for_status()
        return state

    tool = runner.node("tool", input=Num, output=Num)(partial(call, "model", model))
    return runner, runner.node("agent", input=Num, output=Num)(partial(call, "tool", tool))


@pytest.mark.core
async def test_a_failure_inside_counts_once_in_its_circuit() -> None:
    """A failed call of a provider is one call in its circuit, however many steps are around it."""
    breaker = Breaker(min_calls=3, max_wait_seconds=0)
    down = httpx.ConnectError("down", request=httpx.Request("POST", "https://model.test"))
    runner, agent = nested_runner(down, breaker=breaker)
    states = []
    for _ in range(3):
        await runner.run([agent], Num())
        states.append(breaker.states()["model.test"])
    assert states == ["closed", "closed", "open"]


@pytest.mark.core
async def test_a_refusal_inside_closes_the_limit_of_its_own_step() -> None:
    """A 429 closes the limit of the step that got it, and not those of the steps around it."""
    closed = []

    reply = httpx.Response(429, headers={"retry-after": "60"})
    limited = httpx.HTTPStatusError("", request=httpx.Request("POST", "https://model.test"), response=reply)
    names = {name: f"{name}-{next(_numbers)}" for name in ("model", "tool", "agent")}
    runner, agent = nested_runner(
        limited,
        limits={name: Limit(concurrent=5) for name in names.values()},
        node_limits=names,
        hooks=NodeHooks(on_limit_cooldown=noting(closed, lambda _run_id, limit, _seconds: limit)),
    )
    await runner.run([agent], Num())
    assert closed == [names["model"]]
