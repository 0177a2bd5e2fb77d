"""Many runs at once, of one runner, over tasks, threads, event loops, processes, nested: no cross-talk."""

import asyncio
import contextvars
import multiprocessing
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from tests.fixtures import store_fixture
from tests.kit import ONCE, Num, computing, node, same
from tests.shared_stores import LOCAL

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ExecutionBudget,
    ExecutionResult,
    InMemoryStore,
    NodeHooks,
    RunBusy,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    current_node,
    current_node_or_none,
    map_over,
    parallel,
)
from stroma.checkpoint import RunRequest
from stroma.checkpoint.queue import ClaimRequest, QueueEntry, RunLimits
from stroma.contracts.schema import schema_of

pytestmark = pytest.mark.filterwarnings("error")

whose: contextvars.ContextVar[int] = contextvars.ContextVar("whose", default=-1)


class Items(BaseModel):
    n: int = 0
    items: list[dict[str, int]] = []


store = store_fixture(*LOCAL, "sqlite")


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives for each number, all begun at the same moment, each in a thread of its own."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def go(i: int) -> None:
        try:
            barrier.wait(30)
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


class Crowd:
    """Nodes and hooks that know whose run they are in, and note whenever anything says otherwise."""

    def __init__(self) -> None:
        self.wrong: list[Any] = []
        self.seen: Counter[tuple[str, str]] = Counter()
        self.hooks = NodeHooks(
            on_run_start=self._hook("run_start"),
            on_node_start=self._hook("start"),
            on_node_success=self._hook("success"),
            on_node_failure=self._hook("failure"),
            on_run_end=self._end,
        )
        self.nodes = [
            node("a", self._node),
            parallel(node("b", self._node), node("c", self._plain)),
            node("d", self._last),
        ]

    def _check(self, me: int, run_id: str, what: str) -> None:
        if run_id != f"run {me}":
            self.wrong.append((what, me, run_id))

    def _hook(self, event: str) -> Any:
        async def hook(run_id: str, *arguments: Any) -> None:
            self.seen[run_id, event] += 1
            if event == "start":
                self._check(arguments[1]["n"], run_id, event)
            run = current_node_or_none()
            if event != "run_start" and (run is None or run.run_id != run_id):
                self.wrong.append((event, run_id, run))
            if event == "run_start":
                whose.set(int(run_id.split()[1]))

        return hook

    async def _end(self, run_id: str, result: ExecutionResult) -> None:
        self.seen[run_id, "run_end"] += 1
        if result.run_id != run_id or whose.get() != int(run_id.split()[1]):
            self.wrong.append(("end", run_id, result.run_id))

    def _look(self, state: Num, ctx: dict[str, Any]) -> Any:
        run = current_node()
        self._check(state.n, run.run_id, run.node_id)
        if ctx["me"] != state.n or whose.get() != state.n:
            self.wrong.append((run, ctx["me"], whose.get()))
        return run

    async def _node(self, state: Num, ctx: dict[str, Any]) -> Any:
        run = self._look(state, ctx)
        ctx["calls"] = ctx.get("calls", 0) + 1
        await asyncio.sleep(0)
        if self._look(state, ctx) is not run:
            self.wrong.append(run)
        if run.attempt == 1 and state.n % 5 == 0:
            raise LookupError(f"of {state.n}")
        return state, state.n % 7

    async def _plain(self, state: Num) -> Any:
        await asyncio.sleep(0)
        return state, 1

    async def _last(self, state: Num, ctx: dict[str, Any]) -> Any:
        self._look(state, ctx)
        return state, 1000 if state.n % 11 == 0 else 0

    def runner(self, store: Any) -> StromaRunner:
        budget = ExecutionBudget(max_tokens_total=100)
        return StromaRunner.quick(store=store, hooks=self.hooks, policy_map=ONCE, budget=budget)

    async def run(self, runner: StromaRunner, i: int) -> tuple[int, Any, dict[str, Any]]:
        context: dict[str, Any] = {"me": i}
        result = await runner.run(self.nodes, Num(n=i), run_id=f"run {i}", context=context)
        return i, result, context

    def check(self, results: list[tuple[int, Any, dict[str, Any]]]) -> None:
        assert self.wrong == []
        for i, result, context in results:
            failing = i % 5 == 0
            spends = 2 * (i % 7) + 1 + (1000 if i % 11 == 0 else 0)
            assert result.run_id == f"run {i}"
            assert result.status is (RunStatus.PARTIAL if i % 11 == 0 else RunStatus.COMPLETED), (
                result.failure
            )
            assert result.final_state == Num(n=i)
            assert result.total_tokens == spends
            events = list(result.trace.walk())
            assert {event.run_id for event in events} == {f"run {i}"}
            assert all(event.input_state == {"n": i} for event in events)
            assert {event.failure_message for event in events if event.failure and event.node_id != "d"} <= {
                f"of {i}"
            }
            assert len(events) == 5 + 2 * failing
            assert context == {"me": i, "calls": 2 + 2 * failing}
            expected = {
                "run_start": 1,
                "start": 5 + 2 * failing,
                "success": 5 - (i % 11 == 0),
                "failure": 2 * failing + (i % 11 == 0),
                "run_end": 1,
            }
            for event, count in expected.items():
                assert self.seen[f"run {i}", event] == count, (i, event)


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(10_000, marks=[pytest.mark.nightly, pytest.mark.slow])]
)
@pytest.mark.timeout(120)
async def test_ten_thousand_runs_at_once(count: int) -> None:
    """10,000 runs of one runner at once: ids, states, traces, budgets, hooks and variables stay apart."""
    crowd = Crowd()
    runner = crowd.runner(AsyncInMemoryStore())
    results = await asyncio.gather(*[crowd.run(runner, i) for i in range(count)])
    crowd.check(results)
    assert whose.get() == -1
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_loops_and_threads_share_a_runner_and_a_store(store: Any, hasty: None) -> None:
    """Several threads, each with an event loop of its own and many runs, over one runner and one store."""
    crowd = Crowd()
    runner = crowd.runner(store)
    each = 12

    async def some(thread: int) -> Any:
        return await asyncio.gather(*[crowd.run(runner, thread * each + k) for k in range(each)])

    results = in_threads(6, lambda i: asyncio.run(some(i)))
    flat = [result for group in results for result in group]
    assert len(flat) == 72
    crowd.check(flat)
    manager = CheckpointManager(store)

    async def commit_all() -> None:
        for i in range(72):
            assert await manager.resume(f"run {i}", "c", Num) == Num(n=i)
            assert await manager.resume(f"run {i}", "d", Num) == Num(n=i)

    asyncio.run(commit_all())


