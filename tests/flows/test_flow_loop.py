"""The event loop of a flow's body: asyncio in an order that a replay repeats, and nothing from outside."""

import asyncio
import contextlib
import contextvars
import gc
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import pytest
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, runner_on
from tests.kit import Num, node, quick_without_retries
from tests.shared_stores import IN_PROCESS

from stroma import Flow, InMemoryStore, RunStatus, SQLiteStore, stroma_flow

Body = Callable[[Flow, Num], Coroutine[Any, Any, Num]]
store = store_fixture(*IN_PROCESS)
world = World()
add = world.step("add")


def flow_with(body: Body) -> Any:
    return stroma_flow("f", input=Num, output=Num)(body)


async def queues(flow: Flow, state: Num) -> Num:
    queue: asyncio.Queue[int] = asyncio.PriorityQueue(1)
    async with asyncio.TaskGroup() as group:
        for n in range(3):
            group.create_task(queue.put((3 - n) * state.n))
        got = [await queue.get() for _ in range(3)]
    return await flow.step(add, Num(n=sum(got)))


async def locks(flow: Flow, state: Num) -> Num:
    lock, condition, barrier = asyncio.Lock(), asyncio.Condition(), asyncio.Barrier(2)
    order: list[int] = []

    async def one(n: int) -> None:
        async with lock:
            await flow.step(add, state)
        await barrier.wait()
        async with condition:
            order.append(n)
            condition.notify_all()
            await condition.wait_for(lambda: len(order) == 2)

    await asyncio.gather(one(1), one(2))
    assert order == [2, 1]  # The one that comes last at a barrier goes first.
    return state


async def timeouts(flow: Flow, state: Num) -> Num:
    loop = asyncio.get_running_loop()
    for limit in (asyncio.timeout(0.001), asyncio.timeout_at(loop.time())):
        with pytest.raises(TimeoutError):
            async with limit:
                await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asyncio.sleep(0.02)), 0.001)
    done, pending = await asyncio.wait([asyncio.create_task(flow.step(add, state))], timeout=60)
    assert (len(done), pending) == (1, set())
    return state


async def completed(flow: Flow, state: Num) -> Num:
    tasks = [asyncio.create_task(flow.step(add, Num(n=n))) for n in range(3)]
    return Num(n=sum([(await one).n for one in asyncio.as_completed(tasks)]))


async def scopes(flow: Flow, state: Num) -> Num:
    with anyio.move_on_after(0.001) as scope:
        await anyio.Event().wait()
    assert scope.cancelled_caught
    with pytest.raises(TimeoutError), anyio.fail_after(0.001):
        await flow.wait_for(Text, reason="Well?")
    send, receive = anyio.create_memory_object_stream[Num](1)
    event = anyio.Event()

    async def produce() -> None:
        async with send:
            for n in range(3):
                await send.send(await flow.step(add, Num(n=n)))
        event.set()

    async with anyio.create_task_group() as group, receive:
        group.start_soon(produce)
        got = [one.n async for one in receive]
    await event.wait()
    return Num(n=sum(got))


async def generators(flow: Flow, state: Num) -> Num:
    closed: list[int] = []

    async def items(n: int) -> AsyncIterator[Num]:
        try:
            while True:
                yield await flow.step(add, Num(n=n))
        finally:
            closed.append(n)

    async with contextlib.aclosing(items(1)) as closing:
        async for _ in closing:
            break
    assert closed == [1]
    return state


@pytest.mark.parametrize("body", [queues, locks, timeouts, completed, scopes, generators])
async def test_the_tools_of_asyncio_and_anyio_work_in_a_body(body: Body) -> None:
    """A body may use what asyncio and anyio have for tasks, and replays to the same result without a call."""
    store = InMemoryStore()
    first = await runner_on(store).run(flow_with(body), Num(n=1))
    assert first.status is RunStatus.COMPLETED, first.failure
    store._runs["r"].steps.pop(0)  # The output of the flow.
    store._runs["r"].status = "INTERRUPTED"
    world.calls.clear()
    again = await runner_on(store).run(flow_with(body), Num(n=1))
    assert (again.status, again.output, world.calls) == (RunStatus.RESUMED, first.output, []), again.failure


async def test_variables_of_a_task_reach_its_steps() -> None:
    """A step sees the context variables of the task that awaits it, and each task has its own."""
    variable = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []

    async def look(state: Num) -> Num:
        seen.append(f"{state.n} {variable.get()}")
        return state

    looks = node("look", look)

    async def body(flow: Flow, state: Num) -> Num:
        async def branch(n: int) -> None:
            variable.set(f"branch {n}")
            await flow.step(looks, Num(n=n))

        await asyncio.gather(branch(1), branch(2))
        await flow.step(looks, Num(n=0))
        variable.set("body")
        return await flow.step(looks, Num(n=3))

    assert (await quick_without_retries().run(flow_with(body), Num())).failure is None
    assert sorted(seen) == ["0 none", "1 branch 1", "2 branch 2", "3 body"]


async def test_cancelled_tasks_clean_up_in_the_order_in_which_they_began() -> None:
    """G5: The siblings that a failure cancels make their clean-up calls in one order, whatever their
    addresses are: asyncio keeps the tasks of a group in a set."""
    world = World()
    world.turns["add"] = 10**6
    world.failing.add("bad")
    add, bad, clean = world.step("add"), world.step("bad"), world.step("clean")

    async def body(flow: Flow, state: Num) -> Num:
        async def one(n: int) -> None:
            try:
                await flow.step(add, Num(n=n))
            finally:
                await flow.step(clean, Num(n=n))

        try:
            async with asyncio.TaskGroup() as group:
                for n in range(12):
                    group.create_task(one(n))
                group.create_task(flow.step(bad, state))
        except ExceptionGroup:
            tasks = [asyncio.create_task(flow.step(clean, Num(n=n))) for n in range(20, 32)]
            done, _ = await asyncio.wait(tasks)
            return Num(n=[tasks.index(one) for one in done] == list(range(12)))
        return state

    result = await quick_without_retries().run(flow_with(body), Num())
    cleaned = [call for call in world.calls if call.startswith("clean")]
    assert cleaned[:12] == [f"clean {n}" for n in range(12)]
    assert result.output == Num(n=1)


async def test_tasks_of_a_body_have_the_same_names_on_replay() -> None:
    """The default names of tasks are numbered in their flow: a body may pass them to a step."""

    async def body(flow: Flow, state: Num) -> Num:
        async def name() -> str:
            task = asyncio.current_task()
            assert task is not None
            return task.get_name()

        names = await asyncio.gather(asyncio.create_task(name()), asyncio.create_task(name(), name="mine"))
        assert names == ["Task-2", "mine"]
        return await flow.step(add, state)

    assert (await quick_without_retries().run(flow_with(body), Num())).failure is None


async def test_an_exception_that_no_task_retrieves_is_reported() -> None:
    """The exception of a task that nobody awaits reaches the exception handler of the program's loop."""
    reported: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: reported.append(str(context.get("exception")))
    )

    async def body(flow: Flow, state: Num) -> Num:
        async def fail() -> None:
            raise ValueError("nobody awaits this")

        task = asyncio.create_task(fail())
        state = await flow.step(add, state)
        del task
        gc.collect()
        return state

    assert (await quick_without_retries().run(flow_with(body), Num())).failure is None
    assert reported == ["nobody awaits this"]


async def thread(flow: Flow) -> None:
    await asyncio.to_thread(print)


async def connection(flow: Flow) -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def process(flow: Flow) -> None:
    await asyncio.create_subprocess_exec("true")


async def spin(flow: Flow) -> None:
    while True:
        await asyncio.sleep(0)


async def event(flow: Flow) -> None:
    await asyncio.Event().wait()


async def outside(flow: Flow) -> None:
    await OUTSIDE[0]


OUTSIDE: list[asyncio.Future[None]] = []