def test_sync_nodes_of_many_loops(store: Any, hasty: None) -> None:
    """Sync nodes, in threads of their own under several loops, know their run and get their own state."""
    wrong: list[Any] = []

    def work(state: Num) -> Any:
        run = current_node()
        if run.run_id != f"run {state.n}":
            wrong.append(run)
        run.report_usage(input_tokens=state.n)
        return state

    runner = StromaRunner.quick(store=store)
    nodes = [node("a", work)] * 2

    async def some(i: int) -> Any:
        return await asyncio.gather(
            *[runner.run(nodes, Num(n=n), run_id=f"run {n}") for n in range(i, i + 8)]
        )

    for group, i in zip(in_threads(5, lambda i: asyncio.run(some(8 * i))), range(5), strict=True):
        for result, n in zip(group, range(8 * i, 8 * i + 8), strict=True):
            assert (result.final_state, result.total_tokens) == (Num(n=n), 2 * n)
    assert wrong == []


class Plain(BaseModel):
    a: int
    b: int


class Hidden(BaseModel):
    a: int
    b: int = Field(exclude=True)


class Taken(BaseModel):
    a: int
    b: int = 0


def test_one_node_fed_by_many_classes(hasty: None) -> None:
    """A node that gets states of several classes from several threads at once handles each by its class."""
    instance = node("n", same, Taken, Taken)
    runner = StromaRunner.quick()

    def work(i: int) -> Any:
        kind = Hidden if i % 2 else Plain
        return [runner.run_sync([instance], kind(a=i, b=9)).final_state for _ in range(60)]

    for i, states in enumerate(in_threads(6, work)):
        assert states == [Taken(a=i, b=0 if i % 2 else 9)] * 60


def test_generated_ids_are_fresh_in_every_thread(hasty: None) -> None:
    """The first runs of a new runner, begun by several threads at the same moment, have ids of their own."""
    for _ in range(60):
        runner = StromaRunner.quick()
        results = in_threads(6, lambda i, runner=runner: runner.run_sync([], Num()).run_id)
        assert len(set(results)) == 6