@pytest.mark.parametrize(
    ("waits", "said"),
    [
        (thread, r"called run_in_executor\(\) of its event loop; do this in a step"),
        (connection, r"called create_connection\(\) of its event loop; do this in a step"),
        (process, r"called subprocess_exec\(\) of its event loop; do this in a step"),
        (spin, "replace its polling loop by an asyncio.Event"),
        (event, "no step, timer or question of it is open; check its events, locks and queues"),
        (outside, "attached to a different loop"),
    ],
)
async def test_a_body_that_waits_for_something_else_is_told_at_once(waits: Any, said: str) -> None:
    """A body that waits for a thread, a socket, a process, a loop or nothing ends the run with the fix."""
    OUTSIDE[:] = [asyncio.get_running_loop().create_future()]

    async def body(flow: Flow, state: Num) -> Num:
        await waits(flow)
        return state

    result = await quick_without_retries().run(flow_with(body), Num())
    assert result.failure is not None
    assert said.replace("\\", "") in result.failure.message


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.parametrize("is_debugged", [False, True])
def test_a_flow_runs_where_tasks_begin_at_once(is_debugged: bool, tmp_path: Any) -> None:
    """With asyncio's eager task factory, and in debug mode, a flow runs as without, and its questions too."""

    async def body(flow: Flow, state: Num) -> Num:
        question = asyncio.create_task(flow.wait_for(Text, reason="Well?"))
        state = await flow.step(add, state)
        question.cancel()
        await asyncio.wait([question])
        both = await asyncio.gather(flow.step(add, state), flow.step(add, Num(n=5)))
        await flow.sleep(0.001)
        return both[0]

    async def main() -> Any:
        factory: Any = getattr(asyncio, "eager_task_factory", None)
        asyncio.get_running_loop().set_task_factory(factory)
        with SQLiteStore(tmp_path / "runs.db") as store:
            return await runner_on(store).run(flow_with(body), Num())

    result = asyncio.run(main(), debug=is_debugged)
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=2)), result.failure


async def _left_behind(run: Coroutine[Any, Any, Any], is_under_way: asyncio.Event) -> Any:
    task = asyncio.create_task(run)
    await is_under_way.wait()
    return task


async def _all_cancelled(run: Coroutine[Any, Any, Any], is_under_way: asyncio.Event) -> None:
    await _left_behind(run, is_under_way)
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _cancelled(run: Coroutine[Any, Any, Any], is_under_way: asyncio.Event) -> None:
    task = await _left_behind(run, is_under_way)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _awaited(run: Coroutine[Any, Any, Any], is_under_way: asyncio.Event) -> None:
    await run


@pytest.mark.parametrize("way", [_left_behind, _all_cancelled, _cancelled, KeyboardInterrupt, SystemExit])
def test_a_run_that_is_ended_from_outside_is_resumed(store: Any, way: Any) -> None:
    """A program that ends while a flow is at work is never taken for what its body did: the run resumes."""
    calls: list[int] = []
    is_first = [True]
    is_under_way = asyncio.Event()

    async def work(state: Num) -> Num:
        calls.append(state.n)
        if is_first[0] and state.n == 11:
            if way in (KeyboardInterrupt, SystemExit):
                raise way
            is_under_way.set()
            await asyncio.Event().wait()
        return Num(n=state.n + 10)

    works = node("work", work)

    async def body(flow: Flow, state: Num) -> Num:
        async def one(n: int) -> Num:
            try:
                return await flow.step(works, await flow.step(works, Num(n=n)))
            finally:
                await flow.step(works, Num(n=100 + n))

        done = await asyncio.gather(*(one(n) for n in range(3)))
        return Num(n=sum(found.n for found in done))

    async def live(end: Any) -> Any:
        return await end(runner_on(store).run(flow_with(body), Num()), is_under_way)

    is_raised = way in (KeyboardInterrupt, SystemExit)
    with pytest.raises(way) if is_raised else contextlib.nullcontext():
        asyncio.run(live(_awaited if is_raised else way))
    is_first[0] = False
    result = asyncio.run(runner_on(store).run(flow_with(body), Num()))
    assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=63)), result.failure
    assert sorted(set(calls)) == [0, 1, 2, 10, 11, 12, 100, 101, 102]


@pytest.mark.parametrize("way", ["closed", "collected"])
async def test_a_stream_of_a_flow_that_is_closed_leaves_a_run_to_resume(way: str) -> None:
    """A stream that its reader closes, or forgets, in the midst of a flow leaves a run that is resumed."""
    world, store = World(), InMemoryStore()
    add = world.step("add")

    async def body(flow: Flow, state: Num) -> Num:
        for _ in range(3):
            state = await flow.step(add, state)
        return state

    events: Any = runner_on(store).stream(flow_with(body), Num())
    async for one in events:
        if one.kind == "node_success":
            break
    if way == "closed":
        await events.aclose()
    else:
        del events, one
        gc.collect()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
    result = await runner_on(store).run(flow_with(body), Num())
    assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=3)), result.failure
    assert sorted(set(world.calls)) == ["add 0", "add 1", "add 2"]