def test_threads_that_share_a_run_in_memory(hasty: None) -> None:
    """G10: Of the threads that open a run of one store in memory at one moment, or claim it, one gets it."""
    request = RunRequest("r", "pipeline", Num(), schema_of(Num), if_exists="resume")

    def open_it(store: Any) -> Any:
        try:
            return store.open_run(request)
        except RunBusy:
            return None

    def claim_it(store: Any, i: int) -> list[Any]:
        claim = ClaimRequest(f"worker {i}", 30.0, 1, 1, {"pipeline": RunLimits()})
        claimed: list[Any] = asyncio.run(store.claim(claim))
        return claimed

    for _ in range(150):
        store = InMemoryStore()
        assert sum(one is not None for one in in_threads(4, lambda _, store=store: open_it(store))) == 1
    for _ in range(100):
        store = InMemoryStore()
        asyncio.run(store.submit(request, QueueEntry(0)))
        assert sum(map(len, in_threads(4, lambda i, store=store: claim_it(store, i)))) == 1


async def test_nested_runs(store: Any) -> None:
    """A node may run a pipeline of the same runner, at any depth, in groups: no run shows in another."""
    runs: list[Any] = []
    hooked: Counter[Any] = Counter()

    async def on_start(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        run = current_node()
        assert (run.run_id, run.node_id) == (run_id, node_id)
        hooked[run_id] += 1

    runner = StromaRunner.quick(
        store=store,
        hooks=NodeHooks(on_node_start=on_start),
        budget=ExecutionBudget(max_tokens_total=10),
        policy_map=ONCE,
    )

    async def work(state: Items, ctx: dict[str, Any]) -> Any:
        me = current_node()
        depth = ctx["depth"]
        assert me.run_id == ctx["id"]
        whose.set(depth)
        if depth < 3:
            inner_id = f"{me.run_id}/{me.branch or '-'}"
            inner = await runner.run(
                [parallel(node("x", work, Items, Items), node("y", work, Items, Items))]
                if depth == 0
                else [node("x", work, Items, Items)],
                state,
                run_id=inner_id,
                context={"depth": depth + 1, "id": inner_id},
            )
            runs.append(inner)
            assert inner.status is RunStatus.COMPLETED, inner.failure
        assert current_node_or_none() is me
        left = me.remaining_budget.tokens
        assert left is not None
        assert left <= 10
        return state, 5

    nodes = [node("top", work, Items, Items), node("top", work, Items, Items)]
    top = await runner.run(nodes, Items(), run_id="0", context={"depth": 0, "id": "0"})
    # Each run has a budget of its own: none saw what the others spent.
    assert top.status is RunStatus.COMPLETED, top.failure
    assert top.total_tokens == 10
    assert [event.node_id for event in top.trace.walk()] == ["top", "top"]
    by_id: dict[str, list[Any]] = {}
    for inner in runs:
        by_id.setdefault(inner.run_id, []).append(inner)
    assert set(by_id) == {"0/-", "0/-/0", "0/-/1", "0/-/0/-", "0/-/1/-"}
    for run_id, twice in by_id.items():
        assert len(twice) == 2
        for inner in twice:
            assert inner.total_tokens == (10 if run_id == "0/-" else 5)
            assert all(event.run_id == run_id for event in inner.trace.walk())
    assert current_node_or_none() is None


def test_nested_run_sync_in_a_thread(store: Any) -> None:
    """A sync node may use run_sync of the same runner and store, while the outer loop waits for it."""
    runner = StromaRunner.quick(store=store)

    inner = computing(lambda state: ({"n": state.n + 1}, 3))

    def outer(state: Num) -> Any:
        result = runner.run_sync([node("inner", inner)] * 2, state, run_id=f"inner of {state.n}")
        return result.final_state, result.total_tokens

    nodes = [map_over("items", node("outer", outer), into="items")]
    result = runner.run_sync(nodes, Items(items=[{"n": 1}, {"n": 5}]))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state.model_dump()["items"] == [{"n": 3}, {"n": 7}]
    assert result.total_tokens == 12


async def _count(state: Num) -> Any:
    return {"n": state.n + 1}, 2


def _in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a forked child; its exception as text."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def main() -> None:
        try:
            sender.send(work())
        except BaseException as error:
            sender.send(repr(error))
        finally:
            sender.close()
            os._exit(0)

    child = context.Process(target=main)
    child.start()
    try:
        assert receiver.poll(20), "the child says nothing"
        return receiver.recv()
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_runner_before_and_after_a_fork(tmp_path: Path) -> None:
    """A runner and its SQLiteStore work before a fork, in the child, and in the parent, later and at once."""
    store = SQLiteStore(tmp_path / "runs.db", synchronous="normal")
    runner = StromaRunner.quick(store=store)
    nodes = [node("a", _count)] * 3

    def go(run_id: str, **options: Any) -> Any:
        result = runner.run_sync(nodes, Num(), run_id=run_id, **options)
        return result.status.value, result.final_state.n, result.total_tokens

    assert go("before") == ("COMPLETED", 3, 6)
    assert _in_child(lambda: [go(f"child {i}") for i in range(5)]) == [("COMPLETED", 3, 6)] * 5
    assert _in_child(lambda: go("before", resume=True)) == ("RESUMED", 3, 0)
    assert go("after") == ("COMPLETED", 3, 6)
    assert go("child 0", resume=True) == ("RESUMED", 3, 0)
    assert {row.run_id for row in store.list_runs()} == {"before", "after", *(f"child {i}" for i in range(5))}
    store.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_generated_ids_after_a_fork(used: bool, tmp_path: Path) -> None:
    """A runner that was made before a fork gives the runs of parent and children ids of their own."""
    store = SQLiteStore(tmp_path / "runs.db", synchronous="normal")
    runner = StromaRunner.quick(store=store)
    nodes = [node("a", _count)]
    ids = [runner.run_sync(nodes, Num()).run_id] if used else []
    ids += [_in_child(lambda: runner.run_sync(nodes, Num()).run_id) for _ in range(2)]
    ids += [runner.run_sync(nodes, Num()).run_id]
    assert len(set(ids)) == len(ids)
    assert len(store.list_runs()) == len(ids)
    store.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """A child that is forked while its parent runs may run pipelines of its own; the parent's run goes on."""
    store = SQLiteStore(tmp_path / "runs.db", synchronous="normal")
    runner = StromaRunner.quick(store=store)

    def forks(state: Num) -> Any:
        report = _in_child(
            lambda: runner.run_sync([node("a", _count)], Num(n=10), run_id="child").final_state
        )
        return {"n": report.n}, 1

    nodes = [node("a", _count), node("forks", forks), node("b", _count)]
    result = runner.run_sync(nodes, Num(), run_id="parent")
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Num(n=12)), result.failure
    statuses = {row.run_id: row.status for row in store.list_runs()}
    assert statuses == {"parent": "COMPLETED", "child": "COMPLETED"}
    store.close()


def test_a_running_loop_as_in_a_notebook() -> None:
    """Where a loop runs, run_sync says to await run(), leaves no coroutine, and `await run()` works."""
    loop = asyncio.new_event_loop()
    runner = StromaRunner.quick(store=AsyncInMemoryStore())
    nodes = [node("a", _count)]

    async def cell(code: str) -> Any:
        if code == "sync":
            return runner.run_sync(nodes, Num())
        return await runner.run(nodes, Num())

    try:
        # Cells, one after the other, in tasks of the same loop.
        first = loop.run_until_complete(cell("await"))
        with pytest.raises(RuntimeError, match=r"await runner\.run\("):
            loop.run_until_complete(cell("sync"))
        second = loop.run_until_complete(cell("await"))
        assert first.final_state == second.final_state == Num(n=1)
        assert first.run_id != second.run_id
        assert not asyncio.all_tasks(loop)
    finally:
        loop.close()


async def test_run_sync_next_to_a_running_loop(store: Any) -> None:
    """run_sync in a thread works beside a loop that runs, on the same runner and store as the loop's runs."""
    runner = StromaRunner.quick(store=store)
    nodes = [node("a", _count)] * 2
    results = await asyncio.gather(
        *[asyncio.to_thread(runner.run_sync, nodes, Num(n=i), run_id=f"thread {i}") for i in range(4)],
        *[runner.run(nodes, Num(n=i), run_id=f"loop {i}") for i in range(4)],
    )
    assert [result.final_state for result in results] == [Num(n=i + 2) for i in range(4)] * 2


async def test_context_variables_of_runs_side_by_side() -> None:
    """A context variable that a node sets is seen by later nodes of its run, and by nobody else."""
    var: contextvars.ContextVar[int] = contextvars.ContextVar("var", default=0)

    async def sets(state: Num) -> Any:
        var.set(state.n)
        await asyncio.sleep(0)
        return state

    async def reads(state: Num) -> Any:
        await asyncio.sleep(0)
        return {"n": var.get()}

    runner = StromaRunner.quick()
    nodes = [node("sets", sets), node("reads", reads), node("sync", lambda state: {"n": var.get()})]
    results = await asyncio.gather(*[runner.run(nodes, Num(n=i)) for i in range(1, 50)])
    assert [result.final_state for result in results] == [Num(n=i) for i in range(1, 50)]
    assert var.get() == 0
